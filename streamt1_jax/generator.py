"""What the search needs of a model, and the Wan networks in that form.

The search does not know the networks: it is handed pure functions of parameters, written for one candidate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PyTree

from streamt1_jax.config import PATCH, ModelConfig, StreamConfig
from streamt1_jax.denoise import denoise
from streamt1_jax.models.dit import KV, CausalWanDiT, Past, TimeModulation
from streamt1_jax.models.vae import Decoder
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import Draws
from streamt1_jax.rewards.base import PromptTokens
from streamt1_jax.schedule import few_step_schedule
from streamt1_jax.types import Chunk, Count, Frames, PromptEmbeds


class Conditioning(NamedTuple):
    """All that is computed once per prompt. Shared by every candidate."""

    text: KV  # cross-attention keys and values, [L, P, N, D]
    steps: TimeModulation  # a row a step of the schedule, then an axis of one
    context: TimeModulation  # of the context pass
    prompt_index: Int[Array, ""]  # names the prompt to rewards on the host
    tokens: PromptTokens | None = None  # the prompt to rewards that read it themselves


@dataclass(frozen=True, eq=False)
class Generator:
    """A streaming video model as pure functions; `params` is whatever they need. Hashed by identity."""

    chunk_shape: tuple[int, int, int, int]  # [f, C, h, w]
    kv: jax.ShapeDtypeStruct  # of the keys (and the values) of one chunk, [L, t, N, D]
    prepare: Callable[[PyTree, PromptEmbeds, Int[Array, ""]], Conditioning]
    denoise: Callable[[PyTree, Conditioning, Draws, Past | None, Count], Chunk]
    context: Callable[[PyTree, Conditioning, Chunk, Past | None, Count], KV]
    init_decoder: Callable[[], PyTree]
    decode: Callable[..., tuple[Frames, PyTree]]  # (params, state, chunk, *, first) -> frames in [0, 1], state
    frames_per_chunk: int  # pixel frames of every chunk but the first
    first_frames: int  # pixel frames of chunk 0
    frame_shape: tuple[int, int]  # [H, W]


def wan_generator(
    config: ModelConfig, stream: StreamConfig, height: int, width: int, dtype: Any = jnp.float32
) -> Generator:
    """The causal Wan DiT and VAE decoder at one video size. Parameters: `{"dit": ..., "decoder": ...}`.

    Args:
        height, width: pixels, multiples of 16.
        dtype: of parameters, activations and the KV cache.
    """
    dit_graphdef, _ = network_graph(config, "dit", dtype)
    decoder_graphdef, decoder_abstract = network_graph(config, "decoder", dtype)
    schedule = few_step_schedule(stream, config)
    factor, f = config.vae.space_factor, stream.latent_frames_per_chunk
    latent = (height // factor, width // factor)
    tokens = f * (latent[0] // PATCH) * (latent[1] // PATCH)

    def dit(params) -> CausalWanDiT:
        return nnx.merge(dit_graphdef, params["dit"])

    def decoder(params) -> Decoder:
        return nnx.merge(decoder_graphdef, params["decoder"])

    def prepare(params, prompt_embeds, prompt_index):
        model = dit(params)
        steps = model.encode_time(jnp.asarray(schedule.timesteps, jnp.float32))
        context = model.encode_time(jnp.full((1,), stream.context_noise, jnp.float32))
        per_step = jax.tree.map(lambda x: x[:, None], steps)
        return Conditioning(model.encode_text(prompt_embeds), per_step, context, prompt_index)

    def denoise_chunk(params, conditioning, draws, past, start_frame):
        model = dit(params)
        flow = lambda x, time: model(x, time, conditioning.text, past, start_frame)  # noqa: E731
        return denoise(flow, schedule, conditioning.steps, draws)

    def context(params, conditioning, latents, past, start_frame):
        return dit(params).context(latents, conditioning.context, conditioning.text, past, start_frame)

    def decode(params, state, latents, *, first):
        return decoder(params).decode_chunk(state, latents, first=first)

    return Generator(
        chunk_shape=(f, config.dit.in_dim, *latent),
        kv=jax.ShapeDtypeStruct((config.dit.num_layers, tokens, config.dit.num_heads, config.dit.head_dim), dtype),
        prepare=prepare,
        denoise=denoise_chunk,
        context=context,
        init_decoder=lambda: nnx.merge(decoder_graphdef, decoder_abstract).init_decoder_state(*latent),
        decode=decode,
        frames_per_chunk=config.vae.time_factor * f,
        first_frames=config.vae.time_factor * (f - 1) + 1,
        frame_shape=(height, width),
    )
