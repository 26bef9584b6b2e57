"""Videos of the little world as the DiT is trained on them: encoded, cut into chunks, with their captions' tokens."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from streamt1_jax.config import ModelConfig
from streamt1_jax.mini import world
from streamt1_jax.networks import network_graph
from streamt1_jax.text import Tokenizer
from streamt1_jax.types import HostOrDevice

CHUNK = 3  # latent frames
FIRST_PIXELS, CHUNK_PIXELS = 9, 12  # pixel frames of chunk 0 and of every other
LATE_SHARE = 0.5  # of the sequences whose run begins some time after chunk 0
LAST_CHUNK = 60  # the latest start of such a run: 45 seconds


class Sequences(NamedTuple):
    """A batch, or a whole set. Leading axis n, then chunks c where there is one a chunk."""

    latents: Float[HostOrDevice, "n c f C h w"]  # chunk 0, then a run of neighbours
    start: Int[HostOrDevice, "n c"]  # first latent frame of each chunk
    openings: Float[HostOrDevice, "n z"]  # of the scene: where things are in chunk 0
    tokens: Int[HostOrDevice, "n P"]
    mask: Int[HostOrDevice, "n P"]


def encode_sequences(
    config: ModelConfig,
    vae: PyTree,
    tokenizer: Tokenizer,
    *,
    count: int,
    chunks: int,
    seed: int,
    batch: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> Sequences:
    """Renders and encodes `count` sequences of `chunks` chunks.

    Args:
        vae: parameters of the VAE.
        report: called after every batch with how many are done.
    """
    encode = jax.jit(jax.vmap(functools.partial(_encode, config, chunks), in_axes=(None, 0, 0)))
    parts = []
    for first in range(0, count, batch):
        numbers = [seed + n for n in range(first, first + batch)]
        scenes = [world.training_scene(number) for number in numbers]
        openings = np.stack([world.draw_openings(number) for number in numbers])
        runs = np.array([_first_chunk(number) for number in numbers], np.int32)
        placed = world.stack([world.place(*pair) for pair in zip(scenes, openings, strict=True)])
        latents = np.asarray(encode(vae, placed, runs))
        start = CHUNK * np.concatenate([np.zeros((batch, 1), np.int32), runs[:, None] + np.arange(chunks - 1)], axis=1)
        prompts = [tokenizer(scene.caption()) for scene in scenes]
        ids, mask = (np.stack([getattr(prompt, key) for prompt in prompts]) for key in ("ids", "mask"))
        parts.append(
            Sequences(latents, start.astype(np.int32), openings.reshape(batch, -1).astype(np.float32), ids, mask)
        )
        report(min(first + batch, count))
    return Sequences(*(np.concatenate(leaves)[:count] for leaves in zip(*parts, strict=True)))


def _first_chunk(number: int) -> int:
    """The chunk that the run begins with: 1, or a later one."""
    rng = np.random.default_rng((number, 1))
    return int(rng.integers(2, LAST_CHUNK)) if rng.random() < LATE_SHARE else 1


def _encode(
    config: ModelConfig, chunks: int, vae: PyTree, placed: world.Placed, run: Array
) -> Float[Array, "c f C h w"]:
    """Latents of chunk 0 and of the run from chunk `run` on.

    A late run is encoded from nine frames before it, so that the encoder's state is that of a long video.
    """
    encoder = nnx.merge(network_graph(config, "vae", jnp.float32)[0], vae).encoder
    first = world.render(placed, jnp.arange(FIRST_PIXELS))
    begin = FIRST_PIXELS + CHUNK_PIXELS * (run - 1)
    pixels = FIRST_PIXELS + CHUNK_PIXELS * (chunks - 1)
    latents = encoder.encode(world.render(placed, begin - FIRST_PIXELS + jnp.arange(pixels)))
    by_chunk = latents.reshape(chunks, CHUNK, *latents.shape[1:])
    return by_chunk.at[0].set(encoder.encode(first))
