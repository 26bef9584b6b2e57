"""The published rewards on the command line: `score`, `generate` with both tiny models, `doctor`; and a user's own."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from compare import assert_close
from published import TINY, write_wan
from reward_case import PROMPTS, cli_sources
from small import SmallWeights

from streamt1_jax import cli
from streamt1_jax.config import SearchConfig
from streamt1_jax.errors import BadInputError, OutOfMemoryError, RewardError
from streamt1_jax.memory import REWARD_BATCH_BYTES, REWARD_BYTES
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.rewards import PromptTable, PublishedRewards, torch_reward
from streamt1_jax.rewards.choice import check_choice, make_rewards, published_names
from streamt1_jax.settings import RewardsConfig, load_settings
from streamt1_jax.trace import Trace
from streamt1_jax.video import read_video, write_mp4

PROMPT = "a red circle moves right"


def streamt1(*argv: object) -> int:
    return cli.main([*map(str, argv)])


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Path:
    """Both tiny models, converted by the command itself."""
    out = tmp_path_factory.mktemp("rewards") / "rewards"
    assert streamt1("convert", "rewards", *cli_sources(), "--dtype", "float32", "--out", out) == 0
    return out


@pytest.fixture
def video(tmp_path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 16)
    return tmp_path / "a.mp4"


def error_of(capsys, *argv: object, code: int = 2) -> str:
    assert streamt1(*argv) == code
    err = capsys.readouterr().err
    assert err.startswith("streamt1: error: ")
    assert err.count("\n") == 1
    return err


class TestScore:
    def test_a_table_and_json(self, capsys, rewards, video, tmp_path):
        report = tmp_path / "scores.json"
        assert streamt1("score", video, "--prompt", PROMPTS[0], "--rewards", rewards, "--json", report) == 0
        table = capsys.readouterr().out
        assert "9 frames at 16 a second (the file)" in table
        assert all(word in table for word in ("hpsv3", "videoreward", "raw", "normalised", "Overall", "of 4 frames"))
        written = json.loads(report.read_text(), parse_constant=pytest.fail)
        (entry,) = written["videos"]
        frames, fps = read_video(video)
        models = PublishedRewards(rewards, device="cpu")
        (rated,) = models.load("hpsv3").rate([frames], PROMPTS[:1])
        assert_close("mu", entry["scores"]["short"]["mu"], rated[:, 0], 1e-5)
        assert entry["scores"]["short"]["score"] == pytest.approx(rated[:, 0].mean(), abs=1e-6)
        long = entry["scores"]["long"]
        assert (long["frames_used"], long["frame_indices"], entry["fps"], fps) == (4, [0, 3, 5, 8], 16.0, 16.0)
        scale = [(long["raw"][name] - long["mean"][name]) / long["std"][name] for name in ("VQ", "MQ", "TA")]
        assert_close("normalised", [long["normalised"][name] for name in ("VQ", "MQ", "TA")], scale, 1e-9)
        assert long["score"] == pytest.approx(sum(scale)) == long["normalised"]["Overall"]
        assert written["models"]["long"]["name"] == "videoreward"

    def test_the_given_rate_is_used_and_recorded(self, rewards, tmp_path):
        frames = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
        write_mp4(tmp_path / "b.mp4", frames, 16)
        report, argv = tmp_path / "s.json", ("--set", "rewards.short=native", "--json", tmp_path / "s.json")
        argv = ("score", tmp_path / "b.mp4", "--prompt", "x", "--rewards", rewards, "--fps", "4", *argv)
        assert streamt1(*argv) == 0
        written = json.loads(report.read_text())
        (entry,) = written["videos"]
        assert "fps" not in written["models"]["long"]  # a run's, which is not this video's
        assert (entry["fps"], entry["fps_from"], entry["scores"]["long"]["frames_used"]) == (4.0, "--fps", 12)
        assert entry["scores"]["short"]["name"] == "native_short"

    def test_native_needs_no_weights_and_prompts_go_by_video(self, capsys, video, tmp_path):
        other = tmp_path / "b.mp4"
        other.write_bytes(video.read_bytes())
        report = tmp_path / "s.json"
        assert streamt1("score", video, other, "--prompt", "one", "--prompt", "two", "--json", report) == 0
        entries = json.loads(report.read_text())["videos"]
        assert [entry["prompt"] for entry in entries] == ["one", "two"]
        assert capsys.readouterr().out.count("native_long") == 2

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("none.mp4", "--prompt", "x"), "none.mp4 is not a file"),
            (("broken.mp4", "--prompt", "x"), "cannot be read as a video"),
            (("one.mp4", "--prompt", "x"), "has 1 frame, expected a video of at least 2"),
            (("a.mp4",), "required: --prompt"),
            (("a.mp4", "--prompt", " "), "prompt is empty"),
            (("a.mp4", "--prompt", "x", "--prompt", "y"), "2 prompts came for 1 videos"),
            (("a.mp4", "--prompt", "x", "--fps", "0"), "--fps is 0.0"),
            (("a.mp4", "--prompt", "x", "--rewards", "hpsv3"), "needs converted weights, expected their folder"),
            (("a.mp4", "--prompt", "x", "--rewards", "hspv3"), "did you mean 'hpsv3'?"),
            (("a.mp4", "--prompt", "x", "--rewards", "nothere"), "no reward 'nothere' and no such folder"),
            (("a.mp4", "--prompt", "x", "--json", "a.mp4"), "exists"),
            (("a.mp4", "--prompt", "x", "--json", "no/a.json"), "does not exist"),
            (("a.mp4", "--prompt", "x", "--set", "rewards.precision=fp4"), "precision is 'fp4', expected one of"),
            (("a.mp4", "--prompt", "x", "--set", "rewards.batch_gb=0"), "batch_gb is 0"),
        ],
    )
    def test_bad_input(self, capsys, video, tmp_path, monkeypatch, argv, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:500])
        write_mp4(tmp_path / "one.mp4", np.zeros((1, 32, 32, 3), np.uint8), 16)
        assert words in error_of(capsys, "score", *argv)

    def test_a_folder_that_is_no_rewards(self, capsys, video, tmp_path):
        argv = ("score", video, "--prompt", "x", "--rewards", tmp_path)
        assert "streamt1 convert rewards --out" in error_of(capsys, *argv, code=3)


@pytest.mark.slow
def test_generate_with_both_models(capsys, rewards, tmp_path):
    """From published files to a video: two chunks of two candidates by the paper's search, judged by both models."""
    size = ("--height", TINY.height, "--width", TINY.width)
    wan, checkpoint = write_wan(tmp_path / "wan"), tmp_path / "checkpoint"
    assert streamt1("convert", "wan", "--source", wan, "--out", checkpoint, "--dtype", "float32", *size) == 0
    argv = ("generate", PROMPT, "--checkpoint", checkpoint, "--out", tmp_path / "a.mp4", "--frames", 21)
    argv += ("--set", "search.candidates_per_beam=1", "--rewards", rewards, "--reward-device", "cpu")
    assert streamt1(*argv) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert record["rewards"] == {"short": "hpsv3", "long": "videoreward"}
    assert record["reward_models"].keys() == {"hpsv3", "videoreward"}
    trace = Trace.from_json(record["trace"])
    scores = [score for chunk in trace.chunks for c in chunk.candidates for score in (c.short, c.long)]
    assert len(scores) == 8
    assert np.all(np.isfinite(scores))
    final = record["final_reward"]
    assert final["score"] == pytest.approx(max(trace.final_scores), abs=1e-5)
    assert (final["frames_used"], final["fps"]) == (4, 16.0)


class TestDoctor:
    def test_both_on_one_device_and_on_another(self, capsys, rewards):
        assert streamt1("doctor", "--preset", "tiny", "--rewards", "both") == 0
        text = capsys.readouterr().out
        assert "reward hpsv3                    15.50 GB" in text
        assert "reward videoreward               4.42 GB" in text
        assert "torch takes 25.42 GB of that" in text
        assert streamt1("doctor", "--preset", "tiny", "--rewards", rewards, "--reward-device", "cuda:1") == 0
        text = capsys.readouterr().out
        assert "reward hpsv3" not in text
        assert "on cuda:1: hpsv3 0.00 GB, videoreward 0.00 GB, batches and torch itself: 5.50 GB in all" in text

    def test_eight_bits(self, capsys):
        assert streamt1("doctor", "--preset", "tiny", "--rewards", "hpsv3", "--set", "rewards.precision=int8") == 0
        assert "reward hpsv3                     8.31 GB" in capsys.readouterr().out

    def test_a_name_that_is_none(self, capsys):
        assert "expected none, both, hpsv3, videoreward or a folder" in error_of(capsys, "doctor", "--rewards", "all")

    def test_the_default_of_a_batch_is_one_number(self):
        assert RewardsConfig().batch_gb * 1e9 == REWARD_BATCH_BYTES == PublishedRewards.batch_bytes
        assert set(REWARD_BYTES) == {"hpsv3", "videoreward"}


class TestChoice:
    def settings(self, rewards: Path | None, *sets: str, device: str | None = None) -> RewardsConfig:
        overrides = cli.reward_overrides(None if rewards is None else str(rewards), device, sets)
        return load_settings(None, overrides).rewards

    def test_a_folder_is_the_papers_search_and_set_changes_it(self, rewards):
        assert published_names(self.settings(rewards)) == ("hpsv3", "videoreward")
        mixed = self.settings(rewards, "rewards.long=native", device="cpu")
        assert (mixed.short, mixed.long, mixed.device) == ("hpsv3", "native", "cpu")
        short, long = make_rewards(mixed, PromptTable(), check_choice(mixed))
        assert (short.name, long.name) == ("hpsv3", "native_long")

    @pytest.mark.parametrize("flag", ["native", "native,native"])
    def test_set_changes_one_of_two_names_by_flag(self, flag):
        config = load_settings(None, cli.reward_overrides(flag, None, ["rewards.short=mine:A"])).rewards
        assert (config.short, config.long) == ("mine:A", "native")

    def test_a_folder_that_is_not_needed_must_still_exist(self, capsys, video, tmp_path):
        argv = ("score", video, "--prompt", "x", "--set", f"rewards.dir={tmp_path / 'nothere'}")
        assert "nothere" in error_of(capsys, *argv, code=3)

    def test_eight_bits_without_the_library_are_refused_before_any_weights(self, rewards, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(BadInputError, match=r"streamt1-jax\[int8\]"):
            check_choice(self.settings(rewards, "rewards.precision=int8"))

    def test_one_model_serves_both_roles_and_is_loaded_once(self, rewards):
        config = self.settings(rewards, "rewards.short=videoreward")
        published = check_choice(config)
        assert published is not None
        make_rewards(config, PromptTable(), published)
        assert list(published._loaded) == ["videoreward"]

    def test_a_published_model_without_its_folder(self):
        with pytest.raises(BadInputError, match="streamt1 convert rewards"):
            check_choice(self.settings(None, "rewards.short=hpsv3"))

    def test_a_device_that_is_not_there(self, rewards):
        config = self.settings(rewards, device="cuda:99")
        with pytest.raises(BadInputError, match="'cuda:99' cannot be used"):
            make_rewards(config, PromptTable(), check_choice(config))

    def test_a_run_that_does_not_fit_beside_the_models(self, capsys, rewards, monkeypatch, tmp_path):
        """A GPU of 3 GB, as far as anybody asks: said before weights load."""

        class Device:
            def memory_stats(self):
                return {"bytes_limit": 1000.0}

        monkeypatch.setattr("streamt1_jax.rewards.choice.torch_device", lambda name: torch.device("cuda:0"))
        monkeypatch.setattr("streamt1_jax.rewards.choice.share_gpu", lambda *args: None)
        monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
        argv = ("generate", PROMPT, "--out", tmp_path / "a.mp4", "--rewards", rewards)
        line = error_of(capsys, *argv, code=OutOfMemoryError.exit_code)
        assert "JAX may take 0.0 GB" in line
        assert not list(tmp_path.iterdir())


MINE = """
import torch

class Warmth(torch.nn.Module):
    device = "cpu"

    def forward(self, videos, prompts):  # uint8 [n, t, H, W, 3] on the device, n prompts
        pixels = videos.float().mean((1, 2, 3)) / 255
        return pixels[:, 0] - pixels[:, 2]
"""


def test_a_users_own_torch_reward(capsys, video, tmp_path, monkeypatch):
    """The README's example, on a file."""
    (tmp_path / "my_warmth.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    argv = ("score", video, "--prompt", "x", "--set", "rewards.short=my_warmth:Warmth", "--json", "s.json")
    assert streamt1(*argv) == 0
    frames, _ = read_video(video)
    (entry,) = json.loads(Path("s.json").read_text())["videos"]
    expected = (frames[..., 0].mean() - frames[..., 2].mean()) / 255
    assert entry["scores"]["short"]["score"] == pytest.approx(expected, abs=1e-6)
    assert "my_warmth:Warmth" in capsys.readouterr().out


@pytest.mark.slow
class TestRewardsThatFailInARun:
    """FAULTS 12 and 32, with torch rewards in the real pipeline on small networks."""

    @pytest.fixture(scope="class")
    def pipe(self) -> StreamT1Pipeline:
        return StreamT1Pipeline(SmallWeights())

    def run(self, pipe: StreamT1Pipeline, score, frames: int = 5) -> list:
        """The chunks of a video whose short reward is a torch function of (videos, prompts); 5 frames are one chunk."""
        rewards = (torch_reward("mine", score, pipe.prompts, device="cpu"), "native")
        search = SearchConfig(beams=2, candidates_per_beam=1)
        return list(pipe.stream(PROMPT, frames=frames, search=search, rewards=rewards))

    def test_one_that_raises_ends_the_run_after_the_chunk_with_its_own_text(self, pipe):
        calls = []

        def score(videos, prompts):
            calls.append(prompts)
            if len(calls) > 1:
                raise RuntimeError("the judge went home")
            return videos.float().mean((1, 2, 3, 4))

        with pytest.raises(RewardError, match="'mine' failed with RuntimeError: the judge went home"):
            self.run(pipe, score, frames=11)
        assert calls == [[PROMPT] * 2] * 2  # the second chunk was the last to be asked about

    def test_a_nan_is_never_kept_beside_a_number(self, pipe):
        with pytest.warns(UserWarning, match="1 of 2 candidates of chunk"):
            chunks = self.run(pipe, lambda videos, prompts: torch.tensor([float("nan"), 1.0]))
        for chunk in chunks:
            tried = chunk.chunk.candidates
            assert [candidate.finite for candidate in tried] == [False, True]
            assert chunk.chunk.best.short == 1.0

    def test_nothing_but_nan_is_an_error(self, pipe):
        with pytest.raises(RewardError, match="no candidate of chunk 0 has finite latents and scores"):
            self.run(pipe, lambda videos, prompts: torch.full((len(prompts),), torch.nan))
