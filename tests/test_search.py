"""The search with a deterministic stand-in for the networks, against a plain reference after docs/METHOD.md."""

import dataclasses
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal
from fake_generator import CHUNK, STEPS, F, H, W, fake_generator, fake_params, fake_rewards
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_search import ReferenceSearch, Result

from streamt1_jax.config import RunConfig, SearchConfig, StreamConfig
from streamt1_jax.noise import recorded_noise
from streamt1_jax.result import beam_latents, to_chunk
from streamt1_jax.rewards.base import FAILED, Reward, Verdict
from streamt1_jax.sink import Route
from streamt1_jax.stream import Search, init_state, score_video, stream_chunks
from streamt1_jax.trace import Trace

ATOL = 3e-5  # float32 against float64
PROMPT = np.random.default_rng(9).standard_normal((3, 5)).astype(np.float32) / 4
PROMPT_INDEX = 3
ROOT = Path(__file__).parent.parent


def draws_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The noise of a seed: the initial one, and that of each step but the last."""
    noise = np.random.default_rng(seed).standard_normal((STEPS, *CHUNK)).astype(np.float32)
    return noise[0], noise[1:]


def all_seeds(seed: int, chunks: int, beams: int, candidates: int) -> list[int]:
    first = [seed + i for i in range(beams * candidates)]
    later = [seed + 1000 * c + 100 * b + i for c in range(chunks) for b in range(beams) for i in range(candidates)]
    return sorted({s % 2**32 for s in first + later})


def record_of(seeds: list[int]):
    noise, renoise = (np.stack(x) for x in zip(*(draws_of(seed) for seed in seeds), strict=True))
    return recorded_noise(jnp.array(seeds, jnp.uint32), jnp.asarray(noise), jnp.asarray(renoise))


def run_config(sinks: int = 1, window: int = 2, max_sinks: int = 2, **search) -> RunConfig:
    """Sizes in chunks."""
    stream = StreamConfig(
        latent_frames_per_chunk=F,
        sink_size=F * sinks,
        local_attn_size=F * (sinks + window + 1),
        denoising_steps=(1000, 500, 250),
    )
    return RunConfig(stream, SearchConfig(max_sink_size=F * max_sinks, **search))


def make_search(config: RunConfig, noise, rewards=None) -> Search:
    return Search(fake_generator(), *(rewards or fake_rewards()), noise, config)


@functools.cache
def conditioning():
    return jax.jit(fake_generator().prepare)(fake_params(), jnp.asarray(PROMPT), jnp.int32(PROMPT_INDEX))


def run(search: Search, seed: int, chunks: int, prompt_index: int = PROMPT_INDEX):
    """The Python driver: every record, and the last state."""
    start = init_state(search, seed, chunks)
    prompt = conditioning()._replace(prompt_index=jnp.int32(prompt_index))
    steps = list(itertools.islice(map(jax.device_get, stream_chunks(search, fake_params(), prompt, start)), chunks))
    return steps[-1][0], [record for _, record in steps]


def reference(config: RunConfig, seed: int, chunks: int) -> Result:
    asked = dataclasses.asdict(config.search)
    pools = {
        "sinks": config.stream.sink_chunks,
        "window": config.stream.window_chunks,
        "max_sinks": config.search.max_sink_size // F,
    }
    return ReferenceSearch(fake_params(), PROMPT, draws_of, PROMPT_INDEX, **pools, **asked).run(seed, chunks)


def compare(records, expected: Result, config: RunConfig) -> None:
    """Every candidate of every chunk, what was kept of it, and what left the window."""
    beams, per_beam = config.search.grid
    for number, (record, tried) in enumerate(zip(records, expected.candidates, strict=True)):
        where = f"chunk {number}"
        column = lambda name: [getattr(c, name) for c in tried]  # noqa: B023, E731
        assert_equal(f"{where} seeds", record.seed.ravel(), np.array(column("seed"), np.uint32))
        for name in ("short", "long", "score"):
            assert_close(f"{where} {name}", getattr(record, name).ravel(), column(name), ATOL)
        for name in ("ema", "append"):
            assert_equal(f"{where} {name}", getattr(record, name).ravel(), column(name))
        order = sorted((c.kept, i) for i, c in enumerate(tried) if c.kept is not None)
        assert_equal(f"{where} kept", record.kept, [i for _, i in order])
        assert_close(f"{where} latents", record.latents, [tried[i].latents for _, i in order], ATOL)
        for beam in range(beams):
            starts = [int(start) for start in record.sink_start[beam] if start >= 0]
            assert starts == tried[beam * per_beam].sink_starts, f"{where} beam {beam}: sink starts"
        gone = [
            None if start < 0 else (int(start) // F, Route(route).name.lower())
            for start, route in zip(record.evicted_start, record.evicted_route, strict=True)
        ]
        assert gone == expected.evicted[number], f"{where}: evicted and routed"
        assert record.usable.all(), f"{where}: every candidate is finite"


# Settings that make all three routes happen and let every part of the search disagree with its neighbour's.
BUSY = {"short_threshold": -1.0, "long_threshold": 0.02, "sliding_window_size": 3, "ema_alpha": 0.8}
GRID = {**BUSY, "beams": 2, "candidates_per_beam": 2}
# Name: settings, chunks, seed. The seeds are chosen so that all routes there can be are taken and no decision is close.
CASES = {
    "one_beam_one_candidate": ({**BUSY, "beams": 1, "candidates_per_beam": 1}, 5, 7),
    "released_thresholds": ({"beams": 2, "candidates_per_beam": 2, "sliding_window_size": 10, "max_sinks": 3}, 8, 62),
    "more_beams_than_candidates": ({**BUSY, "beams": 3, "candidates_per_beam": 2, "max_sinks": 3}, 9, 88),
    "more_candidates_than_beams": ({**BUSY, "beams": 1, "candidates_per_beam": 3, "noise_fusion_sigma": 0.9}, 8, 10),
    "window_decode": ({**GRID, "decode": "window"}, 8, 34),
    "window_decode_of_one": ({**GRID, "candidates_per_beam": 1, "decode": "window", "sliding_window_size": 1}, 6, 10),
    "score_window_of_one": ({**GRID, "sliding_window_size": 1}, 7, 40),
    "short_mean_of_two": ({**GRID, "short_mean_window": 2}, 9, 18),
    "no_sinking": ({**GRID, "sinking": False}, 7, 15),
    "no_propagation": ({**GRID, "noise_propagation": False}, 7, 65),
    "no_pruning": ({**GRID, "pruning": False}, 7, 25),
    "two_first_sinks": ({**GRID, "candidates_per_beam": 3, "sinks": 2, "window": 1, "max_sinks": 4}, 9, 215),
    "no_window": ({**GRID, "window": 0}, 7, 53),
    "no_room_for_sinks": ({**GRID, "window": 1, "max_sinks": 1}, 7, 49),
    "wide_window": ({**GRID, "window": 4, "noise_fusion_sigma": -1.0, "short_score_fusion_cap": 1.0}, 8, 77),
    "seeds_wrap": (GRID, 5, 2**32 - 1500),
}


@functools.cache
def case(name: str):
    """(config, seed, search) of a row of the table; made once, so that its programs are."""
    asked, chunks, seed = CASES[name]
    config = run_config(**asked)
    beams, candidates = config.search.grid
    return config, chunks, seed, make_search(config, record_of(all_seeds(seed, chunks, beams, candidates)))


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name):
    """At full length, and as a video of one chunk or two: the fusion weight depends on the length."""
    config, chunks, seed, search = case(name)
    for length in (chunks, 1 + seed % 2):
        expected = reference(config, seed, length)
        assert expected.closest > 1e-3, f"a decision of this case hangs on {expected.closest:.1e}: choose another seed"
        _, records = run(search, seed, length)
        compare(records, expected, config)


def test_the_table_takes_every_route():
    """What the table is for: each route with free sinks and with full ones, parents of every rank, every flag."""
    seen = set()
    for name in CASES:
        config, chunks, seed, _ = case(name)
        expected = reference(config, seed, chunks)
        seen |= {entry[1] for chunk in expected.evicted for entry in chunk if entry}
        seen |= {f"parent {c.parent}" for tried in expected.candidates for c in tried if c.kept is not None}
        seen |= {f"sinks {len(c.sink_starts)}" for tried in expected.candidates for c in tried}
    assert seen >= {"discard", "ema", "append", "parent 0", "parent 1", "parent 2", "sinks 0", "sinks 1", "sinks 2"}


RANDOM = run_config(**GRID)


@functools.cache
def random_search() -> Search:
    seeds = {s for seed in range(100) for s in all_seeds(seed, 8, 2, 2)}
    return make_search(RANDOM, record_of(sorted(seeds)))


@settings(max_examples=25)
@given(seed=st.integers(0, 99), chunks=st.integers(1, 8))
def test_matches_the_reference_for_any_seed(seed, chunks):
    expected = reference(RANDOM, seed, chunks)
    assume(expected.closest > 1e-3)
    compare(run(random_search(), seed, chunks)[1], expected, RANDOM)


def test_the_trace_walks_back_through_the_beams():
    """The host's view: histories, latents, routes and sink frames of the kept beams."""
    config, chunks, seed, search = case("short_mean_of_two")
    expected = reference(config, seed, chunks)
    _, records = run(search, seed, chunks)
    trace = Trace(tuple(to_chunk(record, i, config, 0.0) for i, record in enumerate(records)))
    for rank, beam in enumerate(expected.beams[-1]):
        history = trace.history(rank)
        assert [c.seed for c in history] == beam.seeds
        assert_close(f"beam {rank} latents", beam_latents(trace, records, rank), np.concatenate(beam.latents), ATOL)
        assert [c.kept for c in history][-1] == rank
        gone = {}
        for number, candidate in enumerate(history):
            entry = expected.evicted[number][candidate.kept]
            gone |= {entry[0]: entry[1]} if entry else {}
        assert trace.routes(rank) == gone
    for ours, theirs in zip(trace.chunks, expected.candidates, strict=True):
        assert [c.kept for c in ours.candidates] == [c.kept for c in theirs]
        assert [list(c.sink_starts) for c in ours.candidates] == [c.sink_starts for c in theirs]
        assert [c.sink_frames for c in ours.candidates] == [F + F * len(c.sink_starts) for c in theirs]
        parents = [None if ours.index == 0 else c.parent for c in theirs]
        assert [c.parent_beam for c in ours.candidates] == parents


# What is not finite, and what is equal


NOT_FINITE = (np.nan, np.inf, -np.inf)


def spoilt(reward: Reward) -> Reward:
    """Candidate 1 gets what is not finite; which of the three, the prompt's index says, so that one program will do."""

    def call(videos, num_frames, prompt_index):
        verdict = reward.call(videos, num_frames, prompt_index)
        return verdict._replace(scores=verdict.scores.at[1].set(jnp.array(NOT_FINITE)[prompt_index]))

    return dataclasses.replace(reward, call=call)


@pytest.mark.parametrize("role", [0, 1], ids=["short", "long"])
def test_a_reward_that_is_not_finite_is_never_kept(role):
    """FAULTS row 12. In chunk 0 the short score weighs nothing, but says no all the same."""
    rewards = list(fake_rewards())
    rewards[role] = spoilt(rewards[role])
    search = make_search(RANDOM, record_of(all_seeds(3, 3, 2, 2)), rewards)
    for index, value in enumerate(NOT_FINITE):
        _, records = run(search, 3, 3, prompt_index=index)
        for number, record in enumerate(records):
            assert_equal(f"{value} in chunk {number}: usable", record.usable, [[True, False], [True, True]])
            assert_equal(f"{value} in chunk {number}", (record.short, record.long)[role].ravel()[1], value)
            assert 1 not in record.kept
            assert np.isfinite(record.latents).all()


@pytest.mark.parametrize("decode", ["streaming", "window"])
def test_latents_that_are_not_finite_leave_no_trace(decode):
    """FAULTS row 13: of chunk 0 one candidate alone is finite, so a beam of NaN must be kept; it is gone in chunk 1."""
    seeds = [s for s in all_seeds(3, 4, 2, 2) if s not in (3, 5, 6)]
    config = run_config(**GRID, decode=decode, short_mean_window=2)
    state, records = run(make_search(config, record_of(seeds)), 3, 4)
    assert_equal("usable in chunk 0", records[0].usable, [[False, True], [False, False]])
    assert_equal("kept of chunk 0", records[0].kept, [1, 0])  # among the unusable, the earlier one
    assert_equal("usable in chunk 1", records[1].usable, [[True, True], [False, False]])
    assert sorted(records[1].kept) == [0, 1]
    for record in records[2:]:
        assert record.usable.all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert np.isfinite(np.asarray(leaf)).all(), f"{jax.tree_util.keystr(path)} is not finite"


def test_no_finite_candidate_at_all_is_recorded():
    """Nothing can be raised inside the step: the driver looks at `usable`."""
    _, records = run(make_search(RANDOM, record_of([10**6])), 3, 2)
    assert not any(record.usable.any() for record in records)
    assert_equal("kept", records[0].kept, [0, 1])


def test_ties_keep_the_earlier_candidate():
    """FAULTS row 14."""
    same = [
        dataclasses.replace(r, call=lambda v, n, i: Verdict(jnp.ones(len(v)), jnp.zeros(len(v), int)))
        for r in fake_rewards()
    ]
    _, records = run(make_search(RANDOM, record_of(all_seeds(3, 3, 2, 2)), same), 3, 3)
    for number, record in enumerate(records):
        assert_equal(f"chunk {number}", record.kept, [0, 1])


def test_a_failed_reward_is_recorded():
    short, long = fake_rewards()

    def call(videos, num_frames, prompt_index):
        scores, _ = short.call(videos, num_frames, prompt_index)
        return Verdict(scores.at[2].set(jnp.nan), jnp.zeros(scores.shape, int).at[2].set(FAILED))

    rewards = (dataclasses.replace(short, call=call), long)
    _, records = run(make_search(RANDOM, record_of(all_seeds(3, 2, 2, 2)), rewards), 3, 2)
    for record in records:
        assert_equal("failed", record.reward_failed, [[False, False], [True, False]])
        assert_equal("usable", record.usable, [[True, True], [False, True]])


# What the rewards see


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_rewards_see_the_pixels_they_ask_for(pixels):
    """The frames of the last three chunks, oldest first; behind them anything."""
    seen = []

    def reward(role):
        def call(videos, num_frames, prompt_index):
            assert videos.dtype == jnp.dtype(pixels)
            jax.debug.callback(lambda v, n: seen.append((role, np.asarray(v), int(n[0]))), videos, num_frames)
            scores = videos[:, 0].astype(jnp.float32).mean(axis=(1, 2, 3))
            return Verdict(scores, jnp.zeros(scores.shape, int))

        return Reward(role, call, pixels, "jax")

    config = run_config(**{**GRID, "candidates_per_beam": 1, "beams": 1})
    _, records = run(make_search(config, record_of(all_seeds(3, 6, 1, 1)), (reward("short"), reward("long"))), 3, 6)
    jax.effects_barrier()
    frames = [record.frames[0] for record in records]  # of the one beam, as the viewer gets them
    by_role = {role: [(v, n) for r, v, n in seen if r == role] for role in ("short", "long")}
    for number in range(6):
        expected = {"short": frames[number], "long": np.concatenate(frames[max(0, number - 2) : number + 1])}
        for role, video in expected.items():
            got, valid = by_role[role][number]
            assert valid == len(video), f"{role} of chunk {number}"
            got = got[0, :valid] if pixels == "uint8" else np.round(got[0, :valid] * 255)
            assert_equal(f"{role} of chunk {number}", got.astype(np.uint8), video)


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_a_finished_video_is_scored_whatever_its_length(pixels, compile_count):
    """Padding does not count, and lengths up to the next power of two share a program."""

    def call(videos, num_frames, prompt_index):
        assert videos.dtype == jnp.dtype(pixels)
        assert videos.shape[1] == 8
        scores = jnp.where(jnp.arange(8) < num_frames[:, None], videos.astype(jnp.float32).sum(axis=(2, 3, 4)), 0.0)
        return Verdict(scores.sum(axis=1) + prompt_index.astype(jnp.float32), jnp.zeros(len(videos), int))

    reward = Reward("sum", call, pixels, "jax")
    video = np.random.default_rng(0).integers(0, 256, (8, H, W, 3), dtype=np.uint8)
    score_video(reward, video, jnp.int32(0))
    before = compile_count.value
    for length in (5, 7, 8):
        scale = 1 if pixels == "uint8" else 255
        expected = video[:length].sum() / scale + 2
        assert score_video(reward, video[:length], jnp.int32(2)) == pytest.approx(expected, rel=1e-6)
    assert compile_count.value == before


def test_thumbnails_are_small_and_of_the_middle_frame():
    _, (first, later) = run(random_search(), 3, 2)
    assert first.thumbnail.shape == later.thumbnail.shape == (2, 2, 2, 2, 3)
    beam, number = divmod(int(later.kept[0]), 2)
    assert_equal("thumbnail", later.thumbnail[beam, number], later.frames[0, 2])


def test_core_does_not_import_torch():
    modules = ("stream", "generator", "pipeline", "parity", "cli", "rewards", "checkpoint", "report", "video")
    code = f"import sys, importlib; [importlib.import_module('streamt1_jax.' + m) for m in {modules}]; "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
