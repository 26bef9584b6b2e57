"""Replay of a whole recorded Stream-T1 run: every candidate, the kept beams, the video."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.config import MAX_SEED, ModelConfig, RunConfig, SearchConfig, StreamConfig, UMT5Config
from streamt1_jax.errors import BadInputError
from streamt1_jax.generator import wan_generator
from streamt1_jax.models.dit import CausalWanDiT
from streamt1_jax.models.vae import WanVAE
from streamt1_jax.noise import recorded_noise
from streamt1_jax.recorded_case import (
    LATENT_TOLERANCE,
    PIXEL_TOLERANCE,
    SCORE_TOLERANCE,
    Comparison,
    Recorded,
    build_network,
    close,
    dit_config,
    equal,
    under,
    vae_config,
)
from streamt1_jax.result import beam_latents, to_chunk
from streamt1_jax.rewards.expression import expression_reward
from streamt1_jax.schedule import few_step_schedule
from streamt1_jax.settings import check_seed
from streamt1_jax.stream import Search, init_state, stream_chunks
from streamt1_jax.trace import Trace


def _run_config(case: Mapping[str, Any], decode: str) -> tuple[RunConfig, int, int]:
    """(settings, seed, chunks) of a recorded run; every key must be one that we reproduce."""
    seed, chunks = check_seed(case["seed"]), case["chunks"]
    values = {key: value for key, value in case.items() if key not in ("seed", "chunks")}
    stream_keys = {f.name for f in dataclasses.fields(StreamConfig)}
    search_keys = {f.name for f in dataclasses.fields(SearchConfig)}
    unknown = set(values) - stream_keys - search_keys
    if unknown:
        raise BadInputError(f"the case sets {sorted(unknown)}, expected {sorted(stream_keys | search_keys)}")
    values["denoising_steps"] = tuple(values["denoising_steps"])
    stream = StreamConfig(**{key: value for key, value in values.items() if key in stream_keys})
    search = SearchConfig(decode=decode, **{key: value for key, value in values.items() if key in search_keys})
    return RunConfig(stream, search), seed, chunks


def replay_search(tensors: Recorded, sizes: Recorded) -> Iterator[Comparison]:
    from convert.dit_table import longlive_dit_rules
    from convert.vae_table import wan_vae_rules

    dit, vae = dit_config(sizes["dit"]), vae_config(sizes["vae"])
    config, seed, chunks = _run_config(sizes["config"], sizes["rewards"]["decode"])
    text = UMT5Config(dim=dit.text_dim)
    model = ModelConfig(dit, vae, text)
    factor = vae.space_factor
    height, width = sizes["latent_height"] * factor, sizes["latent_width"] * factor
    generator = wan_generator(model, config.stream, height, width)
    rewards = [expression_reward(role, sizes["rewards"][role]) for role in ("short", "long")]
    search = Search(generator, rewards[0], rewards[1], recorded_noise(*_draws(tensors, generator, config)), config)

    network = build_network(
        lambda: CausalWanDiT(dit, rngs=nnx.Rngs(0)), longlive_dit_rules(), under(tensors, "dit."), "dit"
    )
    autoencoder = build_network(
        lambda: WanVAE(vae, rngs=nnx.Rngs(0)), wan_vae_rules(vae), under(tensors, "vae."), "vae"
    )
    params = {"dit": nnx.state(network, nnx.Param), "decoder": nnx.state(autoencoder.decoder, nnx.Param)}
    trace, latents = run_search(search, params, tensors["prompt_embeds"][0], seed, chunks)

    steps = few_step_schedule(config.stream, model).timesteps
    yield close("denoising steps", steps, tensors["denoising_steps_warped"], 1e-3)
    yield from _compare_candidates(trace, sizes["candidates"])
    histories = [[c.seed for c in trace.history(beam)] for beam in range(len(latents))]
    recorded = itertools.chain(*sizes["history_seeds"])
    yield equal("kept beams' seeds", list(itertools.chain(*histories)), [seed % MAX_SEED for seed in recorded])
    last = [trace.chunks[-1].kept(beam).score for beam in range(len(latents))]
    yield close("kept beams' scores", last, sizes["final_scores"], SCORE_TOLERANCE)
    for beam, ours in enumerate(latents):
        yield close(f"beam {beam} latents", ours, tensors[f"beam{beam}.latents"][0], LATENT_TOLERANCE)
        if f"beam{beam}.video" in tensors:
            video = jax.jit(autoencoder.decoder.decode)(ours)
            yield close(f"beam {beam} video", video, tensors[f"beam{beam}.video"], PIXEL_TOLERANCE)


def _draws(tensors: Recorded, generator: Any, config: RunConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(seeds, noise, renoise); a run of one step re-noises nothing and may have recorded nothing."""
    seeds, noise, steps = tensors["seeds"], tensors["noise"], len(config.stream.denoising_steps)
    shape = (len(seeds), steps - 1, *generator.chunk_shape)
    renoise = tensors["renoise"] if steps > 1 or "renoise" in tensors else np.zeros(shape, np.float32)
    for name, array, expected in (("noise", noise, (len(seeds), *generator.chunk_shape)), ("renoise", renoise, shape)):
        if array.shape != expected:
            raise BadInputError(f"{name} is {list(array.shape)}, expected {list(expected)} by the sizes in the case")
    return jnp.asarray(seeds % MAX_SEED, jnp.uint32), jnp.asarray(noise), jnp.asarray(renoise)


def run_search(search, params, prompt_embeds, seed: int, chunks: int):
    """The record of the run, and the latents of every kept beam, best first."""

    conditioning = jax.jit(search.generator.prepare)(params, prompt_embeds, jnp.int32(0))
    records = []
    for _, record in stream_chunks(search, params, conditioning, init_state(search, seed, chunks)):
        records.append(jax.device_get(record))
        search.short.raise_if_failed()
        search.long.raise_if_failed()
        if len(records) == chunks:
            break
    trace = Trace(tuple(to_chunk(record, i, search.config, 0.0) for i, record in enumerate(records)))
    return trace, [beam_latents(trace, records, beam) for beam in range(len(records[-1].kept))]


def _compare_candidates(trace: Any, recorded: list[dict[str, Any]]) -> Iterator[Comparison]:
    ours = [candidate for chunk in trace.chunks for candidate in chunk.candidates]
    # Ours wrap at 2^32; a program with longer seeds records the sum.
    yield equal("candidates' seeds", [c.seed for c in ours], [c["seed"] % MAX_SEED for c in recorded])
    exact = {
        "chunk": "candidates' chunks",
        "parent_beam": "candidates' parents",
        "ema": "candidates' EMA flags",
        "append": "candidates' APPEND flags",
        "sink_frames": "frames in the sinks",
    }
    for key, quantity in exact.items():
        yield equal(quantity, [getattr(c, key) for c in ours], [c[key] for c in recorded])
    yield equal("starts of appended sinks", [list(c.sink_starts) for c in ours], [c["sink_starts"] for c in recorded])
    for key, quantity in {"short": "short scores", "long": "long scores", "score": "fused scores"}.items():
        yield close(quantity, [getattr(c, key) for c in ours], [c[key] for c in recorded], SCORE_TOLERANCE)
