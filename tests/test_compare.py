"""`streamt1 compare`: what each method spends, how results are kept and resumed, and what its report says.

Most tests use a made-up pipeline, whose videos and scores follow from their seeds.
"""

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_equal
from fake_search import fake_trace
from PIL import Image
from small import SmallWeights

import streamt1_jax
from streamt1_jax import cli, compare_report, run_info
from streamt1_jax.compare import Plan, check_mini, checkable_scene, compare, mini_checker, split_video
from streamt1_jax.compare_methods import METHODS, entries_of
from streamt1_jax.compare_report import comparison_table, save_drift_plot, save_quality_plot
from streamt1_jax.compare_stats import interval, summarize
from streamt1_jax.compare_store import Part, Result, ResultStore
from streamt1_jax.config import MAX_SEED, RunConfig, SearchConfig
from streamt1_jax.contact_sheet import save_contact_sheet
from streamt1_jax.errors import BadInputError
from streamt1_jax.measure import machine
from streamt1_jax.mini import shipped, world
from streamt1_jax.outputs import short_hash
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.result import Output
from streamt1_jax.rewards import OK, PromptTable, Reward, Verdict
from streamt1_jax.rewards.registry import load_reward
from streamt1_jax.run_info import code_sha256
from streamt1_jax.settings import GenerateConfig
from streamt1_jax.video import read_video

PROMPTS = ("a red circle moves right", "two dots")
FOUR = ("longlive", "best_of_n", "beam", "stream_t1")


def _brightness(videos, num_frames, prompt_index):
    valid = jnp.arange(videos.shape[1]) < num_frames[:, None]
    each = videos.astype(jnp.float32).mean(axis=(2, 3, 4)) / 255
    scores = jnp.where(valid, each, 0.0).sum(axis=1) / num_frames.astype(jnp.float32)
    return Verdict(scores, jnp.full(scores.shape, OK))


REWARDS = tuple(Reward(name, _brightness, "uint8", "jax") for name in ("bright", "long_bright"))


class FakeWeights(SmallWeights):
    def describe(self) -> dict[str, Any]:
        return {"name": "fake"}


class FakePipeline(StreamT1Pipeline):
    """A video of 28 frames is as bright as its seed says; so is its final score, but for the seeds in `finals`."""

    def __init__(self, finals: dict[int, float] | None = None):
        self.weights, self.dtype, self.prompts = FakeWeights(), jnp.float32, PromptTable()
        self.finals, self.calls = finals or {}, []

    def encode(self, prompts, *, strict=False):
        return []

    def __call__(self, prompt, *, seed, config, rewards, **settings):
        self.calls.append((prompt, seed, config.search))
        beams, each = config.search.grid
        level = seed % 200
        final = self.finals.get(seed, level / 255)
        trace = dataclasses.replace(fake_trace(3, beams, each), final_scores=(final,) + (-1.0,) * (beams - 1))
        frames = np.full((28, 16, 24, 3), level, np.uint8)
        return Output(frames, np.zeros((1, 1, 1, 1), np.float32), trace, 16, {"seconds": {"total": 0.5}})


def fake_checks(video, prompt) -> dict[str, float] | None:
    """As `check_mini`: the darker, the better; nothing is to be said of other prompts."""
    return {"mean": 1 - float(video.mean()) / 255} if prompt == PROMPTS[0] else None


def plan_of(methods=FOUR, budgets=(4,), prompts=PROMPTS, **settings) -> Plan:
    return Plan(entries_of(methods, budgets), prompts, **settings)


def compare_fakes(folder, plan, pipe=None, **options) -> list[Result]:
    return compare(pipe or FakePipeline(), plan, folder, rewards=REWARDS, checker=fake_checks, **options)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# Methods


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [1, 2, 4, 8])
def test_every_method_tries_as_many_candidates_a_chunk(name, budget):
    (entry,) = entries_of([name], [budget])
    beams, each = entry.search(SearchConfig()).grid
    assert beams * each * entry.videos == (1 if name == "longlive" else budget)


def test_the_methods_are_the_published_ones():
    longlive, best_of_n, beam, stream_t1 = (entry.search(SearchConfig()) for entry in entries_of(FOUR, [4]))
    assert longlive == best_of_n == SearchConfig.longlive()
    assert stream_t1 == SearchConfig()
    assert beam == SearchConfig(noise_propagation=False, sinking=False)


def test_an_ablation_differs_from_stream_t1_in_one_unit():
    names = ("stream_t1-noise", "stream_t1-sinking", "stream_t1-pruning")
    noise, sinking, pruning = (entry.search(SearchConfig()) for entry in entries_of(names, [4]))
    assert noise == SearchConfig(noise_propagation=False)
    assert sinking == SearchConfig(sinking=False)
    assert pruning == SearchConfig(beams=1, candidates_per_beam=1)


def test_methods_keep_every_other_setting():
    base = SearchConfig(long_threshold=0.7, beams=3)
    for entry in entries_of(list(METHODS), [4]):
        assert entry.search(base).long_threshold == 0.7


def test_one_candidate_comes_once_and_budgets_rise():
    entries = entries_of(FOUR, [8, 2, 2])
    assert [(entry.method.name, entry.budget) for entry in entries] == [
        ("longlive", 1),
        *((name, budget) for budget in (2, 8) for name in FOUR[1:]),
    ]


# Runs


def test_all_methods_share_prompts_and_seeds(tmp_path):
    pipe = FakePipeline()
    results = compare_fakes(tmp_path, plan_of(), pipe)
    assert [(r.method, r.prompt_index) for r in results] == [(name, i) for i in range(2) for name in FOUR]
    assert {r.seed for r in results if r.prompt_index == 0} == {42}
    assert {r.seed for r in results if r.prompt_index == 1} == {1_000_042}
    seeds = [seed for prompt, seed, _ in pipe.calls if prompt == PROMPTS[0]]
    assert seeds == [42, 42, 43, 44, 45, 42, 42], "longlive, four videos of best of N, beam, stream_t1"


def test_costs_are_counted(tmp_path):
    for result in compare_fakes(tmp_path, plan_of(budgets=(2, 4))):
        assert result.candidates == 3 * result.budget
        assert result.seconds == (0.5 * result.budget if result.method == "best_of_n" else 0.5)


def test_seeds_wrap(tmp_path):
    pipe = FakePipeline()
    plan = plan_of(("best_of_n",), (2,), PROMPTS[:1], generate=GenerateConfig(seed=MAX_SEED - 1))
    compare_fakes(tmp_path, plan, pipe)
    assert [seed for _, seed, _ in pipe.calls] == [MAX_SEED - 1, 0]


@pytest.mark.parametrize(
    ("finals", "winner"),
    [
        ({}, 45),  # the brightest; the checks would have chosen the darkest
        ({43: 0.9}, 43),
        ({42: math.nan, 43: 0.9, 44: 0.9, 45: math.nan}, 43),  # the earlier at a tie
        ({45: math.inf}, 44),
        (dict.fromkeys(range(42, 46), math.nan), 42),
    ],
)
def test_the_best_of_n_is_chosen_by_the_final_score_alone(tmp_path, finals, winner):
    (result,) = compare_fakes(tmp_path, plan_of(("best_of_n",), prompts=PROMPTS[:1]), FakePipeline(finals))
    assert_close("brightness", result.scores["reward.short"], winner / 255, 1e-6)
    assert_equal("final scores", result.final_scores, [finals.get(seed, seed / 255) for seed in range(42, 46)])


def test_results_by_an_edited_reward_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, plan = tmp_path / "edited_rewards.py", plan_of(("longlive",), prompts=PROMPTS[:1])
    module.write_text("def level(video, prompt):\n    return float(video.mean())\n")
    pipe = FakePipeline()
    reward = load_reward("edited_rewards:level", pipe.prompts)
    options = {"rewards": (reward, reward), "resume": True}
    for _ in range(2):
        compare(pipe, plan, tmp_path / "out", **options)
    with module.open("a") as file:
        file.write("# of another version\n")
    with pytest.raises(BadInputError, match="another code of edited_rewards:level"):
        compare(pipe, plan, tmp_path / "out", **options)


def test_a_video_is_measured_whole_and_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("streamt1_jax.compare.PART_FRAMES", 14)
    checked, unchecked = compare_fakes(tmp_path, plan_of(("longlive",)), FakePipeline({42: 0.75}))
    assert set(checked.scores) == {"reward.short", "reward.long", "check.mean"}
    assert set(unchecked.scores) == {"reward.short", "reward.long"}
    assert checked.scores["reward.long"] == 0.75
    assert_close("check", checked.scores["check.mean"], 1 - 42 / 255, 1e-6)
    assert [(part.start, part.end) for part in checked.parts] == [(0, 14 / 16), (14 / 16, 28 / 16)]
    for part in checked.parts:
        assert_close("long reward of a part", part.scores["reward.long"], 42 / 255, 1e-6)


@pytest.mark.parametrize(("frames", "parts"), [(9, 1), (81, 1), (127, 1), (128, 2), (477, 6)])
def test_parts_are_about_equally_long(frames, parts):
    lengths = [len(part) for part in split_video(np.zeros((frames, 1, 1, 3), np.uint8))]
    assert len(lengths) == parts
    assert sum(lengths) == frames
    assert max(lengths) - min(lengths) <= 1


# Stop and resume


def test_a_stopped_comparison_goes_on(tmp_path):
    plan, seen = plan_of(), []

    def stop(result):
        seen.append(result)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_fakes(tmp_path / "stopped", plan, on_result=stop)
    with (tmp_path / "stopped" / "results.jsonl").open("a") as file:
        file.write('{"method": "stre')  # the line that was being written
    pipe = FakePipeline()
    resumed = compare_fakes(tmp_path / "stopped", plan, pipe, resume=True)
    whole = compare_fakes(tmp_path / "whole", plan)
    assert [r.to_json() | {"compiled": 0} for r in resumed] == [r.to_json() | {"compiled": 0} for r in whole]
    assert len(pipe.calls) == 1 + 7, "stream_t1 of the first prompt, all of the second"
    assert len(lines(tmp_path / "stopped")) == 8


def test_a_comparison_grows(tmp_path):
    compare_fakes(tmp_path, plan_of(prompts=PROMPTS[:1]))
    pipe = FakePipeline()
    results = compare_fakes(tmp_path, plan_of(budgets=(2, 4)), pipe, resume=True)
    assert len(results) == 2 * 7
    assert len([prompt for prompt, *_ in pipe.calls if prompt == PROMPTS[0]]) == 2 + 1 + 1, "a budget of 2 alone"


def test_another_prompt_is_another_result_with_another_sheet(tmp_path):
    compare_fakes(tmp_path, plan_of(("longlive",), sheets=1))
    sheets = {path: path.read_bytes() for path in (tmp_path / "sheets").iterdir()}
    pipe = FakePipeline()
    other = plan_of(("longlive",), prompts=("a third one", PROMPTS[1]), sheets=1)
    compare_fakes(tmp_path, other, pipe, resume=True)
    assert [prompt for prompt, *_ in pipe.calls] == ["a third one"]
    compare_fakes(tmp_path, plan_of(("longlive",), sheets=1), pipe, resume=True)
    assert len(pipe.calls) == 1, "the first prompt's is there still"
    assert len(list((tmp_path / "sheets").iterdir())) == 2
    assert all(path.read_bytes() == data for path, data in sheets.items())


@pytest.mark.parametrize("changed", ["code_sha256", "machine"])
def test_results_of_other_code_or_another_machine_are_not_mixed(tmp_path, monkeypatch, changed):
    plan = plan_of(("longlive",))
    compare_fakes(tmp_path, plan)
    other = {"code_sha256": "1234", "machine": machine() | {"cpus": 1234}}
    monkeypatch.setattr(f"streamt1_jax.compare.{changed}", lambda: other[changed])
    with pytest.raises(BadInputError, match="made with another " + changed.removesuffix("_sha256")):
        compare_fakes(tmp_path, plan, resume=True)


def test_any_change_of_a_source_file_is_another_code(tmp_path, monkeypatch):
    monkeypatch.setattr(run_info, "__file__", str(tmp_path / "run_info.py"))
    (tmp_path / "mini").mkdir()
    module = tmp_path / "mini" / "checks.py"
    module.write_text("a = 1")
    found = [code_sha256.__wrapped__() for _ in range(2)]
    module.write_text("a = 2")
    found.append(code_sha256.__wrapped__())
    module.rename(tmp_path / "checks.py")
    found.append(code_sha256.__wrapped__())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_results_are_not_mixed_or_overwritten(tmp_path):
    compare_fakes(tmp_path, plan_of(("longlive",)))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(BadInputError, match="holds results already: go on with --resume"):
        compare_fakes(tmp_path, plan_of(("longlive",)))
    other = plan_of(("beam",), run=RunConfig(search=SearchConfig(long_threshold=math.inf)))
    with pytest.raises(BadInputError, match="made with another config"):
        compare_fakes(tmp_path, other, resume=True)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_setting_without_a_number_in_json_can_be_resumed(tmp_path):
    plan = plan_of(("longlive",), run=RunConfig(search=SearchConfig(long_threshold=math.inf)))
    compare_fakes(tmp_path, plan)
    pipe = FakePipeline()
    compare_fakes(tmp_path, plan, pipe, resume=True)
    assert pipe.calls == []


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}"])
def test_a_broken_line_is_named(tmp_path, line):
    compare_fakes(tmp_path, plan_of(("longlive",)))
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(BadInputError, match="line 1 is no result"):
        compare_fakes(tmp_path, plan_of(("longlive",)), resume=True)


def test_numbers_that_are_not_finite_survive_the_file(tmp_path):
    score = {"reward.long": math.nan, "reward.short": 0.5}
    parts = [Part(0.0, 1.0, dict(score))]
    result = Result("beam", 4, 0, "line\u2028separator", 1, score, parts, [math.nan, 1.0], 3, 12, 1.0, 0)
    ResultStore(tmp_path, {}, resume=False).add(result)
    (found,) = ResultStore(tmp_path, {}, resume=True).results.values()
    assert repr(found) == repr(result)
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()


def test_sheets_and_videos_are_kept_where_asked_for(tmp_path):
    compare_fakes(tmp_path, plan_of(("longlive", "best_of_n"), (2,)))
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "results.jsonl"}
    plan = plan_of(("longlive", "best_of_n"), (2,), sheets=1, keep_videos=True)
    compare_fakes(tmp_path, plan, resume=True)  # what was made without them is made again
    sheets, videos = ({path.name for path in (tmp_path / name).iterdir()} for name in ("sheets", "videos"))
    first, second = map(short_hash, PROMPTS)
    assert sheets == {f"000-longlive-1-{first}.png", f"000-best_of_n-2-{first}.png"}
    numbered = (("000", first), ("001", second))
    assert videos == {f"{i}-{name}-{of}.mp4" for i, of in numbered for name in ("longlive-1", "best_of_n-2")}
    frames, rate = read_video(tmp_path / "videos" / f"000-best_of_n-2-{first}.mp4")
    assert (len(frames), rate) == (28, 16)
    assert abs(int(np.median(frames)) - 43) <= 2, "the video of the better seed"


def test_a_contact_sheet_shows_every_eighth_frame(tmp_path):
    frames = np.broadcast_to(np.arange(81, dtype=np.uint8)[:, None, None, None], (81, 80, 128, 3))
    save_contact_sheet(np.ascontiguousarray(frames), tmp_path / "sheet.png", title="a title")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    middles = sheet[20 + 2 + 40, 2 + 64 :: 130, 0]
    assert middles.tolist() == list(range(0, 81, 8))
    assert sheet[:20].min() < 100, "the title"


# Checks


def test_only_sentences_of_the_world_are_checked():
    assert checkable_scene("a red circle moves right") == world.parse_caption("a red circle moves right")
    assert checkable_scene("a corgi surfs a wave") is None
    assert checkable_scene("a red circle spins and a red square spins") is None, "they cannot be told apart"
    assert check_mini(np.zeros((9, 80, 128, 3), np.uint8), "a corgi surfs a wave") is None
    assert check_mini(np.zeros((9, 96, 128, 3), np.uint8), "a red circle moves right") is None, "of another size"


def test_the_embedded_models_videos_are_checked_and_no_others(tmp_path):
    for name in (shipped.TENSORS, shipped.MANIFEST):
        (tmp_path / name).write_bytes((shipped.FOLDER / name).read_bytes())
    for ours in ("mini", tmp_path):  # what ships, and what `streamt1 train-mini` wrote
        assert mini_checker(StreamT1Pipeline.from_pretrained(ours)) is check_mini
    assert mini_checker(FakePipeline()) is None


def test_the_checks_of_the_world_are_all_reported():
    """A red disc on black, 1.6 pixels to the right a frame."""
    video = np.full((21, 80, 128, 3), 12, np.uint8)
    y, x = np.mgrid[:80, :128] + 0.5
    for frame, picture in enumerate(video):
        picture[np.hypot(x - 40 - 1.6 * frame, y - 40) < 0.9 * 13] = (220, 40, 40)
    checks = check_mini(video, "a red circle moves right")
    assert checks is not None
    assert {"mean", "colour", "shape", "direction", "number"} <= set(checks)
    assert all(isinstance(value, float) for value in checks.values())
    assert min(checks["mean"], checks["colour"], checks["direction"]) > 0.9, checks


@pytest.mark.slow
def test_the_command_checks_the_embedded_models_videos(tmp_path, capsys):
    argv = ["compare", "--methods", "longlive", "--prompts", "1", "--frames", "9", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--keep-videos"]) == 0
    assert "check.shape" in capsys.readouterr().out
    (line,) = lines(tmp_path / "out")
    (path,) = (tmp_path / "out" / "videos").iterdir()
    told = check_mini(read_video(path)[0], line["prompt"])
    assert told is not None
    for name in ("colour", "number", "background"):  # which compression hardly changes
        assert_close(name, line["scores"][f"check.{name}"], told[name], 0.05)
    empty = check_mini(np.full((9, 80, 128, 3), 12, np.uint8), line["prompt"])
    assert empty is not None
    assert line["scores"]["check.mean"] > empty["mean"] + 0.2


# Statistics


def results_of(scores: dict[str, list[float]], **values) -> list[Result]:
    """A result a method and prompt, with one score that is also the check of prompts with an even number."""
    made = []
    for name, column in scores.items():
        for index, value in enumerate(column):
            score = {"reward.long": value} | ({"check.mean": value} if index % 2 == 0 else {})
            parts = [Part(5.0 * i, 5.0 * i + 5, {key: v - i for key, v in score.items()}) for i in range(3)]
            budget = 1 if name == "longlive" else 4
            made.append(Result(name, budget, index, f"prompt {index}", index, score, parts, [value], 3, 12, 2.0, 0))
    return [dataclasses.replace(result, **values) for result in made]


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [interval(list(rng.standard_normal(64) + 3)) for _ in range(150)]
    inside = np.mean([score["low"] <= 3 <= score["high"] for score in found])
    assert 0.88 <= inside <= 0.99
    widths = [score["high"] - score["low"] for score in found]
    assert_close("mean width", np.mean(widths), 2 * 1.96 / 8, 0.03)


def test_few_prompts_have_a_mean_and_no_interval():
    assert interval([1.0, 2.0]) == {"mean": 1.5, "low": None, "high": None, "prompts": 2}


def test_differences_are_taken_prompt_by_prompt():
    """Prompts differ far more than methods: each method's interval is wide, that of the difference is not."""
    prompts = [float(10 * i) for i in range(12)]
    scores = {"longlive": prompts, "stream_t1": [value + 0.5 for value in prompts]}
    summary = summarize(results_of(scores), entries_of(list(scores), [4]))
    (difference,) = summary["differences"]
    assert (difference["method"], difference["budget"], difference["reference_budget"]) == ("longlive", 1, 4)
    found = difference["scores"]["reward.long"]
    assert_close("difference", [found["mean"], found["low"], found["high"]], [0.5] * 3, 1e-12)
    own = summary["entries"][0]["scores"]["reward.long"]
    assert own["high"] - own["low"] > 10


@pytest.mark.parametrize("names", [("longlive", "beam", "stream_t1"), ("stream_t1", "longlive", "beam")])
def test_any_two_methods_are_compared_whatever_their_order(names):
    levels = {"longlive": 1.0, "beam": 2.0, "stream_t1": 4.0}
    pairs = summarize(results_of({name: [levels[name]] * 9 for name in names}), entries_of(names, [4]))["pairs"]
    assert len(pairs) == 3
    for pair in pairs:
        (score,) = pair["score"].values()
        assert score["mean"] == levels[pair["method"]] - levels[pair["less"]]
    assert {pair["less"] for pair in pairs if "longlive" in pair.values()} == {"longlive"}


def test_a_summary_counts_prompts_that_were_checked():
    summary = summarize(results_of({"longlive": [1.0] * 9, "beam": [2.0] * 9}), entries_of(["longlive", "beam"], [4]))
    assert (summary["prompts"], summary["checked"]) == (9, 5)
    assert summary["entries"][0]["scores"]["check.mean"]["prompts"] == 5
    assert summary["entries"][0]["scores"]["reward.long"]["prompts"] == 9
    assert summary["differences"] == [], "there is no stream_t1 to compare with"
    by_prompt = summary["entries"][1]["by_prompt"]
    assert by_prompt == {"reward.long": [2.0] * 9, "check.mean": [2.0, None] * 4 + [2.0]}
    assert summary["texts"] == [f"prompt {index}" for index in range(9)]
    drift = summary["entries"][1]["drift"]
    assert [(part["start"], part["scores"]["reward.long"]["mean"]) for part in drift] == [(0, 2), (5, 1), (10, 0)]


def test_seconds_leave_out_what_compiled():
    results = results_of({"beam": [1.0] * 8})
    results[0] = dataclasses.replace(results[0], compiled=2, seconds=100.0)
    (entry,) = summarize(results, entries_of(["beam"], [4]))["entries"]
    assert (entry["seconds"], entry["seconds_of"]) == (2.0, 7)
    (entry,) = summarize(results[:1], entries_of(["beam"], [4]))["entries"]
    assert (entry["seconds"], entry["seconds_of"]) == (100.0, 0)


# The report


@pytest.fixture
def summary():
    levels = {"longlive": 0.25, "best_of_n": 0.5, "beam": 0.75, "stream_t1": 0.75}
    return summarize(results_of({name: [level] * 10 for name, level in levels.items()}), entries_of(FOUR, [4]))


def test_the_table_says_what_it_holds(summary):
    table = comparison_table(summary)
    assert table.startswith("10 prompts, 5 of them checked, the others say nothing that can be checked: rewards only.")
    assert "### 4 candidates a chunk" in table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    scores, costs, differences = (
        next(row for row in rows if row[0].startswith(start)) for start in ("mean [", "method", "stream_t1 less")
    )
    assert scores[1:] == list(FOUR)
    assert differences[1:] == list(FOUR[:3])
    assert ["reward.long", *(f"{x:.3f} [{x:.3f}, {x:.3f}]" for x in (0.25, 0.5, 0.75, 0.75))] in rows
    assert ["reward.long", "+0.500 [+0.500, +0.500] *", "+0.250 [+0.250, +0.250] *", "+0.000 [+0.000, +0.000]"] in rows
    assert costs[2:] == ["candidates a chunk", "seconds a result", "measured on"]
    assert ["beam", "reward pruning alone", "4", "2.00", "10 results"] in rows
    (drift,) = [row for row in rows if row[0].startswith("last stretch")]
    assert drift[1:] == list(FOUR)
    assert ["reward.long", *["-2.000 [-2.000, -2.000] *"] * 4] in rows, "each of the three stretches loses one"


@pytest.mark.parametrize(
    ("prompts", "said"), [((PROMPTS[0],), "all of them checked"), ((PROMPTS[1],), "rewards only: none of these videos")]
)
def test_the_table_says_whether_there_were_checks(tmp_path, prompts, said):
    plan = plan_of(("longlive",), prompts=prompts)
    table = comparison_table(summarize(compare_fakes(tmp_path, plan), plan.entries))
    assert said in table
    assert ("check.mean" in table) == (prompts[0] == PROMPTS[0])
    assert "### 1 candidate a chunk" in table


def test_every_budget_has_its_table_and_its_differences(tmp_path):
    plan = plan_of(budgets=(1, 2, 8))
    table = comparison_table(summarize(compare_fakes(tmp_path, plan), plan.entries))
    for budget in ("1 candidate", "2 candidates", "8 candidates"):
        assert f"### {budget} a chunk" in table
    assert table.count("stream_t1 less") == 3
    heads = [line.split("|")[2:-1] for line in table.splitlines() if line.startswith("| mean")]
    assert [[name.strip() for name in head] for head in heads] == [list(FOUR)] * 3


@pytest.mark.parametrize(("count", "intervals"), [(3, False), (16, True)])
def test_the_plots_are_drawn_with_and_without_intervals(tmp_path, monkeypatch, count, intervals):
    names, drawn, write = list(METHODS), [], compare_report._save
    monkeypatch.setattr(compare_report, "_save", lambda *args: drawn.append(args[1]) or write(*args))
    values = np.linspace(0.2, 0.8, count).tolist()
    summary = summarize(results_of(dict.fromkeys(names, values)), entries_of(names, [4]))
    for save in (save_quality_plot, save_drift_plot):
        path = tmp_path / f"{save.__name__}.png"
        save(summary, path)
        assert list(drawn[-1]) == summary["metrics"]
        for metric, axes in drawn[-1].items():
            assert set(names) <= {line.get_label() for line in axes.lines}, metric
            heights = [each.get_datalim(axes.transData).height for each in axes.collections]
            assert len(heights) == (len(names) if intervals else 0), metric
            assert all(height > 0.1 for height in heights), metric
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.shape[0] > 300
        assert picture.shape[1] > 800
        for level in ((213, 94, 0), (0, 158, 115)):  # stream_t1, stream_t1-pruning
            assert (picture == level).all(axis=-1).any()


# The command


def streamt1(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["compare", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--methods best_of_m", "did you mean 'best_of_n'"),
        ("--methods ,", "expected some of longlive"),
        ("--budget four", "--budget is 'four'"),
        ("--budget 0", "at least 1"),
        ("--budget 200", "1 to 100"),
        ("--prompts 0", "--prompts is 0, expected at least 1"),
        ("--prompts many", "invalid int value"),
        ("--sheets -1", "--sheets is -1, expected at least 0"),
        ("--prompts 4 --prompts-file some.txt", "not allowed with"),
        ("--captions-seed 3 --prompts-file some.txt", "leave one out"),
        ("--captions-seed -1", "--captions-seed is -1, expected at least 0"),
        ("--prompts-file missing.txt", "missing.txt"),
        ("--prompts-file switching.txt", "has @TIME lines below 'a red circle spins'"),
        ("--seconds 5 --frames 81", "not allowed with"),
        ("--frames 80", "69 and 81"),
        ("--seed -1", "seed is -1"),
        ("--set search.beams=3", "what the methods differ in"),
        ("--set search.beems=3", "the closest is"),
        ("--checkpoint elsewhere", "without --prompts-file"),
        ("--out taken", "holds results already"),
        ("--out file", "is no folder"),
    ],
)
def test_bad_arguments_are_refused(options, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "switching.txt").write_text("a red circle spins\n@5s a blue square spins\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.jsonl").write_text("")
    code, out, err = streamt1(capsys, *options.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The made-up pipeline in place of the real one, and a folder to work in."""
    made = FakePipeline()
    monkeypatch.setattr(FakePipeline, "from_pretrained", classmethod(lambda cls, name, **options: made))
    monkeypatch.setitem(vars(streamt1_jax), "StreamT1Pipeline", FakePipeline)
    monkeypatch.chdir(tmp_path)
    return made


def test_the_command_takes_captions_that_were_held_out(capsys, fake, tmp_path):
    code, out, err = streamt1(capsys, "--prompts", 9, "--methods", "longlive,stream_t1", "--budget", "2,4")
    assert (code, err) == (0, "")
    captions = [scene.caption() for scene in world.held_out_scenes(9)]
    assert list(dict.fromkeys(prompt for prompt, *_ in fake.calls)) == captions
    written = {path.name for path in (tmp_path / "comparison").iterdir()}
    assert written == {"settings.json", "results.jsonl", "summary.json", "table.md", "quality.png", "drift.png"}
    assert out.startswith((tmp_path / "comparison" / "table.md").read_text().rstrip())
    summary = json.loads((tmp_path / "comparison" / "summary.json").read_text())
    assert summary["prompts"] == 9
    assert summary["checked"] == 0, "the made-up weights are not the embedded model's"
    assert [(entry["method"], entry["budget"]) for entry in summary["entries"]] == [
        ("longlive", 1),
        ("stream_t1", 2),
        ("stream_t1", 4),
    ]
    assert {"device", "cpus", "jax"} <= set(summary["machine"])


def test_a_seed_draws_other_captions(capsys, fake):
    code, _, err = streamt1(capsys, "--prompts", 3, "--methods", "longlive", "--captions-seed", 5)
    assert (code, err) == (0, "")
    assert [prompt for prompt, *_ in fake.calls] == [scene.caption() for scene in world.held_out_scenes(3, seed=5)]


def test_an_interrupted_command_says_how_to_go_on(capsys, fake, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    argv = ("--prompts-file", "prompts.txt", "--methods", "longlive,beam", "--out", "here")
    make = FakePipeline.__call__

    def stop_at_the_third(self, *args, **settings):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return make(self, *args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(FakePipeline, "__call__", stop_at_the_third)
        code, out, err = streamt1(capsys, *argv)
    assert (code, out) == (130, "")
    assert "interrupted" in err
    assert len(lines(tmp_path / "here")) == 2
    code, out, err = streamt1(capsys, *argv, "--resume")
    assert (code, err) == (0, "")
    assert len(fake.calls) == 4


# The real pipeline


@pytest.fixture(scope="module")
def pipe() -> StreamT1Pipeline:
    return StreamT1Pipeline(SmallWeights())


@pytest.mark.slow
def test_no_prompt_after_the_first_compiles(pipe, tmp_path, compile_count):
    """17 frames are three chunks of the small model."""
    run = RunConfig(search=SearchConfig(max_sink_size=6))
    settings = {"run": run, "generate": GenerateConfig(frames=17)}
    names = ("longlive", "best_of_n", "stream_t1")
    compare(pipe, plan_of(names, (2,), PROMPTS[:1], **settings), tmp_path)
    before = compile_count.value
    plan = plan_of(names, (2,), (*PROMPTS, "a third prompt"), **settings)
    results = compare(pipe, plan, tmp_path, resume=True)
    assert compile_count.value == before, "something was compiled anew"
    assert [result.compiled for result in results[3:]] == [0] * 6
    assert all(result.compiled > 0 for result in results[:3:2]), "best_of_n runs longlive's programs"
    assert results[1].compiled == 0
    assert [result.candidates for result in results[:3]] == [3, 6, 6]
    out = pipe(
        PROMPTS[0], frames=17, seed=42, config=dataclasses.replace(run, search=plan.entries[2].search(run.search))
    )
    assert out.trace.final_scores[out.trace.winner] == results[2].scores["reward.long"]
    longlive, best = results[0], results[1]
    assert best.final_scores[0] == longlive.scores["reward.long"], "its first video is longlive's"
    assert best.scores["reward.long"] == max(best.final_scores)
