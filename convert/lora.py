"""Merging a LoRA into the weights it was trained on, while they are read (METHOD section 9).

`W += (alpha / rank) * B @ A`, in float32; the one cast to the parameters' type comes after.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.sources import Source
from streamt1_jax.errors import WeightsError

# base_model.model.blocks.0.self_attn.q.lora_A.weight, or .lora_A.default.weight (peft with its adapter's name)
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight")


class _Pair(NamedTuple):
    """The keys of A [rank, in] and B [out, rank]."""

    a: str
    b: str


class LoRASource:
    """A source whose weights have a LoRA merged in as they are read.

    Args:
        base: the weights the LoRA was trained on.
        lora: the LoRA, in peft's names.
        alpha: None takes the rank, so that the scale is 1 (as in LongLive: 256 and 256).

    Raises:
        WeightsError: one error that lists every key that is no half of a LoRA, half without the other, module
            that the base does not have and wrong shape or rank; or the base already has a LoRA merged in.
    """

    def __init__(self, base: Source, lora: Source, alpha: float | None = None):
        if isinstance(base, LoRASource) or any("lora_" in key for key in base.shapes):
            raise WeightsError(
                "LoRA: the base weights already carry a LoRA, expected them as they were before. Merge it once, into "
                "the base checkpoint."
            )
        self.shapes = base.shapes
        self._base, self._lora, self._alpha = base, lora, alpha
        self._pairs = _pair(base, lora)
        self.ranks = sorted({lora.shapes[pair.a][0] for pair in self._pairs.values()})

    def read(self, key: str) -> np.ndarray:
        weight = self._base.read(key)
        if key not in self._pairs:
            return weight
        pair = self._pairs[key]
        a = self._lora.read(pair.a).astype(np.float32)
        b = self._lora.read(pair.b).astype(np.float32)
        scale = 1.0 if self._alpha is None else self._alpha / a.shape[0]
        return weight.astype(np.float32) + np.float32(scale) * (b @ a)


def adapter_alpha(file: Path) -> float | None:
    """The alpha that peft wrote beside a LoRA, or None where there is no adapter_config.json.

    Raises:
        WeightsError: the adapter merges by another formula (rsLoRA, DoRA), or the config is broken.
    """
    config = file.with_name("adapter_config.json")
    if not config.is_file():
        return None
    try:
        values = json.loads(config.read_text())
        alpha, other = float(values["lora_alpha"]), [key for key in ("use_rslora", "use_dora") if values.get(key)]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{config}: expected JSON with lora_alpha. Download it again.") from error
    if other:
        raise WeightsError(f"{config}: sets {' and '.join(other)}, expected a plain LoRA. Merge this one in PyTorch.")
    return alpha


def _pair(base: Source, lora: Source) -> dict[str, _Pair]:
    """The base key of every module with its two halves; raises one error with every problem."""
    problems: list[str] = []
    halves: dict[str, dict[str, str]] = {}
    for key in lora.shapes:
        if not (match := _NAME.fullmatch(key)):
            problems.append(f"+ {key} (not a name of a LoRA's half)")
        elif match["half"] in halves.setdefault(match["module"], {}):
            problems.append(f"+ {key} (set twice, also {halves[match['module']][match['half']]})")
        else:
            halves[match["module"]][match["half"]] = key
    pairs = {}
    for module, found in halves.items():
        # The file may name modules from the network (blocks.0) or from the wrapper that holds it (model.blocks.0).
        names = [f"{module}.weight", f"model.{module}.weight", f"{module.removeprefix('model.')}.weight"]
        target = next((name for name in names if name in base.shapes), None)
        if target is None:
            problems.append(f"+ {module} (unknown target: no such weight in the base)")
        elif missing := {"A", "B"} - found.keys():
            problems.append(f"- {module}.lora_{missing.pop()} (only the other half is there)")
        elif target in pairs:
            problems.append(f"+ {module} (set twice: {target})")
        else:
            pairs[target] = _Pair(found["A"], found["B"])
            a, b, weight = lora.shapes[found["A"]], lora.shapes[found["B"]], base.shapes[target]
            if not (len(a) == len(b) == len(weight) == 2 and a[0] == b[1] > 0 and (b[0], a[1]) == tuple(weight)):
                problems.append(f"+ {module} (wrong shape or rank: B {b} @ A {a} is not {tuple(weight)})")
    if problems or not pairs:
        raise WeightsError(
            f"LoRA: {len(problems)} problems, expected lora_A [rank, in] and lora_B [out, rank] for weights of the "
            f"base: {'; '.join(problems) or 'it is empty'}. Check that the LoRA belongs to this base."
        )
    return pairs
