"""A lane of a benchmark: one number of candidates, ready to run, what times it and what was measured of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from streamt1_jax.cache import EMPTY
from streamt1_jax.config import RunConfig
from streamt1_jax.generator import Conditioning
from streamt1_jax.models.umt5 import encode_prompt
from streamt1_jax.rewards.base import PromptTokens, Reward
from streamt1_jax.stages import staged_step
from streamt1_jax.state import ChunkRecord, StreamState
from streamt1_jax.stream import Search, init_state, jitted_step


class ChunkTimes(NamedTuple):
    """What one chunk took."""

    stages: dict[str, float]  # seconds
    whole: float  # seconds as one program, with its record on the host
    appended: float  # sink chunks that its beams attended to beside the first, their mean

    @property
    def staged(self) -> float:
        return sum(self.stages.values())


@dataclass
class Lane:
    """One number of candidates, and what was measured of it."""

    candidates: int
    search: Search
    params: PyTree
    conditioning: Conditioning
    compile_seconds: dict[str, float] = field(default_factory=dict)
    step_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    videos: list[list[ChunkTimes]] = field(default_factory=list)
    compiled: int = 0

    @property
    def steady(self) -> int:
        """The first chunk that counts."""
        return steady_chunk(self.search.config, (self.search.short, self.search.long))

    def step(self, state: StreamState, index: int) -> tuple[StreamState, ChunkRecord]:
        return jitted_step(self.search, self.params, self.conditioning, state, first=index == 0)


def steady_chunk(config: RunConfig, rewards: tuple[Reward, Reward]) -> int:
    """The chunk from which on every chunk costs the same: the windows of cache and rewards have been full for one.

    A reward in JAX computes over the room of its window, full or not; one on the host is sent what is there.
    """
    cached = config.stream.sink_chunks + config.stream.window_chunks
    judged = config.search.sliding_window_size if any(reward.runs_on == "host" for reward in rewards) else 0
    return max(cached, judged) + 1


class _Clock:
    """Seconds of each stage of one chunk."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = jax.block_until_ready(run())
        self.seconds[name] = time.perf_counter() - started
        return result


def time_video(lane: Lane, chunks: int) -> list[ChunkTimes]:
    """Every chunk of a video is made twice from the same state, stage by stage and by the one program."""
    state, taken = jax.block_until_ready(init_state(lane.search, 0, chunks)), []
    for index in range(chunks):
        same = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # either way of making a chunk consumes its state
        if index % 2:  # in turn, as the first of the two finds less in the processor's caches
            stages, (next_state, record, whole) = _staged(lane, same, index), _whole(lane, state, index)
        else:
            (next_state, record, whole), stages = _whole(lane, state, index), _staged(lane, same, index)
        state = next_state
        appended = (record.sink_start != EMPTY).sum(axis=1).mean()
        taken.append(ChunkTimes(stages, whole, float(appended)))
    for reward in (lane.search.short, lane.search.long):
        reward.raise_if_failed()
    return taken


def _staged(lane: Lane, state: StreamState, index: int) -> dict[str, float]:
    clock = _Clock()
    staged_step(lane.search, lane.params, lane.conditioning, state, first=index == 0, around=clock)
    return clock.seconds


def _whole(lane: Lane, state: StreamState, index: int) -> tuple[StreamState, ChunkRecord, float]:
    started = time.perf_counter()
    next_state, on_device = lane.step(state, index)
    record = jax.device_get(on_device)
    jax.block_until_ready(next_state)
    return next_state, record, time.perf_counter() - started


def first_frames(lane: Lane, embeds: Callable[[], jax.Array]) -> np.ndarray:
    """From a prompt's tokens, which `embeds` encodes, to the frames of chunk 0 on the host."""
    conditioning = prepare(lane.search, lane.params, embeds(), jnp.int32(0))
    state = init_state(lane.search, 0, 1)
    _, record = jitted_step(lane.search, lane.params, conditioning, state, first=True)
    return jax.device_get(record.frames)


def step_bytes(step: Any) -> dict[str, int]:
    """What XLA plans for the compiled step, by device; what is donated counts once. Empty where it does not tell."""
    plan = step.memory_analysis()
    if plan is None:
        return {}
    return {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes - plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
    }


@jax.jit(static_argnames="search")
def prepare(search: Search, params: PyTree, embeds: jax.Array, prompt_index: jax.Array) -> Conditioning:
    no_tokens = jnp.zeros(embeds.shape[:1], jnp.int32)
    tokens = PromptTokens(no_tokens, jnp.ones_like(no_tokens))  # for rewards that read them
    return search.generator.prepare(params, embeds, prompt_index)._replace(tokens=tokens)


@jax.jit(static_argnames="graphdef")
def encode(graphdef: nnx.GraphDef, params: PyTree, ids: jax.Array) -> jax.Array:
    return encode_prompt(nnx.merge(graphdef, params), ids, jnp.ones_like(ids)).astype(jnp.float32)
