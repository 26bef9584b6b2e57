"""What a choice by the rewards is worth: one of N videos of a prompt, taken by chance, by a reward, or by the checks.

    python benchmarks/choice.py --prompts 64 --videos 4 --seconds 5 --json FILE

The embedded model makes N videos of one candidate of every held-out caption, as `best_of_n` of `streamt1 compare` does.
No search that chooses among these can pass the best by the checks, which no search sees. How well a reward orders the
videos of one prompt is Spearman's rank correlation with the checks, the mean over prompts in which both differ.
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
from race import rank_correlation, write_report

from streamt1_jax import SearchConfig, StreamT1Pipeline
from streamt1_jax.compare import SEED_STEP, check_mini
from streamt1_jax.compare_stats import interval
from streamt1_jax.measure import machine
from streamt1_jax.mini.world import CAPTIONS_SEED, held_out_scenes

REWARDS = ("short", "long")


def measure(pipe: StreamT1Pipeline, caption: str, seconds: float, seed: int) -> dict[str, float]:
    """The rewards of one video, as the search sees them, and its checks."""
    out = pipe(caption, seconds=seconds, seed=seed, search=SearchConfig.longlive())
    checks = check_mini(out.frames, caption)
    assert checks is not None, caption
    short = float(np.mean([chunk.best.short for chunk in out.trace.chunks]))
    return {"short": short, "long": out.trace.final_scores[out.trace.winner], **checks}


def summary(prompts: Sequence[Sequence[dict[str, float]]]) -> dict[str, dict]:
    """Per check: its mean, with an interval over prompts, of the video that each way of choosing takes."""
    table = {name: np.array([[video[name] for video in videos] for videos in prompts]) for name in prompts[0][0]}
    rewards = {key: table.pop(key) for key in REWARDS}
    found = {}
    for name, checks in table.items():
        chosen = {
            key: np.take_along_axis(checks, scores.argmax(1)[:, None], 1)[:, 0] for key, scores in rewards.items()
        }
        ways = {"by chance": checks.mean(1), "best": checks.max(1)} | {f"by {key}": of for key, of in chosen.items()}
        orders = {key: list(map(rank_correlation, scores, checks)) for key, scores in rewards.items()}
        told = {key: [one for one in each if not math.isnan(one)] for key, each in orders.items()}
        found[name] = {
            **{way: interval(of.tolist()) for way, of in ways.items()},
            **{f"gain by {key}": interval((of - checks.mean(1)).tolist()) for key, of in chosen.items()},
            **{f"rank correlation of {key}": interval(each) for key, each in told.items() if each},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--captions-seed", type=int, default=CAPTIONS_SEED)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    pipe = StreamT1Pipeline.from_pretrained("mini")
    prompts = [
        [measure(pipe, scene.caption(), args.seconds, args.seed + index * SEED_STEP + n) for n in range(args.videos)]
        for index, scene in enumerate(held_out_scenes(args.prompts, args.captions_seed))
    ]
    found = summary(prompts)
    print("| check | by chance | by short | by long | best | rank correlation of short | of long |\n|" + "---|" * 7)
    for name, row in found.items():
        means = [row[way]["mean"] for way in ("by chance", "by short", "by long", "best")]
        orders = [row.get(f"rank correlation of {key}") for key in REWARDS]
        cells = [f"{mean:.3f}" for mean in means] + [
            "" if order is None else f"{order['mean']:+.2f}" for order in orders
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    settings = {key: getattr(args, key) for key in ("prompts", "videos", "seconds", "seed", "captions_seed")}
    weights = pipe.weights.describe()
    write_report(
        args.json,
        {"machine": machine(), "weights": weights["sha256"], **settings, "checks": found, "results": prompts},
    )


if __name__ == "__main__":
    main()
