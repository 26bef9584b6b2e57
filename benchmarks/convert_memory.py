"""Peak memory of converting a text encoder of UMT5-XXL's full size (11.4 GB of bfloat16 in one .pth).

    python benchmarks/convert_memory.py --folder /somewhere/with/25/GB [--layers 24]

Makes a file of random weights with the published keys and shapes, converts it in a process of its own, prints
the peak as JSON, and deletes what it made. `resident` counts everything, mapped pages of the file too.
"""

import argparse
import json
import mmap
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import streamt1_jax
from streamt1_jax.config import DiTConfig, ModelConfig, UMT5Config

SAMPLE_SECONDS = 0.02


def make_file(path: Path, layers: int) -> None:
    """A .pth of random bfloat16 tensors; its pages are filled in place, so that little memory is needed."""
    import torch

    c = UMT5Config(num_layers=layers)
    width = c.num_heads * c.head_dim
    shapes = {"token_embedding.weight": (c.vocab_size, c.dim), "norm.weight": (c.dim,)}
    for i in range(layers):
        block = f"blocks.{i}."
        shapes |= {f"{block}norm{n}.weight": (c.dim,) for n in (1, 2)}
        shapes |= {f"{block}attn.{name}.weight": (width, c.dim) for name in "qkv"}
        shapes |= {f"{block}attn.o.weight": (c.dim, width)}
        shapes |= {f"{block}ffn.{name}.weight": (c.ffn_dim, c.dim) for name in ("gate.0", "fc1")}
        shapes |= {f"{block}ffn.fc2.weight": (c.dim, c.ffn_dim)}
        shapes |= {f"{block}pos_embedding.embedding.weight": (c.num_buckets, c.num_heads)}
    with torch.serialization.skip_data():
        torch.save({key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        for tensor in torch.load(path, mmap=True, weights_only=True).values():
            noise = torch.randint(0x3C00, 0x3E00, (min(tensor.numel(), 2**20),), dtype=torch.int16)
            flat = tensor.view(torch.int16).view(-1)
            for start in range(0, len(flat), len(noise)):
                flat[start : start + len(noise)] = noise[: len(flat) - start]


def convert(path: Path, layers: int, out: Path) -> dict[str, float]:
    """Converts the file in this process and returns its peak memory in gigabytes (1e9 bytes)."""
    from convert.recipes import Part, Recipe, run_recipe
    from convert.torch_source import TorchSource
    from convert.umt5_table import wan_umt5_rules

    peaks, done = {"VmRSS": 0.0, "RssAnon": 0.0, "RssFile": 0.0}, threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for key in peaks:
                peaks[key] = max(peaks[key], int(status[key].split()[0]) * 1024 / 1e9)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    tokenizer = Path(streamt1_jax.__file__).parent / "mini" / "tokenizer"
    config = ModelConfig(dit=DiTConfig.wan_1_3b(), text=UMT5Config(num_layers=layers))
    part = Part(TorchSource(path), wan_umt5_rules(), "bfloat16")
    run_recipe(Recipe(config, {"text": part}, tokenizer, {"recipe": "benchmark"}), out)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return {
        "file_gb": path.stat().st_size / 1e9,
        "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "peak_sampled_gb": peaks["VmRSS"],
        "peak_own_memory_gb": peaks["RssAnon"],
        "peak_mapped_file_gb": peaks["RssFile"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--step", choices=("make", "convert"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        file, out = args.folder / "umt5.pth", args.folder / "out"
        print(json.dumps(convert(file, args.layers, out)) if args.step == "convert" else make_file(file, args.layers))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for step in ("make", "convert"):
            given = ["--folder", folder, "--layers", str(args.layers), "--step", step]
            done = subprocess.run([sys.executable, __file__, *given], check=True, capture_output=True, text=True)
        print(json.dumps(json.loads(done.stdout), indent=1))


if __name__ == "__main__":
    main()
