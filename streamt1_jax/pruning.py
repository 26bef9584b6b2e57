"""Stream-Scaled Reward Pruning: fuse the two scores, keep the best beams (METHOD section 5)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from streamt1_jax.types import Count, Scalar


def fusion_weight(start_frame: Count, total_frames: Count, chunk_frames: int, cap: float) -> Scalar:
    """alpha = min(start_frame / (total_frames - f), cap), the weight of the short score. 0 for a one-chunk video.

    Args:
        start_frame: first latent frame of the chunk.
        total_frames: latent frames of the whole video.
    """
    rest = total_frames - chunk_frames
    alpha = jnp.minimum(start_frame / jnp.maximum(rest, 1), cap)
    return jnp.where(rest > 0, alpha, 0.0).astype(jnp.float32)


def fuse(short: Float[Array, "*n"], long: Float[Array, "*n"], alpha: Scalar) -> Float[Array, "*n"]:
    """alpha * short + (1 - alpha) * long. A reward that is not finite stays so, whatever its weight."""
    return alpha * short + (1.0 - alpha) * long


def keep_best(scores: Float[Array, "B K"], usable: Bool[Array, "B K"], beams: int) -> Int[Array, " B"]:
    """Flat indices (beam * K + candidate) of the best `beams` candidates, best first.

    Ties keep the earlier candidate. One that is not usable is never kept while a usable one is left over.
    """
    # A NaN would win argmax and top_k, so it becomes the worst score there is; the sort is stable for the ties.
    ranked = jnp.where(usable, scores, -jnp.inf).reshape(-1)
    return jnp.argsort(-ranked, stable=True)[:beams].astype(jnp.int32)
