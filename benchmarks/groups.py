"""A comparison of the embedded model by kinds of captions: one thing or two, and the shape of single things.

python benchmarks/groups.py comparison/results.jsonl
"""

import argparse
import collections
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from streamt1_jax.compare import checkable_scene
from streamt1_jax.compare_store import read_results
from streamt1_jax.mini.world import Scene

PREFIX = "check."


class Scored(Protocol):
    """What a table needs of a result."""

    @property
    def method(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def scores(self) -> dict[str, float]: ...


def table(results: Iterable[Scored], group: Callable[[Scene], str | None], checks: list[str]) -> list[str]:
    """Means in Markdown, a row a group and method.

    Args:
        group: the name of a scene's group; None leaves it out.
        checks: the columns.
    """
    rows: dict[tuple[str, str], list[Scored]] = collections.defaultdict(list)
    for result in results:
        scene = checkable_scene(result.prompt)
        name = None if scene is None else group(scene)
        if name is not None:
            rows[name, result.method].append(result)
    lines = ["| captions with | method | captions | " + " | ".join(checks) + " |", "|" + "---|" * (3 + len(checks))]
    for (name, method), found in sorted(rows.items()):
        means = [np.mean([result.scores[PREFIX + check] for result in found]) for check in checks]
        lines.append(f"| {name} | {method} | {len(found)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return lines


def things(scene: Scene) -> str:
    return ("one thing", "two things")[len(scene.things) - 1]


def single_shape(scene: Scene) -> str | None:
    return scene.things[0].shape if len(scene.things) == 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of one comparison, or of parts of one")
    args = parser.parse_args()
    results = [result for path in args.results for result in read_results(path)]
    checks = [name.removeprefix(PREFIX) for name in results[0].scores if name.startswith(PREFIX)]
    print("\n".join([*table(results, things, checks), "", *table(results, single_shape, ["shape", "mean"])]))


if __name__ == "__main__":
    main()
