"""Replay of a recorded LongLive run with prompt switches: one candidate, every eviction dropped, the KV recache."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.config import PATCH, ModelConfig, RunConfig, SearchConfig, StreamConfig, UMT5Config, VAEConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.generator import Generator, wan_generator
from streamt1_jax.models.dit import CausalWanDiT
from streamt1_jax.noise import recorded_noise
from streamt1_jax.recorded_case import (
    LATENT_TOLERANCE,
    Comparison,
    Recorded,
    build_network,
    close,
    dit_config,
    under,
)
from streamt1_jax.rewards.base import OK, Reward, Verdict
from streamt1_jax.stream import Search, init_state, stream_chunks


def replay_switches(tensors: Recorded, sizes: Recorded) -> Iterator[Comparison]:
    from convert.dit_table import longlive_dit_rules

    dit = dit_config(sizes["dit"])
    stream = _stream_config(tensors, sizes)
    f, chunks = stream.latent_frames_per_chunk, sizes["chunks"]
    switches = _switch_chunks(sizes["switch_frames"], chunks, f)
    network = build_network(
        lambda: CausalWanDiT(dit, rngs=nnx.Rngs(0)), longlive_dit_rules(), under(tensors, "dit."), "dit"
    )
    params = {"dit": nnx.state(network, nnx.Param), "decoder": None}
    search = _search(ModelConfig(dit, VAEConfig(), UMT5Config(dim=dit.text_dim)), stream, tensors, chunks)

    prompts = tensors["prompt_embeds"]
    if len(prompts) != len(switches) + 1:
        raise BadInputError(
            f"the case has {len(prompts)} prompts and {len(switches)} switches, expected one prompt more than "
            "switches: record it again"
        )
    prepare = jax.jit(search.generator.prepare)
    first, *others = (prepare(params, embeds, jnp.int32(i)) for i, embeds in enumerate(prompts))
    running = stream_chunks(search, params, first, init_state(search, 0, chunks))
    conditionings = dict(zip(switches, others, strict=True))
    made = []
    for chunk in range(chunks):
        # A generator that has not begun takes nothing, and no switch comes before the first chunk.
        _, record = running.send(conditionings.get(chunk))
        made.append(jax.device_get(record.latents[0]))
    recorded = tensors["latents"][0].reshape(chunks, f, *tensors["latents"].shape[2:])
    for begin, end in itertools.pairwise([0, *switches, chunks]):
        quantity = f"latents of frames {begin * f} to {end * f - 1}"
        yield close(quantity, np.stack(made[begin:end]), recorded[begin:end], LATENT_TOLERANCE)


def _stream_config(tensors: Recorded, sizes: Recorded) -> StreamConfig:
    return StreamConfig(
        latent_frames_per_chunk=tensors["renoise"].shape[2] if len(sizes["steps"]) > 1 else 3,
        local_attn_size=sizes["local"],
        sink_size=sizes["sink"],
        denoising_steps=tuple(sizes["steps"]),
        global_sink=sizes["global_sink"],
    )


def _switch_chunks(frames: list[int], chunks: int, f: int) -> list[int]:
    """The chunks from which on the next prompt is used."""
    starts = [divmod(frame, f) for frame in frames]
    numbers = [0, *(chunk for chunk, _ in starts), chunks]
    if any(rest for _, rest in starts) or any(a >= b for a, b in itertools.pairwise(numbers)):
        raise BadInputError(
            f"switch_frames is {frames}, expected rising multiples of {f} inside the {chunks * f} frames of the case"
        )
    return numbers[1:-1]


def _search(model: ModelConfig, stream: StreamConfig, tensors: Recorded, chunks: int) -> Search:
    """A search of one candidate by the recorded noise of each chunk; without pixels, which such a case lacks."""
    f = stream.latent_frames_per_chunk
    _, frames, channels, h, w = tensors["noise"].shape
    if frames != chunks * f or h % PATCH or w % PATCH:
        raise BadInputError(
            f"noise is {list(tensors['noise'].shape)}, expected {chunks * f} frames of an even height and width"
        )
    factor = model.vae.space_factor
    generator = _without_pixels(wan_generator(model, stream, h * factor, w * factor))
    # Without propagation chunk c draws by the seed 1000 c.
    seeds = 1000 * np.arange(chunks, dtype=np.uint32)
    noise = tensors["noise"][0].reshape(chunks, f, channels, h, w)
    steps = len(stream.denoising_steps)
    renoise = tensors["renoise"] if steps > 1 else np.zeros((chunks, 0, *noise.shape[1:]), np.float32)
    config = RunConfig(stream, dataclasses.replace(SearchConfig.longlive(), max_sink_size=stream.sink_size))
    nothing = Reward("nothing", _zero, "uint8", "jax")
    return Search(generator, nothing, nothing, recorded_noise(seeds, noise, renoise), config)


def _without_pixels(generator: Generator) -> Generator:
    """One black pixel a frame, so that no decoder is needed."""

    def decode(params: Any, state: Any, latents: Any, *, first: bool):
        return jnp.zeros((generator.first_frames if first else generator.frames_per_chunk, 1, 1, 3)), state

    return dataclasses.replace(generator, init_decoder=lambda: jnp.zeros(()), decode=decode, frame_shape=(1, 1))


def _zero(videos, num_frames, prompt_index) -> Verdict:
    n = videos.shape[0]
    return Verdict(jnp.zeros((n,), jnp.float32), jnp.full((n,), OK, jnp.int32))
