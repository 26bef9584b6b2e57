"""Attention and rotary positions against plain NumPy and complex numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close

from streamt1_jax.models import attention as A

HEADS, DIM = 2, 12


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def numpy_attention(q, k, v, length=None):
    """softmax(q k^T / sqrt(D)) v in float64, one query and one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:length], v[:length]))
    out = np.zeros(q.shape)
    for token in range(q.shape[0]):
        for head in range(q.shape[1]):
            logits = k[:, head] @ q[token, head] / np.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            out[token, head] = weights / weights.sum() @ v[:, head]
    return out


@functools.partial(jax.jit, static_argnames="limit")
def run(q, k, v, length=None, limit=None):
    """`limit` only keeps programs traced under different `LOGITS_LIMIT`s apart."""
    return A.attention(q, k, v, length)


class TestAttention:
    q, k, v = draw(0, 6, HEADS, DIM), draw(1, 10, HEADS, DIM), draw(2, 10, HEADS, DIM)

    def test_every_key(self):
        assert_close("attention", run(self.q, self.k, self.v), numpy_attention(self.q, self.k, self.v), 1e-6)

    @pytest.mark.parametrize("length", [1, 4, 9, 10])
    def test_only_the_first_keys(self, length):
        expected = numpy_attention(self.q, self.k, self.v, length)
        assert_close(f"length {length}", run(self.q, self.k, self.v, jnp.int32(length)), expected, 1e-6)

    def test_keys_behind_the_length_do_not_matter(self):
        k, v = (x.at[4:].set(far) for x, far in ((self.k, 1e4), (self.v, -1e4)))
        expected = run(self.q, self.k, self.v, jnp.int32(4))
        np.testing.assert_array_equal(run(self.q, k, v, jnp.int32(4)), expected)

    @pytest.mark.parametrize("logits_per_block", [6 * 20, 3 * 20, 2 * 20, 1, 5 * 20])
    @pytest.mark.parametrize("length", [None, 7])
    def test_blocks_of_queries_change_nothing(self, monkeypatch, logits_per_block, length):
        """Bounds that take 1, 2, 3 and 6 blocks; the last lies between two divisors."""
        lengths = None if length is None else jnp.int32(length)
        expected = run(self.q, self.k, self.v, lengths)
        monkeypatch.setattr(A, "LOGITS_LIMIT", 4 * logits_per_block)
        blocked = run(self.q, self.k, self.v, lengths, limit=logits_per_block)
        assert_close(f"blocks of {logits_per_block} logits", blocked, expected, 1e-6)

    def test_blocks_bound_the_logits(self, monkeypatch):
        monkeypatch.setattr(A, "LOGITS_LIMIT", 4 * 2 * 20)
        traced = jax.make_jaxpr(lambda *a: A.attention(*a))(self.q, self.k, self.v)
        sizes = [
            v.aval.size for eqn in _all_equations(traced.jaxpr) for v in eqn.outvars if eqn.primitive.name == "exp"
        ]
        assert sizes, "no exponential was found in the trace"
        assert max(sizes) <= 2 * 20, f"a block has {max(sizes)} logits"

    @pytest.mark.parametrize("length", [None, 7])
    def test_derivatives_are_those_of_jax_own_attention(self, length):
        lengths = None if length is None else jnp.int32(length)
        operands, tangents = (self.q, self.k, self.v), (draw(3, 6, HEADS, DIM), draw(4, 10, HEADS, DIM), self.k)

        def reference(q, k, v):
            valid = None if length is None else lengths[None]
            return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=valid, implementation="xla")

        def ours(q, k, v):
            return A.attention(q, k, v, lengths)

        _, forward = jax.jvp(ours, operands, tangents)
        _, expected = jax.jvp(reference, operands, tangents)
        assert_close("forward", forward, expected, 1e-5)
        cotangent = draw(5, 6, HEADS, DIM)
        gradients, expected = (jax.vjp(attend, *operands)[1](cotangent) for attend in (ours, reference))
        for name, gradient, wanted in zip("qkv", gradients, expected, strict=True):
            assert_close(f"gradient of {name}", gradient, wanted, 1e-5)

    @pytest.mark.usefixtures("standard_promotion")
    def test_bfloat16_is_near(self):
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (self.q, self.k, self.v))
        out = run(q, k, v, jnp.int32(7))
        assert out.dtype == jnp.bfloat16
        expected = numpy_attention(self.q, self.k, self.v, 7)
        assert_close("bfloat16", out.astype(jnp.float32), expected, 0.02 * np.abs(expected).max())

    @pytest.mark.parametrize(
        ("backend", "dtype", "expected"),
        [
            ("gpu", jnp.bfloat16, "cudnn"),
            ("gpu", jnp.float16, "cudnn"),
            ("gpu", jnp.float32, "xla"),
            ("cpu", jnp.bfloat16, "xla"),
        ],
    )
    def test_path(self, monkeypatch, backend, dtype, expected):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        assert A.attention_path(dtype) == expected


def _all_equations(jaxpr):
    """The equations of a trace and of all traces inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _all_equations(inner)


class TestBatchedAttention:
    """The rule that makes any vmap one larger batch, here with the XLA implementation behind it."""

    attend = staticmethod(A.batched_attention("xla"))

    def one(self, q, k, v, length):
        return self.attend(q[None], k[None], v[None], length[None])[0]

    def test_a_batch(self):
        q, k, v = draw(0, 3, 4, HEADS, DIM), draw(1, 3, 7, HEADS, DIM), draw(2, 3, 7, HEADS, DIM)
        out = jax.jit(self.attend)(q, k, v, jnp.array([1, 4, 7], jnp.int32))
        for i, length in enumerate((1, 4, 7)):
            assert_close(f"row {i}", out[i], numpy_attention(q[i], k[i], v[i], length), 1e-6)

    def test_nested_vmap_with_shared_keys_and_lengths(self):
        """Beams by candidates: keys and lengths belong to the beam, queries to the candidate."""
        beams, candidates = 2, 3
        q = draw(0, beams, candidates, 4, HEADS, DIM)
        k, v = draw(1, beams, 7, HEADS, DIM), draw(2, beams, 7, HEADS, DIM)
        lengths = jnp.array([3, 6], jnp.int32)
        of_beam = jax.vmap(self.one, in_axes=(0, None, None, None))
        out = jax.jit(jax.vmap(of_beam))(q, k, v, lengths)
        for b in range(beams):
            for c in range(candidates):
                expected = numpy_attention(q[b, c], k[b], v[b], int(lengths[b]))
                assert_close(f"beam {b} candidate {c}", out[b, c], expected, 1e-6)

    def test_vmap_with_one_length_for_all(self):
        q, k, v = draw(0, 3, 4, HEADS, DIM), draw(1, 3, 7, HEADS, DIM), draw(2, 7, HEADS, DIM)
        out = jax.jit(jax.vmap(self.one, in_axes=(0, 0, None, None)))(q, k, v, jnp.int32(5))
        for i in range(3):
            assert_close(f"row {i}", out[i], numpy_attention(q[i], k[i], v, 5), 1e-6)

    def test_vmap_inside_scan(self):
        q, k = draw(0, 2, 3, 4, HEADS, DIM), draw(1, 2, 7, HEADS, DIM)

        def body(total, layer):
            q, k = layer
            return total + jax.vmap(self.one, in_axes=(0, None, None, None))(q, k, k, jnp.int32(5)), None

        total, _ = jax.jit(lambda: jax.lax.scan(body, jnp.zeros((3, 4, HEADS, DIM)), (q, k)))()
        expected = [sum(numpy_attention(q[layer, i], k[layer], k[layer], 5) for layer in range(2)) for i in range(3)]
        assert_close("sum over layers", total, expected, 1e-6)


def complex_rope(x, frame, row, column):
    """One head's vector at a position, from the formula: neighbours are complex numbers, turned by e^(i angle)."""
    dim = len(x)
    spatial = dim // 6
    pairs = {"frame": dim // 2 - 2 * spatial, "row": spatial, "column": spatial}
    position = {"frame": frame, "row": row, "column": column}
    x = np.asarray(x, np.float64)
    turned = x[0::2] + 1j * x[1::2]
    at = 0
    for axis in ("frame", "row", "column"):
        for i in range(pairs[axis]):
            turned[at] *= np.exp(1j * position[axis] * 10000.0 ** (-2 * i / (2 * pairs[axis])))
            at += 1
    assert at == dim // 2
    return np.stack([turned.real, turned.imag], axis=-1).reshape(dim)


class TestRope:
    @pytest.mark.parametrize(
        ("head_dim", "pairs"),
        [(128, (22, 21, 21)), (12, (2, 2, 2)), (24, (4, 4, 4)), (48, (8, 8, 8)), (16, (4, 2, 2)), (4, (2, 0, 0))],
    )
    def test_pairs_of_each_axis(self, head_dim, pairs):
        assert A.axis_pairs(head_dim) == pairs
        assert sum(pairs) == head_dim // 2

    @pytest.mark.parametrize("head_dim", [12, 16, 128])
    @pytest.mark.parametrize("start", [0, 6, 1030])
    def test_against_complex_numbers(self, head_dim, start):
        frames, rows, columns = 2, 2, 3
        x = draw(0, frames * rows * columns, HEADS, head_dim)
        angles = A.rope_angles(jnp.int32(start), frames, rows, columns, head_dim)
        assert angles.shape == (len(x), head_dim // 2)
        assert angles.dtype == jnp.float32
        positions = [(start + f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
        expected = [[complex_rope(x[t, n], *positions[t]) for n in range(HEADS)] for t in range(len(x))]
        # A float32 angle of 1000 radians is known to 6e-5.
        assert_close(f"start {start}", A.rotate(x, angles), expected, 1e-6 if start < 100 else 3e-4)

    def test_bfloat16_is_rotated_in_float32(self):
        x = jnp.asarray(draw(0, 6, HEADS, 12), jnp.bfloat16)
        angles = A.rope_angles(jnp.int32(900), 1, 2, 3, 12)
        out = A.rotate(x, angles)
        assert out.dtype == jnp.bfloat16
        expected = A.rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16)
        np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize(("source", "target"), [(0, 5), (7, 2), (30, 30), (4, 700)])
    def test_frame_shift_is_rotation_anew(self, source, target):
        x = draw(0, 2 * 2 * 3, HEADS, 16)
        there = A.rotate(x, A.rope_angles(jnp.int32(source), 2, 2, 3, 16))
        moved = A.rotate(there, A.frame_shift_angles(jnp.int32(target - source), 16))
        expected = A.rotate(x, A.rope_angles(jnp.int32(target), 2, 2, 3, 16))
        assert_close(f"{source} to {target}", moved, expected, 2e-6 if target < 100 else 3e-4)

    def test_scores_depend_on_differences_of_frames_only(self):
        q, k = draw(0, 6, HEADS, 16), draw(1, 6, HEADS, 16)

        def scores(start_q, start_k):
            turned = [A.rotate(x, A.rope_angles(jnp.int32(s), 1, 2, 3, 16)) for x, s in ((q, start_q), (k, start_k))]
            return np.einsum("qnd,knd->nqk", *turned)

        assert_close("shifted by 40 frames", scores(43, 40), scores(3, 0), 1e-4)
