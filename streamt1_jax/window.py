"""What the rewards see of a candidate, in the two decode modes (METHOD section 5).

- "streaming" (default): a decoder carries its state per beam, so each pixel frame is decoded once; the beam remembers
  the frames of its last W chunks.
- "window" (as released): the chunk, and the last W chunks, are decoded from a fresh decoder every time; the beam
  remembers latents.

Both give the long reward the same frames as long as the window starts at frame 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from streamt1_jax.config import SearchConfig
from streamt1_jax.generator import Generator
from streamt1_jax.state import StreamState
from streamt1_jax.types import Count, Frames


class Seen(NamedTuple):
    """Every leaf [B, K, ...] but `long_valid`."""

    chunk: Float[Array, "B K T H W 3"]  # the candidate's own frames, in [0, 1]
    long: Shaped[Array, "B K cap H W 3"]  # the frames of the last W chunks, oldest first
    long_valid: Count  # how many of them are valid
    window: PyTree  # the candidate's next `Beam.window`
    decoder: PyTree | None  # its next `Beam.decoder`, where streaming has advanced it


def to_pixels(frames: Shaped[Array, "*n H W 3"], pixels: str) -> Shaped[Array, "*n H W 3"]:
    """Frames in [0, 1], or already in uint8, as a reward wants them: "uint8" or "float32"."""
    if pixels == "uint8" and frames.dtype != jnp.uint8:
        return jnp.round(frames * 255.0).astype(jnp.uint8)
    return frames


def push(
    buffer: Shaped[Array, "cap *x"], count: Count, drop: Count, new: Shaped[Array, "n *x"]
) -> Shaped[Array, "cap *x"]:
    """Drops the oldest `drop` of `count` valid entries and appends `new`; what stands behind is garbage.

    >>> push([a b c .], count=3, drop=2, new=[d e])  ->  [c d e .]
    """
    shifted = jnp.roll(buffer, -drop, axis=0)
    return jax.lax.dynamic_update_slice_in_dim(shifted, new.astype(buffer.dtype), count - drop, axis=0)


def decodes_in_turn(mesh: Mesh | None) -> bool:
    """Whether candidates are decoded one after the other: on one CPU, and nowhere else.

    The convolutions of one candidate keep all cores busy, so a batch gains nothing and its arrays, as many times as
    large, fall out of the processor's cache. Least of 30 runs on two shared cores, 80x128 pixels: one candidate takes
    141 ms, four in a batch 683 (4.8 times one), four in turn 570 (4.0). Denoising is another case: its small matrix
    products gain from a batch (3.4 times one against 3.9 in turn) and stay in one. A GPU wants the batch for both.
    """
    return mesh is None and jax.default_backend() == "cpu"


def over_candidates(fn: Callable[[Any, Any], Any], candidates: PyTree, beams: PyTree, *, in_turn: bool) -> PyTree:
    """`fn(candidate, beam)` of every candidate, written for one, with the beam that it continues.

    Args:
        candidates: leaves [B, K, ...].
        beams: leaves [B, ...].
        in_turn: one after the other, instead of in a batch.

    Returns:
        Leaves [B, K, ...].
    """
    grid = jax.tree.leaves(candidates)[0].shape[:2]
    if not in_turn or grid == (1, 1):
        return jax.vmap(jax.vmap(fn, in_axes=(0, None)))(candidates, beams)

    def one(flat):
        beam, number = jnp.unravel_index(flat, grid)
        return fn(jax.tree.map(lambda x: x[beam, number], candidates), jax.tree.map(lambda x: x[beam], beams))

    # One loop over both axes: a loop in a loop would copy what the inner one has stacked.
    made = jax.lax.map(one, jnp.arange(grid[0] * grid[1], dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(*grid, *x.shape[1:]), made)


@dataclass(frozen=True, eq=False)
class StreamingWindow:
    """The frames of the last W chunks, each decoded once from its parent's decoder state."""

    generator: Generator
    chunks: int
    pixels: str
    mesh: Mesh | None = None

    def empty(self) -> Shaped[Array, "cap H W 3"]:
        shape = (self.chunks * self.generator.frames_per_chunk, *self.generator.frame_shape, 3)
        return jnp.zeros(shape, jnp.uint8 if self.pixels == "uint8" else jnp.float32)

    def next_count(self, state: StreamState, *, first: bool) -> tuple[Count, Count]:
        """(entries that fall out, valid entries afterwards)."""
        per_chunk, first_frames = self.generator.frames_per_chunk, self.generator.first_frames
        oldest = jnp.where(state.chunk == self.chunks, first_frames, per_chunk)
        drop = jnp.where(state.chunk >= self.chunks, oldest, 0)
        return drop, state.window_count - drop + (first_frames if first else per_chunk)

    def see(self, params: PyTree, state: StreamState, latents: Float[Array, "B K f C h w"], *, first: bool) -> Seen:
        drop, valid = self.next_count(state, first=first)

        def decode(latents, decoder):
            return self.generator.decode(params, decoder, latents, first=first)

        def remember(frames, window):
            return push(window, state.window_count, drop, to_pixels(frames, self.pixels))

        frames, decoder = over_candidates(decode, latents, state.beams.decoder, in_turn=decodes_in_turn(self.mesh))
        window = over_candidates(remember, frames, state.beams.window, in_turn=False)
        return Seen(frames, frames if first else window, valid, window, decoder)


@dataclass(frozen=True, eq=False)
class RedecodedWindow:
    """The latents of the last W chunks, decoded from a fresh decoder for every score."""

    generator: Generator
    chunks: int
    mesh: Mesh | None = None

    def empty(self) -> Float[Array, "chunks f C h w"]:
        return jnp.zeros((self.chunks, *self.generator.chunk_shape), jnp.float32)

    def next_count(self, state: StreamState, *, first: bool) -> tuple[Count, Count]:
        drop = (state.chunk >= self.chunks).astype(jnp.int32)
        return drop, state.window_count - drop + 1

    def see(self, params: PyTree, state: StreamState, latents: Float[Array, "B K f C h w"], *, first: bool) -> Seen:
        drop, valid = self.next_count(state, first=first)

        def candidate(latents, window):
            window = push(window, state.window_count, drop, latents[None])
            frames, _ = self.generator.decode(params, self.generator.init_decoder(), latents, first=True)
            return frames, window, frames if first else self._decode(params, window)

        in_turn = decodes_in_turn(self.mesh)
        frames, window, long = over_candidates(candidate, latents, state.beams.window, in_turn=in_turn)
        valid_frames = self.generator.first_frames + self.generator.frames_per_chunk * (valid - 1)
        return Seen(frames, long, valid_frames, window, None)

    def _decode(self, params: PyTree, window: Float[Array, "chunks f C h w"]) -> Frames:
        """All W chunks at once; the decoder is causal, so garbage behind the valid chunks does not reach them."""
        head, decoder = self.generator.decode(params, self.generator.init_decoder(), window[0], first=True)

        def rest(decoder, latents):
            frames, decoder = self.generator.decode(params, decoder, latents, first=False)
            return decoder, frames

        _, tail = jax.lax.scan(rest, decoder, window[1:])
        return jnp.concatenate([head, tail.reshape(-1, *head.shape[1:])])


def make_window(
    generator: Generator, search: SearchConfig, pixels: str, mesh: Mesh | None = None
) -> StreamingWindow | RedecodedWindow:
    """The window of the configured decode mode; `pixels` is what the long reward wants."""
    if search.decode == "window":
        return RedecodedWindow(generator, search.sliding_window_size, mesh)
    return StreamingWindow(generator, search.sliding_window_size, pixels, mesh)
