"""The KV cache against a plain Python list of chunks, over random routes and layouts."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from streamt1_jax.cache import EMPTY, commit_chunk, empty_cache, past_of
from streamt1_jax.config import RunConfig, SearchConfig, StreamConfig
from streamt1_jax.models.attention import rope_angles, rotate
from streamt1_jax.models.dit import KV
from streamt1_jax.sink import Route

F, ROWS, COLUMNS = 2, 1, 2  # latent frames of a chunk, token rows and columns of a frame
LAYERS, TOKENS, HEADS, DIM = 2, F * ROWS * COLUMNS, 2, 12
SHAPE = (LAYERS, TOKENS, HEADS, DIM)
FRAME_PAIRS = 2  # of DIM = 12: frame, row and column have two rotary pairs each
ALPHA = 0.75
CHUNKS = 12


class Layout(NamedTuple):
    """How many chunks each pool holds."""

    sinks: int
    window: int
    appended: int

    def config(self, *, sinking: bool = True, ema_alpha: float = ALPHA) -> RunConfig:
        stream = StreamConfig(
            latent_frames_per_chunk=F, sink_size=F * self.sinks, local_attn_size=F * (self.sinks + self.window + 1)
        )
        search = SearchConfig(max_sink_size=F * (self.sinks + self.appended), ema_alpha=ema_alpha, sinking=sinking)
        return RunConfig(stream, search)


LAYOUTS = [Layout(1, 2, 2), Layout(2, 1, 3), Layout(1, 0, 1), Layout(2, 0, 2), Layout(1, 3, 0), Layout(2, 3, 1)]


@functools.cache
def runner(layout: Layout, sinking: bool = True, dtype=jnp.float32):
    """Commits chunk after chunk from an empty cache; every cache on the way, in one program a layout."""
    config = layout.config(sinking=sinking)

    @jax.jit
    def run(keys, values, routes):
        def body(cache, chunk):
            number, k, v, route = chunk
            turned = rotate(k, rope_angles(number * F, F, ROWS, COLUMNS, DIM))
            cache, evicted = commit_chunk(cache, KV(turned, v), chunk=number, route=route, config=config)
            return cache, (cache, evicted, past_of(cache, number + 1, config))

        start = empty_cache(config, jax.ShapeDtypeStruct(SHAPE, dtype))
        return jax.lax.scan(body, start, (jnp.arange(CHUNKS), keys, values, routes))[1]

    return run


def draw(seed):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((CHUNKS, *SHAPE)).astype(np.float32) for _ in range(2))


@dataclasses.dataclass
class Remembered:
    """A chunk in the plain list: keys as they were before rotation."""

    start: int
    k: np.ndarray
    v: np.ndarray
    route: Route = Route.NONE

    def rotated(self) -> np.ndarray:
        """The frame's share of the rotation by complex numbers, and the column's (there is one row)."""
        pairs = self.k[..., 0::2].astype(np.float64) + 1j * self.k[..., 1::2]
        for token in range(TOKENS):
            for i in range(FRAME_PAIRS):
                theta = 10000.0 ** (-i / FRAME_PAIRS)
                pairs[:, token, :, i] *= np.exp(1j * theta * (self.start + token // COLUMNS))
                pairs[:, token, :, 2 * FRAME_PAIRS + i] *= np.exp(1j * theta * (token % COLUMNS))
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(self.k.shape)


class PlainCache:
    """METHOD sections 3 and 6 with Python lists; the chunk that overflows the window is routed at once."""

    def __init__(self, layout: Layout, sinking: bool):
        self.layout, self.sinking = layout, sinking
        self.sinks: list[Remembered] = []
        self.window: list[Remembered] = []

    def commit(self, chunk: Remembered) -> tuple[int, Route]:
        if len(self.sinks) < self.layout.sinks and not self.window:
            self.sinks.append(chunk)
            return EMPTY, Route.NONE
        self.window.append(chunk)
        if len(self.window) <= self.layout.window:
            return EMPTY, Route.NONE
        return self.evict(self.window.pop(0))

    def evict(self, chunk: Remembered) -> tuple[int, Route]:
        route = chunk.route if self.sinking else Route.DISCARD
        if route == Route.APPEND and len(self.sinks) == self.layout.sinks + self.layout.appended:
            route = Route.EMA
        if route == Route.APPEND:
            self.sinks.append(chunk)
        elif route == Route.EMA:
            newest = self.sinks[-1]
            newest.k = ALPHA * newest.k + (1 - ALPHA) * chunk.k
            newest.v = ALPHA * newest.v + (1 - ALPHA) * chunk.v
        return chunk.start, route

    @property
    def chunks(self) -> list[Remembered]:
        return sorted(self.sinks + self.window, key=lambda chunk: chunk.start)


def check(layout: Layout, sinking: bool, routes: list[Route], seed: int) -> None:
    keys, values = draw(seed)
    caches, evicted, pasts = jax.device_get(
        runner(layout, sinking)(jnp.asarray(keys), jnp.asarray(values), jnp.array(routes, jnp.int32))
    )
    plain = PlainCache(layout, sinking)
    slots = layout.config(sinking=sinking).cache_slots
    assert caches.k.shape == caches.v.shape == (CHUNKS, LAYERS, slots, *SHAPE[1:])
    for i in range(CHUNKS):
        where = f"{layout} after chunk {i}"
        gone = plain.commit(Remembered(F * i, keys[i].astype(np.float64), values[i].astype(np.float64), routes[i]))
        assert (int(evicted.start[i]), Route(evicted.route[i])) == gone, f"{where}: what was evicted"

        chunks = plain.chunks
        count = len(chunks)
        assert int(pasts.length[i]) == TOKENS * count, f"{where}: valid tokens"
        starts = caches.start[i]
        assert sorted(starts[:count]) == [chunk.start for chunk in chunks], f"{where}: positions of the valid slots"
        assert (starts[count:] == EMPTY).all(), f"{where}: slots behind the valid ones are marked as used"
        order = np.argsort(starts[:count])
        for name, past, expected in (
            ("keys", pasts.kv.k[i], [chunk.rotated() for chunk in chunks]),
            ("values", pasts.kv.v[i], [chunk.v for chunk in chunks]),
        ):
            by_slot = past.reshape(LAYERS, slots, *SHAPE[1:])
            assert_close(f"{where}: {name}", by_slot[:, :count][:, order].swapaxes(0, 1), expected, 1e-5)
            assert not by_slot[:, count:].any(), f"{where}: {name} were written past the valid slots"


ROUTES = st.lists(st.sampled_from([Route.DISCARD, Route.EMA, Route.APPEND]), min_size=CHUNKS, max_size=CHUNKS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=60)
@given(routes=ROUTES, seed=st.integers(0, 1000))
def test_matches_a_plain_list(layout, routes, seed):
    check(layout, True, routes, seed)


@pytest.mark.parametrize("route", list(Route)[1:])
def test_one_route_for_all(route):
    """All APPEND fills the sinks and then averages into the newest; nothing is ever written past the end."""
    check(Layout(1, 2, 2), True, [route] * CHUNKS, 0)


@settings(max_examples=5)
@given(routes=ROUTES)
def test_without_sinking_every_route_is_discard(routes):
    check(Layout(1, 2, 2), False, routes, 0)


def test_without_sinking_there_is_no_room_for_more_sinks():
    config = Layout(1, 2, 2).config(sinking=False)
    cache = empty_cache(config, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    assert config.cache_slots == 3
    assert cache.newest_sink is None


def test_by_hand():
    """The table at the head of cache.py: chunk 1 is appended, chunks 2 and 4 are dropped, chunk 3 is averaged in."""
    routes = [Route.DISCARD] * CHUNKS
    routes[1], routes[3] = Route.APPEND, Route.EMA
    keys, values = draw(0)
    caches, evicted, pasts = jax.device_get(runner(Layout(1, 2, 2))(keys, values, jnp.array(routes, jnp.int32)))
    no = EMPTY
    # Latent frames: chunk c starts at 2 c.   sink  window   appended
    assert_equal("slots after 0", caches.start[0], [0, no, no, no, no])
    assert_equal("slots after 1", caches.start[1], [0, 2, no, no, no])
    assert_equal("slots after 2", caches.start[2], [0, 2, 4, no, no])
    assert_equal("slots after 3", caches.start[3], [0, 6, 4, 2, no])
    assert_equal("slots after 4", caches.start[4], [0, 6, 8, 2, no])
    assert_equal("slots after 5", caches.start[5], [0, 10, 8, 2, no])
    assert_equal("slots after 6", caches.start[6], [0, 10, 12, 2, no])
    assert_equal("valid tokens", pasts.length[:7], [4, 8, 12, 16, 16, 16, 16])
    assert_equal("evicted", evicted.start[:7], [no, no, no, 2, 4, 6, 8])
    route = [Route.NONE] * 3 + [Route.APPEND, Route.DISCARD, Route.EMA, Route.DISCARD]
    assert_equal("routes", evicted.route[:7], route)
    assert_close("the appended sink's values", caches.v[4][:, 3], values[1], 0)
    assert_close("the same with chunk 3 in it", caches.v[5][:, 3], ALPHA * values[1] + (1 - ALPHA) * values[3], 1e-6)
    assert_close("the first sink's values", caches.v[6][:, 0], values[0], 0)


def test_beams_do_not_leak_into_each_other():
    """Three beams of other chunks and routes; changing one leaves the others' bits alone."""
    run = jax.jit(jax.vmap(runner(Layout(1, 2, 2))))
    keys, values = (jnp.asarray(np.stack(x)) for x in zip(*(draw(seed) for seed in (1, 2, 3)), strict=True))
    routes = jnp.array(np.random.default_rng(0).integers(0, 3, (3, CHUNKS)), jnp.int32)
    before = jax.device_get(run(keys, values, routes))
    one_by_one = [runner(Layout(1, 2, 2))(keys[b], values[b], routes[b]) for b in range(3)]
    changed = jax.device_get(run(keys.at[1].set(jnp.nan), values.at[1].mul(-3), routes.at[1].set(Route.APPEND)))
    for (path, batched), alone0, alone2, after in zip(
        jax.tree_util.tree_leaves_with_path(before),
        jax.tree.leaves(one_by_one[0]),
        jax.tree.leaves(one_by_one[2]),
        jax.tree.leaves(changed),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert_close(f"beam 0 alone {name}", alone0, batched[0], 1e-6)
        assert_close(f"beam 2 alone {name}", alone2, batched[2], 1e-6)
        for beam in (0, 2):
            assert_equal(f"beam {beam} {name}", after[beam], batched[beam])


def test_bfloat16_does_not_round_the_average_away():
    """60 chunks of ones averaged into a sink of zeros at 0.999: bfloat16 alone would stay at its first step."""
    config = Layout(1, 0, 0).config(ema_alpha=0.999)
    kv = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    store = functools.partial(commit_chunk, config=config)
    zero, one = (jnp.full(SHAPE, x, jnp.bfloat16) for x in (8.0, 9.0))

    @jax.jit
    def run():
        cache, _ = store(empty_cache(config, kv), KV(zero, zero), chunk=jnp.int32(0), route=jnp.int32(Route.NONE))

        def body(cache, chunk):
            return store(cache, KV(one, one), chunk=chunk, route=jnp.int32(Route.EMA))[0], None

        return jax.lax.scan(body, cache, 1 + jnp.arange(60))[0]

    cache = run()
    expected = 9.0 - 0.999**60
    assert cache.v.dtype == jnp.bfloat16
    assert_close("newest sink in float32", cache.newest_sink.v, np.full(SHAPE, expected), 1e-4)
    stored = np.full(SHAPE, np.asarray(jnp.bfloat16(expected), np.float32))
    assert_close("newest sink as stored", cache.v[:, 0].astype(jnp.float32), stored, 0)
