"""Attention and rotary positions, as free functions for one example.

- Valid keys are always a prefix, so one length replaces every mask (see `cache.py` for why they are).
- Two paths with one meaning: cuDNN flash attention on a GPU in 16 bits, plain XLA elsewhere. `attention_path` chooses.
- Keys are rotated once, when they are made, with the absolute position of their own frame.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

# Above this many bytes of float32 logits the plain path goes block by block over the queries.
LOGITS_LIMIT = 256 * 2**20


def attention_path(dtype) -> str:
    """ "cudnn" or "xla": what `attention` uses for this type on the default backend.

    cuDNN's flash attention takes 16-bit types only; float32 is for parity and for CPUs.
    """
    on_gpu = jax.default_backend() == "gpu"
    return "cudnn" if on_gpu and jnp.dtype(dtype).itemsize == 2 else "xla"


def attention(
    q: Float[Array, "Tq N D"],
    k: Float[Array, "Tk N D"],
    v: Float[Array, "Tk N D"],
    length: Int[Array, ""] | None = None,
) -> Float[Array, "Tq N D"]:
    """softmax(q k^T / sqrt(D)) v over the first `length` keys (all of them where it is None)."""
    if attention_path(q.dtype) == "cudnn":
        lengths = jnp.full((1,), k.shape[0], jnp.int32) if length is None else length[None].astype(jnp.int32)
        return batched_attention("cudnn")(q[None], k[None], v[None], lengths)[0]
    return _plain_attention(q, k, v, length)


def _plain_attention(q, k, v, length):
    tokens, heads, _ = q.shape
    logits_bytes = 4 * heads * tokens * k.shape[0]
    blocks = next(
        m for m in range(1, tokens + 1) if (tokens % m == 0 and logits_bytes <= m * LOGITS_LIMIT) or m == tokens
    )
    # Heads first, and what is no key has -inf added: both are faster on a CPU than what JAX's own function does there.
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    bias = 0.0 if length is None else jnp.where(jnp.arange(k.shape[1]) < length, 0.0, -jnp.inf)

    def run(q):
        logits = jnp.einsum("ntd,nsd->nts", q, k, preferred_element_type=jnp.float32)
        return jnp.einsum("nts,nsd->ntd", _softmax(logits * q.shape[-1] ** -0.5 + bias).astype(v.dtype), v)

    if blocks == 1:
        return jnp.swapaxes(run(q), 0, 1)
    # The whole matrix of logits would not fit: each block of queries sees all keys, so no softmax is split.
    out = jax.lax.map(run, rearrange(q, "n (m t) d -> m n t d", m=blocks))
    return rearrange(out, "m n t d -> (m t) n d")


@jax.custom_jvp
def _softmax(logits):
    return jax.nn.softmax(logits)


@_softmax.defjvp
def _(primals, tangents):
    """In terms of the result alone, as JAX's own is only under `jax_softmax_custom_jvp`, which is off by default."""
    (logits,), (tangent,) = primals, tangents
    y = _softmax(logits)
    return y, y * (tangent - jnp.sum(y * tangent, axis=-1, keepdims=True))


@functools.cache
def batched_attention(implementation: Literal["xla", "cudnn"]):
    """Batched attention `(q [n,Tq,N,D], k, v [n,Tk,N,D], lengths [n])` whose vmap is a larger batch.

    JAX's own batching rule of the cuDNN call needs every operand to carry every mapped axis, and neither the
    length of a cache shared by the candidates of a beam nor the constant length of the queries does.
    """

    @jax.custom_batching.custom_vmap
    def run(q, k, v, lengths):
        query_lengths = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )

    @run.def_vmap
    def _(axis_size, in_batched, *operands):
        operands = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(operands, in_batched, strict=True)
        ]
        out = run(*[x.reshape(-1, *x.shape[2:]) for x in operands])
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return run


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of the D/2 rotary pairs belong to frame, row and column: 128 -> (22, 21, 21) (METHOD section 2)."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def _axis_angles(positions: Float[Array, " n"], pairs: int) -> Float[Array, "n pairs"]:
    theta = 10000.0 ** (-jnp.arange(pairs, dtype=jnp.float32) / max(pairs, 1))
    return positions[:, None] * theta


def rope_angles(
    start_frame: Int[Array, ""], frames: int, rows: int, columns: int, head_dim: int
) -> Float[Array, "tokens pairs"]:
    """Angles of every token of a chunk, token order frame, row, column. Frame positions are global and absolute.

    float32: bfloat16 cannot tell neighbouring frames apart from frame 256 on.
    """
    for_frame, for_row, for_column = axis_pairs(head_dim)
    frame = _axis_angles((start_frame + jnp.arange(frames)).astype(jnp.float32), for_frame)
    row = _axis_angles(jnp.arange(rows, dtype=jnp.float32), for_row)
    column = _axis_angles(jnp.arange(columns, dtype=jnp.float32), for_column)
    grid = (frames, rows, columns)
    angles = [
        jnp.broadcast_to(frame[:, None, None], (*grid, for_frame)),
        jnp.broadcast_to(row[None, :, None], (*grid, for_row)),
        jnp.broadcast_to(column[None, None, :], (*grid, for_column)),
    ]
    return jnp.concatenate(angles, axis=-1).reshape(math.prod(grid), -1)


def frame_shift_angles(shift: Int[Array, ""], head_dim: int) -> Float[Array, "1 pairs"]:
    """Angles that move an already rotated key by `shift` frames and leave its row and column."""
    for_frame, for_row, for_column = axis_pairs(head_dim)
    frame = _axis_angles(shift.astype(jnp.float32)[None], for_frame)
    return jnp.pad(frame, ((0, 0), (0, for_row + for_column)))


def rotate(x: Float[Array, "*L T N D"], angles: Float[Array, "t pairs"]) -> Float[Array, "*L T N D"]:
    """Rotates the pairs of neighbouring elements (2i, 2i+1) of every head by its token's angles, in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)
