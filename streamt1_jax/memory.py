"""The memory a run needs on its device, from shapes alone: nothing is loaded and no device is touched."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from streamt1_jax.config import ModelConfig, RunConfig
from streamt1_jax.generator import wan_generator
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.rewards import native_long, native_short
from streamt1_jax.rewards.placement import CONTEXT_BYTES
from streamt1_jax.stream import Search, init_state

GIGABYTE = 1e9
# As `streamt1 convert rewards` stores the published models: 7.75 and 2.21 billion parameters in bfloat16 without the
# language-model heads, HPSv3's own head in float32. A test counts them.
REWARD_BYTES = {"hpsv3": 15504596168.0, "videoreward": 4417126400.0}
REWARD_LINEAR = {"hpsv3": 7198998528, "videoreward": 1973420032}  # parameters of linear layers: what int8 halves
REWARD_BATCH_BYTES = 4e9  # the default bound on the activations of one batch of clips (rewards.batch_gb)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they hold. `peak` leaves out what is gone by the time the chunks are made."""

    entries: dict[str, float]
    before: frozenset[str]  # released before the first chunk
    torch: frozenset[str]  # taken by torch, outside what JAX may take of the device

    @property
    def peak(self) -> float:
        return sum(size for name, size in self.entries.items() if name not in self.before)

    @property
    def jax_peak(self) -> float:
        return self.peak - sum(self.entries[name] for name in self.torch)


def size_of(tree: PyTree) -> int:
    """Bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def memory_plan(
    model: ModelConfig,
    config: RunConfig,
    height: int,
    width: int,
    dtype: Any,
    rewards: tuple[str, ...] = (),
    reward_sizes: Mapping[str, float] = REWARD_BYTES,
    reward_batch: float = REWARD_BATCH_BYTES,
) -> MemoryPlan:
    """What a run will hold.

    Args:
        height, width: pixels of the video.
        dtype: of parameters, activations and the KV cache.
        rewards: names in `reward_sizes` that live on the same device.
        reward_sizes: bytes of reward models' weights.
        reward_batch: bytes of one batch of theirs.
    """
    generator = wan_generator(model, config.stream, height, width, dtype)
    noise = gaussian_noise(generator.chunk_shape, len(config.stream.denoising_steps))
    search = Search(generator, native_short(), native_long(), noise, config)
    state = jax.eval_shape(lambda: init_state(search, 0, 1))
    beams, count = config.search.grid
    candidates = beams * count
    cache = state.beams.cache
    per_beam_decoder = size_of(state.beams.decoder) / beams
    window = size_of(state.beams.window) / beams
    layers, tokens, heads, head_dim = generator.kv.shape
    itemsize = jnp.dtype(dtype).itemsize
    chunk_kv = 2 * math.prod(generator.kv.shape) * itemsize
    # Of one block: the joined keys and values, and about eight arrays as wide as the feed-forward's middle.
    seen = tokens * (1 + config.cache_slots)
    block = itemsize * (2 * seen * heads * head_dim + tokens * (8 * model.dit.dim + 2 * model.dit.ffn_dim))
    # The decoder's last level holds about six arrays of one latent frame's pixels.
    pixels = model.vae.time_factor * height * width
    decoding = 6 * itemsize * pixels * model.vae.dim * model.vae.dim_mult[0]
    entries = {
        "text encoder": size_of(network_graph(model, "text", dtype)[1]),
        "DiT": size_of(network_graph(model, "dit", dtype)[1]),
        "VAE decoder": size_of(network_graph(model, "decoder", dtype)[1]),
        "prompt keys and values": 2 * layers * model.dit.text_len * heads * head_dim * itemsize,
        "KV caches": size_of((cache.k, cache.v)),
        "newest sinks": size_of(cache.newest_sink),
        # Several beams gather their parents' caches into new ones; a beam alone is written in place.
        "KV caches of the next chunk": (size_of((cache.k, cache.v)) if beams > 1 else 0) + beams * chunk_kv,
        "decoder states": per_beam_decoder * (beams + candidates),
        "reward windows": window * (beams + candidates),
        "activations, estimated": candidates * max(block, decoding),
    }
    torch = {f"reward {name}": reward_sizes[name] for name in rewards}
    if torch:
        torch |= {"reward batches, at most": reward_batch, "torch itself, estimated": CONTEXT_BYTES}
    return MemoryPlan(entries | torch, frozenset({"text encoder"}), frozenset(torch))


def format_plan(plan: MemoryPlan) -> str:
    """The plan as a table in gigabytes."""
    width = max(map(len, plan.entries))
    rows = [
        f"{name:{width}}  {size / GIGABYTE:8.2f} GB"
        + ("  released before the first chunk" if name in plan.before else "")
        for name, size in plan.entries.items()
    ]
    return "\n".join([*rows, f"{'peak':{width}}  {plan.peak / GIGABYTE:8.2f} GB"])
