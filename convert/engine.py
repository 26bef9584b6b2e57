"""The one engine behind every conversion table.

- A table is a list of `Rule`s: which source keys, to which parameter, laid out how. Order never matters.
- `plan` looks at shapes alone, so full-size lists are checked without memory; it refuses six things, collects
  them all and raises once.
- `convert` fills the parameters one after the other; nothing else is held in memory.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.sources import DictSource, Source
from streamt1_jax.errors import WeightsError

M = TypeVar("M", bound=nnx.Module)

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda x: x,
    "linear": lambda x: x.T,  # [out, in] -> [in, out]
    "vector": lambda x: x.reshape(-1),  # a gamma [C, 1, 1, 1] -> [C]
    "squeeze": lambda x: x[0],  # a modulation [1, 6, M] -> [6, M]
    "conv_as_linear": lambda x: x.reshape(x.shape[0], -1).T,  # a convolution over one whole patch -> [in*patch, out]
    "conv2d": lambda x: x.transpose(2, 3, 1, 0),  # [O, I, kh, kw] -> [kh, kw, I, O]
    "conv3d": lambda x: x.transpose(2, 3, 4, 1, 0),  # [O, I, kt, kh, kw] -> [kt, kh, kw, I, O]
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """Source keys that fully match `pattern` fill `target`, after `LAYOUTS[layout]`.

    Args:
        pattern: a regular expression matched against the whole source key. A group named `layer` is the
            index on the leading axis of a stacked parameter; every other named group is put into `target`.
        target: dotted path of the parameter, with `{group}` for named groups; None: the key is known and
            deliberately not used.
        layout: a key of `LAYOUTS`.
    """

    pattern: str
    target: str | None
    layout: str = "same"


class Fill(NamedTuple):
    """One source tensor on its way."""

    key: str
    layout: str


class Leaf(NamedTuple):
    """One parameter: filled by one tensor, or, where `stacked`, by one tensor a layer."""

    shape: Shape
    stacked: bool
    fills: tuple[Fill, ...]


class Plan(NamedTuple):
    """What `plan` made: every parameter with its tensors, and the keys that rules leave out on purpose."""

    leaves: dict[str, Leaf]
    unused: frozenset[str]

    @property
    def size(self) -> int:
        """Numbers in all parameters together."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves.values())


class Piece(NamedTuple):
    """Rows `start` to `start + len(array)` of the parameter `path`, along its first axis."""

    path: str
    start: int
    array: np.ndarray


def abstract_params(make: Callable[[], nnx.Module]) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path, shape and type of every parameter of the module that `make` would make, without making it."""
    return dotted(nnx.state(nnx.eval_shape(make), nnx.Param))


def dotted(params: nnx.State) -> dict[str, Any]:
    """The leaves of a network's parameters by their dotted path."""
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))[0]
    return {".".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


class _Problems:
    """The six refusals of one plan, each about some names (keys, parameters) that a layer may differ in."""

    def __init__(self):
        self._found: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)

    def add(self, heading: str, names: Sequence[str], detail: Any = "") -> None:
        self._found[heading].append((tuple(names), f" {detail}".rstrip()))

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def __str__(self) -> str:
        texts = []
        for heading, entries in self._found.items():
            sign = "-" if heading == "never set" else "+"
            texts.append(f"{heading}: " + ", ".join(f"{sign} {line}" for line in _collapse(entries)))
        return "; ".join(texts)


_NUMBER = re.compile(r"(?<=[.\[])(\d+)(?=[.\]])")


def _collapse(entries: Iterable[tuple[tuple[str, ...], str]]) -> list[str]:
    """Entries that differ in their layer alone become one: `blocks.{0-29}.modulation`. Nothing is left out."""
    layers: dict[tuple[tuple[str, ...], str], list[int]] = defaultdict(list)
    for names, detail in entries:
        distinct = {number[1] for name in names if (number := _NUMBER.search(name))}
        if len(distinct) == 1:
            template = tuple(_NUMBER.sub("{}", name, count=1) for name in names)
            layers[template, detail].append(int(distinct.pop()))
        else:
            layers[names, detail].append(-1)
    return [" -> ".join(names).replace("{}", _ranges(numbers)) + detail for (names, detail), numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; [5] -> "5"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else "{" + text + "}"


def _laid_out(shape: Shape, layout: str) -> Shape | None:
    """The shape after a layout, or None where the layout needs another rank."""
    try:
        return LAYOUTS[layout](np.broadcast_to(np.zeros(()), shape)).shape
    except (ValueError, IndexError):
        return None


def _assign(
    source_shapes: Mapping[str, Shape], rules: Sequence[Rule], problems: _Problems
) -> tuple[dict[tuple[str, int | None], list[Fill]], set[str]]:
    """Which tensors each (target, layer) is given by the rules; and the keys left out on purpose."""
    patterns = [(re.compile(rule.pattern), rule) for rule in rules]
    fills: dict[tuple[str, int | None], list[Fill]] = defaultdict(list)
    unused = set()
    for key, shape in source_shapes.items():
        matches = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(key))]
        if not matches:
            problems.add("no rule", [key], tuple(shape))
        elif len(matches) > 1:
            problems.add("two rules", [key], "by " + " and ".join(rule.pattern for _, rule in matches))
        else:
            match, rule = matches[0]
            groups = {name: value or "" for name, value in match.groupdict().items()}
            layer = int(groups["layer"]) if "layer" in groups else None
            if rule.target is None:
                unused.add(key)
            else:
                fills[rule.target.format(**groups), layer].append(Fill(key, rule.layout))
    return fills, unused


def plan(
    source_shapes: Mapping[str, Shape],
    rules: Sequence[Rule],
    target: Mapping[str, Any],
    *,
    name: str = "checkpoint",
) -> Plan:
    """Decides which source tensor fills which parameter.

    Args:
        source_shapes: every key of the checkpoint and its shape.
        rules: the table.
        target: dotted path to anything with a `shape`, for every parameter (`abstract_params`).
        name: what the message calls the checkpoint.

    Raises:
        WeightsError: one error that lists all of: a key with no rule (+), a key with two rules (+), an unknown
            target (+), a parameter or a layer of it set twice (+), one never set (-), and a wrong shape (+).
    """
    problems = _Problems()
    fills, unused = _assign(source_shapes, rules, problems)
    claimed: dict[str, dict[int | None, Fill]] = defaultdict(dict)
    for (path, layer), given in fills.items():
        slot = _slot(path, layer)
        shape = _slot_shape(target, path, layer)
        if shape is None:
            problems.add("unknown target", [given[0].key, slot])
            continue
        if len(given) > 1:
            problems.add("target set twice", [*(fill.key for fill in given), slot])
        claimed[path][layer] = given[0]
        for fill in given:
            if _laid_out(source_shapes[fill.key], fill.layout) != shape:
                came = f"{tuple(source_shapes[fill.key])} as {fill.layout!r} is not {shape}"
                problems.add("wrong shape", [fill.key, slot], came)
    leaves = {path: _leaf(path, tuple(target[path].shape), claimed[path], problems) for path in sorted(target)}
    if problems:
        raise WeightsError(
            f"{name}: found {len(problems)} tensors that do not fit, expected every key to fill one parameter and "
            f"every parameter to be filled: {problems}. Check the format and its config."
        )
    return Plan(leaves, frozenset(unused))


def _slot(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path}[{layer}]"


def _slot_shape(target: Mapping[str, Any], path: str, layer: int | None) -> Shape | None:
    """The shape of a parameter or of one layer of it; None where there is no such thing."""
    if path not in target:
        return None
    shape = tuple(target[path].shape)
    if layer is None:
        return shape
    return shape[1:] if shape and layer < shape[0] else None


def _leaf(path: str, shape: Shape, slots: dict[int | None, Fill], problems: _Problems) -> Leaf:
    """One parameter from its slots (layers, or None for the whole), every missing one a problem."""
    whole, layers = slots.get(None), {layer: fill for layer, fill in slots.items() if layer is not None}
    if whole and layers:
        problems.add("target set twice", [whole.key, *(fill.key for fill in layers.values()), path])
    elif not slots:
        problems.add("never set", [path], shape)
    elif layers:
        for layer in range(shape[0]):
            if layer not in layers:
                problems.add("never set", [_slot(path, layer)], shape[1:])
    return Leaf(shape, whole is None, (whole,) if whole else tuple(layers[i] for i in sorted(layers)))


_BLOCK = 64  # Columns moved at once: a plain transposed copy of a big matrix misses the cache at every number.


def _place(out: np.ndarray, x: np.ndarray) -> None:
    """`out[...] = x`, cast if the types differ. Equal types move as bits: no bfloat16 goes through float32."""
    if out.dtype != x.dtype:
        out[...] = x
        return
    bits = np.dtype(f"u{out.dtype.itemsize}")
    to, given = out.view(bits), x.view(bits)
    if to.ndim == 2 and given.strides[0] < given.strides[1]:
        for at in range(0, to.shape[1], _BLOCK):
            to[:, at : at + _BLOCK] = given[:, at : at + _BLOCK]
    else:
        to[...] = given


def convert_pieces(plan: Plan, source: Source, dtype: Any, limit: int) -> Iterator[Piece]:
    """Like `convert`, in pieces of at most `limit` bytes (or one row, where a row is larger).

    Raises:
        WeightsError: a tensor is not of floating numbers (a quantised checkpoint).
    """
    dtype, read = np.dtype(dtype), set(plan.unused)
    for path, leaf in plan.leaves.items():
        row_bytes = math.prod(leaf.shape[1:]) * dtype.itemsize
        rows = max(1, limit // max(1, row_bytes))
        if leaf.stacked:
            for start in range(0, leaf.shape[0], rows):
                out = np.empty((min(rows, leaf.shape[0] - start), *leaf.shape[1:]), dtype)
                for row, fill in zip(out, leaf.fills[start : start + rows], strict=False):
                    _place(row, _laid_out_tensor(source, fill))
                    read.add(fill.key)
                yield Piece(path, start, out)
        else:
            (fill,) = leaf.fills
            whole = _laid_out_tensor(source, fill)
            read.add(fill.key)
            for start in range(0, len(whole), rows):
                out = np.empty((min(rows, len(whole) - start), *leaf.shape[1:]), dtype)
                _place(out, whole[start : start + rows])
                yield Piece(path, start, out)
            del whole
    left = source.shapes.keys() - read
    assert not left, f"planned from other shapes than the source's: never read {sorted(left)}"


def _laid_out_tensor(source: Source, fill: Fill) -> np.ndarray:
    x = source.read(fill.key)
    assert x.shape == tuple(source.shapes[fill.key]), f"{fill.key}: read {x.shape}, listed {source.shapes[fill.key]}"
    # ml_dtypes' types (bfloat16) are numpy's kind "V".
    if not (np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16"):
        raise WeightsError(
            f"{fill.key} is of type {x.dtype}, expected floating numbers. Convert the original checkpoint, "
            "not a quantised copy of it."
        )
    return LAYOUTS[fill.layout](x)


def convert(plan: Plan, source: Source, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every parameter's dotted path and its array of type `dtype`, sorted by path, one in memory at a time.

    The converter of one layer's table converts one layer: parity tests use the real tables.
    """
    for path, start, array in convert_pieces(plan, source, dtype, limit=2**63):
        assert start == 0
        yield path, array


def build(make: Callable[[], M], rules: Sequence[Rule], tensors: Mapping[str, Any], *, name: str = "checkpoint") -> M:
    """The module that `make` would make, filled through a table from tensors in memory, which are few or small.

    Args:
        make: makes the module; only its structure is used.
        tensors: a published state dict, NumPy or torch.

    Raises:
        WeightsError: the tensors do not fit, see `plan`.
    """
    source = DictSource(tensors)
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    target = dotted(abstract)
    (dtype,) = {leaf.dtype for leaf in target.values()}
    filled = dict(convert(plan(source.shapes, rules, target, name=name), source, dtype))

    def fill(path: tuple[Any, ...], _: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(filled[".".join(str(entry.key) for entry in path)])

    params = nnx.to_pure_dict(abstract)
    nnx.replace_by_pure_dict(abstract, jax.tree_util.tree_map_with_path(fill, params))
    return nnx.merge(graphdef, abstract)
