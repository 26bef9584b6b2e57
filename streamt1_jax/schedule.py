"""The few-step flow-matching schedule (METHOD section 1)."""

from dataclasses import dataclass

import numpy as np

from streamt1_jax.config import ModelConfig, StreamConfig

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Timesteps as the network sees them and their noise levels, noisiest first; plain numbers, fixed at trace time."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @property
    def next_sigmas(self) -> tuple[float, ...]:
        """The level each step re-noises to; the last step's result stays clean."""
        return (*self.sigmas[1:], 0.0)


def scheduled_sigmas(shift: float) -> np.ndarray:
    """The 1000 noise levels sigma_i = s u_i / (1 + (s-1) u_i), u from 1 down to 1/1000."""
    u = np.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
    return shift * u / (1.0 + (shift - 1.0) * u)


def few_step_schedule(config: StreamConfig, model: ModelConfig) -> Schedule:
    """Warps the configured steps: [1000, 750, 500, 250] with shift 5 -> [1000, 937.5, 833.333, 625].

    Args:
        model: gives the shift that `config` leaves open.
    """
    shift = model.timestep_shift if config.timestep_shift is None else config.timestep_shift
    scheduled = scheduled_sigmas(shift)
    warped = np.append(TRAIN_STEPS * scheduled, 0.0)[[TRAIN_STEPS - step for step in config.denoising_steps]]
    nearest = np.abs(TRAIN_STEPS * scheduled[None] - warped[:, None]).argmin(axis=1)
    return Schedule(tuple(warped.tolist()), tuple(scheduled[nearest].tolist()))
