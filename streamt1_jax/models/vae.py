"""The causal Wan VAE, streaming in both directions (METHOD section 7).

What is unusual about it:
- The unit of work is one latent frame: 1 pixel frame if it is the first of the video, `time_factor` (4) otherwise.
- Every causal convolution's past is in an explicit `VAEState`; a video coded in any split gives the same numbers.
- Everything is for one video; `vmap` over states and latents for several.
- `Decoder` and `Encoder` stand alone: a generator builds no encoder.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from streamt1_jax.config import VAEConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.models.conv import CausalConv3d, Downsample, Past, Upsample
from streamt1_jax.models.layers import RMSNorm, linear
from streamt1_jax.models.vae_blocks import NORM_EPS, Level, LevelState, Middle, ResidualState, run_levels
from streamt1_jax.types import Chunk, Frames, Latents

# Of the published 16-channel latents, per channel: normalised = (z - mean) / std.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class VAEState(NamedTuple):
    """What an encoder or a decoder carries from one latent frame to the next: never mutated, only replaced.

    Sizes follow from the config and the size of the picture, the type is the network's.
    """

    conv_in: Past
    middle: tuple[ResidualState, ResidualState]
    levels: tuple[LevelState, ...]
    conv_out: Past


def encoder_widths(config: VAEConfig) -> list[tuple[int, int]]:
    """Channels into and out of each level's residual blocks, from pixels to latents."""
    widths = [config.dim * mult for mult in (1, *config.dim_mult)]
    return list(itertools.pairwise(widths))


def decoder_widths(config: VAEConfig) -> list[tuple[int, int]]:
    """Channels into and out of each level's residual blocks, from latents to pixels: an up stage halves them."""
    widths = [config.dim * mult for mult in reversed(config.dim_mult)]
    return [(widths[0], widths[0])] + [(a // 2, b) for a, b in itertools.pairwise(widths)]


def _check_latent_channels(config: VAEConfig) -> None:
    if config.z_dim != len(LATENT_MEAN):
        raise BadInputError(
            f"vae.z_dim is {config.z_dim}, expected {len(LATENT_MEAN)}: mean and std of the latents are published "
            "for that size only; leave vae.z_dim at its default"
        )


def _normalise(z: Float[Array, "*frames C"]) -> Float[Array, "*frames C"]:
    """What the encoder gives as the generator takes it, in float32."""
    return (z.astype(jnp.float32) - jnp.array(LATENT_MEAN, jnp.float32)) / jnp.array(LATENT_STD, jnp.float32)


def _denormalise(z: Float[Array, "*frames C"]) -> Float[Array, "*frames C"]:
    """What the generator gives as the decoder takes it, in float32."""
    return z.astype(jnp.float32) * jnp.array(LATENT_STD, jnp.float32) + jnp.array(LATENT_MEAN, jnp.float32)


class Decoder(nnx.Module):
    """Latents to pixels, one latent frame at a time."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        _check_latent_channels(config)
        widths = decoder_widths(config)
        in_time = (*reversed(config.temporal_downsample), None)
        self.config, self.dtype = config, dtype
        self.post_quant = linear(config.z_dim, config.z_dim, dtype=dtype, rngs=rngs)
        self.conv_in = CausalConv3d(config.z_dim, widths[0][0], dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0][0], dtype=dtype, rngs=rngs)
        self.levels = nnx.List()
        for pair, up in zip(widths, in_time, strict=True):
            resample = None if up is None else Upsample(pair[1], in_time=up, dtype=dtype, rngs=rngs)
            self.levels.append(Level(pair, config.num_res_blocks + 1, resample, dtype=dtype, rngs=rngs))
        self.norm_out = RMSNorm(widths[-1][1], eps=NORM_EPS, dtype=dtype)
        self.conv_out = CausalConv3d(widths[-1][1], 3, dtype=dtype, rngs=rngs)

    def init_decoder_state(self, h: int, w: int) -> VAEState:
        """The state before the first latent frame: zeros for latents of `h` by `w`."""
        sizes = [(h << i, w << i) for i in range(len(self.levels))]
        return VAEState(
            conv_in=self.conv_in.init_state(h, w),
            middle=self.middle.init_state(h, w),
            levels=tuple(level.init_state(*size) for level, size in zip(self.levels, sizes, strict=True)),
            conv_out=self.conv_out.init_state(*sizes[-1]),
        )

    def decode_frame(
        self, state: VAEState, z: Float[Array, "h w C"], first: bool
    ) -> tuple[Float[Array, "t H W 3"], VAEState]:
        """The network itself, for one latent frame.

        Args:
            z: one latent frame, *not* normalised, in the network's type.
            first: static; whether it is the first of the video.

        Returns:
            1 frame if `first`, else `time_factor`: unclamped, about [-1, 1], in the network's type.
        """
        x, conv_in = self.conv_in(self.post_quant(z)[None], state.conv_in)
        x, middle = self.middle(x, state.middle)
        x, levels = run_levels(self.levels, x, state.levels, first)
        x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), state.conv_out)
        return x, VAEState(conv_in, middle, levels, conv_out)

    def decode_chunk(self, state: VAEState, latents: Chunk, first: bool) -> tuple[Frames, VAEState]:
        """The next latent frames of a video.

        Args:
            state: after the frames before; `init_decoder_state` if there are none.
            latents: normalised.
            first: static; whether the video begins with this chunk.

        Returns:
            Pixel frames in [0, 1], float32: 4*f - 3 if `first`, else 4*f; and the state after them.

        Raises:
            BadInputError: no frame, or a wrong number of channels.
        """
        if latents.shape[0] < 1 or latents.shape[1] != self.config.z_dim:
            raise BadInputError(
                f"latents are {latents.shape}, expected [f, {self.config.z_dim}, h, w] with at least one frame; "
                "pass the generator's latents without a batch axis"
            )
        pixels, state = self.decode_chunk_unclamped(state, latents, first)
        # In float32, as is the clamp to [-1, 1], which the clip to [0, 1] contains.
        return jnp.clip(0.5 * pixels.astype(jnp.float32) + 0.5, 0.0, 1.0), state

    def decode_chunk_unclamped(self, state: VAEState, latents: Chunk, first: bool) -> tuple[Frames, VAEState]:
        """`decode_chunk` as the last convolution leaves it, about [-1, 1]: for losses and for saturated pixels."""
        z = _denormalise(rearrange(latents, "f C h w -> f h w C")).astype(self.dtype)
        pixels = []
        if first:
            frame, state = self.decode_frame(state, z[0], first=True)
            pixels, z = [frame], z[1:]

        def body(state, z):
            frames, state = self.decode_frame(state, z, first=False)
            return state, frames

        state, frames = jax.lax.scan(body, state, z)
        pixels.append(rearrange(frames, "f t H W c -> (f t) H W c"))
        return jnp.concatenate(pixels), state

    def decode(self, latents: Latents) -> Frames:
        """A whole video at once: see `decode_chunk`."""
        frames, _ = self.decode_chunk(self.init_decoder_state(*latents.shape[2:]), latents, first=True)
        return frames

    def decode_unclamped(self, latents: Latents) -> Frames:
        """A whole video as the last convolution leaves it, about [-1, 1]: for comparing saturated pixels too."""
        frames, _ = self.decode_chunk_unclamped(self.init_decoder_state(*latents.shape[2:]), latents, first=True)
        return frames


class Encoder(nnx.Module):
    """Pixels to latents, one latent frame at a time."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        _check_latent_channels(config)
        widths = encoder_widths(config)
        in_time = (*config.temporal_downsample, None)
        self.config, self.dtype = config, dtype
        self.conv_in = CausalConv3d(3, widths[0][0], dtype=dtype, rngs=rngs)
        self.levels = nnx.List()
        for pair, down in zip(widths, in_time, strict=True):
            resample = None if down is None else Downsample(pair[1], in_time=down, dtype=dtype, rngs=rngs)
            self.levels.append(Level(pair, config.num_res_blocks, resample, dtype=dtype, rngs=rngs))
        self.middle = Middle(widths[-1][1], dtype=dtype, rngs=rngs)
        self.norm_out = RMSNorm(widths[-1][1], eps=NORM_EPS, dtype=dtype)
        self.conv_out = CausalConv3d(widths[-1][1], 2 * config.z_dim, dtype=dtype, rngs=rngs)
        self.quant = linear(2 * config.z_dim, 2 * config.z_dim, dtype=dtype, rngs=rngs)

    def init_encoder_state(self, height: int, width: int) -> VAEState:
        """The state before the first pixel frame: zeros for frames of `height` by `width` pixels.

        Raises:
            BadInputError: sizes that are not multiples of `space_factor`.
        """
        factor = self.config.space_factor
        if height % factor or width % factor:
            raise BadInputError(
                f"frames are {height}x{width}, expected multiples of {factor}; crop to "
                f"{height // factor * factor}x{width // factor * factor}"
            )
        sizes = [(height >> i, width >> i) for i in range(len(self.levels))]
        return VAEState(
            conv_in=self.conv_in.init_state(height, width),
            middle=self.middle.init_state(*sizes[-1]),
            levels=tuple(level.init_state(*size) for level, size in zip(self.levels, sizes, strict=True)),
            conv_out=self.conv_out.init_state(*sizes[-1]),
        )

    def encode_frame(
        self, state: VAEState, x: Float[Array, "t H W 3"], first: bool
    ) -> tuple[Float[Array, "h w C"], VAEState]:
        """The network itself, for one latent frame.

        Args:
            x: the pixel frames behind it, in [-1, 1], in the network's type: 1 if `first`, else `time_factor`.
            first: static; whether it is the first of the video.

        Returns:
            The mean of the latent frame, *not* normalised, in the network's type.
        """
        x, conv_in = self.conv_in(x, state.conv_in)
        x, levels = run_levels(self.levels, x, state.levels, first)
        x, middle = self.middle(x, state.middle)
        x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), state.conv_out)
        mean, _ = jnp.split(self.quant(x)[0], 2, axis=-1)  # The other half is the log variance.
        return mean, VAEState(conv_in, middle, levels, conv_out)

    def encode_chunk(self, state: VAEState, video: Frames, first: bool) -> tuple[Chunk, VAEState]:
        """The next pixel frames of a video.

        Args:
            state: after the frames before; `init_encoder_state` if there are none.
            video: in [-1, 1]; 4*k + 1 frames if `first`, else 4*k.
            first: static; whether the video begins with these frames.

        Returns:
            Normalised latents, float32, and the state after them.

        Raises:
            BadInputError: a number of frames that is not whole latent frames.
        """
        group, extra = self.config.time_factor, int(first)
        if video.shape[0] < 1 or video.shape[0] % group != extra % group:
            raise BadInputError(
                f"video has {video.shape[0]} frames, expected {group}*k{' + 1' if first else ''}; cut the last ones off"
            )
        x = video.astype(self.dtype)
        latents = []
        if first:
            latent, state = self.encode_frame(state, x[:1], first=True)
            latents, x = [latent[None]], x[1:]

        def body(state, x):
            latent, state = self.encode_frame(state, x, first=False)
            return state, latent

        state, rest = jax.lax.scan(body, state, rearrange(x, "(f t) H W c -> f t H W c", t=group))
        return rearrange(_normalise(jnp.concatenate([*latents, rest])), "f h w C -> f C h w"), state

    def encode(self, video: Frames) -> Latents:
        """A whole video at once, 4*k + 1 frames: see `encode_chunk`."""
        latents, _ = self.encode_chunk(self.init_encoder_state(*video.shape[1:3]), video, first=True)
        return latents


class WanVAE(nnx.Module):
    """Both networks, as published checkpoints hold them."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
