"""Fusing the scores, keeping the best beams, and the flags of memory sinking (METHOD sections 5 and 6), by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal

from streamt1_jax.config import SearchConfig
from streamt1_jax.pruning import fuse, fusion_weight, keep_best
from streamt1_jax.sink import Route, ema_update, flags_to_route, sink_flags

nan, inf = np.nan, np.inf


@pytest.mark.parametrize(
    ("start", "total", "cap", "alpha"),
    [
        (0, 21, 0.4, 0.0),
        (3, 21, 0.4, 3 / 18),
        (6, 21, 0.4, 6 / 18),
        (9, 21, 0.4, 0.4),
        (18, 21, 0.4, 0.4),
        (18, 21, 1.0, 1.0),
        (0, 3, 0.4, 0.0),  # a video of one chunk: the released code divides by zero
        (3, 6, 0.4, 0.4),
        (6, 120, 0.0, 0.0),
        (27, 21, 1.0, 1.0),  # an endless stream past the length it was planned for
    ],
)
def test_fusion_weight(start, total, cap, alpha):
    got = fusion_weight(jnp.int32(start), jnp.int32(total), 3, cap)
    assert got.dtype == jnp.float32
    assert_close("alpha", got, alpha, 1e-7)


def test_fusion():
    short, long = jnp.array([1.0, nan, 2.0, -3.0]), jnp.array([5.0, 1.0, inf, 4.0])
    assert_close("first two of", fuse(short, long, jnp.float32(0.25))[jnp.array([0, 3])], [4.0, 2.25], 1e-6)
    for alpha in (0.0, 0.4, 1.0):
        finite = np.isfinite(fuse(short, long, jnp.float32(alpha)))
        assert_equal(f"finite at {alpha}", finite, [True, False, False, True])


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], [3, 2]),
        ([[4.0, 3.0], [2.0, 1.0]], [0, 1]),
        ([[1.0, 1.0], [1.0, 1.0]], [0, 1]),
        ([[1.0, 2.0], [2.0, 2.0]], [1, 2]),
        ([[nan, 2.0], [1.0, nan]], [1, 2]),
        ([[nan, -1e30], [nan, -1e38]], [1, 3]),
        ([[nan, nan], [nan, 0.5]], [3, 0]),
        ([[nan, nan], [nan, nan]], [0, 1]),
        ([[inf, 0.0], [-inf, -1.0]], [1, 3]),
        ([[-0.0, 0.0], [-1.0, -1.0]], [0, 1]),
    ],
)
def test_keep_best(scores, kept):
    scores = jnp.array(scores)
    got = keep_best(scores, jnp.isfinite(scores), 2)
    assert got.dtype == jnp.int32
    assert_equal("kept", got, kept)


def test_unusable_candidates_are_not_kept_for_their_scores():
    scores = jnp.array([[9.0, 1.0], [8.0, 2.0]])
    usable = jnp.array([[False, True], [True, True]])
    assert_equal("kept", keep_best(scores, usable, 2), [2, 3])


SEARCH = SearchConfig(short_threshold=0.5, long_threshold=0.25)


@pytest.mark.parametrize(
    ("short", "mean", "long", "previous", "ema", "append", "route"),
    [
        (2.0, 1.0, 3.0, 3.0, True, False, Route.EMA),
        (2.0, 1.0, 3.0, 4.0, False, True, Route.APPEND),
        (1.0, 1.0, 3.0, 4.0, False, False, Route.DISCARD),
        (1.5, 1.0, 3.0, 4.0, False, False, Route.DISCARD),  # at the threshold is not above it
        (1.75, 1.0, 3.0, 3.25, True, False, Route.EMA),  # at the threshold is not below it
        (1.75, 1.0, 3.0, 3.5, False, True, Route.APPEND),
        (2.0, nan, 3.0, 4.0, False, False, Route.DISCARD),
        (2.0, 1.0, nan, 4.0, True, False, Route.EMA),
    ],
)
def test_flags_and_route(short, mean, long, previous, ema, append, route):
    flags = sink_flags(*(jnp.array([x]) for x in (short, mean, long, previous)), SEARCH)
    assert_equal("flags", np.concatenate(flags), [ema, append])
    assert_equal("route", flags_to_route(*flags), [route])


def test_ema_in_float32():
    """In bfloat16 a step of 0.001 would vanish."""
    out = ema_update(jnp.ones(3), jnp.full((3,), 2.0, jnp.bfloat16), 0.999)
    assert out.dtype == jnp.float32
    assert_close("average", out, np.full(3, 1.001), 1e-6)
