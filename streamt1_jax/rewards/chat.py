"""Prompts to the token ids of a reward model: instruction text, chat template, tokenizer. No torch.

- A user's prompt is text and nothing else: where it spells a reserved token (`<|Reward|>`, `<|image_pad|>`, ...), the
  model sees those characters, not the token.
- Everything but the number of visual tokens depends on the prompt alone and is kept, so a chunk tokenizes nothing.
"""

import functools
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from streamt1_jax.errors import WeightsError

Kind = Literal["image", "video"]

PLACEHOLDER = "{text_prompt}"
_STAND_IN = "\0"  # for the prompt, while specials are looked for: no prompt may hold it (`text.check_prompt`)
_REMEMBERED = 256  # prompts


@dataclass(frozen=True)
class Instruction:
    """The texts a model was trained with, and what its tokens mean.

    Args:
        template: the instruction, with `{text_prompt}` where the prompt goes.
        chat_template: Jinja, as the tokenizer supplies it.
        kind: what the text speaks of; one clip comes before it.
        reserved: the tokens whose hidden states are scored, in the order in which they stand in the text.
    """

    template: str
    chat_template: str
    kind: Kind
    reserved: tuple[str, ...]

    def __post_init__(self):
        try:
            braces = [rest for _, *rest in string.Formatter().parse(self.template) if rest[0] is not None]
            holds_prompt = braces == [[PLACEHOLDER.strip("{}"), "", None]]
        except ValueError:  # braces that do not close
            holds_prompt = False
        if not holds_prompt:
            raise WeightsError(
                f"the instruction text {self.template[:60]!r}... does not hold {PLACEHOLDER} once, and nothing else in "
                "braces; give the text that these weights were trained with"
            )

    def render(self, prompt: str) -> str:
        """The whole conversation as text.

        Raises:
            WeightsError: the chat template is broken.
        """
        text = self.template.format(text_prompt=prompt)
        content = [{"type": self.kind}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        try:
            return _template(self.chat_template).render(messages=messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program: any error of Jinja's or of Python's can come out of it
            raise WeightsError(
                f"the chat template {self.chat_template[:60]!r}... fails with {type(error).__name__}: {error}; "
                "expected Qwen2-VL's, download the base model's tokenizer again"
            ) from error


@functools.cache
def _template(source: str) -> Any:
    """A chat template, compiled as transformers compiles it: in a sandbox, since it came with a download."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


class RewardTokenizer:
    """Token ids of a prompt inside its instruction.

    Args:
        tokenizer: the text of a `tokenizer.json` that already knows the reserved tokens.

    Raises:
        WeightsError: the reserved tokens are not the tokenizer's last ids, in their order; or the texts do not hold
            each of them once.
    """

    def __init__(self, instruction: Instruction, tokenizer: str):
        import tokenizers

        self.instruction = instruction
        self._backend = tokenizers.Tokenizer.from_str(tokenizer)
        self._literal = tokenizers.Tokenizer.from_str(tokenizer)
        self._literal.encode_special_tokens = True  # special tokens are read as plain characters
        for backend in (self._backend, self._literal):
            backend.no_truncation()
            backend.no_padding()
        self.length = self._backend.get_vocab_size(with_added_tokens=True)
        special = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        self._ids = special
        self._pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.reserved_ids = self._reserved_ids()
        self.pad_id = self._id(f"<|{instruction.kind}_pad|>")
        self._outline = self._specials(_STAND_IN)
        self.ids = functools.lru_cache(_REMEMBERED)(self._tokenize)
        self.ids("a prompt")  # so that a text that can serve no prompt is refused here

    def __call__(self, prompt: str, visual_tokens: int) -> Int64[np.ndarray, "L"]:
        """The ids of one row: the clip's place is filled with `visual_tokens` pads."""
        ids = self.ids(prompt)
        (place,) = np.flatnonzero(ids == self.pad_id)
        return np.concatenate([ids[:place], np.full(visual_tokens, self.pad_id, np.int64), ids[place + 1 :]])

    def reserved_places(self, ids: Int64[np.ndarray, "L"]) -> Int64[np.ndarray, "k"]:
        """Where the reserved tokens stand in a row."""
        return np.array([np.flatnonzero(ids == index)[0] for index in self.reserved_ids], np.int64)

    def _tokenize(self, prompt: str) -> Int64[np.ndarray, "l"]:
        """One pad stands for the whole clip."""
        rendered = self.instruction.render(prompt)
        if self._pattern.findall(rendered) == self._outline:
            ids = self._backend.encode(rendered, add_special_tokens=False).ids
        else:
            ids = self._tokenize_literally(prompt)
        found = np.array(ids, np.int64)
        self._check(found)
        return found

    def _tokenize_literally(self, prompt: str) -> list[int]:
        """Cuts the text at its own special tokens first, so that the prompt can add none."""
        rendered = self.instruction.render(_STAND_IN)
        ids: list[int] = []
        end = 0
        for match in self._pattern.finditer(rendered):
            ids += self._plain(rendered[end : match.start()], prompt)
            ids.append(self._ids[match.group()])
            end = match.end()
        return ids + self._plain(rendered[end:], prompt)

    def _plain(self, text: str, prompt: str) -> list[int]:
        return self._literal.encode(text.replace(_STAND_IN, prompt), add_special_tokens=False).ids

    def _specials(self, prompt: str) -> list[str]:
        return self._pattern.findall(self.instruction.render(prompt))

    def _id(self, token: str) -> int:
        if token not in self._ids:
            raise WeightsError(
                f"the tokenizer has no special token {token!r}, expected Qwen2-VL's; convert the rewards again with "
                "the base model that they were trained on"
            )
        return self._ids[token]

    def _reserved_ids(self) -> tuple[int, ...]:
        names = self.instruction.reserved
        found = tuple(self._id(name) for name in names)
        expected = tuple(range(self.length - len(names), self.length))
        if found != expected:
            raise WeightsError(
                f"the tokenizer gives {' '.join(names)} the ids {found}, expected {expected}, its last ones in this "
                "order; the weights' rows would be another token's: use the tokenizer of these weights"
            )
        return found

    def _check(self, ids: Int64[np.ndarray, "l"]) -> None:
        """Exactly one place for the clip and one for each reserved token, these in order."""
        wanted: Sequence[int] = (self.pad_id, *self.reserved_ids)
        places = [np.flatnonzero(ids == index) for index in wanted]
        if [len(place) for place in places] != [1] * len(wanted) or np.any(np.diff(np.concatenate(places)) <= 0):
            names = (f"<|{self.instruction.kind}_pad|>", *self.instruction.reserved)
            counts = dict(zip(names, map(len, places), strict=True))
            raise WeightsError(
                f"the instruction text holds {counts}, expected each once and in this order; give the text that these "
                "weights were trained with"
            )
