"""`streamt1 bench` and `streamt1 doctor`: what they take, and what they refuse before anything is measured."""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from streamt1_jax.cli_score import reward_overrides
from streamt1_jax.config import ModelConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import atomic_write, write_json
from streamt1_jax.settings import RewardsConfig, check_size, load_settings

PROMPT = "a red circle moves right"  # what rewards that read a prompt are given


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory on random weights",
        description="Times a steady chunk by stage and as one program; says what is in every figure.",
    )
    add = parser.add_argument
    add("--preset", default="mini", help="1.3b, 14b, mini or tiny (default: mini)")
    add("--candidates", default="1,4", metavar="N,...", help="candidates a chunk, each a lane (default: 1,4)")
    add("--chunks", type=int, default=12, help="chunks of a video (default: 12)")
    add("--repeats", type=int, default=3, help="warm runs (default: 3)")
    add("--config", metavar="FILE", help="as in generate; of its search, every lane has another grid")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in generate")
    add("--rewards", metavar="DIR|SHORT[,LONG]", help="as in generate")
    add("--reward-device", metavar="DEVICE", help="as in generate")
    add("--devices", type=int, default=1, metavar="N", help="devices of this machine that share the candidates")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on an accelerator, float32 on a CPU")
    add("--height", type=int, help="pixels (default: the preset's)")
    add("--width", type=int, help="pixels (default: the preset's)")
    add("--json", metavar="FILE", help="write the report here too, anew after every round of runs")
    add("--against", metavar="FILE", help="compare with an earlier report")
    add("--profile", metavar="DIR", help="write a trace of three chunks of the last lane for XProf and Perfetto")
    parser.set_defaults(run=_run_bench)


def _run_bench(args: argparse.Namespace) -> int:
    model = ModelConfig.preset(args.preset)
    settings = load_settings(args.config, reward_overrides(args.rewards, args.reward_device, args.set))
    height = _size(args.height, _size(settings.generate.height, model.height))
    width = _size(args.width, _size(settings.generate.width, model.width))
    check_size(height, width)
    candidates = numbers("--candidates", args.candidates)
    if args.repeats < 1 or args.devices < 1:
        raise BadInputError(f"--repeats is {args.repeats} and --devices {args.devices}, expected at least 1")
    asked = {"preset": args.preset, "size": {"height": height, "width": width}, "chunks": args.chunks}
    earlier = _earlier(args.against, asked, candidates) if args.against else None
    if args.json:
        single = Path(args.json)
        if not single.parent.is_dir() or single.is_dir():
            raise BadInputError(f"--json {args.json} cannot be written, expected a file in a folder that exists")

    import jax.numpy as jnp

    from streamt1_jax.bench import lane_config, run_bench
    from streamt1_jax.bench_report import bench_table, compare_table
    from streamt1_jax.rewards import PromptTable
    from streamt1_jax.rewards.choice import check_choice, leave_room, make_rewards
    from streamt1_jax.sharding import candidate_mesh
    from streamt1_jax.weights import MiniWeights, default_dtype

    published = check_choice(settings.rewards)
    if published is not None:
        leave_room(settings, lambda: model, published)
    for number in candidates:
        candidate_mesh(lane_config(settings.run, number).search, args.devices)
    prompts = PromptTable([PROMPT])

    def keep(report: dict[str, Any]) -> None:
        if args.json:
            with atomic_write(args.json, overwrite=True) as path:
                write_json(path, {**asked, **report})

    report = run_bench(
        model,
        settings.run,
        candidates=candidates,
        chunks=args.chunks,
        repeats=args.repeats,
        dtype=jnp.dtype(args.dtype).type if args.dtype else default_dtype(),
        height=height,
        width=width,
        rewards=make_rewards(
            settings.rewards,
            prompts,
            published,
            MiniWeights() if args.preset == "mini" else None,
        ),
        devices=args.devices,
        profile=args.profile,
        on_round=keep,
    )
    report = {**asked, **report}
    keep(report)
    print(bench_table(report))
    if earlier is not None:
        print("\n" + compare_table(report, earlier))
    return 0


def _size(given: int | None, default: int) -> int:
    return default if given is None else given


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers of candidates that an option lists."""
    try:
        listed = tuple(int(n) for n in text.split(","))
    except ValueError:
        listed = ()
    if not listed or min(listed) < 1:
        raise BadInputError(f"{option} is {text!r}, expected numbers of at least 1: try 1,4,8")
    return listed


def _earlier(path: str, asked: dict[str, Any], candidates: tuple[int, ...]) -> dict[str, Any]:
    """An earlier report of the same model, size and length, with a number of candidates in common."""
    try:
        report = json.loads(Path(path).read_text())
        found = {key: report[key] for key in asked}
        both = {run["candidates"] for run in report["runs"]} & set(candidates)
        from streamt1_jax.bench_report import compare_table

        compare_table(report, report)  # all that will be read of it is there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"--against {path} cannot be used ({error!r}), expected a report of bench --json"
        ) from error
    if found != asked or not both:
        raise BadInputError(
            f"--against {path} is of {found} with other numbers of candidates, or of another model, size or length, "
            f"expected {asked} and one of {list(candidates)} candidates"
        )
    return report


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, devices and the memory a run needs",
        description="Nothing is loaded: the plan comes from shapes alone.",
    )
    add = parser.add_argument
    add("--preset", default="1.3b", help="1.3b, 14b, mini or tiny (default: 1.3b)")
    add("--config", metavar="FILE", help="as in generate")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in generate")
    add("--beams", type=int, help="short for --set search.beams=N")
    add("--candidates", type=int, help="short for --set search.candidates_per_beam=N")
    add(
        "--rewards",
        default="none",
        metavar="none|hpsv3|videoreward|both|DIR",
        help="published reward models on the same device, of the published sizes or of a folder's (default: none)",
    )
    add("--reward-device", metavar="DEVICE", help="as in generate: on another device they take nothing of this one")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.set_defaults(run=_run_doctor)


def _reward_sizes(asked: str, settings: RewardsConfig) -> dict[str, float]:
    """Bytes of the reward models that are asked for, by name."""
    from streamt1_jax.memory import REWARD_BYTES, REWARD_LINEAR
    from streamt1_jax.rewards.published import PublishedRewards

    if os.path.isdir(asked):
        folder = PublishedRewards(Path(asked), precision=settings.precision)
        return {name: folder.weight_bytes(name) for name in folder.manifest["models"]}
    names = {"none": (), "both": tuple(REWARD_BYTES)} | {name: (name,) for name in REWARD_BYTES}
    if asked not in names:
        raise BadInputError(f"--rewards is {asked!r}, expected {', '.join(names)} or a folder of converted rewards")
    scale, less = (2 if settings.precision == "float32" else 1), settings.precision == "int8"
    return {name: REWARD_BYTES[name] * scale - less * REWARD_LINEAR[name] for name in names[asked]}


def _gpu_bytes() -> int | None:
    """Memory of the first GPU, as torch tells it; None where torch is not there or sees none."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.mem_get_info(0)[1] if torch.cuda.is_available() else None


def _run_doctor(args: argparse.Namespace) -> int:
    model = ModelConfig.preset(args.preset)
    short = {"search.beams": args.beams, "search.candidates_per_beam": args.candidates}
    overrides = [*args.set, *(f"{key}={value}" for key, value in short.items() if value is not None)]
    settings = load_settings(args.config, overrides)
    height = _size(settings.generate.height, model.height)
    width = _size(settings.generate.width, model.width)

    import jax
    import jax.numpy as jnp

    from streamt1_jax.measure import machine
    from streamt1_jax.memory import GIGABYTE, format_plan, memory_plan
    from streamt1_jax.rewards.placement import FRACTION, jax_fraction, needed_bytes

    for name, value in machine().items():
        print(f"{name:12}  {value}")
    sizes = _reward_sizes(args.rewards, settings.rewards)
    batch = GIGABYTE * settings.rewards.batch_gb
    apart = args.reward_device is not None and args.reward_device not in ("cuda", "cuda:0")
    here = () if apart else tuple(sizes)
    plan = memory_plan(model, settings.run, height, width, jnp.dtype(args.dtype).type, here, sizes, batch)
    beams, count = settings.run.search.grid
    print(f"\n{args.preset}, {width}x{height}, {beams} beams of {count} candidates, {args.dtype}")
    print(format_plan(plan))
    if apart and sizes:
        parts = ", ".join(f"{name} {size / GIGABYTE:.2f} GB" for name, size in sizes.items())
        needed = needed_bytes(sizes, batch) / GIGABYTE
        print(f"on {args.reward_device}: {parts}, batches and torch itself: {needed:.2f} GB in all")
    elif sizes:
        print(f"torch takes {(plan.peak - plan.jax_peak) / GIGABYTE:.2f} GB of that; JAX is left the rest ({FRACTION})")
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is not None and here:  # what it will be told to take beside torch, not what this process may take
        total = _gpu_bytes()
        limit = None if total is None else total * jax_fraction(total, plan.peak - plan.jax_peak)
    if limit is not None:
        verdict = "fits" if plan.jax_peak < limit else "does NOT fit"
        part = f"its part, {plan.jax_peak / GIGABYTE:.2f} GB"
        print(f"JAX may take {limit / GIGABYTE:.2f} GB of this device: {part}, {verdict}")
    return 0
