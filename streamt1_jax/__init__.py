"""Stream-T1 in JAX: test-time scaling for streaming video generation.

Names are resolved when they are first used, so that importing the package touches no device and loads no network.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streamt1_jax.config import ModelConfig, RunConfig, SearchConfig, StreamConfig
    from streamt1_jax.generator import Generator, wan_generator
    from streamt1_jax.noise import Draws, gaussian_noise, recorded_noise
    from streamt1_jax.pipeline import StreamT1Pipeline
    from streamt1_jax.result import ChunkResult, Output
    from streamt1_jax.rewards import Reward
    from streamt1_jax.stream import Search, init_state, rollout, step, stream_chunks
    from streamt1_jax.trace import Trace

_HOME = {
    "ModelConfig": "config",
    "RunConfig": "config",
    "SearchConfig": "config",
    "StreamConfig": "config",
    "Generator": "generator",
    "wan_generator": "generator",
    "Draws": "noise",
    "gaussian_noise": "noise",
    "recorded_noise": "noise",
    "StreamT1Pipeline": "pipeline",
    "ChunkResult": "result",
    "Output": "result",
    "Reward": "rewards",
    "Search": "stream",
    "init_state": "stream",
    "rollout": "stream",
    "step": "stream",
    "stream_chunks": "stream",
    "Trace": "trace",
}

__all__ = [
    "ChunkResult",
    "Draws",
    "Generator",
    "ModelConfig",
    "Output",
    "Reward",
    "RunConfig",
    "Search",
    "SearchConfig",
    "StreamConfig",
    "StreamT1Pipeline",
    "Trace",
    "gaussian_noise",
    "init_state",
    "recorded_noise",
    "rollout",
    "step",
    "stream_chunks",
    "wan_generator",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
