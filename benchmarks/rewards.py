"""HPSv3 and VideoReward on random weights: seconds of each stage, and the most memory, alone and beside the DiT.

    python benchmarks/rewards.py --size full --beside 1.3b --json FILE     # a GPU of 80 GB
    python benchmarks/rewards.py --size tiny --beside tiny                 # anywhere: only to see that it runs

One chunk of 2 beams of 2 candidates: HPSv3 sees the chunk's frames, VideoReward a sample of the window's. Nothing is
downloaded: token ids are numbers, as many as a prompt inside its instruction has (--text-tokens). The stages are those
of `ClipReader`: cut (frames to patches, on the device), look (vision tower), read (language model); `score` is all of
it from frames in the host's memory, with the head.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from race import write_report

from streamt1_jax.rewards import PromptTable, Reward, host_reward
from streamt1_jax.rewards.chat import Instruction
from streamt1_jax.rewards.clips import ClipReader
from streamt1_jax.rewards.frames import Grid, PatchConfig, grid_of
from streamt1_jax.rewards.hpsv3 import HPSv3
from streamt1_jax.rewards.loading import head_of, scorer_of
from streamt1_jax.rewards.model_settings import HPSV3, MODELS, RESERVED, ModelSettings, VideoRewardConfig
from streamt1_jax.rewards.placement import needed_bytes, share_gpu, torch_device
from streamt1_jax.rewards.qwen2vl import empty_network, fill, parameter_shapes, published_sizes, reward_config
from streamt1_jax.rewards.videoreward import VideoReward

GIGABYTE = 1e9
ROWS = {HPSV3: 151658, "videoreward": 151660}  # of the published embeddings
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CANDIDATES = 4
VIDEOS = 3  # of which the last chunk is timed
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
}


class NumberedWords:
    """In the place of a tokenizer: ids that are only numbers, with everything where it belongs."""

    def __init__(self, rows: int, reserved: int, text_tokens: int):
        self.length, self.pad_id = rows, rows - reserved - 1
        self.reserved_ids = tuple(range(rows - reserved, rows))
        self._before = np.arange(16, dtype=np.int64)
        self._after = np.arange(16, text_tokens - reserved, dtype=np.int64)

    def __call__(self, prompt: str, visual_tokens: int) -> np.ndarray:
        del prompt
        pads = np.full(visual_tokens, self.pad_id, np.int64)
        return np.concatenate([self._before, pads, self._after, np.array(self.reserved_ids)])

    def reserved_places(self, ids: np.ndarray) -> np.ndarray:
        return np.arange(len(ids) - len(self.reserved_ids), len(ids))


def settings_of(name: str, size: str) -> ModelSettings:
    low, high = {HPSV3: (200704, 200704), "videoreward": (100352, 200704)}[name]
    if size == "tiny":
        low, high = 784 * 4, 784 * 16
    patches = PatchConfig(low, high, "pil" if name == HPSV3 else "torchvision", MEAN, STD)
    text = Instruction("{text_prompt}", "", "image" if name == HPSV3 else "video", RESERVED[name])
    if name == HPSV3:
        return ModelSettings(name, text, patches, (1024, 16))
    return ModelSettings(name, text, patches, (1,), VideoRewardConfig(2.0, None, (0.0,) * 3, (1.0,) * 3))


def random_scorer(name: str, args: argparse.Namespace, device: torch.device) -> HPSv3 | VideoReward:
    """A model of random weights, made on the device."""
    settings, rows = settings_of(name, args.size), ROWS[name] if args.size == "full" else 1000
    words: Any = NumberedWords(rows, len(settings.instruction.reserved), args.text_tokens)
    config = reward_config(published_sizes(name) | (TINY if args.size == "tiny" else {}), rows)
    network = empty_network(config, head_of(settings), words.pad_id)
    dtype = getattr(torch, args.dtype)

    def draw(key: str, shape: torch.Size) -> torch.Tensor:
        kind = torch.float32 if name == HPSV3 and key.startswith("rm_head") else dtype
        if len(shape) == 1:  # gains and biases
            return torch.full(tuple(shape), float(key.endswith("weight")), dtype=kind, device=device)
        return torch.empty(tuple(shape), dtype=kind, device=device).normal_(0, 0.02)

    drawn = ((key, draw(key, empty.shape)) for key, empty in parameter_shapes(network).items())
    reader = ClipReader(fill(network, drawn, device), words, settings.patches, device, args.batch_gb * GIGABYTE)
    return scorer_of(settings, reader)


def clips_of(scorer: HPSv3 | VideoReward, args: argparse.Namespace) -> list[np.ndarray]:
    """What one chunk asks of a model: noise of the right shapes."""
    rng = np.random.default_rng(0)
    video = scorer.settings.video
    frames = args.chunk_frames if video is None else len(video.frames(args.window_frames, 16))
    shape = (frames, args.height, args.width, 3)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(CANDIDATES)]


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of some calls after one that warms up."""

    def once() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(repeats))


@torch.inference_mode()
def measure(scorer: HPSv3 | VideoReward, args: argparse.Namespace) -> dict[str, Any]:
    """Stages of one batch, scaled to the clips of a chunk, and the whole from frames to scores."""
    reader, videos = scorer.reader, clips_of(scorer, args)
    device, network = reader.device, reader.network
    clips = videos if scorer.settings.video else [frame[None] for video in videos for frame in video]
    frames, height, width, _ = clips[0].shape
    grid: Grid = grid_of(reader.patches, frames, *reader.patches.size(height, width))
    ids = reader.tokenizer("", grid.patches // reader.patches.merge_size**2)
    count = min(len(clips), max(1, int(reader.batch_bytes // reader.row_bytes(grid, len(ids)))))
    batch, scale = clips[:count], len(clips) / count
    patches = reader.cut(batch)
    features = network.look(patches, grid)
    rows = torch.from_numpy(np.stack([ids] * count)).to(device)
    places = torch.from_numpy(np.stack([reader.tokenizer.reserved_places(ids)] * count)).to(device)
    stages = {
        "cut": lambda: reader.cut(batch),
        "look": lambda: network.look(patches, grid),
        "read": lambda: network.read(rows, features, places),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = {name: scale * seconds_of(run, device, args.repeats) for name, run in stages.items()}
    seconds["score"] = seconds_of(lambda: scorer(videos, [""] * CANDIDATES), device, args.repeats)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "clips": len(clips),
        "clips_a_batch": count,
        "tokens_a_clip": len(ids),
        "visual_tokens": features.shape[1],
        "parameters": sum(x.numel() for x in network.parameters()),
        "seconds": seconds,
        "torch_peak_bytes": memory,
    }


def as_reward(name: str, scorer: HPSv3 | VideoReward, prompts: PromptTable) -> Reward:
    video = scorer.settings.video
    choose = None if video is None else (lambda count: video.frames(count, 16.0) if count > 1 else [0])
    return host_reward(name, scorer, prompts, borrow=True, choose=choose)


def beside_dit(scorers: dict[str, HPSv3 | VideoReward], args: argparse.Namespace) -> dict[str, Any]:
    """One steady chunk of the search with these rewards, stage by stage and as one program."""
    from streamt1_jax.bench import Bench, lane_config
    from streamt1_jax.bench_lane import Lane, time_video
    from streamt1_jax.bench_report import MEANING
    from streamt1_jax.config import ModelConfig, RunConfig
    from streamt1_jax.measure import Spread, peak_bytes
    from streamt1_jax.weights import default_dtype

    model, prompts = ModelConfig.preset(args.beside), PromptTable([""])
    size = {"height": args.height, "width": args.width} if args.size == "full" else {"height": 64, "width": 96}
    short, long = (as_reward(name, scorer, prompts) for name, scorer in scorers.items())
    bench = Bench(model, **size, dtype=default_dtype(), rewards=(short, long))
    search = bench.search(lane_config(RunConfig(), CANDIDATES))
    lane = Lane(CANDIDATES, search, bench.params, bench.conditioning(search))
    last = [time_video(lane, args.chunks)[-1] for _ in range(VIDEOS)]  # the first two chunks compile all programs
    return {
        "preset": args.beside,
        "size": size,
        "chunk": args.chunks - 1,
        "videos": VIDEOS,
        "stage_seconds": {
            f"{name} ({meaning})": asdict(Spread.of([chunk.stages[name] for chunk in last]))
            for name, meaning in MEANING.items()
        },
        "chunk_seconds": asdict(Spread.of([chunk.whole for chunk in last])),
        "peak_bytes": peak_bytes(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=("tiny", "full"), default="tiny")
    add("--device", help="of torch (default: the first GPU, or the CPU)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--beside", metavar="PRESET", help="also one chunk of the search with this model: 1.3b, 14b, mini, tiny")
    add(
        "--chunks",
        type=int,
        default=12,
        help="of that search; the last is measured, its window is full from chunk 10 on (default: 12)",
    )
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--chunk-frames", type=int, default=12)
    add("--window-frames", type=int, default=117)
    add("--text-tokens", type=int, default=700, help="of a prompt in its instruction")
    add("--batch-gb", type=float, default=4.0)
    add("--repeats", type=int, default=3)
    add("--json", metavar="FILE")
    return parser.parse_args()


def main() -> int:
    args = parse()
    device = torch_device(args.device)
    sizes: dict[str, float] = dict.fromkeys(MODELS, 0.0)
    if args.size == "full":
        from streamt1_jax.memory import REWARD_BYTES

        sizes = {name: REWARD_BYTES[name] for name in MODELS}
    share_gpu(needed_bytes(sizes, args.batch_gb * GIGABYTE), device)  # before JAX starts
    from streamt1_jax.measure import machine

    report: dict[str, Any] = {"machine": machine() | {"torch": torch.__version__}, "asked": vars(args)}
    scorers = {name: random_scorer(name, args, device) for name in MODELS}
    for name, scorer in scorers.items():
        report[name] = measure(scorer, args)
        seconds = "  ".join(f"{stage} {value:.3f} s" for stage, value in report[name]["seconds"].items())
        print(
            f"{name:12}  {report[name]['clips']} clips of {report[name]['tokens_a_clip']} tokens  {seconds}", flush=True
        )
    if args.beside:
        report["beside"] = beside_dit(scorers, args)
        for stage, value in report["beside"]["stage_seconds"].items():
            print(f"{value['median']:8.3f} s  {stage}")
        print(f"{report['beside']['chunk_seconds']['median']:8.3f} s  the whole chunk as one program")
    if device.type == "cuda":
        report["torch_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        print(
            f"torch {report['torch_peak_bytes'] / GIGABYTE:.2f} GB at most; JAX, from the whole run: "
            f"{report.get('beside', {}).get('peak_bytes')}"
        )
    if args.json:
        write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
