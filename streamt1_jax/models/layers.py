"""What the three networks share: the RMS norm, and identical layers stacked and scanned.

A network is an `nnx.Module` that holds parameters and nothing else. `dtype` is the type of parameters and
activations alike; the places that need float32 whatever the type say so where they happen.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""

    def __init__(self, dim: int, *, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        # float32: a bfloat16 mean of squares over thousands of channels loses most of its digits.
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.scale[...]


def linear(din: int, dout: int, *, dtype: Any, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    """A dense layer whose parameters and products are of one type."""
    return nnx.Linear(din, dout, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def stack_layers(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """One module whose every parameter has a leading layer axis: `num_layers` independent draws of `make`."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def draw(layer_rngs: nnx.Rngs) -> M:
        return make(layer_rngs)

    return draw(rngs)


def scan_layers(
    layers: nnx.Module, body: Callable, carry: Any, xs: Any = None, *, num_layers: int, unroll: int = 1
) -> tuple[Any, Any]:
    """`carry, y = body(layer, carry, x)` for the first `num_layers` of stacked layers, in one compiled loop.

    Args:
        layers: what `stack_layers` made.
        body: takes one layer (a module without the layer axis), the carry and that layer's slice of `xs`.
        xs: a pytree with a leading layer axis, read only, or None.
        num_layers: how many layers to run; fewer than are stacked leaves the last ones out without a copy
            of the parameters.
        unroll: how many layers one turn of the loop runs.

    Returns:
        The last carry, and every `y` stacked on a leading layer axis.
    """
    graphdef, params = nnx.split(layers)
    if num_layers == jax.tree.leaves(params)[0].shape[0]:
        # Scanned over as they stand: the gradient of an index would be as large as all layers, for every layer.
        return jax.lax.scan(
            lambda carry, layer: body(nnx.merge(graphdef, layer[0]), carry, layer[1]),
            carry,
            (params, xs),
            unroll=unroll,
        )

    def run(carry, index):
        layer_params, x = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), (params, xs)
        )
        return body(nnx.merge(graphdef, layer_params), carry, x)

    return jax.lax.scan(run, carry, jnp.arange(num_layers), unroll=unroll)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the last axis, without an affine map; float32 comes out."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
