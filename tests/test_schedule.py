"""The few-step schedule and the denoising loop (METHOD section 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close

from streamt1_jax.config import ModelConfig, StreamConfig
from streamt1_jax.denoise import denoise
from streamt1_jax.noise import Draws
from streamt1_jax.schedule import few_step_schedule, scheduled_sigmas


def test_the_released_steps():
    schedule = few_step_schedule(StreamConfig(), ModelConfig())
    assert_close("timesteps", schedule.timesteps, [1000, 937.5, 2500 / 3, 625], 1e-9)
    assert_close("sigmas", schedule.sigmas, [1, 0.9375, 2.5 / 3, 0.625], 1e-12)
    assert schedule.next_sigmas == (*schedule.sigmas[1:], 0.0)


def test_the_thousand_levels():
    sigmas = scheduled_sigmas(5.0)
    assert sigmas.shape == (1000,)
    assert sigmas[0] == 1.0
    u = 0.001  # the last level
    assert sigmas[-1] == pytest.approx(5 * u / (1 + 4 * u))
    assert (np.diff(sigmas) < 0).all()
    assert_close("without shift", scheduled_sigmas(1.0), 1 - np.arange(1000) / 1000, 1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [(1000,), (1000, 500), (999, 250, 1), (800, 400, 200, 100, 50)], ids=str)
def test_other_steps_and_shifts(steps, shift):
    """Step n of 1000 stands at u = n / 1000."""
    schedule = few_step_schedule(StreamConfig(denoising_steps=steps, timestep_shift=shift), ModelConfig())
    u = np.array(steps) / 1000
    expected = shift * u / (1 + (shift - 1) * u)
    assert_close("sigmas", schedule.sigmas, expected, 1e-12)
    assert_close("timesteps", schedule.timesteps, 1000 * expected, 1e-9)


SHAPE = (2, 3, 2, 2)


def draws(steps: int) -> Draws:
    rng = np.random.default_rng(0)
    return Draws(
        jnp.asarray(rng.standard_normal(SHAPE), jnp.float32),
        jnp.asarray(rng.standard_normal((steps - 1, *SHAPE)), jnp.float32),
    )


def test_a_true_flow_gives_the_clean_chunk():
    """v = (x_t - x0) / sigma of a known x0: every step lands on it, whatever it was re-noised with."""
    schedule = few_step_schedule(StreamConfig(), ModelConfig())
    target = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)
    sigmas = jnp.asarray(schedule.sigmas, jnp.float32)
    out = denoise(lambda x, sigma: (x - target) / sigma, schedule, sigmas, draws(4))
    assert out.dtype == jnp.float32
    assert_close("x0", out, target, 1e-6)


@pytest.mark.parametrize("steps", [(1000,), (1000, 750, 500, 250)], ids=["one", "four"])
def test_every_step_by_hand(steps):
    """A flow that depends on the sample and on the step, written out step by step in float64."""
    schedule = few_step_schedule(StreamConfig(denoising_steps=steps), ModelConfig())
    noise = draws(len(steps))
    weights = 0.3 + 0.1 * np.arange(len(steps))
    out = jax.jit(lambda d: denoise(lambda x, w: jnp.tanh(w * x), schedule, jnp.asarray(weights, jnp.float32), d))(
        noise
    )
    x = np.asarray(noise.initial, np.float64)
    for i, step in enumerate(steps):
        u = step / 1000
        sigma = 5 * u / (1 + 4 * u)
        x0 = x - sigma * np.tanh(weights[i] * x)
        if i == len(steps) - 1:
            break
        u = steps[i + 1] / 1000
        sigma = 5 * u / (1 + 4 * u)
        x = (1 - sigma) * x0 + sigma * np.asarray(noise.renoise[i], np.float64)
    assert_close("x0", out, x0, 1e-6)


def test_a_bfloat16_flow_is_applied_in_float32():
    """x0 = x - sigma v in float32: in bfloat16 the difference would be rounded to 3 digits."""
    schedule = few_step_schedule(StreamConfig(denoising_steps=(1000,)), ModelConfig())
    noise = draws(1)
    out = denoise(lambda x, t: jnp.full(SHAPE, 0.5, jnp.bfloat16), schedule, jnp.zeros(1), noise)
    assert_close("x0", out, noise.initial - 0.5, 1e-7)
