"""The pytrees of the search: what is carried from chunk to chunk, and what is recorded of each."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped, UInt8, UInt32

from streamt1_jax.cache import Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beam:
    """One kept beam; in a `StreamState` every leaf has a leading axis B, best beam first."""

    cache: Cache  # keys and values of past chunks
    decoder: PyTree  # the VAE decoder's streaming state
    window: Shaped[Array, "..."]  # what the long score sees: frames [cap, H, W, 3] or latents [chunks, f, C, h, w]
    noise: Float[Array, "*B f C h w"]  # the initial noise its last chunk started from
    seed: UInt32[Array, "*B"]  # the seed its last chunk used
    short_sum: Float[Array, "*B"]  # sum of the short scores of all its chunks
    short_recent: Float[Array, "*B recent"]  # ring of its last short scores, for `short_mean_window`
    long: Float[Array, "*B"]  # long score of its last chunk
    latents: Float[Array, "*B local f C h w"]  # its last chunks, oldest first: what a prompt switch recaches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamState:
    """All that one chunk hands to the next: `step` is a pure function of it."""

    beams: Beam  # every leaf [B, ...]
    chunk: Int[Array, ""]  # number of the chunk to come
    window_count: Int[Array, ""]  # valid entries of every beam's window, oldest first
    # Fixed for the run.
    seed: UInt32[Array, ""]  # every other seed is derived from it
    total_frames: Int[Array, ""]  # latent frames of the whole video, for the fusion weight


class ChunkRecord(NamedTuple):
    """Everything worth knowing about one chunk; B beams, K candidates of each."""

    # Of every candidate.
    seed: UInt32[Array, "*c B K"]  # its seed
    short: Float[Array, "*c B K"]  # image reward of its frames
    long: Float[Array, "*c B K"]  # video reward of its window
    score: Float[Array, "*c B K"]  # the two fused
    ema: Bool[Array, "*c B K"]  # its flag: merge it into a sink when it is evicted
    append: Bool[Array, "*c B K"]  # its flag: make it a sink when it is evicted
    usable: Bool[Array, "*c B K"]  # latents and score are finite
    reward_failed: Bool[Array, "*c B K"]  # a reward raised instead of scoring it
    thumbnail: UInt8[Array, "*c B K th tw 3"]  # its middle frame, small
    # Of every parent beam, as seen by its candidates.
    sink_start: Int[Array, "*c B appended"]  # first latent frame of each appended sink, or EMPTY
    # Of every beam kept, best first.
    kept: Int[Array, "*c B"]  # flat index (beam * K + candidate) of the candidate
    evicted_start: Int[Array, "*c B"]  # first latent frame of the chunk that left its window, or EMPTY
    evicted_route: Int[Array, "*c B"]  # the Route that chunk took
    latents: Float[Array, "*c B f C h w"]  # its chunk
    frames: UInt8[Array, "*c B T H W 3"]  # its chunk's pixel frames, decoded in streaming
    # Of the chunk.
    alpha: Float[Array, "*c"]  # weight of the short score
