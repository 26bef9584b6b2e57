"""Training the embedded VAE: crops of the little world, an L1 loss on pixels and on their differences.

- Crops hold an object nearly always: most of a whole frame is background, which is learned in no time.
- The encoder has no learned variance. Noise of a fixed size is added to its latents instead, and large latents cost a
  little: the same bargain as a VAE's KL term with a constant variance. It makes the decoder forgive small errors of
  the diffusion model.
- Losses on differences in space keep edges sharp, those in time keep the picture from flickering.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from streamt1_jax.config import ModelConfig
from streamt1_jax.mini import world
from streamt1_jax.mini.training import Task, seed_of
from streamt1_jax.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from streamt1_jax.networks import network_graph
from streamt1_jax.types import Frames, HostOrDevice, Scalar

LATENT_NOISE = 0.15
DECODER_NOISE = 0.3  # at most, where the decoder is trained alone
LATENT_COST = 1e-3
DIFFERENCE_WEIGHT = 0.5


class Clips(NamedTuple):
    """A batch: which clips to render. Leading axis n."""

    placed: world.Placed
    start: Int[HostOrDevice, " n"]  # first frame
    corner: Int[HostOrDevice, "n 2"]  # (row, column) of the crop's upper left pixel, on the torus


def vae_task(
    name: str,
    config: ModelConfig,
    start: PyTree | None = None,
    *,
    steps: int,
    decay_steps: int | None = None,
    batch: int,
    frames: int,
    crop: int,
    history: int = 0,
    ema_decay: float = 0.998,
    seed: int = 0,
) -> Task:
    """The VAE's training.

    Args:
        start: parameters to go on from; None: random ones.
        decay_steps: where the rate's cosine ends; None: with the last step.
        frames: pixel frames of a clip, 4k + 1; 4k after a history.
        history: pixel frames before the clip, 4k + 1 or none, that are coded without a gradient: they bring the
            causal states to where they are in the middle of a long video.
        crop: height and width of a clip, a multiple of 16.
    """
    graph, _ = network_graph(config, "vae", jnp.float32)

    def init() -> PyTree:
        # A copy, because a training step consumes its state.
        made = nnx.split(WanVAE(config.vae, rngs=nnx.Rngs(seed)))[1] if start is None else start
        return jax.tree.map(jnp.copy, made)

    def loss(params: PyTree, clips: Clips, key: Array) -> tuple[Scalar, dict[str, Scalar]]:
        videos = jax.vmap(functools.partial(_crop, frames=history + frames, size=crop))(clips)
        vae = nnx.merge(graph, params)

        def code(video: Frames, states, key: Array, *, first: bool):
            coder, decoder = states
            latents, coder = vae.encoder.encode_chunk(coder, video, first)
            noisy = latents + LATENT_NOISE * jax.random.normal(key, latents.shape)
            decoded, decoder = vae.decoder.decode_chunk_unclamped(decoder, noisy, first)
            return decoded, latents, (coder, decoder)

        def one(video: Frames, key: Array):
            small = crop // config.vae.space_factor
            states = vae.encoder.init_encoder_state(crop, crop), vae.decoder.init_decoder_state(small, small)
            key_before, key = jax.random.split(key)
            if history:
                _, _, states = jax.lax.stop_gradient(code(video[:history], states, key_before, first=True))
            return code(video[history:], states, key, first=not history)[:2]

        decoded, latents = jax.vmap(one)(videos, jax.random.split(key, batch))
        wrong, figures = _picture_loss(decoded, videos[:, history:])
        size = jnp.mean(latents**2)
        return wrong + LATENT_COST * size, figures | {"latent_power": size}

    def clips(step: int) -> Clips:
        return _clips(step, batch, crop, history, seed_of(name, seed))

    return Task(name, init, clips, loss, steps, learning_rate=2e-3, decay_steps=decay_steps, ema_decay=ema_decay)


def decoder_task(config: ModelConfig, vae: PyTree, *, steps: int, seed: int = 0) -> Task:
    """The training of a VAE's decoder alone: latents stay what they are, and so does a DiT that was trained on them.

    They get noise of a random size, as the DiT is less than exact. Clips are long enough for things to cross them.

    Args:
        vae: parameters of both networks.
    """
    graph, _ = network_graph(config, "vae", jnp.float32)
    name, batch, frames, crop = "decoder", 4, 25, 48

    def init() -> PyTree:
        return jax.tree.map(jnp.copy, vae["decoder"])

    def loss(decoder: PyTree, clips: Clips, key: Array) -> tuple[Scalar, dict[str, Scalar]]:
        videos = jax.vmap(functools.partial(_crop, frames=frames, size=crop))(clips)
        networks = nnx.merge(graph, with_decoder(vae, decoder))

        def one(video: Frames, key: Array) -> Frames:
            latents = jax.lax.stop_gradient(networks.encoder.encode(video))
            key_size, key_noise = jax.random.split(key)
            size = DECODER_NOISE * jax.random.uniform(key_size)
            return networks.decoder.decode_unclamped(latents + size * jax.random.normal(key_noise, latents.shape))

        return _picture_loss(jax.vmap(one)(videos, jax.random.split(key, batch)), videos)

    def clips(step: int) -> Clips:
        return _clips(step, batch, crop, 0, seed_of(name, seed))

    return Task(name, init, clips, loss, steps, learning_rate=2e-3)


def with_decoder(vae: PyTree, decoder: PyTree) -> PyTree:
    """The VAE's parameters with another decoder."""
    made = jax.tree.map(lambda leaf: leaf, vae)
    made["decoder"] = decoder
    return made


def _picture_loss(
    decoded: Float[Array, "n T H W 3"], videos: Float[Array, "n T H W 3"]
) -> tuple[Scalar, dict[str, Scalar]]:
    error = decoded - videos
    pixels = jnp.mean(jnp.abs(error))
    differences = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2, 3))
    psnr = 10 * jnp.log10(4 / jnp.mean(error**2))
    return pixels + DIFFERENCE_WEIGHT * differences, {"l1": pixels, "psnr": psnr}


def _clips(step: int, batch: int, crop: int, history: int, seed: int) -> Clips:
    """Crops are placed by where the first thing is after the history, when the loss begins."""
    rng = np.random.default_rng((seed, step))
    placed, starts, corners = [], [], []
    for _ in range(batch):
        number = int(rng.integers(2**31))
        placed.append(world.place(world.training_scene(number), world.draw_openings(number)))
        starts.append(rng.integers(world.LAST_FRAME))
        centre = world.pose(jax.tree.map(jnp.asarray, placed[-1]), jnp.int32(starts[-1] + history)).centre[0]
        corners.append(np.asarray(centre)[::-1].astype(int) - rng.integers(crop // 4, 3 * crop // 4, 2))
    return Clips(world.stack(placed), np.array(starts, np.int32), np.stack(corners).astype(np.int32))


def _crop(clip: Clips, *, frames: int, size: int) -> Float[Array, "T size size 3"]:
    """One clip of the batch."""
    video = world.render(clip.placed, jnp.asarray(clip.start) + jnp.arange(frames))
    return jnp.roll(video, -clip.corner, axis=(1, 2))[:, :size, :size]


def standardise(config: ModelConfig, params: PyTree, latents: Float[Array, "n F C h w"]) -> PyTree:
    """The same VAE with latents of mean 0 a channel and mean square 1 in all; the decoder undoes what the encoder does.

    One scale for all channels: a channel that says little stays small, or the diffusion model would have to get its
    noise right.

    Args:
        latents: of videos of the world.
    """
    mean = latents.mean(axis=(0, 1, 3, 4))
    size = jnp.sqrt(jnp.mean((latents - mean[:, None, None]) ** 2))
    std, shift = jnp.array(LATENT_STD), jnp.array(LATENT_MEAN)
    # A normalised latent z becomes (z - mean) / size. Both networks have a dense layer next to the latents that works
    # on the published scale, y = z * std + shift.
    new_shift = shift - (mean * std + shift) / size
    params = jax.tree.map(lambda leaf: leaf, params)
    quant, post_quant = params["encoder"]["quant"], params["decoder"]["post_quant"]
    channels = config.vae.z_dim
    kernel, bias = quant["kernel"][...], quant["bias"][...]
    quant["kernel"] = quant["kernel"].replace(kernel.at[:, :channels].divide(size))
    quant["bias"] = quant["bias"].replace(bias.at[:channels].set(bias[:channels] / size + new_shift))
    kernel, bias = post_quant["kernel"][...], post_quant["bias"][...]
    post_quant["kernel"] = post_quant["kernel"].replace(kernel * size)
    post_quant["bias"] = post_quant["bias"].replace(bias - (new_shift * size) @ kernel)
    return params
