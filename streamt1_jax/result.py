"""What a run gives back, on the host: frames, the record of the search, and what made them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from streamt1_jax.cache import EMPTY
from streamt1_jax.config import RunConfig
from streamt1_jax.sink import Route
from streamt1_jax.state import ChunkRecord
from streamt1_jax.trace import Candidate, Chunk, RouteName, Trace


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """One committed chunk, as the Python driver hands it out."""

    frames: UInt8[np.ndarray, "T H W 3"]  # of the beam that is best so far
    chunk: Chunk  # every candidate
    record: ChunkRecord  # the same as arrays, latents and frames of all kept beams among them
    prompt: str  # what it shows
    restored: bool = False  # it was made before, by a run that this one resumes

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All of them, in the order tried."""
        return self.chunk.candidates

    @property
    def routes(self) -> tuple[tuple[int, RouteName] | None, ...]:
        """Per kept beam: the chunk that left its window, and where it went."""
        return self.chunk.evicted

    @property
    def seconds(self) -> float:
        """Wall time of the chunk."""
        return self.chunk.seconds


@dataclass(frozen=True, eq=False)
class Output:
    """A finished video."""

    frames: UInt8[np.ndarray, "T H W 3"]
    latents: Float[np.ndarray, "F C h w"]
    trace: Trace
    fps: int
    info: dict[str, Any]  # plain data: prompt, settings, seeds, weights, versions, device, timings

    def save(self, path: str | Path) -> None:
        """Writes the video as mp4; what stood at `path` is replaced when the new file is whole."""
        from streamt1_jax.video import write_mp4

        write_mp4(path, self.frames, fps=self.fps)


def to_chunk(record: ChunkRecord, index: int, config: RunConfig, seconds: float) -> Chunk:
    """The host's view of one `ChunkRecord`, whose leaves are NumPy arrays."""
    beams, count = record.seed.shape
    f, sink_size = config.stream.latent_frames_per_chunk, config.stream.sink_size
    ranks = {int(flat): rank for rank, flat in enumerate(record.kept)}

    def candidate(flat: int) -> Candidate:
        beam, number = divmod(flat, count)
        starts = tuple(int(start) for start in record.sink_start[beam] if start != EMPTY)
        return Candidate(
            chunk=index,
            parent_beam=None if index == 0 else beam,
            candidate=flat if index == 0 else number,
            seed=int(record.seed[beam, number]),
            short=float(record.short[beam, number]),
            long=float(record.long[beam, number]),
            score=float(record.score[beam, number]),
            ema=bool(record.ema[beam, number]),
            append=bool(record.append[beam, number]),
            sink_frames=sink_size + f * len(starts),
            sink_starts=starts,
            kept=ranks.get(flat),
            finite=bool(record.usable[beam, number]),
            thumbnail=np.asarray(record.thumbnail[beam, number]),
        )

    def eviction(start: int, route: int) -> tuple[int, Any] | None:
        return None if start == EMPTY else (start // f, Route(route).name.lower())

    return Chunk(
        index=index,
        start_frame=index * f,
        alpha=float(record.alpha),
        candidates=tuple(candidate(flat) for flat in range(beams * count)),
        evicted=tuple(map(eviction, record.evicted_start.tolist(), record.evicted_route.tolist())),
        seconds=seconds,
    )


def beam_frames(trace: Trace, records: Sequence[ChunkRecord], beam: int) -> UInt8[np.ndarray, "T H W 3"]:
    """The whole video of one kept beam: the frames of its history, chunk after chunk."""
    return np.concatenate([r.frames[c.kept] for r, c in zip(records, trace.history(beam), strict=True)])


def beam_latents(trace: Trace, records: Sequence[ChunkRecord], beam: int) -> Float[np.ndarray, "F C h w"]:
    """The latents of one kept beam's whole history."""
    return np.concatenate([r.latents[c.kept] for r, c in zip(records, trace.history(beam), strict=True)])


def digests(latents: np.ndarray, frames: np.ndarray) -> dict[str, str]:
    """The sha256 of a video's numbers: equal for runs that are equal to the bit."""
    arrays = {"latents": latents, "frames": frames}
    return {name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in arrays.items()}
