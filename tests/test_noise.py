"""Noise as a function of a seed, seeds by their formula, and propagation (METHOD section 4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal

from streamt1_jax.noise import first_seeds, gaussian_noise, next_seeds, propagate, recorded_noise

SHAPE = (3, 16, 20, 20)
seed = jnp.uint32


def test_draws_are_standard_normal_and_apart():
    draws = gaussian_noise(SHAPE, 4)(seed(7))
    assert draws.initial.shape == SHAPE
    assert draws.renoise.shape == (3, *SHAPE)
    rows = np.stack([draws.initial, *draws.renoise]).reshape(4, -1)
    assert_close("means", rows.mean(axis=1), np.zeros(4), 0.03)
    assert_close("covariance", rows @ rows.T / rows.shape[1], np.eye(4), 0.03)


def test_a_seed_is_all_that_matters():
    draw = gaussian_noise((2, 2, 2, 2), 3)
    again = jax.jit(jax.vmap(draw))(jnp.array([0, 7, 2**32 - 1], jnp.uint32))
    for i, number in enumerate((0, 7, 2**32 - 1)):
        one = draw(seed(number))
        assert_equal(f"initial noise of {number}", again.initial[i], one.initial)
        assert_equal(f"later noise of {number}", again.renoise[i], one.renoise)
    flat = np.asarray(again.initial).reshape(3, -1)
    assert len({row.tobytes() for row in flat}) == 3


def test_one_step_needs_no_later_noise():
    assert gaussian_noise((2, 2, 2, 2), 1)(seed(0)).renoise.shape == (0, 2, 2, 2, 2)


@pytest.mark.parametrize("sigma", [-1.0, -0.1, 0.0, 0.6, 1.0])
def test_propagation_keeps_unit_variance(sigma):
    rng = np.random.default_rng(0)
    eps, beam = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    out = propagate(jnp.asarray(eps), jnp.asarray(beam), sigma)
    assert_close("formula", out, sigma * beam + np.sqrt(1 - sigma**2) * eps, 1e-6)
    assert_close("variance", np.var(out), 1.0, 0.03)


def test_seeds_by_hand():
    assert_equal("chunk 0", first_seeds(seed(42), 2, 3), [[42, 43, 44], [45, 46, 47]])
    beams = jnp.array([43, 45], jnp.uint32)
    assert_equal("chunk 1", next_seeds(seed(42), jnp.int32(1), beams, 2), [[43, 1043], [45, 1143]])
    assert_equal("chunk 7", next_seeds(seed(42), jnp.int32(7), beams, 3), [[43, 7043, 7044], [45, 7143, 7144]])
    assert_equal("alone", next_seeds(seed(42), jnp.int32(7), beams[:1], 1), [[43]])


def test_without_propagation_every_seed_is_fresh():
    """Else plain streaming, one candidate a chunk, would draw the same noise for every chunk."""
    beams = jnp.array([43, 45], jnp.uint32)
    fresh = next_seeds(seed(42), jnp.int32(1), beams, 2, propagation=False)
    assert_equal("chunk 1", fresh, [[1042, 1043], [1142, 1143]])


def test_seeds_wrap():
    last = 2**32 - 1
    assert_equal("chunk 0", first_seeds(seed(last), 1, 3), [[last, 0, 1]])
    beams = jnp.array([last, 5], jnp.uint32)
    expected = [[last, (last + 3001) % 2**32], [5, (last + 3101) % 2**32]]
    assert_equal("chunk 3", next_seeds(seed(last), jnp.int32(3), beams, 2), expected)
    assert next_seeds(seed(last), jnp.int32(3), beams, 2).dtype == jnp.uint32
    far = next_seeds(seed(0), jnp.int32(5_000_000), beams, 2)
    assert int(far[0, 1]) == (1000 * 5_000_000 + 1) % 2**32


class TestRecordedNoise:
    seeds = np.array([42, 2**32 - 1, 0, 2**31], np.int64)
    noise = np.random.default_rng(0).standard_normal((4, 2, 2, 1, 1)).astype(np.float32)
    renoise = np.random.default_rng(1).standard_normal((4, 3, 2, 2, 1, 1)).astype(np.float32)

    @pytest.fixture
    def draw(self):
        return recorded_noise(jnp.asarray(self.seeds, jnp.uint32), jnp.asarray(self.noise), jnp.asarray(self.renoise))

    def test_a_row_of_its_seed(self, draw):
        got = jax.jit(jax.vmap(draw))(jnp.array([0, 42, 2**31, 2**32 - 1], jnp.uint32))
        for i, row in enumerate((2, 0, 3, 1)):
            assert_equal(f"initial noise of {self.seeds[row]}", got.initial[i], self.noise[row])
            assert_equal(f"later noise of {self.seeds[row]}", got.renoise[i], self.renoise[row])

    @pytest.mark.parametrize("missing", [43, 1, 2**31 - 1])
    def test_a_seed_that_is_not_recorded_is_nan(self, draw, missing):
        got = draw(seed(missing))
        assert np.isnan(got.initial).all()
        assert np.isnan(got.renoise).all()

    def test_seeds_above_two_to_the_31_survive_int64(self):
        """As safetensors hold them."""
        draw = recorded_noise(jnp.asarray(self.seeds), jnp.asarray(self.noise), jnp.asarray(self.renoise))
        assert_equal("initial noise", draw(seed(2**31)).initial, self.noise[3])
        assert_equal("initial noise", draw(seed(2**32 - 1)).initial, self.noise[1])
