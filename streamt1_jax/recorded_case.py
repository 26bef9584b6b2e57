"""A recorded case of `streamt1 parity`: its two files, the networks in it, and how its numbers are compared."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from streamt1_jax.config import DiTConfig, VAEConfig
from streamt1_jax.errors import BadInputError

M = TypeVar("M", bound=nnx.Module)

LATENT_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One quantity: the largest error found and the largest allowed; NaN is never allowed."""

    quantity: str
    error: float
    tolerance: float
    count: int

    @property
    def matches(self) -> bool:
        return self.error <= self.tolerance


def close(quantity: str, ours: Any, recorded: Any, tolerance: float) -> Comparison:
    """The largest absolute difference; infinite where the shapes differ."""
    ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    error = float(np.abs(ours - recorded).max(initial=0.0)) if ours.shape == recorded.shape else np.inf
    return Comparison(quantity, error, tolerance, recorded.size)


def equal(quantity: str, ours: list, recorded: list) -> Comparison:
    """How many entries differ; none may."""
    wrong = sum(a != b for a, b in zip(ours, recorded, strict=False)) + abs(len(ours) - len(recorded))
    return Comparison(quantity, wrong, 0, len(recorded))


class Recorded(dict):
    """A recorded file: what it lacks is the file's fault, not the program's."""

    def __missing__(self, key: str) -> Any:
        raise BadInputError(f"the case lacks {key!r}, expected a whole recorded case: copy both its files again")


def read_case(path: Path) -> tuple[Recorded, Recorded]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise BadInputError(f"{path} is not a file, expected a recorded case: check the path")
    try:
        tensors = Recorded(load_file(path))
        notes = path.with_suffix(".json")
        sizes = json.loads(notes.read_text(), object_hook=Recorded) if notes.is_file() else Recorded()
        if not isinstance(sizes, Recorded):
            raise ValueError(f"{notes} holds a {type(sizes).__name__}, not an object")
    except (SafetensorError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}), expected safetensors and JSON: copy it again") from error
    return tensors, sizes


def under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def dit_config(sizes: Mapping[str, Any]) -> DiTConfig:
    """The published `config.json` has more keys than we use; those we have no other value for are checked."""
    for key, supported in {"patch_size": [1, 2, 2], "qk_norm": True, "cross_attn_norm": True}.items():
        if sizes.get(key, supported) != supported:
            raise BadInputError(f"the case has {key} {sizes[key]}, expected {supported}: no published model differs")
    return DiTConfig(**{f.name: sizes[f.name] for f in dataclasses.fields(DiTConfig) if f.name in sizes})


def build_network(make: Callable[[], M], rules: list, tensors: Mapping[str, np.ndarray], name: str) -> M:
    """The module with the case's weights, through the conversion table of the published format."""
    from convert.engine import build

    return build(make, rules, tensors, name=name)


def vae_config(sizes: Mapping[str, Any]) -> VAEConfig:
    known = {f.name for f in dataclasses.fields(VAEConfig)}
    values: dict[str, Any] = {}
    for key in known & sizes.keys():
        values[key] = tuple(sizes[key]) if isinstance(sizes[key], list) else sizes[key]
    return VAEConfig(**values)
