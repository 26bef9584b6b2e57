"""What the rewards see: candidates decoded in a batch or one after the other are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from compare import assert_close
from small import SMALL, SmallWeights

from streamt1_jax import window
from streamt1_jax.bench import Bench
from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.sharding import candidate_mesh
from streamt1_jax.stream import init_state
from streamt1_jax.window import decodes_in_turn, over_candidates

GRID = (2, 3)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SMALL, height=SMALL.height, width=SMALL.width, dtype=jnp.float32, rewards=None)


def test_in_turn_on_one_cpu_alone(monkeypatch):
    assert decodes_in_turn(None)
    assert not decodes_in_turn(candidate_mesh(SearchConfig(), 1))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not decodes_in_turn(None)


@pytest.mark.parametrize("grid", [GRID, (1, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("in_turn", [True, False])
def test_every_candidate_meets_its_own_beam(grid, in_turn):
    numbers = {"x": jnp.arange(grid[0] * grid[1]).reshape(grid), "y": jnp.ones((*grid, 2))}
    beams = (10 * jnp.arange(grid[0]), None)
    met = over_candidates(lambda one, beam: (one["x"], beam[0], one["y"]), numbers, beams, in_turn=in_turn)
    assert met[0].tolist() == numbers["x"].tolist()
    assert met[1].tolist() == [[10 * beam] * grid[1] for beam in range(grid[0])]
    assert met[2].shape == (*grid, 2)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("decode", ["streaming", "window"])
def test_decoding_in_turn_is_decoding_in_a_batch(bench, monkeypatch, decode, first):
    """Different latents for every candidate, and a different past for every beam."""
    config = RunConfig(search=SearchConfig(beams=GRID[0], candidates_per_beam=GRID[1], decode=decode))
    search = bench.search(config)
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def draw(x):
        return jax.random.normal(next(keys), x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x

    state = init_state(search, 0, 4)
    state = dataclasses.replace(
        state,
        beams=jax.tree.map(draw, state.beams),
        chunk=jnp.int32(0 if first else 2),
        window_count=jnp.int32(0 if first else 5 if decode == "streaming" else 2),
    )
    latents = jax.random.normal(jax.random.key(1), (*GRID, *search.generator.chunk_shape))

    def seen(in_turn: bool):
        monkeypatch.setattr(window, "decodes_in_turn", lambda mesh: in_turn)
        see = jax.jit(lambda params, state, latents: search.window.see(params, state, latents, first=first))
        return jax.device_get(see(SmallWeights().generator_params(jnp.float32), state, latents))

    in_turn, batch = seen(True), seen(False)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(in_turn), jax.tree.leaves(batch), strict=True):
        # Of uint8 pixels a rounding error may turn one level into the next.
        assert_close(jax.tree_util.keystr(path), ours, theirs, 1 if ours.dtype == jnp.uint8 else 1e-5)
    assert float(abs(in_turn.chunk[0, 0] - in_turn.chunk[1, 0]).max()) > 1e-2, "candidates look the same"
