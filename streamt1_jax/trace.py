"""The record of a search on the host: every candidate of every chunk, and how to walk back through it.

Plain numbers and NumPy arrays, no device memory. A frame count or a start is in latent frames.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.errors import BadInputError

RouteName: TypeAlias = Literal["discard", "ema", "append"]
ROUTES: tuple[RouteName, ...] = get_args(RouteName)


@dataclass(frozen=True)
class Candidate:
    """One candidate of one chunk (METHOD sections 4 to 6)."""

    chunk: int
    parent_beam: int | None  # rank of the beam it continues; None in chunk 0
    candidate: int  # index among the candidates of its parent; in chunk 0 among all
    seed: int
    short: float
    long: float
    score: float  # alpha * short + (1 - alpha) * long
    ema: bool  # its flags, fixed when it is scored
    append: bool
    sink_frames: int  # frames in the sinks that its forward attended to
    sink_starts: tuple[int, ...]  # first frame of each appended sink among them
    kept: int | None  # rank among the kept beams, best 0; None: pruned
    finite: bool  # scores and latents are finite
    thumbnail: UInt8[np.ndarray, "h w 3"] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Chunk:
    """Every candidate of one chunk, in the order tried."""

    index: int
    start_frame: int
    alpha: float  # weight of the short score
    candidates: tuple[Candidate, ...]
    evicted: tuple[tuple[int, RouteName] | None, ...]  # per kept beam: which chunk left its window, and where it went
    seconds: float  # wall time

    @property
    def best(self) -> Candidate:
        """The candidate that became beam 0."""
        return self.kept(0)

    def kept(self, beam: int) -> Candidate:
        """The candidate that became kept beam `beam`.

        Raises:
            BadInputError: this chunk kept no such beam.
        """
        for candidate in self.candidates:
            if candidate.kept == beam:
                return candidate
        beams = sorted(c.kept for c in self.candidates if c.kept is not None)
        raise BadInputError(
            f"beam {beam} asked of chunk {self.index}, which kept the beams {beams}; choose one of them"
        )


@dataclass(frozen=True)
class Switch:
    """A change of the prompt (METHOD section 9)."""

    chunk: int  # the first one under the new prompt
    prompt: str
    sinks_replaced: bool  # the first sinks were made anew of recent chunks and appended ones dropped


@dataclass(frozen=True)
class Trace:
    """A whole search: what was tried, what was kept, and which beam became the video."""

    chunks: tuple[Chunk, ...]
    final_scores: tuple[float, ...] = ()  # per kept beam: the score of its whole video; empty before the end
    switches: tuple[Switch, ...] = ()  # in the order of their chunks

    @property
    def winner(self) -> int:
        """The beam whose video is the result: the best finite final score, the earlier one at a tie, else beam 0."""
        scores = [score if math.isfinite(score) else -math.inf for score in self.final_scores]
        return scores.index(max(scores)) if scores else 0

    def history(self, beam: int) -> tuple[Candidate, ...]:
        """The candidates that make up a beam of the last chunk, first chunk first."""
        path = []
        rank: int | None = beam
        for chunk in reversed(self.chunks):
            assert rank is not None, f"the parent of chunk {chunk.index + 1} is not recorded"
            path.append(chunk.kept(rank))
            rank = path[-1].parent_beam
        return tuple(reversed(path))

    def winning_path(self) -> tuple[Candidate, ...]:
        """`history` of the beam that became the video."""
        return self.history(self.winner)

    def routes(self, beam: int) -> dict[int, RouteName]:
        """Where each chunk of a beam's history went when it left the window, by chunk index."""
        steps = zip(self.chunks, self.history(beam), strict=True)
        entries = (chunk.evicted[c.kept] for chunk, c in steps if chunk.evicted and c.kept is not None)
        return dict(entry for entry in entries if entry is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`: no thumbnails; NaN and infinities become null."""
        return {
            "final_scores": [_number(score) for score in self.final_scores],
            "winner": self.winner,
            "switches": [dataclasses.asdict(switch) for switch in self.switches],
            "chunks": [
                {
                    "index": chunk.index,
                    "start_frame": chunk.start_frame,
                    "alpha": _number(chunk.alpha),
                    "seconds": _number(chunk.seconds),
                    "evicted": [list(entry) if entry else None for entry in chunk.evicted],
                    "candidates": [_candidate_to_json(candidate) for candidate in chunk.candidates],
                }
                for chunk in self.chunks
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trace":
        """The trace that `to_json` wrote; null becomes NaN.

        Raises:
            BadInputError: not what `to_json` writes.
        """
        try:
            return cls(
                chunks=tuple(_chunk_from_json(chunk) for chunk in data["chunks"]),
                final_scores=tuple(_nan_if_none(score) for score in data["final_scores"]),
                switches=tuple(Switch(**switch) for switch in data.get("switches", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise BadInputError(
                f"the trace cannot be read: {problem}; expected what Trace.to_json writes: read a whole run.json"
            ) from error


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value


def _candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    values = {f.name: getattr(candidate, f.name) for f in dataclasses.fields(candidate) if f.name != "thumbnail"}
    scores = {key: _number(values[key]) for key in ("short", "long", "score")}
    return {**values, **scores, "sink_starts": list(candidate.sink_starts)}


def _candidate_from_json(data: Mapping[str, Any]) -> Candidate:
    scores = {key: _nan_if_none(data[key]) for key in ("short", "long", "score")}
    return Candidate(**{**data, **scores, "sink_starts": tuple(data["sink_starts"])})


def _evicted_from_json(entry: list | None) -> tuple[int, RouteName] | None:
    if entry is None:
        return None
    chunk, route = entry
    if route not in ROUTES:
        raise ValueError(f"the route {route!r} is none of {', '.join(ROUTES)}")
    return chunk, route


def _chunk_from_json(data: Mapping[str, Any]) -> Chunk:
    return Chunk(
        index=data["index"],
        start_frame=data["start_frame"],
        alpha=_nan_if_none(data["alpha"]),
        candidates=tuple(_candidate_from_json(candidate) for candidate in data["candidates"]),
        evicted=tuple(_evicted_from_json(entry) for entry in data["evicted"]),
        seconds=_nan_if_none(data["seconds"]),
    )
