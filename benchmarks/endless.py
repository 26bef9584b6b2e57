"""A long stream of the tiny model: does a chunk take the same time, and the process the same memory, all along?

    python benchmarks/endless.py [--chunks 200] [--candidates 2] [--switch-every 50] [--repeats 3] [--json FILE]

Prints the median time of chunks 10 to 30 and of the last 20 with their ratio, and resident memory at a few moments.
More than 341 chunks reach frame positions beyond 1023.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
from race import write_report

from streamt1_jax.compile_cache import enable_compilation_cache
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.measure import machine
from streamt1_jax.networks import network_graph
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.weights import MiniWeights, random_params

PROMPTS = ("a red circle moves right", "a blue square spins")


class TinyWeights:
    """Random numbers for the sizes of `ModelConfig.tiny`, with the embedded model's tokenizer."""

    config, tokenizer = ModelConfig.tiny(), MiniWeights.tokenizer
    default_rewards = "native"
    own_rewards: Path | None = None

    def generator_params(self, dtype):
        return {name: random_params(network_graph(self.config, name, dtype)[1], 0) for name in ("dit", "decoder")}

    def text_params(self, dtype):
        return random_params(network_graph(self.config, "text", dtype)[1], 0)

    def describe(self):
        return {"name": "tiny", "summary": "random numbers", "trained": False}


def resident_megabytes() -> float:
    """Of this process, now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def measure(chunks: int, candidates: int, switch_every: int | None) -> dict:
    """Seconds of every chunk, and resident memory after it in MB."""
    pipe = StreamT1Pipeline(TinyWeights())
    search = SearchConfig(beams=candidates, candidates_per_beam=candidates)
    seconds, memory = [], []
    with pipe.stream(PROMPTS[0], search=search) as stream:
        for result in stream:
            seconds.append(result.seconds)
            memory.append(resident_megabytes())
            done = result.chunk.index + 1
            if done == chunks:
                break
            if switch_every and done % switch_every == 0:
                pipe.switch_prompt(PROMPTS[done // switch_every % 2])
    early, late = statistics.median(seconds[10:31]), statistics.median(seconds[-20:])
    return {
        "chunks": chunks,
        "grid": [candidates, candidates],
        "last_frame": 3 * chunks - 1,
        "seconds_chunks_10_to_30": early,
        "seconds_last_20": late,
        "ratio": late / early,
        "resident_mb": {str(at): round(memory[at], 1) for at in sorted({10, 30, chunks // 2, chunks - 1})},
        "resident_growth_mb": memory[-1] - memory[30],
        "device_memory": jax.local_devices()[0].memory_stats(),  # at the end; None on a CPU
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the chunks of a long stream of the tiny model.")
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=2, help="beams, and candidates of each")
    parser.add_argument("--switch-every", type=int, metavar="N", help="another prompt after every N chunks")
    parser.add_argument("--repeats", type=int, default=1, help="streams, one after the other (default: 1)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.chunks < 60:
        parser.error(f"--chunks is {args.chunks}, expected at least 60: chunks 10 to 30 and the last 20 are compared")
    enable_compilation_cache()
    report: dict[str, Any] = {"machine": machine(), "model": "tiny, random weights", "runs": []}
    for _ in range(args.repeats):
        report["runs"].append(measure(args.chunks, args.candidates, args.switch_every))
        print(json.dumps(report["runs"][-1], indent=1))
        write_report(args.json, report)


if __name__ == "__main__":
    main()
