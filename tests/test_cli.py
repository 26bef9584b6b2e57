"""The `streamt1` command: exit codes, one-line errors, and what is written or left alone. The pipeline is made up."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_search import FakeChunkResult, FakePipeline, fake_trace
from PIL import Image

import streamt1_jax
from streamt1_jax import cli, compile_cache, report
from streamt1_jax.config import ModelConfig
from streamt1_jax.errors import BadInputError, OutOfMemoryError, RewardError, StreamT1Error, WeightsError
from streamt1_jax.progress import Progress
from streamt1_jax.trace import Trace
from streamt1_jax.video import read_video

PROMPT = "a red circle moves right"


@pytest.fixture(autouse=True)
def pipeline(monkeypatch, tmp_path):
    """The made-up pipeline in place of the real one, and a folder to work in."""
    monkeypatch.setattr(FakePipeline, "loaded", [])
    monkeypatch.setattr(FakePipeline, "calls", [])
    monkeypatch.setitem(vars(streamt1_jax), "StreamT1Pipeline", FakePipeline)
    monkeypatch.chdir(tmp_path)
    return FakePipeline


def run(capsys, *argv):
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error_of(capsys, *argv, code=2):
    """The one line of error of a command that must fail with this code."""
    got, out, err = run(capsys, *argv)
    assert got == code, err
    assert out == ""
    assert err.startswith("streamt1: error: ")
    assert err.count("\n") == 1
    return err


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_generate_writes_a_video_its_record_and_a_picture(capsys, tmp_path):
    code, out, err = run(capsys, "generate", PROMPT, "--out", "out.mp4", "--frames", "21", "--seed", "7")
    assert (code, err) == (0, "")
    assert files(tmp_path) == ["out.html", "out.json", "out.mp4", "out.png"]
    assert all(name in out for name in ("out.json", "out.mp4", "out.png"))
    assert "untrained" in out
    frames, fps = read_video("out.mp4")
    assert (len(frames), fps) == (21, 16.0)
    record = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert (record["software"], record["prompt"], record["seed"], record["score"]) == ("streamt1-jax", PROMPT, 7, None)
    assert len(Trace.from_json(record["trace"]).chunks) == 2
    with Image.open("out.png") as picture:
        picture.verify()


@pytest.mark.slow
def test_the_embedded_model_end_to_end(capsys, monkeypatch, tmp_path):
    """The real pipeline, as small as it gets."""
    monkeypatch.delitem(vars(streamt1_jax), "StreamT1Pipeline")
    size = ("--frames", "9", "--height", "16", "--width", "32", "--set", "search.candidates_per_beam=1")
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="the size")
        code, out, err = run(capsys, "generate", PROMPT, "--out", "out.mp4", *size)
    assert code == 0, err
    assert "32x16 is not the 128x80 that the weights were made for" in err
    assert "trained on the little world" in out
    assert read_video("out.mp4")[0].shape == (9, 16, 32, 3)
    record = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert (record["prompt"], record["seed"], record["config"]["search"]["beams"]) == (PROMPT, 42, 2)
    trace = Trace.from_json(record["trace"])
    assert [len(chunk.candidates) for chunk in trace.chunks] == [2]
    assert record["history_seeds"] == [candidate.seed for candidate in trace.winning_path()]
    assert files(tmp_path) == ["out.html", "out.json", "out.mp4", "out.png"]


def test_everything_asked_for_reaches_the_pipeline(capsys, pipeline):
    flags = "--checkpoint folder --seconds 1 --height 64 --width 96 --rewards native --strict --allow-cpu"
    flags += " --set search.beams=3"
    assert run(capsys, "generate", PROMPT, "--out", "a.mp4", *flags.split())[0] == 0
    assert pipeline.loaded == [("folder", {"allow_cpu": True, "devices": 1})]
    ((prompt, settings),) = pipeline.calls
    config, store = settings.pop("config"), settings.pop("store")
    assert store.folder.name == "a.resume"
    assert (prompt, config.search.beams) == (PROMPT, 3)
    assert settings == {
        "frames": 21,
        "seed": 42,
        "height": 64,
        "width": 96,
        "rewards": ("native", "native"),
        "strict": True,
    }


def test_the_defaults_are_five_seconds_of_the_embedded_model(capsys, pipeline):
    assert run(capsys, "generate", PROMPT, "--out", "a.mp4")[0] == 0
    assert pipeline.loaded == [("mini", {"allow_cpu": False, "devices": 1})]
    assert pipeline.calls[0][1]["frames"] == 81


@pytest.mark.parametrize(("flag", "value"), [("--frames", "21"), ("--seconds", "1")])
def test_a_length_by_flag_replaces_either_length_of_the_file(capsys, tmp_path, pipeline, flag, value):
    for body in ("{'generate': {'seconds': 5.0}}", "{'generate': {'frames': 477}}"):
        config = tmp_path / "config.py"
        config.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({body})\n")
        argv = ("generate", PROMPT, "--out", "a.mp4", "--overwrite", "--config", str(config), flag, value)
        assert run(capsys, *argv)[0] == 0
    assert [settings["frames"] for _, settings in pipeline.calls] == [21, 21]


def test_prompts_of_a_file_go_to_a_folder_by_index_and_hash(capsys, tmp_path, pipeline):
    prompts = ["../../escape", "a/b", "кот 🐈"]
    (tmp_path / "prompts.txt").write_text(f"{prompts[0]}\n\n{prompts[1]}\n   \n{prompts[2]}\n", encoding="utf-8")
    code, out, err = run(capsys, "generate", "--prompts-file", "prompts.txt", "--out", "videos", "--frames", "9")
    assert code == 0
    assert err == "streamt1: warning: prompts.txt: 2 blank lines skipped, 3 prompts left\n"
    names = [f"{i:04d}-{hashlib.sha256(p.encode()).hexdigest()[:8]}" for i, p in enumerate(prompts)]
    assert files(tmp_path / "videos") == sorted(
        f"{name}.{end}" for name in names for end in ("html", "json", "mp4", "png")
    )
    assert files(tmp_path) == ["prompts.txt", "videos"]
    assert [prompt for prompt, _ in pipeline.calls] == prompts
    assert len(pipeline.loaded) == 1
    assert out.count("video ") == 3
    assert json.loads((tmp_path / "videos" / f"{names[2]}.json").read_text(encoding="utf-8"))["prompt"] == prompts[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "required: COMMAND; see streamt1 --help"),
        (("paint",), "invalid choice: 'paint'"),
        (("generate", PROMPT), "required: --out; see streamt1 generate --help"),
        (("generate", PROMPT, "--out", "a.mp4", "--colour"), "unrecognized arguments: --colour"),
        (("generate", PROMPT, "--out", "a.mp4", "--seconds", "1", "--frames", "21"), "not allowed with"),
        (("generate", "--out", "a.mp4"), "neither a prompt nor a prompts file"),
        (("generate", "", "--out", "a.mp4"), "prompt is empty"),
        (("generate", "  \t ", "--out", "a.mp4"), "prompt is empty"),
        (("generate", PROMPT, "--prompts-file", "x", "--out", "a"), "a prompt and a prompts file came"),
        (("generate", "--prompts-file", "none.txt", "--out", "a"), "prompts file none.txt: No such file"),
        (("generate", PROMPT, "--out", "a.mp4", "--frames", "80"), "the nearest are 69 and 81"),
        (("generate", PROMPT, "--out", "a.mp4", "--frames", "81.5"), "the nearest are 81 and 93"),
        (("generate", PROMPT, "--out", "a.mp4", "--frames", "-3"), "the nearest are 9 and 21"),
        (("generate", PROMPT, "--out", "a.mp4", "--frames", "many"), "'many', expected an integer"),
        (("generate", PROMPT, "--out", "a.mp4", "--seconds", "0"), "seconds is 0, expected a number above 0"),
        (("generate", PROMPT, "--out", "a.mp4", "--seed", "-1"), "seed is -1"),
        (("generate", PROMPT, "--out", "a.mp4", "--seed", "4294967296"), "seed is 4294967296"),
        (("generate", PROMPT, "--out", "a.mp4", "--seed", "1.5"), "seed is 1.5"),
        (("generate", PROMPT, "--out", "a.mp4", "--height", "81"), "nearest legal size is height 80"),
        (("generate", PROMPT, "--out", "a.mp4", "--width", "0"), "nearest legal size is height default, width 16"),
        (("generate", PROMPT, "--out", "a.mp4", "--set", "search.beam=2"), "the closest is 'search.beams'"),
        (("generate", PROMPT, "--out", "a.mp4", "--set", "search.beams=0"), "beams is 0"),
        (("generate", PROMPT, "--out", "a.mp4", "--config", "none.py"), "is not a file"),
        (("generate", PROMPT, "--out", "a.mp4", "--rewards", "nativ"), "no reward 'nativ'"),
        (("generate", PROMPT, "--out", "a.mp4", "--rewards", "native,sharp"), "no reward 'sharp'"),
        (("generate", PROMPT, "--out", "none/a.mp4"), "does not exist"),
        (("generate", PROMPT, "--out", "a.mp4", "--switch", "5.25"), "'5.25' is not TIME=PROMPT"),
        (("generate", PROMPT, "--out", "a.mp4", "--switch", "2s="), "prompt is empty"),
        (
            ("generate", PROMPT, "--out", "a.mp4", "--switch", "5.25s=x"),
            "outside the video, expected 0.5625 s to 4.3125 s",
        ),
        (("generate", PROMPT, "--out", "a.mp4", "--resume", "--overwrite"), "expected one of them"),
        (("generate", PROMPT, "--out", "a.mp4", "--resume", "--no-state"), "drop one of them"),
        (("generate", PROMPT, "--out", "a.avi"), "does not end in .mp4"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_code_2_before_any_weights(capsys, tmp_path, pipeline, argv, words):
    assert words in error_of(capsys, *argv)
    assert not pipeline.loaded
    assert not files(tmp_path)


def test_an_existing_output_is_refused_before_any_weights(capsys, tmp_path, pipeline):
    (tmp_path / "a.png").write_text("mine")
    assert "a.png' exists" in error_of(capsys, "generate", PROMPT, "--out", "a.mp4")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "videos").mkdir()
    taken = f"0001-{hashlib.sha256(b'two').hexdigest()[:8]}.json"
    (tmp_path / "videos" / taken).write_text("mine")
    assert taken in error_of(capsys, "generate", "--prompts-file", "prompts.txt", "--out", "videos")
    assert not pipeline.loaded
    assert files(tmp_path / "videos") == [taken]


def test_overwrite_replaces_an_earlier_result(capsys, tmp_path):
    argv = ("generate", PROMPT, "--out", "a.mp4", "--frames")
    assert run(capsys, *argv, "21")[0] == 0
    assert "--overwrite" in error_of(capsys, *argv, "9")
    assert run(capsys, *argv, "9", "--overwrite")[0] == 0
    assert len(read_video("a.mp4")[0]) == 9
    assert files(tmp_path) == ["a.html", "a.json", "a.mp4", "a.png"]


class XlaRuntimeError(RuntimeError):
    """Named as JAX names its own."""


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        (BadInputError("prompt is too long"), 2, "prompt is too long"),
        (WeightsError("no weights"), 3, "no weights"),
        (OutOfMemoryError("too big"), 4, "too big"),
        (RewardError("no finite score"), 1, "no finite score"),
        (StreamT1Error("two\nlines"), 1, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero; this is a fault"),
        (XlaRuntimeError("INTERNAL: cuDNN"), 1, "XlaRuntimeError: INTERNAL: cuDNN"),
        (
            XlaRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore"),
            4,
            "lower search.candidates_per_beam (now 2) or search.beams (now 2)",
        ),
        (MemoryError(), 4, "lower search.candidates_per_beam (now 2)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_failures_have_their_code_one_line_and_no_files(capsys, tmp_path, monkeypatch, pipeline, fail, code, words):
    monkeypatch.setattr(pipeline, "fail", fail)
    line = error_of(capsys, "generate", PROMPT, "--out", "a.mp4", "--frames", "9", code=code)
    assert words in line
    assert "Traceback" not in line
    assert not files(tmp_path)


def test_memory_advice_names_only_what_can_be_lowered(capsys, monkeypatch, pipeline):
    monkeypatch.setattr(pipeline, "fail", XlaRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"))
    settings = ("search.candidates_per_beam=1", "search.sinking=false", "stream.local_attn_size=6")
    sets = [word for text in settings for word in ("--set", text)]
    assert "lower search.beams (now 2) or generate.height" in error_of(
        capsys, "generate", PROMPT, "--out", "a.mp4", *sets, code=4
    )


def test_debug_shows_the_traceback(capsys, monkeypatch, pipeline):
    monkeypatch.setattr(pipeline, "fail", ZeroDivisionError("x"))
    monkeypatch.setenv("STREAMT1_DEBUG", "1")
    code, _, err = run(capsys, "generate", PROMPT, "--out", "a.mp4")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("to see where\n")


def test_a_picture_that_fails_leaves_no_video_either(capsys, tmp_path, monkeypatch):
    def fail(trace, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save_search_tree", fail)
    assert "No space left" in error_of(capsys, "generate", PROMPT, "--out", "a.mp4", "--frames", "9")
    assert not files(tmp_path)


def test_switches_reach_the_pipeline(capsys, pipeline, tmp_path):
    argv = ("--switch", "2s=a blue square", "--switch", "12f=x = y", "--seconds", "5")
    assert run(capsys, "generate", PROMPT, "--out", "a.mp4", *argv)[0] == 0
    assert pipeline.calls[0][1]["switches"] == ((2.0, "a blue square"), (0.75, "x = y"))
    (tmp_path / "prompts.txt").write_text("one\n@2s two\nthree\n")
    assert run(capsys, "generate", "--prompts-file", "prompts.txt", "--out", "videos")[0] == 0
    calls = [(prompt, settings.get("switches")) for prompt, settings in pipeline.calls[1:]]
    assert calls == [("one", ((2.0, "two"),)), ("three", None)]
    names = {f"{i:04d}-{hashlib.sha256(p.encode()).hexdigest()[:8]}.mp4" for i, p in enumerate(["one\ntwo", "three"])}
    assert names <= set(files(tmp_path / "videos"))
    argv = ("--prompts-file", "prompts.txt", "--out", "more", "--switch", "2s=x")
    assert "a line `@5.25s a new prompt`" in error_of(capsys, "generate", *argv)


@pytest.mark.parametrize("name", ["run.json", "lock"])
def test_an_unfinished_run_is_neither_overwritten_nor_forgotten(capsys, tmp_path, pipeline, name):
    folder = tmp_path / "a.resume"
    folder.mkdir()
    (folder / name).touch()
    assert "go on with --resume" in error_of(capsys, "generate", PROMPT, "--out", "a.mp4")
    assert not pipeline.loaded
    assert run(capsys, "generate", PROMPT, "--out", "a.mp4", "--overwrite", "--frames", "9")[0] == 0


def test_a_folder_of_someone_else_is_left_alone(capsys, tmp_path, pipeline):
    (tmp_path / "a.resume").mkdir()
    (tmp_path / "a.resume" / "mine").touch()
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert "was not made by" in error_of(capsys, "generate", PROMPT, "--out", "a.mp4", *flags)
    (tmp_path / "b.live.mp4").write_text("mine")
    (tmp_path / "c.live.mp4").mkdir()
    (tmp_path / "d.live.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    for name, words in (("b", "was not made by"), ("c", "is no file"), ("d", "is a link to")):
        assert words in error_of(capsys, "generate", PROMPT, "--out", f"{name}.mp4", "--live", "--overwrite")
    assert "live.mp4' exists" in error_of(capsys, "generate", PROMPT, "--out", "b.mp4", "--live")
    assert not pipeline.loaded


@pytest.mark.parametrize("flags", [[], ["--live", "--no-state"]])
def test_a_name_too_long_for_what_stands_beside_the_video_is_refused(capsys, tmp_path, pipeline, flags):
    """`x.mp4` fits the disk, `x.resume` and `x.live.mp4` do not."""
    name = "x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - len(".html"))
    assert "cannot be written" in error_of(capsys, "generate", PROMPT, "--out", f"{name}.mp4", *flags)
    assert not pipeline.loaded


@pytest.fixture
def finished(capsys, monkeypatch, tmp_path):
    """The command of a run that has been finished, with what the real pipeline says of it."""
    weights = types.SimpleNamespace(config=ModelConfig.mini(), describe=lambda: {"summary": "of seed 0"})
    monkeypatch.setattr("streamt1_jax.weights.find_weights", lambda name: weights)
    call = FakePipeline.__call__

    def complete(self, prompt, **settings):
        out = call(self, prompt, **settings)
        size = {"height": settings["height"] or 80, "width": settings["width"] or 128}
        out.info |= {"complete": True, "size": size, "weights": weights.describe()}
        return out

    monkeypatch.setattr(FakePipeline, "__call__", complete)
    argv = ("generate", PROMPT, "--out", "a.mp4", "--frames", "21", "--switch", "0.6s=a blue square")
    assert run(capsys, *argv)[0] == 0
    FakePipeline.calls.clear()
    return argv


def test_a_finished_run_is_not_made_again(capsys, tmp_path, finished, pipeline):
    code, out, err = run(capsys, *finished, "--resume", "--width", "128")
    assert (code, out, err) == (0, "video   a.mp4 (finished before)\n", "")
    assert not pipeline.calls


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 3", "seed is 3, saved was 42"),
        ("--frames 33", "chunks is 3, saved was 2"),
        ("--switch 1.4s=x --frames 33", "switches.2 is 'x', saved was None"),
        ("--set search.beams=3", "search.beams is 3, saved was 2"),
        ("--height 96", "size.height is 96, saved was 80"),
        ("--set rewards.short=mine:Reward", "rewards.short is 'mine:Reward', saved was 'default'"),
    ],
)
def test_row_23_the_results_of_another_run_are_not_taken_for_this_one(
    capsys, tmp_path, finished, pipeline, flags, words
):
    assert words in error_of(capsys, *finished, *flags.split(), "--resume")
    assert not pipeline.calls


def test_row_23_the_results_of_other_weights_are_not_taken_for_these(capsys, finished, monkeypatch, pipeline):
    other = types.SimpleNamespace(config=ModelConfig.mini(), describe=lambda: {"summary": "of seed 1"})
    monkeypatch.setattr("streamt1_jax.weights.find_weights", lambda name: other)
    words = "weights.summary is 'of seed 1', saved was 'of seed 0'"
    assert words in error_of(capsys, *finished, "--checkpoint", "other", "--resume")


def test_a_finished_run_that_lost_a_file_is_refused_before_it_is_made_again(capsys, tmp_path, finished, pipeline):
    (tmp_path / "a.html").unlink()
    assert "a.mp4' exists" in error_of(capsys, *finished, "--resume")
    assert not pipeline.calls


def test_row_21_states_that_a_kill_has_left_of_a_finished_run_are_swept(capsys, tmp_path, finished):
    folder = tmp_path / "a.resume"
    for state in ("state-000001", "state-000002"):
        (folder / state).mkdir(parents=True)
    (folder / "run.json").touch()
    assert run(capsys, *finished, "--resume")[0] == 0
    assert files(tmp_path) == ["a.html", "a.json", "a.mp4", "a.png"]


def test_a_result_of_the_user_is_not_replaced_by_a_resumed_run(capsys, tmp_path):
    (tmp_path / "a.mp4").write_text("mine")
    assert "exists" in error_of(capsys, "generate", PROMPT, "--out", "a.mp4", "--resume")
    assert (tmp_path / "a.mp4").read_text() == "mine"


def test_a_reward_that_fails_leaves_the_states_and_says_how_to_go_on(capsys, tmp_path, monkeypatch, pipeline):
    def fails_later(self, prompt, *, store, **settings):
        (store.folder / "state-000002").mkdir(parents=True)
        raise RewardError("the judge went home")

    monkeypatch.setattr(FakePipeline, "__call__", fails_later)
    line = error_of(capsys, "generate", PROMPT, "--out", "a.mp4", code=1)
    assert "the judge went home; the chunks before are saved, the same command with --resume goes on" in line
    assert files(tmp_path) == ["a.resume"]
    assert files(tmp_path / "a.resume") == ["state-000002"]


def test_results_before_a_failure_stay(capsys, tmp_path, monkeypatch, pipeline):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    call = FakePipeline.__call__

    def second_fails(self, prompt, **settings):
        if prompt == "two":
            raise KeyboardInterrupt
        return call(self, prompt, **settings)

    monkeypatch.setattr(FakePipeline, "__call__", second_fails)
    argv = ("generate", "--prompts-file", "prompts.txt", "--out", "videos", "--frames", "9")
    code, _, err = run(capsys, *argv)
    assert (code, err) == (130, "streamt1: error: interrupted\n")
    assert len(files(tmp_path / "videos")) == 4


def test_the_progress_bar_shows_the_best_score_only_when_wanted(capsys):
    assert run(capsys, "generate", PROMPT, "--out", "a.mp4", "--frames", "21")[2] == ""
    err = run(capsys, "generate", PROMPT, "--out", "b.mp4", "--frames", "21", "--progress")[2]
    assert "2/2" in err
    assert "best score -2.1" in err  # beam 0 of chunk 1 of the made-up trace


def test_small_scores_can_be_told_apart(capsys):
    (chunk,) = fake_trace(1).chunks
    best = dataclasses.replace(
        chunk, candidates=tuple(dataclasses.replace(c, score=0.000523) for c in chunk.candidates)
    )
    with Progress(1, "a.mp4", forced=True) as progress:
        progress.show(FakeChunkResult(best, np.zeros((9, 2, 2, 3), np.uint8)))
    assert "best score 0.000523" in capsys.readouterr().err


def test_the_bar_of_a_resumed_run_counts_what_was_there(capsys):
    with Progress(3, "a.mp4", forced=True) as progress:
        for chunk, old in zip(fake_trace(3).chunks, [True, True, False], strict=True):
            result = FakeChunkResult(chunk, np.zeros((12, 2, 2, 3), np.uint8))
            result.restored = old
            progress.show(result)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "48.0 frames/s, best score" in shown


def test_warnings_are_one_line(capsys, monkeypatch):
    call = FakePipeline.__call__

    def warns(self, prompt, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("the prompt is\nlong", stacklevel=1)
        return call(self, prompt, **settings)

    monkeypatch.setattr(FakePipeline, "__call__", warns)
    code, _, err = run(capsys, "generate", PROMPT, "--out", "a.mp4", "--frames", "9")
    assert (code, err) == (0, "streamt1: warning: the prompt is long\n")


def test_the_module_can_be_run():
    """`python -m` on it did nothing, and said so with exit code 0."""
    command = [sys.executable, "-m", "streamt1_jax.cli", "paint"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "invalid choice: 'paint'" in done.stderr


@pytest.mark.parametrize("argv", [("--help",), ("generate", "--help")])
def test_help_is_no_failure(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "generate" in out


def fake_convert(monkeypatch, run_convert):
    module = types.ModuleType("convert.cli")

    def add_convert_parser(commands):
        commands.add_parser("convert").add_argument("--source")

    vars(module).update(add_convert_parser=add_convert_parser, run_convert=run_convert)
    monkeypatch.setitem(sys.modules, "convert.cli", module)


def test_convert_is_handed_on(capsys, monkeypatch):
    seen = []
    fake_convert(monkeypatch, lambda args: seen.append(args.source) or 0)
    assert run(capsys, "convert", "--source", "here")[0] == 0
    assert seen == ["here"]


def test_convert_without_torch_names_the_extra(capsys, monkeypatch):
    def needs_torch(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    fake_convert(monkeypatch, needs_torch)
    assert "pip install 'streamt1-jax[torch]'" in error_of(capsys, "convert", code=1)
    monkeypatch.setitem(sys.modules, "torch", None)  # as Python sees a module that is not there
    fake_convert(monkeypatch, lambda args: __import__("torch.nn") and 0)
    assert "pip install 'streamt1-jax[torch]'" in error_of(capsys, "convert", code=1)


def test_parity_is_handed_on(capsys, monkeypatch):
    module = types.ModuleType("streamt1_jax.parity")
    vars(module)["run_parity"] = lambda path: int(path == "wrong.safetensors")
    monkeypatch.setitem(sys.modules, "streamt1_jax.parity", module)
    assert run(capsys, "parity", "right.safetensors")[0] == 0
    assert run(capsys, "parity", "wrong.safetensors")[0] == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["generate", "--help"],
        ["generate", "x", "--out", "a.mp4", "--seed", "-1"],
        ["generate", " ", "--out", "a.mp4"],
    ],
)
def test_help_and_bad_input_come_without_jax(argv):
    code = (
        "import sys; from streamt1_jax.cli import main; main(sys.argv[1:]); "
        "heavy = {'jax', 'torch', 'transformers', 'matplotlib', 'av'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, env=plain_env()
    )
    assert done.returncode == 0, done.stderr


def plain_env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"STREAMT1_CACHE_DIR": "mine"}, "mine"),
        ({"STREAMT1_CACHE_DIR": ""}, None),
        ({"XDG_CACHE_HOME": "/base"}, "/base/streamt1-jax/xla"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home"}, "/home/.cache/streamt1-jax/xla"),
        ({"HOME": "/home"}, "/home/.cache/streamt1-jax/xla"),
    ],
    ids=str,
)
def test_the_compilation_cache_is_where_it_should_be(monkeypatch, variables, expected):
    for name in ("STREAMT1_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compile_cache.cache_folder() == (expected and Path(expected))


@pytest.fixture
def no_cache():
    """JAX without a folder for its cache, as in a fresh process."""
    before = getattr(jax.config, compile_cache.JAX_FLAG)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(compile_cache.JAX_FLAG, None)
    yield
    jax.config.update(compile_cache.JAX_FLAG, before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.mark.usefixtures("no_cache")
def test_the_compilation_cache_is_switched_on_and_a_users_own_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMT1_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    for _ in range(2):
        assert compile_cache.enable_compilation_cache() == tmp_path / "deep" / "cache"
        assert getattr(jax.config, compile_cache.JAX_FLAG) == str(tmp_path / "deep" / "cache")
        monkeypatch.setenv("STREAMT1_CACHE_DIR", "another")
    assert files(tmp_path) == ["deep"]


@pytest.mark.usefixtures("no_cache")
def test_a_compilation_cache_that_cannot_be_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STREAMT1_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="every start compiles anew"):
        assert compile_cache.enable_compilation_cache() is None
    assert getattr(jax.config, compile_cache.JAX_FLAG) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--devices 0", "--devices is 0, expected at least 1"),
        ("--hosts 2", "--coordinator"),
        ("--prompts-file p.txt --coordinator nohost --hosts 2", "expected HOST:PORT"),
        ("--prompts-file p.txt --coordinator a:1 --hosts 0", "at least one host"),
        ("--prompts-file p.txt --coordinator a:1 --hosts 2 --host 2", "below that number"),
        ("--coordinator a:1 --hosts 2", "--prompts-file"),
    ],
)
def test_devices_and_hosts_are_checked_before_anything_is_loaded(options, said, capsys, pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    where = ("--out", "videos") if "prompts-file" in options else (PROMPT, "--out", "a.mp4")
    assert said in error_of(capsys, "generate", *where, *options.split())
    assert pipeline.loaded == []


def test_doctor_tells_the_plan_from_shapes_alone(capsys):
    code, out, err = run(capsys, "doctor", "--beams", "2", "--candidates", "2", "--rewards", "both")
    assert (code, err) == (0, "")
    for text in ("jax ", "1.3b, 832x480, 2 beams of 2 candidates", "reward hpsv3", "KV caches", "peak"):
        assert text in out
