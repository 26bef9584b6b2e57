"""What the compiled step does not do: copy the cache, call the host, wait for it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from small import SMALL

from streamt1_jax.bench import Bench
from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.memory import size_of
from streamt1_jax.rewards import Reward, host_reward, native_long, native_short, per_video
from streamt1_jax.stream import init_state, jitted_step, step

ONE, FOUR = SearchConfig.longlive(), SearchConfig()
CALLS_TO_THE_HOST = ("callback", "infeed", "outfeed", "send", "recv")


def made(search: SearchConfig, short: Reward | None = None):
    """(search, parameters, conditioning, state) of a small model."""
    rewards = (short or native_short(), native_long())
    bench = Bench(SMALL, height=SMALL.height, width=SMALL.width, dtype=jnp.float32, rewards=rewards)
    ready = bench.search(RunConfig(search=search))
    return ready, bench.params, bench.conditioning(ready), init_state(ready, 0, 8)


@pytest.fixture(scope="module", params=[ONE, FOUR], ids=["plain streaming", "2x2"])
def compiled(request):
    """The arguments of a step, and the step compiled for them."""
    args = made(request.param)
    return args, jitted_step.lower(*args, first=False).compile()


def test_the_state_is_written_over_the_one_before(compiled):
    """XLA plans what is large in the next state into the memory of the donated one: no cache is held twice."""
    (_, _, _, state), step = compiled
    shared = step.memory_analysis().alias_size_in_bytes
    large = size_of((state.beams.cache, state.beams.decoder, state.beams.window))
    assert shared >= large, f"{shared} bytes are shared, caches, decoders and windows have {large}"


def test_a_cache_is_moved_only_where_beams_change_places(compiled):
    """A chunk is written into its slot and the rest of the cache stays where it is.

    With several beams each takes over its parent's cache: a gather of keys and one of values. XLA copies each once
    more before it is written into, because the context pass reads it too. Nothing else is moved.
    """
    (search, _, _, state), step = compiled
    shape = "f32[" + ",".join(map(str, state.beams.cache.k.shape)) + "]"
    text = step.as_text()
    assert shape in text, "the cache is not in the program under its shape: nothing is tested"
    copies = re.findall(rf"= {re.escape(shape)}\S* copy(?:-start)?\(", text)
    gathers = re.findall(rf"= {re.escape(shape)}\S* [\w-]+\([^\n]*/select/gather", text)
    size = math.prod(state.beams.cache.k.shape)
    moved = 0 if search.config.search.grid[0] == 1 else 2  # keys, values
    assert max(len(copies), len(gathers)) <= moved, f"{len(copies)} copies, {len(gathers)} gathers of {size} numbers"


def test_the_state_handed_in_is_gone():
    search, params, conditioning, state = made(ONE)
    following, _ = jitted_step(search, params, conditioning, state, first=True)
    large = {"cache": state.beams.cache, "decoder": state.beams.decoder, "window": state.beams.window}
    held = [name for name, tree in large.items() for leaf in jax.tree.leaves(tree) if not leaf.is_deleted()]
    assert not held, "what was donated is still there"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((following, params, conditioning)))


def primitives(jaxpr) -> list[str]:
    """Names of all primitives, those of inner programs too."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                names += primitives(getattr(inner, "jaxpr", inner))
    return names


def traced(args, *, first: bool) -> list[str]:
    search, *rest = args
    return primitives(jax.make_jaxpr(functools.partial(step, search, first=first))(*rest).jaxpr)


@pytest.mark.parametrize("first", [True, False])
def test_native_rewards_leave_nothing_to_the_host(first):
    names = traced(made(FOUR), first=first)
    assert "dot_general" in names, "the networks were not looked into"
    assert not [name for name in names if any(word in name for word in CALLS_TO_THE_HOST)]


def test_the_compiled_step_calls_no_host_either(compiled):
    targets = re.findall(r'custom_call_target="([^"]+)"', compiled[1].as_text())
    assert not [name for name in targets if "callback" in name.lower()], targets
    assert not re.findall(r" (?:infeed|outfeed|send|recv)\(", compiled[1].as_text())


def test_a_reward_on_the_host_is_the_one_crossing():
    """One for each platform that the program may be lowered for, in one conditional."""
    reward = host_reward("brightness", per_video(lambda video, prompt: float(video.mean())))
    names = traced(made(FOUR, reward), first=False)
    crossings = [name for name in names if any(word in name for word in CALLS_TO_THE_HOST)]
    assert sorted(crossings) == ["buffer_callback", "pure_callback"]
