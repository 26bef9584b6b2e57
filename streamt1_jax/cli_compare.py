"""`streamt1 compare`: what it takes, and what it refuses before anything is made."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt1_jax.cli_bench import numbers
from streamt1_jax.cli_score import reward_overrides
from streamt1_jax.compare_methods import DECIDED, DEFAULT_METHODS, METHODS, Entry, entries_of
from streamt1_jax.compare_store import refuse_results
from streamt1_jax.errors import BadInputError
from streamt1_jax.settings import load_settings

if TYPE_CHECKING:
    from streamt1_jax.compare import Plan, Result

DEFAULT_PROMPTS = 64


def add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare ways of spending candidates, at an equal number of them",
        description="Makes the same prompts by every method and measures them: rewards, and for the embedded model "
        "checks that no search sees. Writes OUT/results.jsonl as results come, then OUT/summary.json, OUT/table.md, "
        "OUT/quality.png and OUT/drift.png.",
    )
    add = parser.add_argument
    names = ", ".join(METHODS)
    add("--methods", default=",".join(DEFAULT_METHODS), metavar="NAME,...", help=f"of {names} (default: first four)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompts", type=int, metavar="N", help=f"N held-out captions of the little world (default: {DEFAULT_PROMPTS})"
    )
    what.add_argument("--prompts-file", metavar="FILE", help="one prompt per line instead")
    add("--captions-seed", type=int, metavar="S", help="draw other held-out captions (default: always the same ones)")
    add("--budget", default="4", metavar="N,...", help="candidates a chunk: 2 is 1x2, 4 is 2x2, 8 is 2x4 (default: 4)")
    add("--checkpoint", default="mini", metavar="DIR", help="a checkpoint (default: mini, the embedded model)")
    add("--rewards", metavar="DIR|SHORT[,LONG]", help="as in generate")
    add("--reward-device", metavar="DEVICE", help="as in generate")
    add("--out", default="comparison", metavar="DIR", help="folder of the results (default: comparison)")
    add("--resume", action="store_true", help="go on with what the folder holds")
    add("--keep-videos", action="store_true", help="keep every result's video, in OUT/videos")
    add("--sheets", type=int, default=0, metavar="N", help="contact sheets of the first N prompts, in OUT/sheets")
    add("--config", metavar="FILE", help="as in generate; the methods set grid and units")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in generate")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", help="length of a video (default: 5)")
    length.add_argument("--frames", help="length in pixel frames, 12k - 3")
    add("--seed", help="of the first prompt; each further one adds 1000000 (default: 42)")
    add("--allow-cpu", action="store_true", help="run a full-size model without a GPU (very slow)")
    add("--progress", action="store_true", help="show the progress bar even where stderr is no terminal")
    parser.set_defaults(run=_run_compare)


def _run_compare(args: argparse.Namespace) -> int:
    settings = load_settings(args.config, _overrides(args))
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    entries = entries_of(names, numbers("--budget", args.budget))
    folder = Path(args.out)
    refuse_results(folder, resume=args.resume)
    least_of = (
        ("--sheets", args.sheets, 0),
        ("--prompts", args.prompts, 1),
        ("--captions-seed", args.captions_seed, 0),
    )
    for name, number, least in least_of:
        if number is not None and number < least:
            raise BadInputError(f"{name} is {number}, expected at least {least}: leave it out for its default")
    prompts = _prompts(args)

    from streamt1_jax import StreamT1Pipeline
    from streamt1_jax.compare import Plan, compare, mini_checker
    from streamt1_jax.compile_cache import enable_compilation_cache
    from streamt1_jax.rewards.choice import check_choice, leave_room, make_rewards
    from streamt1_jax.weights import find_weights

    published = check_choice(settings.rewards)
    if published is not None:
        leave_room(settings, lambda: find_weights(args.checkpoint).config, published)
    enable_compilation_cache()
    pipe = StreamT1Pipeline.from_pretrained(args.checkpoint, allow_cpu=args.allow_cpu)
    plan = Plan(entries, prompts, settings.run, settings.generate, args.sheets, args.keep_videos)
    results = _with_progress(
        plan,
        lambda on_result: compare(
            pipe,
            plan,
            folder,
            rewards=make_rewards(settings.rewards, pipe.prompts, published, pipe.weights),
            checker=mini_checker(pipe),
            resume=args.resume,
            on_result=on_result,
        ),
        forced=args.progress,
    )
    _report(results, entries, folder)
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    """The flags as further `--set` texts; refuses settings that the methods decide."""
    decided = [text for text in args.set if text.partition("=")[0].strip() in {f"search.{key}" for key in DECIDED}]
    if decided:
        raise BadInputError(f"--set {decided[0]} is what the methods differ in: choose by --methods and --budget")
    texts = reward_overrides(args.rewards, args.reward_device, args.set)
    if args.frames is not None:
        texts.append("generate.seconds=none")  # of the config file
    if args.seconds is not None:
        texts.append("generate.frames=none")
    given = {key: getattr(args, key) for key in ("seconds", "frames", "seed")}
    return texts + [f"generate.{key}={value}" for key, value in given.items() if value is not None]


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts of the file, or captions that the embedded model was not trained on."""
    if args.prompts_file is not None:
        if args.captions_seed is not None:
            raise BadInputError("--captions-seed draws captions, and --prompts-file has its own; leave one out")
        from streamt1_jax.segments import scripts_of_lines
        from streamt1_jax.text import read_prompts_file

        prompts, _ = read_prompts_file(args.prompts_file)
        switching = [script.prompt for script in scripts_of_lines(prompts) if script.switches]
        if switching:
            raise BadInputError(
                f"{args.prompts_file} has @TIME lines below {switching[0]!r}, expected one prompt a video: a "
                "comparison judges a video by the prompt it began with; take them out"
            )
        return tuple(prompts)
    from streamt1_jax.mini.shipped import is_mini
    from streamt1_jax.mini.world import CAPTIONS_SEED, held_out_scenes

    if args.checkpoint != "mini" and not is_mini(args.checkpoint):
        raise BadInputError(
            f"--checkpoint {args.checkpoint} came without --prompts-file, expected one: only the embedded model has "
            "captions of its own"
        )
    seed = CAPTIONS_SEED if args.captions_seed is None else args.captions_seed
    scenes = held_out_scenes(args.prompts or DEFAULT_PROMPTS, seed)
    return tuple(scene.caption() for scene in scenes)


def _with_progress(plan: "Plan", run: Any, *, forced: bool) -> list["Result"]:
    """Runs under a progress bar over the results; an interruption says what is kept."""
    from tqdm import tqdm

    total, done = len(plan.prompts) * len(plan.entries), 0
    hidden = not (forced or sys.stderr.isatty())
    with tqdm(total=total, desc="compare", unit="result", disable=hidden, file=sys.stderr) as bar:

        def show(result: "Result") -> None:
            nonlocal done
            done += 1
            bar.set_postfix_str(f"{result.method} {result.budget}, {result.seconds:.1f} s", refresh=False)
            bar.update()

        try:
            return run(show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{done} of {total} results are kept, go on with --resume") from None


def _report(results: list["Result"], entries: tuple[Entry, ...], folder: Path) -> None:
    from streamt1_jax.compare_report import comparison_table, save_drift_plot, save_quality_plot
    from streamt1_jax.compare_stats import summarize
    from streamt1_jax.compare_store import SETTINGS
    from streamt1_jax.measure import machine
    from streamt1_jax.outputs import SOFTWARE, atomic_write, write_json

    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    summary = {"software": SOFTWARE, "machine": machine(), "settings": settings, **summarize(results, entries)}
    table = comparison_table(summary)
    write_json(folder / "summary.json", summary)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    save_quality_plot(summary, folder / "quality.png")
    save_drift_plot(summary, folder / "drift.png")
    print(table)
    print(f"\nresults {folder / 'results.jsonl'}\nsummary {folder / 'summary.json'}")
    print(f"plots   {folder / 'quality.png'}, {folder / 'drift.png'}")
