"""Noise as a pure function of a seed, and its propagation from chunk to chunk (METHOD section 4)."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, UInt32

from streamt1_jax.errors import BadInputError
from streamt1_jax.types import Chunk, Seed


class Draws(NamedTuple):
    """Everything random about one candidate: what it starts from and what each later step adds."""

    initial: Float[Array, "f C h w"]
    renoise: Float[Array, "steps_minus_1 f C h w"]


NoiseFn: TypeAlias = Callable[[Seed], Draws]
NoiseSource: TypeAlias = NoiseFn | Mapping[str, Any] | None  # recorded: "seeds", "noise" and "renoise" by name


def gaussian_noise(chunk_shape: tuple[int, int, int, int], num_steps: int) -> NoiseFn:
    """Standard normal draws from a seed. The seed is consumed here, and only here, by one draw for all steps."""

    def draw(seed: Seed) -> Draws:
        noise = jax.random.normal(jax.random.key(seed), (num_steps, *chunk_shape), jnp.float32)
        return Draws(noise[0], noise[1:])

    return draw


def recorded_noise(
    seeds: Integer[Array | np.ndarray, " n"],
    noise: Float[Array | np.ndarray, "n f C h w"],
    renoise: Float[Array | np.ndarray, "n steps_minus_1 f C h w"],
) -> NoiseFn:
    """The draws of another program, row i belonging to `seeds[i]`. A seed that was not recorded draws NaN."""
    known = jnp.asarray(seeds).astype(jnp.uint32)
    initial, later = jnp.asarray(noise), jnp.asarray(renoise)

    def draw(seed: Seed) -> Draws:
        row = jnp.argmax(known == seed)
        missing = jnp.where(jnp.any(known == seed), 0.0, jnp.nan)
        return Draws(initial[row] + missing, later[row] + missing)

    return draw


def propagate(eps: Chunk, beam_noise: Chunk, sigma: float) -> Chunk:
    """Stream-Scaled Noise Propagation: sigma * beam_noise + sqrt(1 - sigma^2) * eps.

    Unit variance is kept where the two are independent, which a fresh seed's draw is. The first candidate of a beam
    draws its beam's own noise again, so its variance is not 1: as published.
    """
    return sigma * beam_noise + (1.0 - sigma * sigma) ** 0.5 * eps


def first_seeds(seed: Seed, beams: int, candidates: int) -> UInt32[Array, "B K"]:
    """Chunk 0: seed, seed + 1, ... over all candidates."""
    return seed + jnp.arange(beams * candidates, dtype=jnp.uint32).reshape(beams, candidates)


def next_seeds(
    seed: Seed, chunk: Int[Array, ""], beam_seeds: UInt32[Array, " B"], candidates: int, *, propagation: bool = True
) -> UInt32[Array, "B K"]:
    """Later chunks: seed + 1000 c + 100 b + i, but the beam's proven seed again for i = 0. Sums wrap at 2^32.

    Args:
        propagation: without it all seeds are fresh, or a run of one candidate would draw the same noise every chunk.
    """
    beam = jnp.arange(beam_seeds.shape[0], dtype=jnp.uint32)[:, None]
    fresh = seed + 1000 * chunk.astype(jnp.uint32) + 100 * beam + jnp.arange(candidates, dtype=jnp.uint32)
    return fresh.at[:, 0].set(beam_seeds) if propagation else fresh


def noise_key(noise: NoiseSource) -> Any:
    """Equal for equal noise: recorded arrays are constants of the program, so new contents are a new program."""
    if noise is None or callable(noise):
        return noise
    return tuple((key, hashlib.sha256(np.asarray(x).tobytes()).hexdigest()) for key, x in noise.items())


def noise_function(noise: NoiseSource, chunk_shape: tuple[int, int, int, int], num_steps: int) -> NoiseFn:
    """The noise that a caller asked for; Gaussian if None.

    Raises:
        BadInputError: recorded arrays of which one is missing.
    """
    if noise is None:
        return gaussian_noise(chunk_shape, num_steps)
    if callable(noise):
        return noise
    missing = {"seeds", "noise", "renoise"} - set(noise)
    if missing:
        raise BadInputError(f"noise has {sorted(noise)}, expected seeds, noise and renoise: add {sorted(missing)}")
    arrays = (jnp.asarray(noise[key]) for key in ("seeds", "noise", "renoise"))
    return recorded_noise(*arrays)
