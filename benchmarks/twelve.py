"""The twelve prompts that README shows, by the embedded model: one row of frames each, and the mean of its checks.

    python benchmarks/twelve.py --seconds 5 --every 8 --out docs/mini-stream-t1.png
    python benchmarks/twelve.py --seconds 30 --every 38 --one-candidate --out docs/mini-one-candidate-30s.png

Both ways of making them begin from the same seed.
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw
from race import write_report

from streamt1_jax import SearchConfig, StreamT1Pipeline
from streamt1_jax.compare import check_mini
from streamt1_jax.measure import machine

PROMPTS = (
    "a red circle moves right",
    "a blue square spins",
    "a large green star bounces",
    "a yellow square moves left",
    "a white triangle stands still on a brown background",
    "an orange star moves up",
    "a large blue ring grows and shrinks",
    "a red cross stands still on a gray background",
    "a small green circle moves down quickly",
    "a yellow circle bounces on a striped background",
    "a red circle moves right and a blue square spins",
    "a green star stands still and a white ring moves left on a checkered background",
)
GAP = 2  # pixels between frames
LABEL = 16  # pixels of height, above a row


def row(frames: np.ndarray, prompt: str, every: int) -> np.ndarray:
    """Every `every`-th frame side by side, under the prompt; uint8 [h, w, 3]."""
    apart = [(0, 0), (0, GAP), (0, 0)]  # or what leaves one frame would seem to enter the next
    shown = [np.pad(frame, apart, constant_values=255) for frame in frames[::every]]
    pictures = np.concatenate(shown, axis=1)
    label = Image.new("RGB", (pictures.shape[1], LABEL), "white")
    ImageDraw.Draw(label).text((4, 2), prompt, fill="black")
    return np.concatenate([np.asarray(label), pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--every", type=int, default=8, metavar="FRAMES")
    parser.add_argument("--one-candidate", action="store_true", help="instead of the search")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--checkpoint", default="mini", metavar="DIR", help="that train-mini wrote (default: mini)")
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--json", metavar="FILE", help="the checks of every prompt, and the machine")
    args = parser.parse_args()

    pipe = StreamT1Pipeline.from_pretrained(args.checkpoint)
    search = SearchConfig.longlive() if args.one_candidate else SearchConfig()
    rows, found = [], {}
    for prompt in PROMPTS:
        frames = pipe(prompt, seconds=args.seconds, seed=args.seed, search=search).frames
        checks = check_mini(frames, prompt)
        assert checks is not None, prompt
        print(f"{checks['mean']:.3f}  {prompt}", flush=True)
        found[prompt] = checks
        rows.append(row(frames, prompt, args.every))
    mean = float(np.mean([checks["mean"] for checks in found.values()]))
    print(f"{mean:.3f}  mean")
    about = {"machine": machine(), "weights": pipe.weights.describe(), "seconds": args.seconds, "seed": args.seed}
    write_report(args.json, about | {"one_candidate": args.one_candidate, "mean": mean, "checks": found})
    Image.fromarray(np.concatenate(rows)).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
