"""Names of the published reward models, and of the networks here: the same, both ways and strictly.

- Published are the names of transformers 4.45 (`visual.`, `model.`); here those of 5.x (`model.visual.`,
  `model.language_model.`), which newer base checkpoints carry as well. The language-model head is known and not used.
- VideoReward's state dict is that of an unmerged PEFT model: a prefix, `base_layer`, and LoRA halves beside it.
- Sources that look at other sources: renamed, overlaid, with fewer rows. Tensors are read one at a time.
"""

import re
from collections.abc import Mapping

import numpy as np

from convert.engine import Rule
from convert.sources import Shape, Source
from streamt1_jax.errors import WeightsError

EMBEDDING = "model.embed_tokens.weight"
UNUSED = "lm_head.weight"

_PEFT_PREFIX = "base_model.model."
_LORA = re.compile(r".+\.lora_[AB](\.[^.]+)?\.weight")
_NAMES = (  # published, here
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
    ("rm_head.", "rm_head."),
)


def reward_rules() -> list[Rule]:
    """Published keys to parameters of `RewardNetwork`."""
    return [
        Rule(r"visual\.(?P<rest>.+)", "model.visual.{rest}"),
        Rule(r"model\.(?P<rest>(?!visual\.|language_model\.).+)", "model.language_model.{rest}"),
        Rule(r"(?P<same>model\.(?:visual|language_model)\..+)", "{same}"),
        Rule(r"(?P<head>rm_head\..+)", "{head}"),
        Rule(re.escape(UNUSED), None),
    ]


def published_name(name: str) -> str:
    """The published key (transformers 4.45) of a parameter of `RewardNetwork`.

    Raises:
        WeightsError: there is no such parameter.
    """
    for published, here in sorted(_NAMES, key=lambda pair: -len(pair[1])):
        if name.startswith(here):
            return published + name.removeprefix(here)
    raise WeightsError(f"{name} has no published name, expected a parameter of a reward network; check its spelling")


class RenamedSource:
    """Some tensors of a source under other names.

    Args:
        names: new name to the source's own.
    """

    def __init__(self, source: Source, names: Mapping[str, str]):
        self._source, self._names = source, dict(names)
        self.shapes = {new: tuple(source.shapes[old]) for new, old in self._names.items()}

    def read(self, key: str) -> np.ndarray:
        return self._source.read(self._names[key])


class OverlaidSource:
    """The tensors of one source, and of another where the first has none of that name."""

    def __init__(self, top: Source, base: Source):
        self._top, self._base = top, base
        self.shapes = {**base.shapes, **top.shapes}

    def read(self, key: str) -> np.ndarray:
        return (self._top if key in self._top.shapes else self._base).read(key)


class ShrunkSource:
    """A source whose embedding is cut to the tokenizer's rows, as resizing a model's embedding cuts it.

    Raises:
        WeightsError: the embedding has fewer rows than the tokenizer has tokens.
    """

    def __init__(self, source: Source, rows: int):
        self._source, self._rows = source, rows
        self._cut = {key for key in (EMBEDDING, UNUSED) if key in source.shapes}
        self.shapes = dict(source.shapes)
        for key in self._cut:
            shape: Shape = tuple(source.shapes[key])
            if shape[0] < rows:
                raise WeightsError(
                    f"{key} has {shape[0]} rows, expected at least the tokenizer's {rows}; give the base model "
                    "that the reward was trained on"
                )
            self.shapes[key] = (rows, *shape[1:])

    def read(self, key: str) -> np.ndarray:
        return self._source.read(key)[: self._rows] if key in self._cut else self._source.read(key)


def split_peft(source: Source) -> tuple[Source, Source | None]:
    """(weights under published names, LoRA halves under PEFT's) of a state dict of a PEFT model, or of a plain one.

    Raises:
        WeightsError: two keys that mean the same weight.
    """
    names: dict[str, str] = {}
    halves: dict[str, str] = {}
    for key in source.shapes:
        if _LORA.fullmatch(key):
            halves[key] = key
            continue
        name = key.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
        if name in names:
            raise WeightsError(f"{key} and {names[name]} are the same weight, expected it once; check the file")
        names[name] = key
    return RenamedSource(source, names), RenamedSource(source, halves) if halves else None


def as_published(source: Source) -> Source:
    """A base model's weights under published names, whichever names transformers saved it under."""
    known = re.compile(r"model\.(visual|language_model)\.")
    return RenamedSource(source, {published_name(key) if known.match(key) else key: key for key in source.shapes})
