"""`streamt1 convert wan|longlive|diffusers`: PyTorch checkpoints into a checkpoint folder."""

import argparse
from typing import Any

from streamt1_jax.errors import BadInputError

_REVISION = (
    "revision of the hub repository: a commit, branch or tag (default: main, resolved to a commit that the manifest "
    "records). No commit is built in, because none could be verified without the hub; for LongLive one must be given"
)


def add_convert_parser(subparsers: Any) -> None:
    """Adds `convert` and its three formats to the parser of the `streamt1` command."""
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
