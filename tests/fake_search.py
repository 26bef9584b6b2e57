"""A made-up search for the tests of everything that only looks at one: traces, and a pipeline that makes them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from streamt1_jax.trace import Candidate, Chunk, RouteName, Trace

HEIGHT, WIDTH, FPS = 32, 48, 16


def fake_trace(chunks: int = 5, beams: int = 2, candidates: int = 2, *, thumbnails: bool = True) -> Trace:
    """Candidates 1, ..., beams of every chunk are kept, in this order; the last beam has the best final score."""
    routes: list[RouteName] = ["discard", "ema", "append"]
    made = []
    for index in range(chunks):
        tried = []
        for flat in range(beams * candidates):
            rank = flat - 1 if 1 <= flat <= beams else None
            if beams * candidates == 1:
                rank = 0
            score = -(index + 1) - 0.1 * flat
            picture = np.full((20, 30, 3), (40 * index % 256, 60 * flat % 256, 200), np.uint8)
            tried.append(
                Candidate(
                    chunk=index,
                    parent_beam=None if index == 0 else flat // candidates,
                    candidate=flat if index == 0 else flat % candidates,
                    seed=42 + 1000 * index + flat,
                    short=score / 2,
                    long=score,
                    score=score,
                    ema=bool(flat % 2),
                    append=bool(flat // 2 % 2),
                    sink_frames=3,
                    sink_starts=(),
                    kept=rank,
                    finite=True,
                    thumbnail=picture if thumbnails else None,
                )
            )
        gone = (index - 3, routes[index % 3]) if index > 3 else None
        made.append(Chunk(index, 3 * index, min(0.1 * index, 0.4), tuple(tried), (gone,) * beams, 0.25))
    return Trace(tuple(made), tuple(-5.0 + beam for beam in range(beams)))


class FakeOutput:
    """What a call of the pipeline gives back, as far as the command line looks at it."""

    def __init__(self, prompt: str, frames: int, trace: Trace, settings: dict[str, Any]):
        rng = np.random.default_rng(0)
        self.frames = rng.integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
        self.trace, self.fps = trace, FPS
        self.info = {
            "prompt": prompt,
            "seed": settings["seed"],
            "score": math.nan,
            "weights": {"summary": "random weights from a fixed seed (untrained)"},
            "seconds": {"total": 0.5, "chunks": [0.1] * 3},
        }


class FakePipeline:
    """Records how it was made and called; `fail` is raised by the next call."""

    loaded: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 (a fresh list is set for every test)
    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fail: BaseException | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "FakePipeline":
        cls.loaded.append((str(name), options))
        return cls()

    def encode(self, prompts: list[str], *, strict: bool = False) -> None:
        """The real one loads the text encoder here, once for all prompts."""

    def __call__(self, prompt: str, *, frames: int, on_chunk: Any, **settings: Any) -> FakeOutput:
        type(self).calls.append((prompt, {"frames": frames, **settings}))
        if self.fail is not None:
            raise self.fail
        trace = fake_trace((frames + 3) // 12)
        for chunk in trace.chunks:
            on_chunk(FakeChunkResult(chunk, frames=np.zeros((12, HEIGHT, WIDTH, 3), np.uint8)))
        return FakeOutput(prompt, frames, trace, settings)


class FakeChunkResult:
    def __init__(self, chunk: Chunk, frames: np.ndarray):
        self.chunk, self.frames, self.routes = chunk, frames, chunk.evicted
        self.seconds, self.restored = chunk.seconds, False
