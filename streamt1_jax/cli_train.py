"""`streamt1 train-mini`: the embedded model's weights from nothing."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from streamt1_jax.errors import BadInputError
from streamt1_jax.settings import check_seed


def add_train_mini(commands: Any) -> None:
    parser = commands.add_parser(
        "train-mini",
        help="train the embedded model",
        description="Trains the embedded model's networks on a little world of moving shapes; nothing is downloaded. "
        "The folder it writes can be given to --checkpoint, and to --rewards.",
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="where weights, checkpoints and logs go")
    add("--steps", metavar="NAME=N,...", help="other numbers than the recipe's, such as vae=100,dit=50 (see README)")
    add(
        "--only",
        choices=["rewards", "decoder"],
        help="train these alone: the rewards, beside what stands in the folder, for which they need no VAE; or the "
        "VAE's decoder of --start",
    )
    add("--start", metavar="DIR", help="go on from the DiT that such a folder holds; 'mini': from the shipped weights")
    add("--seed", type=int, default=0, help="of data, weights and noise (default: 0)")
    add("--resume", action="store_true", help="go on with what stands in the folder")
    parser.set_defaults(run=_run_train_mini)


def _run_train_mini(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("optax") is None:
        raise BadInputError('optax is not installed, train-mini needs it; pip install "streamt1-jax[train]"')
    from streamt1_jax.mini import train
    from streamt1_jax.mini.shipped import FOLDER

    if args.only == "rewards" and args.start is not None:
        raise BadInputError("--start goes on from a DiT or a decoder, and --only rewards needs none; leave one out")
    if args.only == "decoder" and args.start is None:
        raise BadInputError("--only decoder needs --start DIR, the weights whose decoder it goes on with, or mini")
    keys = {"rewards": train.REWARD_KEYS, "decoder": train.DECODER_KEYS}.get(args.only)
    if args.only is None and args.start is not None:
        keys = train.DIT_KEYS
    recipe, out = train.Recipe.parse(args.steps, keys), Path(args.out)
    run = train.Run(out, recipe, check_seed(args.seed), args.resume, _report, args.interrupts)
    try:
        if args.only == "rewards":
            train.train_rewards(run)
        elif args.start is not None:
            start = FOLDER if args.start == "mini" else Path(args.start)
            go_on = train.continue_decoder if args.only == "decoder" else train.continue_dit
            go_on(run, start)
        else:
            train.train_mini(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on from the last checkpoint with --resume") from None
    use = "--rewards" if args.only == "rewards" else "--checkpoint"
    print(f"wrote {out / 'mini.safetensors'}; use it with {use} {out}")
    return 0


def _report(stage: str, figures: dict[str, float]) -> None:
    """One line: stage, step of all steps, the figures."""
    step, steps = (int(figures[key]) for key in ("step", "steps"))
    rest = "  ".join(f"{key} {value:.4g}" for key, value in figures.items() if key not in ("step", "steps"))
    print(f"{stage}  {step}/{steps}  {rest}".rstrip(), file=sys.stderr, flush=True)
