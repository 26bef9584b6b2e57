"""What a comparison's results say: means with intervals, and differences prompt by prompt.

Intervals are 95 % percentile bootstrap intervals over prompts (Efron, "Bootstrap methods: another look at the
jackknife", Annals of Statistics 1979): the prompts are drawn anew with replacement, always the same draws, so that a
report comes out the same twice. Each interval stands alone: of twenty differences that are none, one is expected to
look like one.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from streamt1_jax.compare_methods import METHODS, REFERENCE, Entry
from streamt1_jax.compare_store import Result

RESAMPLES = 10_000
LEVEL = 0.95
PRIMARY = "check.mean"  # what two methods are told apart by; all else explains it
FEWEST = 8  # prompts for an interval: the bootstrap's is far too narrow below

Scores = dict[str, dict[str, Any]]  # a metric's name to mean, low, high, prompts


@functools.cache
def _weights(count: int) -> Float[np.ndarray, "resamples n"]:
    """How often each of `count` prompts is drawn in each resample, over `count`."""
    rng = np.random.default_rng(0)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one number a prompt, and its interval; no interval of fewer than `FEWEST`. NaN stays NaN."""
    numbers = np.asarray(values, np.float64)
    low = high = None
    if len(numbers) >= FEWEST:
        low, high = map(float, np.quantile(_weights(len(numbers)) @ numbers, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return {"mean": float(numbers.mean()), "low": low, "high": high, "prompts": len(numbers)}


def summarize(results: Sequence[Result], entries: Sequence[Entry]) -> dict[str, Any]:
    """The whole comparison as plain data.

    Args:
        results: of every prompt by every entry.
        entries: in the order of the table.

    Returns:
        `prompts`, how many there are, their `texts`, and how many are `checked`; `metrics`, the names of the scores;
        `entries`, each with its scores, costs, drift and every metric `by_prompt`; `differences`, the reference less
        another method, prompt by prompt; `pairs`, the same of any two methods at equal budgets, of the `primary` metric
        alone.
    """
    by_entry = {entry: [r for r in results if _is_of(r, entry)] for entry in entries}
    metrics = list(dict.fromkeys(name for r in results for name in r.scores))
    texts = {r.prompt_index: r.prompt for r in results}
    primary = PRIMARY if PRIMARY in metrics else "reward.long"
    return {
        "prompts": len(texts),
        "texts": [texts[index] for index in sorted(texts)],
        "checked": len({r.prompt_index for r in results if any(_is_check(name) for name in r.scores)}),
        "interval": f"{100 * LEVEL:g} % bootstrap over prompts, {RESAMPLES} resamples, from {FEWEST} prompts on",
        "metrics": metrics,
        "entries": [_of_entry(entry, rows, metrics) for entry, rows in by_entry.items()],
        "differences": [
            {
                "method": entry.method.name,
                "budget": entry.budget,
                "reference_budget": best.budget,
                "scores": _difference(by_entry[best], by_entry[entry], metrics),
            }
            for best in entries
            for entry in entries
            if best.method.name == REFERENCE != entry.method.name
            and (entry.method.one_candidate or entry.budget == best.budget)
        ],
        "primary": primary,
        "pairs": [
            {
                "method": a.method.name,
                "less": b.method.name,
                "budget": a.budget,
                "score": _difference(ours, theirs, [primary]),
            }
            for (b, theirs), (a, ours) in itertools.combinations(sorted(by_entry.items(), key=_budgetless_first), 2)
            if b.method.one_candidate or a.budget == b.budget
        ],
    }


def _budgetless_first(item: tuple[Entry, Any]) -> bool:
    """What takes one candidate goes with every budget: the others are compared with it, whatever their order."""
    return not item[0].method.one_candidate


def _is_of(result: Result, entry: Entry) -> bool:
    return (result.method, result.budget) == (entry.method.name, entry.budget)


def _is_check(metric: str) -> bool:
    return metric.startswith("check.")


def _scores(rows: Sequence[dict[str, float]], metrics: Sequence[str]) -> Scores:
    """Each metric over the prompts that have it."""
    columns = {metric: [row[metric] for row in rows if metric in row] for metric in metrics}
    return {metric: interval(values) for metric, values in columns.items() if values}


def _of_entry(entry: Entry, rows: Sequence[Result], metrics: Sequence[str]) -> dict[str, Any]:
    ready = [row for row in rows if row.compiled == 0]
    seconds = np.mean([row.seconds for row in ready or rows])
    in_order = sorted(rows, key=lambda row: row.prompt_index)
    return {
        "method": entry.method.name,
        "about": METHODS[entry.method.name].about,
        "budget": entry.budget,
        "one_candidate": entry.method.one_candidate,
        "videos": entry.videos,
        "candidates_per_chunk": float(np.mean([row.candidates / row.chunks for row in rows])),
        "seconds": float(seconds),  # a result
        "seconds_of": len(ready),  # results; where 0, all of them compiled and the seconds hold that
        "scores": _scores([row.scores for row in rows], metrics),
        # In the order of the prompts, so that whoever has the summary alone can compare any two methods.
        "by_prompt": {metric: [row.scores.get(metric) for row in in_order] for metric in metrics},
        "drift": _drift(rows, metrics),
        "last_less_first": _last_less_first(rows, metrics),
    }


def _drift(rows: Sequence[Result], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The scores of each stretch of the videos, which all have the same stretches."""
    return [
        {
            "start": parts[0].start,
            "end": parts[0].end,
            "scores": _scores([part.scores for part in parts], metrics),
        }
        for parts in zip(*(row.parts for row in rows), strict=True)
    ]


def _last_less_first(rows: Sequence[Result], metrics: Sequence[str]) -> Scores:
    """The last stretch less the first, video by video; nothing of videos of one stretch."""
    ends = [(row.parts[0].scores, row.parts[-1].scores) for row in rows if len(row.parts) > 1]
    return _scores(
        [{name: last[name] - first[name] for name in first if name in last} for first, last in ends], metrics
    )


def _difference(ours: Sequence[Result], theirs: Sequence[Result], metrics: Sequence[str]) -> Scores:
    """Ours less theirs, prompt by prompt."""
    other = {row.prompt_index: row.scores for row in theirs}
    pairs = [(row.scores, other[row.prompt_index]) for row in ours]
    return _scores([{name: a[name] - b[name] for name in a if name in b} for a, b in pairs], metrics)
