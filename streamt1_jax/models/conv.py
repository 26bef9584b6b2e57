"""The convolutions of the Wan VAE: causal in time, streaming, channels last (METHOD section 7).

What is unusual about them:
- No convolution pads the future. What it saw last is its `past`, an argument and a result; zeros at the start.
- `causal_conv3d` is the only place that decides how a 3x3x3 convolution is computed.
- Resampling in time treats the first frame of a video apart; `first` is a Python bool, so each case is its own trace.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

# What a convolution saw last; unchecked axes, because a state holds pasts of several sizes.
Past: TypeAlias = Float[Array, "2 _h _w _i"]
LastFrame: TypeAlias = Float[Array, "1 _h _w _i"]

# With so few channels, in or out, one deep product beats three shallow ones; see `causal_conv3d`.
NARROW = 16


def conv2d(x: Float[Array, "t h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "t h w o"]:
    """A 3x3 convolution of each frame on its own, zero-padded to the same size."""
    # XLA's gradient of a kernel is a convolution with a window as large as the picture, which its CPU backend runs
    # in a naive loop: a training step took 300 times the forward pass.
    return _conv2d_with_cpu_gradient(x, kernel) if jax.default_backend() == "cpu" else _conv2d(x, kernel)


def _conv2d(x: Float[Array, "t h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "t h w o"]:
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_conv2d_with_cpu_gradient = jax.custom_vjp(_conv2d)


def _conv2d_forward(x, kernel):
    return _conv2d(x, kernel), (x, kernel)


def _conv2d_backward(residuals, dy):
    """The gradient of the input is a convolution with the turned kernel; that of the kernel one matrix product."""
    x, kernel = residuals
    dx = _conv2d(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    h, w = x.shape[1:3]
    padded = jnp.pad(dy, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Shifted copies of dy rather than of x: the layers that cost most have fewer channels out than in.
    shifted = [padded[:, 2 - a : 2 - a + h, 2 - b : 2 - b + w] for a in range(3) for b in range(3)]
    dkernel = jnp.einsum("thwi,thwk->ik", x, jnp.concatenate(shifted, axis=-1))
    return dx, rearrange(dkernel, "i (a b o) -> a b i o", a=3, b=3)


_conv2d_with_cpu_gradient.defvjp(_conv2d_forward, _conv2d_backward)


def causal_conv3d(past: Past, x: Float[Array, "t h w i"], kernel: Float[Array, "3 3 3 i o"]) -> Float[Array, "t h w o"]:
    """The 3x3x3 convolution of `x`, preceded in time by the two frames of `past`, as 2-d convolutions.

    A backend that prefers another form (one 3-d convolution, say) can choose it here and nowhere else.
    Medians on two CPU cores in float32, ms (`benchmarks/micro.py conv --preset mini`,
    `benchmarks/results/cpu-2core-mini-conv.json`):

        input -> o                three summed   frames joined   3-d convolution
        [4, 120, 208, 96] -> 96        177            310              394
        [4,  60, 104, 192] -> 192      146            199              258
        [4,  40,  64, 32] -> 32        2.6            2.5             10.3
        [4,  40,  64, 16] -> 16        0.79           0.76             5.0
        [4,  80, 128,  8] -> 8         2.1            0.95            10.0
        [4,  80, 128,  8] -> 3         4.4            0.66            10.2

    So: the sum over the three taps of time, which copies least, except where channels are so few that a
    product of one tap is mostly overhead; there the three frames are joined in channels.
    """
    # The taps of time: frame j of tap k is the input frame 2 - k steps before output frame j.
    taps = [jnp.concatenate([past[k:], x])[: x.shape[0]] for k in (0, 1)] + [x]
    if min(kernel.shape[-2:]) <= NARROW:
        return conv2d(jnp.concatenate(taps, axis=-1), rearrange(kernel, "k kh kw i o -> kh kw (k i) o"))
    return conv2d(taps[0], kernel[0]) + conv2d(taps[1], kernel[1]) + conv2d(taps[2], kernel[2])


def next_past(past: Float[Array, "2 h w i"], x: Float[Array, "t h w i"]) -> Float[Array, "2 h w i"]:
    """The last two frames of `past` followed by `x`."""
    return jnp.concatenate([past, x[-2:]])[-2:]


class CausalConv3d(nnx.Module):
    """3x3x3, same size out, causal in time."""

    def __init__(self, din: int, dout: int, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 3, din, dout), dtype))
        self.bias = nnx.Param(jnp.zeros((dout,), dtype))

    def init_state(self, h: int, w: int) -> Past:
        """Nothing seen yet: zeros, in the type of the parameters."""
        return jnp.zeros((2, h, w, self.kernel.shape[-2]), self.kernel.dtype)

    def __call__(self, x: Float[Array, "t h w i"], past: Past) -> tuple[Float[Array, "t h w o"], Past]:
        return causal_conv3d(past, x, self.kernel[...]) + self.bias[...], next_past(past, x)


class TimeConv(nnx.Module):
    """(3, 1, 1), no padding: every pixel on its own, so three matrix products."""

    def __init__(self, din: int, dout: int, *, stride: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 1, 1, din, dout), dtype))
        self.bias = nnx.Param(jnp.zeros((dout,), dtype))
        self.stride = stride

    def __call__(self, x: Float[Array, "t h w i"]) -> Float[Array, "n h w o"]:
        """`n` = (t - 3) / stride + 1 frames; the caller has put the past before the new frames."""
        last = x.shape[0] - 3
        kernel = self.kernel[...]
        taps = [x[k : k + last + 1 : self.stride] @ kernel[k, 0, 0] for k in range(3)]
        return taps[0] + taps[1] + taps[2] + self.bias[...]


class Upsample(nnx.Module):
    """Twice the frames (if `in_time`), then twice the height and width; half the channels out."""

    def __init__(self, dim: int, *, in_time: bool, dtype: Any, rngs: nnx.Rngs):
        self.dim, self.dtype = dim, dtype
        self.time_conv = TimeConv(dim, 2 * dim, stride=1, dtype=dtype, rngs=rngs) if in_time else None
        self.conv = nnx.Conv(dim, dim // 2, (3, 3), padding="SAME", dtype=dtype, param_dtype=dtype, rngs=rngs)

    def init_state(self, h: int, w: int) -> Past | None:
        return jnp.zeros((2, h, w, self.dim), self.dtype) if self.time_conv else None

    def __call__(
        self, x: Float[Array, "t h w i"], past: Past | None, first: bool
    ) -> tuple[Float[Array, "t2 h2 w2 o"], Past | None]:
        """With `first` time is left alone and `past` stays zero: the second frame never sees the first one."""
        if self.time_conv is not None and past is not None and not first:
            doubled = self.time_conv(jnp.concatenate([past, x]))
            past = next_past(past, x)
            x = rearrange(doubled, "t h w (pair c) -> (t pair) h w c", pair=2)
        x = repeat(x, "t h w c -> t (h two_h) (w two_w) c", two_h=2, two_w=2)
        assert self.conv.bias is not None
        return conv2d(x, self.conv.kernel[...]) + self.conv.bias[...], past


class Downsample(nnx.Module):
    """Half the height and width, then half the frames (if `in_time`); as many channels out."""

    def __init__(self, dim: int, *, in_time: bool, dtype: Any, rngs: nnx.Rngs):
        self.dim, self.dtype = dim, dtype
        # One row below and one column right, none above or left.
        self.conv = nnx.Conv(
            dim, dim, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.time_conv = TimeConv(dim, dim, stride=2, dtype=dtype, rngs=rngs) if in_time else None

    def init_state(self, h: int, w: int) -> LastFrame | None:
        return jnp.zeros((1, h // 2, w // 2, self.dim), self.dtype) if self.time_conv else None

    def __call__(
        self, x: Float[Array, "t h w i"], past: LastFrame | None, first: bool
    ) -> tuple[Float[Array, "t2 h2 w2 i"], LastFrame | None]:
        """With `first` the one frame passes through time unchanged and becomes the past."""
        x = self.conv(x)
        if self.time_conv is None or past is None:
            return x, past
        return x if first else self.time_conv(jnp.concatenate([past, x])), x[-1:]
