"""The UMT5 encoder: token ids to prompt embeddings (METHOD section 8).

What is unusual about it:
- every layer has its own relative position bias, where T5 shares the first layer's;
- attention logits are not divided by sqrt(D): the initial scale of the query weights does that work;
- no bias vectors, RMS norms instead of layer norms, a gated feed-forward;
- padding keys are masked inside the encoder, and padding rows are zero in its result, since the DiT
  attends to all P rows without a mask.

Axes: P prompt tokens, M model width (dim), N heads, D head size. Everything here takes one prompt; batch
with `jax.vmap` at the call.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from streamt1_jax.config import UMT5Config
from streamt1_jax.models.layers import RMSNorm, linear, scan_layers, stack_layers
from streamt1_jax.types import PromptEmbeds


def relative_position_buckets(num_tokens: int, *, num_buckets: int, max_distance: int) -> Int[np.ndarray, "query key"]:
    """The bucket of every (query, key) pair, a constant that numpy makes at trace time.

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance a
    bucket, the rest grow with the logarithm of the distance, and the last takes all that is further away:

        num_buckets=8, max_distance=8, a query and the keys 0, 1, 2, ... places after it
        0 5 6 6 7 7 7 7 7 ...     and 0 1 2 2 3 3 3 3 3 ... before it
    """
    positions = np.arange(num_tokens)
    distance = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    # float32 on purpose: distances such as 16 and 32 lie on a bucket's edge, and the weights were trained
    # with edges that fell as float32 rounds them.
    log_steps = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * (half - exact)
    log_bucket = np.minimum(exact + log_steps.astype(np.int32), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), log_bucket)
    return np.where(distance > 0, half + bucket, bucket).astype(np.int32)


class Attention(nnx.Module):
    """Self-attention with a learned bias per head and bucket of relative position."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        width = config.num_heads * config.head_dim
        # Queries start smaller by sqrt(D), in place of the division of the logits.
        small = nnx.initializers.variance_scaling(1 / config.head_dim, "fan_in", "normal")
        self.q = nnx.Linear(
            config.dim, width, use_bias=False, kernel_init=small, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.k = linear(config.dim, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.v = linear(config.dim, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.o = linear(width, config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.position_bias = nnx.Param(jnp.zeros((config.num_buckets, config.num_heads), dtype))
        self.num_heads = config.num_heads

    def __call__(
        self, x: Float[Array, "P M"], is_token: Bool[Array, "P"], buckets: Int[np.ndarray, "P P"]
    ) -> Float[Array, "P M"]:
        q, k, v = (layer(x).reshape(x.shape[0], self.num_heads, -1) for layer in (self.q, self.k, self.v))
        # float32 from the products to the softmax: without the division by sqrt(D) the logits are large,
        # and bfloat16 would keep two digits of them.
        logits = jnp.einsum("qnd,knd->nqk", q, k, preferred_element_type=jnp.float32)
        bias = self.position_bias[...].astype(jnp.float32)[buckets]
        logits = logits + jnp.transpose(bias, (2, 0, 1))
        logits = jnp.where(is_token[None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        out = jnp.einsum("nqk,knd->qnd", weights, v)
        return self.o(out.reshape(x.shape[0], -1))


class GatedFeedForward(nnx.Module):
    """fc2( gelu(gate(x)) * fc1(x) ), the GELU in its tanh form."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.gate = linear(config.dim, config.ffn_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.fc1 = linear(config.dim, config.ffn_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.ffn_dim, config.dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "P M"]) -> Float[Array, "P M"]:
        return self.fc2(nnx.gelu(self.gate(x), approximate=True) * self.fc1(x))


class EncoderLayer(nnx.Module):
    """Attention and feed-forward, each after its norm and around a residual."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
        self.ffn = GatedFeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "P M"], is_token: Bool[Array, "P"], buckets: Int[np.ndarray, "P P"]
    ) -> Float[Array, "P M"]:
        x = x + self.attention(self.norm1(x), is_token, buckets)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """Token ids to hidden states. Holds parameters only.

    Args:
        config: sizes.
        dtype: type of parameters and activations, float32 or bfloat16; the norms' means, the attention
            logits and the softmax are float32 in both.
        rngs: draws the initial weights.
    """

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.dim,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda layer_rngs: EncoderLayer(config, dtype=dtype, rngs=layer_rngs), config.num_layers, rngs
        )
        self.norm = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
        self.config = config

    def __call__(self, ids: Int[Array, "P"], mask: Int[Array, "P"]) -> PromptEmbeds:
        """The hidden states of one prompt (unbatched), after the final norm.

        Args:
            ids: token ids, all below `config.vocab_size` (`text.Tokenizer` checks its vocabulary once).
            mask: 1 for the prompt's tokens with the EOS, 0 for the padding after them.

        Returns:
            One row per token. Padding rows are finite but mean nothing; `encode_prompt` sets them to zero.
        """
        config = self.config
        buckets = relative_position_buckets(
            ids.shape[0], num_buckets=config.num_buckets, max_distance=config.max_distance
        )
        is_token = mask != 0

        def body(layer, x, _):
            return layer(x, is_token, buckets), None

        x, _ = scan_layers(self.layers, body, self.token_embedding(ids), num_layers=config.num_layers)
        return self.norm(x)


def encode_prompt(encoder: UMT5Encoder, ids: Int[Array, "P"], mask: Int[Array, "P"]) -> PromptEmbeds:
    """The prompt embeddings of one prompt (unbatched): hidden states, zero past the EOS (METHOD section 8).

    The EOS's own row stays. Arguments as those of `UMT5Encoder.__call__`.
    """
    hidden = encoder(ids, mask)
    is_prompt = jnp.arange(mask.shape[0]) < jnp.sum(mask != 0)
    return jnp.where(is_prompt[:, None], hidden, jnp.zeros_like(hidden))
