"""What is shown of a run while it goes on: one line that rewrites itself, and nothing where nobody looks."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamt1_jax.result import ChunkResult


class Progress:
    """A bar over chunks: how many, time left, frames/s, the best score, where chunks went that left the window.

    Args:
        forced: show it even where stderr is no terminal.
    """

    def __init__(self, chunks: int, label: str, *, forced: bool = False):
        from tqdm import tqdm

        hidden = not (forced or sys.stderr.isatty())
        self._bar: Any = tqdm(total=chunks, desc=label, unit="chunk", disable=hidden, file=sys.stderr)
        self._routes: dict[str, int] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, result: "ChunkResult") -> None:
        """One chunk is there."""
        if self._bar.disable:
            return
        if result.routes and (gone := result.routes[0]) is not None:
            self._routes[gone[1]] = self._routes.get(gone[1], 0) + 1
        words = [f"best score {result.chunk.best.score:.4g}"]
        if self._routes:
            words.append("routes " + " ".join(f"{route} {count}" for route, count in sorted(self._routes.items())))
        if result.restored:
            self._bar.initial += 1  # the rate, and so the time left, is that of new chunks alone
            self._bar.update()
        else:
            words.insert(0, f"{len(result.frames) / result.seconds:.1f} frames/s")
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update()
