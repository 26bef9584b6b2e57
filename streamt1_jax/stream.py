"""The streaming search: `step` = propose, watch, judge, select, recall, commit; its drivers (METHOD sections 3 to 6).

- `step` is pure. `rollout` runs it under `jax.lax.scan`, one program for a whole video; `stream_chunks` runs the same
  function chunk by chunk from Python.
- Networks are written for one candidate; the axes [B, K] appear here, and in `window.py` for the decoder.
- Chunk 0 is the same function with `first=True`: it has fewer pixel frames, no past and no noise prior.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from collections.abc import Generator as Coroutine
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8

from streamt1_jax.cache import commit_chunk, empty_cache, past_of
from streamt1_jax.generator import Conditioning
from streamt1_jax.judge import judge, remember_short
from streamt1_jax.models.dit import KV
from streamt1_jax.noise import first_seeds, next_seeds, propagate
from streamt1_jax.pruning import keep_best
from streamt1_jax.rewards.base import PromptTokens, Reward, Verdict
from streamt1_jax.search import Candidates, Scores, Search, Winners
from streamt1_jax.sharding import BEAMS, CANDIDATES, along, place
from streamt1_jax.sink import flags_to_route
from streamt1_jax.state import Beam, ChunkRecord, StreamState
from streamt1_jax.switch import jitted_recache, recache
from streamt1_jax.window import Seen, to_pixels

THUMBNAIL_WIDTH = 96  # pixels, at most about this


def init_state(search: Search, seed: int, total_chunks: int) -> StreamState:
    """The state before chunk 0.

    Args:
        seed: 0 to 2^32 - 1.
        total_chunks: chunks of the whole video; the fusion weight rises over them.
    """
    beams, _ = search.config.search.grid
    recent = search.config.search.short_mean_window or 0
    beam = Beam(
        cache=empty_cache(search.config, search.generator.kv),
        decoder=search.generator.init_decoder(),
        window=search.window.empty(),
        noise=jnp.zeros(search.generator.chunk_shape, jnp.float32),
        seed=jnp.uint32(0),
        short_sum=jnp.float32(0),
        short_recent=jnp.zeros((recent,), jnp.float32),
        long=jnp.float32(0),
        latents=jnp.zeros((search.config.stream.local_chunks, *search.generator.chunk_shape), jnp.float32),
    )
    state = StreamState(
        beams=jax.tree.map(lambda x: jnp.broadcast_to(x, (beams, *x.shape)), beam),
        chunk=jnp.int32(0),
        window_count=jnp.int32(0),
        seed=jnp.uint32(seed),
        total_frames=jnp.int32(total_chunks * search.config.stream.latent_frames_per_chunk),
    )
    return place_state(search, state)


def place_state(search: Search, state: StreamState) -> StreamState:
    """A state of arrays that exist, on the devices of the search: its beams along them, the rest on each."""
    numbers = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "beams"}
    return StreamState(beams=place(search.mesh, state.beams, BEAMS), **place(search.mesh, numbers))


def _call(stage: Callable, *args: Any, **kwargs: Any) -> Any:
    return stage(*args, **kwargs)


def step(
    search: Search,
    params: PyTree,
    conditioning: Conditioning,
    state: StreamState,
    *,
    first: bool,
    call: Callable = _call,
) -> tuple[StreamState, ChunkRecord]:
    """One chunk: state and record out, nothing else happens.

    Args:
        first: whether this is chunk 0; must agree with `state.chunk`.
        call: `call(stage, *args, **kwargs)` runs one of the six; a benchmark compiles and times each here.
    """
    candidates = call(propose, search, params, conditioning, state, first=first)
    seen = call(watch, search, params, state, candidates, first=first)
    scores = call(judge, search, conditioning, state, candidates, seen, first=first)
    winners = call(select, search, state, candidates, seen, scores)
    kv = call(recall, search, params, conditioning, state, winners, first=first)
    return call(commit, search, params, state, candidates, seen, scores, winners, kv, first=first)


def propose(
    search: Search, params: PyTree, conditioning: Conditioning, state: StreamState, *, first: bool
) -> Candidates:
    """K candidates from each of the B beams: seeds, noise blended with the beam's own, few-step denoising."""
    with jax.named_scope("propose"):
        beams, candidates = search.config.search.grid
        propagation = search.config.search.noise_propagation
        seeds = (
            first_seeds(state.seed, beams, candidates)
            if first
            else next_seeds(state.seed, state.chunk, state.beams.seed, candidates, propagation=propagation)
        )
        seeds = along(search.mesh, seeds, BEAMS, CANDIDATES)
        start = state.chunk * search.config.stream.latent_frames_per_chunk
        blend = propagation and not first

        def candidate(seed, beam_noise, past):
            draws = search.noise(seed)
            if blend:
                draws = draws._replace(
                    initial=propagate(draws.initial, beam_noise, search.config.search.noise_fusion_sigma)
                )
            return draws.initial, search.generator.denoise(params, conditioning, draws, past, start)

        def of_beam(seeds, noise, cache):
            # The candidates of a beam share its past, read only.
            past = None if first else past_of(cache, state.chunk, search.config)
            return jax.vmap(candidate, in_axes=(0, None, None))(seeds, noise, past)

        noise, latents = jax.vmap(of_beam)(seeds, state.beams.noise, state.beams.cache)
        return along(search.mesh, Candidates(seeds, noise, latents), BEAMS, CANDIDATES)


def watch(search: Search, params: PyTree, state: StreamState, candidates: Candidates, *, first: bool) -> Seen:
    """Decodes every candidate, from its parent's decoder state or from a fresh one (`window.py`)."""
    with jax.named_scope("watch"):
        seen = search.window.see(params, state, candidates.latents, first=first)
        of_candidate = {name: getattr(seen, name) for name in ("chunk", "long", "window", "decoder")}
        return seen._replace(**along(search.mesh, of_candidate, BEAMS, CANDIDATES))


def select(search: Search, state: StreamState, candidates: Candidates, seen: Seen, scores: Scores) -> Winners:
    """The best B of all B * K candidates, each beside the beam that it continues."""
    with jax.named_scope("select"):
        beams, count = candidates.seed.shape
        kept = keep_best(scores.fused, scores.usable, beams)
        of_candidate = (candidates, scores.short, scores.long, flags_to_route(scores.ema, scores.append))
        of_candidate += (seen.chunk, seen.window, seen.decoder)
        # Laid out so that a device is sent one winner of each candidate axis, not all winners of all devices.
        of_candidate = along(search.mesh, of_candidate, None, CANDIDATES)
        beam, number = along(search.mesh, jnp.divmod(kept, count), BEAMS)
        won = jax.tree.map(lambda x: x[beam, number], of_candidate)
        # One beam continues itself: nothing of its cache needs to move.
        parent = state.beams if beams == 1 else jax.tree.map(lambda x: x[beam], state.beams)
        fixed = search.config.stream.sink_chunks + search.config.stream.window_chunks
        return along(search.mesh, Winners(kept, state.beams.cache.start[:, fixed:], parent, *won), BEAMS)


def recall(
    search: Search, params: PyTree, conditioning: Conditioning, state: StreamState, winners: Winners, *, first: bool
) -> KV:
    """The context pass of the kept chunks: what later chunks will see of them, [B, L, t, N, D] (METHOD section 3)."""
    with jax.named_scope("recall"):
        start = state.chunk * search.config.stream.latent_frames_per_chunk

        def of_beam(latents, cache):
            past = None if first else past_of(cache, state.chunk, search.config)
            return search.generator.context(params, conditioning, latents, past, start)

        return jax.vmap(of_beam)(winners.candidate.latents, winners.parent.cache)


def commit(
    search: Search,
    params: PyTree,
    state: StreamState,
    candidates: Candidates,
    seen: Seen,
    scores: Scores,
    winners: Winners,
    kv: KV,
    *,
    first: bool,
) -> tuple[StreamState, ChunkRecord]:
    """Makes the winners the beams: their chunks go into the caches, what leaves is routed (METHOD section 6)."""
    with jax.named_scope("commit"):
        parent = winners.parent
        store = functools.partial(commit_chunk, chunk=state.chunk, config=search.config)
        cache, evicted = jax.vmap(lambda cache, kv, route: store(cache, kv, route=route))(
            parent.cache, kv, winners.route
        )
        frames, decoder = winners.frames, winners.decoder
        if decoder is None:  # The rewards saw another decode than the viewer will.
            decode = functools.partial(search.generator.decode, params, first=first)
            frames, decoder = jax.vmap(decode)(parent.decoder, winners.candidate.latents)
        beams = Beam(
            cache=cache,
            decoder=decoder,
            window=winners.window,
            noise=winners.candidate.noise,
            seed=winners.candidate.seed,
            short_sum=parent.short_sum + winners.short,
            short_recent=remember_short(parent.short_recent, winners.short, state.chunk),
            long=winners.long,
            latents=jnp.concatenate([parent.latents[:, 1:], winners.candidate.latents[:, None]], axis=1),
        )
        _, window_count = search.window.next_count(state, first=first)
        beams = along(search.mesh, beams, BEAMS)
        next_state = dataclasses.replace(state, beams=beams, chunk=state.chunk + 1, window_count=window_count)
        return next_state, ChunkRecord(
            seed=candidates.seed,
            short=scores.short,
            long=scores.long,
            score=scores.fused,
            ema=scores.ema,
            append=scores.append,
            usable=scores.usable,
            reward_failed=scores.failed,
            thumbnail=_thumbnails(seen.chunk),
            sink_start=winners.sink_start,
            kept=winners.flat,
            evicted_start=evicted.start,
            evicted_route=evicted.route,
            latents=winners.candidate.latents,
            frames=to_pixels(frames, "uint8"),
            alpha=scores.alpha,
        )


def _thumbnails(frames: Float[Array, "B K T H W 3"]) -> UInt8[Array, "B K th tw 3"]:
    middle = frames[:, :, frames.shape[2] // 2]
    stride = max(1, round(middle.shape[3] / THUMBNAIL_WIDTH))
    return to_pixels(middle[:, :, ::stride, ::stride], "uint8")


def rollout(
    search: Search,
    params: PyTree,
    conditioning: Conditioning,
    state: StreamState,
    num_chunks: int,
    *,
    switches: Sequence[int] = (),
    conditionings: Sequence[Conditioning] = (),
) -> tuple[StreamState, ChunkRecord, ChunkRecord]:
    """A whole video in one program: chunk 0, then a scan over the rest. For use under `jax.jit`.

    Args:
        num_chunks: chunks of the video; static.
        switches: rising numbers of the chunks from which on another prompt is shown, 1 to num_chunks - 1; static.
        conditionings: of those prompts.

    Returns:
        The last state; the record of chunk 0; the records of the others, stacked on a leading axis.
    """
    state, head = step(search, params, conditioning, state, first=True)
    tails, begin = [], 1
    for end, following in zip((*switches, num_chunks), (*conditionings, None), strict=True):
        # The loop below is traced here and now, so that it may close over a variable of this one.
        scanned = functools.partial(step, search, params, conditioning, first=False)
        state, tail = jax.lax.scan(lambda state, _: scanned(state), state, length=end - begin)  # noqa: B023
        tails.append(tail)
        if following is not None:
            conditioning, begin = following, end
            state = recache(search, params, conditioning, state, committed=end)
    return state, head, jax.tree.map(lambda *parts: jnp.concatenate(parts), *tails)


@functools.partial(jax.jit, static_argnames=("search", "first"), donate_argnames="state")
def jitted_step(
    search: Search, params: PyTree, conditioning: Conditioning, state: StreamState, *, first: bool
) -> tuple[StreamState, ChunkRecord]:
    """`step` compiled; the state handed in is consumed, so that its memory can hold the next one."""
    return step(search, params, conditioning, state, first=first)


def stream_chunks(
    search: Search, params: PyTree, conditioning: Conditioning, state: StreamState, *, committed: int = 0
) -> Coroutine[tuple[StreamState, ChunkRecord], Conditioning | None]:
    """Chunk after chunk without end, by the same `step`: two programs whatever the length.

    `chunks.send(conditioning)` in place of `next(chunks)` switches to another prompt before the next chunk, by the
    same `recache`. The state handed in, and each state yielded, is consumed by the next iteration.

    Args:
        committed: chunks that `state` has behind it.
    """
    while True:
        state, record = jitted_step(search, params, conditioning, state, first=committed == 0)
        committed += 1
        following = yield state, record
        if following is not None:
            conditioning = following
            state = jitted_recache(search, params, conditioning, state, committed=committed)


def score_video(reward: Reward, frames: UInt8[np.ndarray, "T H W 3"], prompt: Int[Array, ""] | PromptTokens) -> float:
    """The reward of one finished video of any length, outside the step; `prompt` as `reward.call` takes it.

    The frames are padded to the next power of two, so that videos of all lengths share a few programs.
    """
    length = 1 << (len(frames) - 1).bit_length()
    padded = np.zeros((1, length, *frames.shape[1:]), np.uint8)
    padded[0, : len(frames)] = frames
    video = padded if reward.pixels == "uint8" else padded.astype(np.float32) / 255.0
    verdict = _jitted_reward(reward, video, jnp.full((1,), len(frames), jnp.int32), prompt)
    return float(verdict.scores[0])


@functools.partial(jax.jit, static_argnames="reward")
def _jitted_reward(reward: Reward, videos, num_frames, prompt) -> Verdict:
    return reward.call(videos, num_frames, prompt)
