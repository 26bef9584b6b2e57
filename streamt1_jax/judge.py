"""What the rewards say of every candidate of a chunk, and the flags that follow from it (METHOD sections 5 and 6)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from streamt1_jax.generator import Conditioning
from streamt1_jax.pruning import fuse, fusion_weight
from streamt1_jax.rewards.base import OK, Reward
from streamt1_jax.search import Candidates, Scores, Search
from streamt1_jax.sharding import of_own_candidates
from streamt1_jax.sink import sink_flags
from streamt1_jax.state import StreamState
from streamt1_jax.types import Count
from streamt1_jax.window import Seen, to_pixels


def judge(
    search: Search, conditioning: Conditioning, state: StreamState, candidates: Candidates, seen: Seen, *, first: bool
) -> Scores:
    """Asks both rewards and fuses what they say; fixes the flags for the day of eviction (METHOD sections 5 and 6)."""
    with jax.named_scope("judge"):
        shown = short_frames(seen.chunk, search.config.search.short_reward_frames)
        short, short_failed = _ask(search, search.short, shown, shown.shape[2], conditioning)
        long, long_failed = _ask(search, search.long, seen.long, seen.long_valid, conditioning)
        f = search.config.stream.latent_frames_per_chunk
        alpha = fusion_weight(state.chunk * f, state.total_frames, f, search.config.search.short_score_fusion_cap)
        fused = fuse(short, long, alpha)
        usable = jnp.isfinite(fused) & jnp.isfinite(candidates.latents).all(axis=(2, 3, 4, 5))
        ema, append = _flags(search, state, short, long, first=first)
        return Scores(short, long, fused, alpha, ema, append, usable, short_failed | long_failed)


def short_frames(video: Float[Array, "B K T H W 3"], count: int | None) -> Float[Array, "B K t H W 3"]:
    """At most `count` frames, evenly spaced from the first to the last; one alone is the middle one."""
    frames = video.shape[2]
    if count is None or count >= frames:
        return video
    chosen = np.round(np.linspace(0, frames - 1, count)).astype(int) if count > 1 else np.array([frames // 2])
    return video[:, :, chosen]


def _ask(
    search: Search, reward: Reward, video: Shaped[Array, "B K T H W 3"], valid: int | Count, conditioning: Conditioning
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """(scores, failed) of all candidates in one call; on the host in one a device."""
    beams, count, *rest = video.shape
    n = beams * count
    flat = to_pixels(video, reward.pixels).reshape(n, *rest)
    call = reward.call if reward.runs_on == "jax" else of_own_candidates(search.mesh, reward.call)
    prompt = reward.prompt_of(conditioning.prompt_index, conditioning.tokens)
    verdict = call(flat, jnp.full((n,), valid, jnp.int32), prompt)
    return verdict.scores.reshape(beams, count), (verdict.status != OK).reshape(beams, count)


def _flags(search: Search, state: StreamState, short, long, *, first: bool):
    """(EMA, APPEND) of every candidate; the first chunk is a sink already and has neither."""
    if first:
        return jnp.zeros(short.shape, bool), jnp.zeros(short.shape, bool)
    window = search.config.search.short_mean_window
    if window is None:
        mean = state.beams.short_sum / state.chunk.astype(jnp.float32)
    else:
        mean = state.beams.short_recent.sum(axis=1) / jnp.minimum(state.chunk, window).astype(jnp.float32)
    return sink_flags(short, mean[:, None], long, state.beams.long[:, None], search.config.search)


def remember_short(recent: Float[Array, "B recent"], short: Float[Array, " B"], chunk) -> Float[Array, "B recent"]:
    size = recent.shape[1]
    return recent if size == 0 else recent.at[:, chunk % size].set(short)
