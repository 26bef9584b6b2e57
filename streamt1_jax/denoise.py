"""Few-step denoising of one candidate's chunk (METHOD sections 1 and 3)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from streamt1_jax.noise import Draws
from streamt1_jax.schedule import Schedule
from streamt1_jax.types import Chunk


def denoise(flow: Callable[[Chunk, Any], Chunk], schedule: Schedule, times: Any, draws: Draws) -> Chunk:
    """Runs every step of the schedule from `draws.initial`; returns the clean chunk x0, float32.

    Args:
        flow: the network, `(x_t, time) -> v`; its flow predicts x0 = x_t - sigma * v.
        times: what the network takes for each step's timestep, a pytree with a leading step axis.
        draws: the initial noise, and the fresh noise that each step but the last is blended with.
    """
    last = jnp.zeros((1, *draws.initial.shape), draws.renoise.dtype)
    steps = (
        times,
        jnp.asarray(schedule.sigmas, jnp.float32),
        jnp.asarray(schedule.next_sigmas, jnp.float32),
        jnp.concatenate([draws.renoise, last]),
    )

    def run(x, step):
        time, sigma, next_sigma, eps = step
        x0 = x - sigma * flow(x, time).astype(jnp.float32)
        # next_sigma is 0 after the last step: x0 comes out as it is.
        return (1.0 - next_sigma) * x0 + next_sigma * eps, None

    x0, _ = jax.lax.scan(run, draws.initial, steps)
    return x0
