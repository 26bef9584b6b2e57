"""Run by test_sharding.py in a process with 8 devices: the same video on one device and on eight, as JSON."""

import dataclasses
import itertools
import json
import math
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small import SMALL, SmallWeights

from streamt1_jax.bench import Bench
from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.measure import compilations
from streamt1_jax.mini.rewards import RewardNet, make_reward
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.rewards import Reward, host_reward, per_video
from streamt1_jax.rewards.registry import Role
from streamt1_jax.sharding import candidate_mesh, place
from streamt1_jax.state import ChunkRecord
from streamt1_jax.stream import Search, init_state, jitted_step, propose

CHUNKS = 7
FEW = 3  # chunks, where every way of running is tried once
# With this seed and these thresholds the evicted chunks take all three routes.
SEED = 3
SEARCH = SearchConfig(candidates_per_beam=4, max_sink_size=9, short_threshold=0.04, long_threshold=0.0)


def video(
    devices: int,
    search: SearchConfig = SEARCH,
    chunks: int = CHUNKS,
    short: str | Reward = "native",
    long: str | Reward = "native",
) -> tuple[list[ChunkRecord], list[int]]:
    """Every chunk's record, and how many programs were compiled by the end of each."""
    pipe, records, compiled = StreamT1Pipeline(SmallWeights(), devices=devices), [], []
    stream = pipe.stream("a blue square", seed=SEED, search=search, rewards=(short, long))
    with compilations() as seen:
        for result in itertools.islice(stream, chunks):
            records.append(result.record)
            compiled.append(len(seen))
    return records, compiled


def window_decode() -> dict[str, object]:
    """One device and eight, with every window decoded anew."""
    search = dataclasses.replace(SEARCH, decode="window")
    one, eight = (video(devices, search, FEW)[0] for devices in (1, 8))
    return compare(one, eight)


def reward_on_the_host() -> dict[str, object]:
    """One device and eight, and how often the reward was asked for a video in each."""
    asked: list[int] = []

    def brightness(frames: np.ndarray, prompt: str) -> float:
        asked.append(len(frames))
        return float(frames.astype(np.float64).mean() / 255)

    reward = host_reward("brightness", per_video(brightness))
    one, _ = video(1, SEARCH, FEW, reward)
    of_one = len(asked)
    eight, _ = video(8, SEARCH, FEW, reward)
    return {**compare(one, eight), "asked": [of_one, len(asked) - of_one]}


def rewards_that_read() -> dict[str, object]:
    """One device and eight, judged by networks of random numbers that read the prompt's tokens."""
    roles: tuple[Role, Role] = ("short", "long")
    judges = [make_reward(role, nnx.split(RewardNet(role, rngs=nnx.Rngs(0)))[1]) for role in roles]
    one, eight = (video(devices, SEARCH, FEW, *judges)[0] for devices in (1, 8))
    return compare(one, eight)


def compare(one: list[ChunkRecord], eight: list[ChunkRecord]) -> dict[str, object]:
    """Largest differences of numbers, and which of the rest are not equal."""
    pairs = list(zip(one, eight, strict=True))
    equal = ("seed", "kept", "ema", "append", "sink_start", "evicted_start", "evicted_route", "usable")
    close = ("latents", "short", "long", "score")
    return {
        "unequal": [name for name in equal if any((getattr(a, name) != getattr(b, name)).any() for a, b in pairs)],
        "error": {
            name: max(float(np.abs(getattr(a, name) - getattr(b, name)).max()) for a, b in pairs) for name in close
        },
        "routes": sorted({int(route) for record in one for route in record.evicted_route}),
        "kept": [record.kept.tolist() for record in one],
    }


def on_eight() -> tuple:
    """Search, parameters and conditioning on eight devices, and the first state."""
    bench = Bench(SMALL, height=16, width=32, dtype=jnp.float32, rewards=None)
    plain = bench.search(RunConfig(search=SEARCH))
    search = dataclasses.replace(plain, mesh=candidate_mesh(SEARCH, 8))
    params = place(search.mesh, bench.params)
    conditioning = jax.jit(search.generator.prepare)(params, jnp.zeros((16, 8)), jnp.int32(0))
    return search, params, conditioning, init_state(search, SEED, CHUNKS)


def layout(search: Search, params, conditioning, state) -> dict[str, object]:
    """Where the candidates of a chunk lie, and where the state that they start from does."""
    run = jax.jit(propose, static_argnames=("search", "first"))
    shards = run(search, params, conditioning, state, first=True).latents.addressable_shards
    kept = state.beams.cache.k.addressable_shards
    return {
        "candidates": sorted((shard.device.id, list(shard.data.shape[:2])) for shard in shards),
        "beams": [list(shard.data.shape[:1]) for shard in kept],
    }


def reduced(search: Search, params, conditioning, state) -> dict[str, object]:
    """Shapes that the compiled step sums over devices, and those of one beam's state."""
    step = jitted_step.lower(search, params, conditioning, state, first=False).compile()
    results = re.findall(r"= (.*?) all-reduce(?:-start)?\(", step.as_text())
    shapes = [
        [int(n) for n in shape.split(",")] for result in results for shape in re.findall(r"\w\d+\[([\d,]+)\]", result)
    ]
    return {
        "shapes": shapes,
        "window": list(state.beams.window.shape[1:]),
        "largest": max(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(state.beams)),
    }


def refusals() -> list[list[object]]:
    """(beams, candidates of each, devices, what is said) of grids; nothing is said where they fit."""
    said = []
    for beams, count, devices in ((2, 4, 8), (2, 2, 8), (2, 3, 4), (3, 1, 2), (3, 2, 6), (2, 4, 16)):
        try:
            candidate_mesh(SearchConfig(beams=beams, candidates_per_beam=count), devices)
            message = None
        except BadInputError as error:
            message = str(error)
        said.append([beams, count, devices, message])
    return said


def main() -> None:
    one, _ = video(1)
    eight, compiled = video(8)
    placed = on_eight()
    report = {
        "devices": jax.device_count(),
        **compare(one, eight),
        "compiled": compiled,
        "layout": layout(*placed),
        "reduced": reduced(*placed),
        "window_decode": window_decode(),
        "rewards_that_read": rewards_that_read(),
        "reward_on_the_host": reward_on_the_host(),
        "refusals": refusals(),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
