"""Rewards written in words, as recorded runs give them: `8 * mean(sin(6 * video))`.

The text is parsed, checked against a short list of what is allowed, and turned into closures over numpy; nothing is
ever evaluated by Python itself. Numbers are float64 throughout, so a recorded score can be told from a rounding error.

    numbers              2, 0.5, 1e-3                     operators   + - * / ** and signs
    video                float64 [T, H, W, 3], the valid frames, in [0, 1]
    slices               video[-9:], video[:, ::2]        of the axes frames, height, width, channels in this order
    elementwise          sin cos abs exp sqrt tanh square
    reductions           mean std max min                 to one number
    difference           diff(x, axis=frames)             of neighbours along a named axis
"""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from streamt1_jax.errors import BadInputError
from streamt1_jax.rewards.base import Reward
from streamt1_jax.rewards.bridge import host_reward, per_video

AXES = {"frames": 0, "height": 1, "width": 2, "channels": 3}
ELEMENTWISE = {
    "sin": np.sin,
    "cos": np.cos,
    "abs": np.abs,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "square": np.square,
}
REDUCTIONS = {"mean": np.mean, "std": np.std, "max": np.max, "min": np.min}
BINARY = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide, ast.Pow: np.power}
UNARY = {ast.USub: np.negative, ast.UAdd: np.positive}
MAX_LENGTH = 2000  # characters
MAX_DEPTH = 50  # operators and calls inside one another

Value: TypeAlias = Any  # np.ndarray, or np.float64 where `Term.is_number`
ALLOWED = (
    f"numbers, + - * / **, video, slices, {', '.join([*ELEMENTWISE, *REDUCTIONS])} and diff(x, axis={'|'.join(AXES)})"
)


class Term(NamedTuple):
    """A checked piece of an expression."""

    value: Callable[[np.ndarray], Value]  # of the video
    is_number: bool  # one number, not an array


def parse(text: str) -> Callable[[np.ndarray], float]:
    """The function of a video [T, H, W, 3] in [0, 1] that `text` describes.

    Raises:
        BadInputError: anything but what the head of this file lists, by name; or a result that is not one number.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_LENGTH:
        raise BadInputError(
            f"reward expression is {text!r:.80}, expected text of 1 to {MAX_LENGTH} characters; shorten it"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInputError(f"reward expression {text!r:.200} cannot be read ({error}); expected {ALLOWED}") from error
    term = _term(tree.body, text, MAX_DEPTH)
    if not term.is_number:
        raise BadInputError(f"reward expression {text!r} is an array, expected one number; take its mean")

    def score(video: np.ndarray) -> float:
        with np.errstate(all="ignore"):  # 1/0 and the like are infinite or NaN, which the search can judge
            return float(term.value(np.asarray(video, np.float64)))

    return score


def expression_reward(name: str, text: str) -> Reward:
    """The reward that `text` describes, in float64 on the host; it reads no prompt.

    Raises:
        BadInputError: see `parse`.
    """
    score = parse(text)
    return host_reward(name, per_video(lambda video, prompt: score(video)), pixels="float32")


def _term(node: ast.expr, text: str, depth: int) -> Term:
    if depth == 0:
        raise BadInputError(f"reward expression {text!r:.80} is nested more than {MAX_DEPTH} deep; split or shorten it")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _number(value, text)
        case ast.Name(id="video"):
            return Term(lambda video: video, is_number=False)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            a, b = _term(left, text, depth - 1), _term(right, text, depth - 1)
            operator = BINARY[type(op)]
            return Term(lambda video: operator(a.value(video), b.value(video)), a.is_number and b.is_number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            a, sign = _term(operand, text, depth - 1), UNARY[type(op)]
            return Term(lambda video: sign(a.value(video)), a.is_number)
        case ast.Subscript(value=base, slice=index):
            a, cut = _term(base, text, depth - 1), _slices(index, text)
            if a.is_number:
                raise _refused(node, text)
            return Term(lambda video: a.value(video)[cut], is_number=False)
        case ast.Call(func=ast.Name(id=function), args=[argument], keywords=keywords):
            return _call(node, function, _term(argument, text, depth - 1), keywords, text)
    raise _refused(node, text)


def _number(value: int | float, text: str) -> Term:
    try:
        number = np.float64(value)
    except OverflowError as error:
        raise BadInputError(f"reward expression {text!r:.80} holds a number above 1e308; expected a float64") from error
    return Term(lambda video: number, is_number=True)


def _call(node: ast.expr, function: str, a: Term, keywords: list[ast.keyword], text: str) -> Term:
    match keywords:
        case [] if function in ELEMENTWISE:
            each = ELEMENTWISE[function]
            return Term(lambda video: each(a.value(video)), a.is_number)
        case [] if function in REDUCTIONS:
            reduce = REDUCTIONS[function]
            return Term(lambda video: reduce(a.value(video)), is_number=True)
        case [ast.keyword(arg="axis", value=ast.Name(id=axis))] if (
            function == "diff" and axis in AXES and not a.is_number
        ):
            return Term(lambda video: np.diff(a.value(video), axis=AXES[axis]), is_number=False)
    raise _refused(node, text)


def _slices(index: ast.expr, text: str) -> tuple[slice, ...]:
    """`a:b:c` of whole numbers, one or one for each of the first axes."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    if not 1 <= len(parts) <= len(AXES) or not all(isinstance(part, ast.Slice) for part in parts):
        raise _refused(index, text)
    slices = [part for part in parts if isinstance(part, ast.Slice)]
    cuts = tuple(slice(*(_bound(bound, text) for bound in (s.lower, s.upper, s.step))) for s in slices)
    if any(cut.step == 0 for cut in cuts):
        raise _refused(index, text)
    return cuts


def _bound(node: ast.expr | None, text: str) -> int | None:
    match node:
        case None:
            return None
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)) if not isinstance(value, bool):
            return -value
    raise _refused(node, text)


def _refused(node: ast.expr, text: str) -> BadInputError:
    piece = ast.get_source_segment(text.strip(), node) or type(node).__name__
    return BadInputError(f"reward expression {text!r:.200}: {piece!r:.80} is not allowed; expected {ALLOWED}")
