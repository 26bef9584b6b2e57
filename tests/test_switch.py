"""Prompt switches: the recache against a plain reference, the drivers, and that nothing of the old prompt is left."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal
from fake_generator import F, fake_params
from reference_search import ReferenceSearch
from streams import ATOL, CHUNKS, OTHERS, Setting, on_device, run, setting_of
from test_search import (
    GRID,
    PROMPT,
    PROMPT_INDEX,
    all_seeds,
    compare,
    conditioning,
    draws_of,
    make_search,
    record_of,
    run_config,
)

from streamt1_jax.cache import Cache
from streamt1_jax.models.attention import frame_shift_angles, rotate
from streamt1_jax.stream import init_state, jitted_step, rollout, stream_chunks
from streamt1_jax.switch import jitted_recache, recache

NEW_INDEX = 5
OTHER = np.random.default_rng(10).standard_normal(PROMPT.shape).astype(np.float32) / 4
# Name: settings, chunks, seed, the chunks of the switches. No decision is close.
CASES = {
    "kept": ({**GRID, "global_sink": True, "max_sinks": 3}, 9, 4, (6,)),
    "replaced": ({**GRID, "global_sink": False, "max_sinks": 3}, 9, 4, (6,)),
    "kept_but_reaching_back_to_the_start": ({**GRID, "global_sink": True}, 7, 4, (2, 4)),
    "replaced_twice": ({**GRID, "global_sink": False}, 9, 5, (4, 7)),
    "kept_with_two_first_sinks": ({**GRID, "global_sink": True, "sinks": 2, "window": 1, "max_sinks": 4}, 9, 5, (6,)),
    "replaced_with_two_first_sinks": (
        {**GRID, "global_sink": False, "sinks": 2, "window": 1, "max_sinks": 4},
        8,
        3,
        (1, 5),
    ),
    "kept_without_window": ({**GRID, "global_sink": True, "window": 0}, 6, 2, (4,)),
    "replaced_without_window": ({**GRID, "global_sink": False, "window": 0}, 6, 2, (4,)),
    "longlive": (
        {"beams": 1, "candidates_per_beam": 1, "noise_propagation": False, "sinking": False, "global_sink": False},
        9,
        1,
        (4, 6),
    ),
}


def config_of(asked: dict):
    config = run_config(**{key: value for key, value in asked.items() if key != "global_sink"})
    stream = dataclasses.replace(config.stream, global_sink=asked["global_sink"])
    return dataclasses.replace(config, stream=stream)


def reference(config, seed, chunks, switches):
    pools = {
        "sinks": config.stream.sink_chunks,
        "window": config.stream.window_chunks,
        "max_sinks": config.search.max_sink_size // F,
        "global_sink": config.stream.global_sink,
    }
    made = ReferenceSearch(fake_params(), PROMPT, draws_of, PROMPT_INDEX, **pools, **dataclasses.asdict(config.search))
    prompts = [(OTHER, NEW_INDEX), (PROMPT, PROMPT_INDEX)]
    return made.run(seed, chunks, dict(zip(switches, prompts, strict=False)))


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name):
    asked, chunks, seed, switches = CASES[name]
    config = config_of(asked)
    expected = reference(config, seed, chunks, switches)
    assert expected.closest > 1e-3, f"a decision of this case hangs on {expected.closest:.1e}: choose another seed"
    search = make_search(config, record_of(all_seeds(seed, chunks, *config.search.grid)))
    other = jax.jit(search.generator.prepare)(fake_params(), jnp.asarray(OTHER), jnp.int32(NEW_INDEX))
    conditionings = dict(zip(switches, [other, conditioning()], strict=False))
    running = stream_chunks(search, fake_params(), conditioning(), init_state(search, seed, chunks))
    records = [jax.device_get(running.send(conditionings.get(chunk)))[1] for chunk in range(chunks)]
    compare(records, expected, config)


def test_the_table_switches_with_appended_sinks():
    """Kept ones are still seen after the switch, replaced ones are not."""
    seen = {}
    for name in ("kept", "replaced"):
        asked, chunks, seed, (switch,) = CASES[name]
        found = reference(config_of(asked), seed, chunks, (switch,))
        seen[name] = [len(found.candidates[chunk][0].sink_starts) for chunk in (switch - 1, switch)]
    assert seen["kept"][0] > 0
    assert seen["kept"][1] >= seen["kept"][0]
    assert seen["replaced"][0] > 0
    assert seen["replaced"][1] == 0


@pytest.fixture(scope="module", params=["fake", "wan"])
def kind(request) -> str:
    return request.param


@functools.cache
def other_prompt(kind: str):
    setup = setting_of(kind)
    return jax.jit(setup.search().generator.prepare)(setup.params, jnp.asarray(OTHERS[kind]), jnp.int32(3))


@functools.cache
def after_five(kind: str, global_sink: bool):
    setup = setting_of(kind)
    return run(setup, setup.search(global_sink=global_sink), 21, 5)[-1][0]


def recached(kind: str, state, global_sink: bool):
    setup = setting_of(kind)
    search = setup.search(global_sink=global_sink)
    return jax.device_get(jitted_recache(search, setup.params, other_prompt(kind), on_device(state), committed=5))


@pytest.mark.parametrize("global_sink", [True, False], ids=["kept", "replaced"])
def test_scan_and_python_drivers_agree(kind, global_sink):
    setup: Setting = setting_of(kind)
    search, other = setup.search(global_sink=global_sink), other_prompt(kind)
    switch = 5
    running = stream_chunks(search, setup.params, setup.conditioning, init_state(search, 21, CHUNKS))
    steps = [jax.device_get(running.send(other if chunk == switch else None)) for chunk in range(CHUNKS)]
    whole = jax.jit(
        lambda params, first, other, state: rollout(
            search, params, first, state, CHUNKS, switches=(switch,), conditionings=(other,)
        )
    )
    state = init_state(search, 21, CHUNKS)
    last, head, tail = jax.device_get(whole(setup.params, setup.conditioning, other, state))
    scanned = [head, *(jax.tree.map(lambda x, i=i: x[i], tail) for i in range(CHUNKS - 1))]
    for number, ((_, record), twin) in enumerate(zip(steps, scanned, strict=True)):
        for name in ("seed", "kept", "ema", "append", "sink_start", "evicted_start", "evicted_route"):
            assert_equal(f"chunk {number} {name}", getattr(record, name), getattr(twin, name))
        for name in ("latents", "short", "long"):
            assert_close(f"chunk {number} {name}", getattr(record, name), getattr(twin, name), ATOL)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(steps[-1][0]), jax.tree.leaves(last), strict=True
    ):
        assert_close(f"last state {jax.tree_util.keystr(path)}", ours, theirs, ATOL)
    plain = run(setup, search, 21, CHUNKS)
    assert_equal("latents before the switch", steps[switch - 1][1].latents, plain[switch - 1][1].latents)
    assert np.abs(steps[switch][1].latents - plain[switch][1].latents).max() > 1e-3, "the switch changed nothing"


def valid(cache: Cache, chunk: int, search) -> np.ndarray:
    """Which slots are attended to, [B, slots]."""
    fixed = search.config.stream.sink_chunks + search.config.stream.window_chunks
    return np.arange(cache.start.shape[1]) < fixed + cache.appended[:, None]


@pytest.mark.parametrize("global_sink", [True, False], ids=["kept", "replaced"])
def test_nothing_of_the_old_prompt_is_left_but_kept_sinks(kind, global_sink):
    """All keys and values of the state become NaN before the recache: only sinks that are kept stay so."""
    search = setting_of(kind).search(global_sink=global_sink)
    state = after_five(kind, global_sink)
    cache = state.beams.cache
    spoil = lambda x: np.full_like(x, np.nan)  # noqa: E731
    nan = dataclasses.replace(
        cache, k=spoil(cache.k), v=spoil(cache.v), newest_sink=jax.tree.map(spoil, cache.newest_sink)
    )
    if global_sink:  # sinks are attended to in the recache: those stay, the window is spoilt
        first, fixed = search.config.stream.sink_chunks, 3
        window = slice(first, fixed)
        k, v = (np.array(x) for x in (cache.k, cache.v))
        k[:, :, window], v[:, :, window] = np.nan, np.nan
        nan = dataclasses.replace(cache, k=k, v=v)
    spoilt = dataclasses.replace(state, beams=dataclasses.replace(state.beams, cache=nan))
    before, after = (recached(kind, s, global_sink).beams.cache for s in (state, spoilt))
    for beam, slots in enumerate(valid(after, 5, search)):
        for name in ("k", "v"):
            assert_equal(
                f"beam {beam} {name}", getattr(after, name)[beam][:, slots], getattr(before, name)[beam][:, slots]
            )
    for ours, theirs in zip(after.newest_sink, before.newest_sink, strict=True):
        assert_equal("newest sink", ours, theirs)
    assert np.isfinite(np.asarray(after.k)[0][:, valid(after, 5, search)[0]]).all()


def test_the_new_prompt_reaches_the_recache(kind):
    """What is recached differs by the prompt, and only the cache changes."""
    setup, state = setting_of(kind), after_five(kind, False)
    search = setup.search(global_sink=False)
    new = recached(kind, state, False)
    old = jax.device_get(jitted_recache(search, setup.params, setup.conditioning, on_device(state), committed=5))
    fixed = slice(0, 3)
    assert np.abs(new.beams.cache.k[:, :, fixed] - old.beams.cache.k[:, :, fixed]).max() > 1e-3
    for made in (new, old):
        same = dataclasses.replace(made, beams=dataclasses.replace(made.beams, cache=state.beams.cache))
        for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(same), jax.tree.leaves(state), strict=True):
            assert_equal(jax.tree_util.keystr(path), ours, theirs)


@pytest.mark.parametrize("global_sink", [True, False], ids=["kept", "replaced"])
def test_where_the_sinks_are_afterwards(kind, global_sink):
    """After 5 chunks: 1, 2, 3, 4 are recached where sinks are replaced; the window always holds 3 and 4."""
    f = 2 if kind == "fake" else 3
    before = after_five(kind, global_sink).beams.cache
    after = recached(kind, after_five(kind, global_sink), global_sink).beams.cache
    expected = before.start if global_sink else [[1 * f, 3 * f, 4 * f, -1]] * 2
    assert_equal("starts", np.sort(after.start[:, 1:3]), [[3 * f, 4 * f]] * 2)
    assert_equal("sinks", after.start[:, [0, 3]], np.asarray(expected)[:, [0, 3]])
    assert_equal("appended", after.appended, before.appended if global_sink else [0, 0])
    assert_equal("routes of the window", after.route[:, 1:3], before.route[:, 1:3])


def test_beams_are_recached_each_by_itself(kind):
    state = after_five(kind, False)
    latents = np.array(state.beams.latents)
    latents[1] = np.nan
    spoilt = dataclasses.replace(state, beams=dataclasses.replace(state.beams, latents=latents))
    one, two = (recached(kind, s, False).beams.cache for s in (state, spoilt))
    assert_equal("keys of beam 0", one.k[0], two.k[0])
    assert not np.array_equal(one.k[1], two.k[1])


def test_every_number_of_chunks_can_be_behind_a_switch(kind):
    """By shapes: what goes in comes out, so that a next step takes it."""
    setup = setting_of(kind)
    for global_sink, committed in itertools.product([True, False], range(1, 7)):
        search = setup.search(global_sink=global_sink)
        state = jax.eval_shape(lambda search=search: init_state(search, 0, 9))
        after = jax.eval_shape(
            functools.partial(recache, search, committed=committed), setup.params, setup.conditioning, state
        )
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
        assert shapes[0] == shapes[1], f"after {committed} chunks"


def test_the_recache_is_the_step_of_a_chunk_alone(kind):
    """After one chunk there is nothing but it: its recache under the same prompt is its own context pass."""
    setup = setting_of(kind)
    search = setup.search()
    (state, _), *_ = run(setup, search, 21, 1)
    same = jax.device_get(jitted_recache(search, setup.params, setup.conditioning, on_device(state), committed=1))
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(same), jax.tree.leaves(state), strict=True):
        assert_close(jax.tree_util.keystr(path), ours, theirs, ATOL)


def test_positions_beyond_1023_are_like_all_others():
    """A state moved by 1020 frames, its keys turned along, makes the same chunks across frame 1023 as at frame 15."""
    setup, chunks = setting_of("wan"), 340
    search = setup.search()
    state = after_five("wan", True)
    shift = frame_shift_angles(jnp.int32(3 * chunks), state.beams.cache.k.shape[-1])
    cache = state.beams.cache
    turn = jax.vmap(jax.vmap(lambda k: rotate(k, shift)))

    def moved(start):
        return np.where(start < 0, start, start + 3 * chunks)

    far = dataclasses.replace(
        cache,
        k=np.asarray(turn(jnp.asarray(cache.k))),
        start=moved(cache.start).astype(np.int32),
        newest_sink=cache.newest_sink._replace(k=np.asarray(turn(jnp.asarray(cache.newest_sink.k)[:, None])[:, 0])),
    )
    beams = dataclasses.replace(state.beams, cache=far)
    states = [state, dataclasses.replace(state, beams=beams, chunk=np.int32(5 + chunks))]
    # The mean of the short score counts chunks, and the seeds do: one candidate's seed is its beam's own.
    near, distant = (
        jax.device_get(jitted_step(search, setup.params, setup.conditioning, on_device(s), first=False)[1])
        for s in states
    )
    for beam in range(2):
        assert_equal("seeds", near.seed[beam, 0], distant.seed[beam, 0])
        assert_close("short scores", near.short[beam, 0], distant.short[beam, 0], 1e-3)
        assert_close("long scores", near.long[beam, 0], distant.long[beam, 0], 1e-3)
