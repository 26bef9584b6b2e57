"""`streamt1 bench`: what its report holds, that its stages are the step itself, that nothing compiles meanwhile.

Another model stands in for `tiny`, since the benchmark compiles everything three times.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal
from small import SMALL, SmallWeights

from streamt1_jax import cli, flops
from streamt1_jax.bench import Bench, grid_of, lane_config
from streamt1_jax.bench_report import bench_table, compare_table
from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.measure import Spread, compilations
from streamt1_jax.memory import size_of
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.sink import Route
from streamt1_jax.stages import NAMES, staged_step
from streamt1_jax.stream import init_state, jitted_step

TESTS = Path(__file__).parent
COMMAND = """
import sys
from small import SMALL
from streamt1_jax import cli
from streamt1_jax.config import ModelConfig
ModelConfig.tiny = classmethod(lambda cls: SMALL)
sys.exit(cli.main(sys.argv[1:]))
"""
# A video's history of sinks then depends on its scores.
BUSY: dict[str, Any] = {"short_threshold": 0.0, "long_threshold": 0.0, "max_sink_size": 9}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SMALL, height=SMALL.height, width=SMALL.width, dtype=jnp.float32, rewards=None)


def report_of_seconds(seconds: float) -> dict:
    stages = {stage: {"median": seconds} for stage in NAMES}
    run = {"candidates": 4, "stage_seconds": stages, "chunk_seconds": {"median": seconds}}
    asked = {"preset": "tiny", "size": {"height": SMALL.height, "width": SMALL.width}, "chunks": 11}
    return {"machine": {"device": "an old one", "jax": "0.1"}, "dtype": "float32", "runs": [run], **asked}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One whole run of the command, in a process of its own: it empties JAX's caches. (folder, printed, report)"""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "earlier.json").write_text(json.dumps(report_of_seconds(1e-9)))
    options = "--preset tiny --candidates 4,1 --chunks 11 --repeats 1 --json now.json --against earlier.json"
    options += " --set search.short_threshold=0 --rewards native"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "bench", *options.split(), "--profile", "trace"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "now.json").read_text())


@pytest.mark.slow
def test_the_report_holds_every_stage_and_nothing_was_compiled(made):
    _, _, report = made
    assert [(run["candidates"], run["grid"]) for run in report["runs"]] == [(1, [1, 1]), (4, [2, 2])]
    for run in report["runs"]:
        assert run["compiled_while_timing"] == 0
        assert tuple(run["stage_seconds"]) == NAMES
        for spread in (*run["stage_seconds"].values(), run["chunk_seconds"], run["first_chunk_seconds"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert len(run["chunk_seconds_by_index"]) == 11
        assert run["stages_over_chunk"] > 0
        positive = ("compile_seconds", "frames_per_second", "flop_per_second", "peak_bytes", "step_bytes")
        assert all(value > 0 for name in positive for value in run[name].values()), run
        assert set(run["step_bytes"]) == {"arguments", "results", "temporaries"}
        assert 0 <= run["appended_sinks"]["mean"] <= run["appended_sinks"]["room"] == 4
        assert run["late_over_early"]["late"] == [8, 10]
        assert run["late_over_early"]["early"] == [4, 6]
        assert (run["devices"], run["decoded"], run["warm_runs"]) == (1, "in turn", 1)
        first = report["prompt"]["first_frames_seconds"][str(run["candidates"])]
        assert 0 < first["low"] <= first["median"] <= first["high"]
    for part in ("text", "prepare"):
        assert report["prompt"][part]["seconds"]["median"] > 0
    assert report["prompt"]["text"]["flop"] == flops.umt5_encode(SMALL.text, SMALL.dit.text_len)
    assert report["prompt"]["prepare"]["flop"] == flops.dit_text(SMALL.dit)
    assert report["run"]["search"]["short_threshold"] == 0
    assert report["rewards"] == ["native_short", "native_long"]
    assert report["matmul_peak_flop_per_second"] > 1e8
    assert {"device", "cpus", "python", "jax", "jaxlib"} <= set(report["machine"])
    # A chunk is 6 pixel frames, however many candidates were tried for it.
    one, four = report["runs"]
    for run in (one, four):
        chunk, judge = run["chunk_seconds"]["median"], run["stage_seconds"]["judge"]["median"]
        assert run["frames_per_second"]["the whole chunk"] == pytest.approx(6 / chunk)
        assert run["frames_per_second"]["the whole chunk less the rewards, estimated"] == pytest.approx(
            6 / (chunk - judge)
        )
    for run in (one, four):
        config = lane_config(RunConfig(), run["candidates"])
        work = flops.chunk(SMALL, config, SMALL.height, SMALL.width, run["appended_sinks"]["mean"])
        assert run["flop"] == pytest.approx(work)


@pytest.mark.slow
def test_the_table_and_the_comparison_are_printed(made):
    _, printed, report = made
    assert printed.startswith(bench_table(report))
    said = ("2x2 candidates", "random weights", "rewards: native_short", "programs compiled", "GB at most")
    said += ("devices: 1", "decoded in turn", "text encoder", "first frames, warm", "temporaries", "of room for")
    for text in (*NAMES, *said):
        assert text in printed
    against = printed[len(bench_table(report)) :]
    assert "against an old one, jax 0.1" in against
    assert "4 candidates" in against
    assert "1 candidates" not in against, "the earlier report has none"


@pytest.mark.slow
def test_a_profile_is_written(made):
    folder, _, _ = made
    assert list((folder / "trace").rglob("*.xplane.pb"))
    assert list((folder / "trace").rglob("perfetto_trace.json.gz"))


def test_a_comparison_gives_the_ratio_of_times():
    rows = compare_table(report_of_seconds(3.0), report_of_seconds(2.0)).splitlines()[2:]
    assert len(rows) == len(NAMES) + 1
    assert all(row.endswith(" 1.500") for row in rows)


def test_a_comparison_says_what_is_not_alike():
    ours, theirs = report_of_seconds(3.0), report_of_seconds(2.0)
    assert "NOT ALIKE" not in compare_table(ours | {"run": {"steps": (1, 2)}}, theirs | {"run": {"steps": [1, 2]}})
    said = compare_table(ours | {"rewards": ["native_short"]}, theirs | {"dtype": "bfloat16"}).splitlines()[0]
    assert said.endswith("NOT ALIKE: dtype, rewards")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--preset huge", "expected one of 1.3b, 14b, mini, tiny"),
        ("--candidates two", "expected numbers of at least 1"),
        ("--candidates 0", "at least 1"),
        ("--repeats 0", "at least 1"),
        ("--chunks 4", "expected at least 11"),
        ("--devices 0", "at least 1"),
        ("--devices 4096", "lower --devices"),
        ("--rewards nativ", "did you mean 'native'"),
        ("--set search.beam=3", "search.beam"),
        ("--chunks many", "invalid int value"),
        ("--dtype float64", "invalid choice"),
        ("--height 50", "50"),
        ("--height 0", "0"),
        ("--against nothing.json", "nothing.json"),
        ("--against empty.json", "expected a report"),
        ("--against other.json", "of another model, size or length"),
        ("--json nowhere/now.json", "nowhere/now.json"),
    ],
)
def test_bad_arguments_are_refused(options, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "other.json").write_text(json.dumps(report_of_seconds(1.0) | {"preset": "mini"}))
    assert cli.main(["bench", *(() if "preset" in options else ("--preset", "tiny")), *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.parametrize(("candidates", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (8, (2, 4))])
def test_candidates_become_a_grid(candidates, grid):
    assert grid_of(candidates) == lane_config(RunConfig(), candidates).search.grid == grid


def test_lanes_differ_in_their_grid_alone():
    run = RunConfig(search=SearchConfig(max_sink_size=9, decode="window", pruning=False))
    one, four = (lane_config(run, number) for number in (1, 4))
    assert dataclasses.replace(four.search, beams=1, candidates_per_beam=1) == one.search
    assert (one.appended_chunks, one.search.decode) == (2, "window")


def test_a_spread_of_runs():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def test_compilations_are_counted():
    run = jax.jit(lambda x: x * 2 + 1)
    with compilations() as seen:
        run(np.ones(3, np.float32))
        first = len(seen)
        run(np.ones(3, np.float32))
        again = len(seen)
        run(np.ones(4, np.float32))
    after = len(seen)
    run(np.ones(5, np.float32))
    assert (first, again, after, len(seen)) == (1, 1, 2, 2)


@pytest.mark.parametrize("first", [True, False])
def test_the_stages_make_the_same_step(bench, first):
    """Every stage is timed once, and one after the other they are the step."""
    search = bench.search(RunConfig(search=SearchConfig(**BUSY)))
    conditioning, state, names = bench.conditioning(search), init_state(search, 5, 4), []
    if not first:
        state, _ = jitted_step(search, bench.params, conditioning, state, first=True)

    def around(name, run):
        names.append(name)
        return run()

    same = jax.tree.map(jnp.copy, state)
    staged, _ = jax.device_get(staged_step(search, bench.params, conditioning, same, first=first, around=around))
    whole, _ = jax.device_get(jitted_step(search, bench.params, conditioning, state, first=first))
    assert tuple(names) == NAMES
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(staged), jax.tree.leaves(whole), strict=True):
        name = jax.tree_util.keystr(path)
        if ours.dtype == np.uint8:  # a rounding error may turn one level into the next
            assert_close(name, ours, theirs, 1)
        elif np.issubdtype(ours.dtype, np.floating):
            assert_close(name, ours, theirs, 1e-5)
        else:
            assert_equal(name, ours, theirs)


def test_the_bytes_to_the_host_are_those_of_the_record(bench):
    search = bench.search(RunConfig(search=SearchConfig()))
    conditioning = bench.conditioning(search)
    state, _ = jitted_step(search, bench.params, conditioning, init_state(search, 0, 2), first=True)
    _, record = jitted_step(search, bench.params, conditioning, state, first=False)
    assert bench._host_bytes(search, conditioning) == sum(leaf.nbytes for leaf in jax.tree.leaves(record))


def routes(records) -> list[list[int]]:
    return [record.evicted_route.tolist() for record in records]


def test_nothing_compiles_after_warm_up(compile_count):
    """By the pipeline, as users run it: another prompt, another length, another history of sinks."""
    pipe = StreamT1Pipeline(SmallWeights())
    search = SearchConfig(**BUSY)

    def video(prompt: str, chunks: int, seed: int):
        return [result.record for result in itertools.islice(pipe.stream(prompt, seed=seed, search=search), chunks)]

    first = video("a red circle moves right", 3, seed=1)
    pipe("a red circle moves right", frames=17, search=search)
    before = compile_count.value
    longer = [video("a blue square", 8, seed=seed) for seed in (2, 3)]
    out = pipe("two dots", frames=23, search=search, seed=9)
    assert compile_count.value == before, "something was compiled anew"
    assert len(first) == 3
    assert len(out.frames) == 23
    assert routes(longer[0]) != routes(longer[1]), "both videos have the same history: nothing is tested"
    taken = {route for video in longer for chunk in routes(video) for route in chunk}
    assert taken >= {Route.NONE, Route.EMA, Route.APPEND}


def test_the_plan_of_bytes_counts_windows_for_rewards_on_the_host(bench):
    """Host rewards are sent the chunk and the window of every candidate."""
    search = bench.search(RunConfig(search=SearchConfig()))
    on_host = dataclasses.replace(
        search, **{role: dataclasses.replace(getattr(search, role), runs_on="host") for role in ("short", "long")}
    )
    conditioning = bench.conditioning(search)
    state = jax.eval_shape(lambda: init_state(search, 0, 1))
    frame = SMALL.height * SMALL.width * 3
    extra = bench._host_bytes(on_host, conditioning) - bench._host_bytes(search, conditioning)
    assert extra == 4 * 6 * frame + 4 * size_of(state.beams.window) // 2
    assert size_of(state.beams.window) // 2 == 10 * 6 * frame
