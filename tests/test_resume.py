"""Runs that are killed, interrupted or terminated end in the bits of an undisturbed one (FAULTS rows 21 to 24).

One undisturbed run and many disturbed ones, each in a process of its own (`resumable_run.py`).
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import assert_equal

from streamt1_jax.trace import Trace
from streamt1_jax.video import read_video

CHUNKS = 14
KILLS = 6
SWITCH = "2.8s=a blue square spins"
ARGV = ["a red circle moves right", "--frames", str(12 * CHUNKS - 3), "--switch", SWITCH, "--seed", "5"]
ARGV += [
    "--set",
    "search.short_threshold=-1.0",
    "--set",
    "search.long_threshold=-1.0",
    "--set",
    "search.max_sink_size=9",
]
RESULTS = ["html", "json", "mp4", "npz", "png"]


def run_plan(folder: Path, plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "plan.json").write_text(json.dumps(plan))
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tests / "resumable_run.py"), str(folder), str(folder / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def entry(name: str, *flags: str, stop: dict[str, Any] | None = None, argv=ARGV, **more: Any) -> dict[str, Any]:
    return {"argv": [*argv, "--out", f"{name}.mp4", *flags], "stop": stop, **more}


def kill_plan() -> list[dict[str, Any]]:
    """SIGKILL at random moments of random chunks; the first may come before anything is saved."""
    rng = random.Random(4)
    moments = sorted(rng.sample(range(CHUNKS - 1), KILLS))
    kill = lambda chunk: {"signal": signal.SIGKILL, "chunk": chunk, "delay": rng.random() * 0.2}  # noqa: E731
    return [entry("killed", *(["--resume"] if i else []), stop=kill(chunk)) for i, chunk in enumerate(moments)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    """Everything, in one folder: (results by run, the folder)."""
    folder = tmp_path_factory.mktemp("runs")
    interrupt = {"signal": signal.SIGINT, "chunk": 2, "delay": 0.01}
    terminate = {"signal": signal.SIGTERM, "encoding": True}
    plan = {
        "whole": [entry("whole", "--live")],
        "killed": [*kill_plan(), entry("killed", "--resume")],
        "interrupted": [
            entry("interrupted", "--live", stop=interrupt),
            entry("interrupted"),
            entry("interrupted", "--resume", "--seed", "6"),
            entry("interrupted", "--resume", environment={"WEIGHTS_SEED": "1"}),
            entry(
                "interrupted",
                "--resume",
                stop=terminate,
                environment={"WEIGHTS_SEED": "0"},
            ),
            entry("interrupted", "--resume", stop={"signal": signal.SIGKILL, "writing": 6}),
            entry("interrupted", "--resume"),
            entry("interrupted", "--resume"),
        ],
    }
    results = iter(run_plan(folder, [step for steps in plan.values() for step in steps]))
    numbers = iter(range(100))
    made: dict[str, Any] = {"folder": folder}
    for name, steps in plan.items():
        made[name] = [{**next(results), "seen": folder / f"seen-{next(numbers)}"} for _ in steps]
    return made


def assert_same_result(folder: Path, name: str) -> None:
    ours, whole = (np.load(folder / f"{stem}.npz") for stem in (name, "whole"))
    for key in ("latents", "frames"):
        assert_equal(key, ours[key], whole[key])
    assert (folder / f"{name}.mp4").read_bytes() == (folder / "whole.mp4").read_bytes()
    records = [json.loads((folder / f"{stem}.json").read_text()) for stem in (name, "whole")]
    assert records[0]["sha256"] == records[1]["sha256"]
    traces = [Trace.from_json(record["trace"]) for record in records]
    assert traces[0].final_scores == traces[1].final_scores
    for ours, theirs in zip(*(trace.chunks for trace in traces), strict=True):
        assert (ours.candidates, ours.evicted) == (theirs.candidates, theirs.evicted)


@pytest.mark.slow
def test_an_undisturbed_run_leaves_its_results_and_nothing_else(runs):
    (whole,) = runs["whole"]
    assert whole["code"] == 0, whole["err"]
    assert [name for name in whole["left"] if name.startswith("whole")] == [f"whole.{end}" for end in RESULTS]
    assert whole["saved"] == []
    assert "s a chunk" in whole["out"]
    record = json.loads((runs["folder"] / "whole.json").read_text())
    assert record["complete"]
    assert record["saving"]["seconds_per_chunk"] > 0
    assert [entry["chunk"] for entry in record["switches"]] == [4]
    routes = {gone[1] for chunk in Trace.from_json(record["trace"]).chunks for gone in chunk.evicted if gone}
    assert len(routes) >= 2, f"only the routes {routes} were taken"


@pytest.mark.slow
def test_rows_21_and_22_a_run_killed_six_times_ends_in_the_same_bits(runs):
    *killed, last = runs["killed"]
    assert [run["code"] for run in killed] == [-signal.SIGKILL] * KILLS
    assert last["code"] == 0, last["err"]
    assert_same_result(runs["folder"], "killed")
    assert last["saved"] == []
    assert [name for name in last["left"] if name.startswith("killed")] == [f"killed.{end}" for end in RESULTS]
    for run in killed:
        states = [name for name in run["saved"] if "/state-" in name]
        assert len(states) <= 3, f"two are kept, and one may just have been added: {states}"


@pytest.mark.slow
def test_row_22_an_interrupt_writes_what_exists(runs):
    run = runs["interrupted"][0]
    assert run["code"] == 130, run["err"]
    said, error = run["err"].strip().splitlines()
    assert said.startswith("stopping when what is at hand is done")
    assert error.startswith("streamt1: error: interrupted: ")
    assert "--resume goes on" in error
    assert "interrupted.live.mp4" not in run["left"]
    frames, _ = read_video(run["seen"] / "interrupted.mp4")
    assert len(frames) % 12 == 9
    assert 12 * 3 - 3 <= len(frames) < 12 * CHUNKS - 3
    record = json.loads((run["seen"] / "interrupted.json").read_text())
    assert not record["complete"]
    assert any("/state-" in name for name in run["saved"])


@pytest.mark.slow
def test_row_24_an_unfinished_run_is_not_overwritten_unasked(runs):
    run = runs["interrupted"][1]
    assert run["code"] == 2
    assert "interrupted.mp4' exists" in run["err"]
    assert (run["seen"] / "interrupted.mp4").read_bytes() == (
        runs["interrupted"][0]["seen"] / "interrupted.mp4"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "words"), [(2, "seed is 6, saved was 5"), (3, "weights.summary is 'random numbers of seed 1'")]
)
def test_row_23_another_run_is_not_resumed(runs, step, words):
    run = runs["interrupted"][step]
    assert run["code"] == 2, run["err"]
    assert words in run["err"]
    assert run["saved"] == runs["interrupted"][0]["saved"]


@pytest.mark.slow
def test_a_sigterm_while_results_are_written_leaves_no_temporary_file(runs):
    run = runs["interrupted"][4]
    assert run["code"] == 130, run["err"]
    assert [name for name in run["left"] if name.startswith(".")] == []
    before = runs["interrupted"][0]["seen"] / "interrupted.mp4"
    assert (run["seen"] / "interrupted.mp4").read_bytes() == before.read_bytes()


@pytest.mark.slow
def test_row_21_a_kill_while_results_take_their_names_is_mended(runs):
    killed, resumed, again = runs["interrupted"][5:]
    assert killed["code"] == -signal.SIGKILL
    assert resumed["code"] == 0, resumed["err"]
    assert_same_result(runs["folder"], "interrupted")
    assert resumed["saved"] == []
    assert not list(runs["folder"].glob(".*"))
    assert again["code"] == 0
    assert "finished before" in again["out"]
