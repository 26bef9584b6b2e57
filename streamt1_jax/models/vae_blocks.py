"""What the Wan VAE's encoder and decoder are both made of (METHOD section 7).

A module that carries something from one latent frame to the next has `init_state(h, w)`, the zeros before the
first frame, and takes its state as an argument and returns the next one.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamt1_jax.models.conv import CausalConv3d, Downsample, LastFrame, Past, Upsample
from streamt1_jax.models.layers import RMSNorm, linear

# The published norm divides by max(L2 norm, 1e-12). The same guard against 0/0 under the root of `RMSNorm`
# (unit L2 norm times sqrt(channels) is one over the root of the mean square) also keeps its gradient finite.
NORM_EPS = 1e-24

ResidualState: TypeAlias = tuple[Past, Past]


class LevelState(NamedTuple):
    """What a level of the network carries from one latent frame to the next."""

    blocks: tuple[ResidualState, ...]
    resample: Past | LastFrame | None  # None where the level does not resample in time


class ResidualBlock(nnx.Module):
    """Twice (norm, SiLU, causal convolution), added to the input or to a 1x1x1 map of it."""

    def __init__(self, din: int, dout: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(din, eps=NORM_EPS, dtype=dtype)
        self.conv1 = CausalConv3d(din, dout, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(dout, eps=NORM_EPS, dtype=dtype)
        self.conv2 = CausalConv3d(dout, dout, dtype=dtype, rngs=rngs)
        self.shortcut = linear(din, dout, dtype=dtype, rngs=rngs) if din != dout else None

    def init_state(self, h: int, w: int) -> ResidualState:
        return self.conv1.init_state(h, w), self.conv2.init_state(h, w)

    def __call__(
        self, x: Float[Array, "t h w i"], state: ResidualState
    ) -> tuple[Float[Array, "t h w o"], ResidualState]:
        past1, past2 = state
        residual, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1)
        residual, past2 = self.conv2(jax.nn.silu(self.norm2(residual)), past2)
        return residual + (self.shortcut(x) if self.shortcut else x), (past1, past2)


class SpatialAttention(nnx.Module):
    """Each frame on its own, one head over all pixels, added to the input."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, eps=NORM_EPS, dtype=dtype)
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "t h w c"]) -> Float[Array, "t h w c"]:
        t, h, w, dim = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(t, h * w, 3 * dim), 3, axis=-1)
        # Float32 logits and softmax: 6240 of them in a row at full size, where bfloat16 sums lose the tail.
        logits = jnp.einsum("tqc,tkc->tqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / dim**0.5, axis=-1).astype(x.dtype)
        return x + self.out(jnp.einsum("tqk,tkc->tqc", weights, v).reshape(x.shape))


class Middle(nnx.Module):
    """The narrowest part of either network: residual, attention, residual."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(dim, dim, dtype=dtype, rngs=rngs)
        self.attention = SpatialAttention(dim, dtype=dtype, rngs=rngs)
        self.block2 = ResidualBlock(dim, dim, dtype=dtype, rngs=rngs)

    def init_state(self, h: int, w: int) -> tuple[ResidualState, ResidualState]:
        return self.block1.init_state(h, w), self.block2.init_state(h, w)

    def __call__(
        self, x: Float[Array, "t h w c"], state: tuple[ResidualState, ResidualState]
    ) -> tuple[Float[Array, "t h w c"], tuple[ResidualState, ResidualState]]:
        x, state1 = self.block1(x, state[0])
        x, state2 = self.block2(self.attention(x), state[1])
        return x, (state1, state2)


class Level(nnx.Module):
    """Residual blocks of one size of picture, then the step to the next size, if there is one."""

    def __init__(
        self,
        widths: tuple[int, int],
        num_blocks: int,
        resample: Upsample | Downsample | None,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        din, dout = widths
        dins = [din] + [dout] * (num_blocks - 1)
        self.blocks = nnx.List([ResidualBlock(d, dout, dtype=dtype, rngs=rngs) for d in dins])
        self.resample = resample

    def init_state(self, h: int, w: int) -> LevelState:
        return LevelState(
            blocks=tuple(block.init_state(h, w) for block in self.blocks),
            resample=self.resample.init_state(h, w) if self.resample else None,
        )

    def __call__(
        self, x: Float[Array, "t h w i"], state: LevelState, first: bool
    ) -> tuple[Float[Array, "t2 h2 w2 o"], LevelState]:
        blocks, resample = [], state.resample
        for block, block_state in zip(self.blocks, state.blocks, strict=True):
            x, block_state = block(x, block_state)
            blocks.append(block_state)
        if self.resample is not None:
            x, resample = self.resample(x, resample, first)
        return x, LevelState(tuple(blocks), resample)


def run_levels(
    levels: nnx.List, x: Array, states: tuple[LevelState, ...], first: bool
) -> tuple[Array, tuple[LevelState, ...]]:
    """`x` through every level in turn."""
    new_states = []
    for level, state in zip(levels, states, strict=True):
        x, state = level(x, state, first)
        new_states.append(state)
    return x, tuple(new_states)
