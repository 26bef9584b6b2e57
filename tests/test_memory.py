"""The memory plan, against the arrays that a tiny run really makes and against known sizes of the full model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from streamt1_jax.bench import Bench
from streamt1_jax.config import ModelConfig, RunConfig, SearchConfig
from streamt1_jax.memory import GIGABYTE, REWARD_BYTES, format_plan, memory_plan, size_of
from streamt1_jax.networks import network_graph
from streamt1_jax.stream import init_state
from streamt1_jax.weights import random_params

TINY = ModelConfig.tiny()
FULL = ModelConfig.wan_1_3b()


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "search",
    [
        SearchConfig(),
        SearchConfig(beams=3, candidates_per_beam=1, sink_dtype="bfloat16"),
        SearchConfig(decode="window"),
        SearchConfig.longlive(),
    ],
    ids=["default", "3x1", "window", "longlive"],
)
def test_entries_are_the_sizes_of_real_arrays(search):
    config = RunConfig(search=search)
    bench = Bench(TINY, height=TINY.height, width=TINY.width, dtype=jnp.float32, rewards=None)
    made = bench.search(config)
    state = init_state(made, 0, 1)
    entries = memory_plan(TINY, config, TINY.height, TINY.width, jnp.float32).entries
    beams, count = search.grid
    decoder, window = nbytes(state.beams.decoder) // beams, nbytes(state.beams.window) // beams
    real = {
        "text encoder": nbytes(random_params(network_graph(TINY, "text", jnp.float32)[1], 0)),
        "DiT": nbytes(bench.params["dit"]),
        "VAE decoder": nbytes(bench.params["decoder"]),
        "prompt keys and values": nbytes(bench.conditioning(made).text),
        "KV caches": nbytes((state.beams.cache.k, state.beams.cache.v)),
        "newest sinks": nbytes(state.beams.cache.newest_sink),
        "decoder states": decoder * (beams + beams * count),
        "reward windows": window * (beams + beams * count),
    }
    assert {name: entries[name] for name in real} == real


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_size_of_counts_shapes_like_arrays(dtype):
    tree = {"a": jnp.zeros((3, 5), dtype), "b": (jnp.zeros((), jnp.int32), None)}
    assert size_of(tree) == nbytes(tree) == size_of(jax.eval_shape(lambda: tree))


@pytest.fixture(scope="module")
def plans():
    """Full size in bfloat16: one candidate, and 2 beams of 2 with both rewards."""
    plan = lambda search, rewards=(): memory_plan(FULL, RunConfig(search=search), 480, 832, jnp.bfloat16, rewards)  # noqa: E731
    return plan(SearchConfig.longlive()), plan(SearchConfig(), tuple(REWARD_BYTES))


def test_known_sizes_of_the_full_model(plans):
    one, search = plans
    known = {
        "text encoder": 11.36,  # 5.68 billion parameters
        "DiT": 2.84,  # 1.42 billion parameters
        # Keys and values of 30 layers and 1536 channels: 9 latent frames of 1560 tokens are kept, and 21 with sinks.
        "KV caches": 2 * 30 * 9 * 1560 * 1536 * 2 / GIGABYTE,
    }
    assert {name: round(one.entries[name] / GIGABYTE, 2) for name in known} == pytest.approx(known, abs=0.01)
    assert search.entries["KV caches"] / one.entries["KV caches"] == pytest.approx(2 * 21 / 9)
    assert one.entries["newest sinks"] == 0
    for plan, streams in ((one, 2), (search, 6)):  # a state a beam, and one a candidate
        assert plan.entries["decoder states"] / streams / GIGABYTE == pytest.approx(1.89, abs=0.005)


def test_the_peak_leaves_out_what_is_released(plans):
    one, search = plans
    assert one.peak == sum(one.entries.values()) - one.entries["text encoder"]
    assert 10 < one.peak / GIGABYTE < 16
    assert {f"reward {name}": size for name, size in REWARD_BYTES.items()}.items() <= search.entries.items()
    assert 50 < search.peak / GIGABYTE < 80


def test_memory_grows_with_every_setting_that_costs_some():
    config = RunConfig(search=SearchConfig())
    plan = lambda config: memory_plan(TINY, config, TINY.height, TINY.width, jnp.float32).peak  # noqa: E731
    for change in ({"beams": 3}, {"candidates_per_beam": 3}, {"max_sink_size": 18}, {"sliding_window_size": 11}):
        larger = dataclasses.replace(config, search=dataclasses.replace(config.search, **change))
        assert plan(larger) > plan(config), change


def test_the_table_names_every_entry(plans):
    text = format_plan(plans[1])
    for name in (*plans[1].entries, "peak"):
        assert name in text
    assert "released before the first chunk" in text.splitlines()[0]
