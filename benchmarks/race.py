"""Rival forms of one computation, timed in turn (A B A B ...), so that a slow minute of the machine meets all of them.

Shared by the benchmarks of this folder.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from numpy.typing import ArrayLike
from scipy.stats import rankdata

AT_LEAST = 0.05  # seconds of one measurement; what is faster is called several times in it


def race(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each form, in `rounds` rounds; what each returns is waited for.

    A form has been called before its first round, so compilation does not count.
    """
    calls = {}
    for name, run in forms.items():
        jax.block_until_ready(run())
        calls[name] = max(1, math.ceil(AT_LEAST / _seconds(run, 1)))
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, run in forms.items():
            taken[name].append(_seconds(run, calls[name]))
    return taken


def _seconds(run: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - started) / calls


def relative_rms(ours: PyTree, expected: PyTree) -> float:
    """RMS of the difference over RMS of what is expected, of the leaf where it is largest."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        a, b = (jnp.asarray(x).astype(jnp.float32) for x in (a, b))
        difference, size = (float(jnp.sqrt(jnp.mean(jnp.square(x)))) for x in (a - b, b))
        worst = max(worst, difference / max(size, 1e-30))
    return worst


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's, of all numbers of two arrays; 1 is the same order. NaN where those of either are all the same."""
    a, b = np.ravel(a), np.ravel(b)
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]) if min(np.ptp(a), np.ptp(b)) > 0 else math.nan


def write_report(file: str | None, report: Mapping[str, Any]) -> None:
    if file is not None:
        Path(file).write_text(json.dumps(report, indent=1) + "\n")
