"""The stages of a step, each its own compiled program: what measures or compares them runs `stream.step` by these."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from streamt1_jax import stream
from streamt1_jax.generator import Conditioning
from streamt1_jax.state import ChunkRecord, StreamState

NAMES = ("propose", "watch", "judge", "select", "recall", "commit", "host")

propose = jax.jit(stream.propose, static_argnames=("search", "first"))
watch = jax.jit(stream.watch, static_argnames=("search", "first"))
judge = jax.jit(stream.judge, static_argnames=("search", "first"))
recall = jax.jit(stream.recall, static_argnames=("search", "first"))


def select(search, state, candidates, seen, scores):
    """`stream.select`; a beam that is its own parent is handed on as it is, where a program would make a copy."""
    winners = _select(search, state, candidates, seen, scores)
    return winners if winners.parent is not None else winners._replace(parent=state.beams)


@functools.partial(jax.jit, static_argnames="search")
def _select(search, state, candidates, seen, scores):
    winners = stream.select(search, state, candidates, seen, scores)
    return winners._replace(parent=None) if search.config.search.grid[0] == 1 else winners


def commit(search, params, state, candidates, seen, scores, winners, kv, *, first):
    """`stream.commit`, which writes over what the next beams take from the winners, as the whole step does."""
    large = {name: getattr(winners, name) for name in ("parent", "window", "decoder")}
    rest = winners._replace(**dict.fromkeys(large))
    # A single parent is `state.beams`: given away here and handed in at once. That is allowed, as `stream.commit` reads
    # only the numbers of the state, and JAX leaves out of a program what it does not read.
    return _commit(search, params, state, candidates, seen, scores, large, rest, kv, first=first)


@functools.partial(jax.jit, static_argnames=("search", "first"), donate_argnames="large")
def _commit(search, params, state, candidates, seen, scores, large, rest, kv, *, first):
    return stream.commit(search, params, state, candidates, seen, scores, rest._replace(**large), kv, first=first)


_COMPILED = {
    stream.propose: propose,
    stream.watch: watch,
    stream.judge: judge,
    stream.select: select,
    stream.recall: recall,
    stream.commit: commit,
}


def staged_step(
    search: stream.Search,
    params: PyTree,
    conditioning: Conditioning,
    state: StreamState,
    *,
    first: bool,
    around: Callable[[str, Callable[[], Any]], Any],
) -> tuple[StreamState, ChunkRecord]:
    """`stream.step`, a program a stage, and its record on the host. The state handed in is consumed.

    Args:
        around: `around(name, run)` calls `run` and returns what the following stages are to be given; for every one
            of `NAMES`, in this order.
    """

    def call(stage: Callable, *args: Any, **kwargs: Any) -> Any:
        return around(stage.__name__, lambda: _COMPILED[stage](*args, **kwargs))

    state, record = stream.step(search, params, conditioning, state, first=first, call=call)
    return state, around("host", lambda: jax.device_get(record))
