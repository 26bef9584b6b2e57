"""Prompt switch: the cache is made anew under another prompt, at a chunk boundary (METHOD section 9).

What a beam remembers of its past are keys and values that the old prompt has shaped. `recache` passes its last chunks
through the network once more, all together and with full attention among them, under the new prompt; what comes out
replaces the old. Everything else of the state stays: latents, noise, seeds, scores, flags, the decoder.

- `global_sink=False`: the whole cache is replaced. The oldest recached chunk becomes the first sink, at its own
  position; appended sinks are dropped, and their room is free again.
- `global_sink=True`: sinks stay as they are, first and appended ones. They are attended to in the recache in place of
  the chunks that would have become sinks.
- Exception, as released: where the recached chunks reach back to frame 0, the sinks are replaced in either case.
- The chunk that the last commit pushed out of the window was routed under the old prompt, before the switch.

Beams are recached each with its own past.
"""

import dataclasses
import functools

import jax
from jaxtyping import PyTree

from streamt1_jax.cache import rewrite, sinks_of
from streamt1_jax.config import StreamConfig
from streamt1_jax.generator import Conditioning
from streamt1_jax.search import Search
from streamt1_jax.sharding import BEAMS, along
from streamt1_jax.state import StreamState


def replaces_sinks(stream: StreamConfig, committed: int) -> bool:
    """Whether a switch after `committed` chunks replaces the sinks too."""
    return not stream.global_sink or committed <= stream.local_chunks


def recache(
    search: Search, params: PyTree, conditioning: Conditioning, state: StreamState, *, committed: int
) -> StreamState:
    """The state with the past of every beam as the new prompt would have made it.

    Args:
        conditioning: of the new prompt; the next `step` takes the same.
        committed: chunks behind the state, at least 1; static, and all numbers above `local_chunks` are one program.
    """
    stream = search.config.stream
    f = stream.latent_frames_per_chunk
    sinks = replaces_sinks(stream, committed)
    count = min(committed, stream.local_chunks) - (0 if sinks else stream.sink_chunks)

    def of_beam(cache, latents):
        past = None if sinks else sinks_of(cache, search.config)
        frames = latents[-count:].reshape(count * f, *latents.shape[2:])
        kv = search.generator.context(params, conditioning, frames, past, (state.chunk - count) * f)
        return rewrite(cache, kv, chunk=state.chunk, sinks=sinks, config=search.config)

    with jax.named_scope("recache"):
        cache = jax.vmap(of_beam)(state.beams.cache, state.beams.latents)
        beams = along(search.mesh, dataclasses.replace(state.beams, cache=cache), BEAMS)
        return dataclasses.replace(state, beams=beams)


def jitted_recache(
    search: Search, params: PyTree, conditioning: Conditioning, state: StreamState, *, committed: int
) -> StreamState:
    """`recache` compiled; the state handed in is consumed."""
    return _jitted(search, params, conditioning, state, min(committed, search.config.stream.local_chunks + 1))


@functools.partial(jax.jit, static_argnames=("search", "committed"), donate_argnames="state")
def _jitted(search, params, conditioning, state, committed):
    return recache(search, params, conditioning, state, committed=committed)
