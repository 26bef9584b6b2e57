"""Searches to stream with: the networks themselves at a tiny size, or their stand-in."""

import functools
import itertools
from typing import Any, NamedTuple

import fake_generator as fake
import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax.config import DiTConfig, ModelConfig, RunConfig, SearchConfig, StreamConfig, UMT5Config, VAEConfig
from streamt1_jax.generator import Conditioning, wan_generator
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.stream import Search, init_state, stream_chunks
from streamt1_jax.weights import random_params

ATOL = 1e-5
CHUNKS = 6
BUSY = {"short_threshold": -1.0, "long_threshold": 0.02, "sliding_window_size": 3, "ema_alpha": 0.8}

TINY = ModelConfig(
    dit=DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=8, text_dim=8, text_len=4),
    # Two levels and one doubling of time: every part of the decoder in as few programs as can be.
    vae=VAEConfig(dim=8, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)),
    text=UMT5Config(dim=8),
)


class Setting(NamedTuple):
    """A generator with parameters, and searches on it that are made once."""

    search: Any  # SearchConfig fields -> Search
    params: Any
    conditioning: Conditioning


def setting(make_generator, params, prompt) -> Setting:
    @functools.cache
    def search(global_sink: bool = True, **fields) -> Search:
        f = 2 if params is FAKE_PARAMS else 3
        stream = StreamConfig(
            latent_frames_per_chunk=f,
            sink_size=f,
            local_attn_size=4 * f,
            denoising_steps=(1000, 500, 250),
            global_sink=global_sink,
        )
        config = RunConfig(stream, SearchConfig(max_sink_size=2 * f, **{**BUSY, **fields}))
        generator = make_generator(stream)
        noise = gaussian_noise(generator.chunk_shape, len(stream.denoising_steps))
        return Search(generator, *fake.fake_rewards(), noise, config)

    prepare = jax.jit(search().generator.prepare)
    return Setting(search, params, prepare(params, jnp.asarray(prompt), jnp.int32(2)))


FAKE_PARAMS = fake.fake_params()


def _prompt(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * scale


PROMPTS = {"fake": _prompt(3, 5, scale=0.25), "wan": _prompt(4, 8)}
OTHERS = {"fake": _prompt(3, 5, scale=0.25, seed=1), "wan": _prompt(4, 8, seed=1)}  # prompts to switch to


@functools.cache
def setting_of(kind: str) -> Setting:
    """ "fake" or "wan"."""
    if kind == "fake":
        return setting(lambda stream: fake.fake_generator(), FAKE_PARAMS, PROMPTS[kind])
    params = {name: random_params(network_graph(TINY, name, jnp.float32)[1], 0) for name in ("dit", "decoder")}
    return setting(lambda stream: wan_generator(TINY, stream, 8, 12), params, PROMPTS[kind])


def run(setup: Setting, search: Search, seed: int, chunks: int, total: int = CHUNKS):
    """The Python driver: states and records on the host."""
    steps = stream_chunks(search, setup.params, setup.conditioning, init_state(search, seed, total))
    return [jax.device_get(pair) for pair in itertools.islice(steps, chunks)]


def on_device(state):
    """A copy, which the step may consume."""
    return jax.tree.map(jnp.array, state)
