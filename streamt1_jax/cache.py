"""The KV cache of one beam: fixed chunk slots, never shifted, never re-rotated per step (METHOD sections 3 and 6).

Slots stand in the order: first sinks, window, appended sinks. A sink is appended only once the window is full, so the
valid slots are a prefix at every moment, and one length replaces every attention mask. With 1 sink, 2 window slots and
room for 2 appended sinks (`.` is empty, numbers are chunks, chunk 1 is appended and chunk 2 dropped):

    after chunk   0       1       2       3       4
    sink          0       0       0       0       0
    window        . .     1 .     1 2     3 2     3 4
    appended      . .     . .     . .     1 .     1 .

The window is a ring: attention does not mind the order. The chunk that leaves is routed when its successor is
committed, which is when the next chunk begins.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from streamt1_jax.config import RunConfig
from streamt1_jax.models.attention import frame_shift_angles, rotate
from streamt1_jax.models.dit import KV, Past
from streamt1_jax.sink import Route, ema_update
from streamt1_jax.types import Count

EMPTY = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    k: Float[Array, "*B L slots t N D"]  # keys, rotated at the absolute position of their own frames
    v: Float[Array, "*B L slots t N D"]  # values
    start: Int[Array, "*B slots"]  # first latent frame of the chunk in each slot, or EMPTY
    route: Int[Array, "*B slots"]  # the Route its flags chose, for the chunks in the window
    appended: Int[Array, "*B"]  # sinks appended so far
    newest_sink: (
        KV | None
    )  # the newest sink chunk, the only one that can still change, in `sink_dtype`; None without sinking


class Evicted(NamedTuple):
    """What left the window when a chunk was committed."""

    start: Int[Array, ""]  # its first latent frame, or EMPTY
    route: Int[Array, ""]  # the Route taken; APPEND into full sinks has become EMA


def empty_cache(config: RunConfig, kv: jax.ShapeDtypeStruct) -> Cache:
    """A cache for chunks whose keys are of the shape and type `kv`, [L, t, N, D]."""
    layers, *chunk = kv.shape
    slots = config.cache_slots
    storage = jnp.zeros((layers, slots, *chunk), kv.dtype)
    newest = None
    if config.search.sinking:
        newest = KV(*(jnp.zeros(kv.shape, config.search.sink_dtype) for _ in range(2)))
    marks = jnp.full((slots,), EMPTY, jnp.int32)
    return Cache(storage, storage, marks, jnp.full((slots,), Route.NONE, jnp.int32), jnp.int32(0), newest)


def past_of(cache: Cache, chunk: Count, config: RunConfig) -> Past:
    """What chunk number `chunk` attends to beside itself."""
    layers, slots, tokens = cache.k.shape[:3]
    flat = KV(*(x.reshape(layers, slots * tokens, *x.shape[3:]) for x in (cache.k, cache.v)))
    filled = jnp.minimum(chunk, config.stream.sink_chunks + config.stream.window_chunks)
    return Past(flat, (filled + cache.appended) * tokens)


def sinks_of(cache: Cache, config: RunConfig) -> Past:
    """The sinks alone, first and appended, once the first ones are there."""
    fixed = config.stream.sink_chunks + config.stream.window_chunks
    layers, _, tokens = cache.k.shape[:3]

    def flat(x):
        sinks = jnp.concatenate([x[:, : config.stream.sink_chunks], x[:, fixed:]], axis=1)
        return sinks.reshape(layers, -1, *x.shape[3:])

    return Past(KV(flat(cache.k), flat(cache.v)), (config.stream.sink_chunks + cache.appended) * tokens)


def rewrite(cache: Cache, kv: KV, *, chunk: Count, sinks: bool, config: RunConfig) -> Cache:
    """Stores recent chunks anew, in the slots where their numbers belong (METHOD section 9).

    Args:
        kv: keys (rotated) and values of the chunks up to `chunk - 1`, [L, count * t, N, D].
        chunk: number of the chunk to come.
        sinks: the oldest of them become the first sinks, and appended sinks are dropped; else sinks stay.
    """
    first, window, f = config.stream.sink_chunks, config.stream.window_chunks, config.stream.latent_frames_per_chunk
    layers, _, tokens = cache.k.shape[:3]
    per_chunk = KV(*(x.reshape(layers, -1, tokens, *x.shape[2:]) for x in kv))
    count = per_chunk.k.shape[1]
    places = [(first + (chunk - back - first) % window, count - back) for back in range(1, window + 1)]
    if sinks:
        places = places[: max(count - first, 0)] + [(jnp.int32(i), i) for i in range(min(first, count))]
        empty = jnp.arange(config.cache_slots) >= first + window
        cache = dataclasses.replace(
            cache, start=jnp.where(empty, EMPTY, cache.start), appended=jnp.zeros_like(cache.appended)
        )
        if cache.newest_sink is not None and count >= first:
            newest = (x[:, first - 1].astype(config.search.sink_dtype) for x in per_chunk)
            cache = dataclasses.replace(cache, newest_sink=KV(*newest))
    for slot, i in places:
        chunk_kv = KV(*(x[:, i] for x in per_chunk))
        # Its flags stay: they are looked up when it leaves the window.
        cache = _store(cache, chunk_kv, slot, (chunk - count + i) * f, cache.route[slot])
    return cache


def commit_chunk(
    cache: Cache, kv: KV, *, chunk: Count, route: Int[Array, ""], config: RunConfig
) -> tuple[Cache, Evicted]:
    """Stores a finished chunk; routes the chunk that it pushes out of the window.

    Args:
        kv: the chunk's keys (rotated) and values from its context pass, [L, t, N, D].
        chunk: its number.
        route: what its own flags say should become of it when it is evicted one day.
    """
    sinks, window = config.stream.sink_chunks, config.stream.window_chunks
    start = chunk * config.stream.latent_frames_per_chunk
    evicts = chunk >= sinks + window
    if window == 0:  # Nothing past is seen but sinks: a chunk leaves as soon as it is finished.
        slot = jnp.where(evicts, config.cache_slots, chunk)
        leaving, leaving_start, wanted = kv, start, route
    else:
        slot = jnp.where(chunk < sinks, chunk, sinks + (chunk - sinks) % window)
        leaving = KV(cache.k[:, slot], cache.v[:, slot])
        leaving_start, wanted = cache.start[slot], cache.route[slot]

    wanted = jnp.where(evicts, wanted, Route.NONE)
    if cache.newest_sink is not None:
        cache, taken = _route(cache, leaving, leaving_start, wanted, config)
    else:
        taken = jnp.where(evicts, Route.DISCARD, Route.NONE)
    cache = _store(cache, kv, slot, start, route)
    if cache.newest_sink is not None:
        is_sink = chunk == sinks - 1
        newest = (jnp.where(is_sink, x.astype(old.dtype), old) for x, old in zip(kv, cache.newest_sink, strict=True))
        cache = dataclasses.replace(cache, newest_sink=KV(*newest))
    leaving_start = jnp.where(evicts, leaving_start, EMPTY)
    return cache, Evicted(leaving_start.astype(jnp.int32), taken.astype(jnp.int32))


def _store(cache: Cache, kv: KV, slot, start, route) -> Cache:
    """Writes one slot; a slot past the end writes nothing (`dynamic_update_slice` would clamp it onto the last)."""
    return dataclasses.replace(
        cache,
        k=cache.k.at[:, slot].set(kv.k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[:, slot].set(kv.v.astype(cache.v.dtype), mode="drop"),
        start=cache.start.at[slot].set(start, mode="drop"),
        route=cache.route.at[slot].set(route, mode="drop"),
    )


def _route(cache: Cache, leaving: KV, leaving_start, wanted, config: RunConfig) -> tuple[Cache, Int[Array, ""]]:
    """Discards the leaving chunk, merges it into the newest sink or appends it as a new one."""
    assert cache.newest_sink is not None
    sinks, fixed = config.stream.sink_chunks, config.stream.sink_chunks + config.stream.window_chunks
    full = cache.appended >= config.appended_chunks
    appends = (wanted == Route.APPEND) & ~full
    merges = (wanted == Route.EMA) | ((wanted == Route.APPEND) & full)
    newest_slot = jnp.where(cache.appended == 0, sinks - 1, fixed + cache.appended - 1)

    # The merge is defined on keys before rotation and keeps the sink's position: turning the leaving keys by the
    # difference of positions gives the same sum, since a rotation is linear.
    shift = frame_shift_angles(cache.start[newest_slot] - leaving_start, cache.k.shape[-1])
    turned = KV(rotate(leaving.k.astype(jnp.float32), shift), leaving.v)

    def next_sink(sink, moved, left):
        merged = ema_update(sink, moved, config.search.ema_alpha)
        return jnp.where(appends, left.astype(sink.dtype), jnp.where(merges, merged.astype(sink.dtype), sink))

    newest = KV(*map(next_sink, cache.newest_sink, turned, leaving))
    target = jnp.where(appends, fixed + cache.appended, jnp.where(merges, newest_slot, config.cache_slots))
    target_start = jnp.where(appends, leaving_start, cache.start[newest_slot])
    cache = _store(cache, newest, target, target_start, Route.NONE)
    cache = dataclasses.replace(cache, newest_sink=newest, appended=cache.appended + appends.astype(jnp.int32))
    taken = jnp.where(appends, Route.APPEND, jnp.where(merges, Route.EMA, wanted))
    return cache, taken
