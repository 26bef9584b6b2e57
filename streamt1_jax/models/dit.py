"""The causal Wan diffusion transformer for one chunk of one candidate (METHOD section 2).

- It never writes a cache: past keys and values come in read-only, a context pass returns the new chunk's.
- What depends on the prompt or the step alone (cross-attention keys and values, time modulation) is an input,
  computed once per prompt by `encode_text` and `encode_time`.
- All blocks are one stacked module, scanned.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from streamt1_jax.config import PATCH, DiTConfig
from streamt1_jax.models.attention import attention, rope_angles, rotate
from streamt1_jax.models.layers import RMSNorm, layer_norm, linear, scan_layers, stack_layers
from streamt1_jax.types import Chunk, PromptEmbeds


class KV(NamedTuple):
    """Keys (rotated) and values of all layers."""

    k: Float[Array, "L T N D"]
    v: Float[Array, "L T N D"]


class Past(NamedTuple):
    """What earlier chunks left for a chunk to attend to: the first `length` tokens are valid."""

    kv: KV
    length: Int[Array, ""]


class TimeModulation(NamedTuple):
    """One row for all frames of the chunk, or one a frame. float32."""

    head: Float[Array, "r M"]
    blocks: Float[Array, "r 6 M"]


class Attention(nnx.Module):
    """Projections of one attention; q and k are RMS-normalised over the full width before the split into heads."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (linear(config.dim, config.dim, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
        self.norm_k = RMSNorm(config.dim, eps=config.eps, dtype=dtype)

    def _heads(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "t (n d) -> t n d", n=self.num_heads)

    def query(self, x: Float[Array, "T M"]) -> Float[Array, "T N D"]:
        return self._heads(self.norm_q(self.q(x)))

    def key_value(self, x: Float[Array, "T M"]) -> tuple[Float[Array, "T N D"], Float[Array, "T N D"]]:
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def output(self, y: Float[Array, "T N D"]) -> Float[Array, "T M"]:
        return self.o(rearrange(y, "t n d -> t (n d)"))


class LayerNorm(nnx.Module):
    """The one affine layer norm of a block, before cross-attention."""

    def __init__(self, config: DiTConfig, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones((config.dim,), dtype))
        self.bias = nnx.Param(jnp.zeros((config.dim,), dtype))
        self.eps = config.eps

    def __call__(self, x: Float[Array, "T M"]) -> Float[Array, "T M"]:
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


def _per_frame(rows: Float[Array, "r M"], tokens: int) -> Float[Array, "T M"]:
    """One row a frame (or one for all) to one a token: token order is frame first."""
    return jnp.repeat(rows, tokens // rows.shape[0], axis=0, total_repeat_length=tokens) if rows.shape[0] > 1 else rows


def _modulate(x, shift, scale, eps):
    """LN(x) * (1 + scale) + shift, in float32 until the end: the modulation is added to values of all sizes."""
    tokens = x.shape[0]
    return (layer_norm(x, eps) * (1 + _per_frame(scale, tokens)) + _per_frame(shift, tokens)).astype(x.dtype)


def _gated(y, gate):
    """y * gate, multiplied in float32 like the other modulations."""
    return (y.astype(jnp.float32) * _per_frame(gate, y.shape[0])).astype(y.dtype)


class Block(nnx.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time of the step."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, config.dim), dtype) * config.dim**-0.5)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.cross_norm = LayerNorm(config, dtype=dtype)
        self.cross_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.ffn_in = linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.ffn_out = linear(config.ffn_dim, config.dim, dtype=dtype, rngs=rngs)

    def _modulation(self, time: TimeModulation) -> list[Float[Array, "r M"]]:
        m = self.modulation[...].astype(jnp.float32) + time.blocks
        return [m[:, i] for i in range(6)]

    def key_value(self, x, time: TimeModulation, angles) -> tuple[jax.Array, jax.Array]:
        """The keys (rotated) and values that later chunks will see of these tokens."""
        shift, scale, *_ = self._modulation(time)
        k, v = self.self_attn.key_value(_modulate(x, shift, scale, self.eps))
        return rotate(k, angles), v

    def __call__(self, x: Float[Array, "T M"], time: TimeModulation, angles, cross, past, length):
        """Returns the next residual stream and the chunk's own keys and values.

        Args:
            angles: rotary angles of the tokens, [T, D/2].
            cross: keys and values of the prompt, each [P, N, D].
            past: keys and values of earlier chunks, each [Tc, N, D], or None for the first chunk.
            length: how many of `past` are valid.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self._modulation(time)
        tokens = x.shape[0]

        h = _modulate(x, shift_a, scale_a, self.eps)
        q = rotate(self.self_attn.query(h), angles)
        k, v = self.self_attn.key_value(h)
        k = rotate(k, angles)
        if past is None:
            y = attention(q, k, v)
        else:  # The own chunk stands first: the valid keys stay a prefix whatever the cache holds.
            keys, values = (jnp.concatenate([own, old]) for own, old in zip((k, v), past, strict=True))
            y = attention(q, keys, values, tokens + length)
        x = x + _gated(self.self_attn.output(y), gate_a)

        y = attention(self.cross_attn.query(self.cross_norm(x)), *cross)
        x = x + self.cross_attn.output(y)

        h = _modulate(x, shift_f, scale_f, self.eps)
        h = self.ffn_out(jax.nn.gelu(self.ffn_in(h), approximate=True))
        return x + _gated(h, gate_f), (k, v)


class Head(nnx.Module):
    """The last norm and projection, modulated by the time embedding itself."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, config.dim), dtype) * config.dim**-0.5)
        self.projection = linear(config.dim, PATCH * PATCH * config.out_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T M"], time: TimeModulation) -> Float[Array, "T out"]:
        m = self.modulation[...].astype(jnp.float32) + time.head[:, None]
        return self.projection(_modulate(x, m[:, 0], m[:, 1], self.eps))


class CausalWanDiT(nnx.Module):
    """Flow of a noisy chunk given the prompt, the time and the past."""

    def __init__(self, config: DiTConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.unroll = 1  # layers in one turn of the loop over them: more take longer to compile
        dim = config.dim
        # A (1,2,2) convolution with that stride is a dense layer on patches.
        self.patch_embedding = linear(config.in_dim * PATCH * PATCH, dim, dtype=dtype, rngs=rngs)
        self.text_in = linear(config.text_dim, dim, dtype=dtype, rngs=rngs)
        self.text_out = linear(dim, dim, dtype=dtype, rngs=rngs)
        # float32 products: three rows a run, and every token of every layer is scaled by what comes out.
        time = {"param_dtype": dtype, "dtype": jnp.float32, "rngs": rngs}
        self.time_in = nnx.Linear(config.freq_dim, dim, **time)
        self.time_out = nnx.Linear(dim, dim, **time)
        self.time_projection = nnx.Linear(dim, 6 * dim, **time)
        self.blocks = stack_layers(lambda r: Block(config, dtype=dtype, rngs=r), config.num_layers, rngs)
        self.head = Head(config, dtype=dtype, rngs=rngs)

    def encode_time(self, timesteps: Float[Array, " r"]) -> TimeModulation:
        """Timesteps in 0..1000, one for the chunk or one a frame."""
        half = self.config.freq_dim // 2
        theta = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = timesteps.astype(jnp.float32)[:, None] * theta
        e = self.time_out(jax.nn.silu(self.time_in(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))))
        return TimeModulation(e, rearrange(self.time_projection(jax.nn.silu(e)), "r (six m) -> r six m", six=6))

    def encode_text(self, prompt_embeds: PromptEmbeds) -> KV:
        """Cross-attention keys and values of all layers, [L, P, N, D]: they depend on the prompt alone.

        Rows past the prompt are zero and attended to like the others: there is no text mask.
        """
        text = self.text_out(jax.nn.gelu(self.text_in(prompt_embeds.astype(self.dtype)), approximate=True))
        _, kv = scan_layers(
            self.blocks,
            lambda block, _, x: (None, block.cross_attn.key_value(text)),
            None,
            num_layers=self.config.num_layers,
        )
        return KV(*kv)

    def __call__(
        self, x: Chunk, time: TimeModulation, text: KV, past: Past | None, start_frame: Int[Array, ""]
    ) -> Float[Array, "f C h w"]:
        """The flow v of a noisy chunk, float32; x0 = x - sigma * v (METHOD section 1)."""
        tokens, angles = self._tokens(x, start_frame)
        tokens, _ = self._run(tokens, time, text, past, angles, self.config.num_layers, keep_kv=False)
        return self._unpatchify(self.head(tokens, time), x.shape)

    def context(self, x: Chunk, time: TimeModulation, text: KV, past: Past | None, start_frame: Int[Array, ""]) -> KV:
        """Keys and values that later chunks see of a finished chunk (METHOD section 3).

        Runs no head, and of the last block only what makes its keys and values.
        """
        tokens, angles = self._tokens(x, start_frame)
        last = self.config.num_layers - 1
        tokens, kv = self._run(tokens, time, text, past, angles, last, keep_kv=True)
        graphdef, params = nnx.split(self.blocks)
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[last], params))
        k, v = block.key_value(tokens, time, angles)
        return KV(jnp.concatenate([kv[0], k[None]]), jnp.concatenate([kv[1], v[None]]))

    def _tokens(self, x, start_frame):
        frames, _, height, width = x.shape
        patches = rearrange(x, "f c (r a) (s b) -> (f r s) (c a b)", a=PATCH, b=PATCH)
        angles = rope_angles(start_frame, frames, height // PATCH, width // PATCH, self.config.head_dim)
        return self.patch_embedding(patches.astype(self.dtype)), angles

    def _run(self, tokens, time, text, past, angles, num_layers, *, keep_kv):
        def body(block, x, layer):
            cross, old = layer
            length = None if past is None else past.length
            x, kv = block(x, time, angles, cross, old, length)
            return x, kv if keep_kv else None

        layers = (tuple(text), None if past is None else tuple(past.kv))
        return scan_layers(self.blocks, body, tokens, layers, num_layers=num_layers, unroll=self.unroll)

    def _unpatchify(self, y, shape):
        frames, _, height, width = shape
        # The projection's axis is (patch row, patch column, channel), channel fastest.
        flow = rearrange(
            y,
            "(f r s) (a b c) -> f c (r a) (s b)",
            f=frames,
            r=height // PATCH,
            s=width // PATCH,
            a=PATCH,
            b=PATCH,
        )
        return flow.astype(jnp.float32)
