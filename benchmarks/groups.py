"""A comparison of the embedded model by kinds of captions: with one thing or two, and of single things by their shape.

    python benchmarks/groups.py benchmarks/results/cpu-2core-mini-compare-5s.json

Means over the captions of a kind, with the 95 % interval of the mean of all checks and of what it is more than that of
one candidate, prompt by prompt; of few captions there is no interval.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamt1_jax.compare import checkable_scene
from streamt1_jax.compare_report import score_cell
from streamt1_jax.compare_stats import interval
from streamt1_jax.mini.world import SHAPES

PREFIX = "check."


def kinds(prompts: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the prompts of each kind; of no kind is what cannot be checked."""
    scenes = [checkable_scene(prompt) for prompt in prompts]
    found = {"one thing": [i for i, s in enumerate(scenes) if s and len(s.things) == 1]}
    found["two things"] = [i for i, s in enumerate(scenes) if s and len(s.things) == 2]
    for shape in SHAPES:
        found[f"one {shape}"] = [i for i, s in enumerate(scenes) if s and [t.shape for t in s.things] == [shape]]
    return {kind: numbers for kind, numbers in found.items() if numbers}


def means(by_prompt: Mapping[str, Sequence[float]], numbers: Sequence[int]) -> dict[str, float]:
    """Of every check, over these prompts."""
    checks = {name.removeprefix(PREFIX): values for name, values in by_prompt.items() if name.startswith(PREFIX)}
    return {name: float(np.mean([values[i] for i in numbers])) for name, values in checks.items()}


def table(summary: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a kind of captions and entry of the comparison."""
    entries = summary["entries"]
    one = next((entry["by_prompt"] for entry in entries if entry["one_candidate"]), None)
    checks = [name.removeprefix(PREFIX) for name in summary["metrics"] if name.startswith(PREFIX)]
    head = ["captions with", "captions", "method", "budget", "mean of the checks", "less one candidate", *checks[1:]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, numbers in kinds(summary["texts"]).items():
        for entry in entries:
            ours = entry["by_prompt"]
            values = [ours[PREFIX + "mean"][i] for i in numbers]
            more = None
            if one is not None and not entry["one_candidate"]:
                more = interval([value - one[PREFIX + "mean"][i] for value, i in zip(values, numbers, strict=True)])
            of = means(ours, numbers)
            cells = [score_cell(interval(values)), score_cell(more, "+"), *(f"{of[check]:.3f}" for check in checks[1:])]
            lines.append(f"| {kind} | {len(numbers)} | {entry['method']} | {entry['budget']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, help="summary.json of a comparison")
    args = parser.parse_args()
    print("\n".join(table(json.loads(args.summary.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
