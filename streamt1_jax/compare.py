"""`streamt1 compare`: the same prompts and seeds by several methods, at an equal number of candidates a chunk.

- What is measured of a finished video: both rewards, and, for videos of the embedded model whose prompt is a sentence
  of the little world, the checks (`mini/checks.py`), which no search and no final choice ever sees.
- Prompt i has a seed of its own, the same for every method; independent videos count on from it, as the candidates of
  a search's first chunk do.
- Programs: one pair a search, whatever the prompt (`StreamT1Pipeline` keeps them).
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from streamt1_jax.compare_methods import Entry
from streamt1_jax.compare_store import Part, Result, ResultStore, file_name
from streamt1_jax.config import MAX_SEED, RunConfig
from streamt1_jax.contact_sheet import save_contact_sheet
from streamt1_jax.errors import BadInputError
from streamt1_jax.manifest import file_sha256
from streamt1_jax.measure import compilations, machine
from streamt1_jax.mini.checks import check_video
from streamt1_jax.mini.world import HEIGHT, WIDTH, Scene, parse_caption
from streamt1_jax.outputs import make_folder
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.result import Output
from streamt1_jax.rewards import Reward
from streamt1_jax.run_info import code_sha256, environment
from streamt1_jax.settings import GenerateConfig
from streamt1_jax.stream import score_video
from streamt1_jax.video import write_mp4
from streamt1_jax.weights import MiniWeights

PARTS = 6  # stretches of a video that are measured alone: 5 seconds each of a video of 30
PART_FRAMES = 64  # at least, in a stretch: in fewer, checks of size and motion mark the world's own videos down
SEED_STEP = 1_000_000  # from prompt to prompt; a chunk's seeds are 1000 apart, so 1000 chunks have seeds of their own

# (video, its prompt) to checks in [0, 1], or None where the prompt says nothing that can be checked.
Checker: TypeAlias = Callable[[UInt8[np.ndarray, "T H W 3"], str], dict[str, float] | None]


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    entries: tuple[Entry, ...]  # methods at budgets
    prompts: tuple[str, ...]
    run: RunConfig = field(default_factory=RunConfig)  # what all methods share; they set the grid and the units
    generate: GenerateConfig = field(default_factory=GenerateConfig)  # length, size, seed
    sheets: int = 0  # contact sheets of the first so many prompts
    keep_videos: bool = False

    def seed(self, prompt_index: int) -> int:
        return (self.generate.seed + prompt_index * SEED_STEP) % MAX_SEED


def compare(
    pipe: StreamT1Pipeline,
    plan: Plan,
    folder: str | Path,
    *,
    rewards: tuple[str | Reward, str | Reward] = ("default", "default"),
    checker: Checker | None = None,
    resume: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Makes and measures every video of a plan that is not yet in the folder; prompt by prompt, all methods each.

    Args:
        folder: holds the results; see `compare_store.py`.
        rewards: short and long, which search and choose, and are reported.
        checker: None: rewards alone; see `mini_checker`.
        resume: go on with what the folder holds.
        on_result: called with each result, those made earlier among them.

    Returns:
        The results of the whole plan, in its order.

    Raises:
        BadInputError: a folder that holds other results, or a bad prompt, length or seed.
        RewardError: a reward raised, or no candidate of a chunk has a finite score.
    """
    folder = Path(folder)
    runner = _Runner(pipe, plan, folder, _make_rewards(pipe, rewards), checker)
    store = ResultStore(folder, runner.settings(), resume=resume)
    results = []
    pipe.encode(plan.prompts, strict=plan.generate.strict)  # the text encoder is loaded once
    for index, prompt in enumerate(plan.prompts):
        for entry in plan.entries:
            result = store.results.get((entry.method.name, entry.budget, index, prompt))
            if result is None or not all(path.exists() for path in runner.pictures(entry, index)):
                result = runner.make(entry, index)
                store.add(result)
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def _sources_of_rewards(rewards: tuple[Reward, ...]) -> dict[str, str]:
    """Hashes of the modules that rewards of the user's own, `package.module:Name`, came from."""
    modules = {each.name: sys.modules.get(each.name.partition(":")[0]) for each in rewards if ":" in each.name}
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    return {name: file_sha256(Path(file)) for name, file in files.items() if file is not None}


def mini_checker(pipe: StreamT1Pipeline) -> Checker | None:
    """The checks of the little world; None where the weights are not the embedded model's."""
    return check_mini if isinstance(pipe.weights, MiniWeights) else None


def check_mini(video: UInt8[np.ndarray, "T H W 3"], prompt: str) -> dict[str, float] | None:
    """Every check and their mean; None for a prompt or a size of video that is not the little world's."""

    scene = checkable_scene(prompt)
    if scene is None or video.shape[1:3] != (HEIGHT, WIDTH):
        return None
    found = check_video(video, scene)
    return {"mean": found.mean, **dataclasses.asdict(found)}


def checkable_scene(prompt: str) -> Scene | None:
    """What a prompt says of the little world; None where that is nothing, or two things that cannot be told apart."""
    try:
        scene = parse_caption(prompt)
    except BadInputError:
        return None
    colours = [thing.colour for thing in scene.things]
    return scene if len(set(colours)) == len(colours) else None


def _make_rewards(pipe: StreamT1Pipeline, rewards: tuple[str | Reward, str | Reward]) -> tuple[Reward, Reward]:
    """Made once for all methods: a reward may be a big model, and programs are kept by it."""
    short, long = rewards
    return (
        short if isinstance(short, Reward) else pipe.reward(short, "short"),
        long if isinstance(long, Reward) else pipe.reward(long, "long"),
    )


@dataclass(frozen=True)
class _Runner:
    """Makes and measures one video after the other."""

    pipe: StreamT1Pipeline
    plan: Plan
    folder: Path
    rewards: tuple[Reward, Reward]
    checker: Checker | None

    def settings(self) -> dict[str, Any]:
        """All that a result depends on beside method, budget and prompt."""
        asked, ours = self.plan.generate, machine()
        return {
            "weights": self.pipe.weights.describe(),
            "dtype": jnp.dtype(self.pipe.dtype).name,
            "config": dataclasses.asdict(self.plan.run),
            "generate": dataclasses.asdict(asked),
            "rewards": {"short": self.rewards[0].name, "long": self.rewards[1].name},
            **{f"reward model {each.name}": dict(each.about) for each in self.rewards if each.about},
            **{f"code of {name}": sha256 for name, sha256 in _sources_of_rewards(self.rewards).items()},
            "checks": self.checker is not None,
            # Times are compared too.
            "machine": {key: ours[key] for key in ("device", "platform", "processor", "cpus")},
            "code": code_sha256(),
            "versions": environment()["versions"],
        }

    def pictures(self, entry: Entry, index: int) -> list[Path]:
        """Files that belong to a result: its contact sheet and its video, where asked for."""
        name = file_name(entry.method.name, entry.budget, index, self.plan.prompts[index])
        sheet, video = self.folder / "sheets" / f"{name}.png", self.folder / "videos" / f"{name}.mp4"
        return [sheet] * (index < self.plan.sheets) + [video] * self.plan.keep_videos

    def make(self, entry: Entry, index: int) -> Result:
        """One result. Of several videos the one with the best final score is it, the earlier at a tie."""
        prompt, seed = self.plan.prompts[index], self.plan.seed(index)
        best, best_seed, finals, candidates, seconds = None, seed, [], 0, 0.0
        with compilations() as compiled:
            for number in range(entry.videos):
                own_seed = (seed + number) % MAX_SEED
                out = self._generate(entry, prompt, own_seed)
                finals.append(out.trace.final_scores[out.trace.winner])
                candidates += sum(len(chunk.candidates) for chunk in out.trace.chunks)
                seconds += out.info["seconds"]["total"]
                if best is None or _ranked(finals[-1]) > max(map(_ranked, finals[:-1])):
                    best, best_seed = out, own_seed
        assert best is not None
        title = f"{entry.method.name}, {entry.budget} candidates a chunk, seed {best_seed}: {prompt}"
        for path in self.pictures(entry, index):
            self._save(best, path, title)
        scores, parts = self._measure(best, prompt)
        return Result(
            method=entry.method.name,
            budget=entry.budget,
            prompt_index=index,
            prompt=prompt,
            seed=seed,
            scores=scores,
            parts=parts,
            final_scores=finals,
            chunks=len(best.trace.chunks),
            candidates=candidates,
            seconds=seconds,
            compiled=len(compiled),
        )

    def _generate(self, entry: Entry, prompt: str, seed: int) -> Output:
        asked = self.plan.generate
        return self.pipe(
            prompt,
            seconds=asked.seconds,
            frames=asked.frames,
            seed=seed,
            height=asked.height,
            width=asked.width,
            config=dataclasses.replace(self.plan.run, search=entry.search(self.plan.run.search)),
            rewards=self.rewards,
            strict=asked.strict,
        )

    def _measure(self, out: Output, prompt: str) -> tuple[dict[str, float], list[Part]]:
        """Scores of the whole video, and of its parts alone.

        The short reward is one of short stretches, so a whole video's is the mean over its parts; the long one's is the
        final score of the search.
        """
        short, long = self.rewards
        told_short, told_long = (self.pipe.prompt_for(reward, prompt) for reward in self.rewards)
        stretches = split_video(out.frames)
        lengths = [len(stretch) for stretch in stretches]
        parts, end = [], 0
        for stretch in stretches:
            scores = {
                "reward.short": score_video(short, stretch, told_short),
                "reward.long": score_video(long, stretch, told_long),
                **self._check(stretch, prompt),
            }
            end += len(stretch)
            parts.append(Part((end - len(stretch)) / out.fps, end / out.fps, scores))
        for reward in self.rewards:
            reward.raise_if_failed()
        whole = {
            "reward.short": float(np.average([part.scores["reward.short"] for part in parts], weights=lengths)),
            "reward.long": out.trace.final_scores[out.trace.winner],
        }
        return whole | self._check(out.frames, prompt), parts

    def _check(self, video: UInt8[np.ndarray, "T H W 3"], prompt: str) -> dict[str, float]:
        found = self.checker(video, prompt) if self.checker is not None else None
        return {f"check.{name}": float(value) for name, value in (found or {}).items()}

    def _save(self, out: Output, path: Path, title: str) -> None:
        make_folder(path.parent)
        if path.suffix == ".png":
            save_contact_sheet(out.frames, path, title=title)
        else:
            write_mp4(path, out.frames, fps=out.fps)


def split_video(frames: UInt8[np.ndarray, "T H W 3"]) -> list[UInt8[np.ndarray, "t H W 3"]]:
    """At most `PARTS` stretches, about equally long."""
    return np.array_split(frames, min(max(len(frames) // PART_FRAMES, 1), PARTS))


def _ranked(score: float) -> float:
    """A score as the final choice sees it: one that is not finite loses to any other."""
    return score if math.isfinite(score) else -math.inf
