"""Stream-Scaled Memory Sinking: what becomes of a chunk that the window evicts (METHOD section 6)."""

from enum import IntEnum

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from streamt1_jax.config import SearchConfig


class Route(IntEnum):
    """Where an evicted chunk goes. `NONE`: nothing was evicted."""

    NONE = -1
    DISCARD = 0
    EMA = 1
    APPEND = 2


def sink_flags(
    short: Float[Array, "*n"],
    short_mean: Float[Array, "*#n"],
    long: Float[Array, "*n"],
    previous_long: Float[Array, "*#n"],
    search: SearchConfig,
) -> tuple[Bool[Array, "*n"], Bool[Array, "*n"]]:
    """(EMA, APPEND) of a scored chunk after the first, from the rewards of its own beam's history.

    Args:
        short_mean: mean short score of earlier chunks (all of them, or `search.short_mean_window`).
        previous_long: long score of the chunk before.
    """
    short_high = short - short_mean > search.short_threshold
    long_low = previous_long - long > search.long_threshold
    return short_high & ~long_low, short_high & long_low


def flags_to_route(ema: Bool[Array, "*n"], append: Bool[Array, "*n"]) -> Int[Array, "*n"]:
    return jnp.where(append, Route.APPEND, jnp.where(ema, Route.EMA, Route.DISCARD)).astype(jnp.int32)


def ema_update(sink: Float[Array, "*n"], evicted: Float[Array, "*n"], alpha: float) -> Float[Array, "*n"]:
    """alpha * sink + (1 - alpha) * evicted, in float32: in bfloat16 a step of 0.001 would be rounded away."""
    return alpha * sink.astype(jnp.float32) + (1.0 - alpha) * evicted.astype(jnp.float32)
