"""Videos of the little world as the DiT is trained on them: encoded, cut into chunks, with their captions' tokens."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from streamt1_jax.config import ModelConfig
from streamt1_jax.mini import world
from streamt1_jax.models.vae import Encoder
from streamt1_jax.networks import network_graph
from streamt1_jax.text import Tokenizer
from streamt1_jax.types import HostOrDevice

CHUNK = 3  # latent frames
FIRST_PIXELS, CHUNK_PIXELS = 9, 12  # pixel frames of chunk 0 and of every other
LATE_CHUNKS = (4, 60)  # where the run of every other batch begins, 3 to 45 seconds on; that of the rest, with chunk 1
SEED_STEP = 1_000_000  # scenes from one seed to the next
CLAUSES = 3  # of a caption: see `clauses_of_tokens`
BATCH = 8  # scenes encoded at once
LATE_PIXELS = 33  # frames before a late run that bring the encoder to the state it has in a long video


class Sequences(NamedTuple):
    """A batch, or a whole set. Leading axis n, then chunks c where there is one a chunk."""

    latents: Float[HostOrDevice, "n c f C h w"]  # chunk 0, then a run of neighbours
    start: Int[HostOrDevice, "n c"]  # first latent frame of each chunk
    openings: Float[HostOrDevice, "n 2 6"]  # of the scene: where things are in chunk 0
    other_looks: Float[HostOrDevice, "n f C h w"]  # chunk 0, if things looked otherwise
    tokens: Int[HostOrDevice, "n P"]
    mask: Int[HostOrDevice, "n P"]
    clauses: Int[HostOrDevice, "n P"]  # whose each token is, as of `clauses_of_tokens`


def encode_sequences(
    config: ModelConfig,
    vae: PyTree,
    tokenizer: Tokenizer,
    *,
    count: int,
    chunks: int,
    seed: int,
    first: int = 0,
    batch: int = BATCH,
) -> Iterator[Sequences]:
    """Renders and encodes `count` sequences of `chunks` chunks, a batch at a time.

    Args:
        vae: parameters of the VAE.
        first: the sequence to begin with, a multiple of `batch`; the others are what they would be without it.
    """
    encode = {
        late: jax.jit(jax.vmap(functools.partial(_encode, config, chunks, late), in_axes=(None, 0, 0)))
        for late in (False, True)
    }
    encode_first = jax.jit(jax.vmap(functools.partial(_encode_first, config), in_axes=(None, 0)))
    for begin in range(first, count, batch):
        numbers = [seed * SEED_STEP + n for n in range(begin, begin + batch)]
        scenes = [world.training_scene(number) for number in numbers]
        others = [world.other_looks(*pair) for pair in zip(scenes, numbers, strict=True)]
        openings = np.stack([world.draw_openings(number) for number in numbers])
        late = chunks > 1 and begin // batch % 2 == 1
        runs = np.random.default_rng((seed, begin)).integers(*(LATE_CHUNKS if late else (1, 2)), batch, np.int32)
        start = np.concatenate([np.zeros((batch, 1)), runs[:, None] + np.arange(chunks - 1)], axis=1)
        prompts = [tokenizer(scene.caption()) for scene in scenes]
        made = Sequences(
            latents=np.asarray(encode[late](vae, _place(scenes, openings), runs)),
            start=(CHUNK * start).astype(np.int32),
            openings=openings.astype(np.float32),
            other_looks=np.asarray(encode_first(vae, _place(others, openings))),
            tokens=np.stack([prompt.ids for prompt in prompts]),
            mask=np.stack([prompt.mask for prompt in prompts]),
            clauses=np.stack([clauses_of_tokens(tokenizer, scene) for scene in scenes]),
        )
        yield Sequences(*(leaf[: count - begin] for leaf in made))


def clauses_of_tokens(tokenizer: Tokenizer, scene: world.Scene) -> Int[np.ndarray, "P"]:
    """Whose each token of a caption is: 0 the first thing's, 1 the second's, 2 the rest (EOS and padding too)."""
    so_far = itertools.accumulate(scene.clauses()[:2])
    ends = [np.sum(tokenizer(text).mask) - 1 for text in so_far]  # without the EOS
    return np.searchsorted(ends, np.arange(tokenizer.text_len), side="right").astype(np.int32)


def join(parts: Iterable[Sequences]) -> Sequences:
    """One set of several."""
    return Sequences(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def _place(scenes: list[world.Scene], openings: np.ndarray) -> world.Placed:
    return world.stack([world.place(*pair) for pair in zip(scenes, openings, strict=True)])


def _encode(
    config: ModelConfig, chunks: int, late: bool, vae: PyTree, placed: world.Placed, run: Array
) -> Float[Array, "c f C h w"]:
    """Latents of chunk 0 and of the run from chunk `run` on, which is 1 unless `late`."""
    encoder = _encoder(config, vae)
    before = LATE_PIXELS if late else FIRST_PIXELS
    begin = FIRST_PIXELS + CHUNK_PIXELS * (run - 1) - before
    pixels = before + CHUNK_PIXELS * (chunks - 1)
    latents = encoder.encode(world.render(placed, begin + jnp.arange(pixels)))
    of_run = latents[len(latents) - CHUNK * (chunks - 1) :]
    first = _encode_first(config, vae, placed) if late else latents[:CHUNK]
    return jnp.concatenate([first, of_run]).reshape(chunks, CHUNK, *latents.shape[1:])


def _encode_first(config: ModelConfig, vae: PyTree, placed: world.Placed) -> Float[Array, "f C h w"]:
    """Latents of chunk 0."""
    return _encoder(config, vae).encode(world.render(placed, jnp.arange(FIRST_PIXELS)))


def _encoder(config: ModelConfig, vae: PyTree) -> Encoder:
    return nnx.merge(network_graph(config, "vae", jnp.float32)[0], vae).encoder
