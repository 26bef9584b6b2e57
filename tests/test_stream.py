"""One step and its drivers, with the networks themselves at a tiny size and with their stand-in.

The two drivers agree; candidates in a batch equal candidates alone; beams do not leak; nothing compiles twice.
"""

import dataclasses
import functools
import itertools
from typing import Any

import fake_generator as fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal
from streams import ATOL, CHUNKS, Setting, on_device, run, setting_of

from streamt1_jax.config import ModelConfig, RunConfig
from streamt1_jax.generator import wan_generator
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.stream import Search, init_state, jitted_step, propose, rollout, step


@pytest.fixture(scope="session", params=["fake", "wan"])
def setup(request) -> Setting:
    return setting_of(request.param)


@pytest.fixture(scope="session")
def after_five(setup) -> Any:
    """A state with a past: 2 beams, 5 chunks done, a chunk evicted from the window."""
    return run(setup, setup.search(), 21, 5)[-1][0]


def test_scan_and_python_drivers_agree(setup):
    search = setup.search()
    compiled = jax.jit(lambda params, conditioning, state: rollout(search, params, conditioning, state, CHUNKS))
    last, head, tail = jax.device_get(compiled(setup.params, setup.conditioning, init_state(search, 21, CHUNKS)))
    steps = run(setup, search, 21, CHUNKS)
    scanned = [head, *(jax.tree.map(lambda x, i=i: x[i], tail) for i in range(CHUNKS - 1))]
    for number, ((_, record), other) in enumerate(zip(steps, scanned, strict=True)):
        for name, ours, theirs in zip(record._fields, record, other, strict=True):
            if name in ("frames", "thumbnail"):  # uint8: a rounding error may turn one level into the next
                assert_close(f"chunk {number} {name}", ours, theirs, 1)
            elif np.issubdtype(ours.dtype, np.floating):
                assert_close(f"chunk {number} {name}", ours, theirs, ATOL)
            else:
                assert_equal(f"chunk {number} {name}", ours, theirs)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(steps[-1][0]), jax.tree.leaves(last), strict=True
    ):
        assert_close(f"last state {jax.tree_util.keystr(path)}", ours, theirs, ATOL)
    assert len({tuple(record.kept) for _, record in steps}) > 1, "every chunk kept the same: nothing is tested"


def test_candidates_in_a_batch_equal_candidates_alone(setup, after_five):
    """Each of 2 x 2 candidates against a run of one beam and one candidate from the same beam with the same seed."""
    batch, alone = setup.search(), setup.search(beams=1, candidates_per_beam=1)
    candidates = jax.device_get(
        jax.jit(functools.partial(propose, batch, first=False))(setup.params, setup.conditioning, on_device(after_five))
    )
    next_state, record = jax.device_get(
        jitted_step(batch, setup.params, setup.conditioning, on_device(after_five), first=False)
    )
    ranks = {int(flat): rank for rank, flat in enumerate(record.kept)}
    assert len(ranks) == 2
    for beam, number in itertools.product(range(2), range(2)):
        name = f"beam {beam} candidate {number}"
        one = jax.tree.map(lambda x: x[beam : beam + 1], after_five.beams)  # noqa: B023
        # A beam's first candidate tries the seed of its last chunk.
        one = dataclasses.replace(one, seed=record.seed[beam, number : number + 1])
        state = on_device(dataclasses.replace(after_five, beams=one))
        single_state, single = jax.device_get(jitted_step(alone, setup.params, setup.conditioning, state, first=False))
        assert_equal(f"{name} seed", single.seed[0, 0], record.seed[beam, number])
        assert_close(f"{name} latents", single.latents[0], candidates.latents[beam, number], ATOL)
        assert_close(f"{name} noise", single_state.beams.noise[0], candidates.noise[beam, number], ATOL)
        for field in ("short", "long", "score"):
            assert_close(f"{name} {field}", getattr(single, field)[0, 0], getattr(record, field)[beam, number], ATOL)
        for field in ("ema", "append"):
            assert_equal(f"{name} {field}", getattr(single, field)[0, 0], getattr(record, field)[beam, number])
        if (rank := ranks.get(2 * beam + number)) is not None:
            for (path, ours), theirs in zip(
                jax.tree_util.tree_leaves_with_path(next_state.beams), jax.tree.leaves(single_state.beams), strict=True
            ):
                assert_close(f"{name} next {jax.tree_util.keystr(path)}", ours[rank], theirs[0], ATOL)


@pytest.mark.parametrize("garbage", [np.nan, 3.0], ids=["nan", "other"])
def test_beams_do_not_leak_into_each_other(setup, after_five, garbage):
    """Everything of beam 1 is replaced; what is seen of beam 0's candidates stays the same to the last bit."""
    search = setup.search()
    step_of = functools.partial(jitted_step, search, setup.params, setup.conditioning, first=False)
    _, before = jax.device_get(step_of(on_device(after_five)))

    def spoil(x):
        return x.at[1].set(garbage) if jnp.issubdtype(x.dtype, jnp.floating) else x

    state = on_device(after_five)
    spoilt = dataclasses.replace(state, beams=jax.tree.map(spoil, state.beams))
    _, after = jax.device_get(step_of(spoilt))
    for name in ("seed", "short", "long", "score", "ema", "append", "usable", "thumbnail"):
        assert_equal(name, getattr(after, name)[0], getattr(before, name)[0])
    assert not np.array_equal(after.score[1], before.score[1]), "beam 1 was not touched"
    if np.isnan(garbage):
        assert_equal("usable", after.usable, [[True, True], [False, False]])
        assert sorted(after.kept) == [0, 1]
        ranks = [list(before.kept).index(flat) for flat in after.kept if flat in before.kept]
        kept_before = before.latents[ranks]
        assert_equal("latents of what both kept", after.latents[: len(ranks)], kept_before[: len(ranks)])


def test_the_number_of_programs_does_not_depend_on_the_length(setup, compile_count):
    """Two programs for the Python driver, however many chunks there are and wherever they were routed."""
    search = setup.search()
    run(setup, search, 21, 3)
    compiled, cached = compile_count.value, jitted_step._cache_size()
    steps = run(setup, search, 33, 9, total=9)
    routes = {int(route) for _, record in steps for route in record.evicted_route}
    assert len(routes) >= 3, f"only the routes {routes} were taken"
    assert (compile_count.value, jitted_step._cache_size()) == (compiled, cached), "something was compiled anew"


@pytest.mark.parametrize("setup", ["fake"], indirect=True)
def test_a_rollout_is_one_program(setup, compile_count):
    """Of any length: compiled once, used twice."""
    search = setup.search()
    for chunks in (1, 2, 7):
        compiled = jax.jit(lambda *a, chunks=chunks: rollout(search, *a, chunks))
        states = [init_state(search, seed, 7) for seed in (1, 2)]
        before = compile_count.value
        for state in states:
            jax.block_until_ready(compiled(setup.params, setup.conditioning, state))
        assert compile_count.value - before == 1, f"{chunks} chunks"


def test_full_size_by_shape():
    """A step of Wan2.1 1.3B at 832x480 in bfloat16, 2 beams of 2 candidates, without its memory."""
    config = RunConfig()
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes bfloat16
        model = ModelConfig.wan_1_3b()
        generator = wan_generator(model, config.stream, 480, 832, jnp.bfloat16)
        search = Search(generator, *fake.fake_rewards(), gaussian_noise(generator.chunk_shape, 4), config)
        params = {name: network_graph(model, name, jnp.bfloat16)[1] for name in ("dit", "decoder")}
        prompt = jax.ShapeDtypeStruct((512, 4096), jnp.float32)
        conditioning = jax.eval_shape(generator.prepare, params, prompt, jax.ShapeDtypeStruct((), jnp.int32))
        state = jax.eval_shape(lambda: init_state(search, 42, 40))
        following, record = jax.eval_shape(functools.partial(step, search, first=False), params, conditioning, state)
    assert conditioning.text.k.shape == (30, 512, 12, 128)
    assert generator.kv.shape == (30, 3 * 1560, 12, 128)
    assert state.beams.cache.k.shape == (2, 30, 1 + 2 + 4, 4680, 12, 128)
    assert record.frames.shape == (2, 12, 480, 832, 3)
    assert record.latents.shape == (2, 3, 16, 60, 104)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), following) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
