"""`streamt1 score`: what rewards say of finished videos, as a table and as JSON."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import SOFTWARE, json_output, write_json
from streamt1_jax.settings import RewardsConfig, load_settings

if TYPE_CHECKING:
    from streamt1_jax.rewards import Reward

PER_LINE = 9  # numbers of frames on a line


def reward_overrides(rewards: str | None, device: str | None, sets: Sequence[str]) -> list[str]:
    """`--set` texts with those of `--rewards` and `--reward-device`. A folder is the search of the paper, or the
    embedded model's rewards; whatever `--rewards` names, `--set` may still change one of the two."""
    texts: list[str] = []
    if rewards is not None and os.path.isdir(rewards):
        from streamt1_jax.mini.shipped import is_mini

        short, long = ("mini", "mini") if is_mini(rewards) else ("hpsv3", "videoreward")
        texts = [f"rewards.dir={rewards}", f"rewards.short={short}", f"rewards.long={long}"]
    elif rewards is not None:
        short, _, long = rewards.partition(",")
        texts = [f"rewards.short={short}", f"rewards.long={long or short}"]
    return [*texts, *sets, *([] if device is None else [f"rewards.device={device}"])]


def add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="what rewards say of finished videos",
        description="Negative scores are normal. Frame rate and number of frames move them: both are shown.",
    )
    add = parser.add_argument
    add("videos", nargs="+", metavar="VIDEO", help="video files")
    add("--prompt", action="append", required=True, help="what they show; once for all of them, or once for each")
    add("--rewards", metavar="DIR|SHORT[,LONG]", help="as in generate (default: native)")
    add("--reward-device", metavar="DEVICE", help="as in generate")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in generate, of rewards alone")
    add("--fps", type=float, help="frames a second (default: as the file says)")
    add("--json", metavar="FILE", help="write everything here too: every frame's score, raw and normalised values")
    add("--overwrite", action="store_true", help="replace an earlier JSON file of that name")
    parser.set_defaults(run=_run_score)


def _run_score(args: argparse.Namespace) -> int:
    from streamt1_jax.text import check_prompt
    from streamt1_jax.video import read_video

    settings = load_settings(None, reward_overrides(args.rewards, args.reward_device, args.set)).rewards
    prompts = [check_prompt(prompt) for prompt in args.prompt]
    if len(prompts) not in (1, len(args.videos)):
        raise BadInputError(
            f"{len(prompts)} prompts came for {len(args.videos)} videos, expected one for all or one for each: give "
            "--prompt once, or once a video"
        )
    if args.fps is not None and not 0 < args.fps < 1e6:
        raise BadInputError(f"--fps is {args.fps}, expected a number above 0: try 16")
    if args.json:
        json_output(args.json, overwrite=args.overwrite)
    films = [read_video(path) for path in args.videos]  # all of them, before any model loads
    for path, (frames, _) in zip(args.videos, films, strict=True):
        if len(frames) < 2:
            raise BadInputError(f"{path} has 1 frame, expected a video of at least 2: give another file")
    rewards = _rewards(settings)
    report: list[dict[str, Any]] = []
    for path, (frames, rate), prompt in zip(
        args.videos, films, prompts * (len(films) if len(prompts) == 1 else 1), strict=True
    ):
        report.append(_score(rewards, path, frames, args.fps or rate, prompt, given=args.fps is not None))
        print(_table(report[-1]), flush=True)
    if args.json:
        models = {role: _about(reward) for role, (reward, _) in rewards.items()}
        write_json(args.json, {"software": SOFTWARE, "models": models, "videos": report}, overwrite=args.overwrite)
    return 0


def _about(reward: "Reward") -> dict[str, Any]:
    """What is known of a reward, without the frame rate of a run: here each video has its own."""
    return {key: value for key, value in reward.about.items() if key != "fps"} or {"name": reward.name}


def _rewards(settings: RewardsConfig) -> dict[str, tuple["Reward", Any]]:
    """The reward of each role and the table of prompts that it reads."""
    from streamt1_jax.rewards import PromptTable
    from streamt1_jax.rewards.choice import check_choice, make_rewards

    prompts = PromptTable()
    made = make_rewards(settings, prompts, check_choice(settings))
    return {role: (reward, prompts) for role, reward in zip(("short", "long"), made, strict=True)}


def _score(
    rewards: dict[str, tuple["Reward", Any]], path: str, frames: Any, fps: float, prompt: str, *, given: bool
) -> dict[str, Any]:
    """Everything the rewards say of one video."""
    import jax.numpy as jnp

    from streamt1_jax.mini.rewards import read_prompt
    from streamt1_jax.stream import score_video

    said: dict[str, Any] = {}
    for role, (reward, prompts) in rewards.items():
        if reward.explain is not None:
            said[role] = {"name": reward.name, **reward.explain(frames, prompt, fps)}
            continue
        told = reward.prompt_of(jnp.int32(prompts.add(prompt)), read_prompt(prompt))
        score = score_video(reward, frames, told)
        reward.raise_if_failed()
        said[role] = {"name": reward.name, "score": score, "frames_used": len(frames), "fps": fps}
    height, width = frames.shape[1:3]
    return {
        "video": path,
        "prompt": prompt,
        "frames": len(frames),
        "size": {"height": height, "width": width},
        "fps": fps,
        "fps_from": "--fps" if given else "the file",
        "scores": said,
    }


def _table(entry: dict[str, Any]) -> str:
    lines = [f"{entry['video']}: {entry['frames']} frames at {entry['fps']:g} a second ({entry['fps_from']})"]
    for role, said in entry["scores"].items():
        lines.append(f"  {role:5}  {said['name']:12}  {said['score']:9.4f}  of {said['frames_used']} frames")
        if "mu" in said:
            rows = [said["mu"][at : at + PER_LINE] for at in range(0, len(said["mu"]), PER_LINE)]
            for i, row in enumerate(rows):
                lines.append(" " * 9 + f"frame {i * PER_LINE:4d}  " + " ".join(f"{x:8.4f}" for x in row))
        if "raw" in said:
            lines.append(" " * 9 + f"{'':10}  " + " ".join(f"{name:>8}" for name in said["raw"]))
            lines += [
                " " * 9 + f"{kind:10}  " + " ".join(f"{x:8.4f}" for x in said[kind].values())
                for kind in ("raw", "normalised")
            ]
    return "\n".join(lines)
