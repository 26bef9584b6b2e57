"""`streamt1 convert wan|longlive|diffusers|rewards`: PyTorch checkpoints into a folder of ours."""

import argparse
from pathlib import Path
from typing import Any

from convert.reward_files import HUB
from streamt1_jax.errors import BadInputError

_REVISION = (
    "revision of the hub repository: a commit, branch or tag (default: main, resolved to a commit that the manifest "
    "records). No commit is built in, because none could be verified without the hub; for LongLive one must be given"
)


def add_convert_parser(subparsers: Any) -> None:
    """Adds `convert` and its formats to the parser of the `streamt1` command."""
    parser = subparsers.add_parser("convert", help="convert PyTorch checkpoints")
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)

    wan = formats.add_parser("wan", help="Wan2.1-T2V in its own format, 1.3B or 14B")
    wan.add_argument("--source", required=True, metavar="DIR_OR_REPO", help="folder or hub repository")
    _add_common(wan)

    longlive = formats.add_parser("longlive", help="LongLive or Self-Forcing generators")
    add = longlive.add_argument
    add(
        "--base", required=True, metavar="DIR_OR_REPO", help="Wan2.1 folder or repository: VAE, text encoder, tokenizer"
    )
    add("--base-revision", metavar="COMMIT", help="as --revision, of the repository given with --base")
    add("--generator", required=True, metavar="FILE_OR_REPO", help="longlive_base.pt, self_forcing_dmd.pt, ...")
    add("--lora", action="append", default=[], metavar="FILE_OR_REPO", help="LoRA to merge, in peft's names")
    add(
        "--lora-alpha",
        type=float,
        metavar="N",
        help="alpha of the LoRA (default: adapter_config.json, or the rank)",
    )
    add("--no-lora", action="store_true", help="leave out a LoRA that stands in the generator's own file")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights, or those as trained (default: averaged, where the file has them)",
    )
    _add_common(longlive)

    diffusers = formats.add_parser("diffusers", help="Wan2.1-T2V in the diffusers format")
    diffusers.add_argument("--source", required=True, metavar="DIR_OR_REPO", help="folder or hub repository")
    _add_common(diffusers)
    _add_rewards(formats)


def _add_rewards(formats: Any) -> None:
    parser = formats.add_parser(
        "rewards",
        help="the reward models HPSv3 and VideoReward",
        description="Without further options everything comes from the hub (about 22 GB) and the authors' packages.",
    )
    add = parser.add_argument
    names = {"hpsv3": "HPSv3's weights", "videoreward": "VideoReward's checkpoint"}
    names |= {
        "base-image": "config, tokenizer and chat template of HPSv3's base model",
        "base-video": "the same of VideoReward's, and its weights where the checkpoint is an adapter",
    }
    for name, what in names.items():
        repo = HUB[name.replace("-", "_")]
        add(f"--{name}", default=repo, metavar="DIR_OR_REPO", help=f"{what} (default: {repo})")
        add(f"--{name}-revision", metavar="COMMIT", help=f"of the repository given with --{name} (default: main)")
    add(
        "--templates",
        nargs="+",
        default=[],
        metavar="PATH",
        help="the instruction texts: hpsv3's wheel, VideoAlign's checkout or prompt_template.py, or a JSON file "
        "{model: text} (default: downloaded)",
    )
    add("--only", choices=("hpsv3", "videoreward"), help="convert one of the two")
    add("--offline", action="store_true", help="take what was downloaded before, and nothing else")
    add("--out", required=True, metavar="DIR", help="the folder to make")
    add("--overwrite", action="store_true", help="replace an earlier conversion at --out")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the stored weights")


def _run_rewards(args: argparse.Namespace) -> int:
    from convert.rewards import RewardSources, convert_rewards
    from streamt1_jax.atomic_folder import check_place
    from streamt1_jax.rewards.model_settings import MODELS
    from streamt1_jax.rewards.published import is_rewards

    check_place(Path(args.out), overwrite=args.overwrite, is_ours=is_rewards)  # before a long download
    given = {name: getattr(args, name) for name in HUB}
    revisions = {name: commit for name in HUB if (commit := getattr(args, f"{name}_revision"))}
    models = MODELS if args.only is None else (args.only,)
    sources = RewardSources(**given, templates=args.templates, models=models, revisions=revisions, offline=args.offline)
    convert_rewards(sources, args.out, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.out}: {' and '.join(models)} written; use it with --rewards {args.out}")
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the folder to make")
    add("--overwrite", action="store_true", help="replace an earlier conversion at --out")
    add("--revision", metavar="COMMIT", help=_REVISION)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of DiT and text encoder")
    add("--height", type=int, default=480, help="pixels the weights were made for (default: 480)")
    add("--width", type=int, default=832, help="pixels the weights were made for (default: 832)")


def run_convert(args: argparse.Namespace) -> int:
    """Runs one conversion; returns the exit code. Errors are raised as in `streamt1_jax.errors`."""
    if args.format == "rewards":
        return _run_rewards(args)
    import jax

    from convert.recipes import Options, diffusers_recipe, longlive_recipe, run_recipe, wan_recipe
    from streamt1_jax.checkpoint import check_output
    from streamt1_jax.settings import check_size

    jax.config.update("jax_platforms", "cpu")  # Nothing is computed: a GPU would only be taken from others.
    check_output(args.out, overwrite=args.overwrite)
    check_size(args.height, args.width)
    options = Options(args.dtype, (args.height, args.width))
    if args.format == "wan":
        recipe = wan_recipe(args.source, options, args.revision)
    elif args.format == "diffusers":
        recipe = diffusers_recipe(args.source, options, args.revision)
    else:
        _check_lora_options(args)
        recipe = longlive_recipe(
            args.base,
            args.generator,
            options,
            lora=args.lora[0] if args.lora else None,
            lora_alpha=args.lora_alpha,
            ignore_lora=args.no_lora,
            ema=args.ema,
            revision=args.revision,
            base_revision=args.base_revision,
        )
    run_recipe(recipe, args.out, overwrite=args.overwrite)
    print(f"{args.out}: {recipe.origin['recipe']} checkpoint written")
    return 0


def _check_lora_options(args: argparse.Namespace) -> None:
    if len(args.lora) > 1:
        raise BadInputError(f"--lora was given {len(args.lora)} times, expected one LoRA. Merge one.")
    if args.lora and args.no_lora:
        raise BadInputError("--lora and --no-lora were both given, expected one of them.")
    if args.lora_alpha is not None and not args.lora:
        raise BadInputError("--lora-alpha was given without --lora, expected both or neither.")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
        raise BadInputError(f"--lora-alpha is {args.lora_alpha}, expected a number above 0.")
