"""`streamt1 parity CASE.safetensors`: replay a recorded PyTorch run and compare every number with it.

A case is a safetensors file, in most kinds with a JSON file of its sizes beside it; weights have the names of the
published checkpoints after a prefix (`dit.model.`, `vae.`, `t5.`). The kind is known by what the files hold:

- a Stream-T1 run (JSON: `config`, `dit`, `vae`, `latent_height`, `latent_width`, `rewards` in words, `candidates` in
  the order tried, `history_seeds`, `final_scores`; tensors: `prompt_embeds`, `denoising_steps_warped`, `seeds` with the
  `noise` and `renoise` of each, `beam{i}.latents` best first, `beam{i}.video` where recorded);
- one forward with a LoRA (`base.`, `lora.`, `merged.`, `x`, `timestep`, `flow`, `x0`, `kv{layer}.k/v`);
- the VAE (`pixels` to `encoded`, `latents` to `video`); the text encoder (`ids`, `mask` to `hidden`, `prompt_embeds`).

All arithmetic is float32; no torch is needed but for a folder of the reward models.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.config import (
    MAX_SEED,
    DiTConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    StreamConfig,
    UMT5Config,
    VAEConfig,
)
from streamt1_jax.errors import BadInputError
from streamt1_jax.settings import check_seed

M = TypeVar("M", bound=nnx.Module)

LATENT_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One quantity: the largest error found and the largest allowed; NaN is never allowed."""

    quantity: str
    error: float
    tolerance: float
    count: int

    @property
    def matches(self) -> bool:
        return self.error <= self.tolerance


def close(quantity: str, ours: Any, recorded: Any, tolerance: float) -> Comparison:
    """The largest absolute difference; infinite where the shapes differ."""
    ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    error = float(np.abs(ours - recorded).max(initial=0.0)) if ours.shape == recorded.shape else np.inf
    return Comparison(quantity, error, tolerance, recorded.size)


def equal(quantity: str, ours: list, recorded: list) -> Comparison:
    """How many entries differ; none may."""
    wrong = sum(a != b for a, b in zip(ours, recorded, strict=False)) + abs(len(ours) - len(recorded))
    return Comparison(quantity, wrong, 0, len(recorded))


def replay(path: str | Path) -> list[Comparison]:
    """Replays one case: a file, or a folder of the reward models (`parity_rewards.py`).

    Raises:
        BadInputError: not a case of a known kind.
        WeightsError: its weights do not fit its sizes.
    """
    if Path(path).is_dir():
        from streamt1_jax.parity_rewards import replay_rewards

        return replay_rewards(path)
    tensors, sizes = _read_case(Path(path))
    for key, kind in (("candidates", _replay_search), ("rank", _replay_lora)):
        if key in sizes:
            return list(kind(tensors, sizes))
    for key, kind in (("video_unclamped", _replay_vae), ("hidden", _replay_umt5)):
        if key in tensors:
            return list(kind(tensors))
    raise BadInputError(
        f"{path} holds {sorted({key.split('.')[0] for key in tensors})}, expected a recorded Stream-T1 run, LoRA, "
        "VAE or text encoder: the format is described in streamt1_jax/parity.py; keep the .json file beside it"
    )


def run_parity(path: str) -> int:
    """Prints the table; returns 0 if everything matches, else 1."""
    with jax.default_matmul_precision("highest"):
        comparisons = replay(path)
    width = max(len(c.quantity) for c in comparisons)
    print(f"{'quantity':{width}}  {'compared':>9}  {'error':>9}  {'tolerance':>9}")
    for c in comparisons:
        verdict = "ok" if c.matches else "MISMATCH"
        print(f"{c.quantity:{width}}  {c.count:9d}  {c.error:9.2e}  {c.tolerance:9.2e}  {verdict}")
    wrong = sum(not c.matches for c in comparisons)
    print(f"{len(comparisons) - wrong} of {len(comparisons)} quantities match")
    return 1 if wrong else 0


class _Recorded(dict):
    """A recorded file: what it lacks is the file's fault, not the program's."""

    def __missing__(self, key: str) -> Any:
        raise BadInputError(f"the case lacks {key!r}, expected a whole recorded case: copy both its files again")


def _read_case(path: Path) -> tuple[_Recorded, _Recorded]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise BadInputError(f"{path} is not a file, expected a recorded case: check the path")
    try:
        tensors = _Recorded(load_file(path))
        notes = path.with_suffix(".json")
        sizes = json.loads(notes.read_text(), object_hook=_Recorded) if notes.is_file() else _Recorded()
        if not isinstance(sizes, _Recorded):
            raise ValueError(f"{notes} holds a {type(sizes).__name__}, not an object")
    except (SafetensorError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}), expected safetensors and JSON: copy it again") from error
    return tensors, sizes


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def _dit_config(sizes: Mapping[str, Any]) -> DiTConfig:
    """The published `config.json` has more keys than we use; those we have no other value for are checked."""
    for key, supported in {"patch_size": [1, 2, 2], "qk_norm": True, "cross_attn_norm": True}.items():
        if sizes.get(key, supported) != supported:
            raise BadInputError(f"the case has {key} {sizes[key]}, expected {supported}: no published model differs")
    return DiTConfig(**{f.name: sizes[f.name] for f in dataclasses.fields(DiTConfig) if f.name in sizes})


def _build(make: Callable[[], M], rules: list, tensors: Mapping[str, np.ndarray], name: str) -> M:
    """The module with the case's weights, through the conversion table of the published format."""
    from convert.engine import build

    return build(make, rules, tensors, name=name)


# A whole Stream-T1 run


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


def _replay_search(tensors: _Recorded, sizes: _Recorded) -> Iterator[Comparison]:
    from convert.dit_table import longlive_dit_rules
    from convert.vae_table import wan_vae_rules
    from streamt1_jax.generator import wan_generator
    from streamt1_jax.models.dit import CausalWanDiT
    from streamt1_jax.models.vae import WanVAE
    from streamt1_jax.noise import recorded_noise
    from streamt1_jax.rewards.expression import expression_reward
    from streamt1_jax.schedule import few_step_schedule
    from streamt1_jax.stream import Search

    dit, vae = _dit_config(sizes["dit"]), _vae_config(sizes["vae"])
    config, seed, chunks = _run_config(sizes["config"], sizes["rewards"]["decode"])
    text = UMT5Config(dim=dit.text_dim)
    model = ModelConfig(dit, vae, text)
    factor = vae.space_factor
    height, width = sizes["latent_height"] * factor, sizes["latent_width"] * factor
    generator = wan_generator(model, config.stream, height, width)
    rewards = [expression_reward(role, sizes["rewards"][role]) for role in ("short", "long")]
    search = Search(generator, rewards[0], rewards[1], recorded_noise(*_draws(tensors, generator, config)), config)

    network = _build(lambda: CausalWanDiT(dit, rngs=nnx.Rngs(0)), longlive_dit_rules(), _under(tensors, "dit."), "dit")
    autoencoder = _build(lambda: WanVAE(vae, rngs=nnx.Rngs(0)), wan_vae_rules(vae), _under(tensors, "vae."), "vae")
    params = {"dit": nnx.state(network, nnx.Param), "decoder": nnx.state(autoencoder.decoder, nnx.Param)}
    trace, latents = _run_search(search, params, tensors["prompt_embeds"][0], seed, chunks)

    steps = few_step_schedule(config.stream).timesteps
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


def _draws(tensors: _Recorded, generator: Any, config: RunConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(seeds, noise, renoise); a run of one step re-noises nothing and may have recorded nothing."""
    seeds, noise, steps = tensors["seeds"], tensors["noise"], len(config.stream.denoising_steps)
    shape = (len(seeds), steps - 1, *generator.chunk_shape)
    renoise = tensors["renoise"] if steps > 1 or "renoise" in tensors else np.zeros(shape, np.float32)
    for name, array, expected in (("noise", noise, (len(seeds), *generator.chunk_shape)), ("renoise", renoise, shape)):
        if array.shape != expected:
            raise BadInputError(f"{name} is {list(array.shape)}, expected {list(expected)} by the sizes in the case")
    return jnp.asarray(seeds % MAX_SEED, jnp.uint32), jnp.asarray(noise), jnp.asarray(renoise)


def _run_search(search, params, prompt_embeds, seed: int, chunks: int):
    """The record of the run, and the latents of every kept beam, best first."""
    from streamt1_jax.result import beam_latents, to_chunk
    from streamt1_jax.stream import init_state, stream_chunks
    from streamt1_jax.trace import Trace

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


# Single networks


def _vae_config(sizes: Mapping[str, Any]) -> VAEConfig:
    known = {f.name for f in dataclasses.fields(VAEConfig)}
    values: dict[str, Any] = {}
    for key in known & sizes.keys():
        values[key] = tuple(sizes[key]) if isinstance(sizes[key], list) else sizes[key]
    return VAEConfig(**values)


def _replay_lora(tensors: _Recorded, sizes: _Recorded) -> Iterator[Comparison]:
    """Merges the LoRA by the converter's own code, then runs chunk 0."""
    from convert.dit_table import longlive_dit_rules
    from convert.lora import LoRASource
    from convert.sources import DictSource
    from streamt1_jax.models.attention import rope_angles, rotate
    from streamt1_jax.models.dit import CausalWanDiT
    from streamt1_jax.schedule import scheduled_sigmas

    config = _dit_config(sizes["dit"])
    source = LoRASource(DictSource(_under(tensors, "base.")), DictSource(_under(tensors, "lora.")), sizes["alpha"])
    merged = {key: source.read(key) for key in source.shapes}
    recorded = _under(tensors, "merged.")
    yield equal("names of merged weights", sorted(merged), sorted(recorded))
    ours, theirs = (np.concatenate([w[key].ravel() for key in recorded]) for w in (merged, recorded))
    yield close("merged weights", ours, theirs, 1e-6)

    model = _build(lambda: CausalWanDiT(config, rngs=nnx.Rngs(0)), longlive_dit_rules(), merged, "dit")
    x, prompt_embeds = (jnp.asarray(tensors[key][0]) for key in ("x", "prompt_embeds"))
    timestep = float(tensors["timestep"])

    @jax.jit
    def forward():
        text, time = model.encode_text(prompt_embeds), model.encode_time(jnp.array([timestep]))
        start = jnp.int32(0)
        return model(x, time, text, None, start), model.context(x, time, text, None, start)

    flow, kv = forward()
    yield close("flow", flow, tensors["flow"][0], LATENT_TOLERANCE)
    sigmas = scheduled_sigmas(StreamConfig().timestep_shift)
    sigma = float(sigmas[np.abs(1000 * sigmas - timestep).argmin()])
    yield close("x0", x - sigma * flow, tensors["x0"][0], LATENT_TOLERANCE)
    frames, _, height, width = x.shape
    angles = rope_angles(jnp.int32(0), frames, height // 2, width // 2, config.head_dim)
    for layer in range(config.num_layers):  # recorded before rotation
        yield close(
            f"keys of layer {layer}",
            kv.k[layer],
            rotate(jnp.asarray(tensors[f"kv{layer}.k"][0]), angles),
            LATENT_TOLERANCE,
        )
        yield close(f"values of layer {layer}", kv.v[layer], tensors[f"kv{layer}.v"][0], LATENT_TOLERANCE)


def _replay_vae(tensors: _Recorded) -> Iterator[Comparison]:
    from convert.sizes import wan_vae_config
    from convert.vae_table import wan_vae_rules
    from streamt1_jax.models.vae import WanVAE

    weights = _under(tensors, "vae.")
    config = wan_vae_config({key: x.shape for key, x in weights.items()})
    vae = _build(lambda: WanVAE(config, rngs=nnx.Rngs(0)), wan_vae_rules(config), weights, "vae")
    video = tensors["pixels"][0].transpose(1, 2, 3, 0)
    yield close("encoded latents", jax.jit(vae.encoder.encode)(video), tensors["encoded"][0], LATENT_TOLERANCE)
    decoded = jax.jit(vae.decoder.decode)(tensors["latents"][0])
    recorded = tensors["video"][0].transpose(0, 2, 3, 1)
    yield close("decoded video", 2.0 * decoded - 1.0, recorded, LATENT_TOLERANCE)  # recorded in [-1, 1]
    unclamped = jax.jit(vae.decoder.decode_unclamped)(tensors["latents"][0])
    recorded = tensors["video_unclamped"][0].transpose(1, 2, 3, 0)
    yield close("decoded video, unclamped", unclamped, recorded, LATENT_TOLERANCE)


def _replay_umt5(tensors: _Recorded) -> Iterator[Comparison]:
    from convert.sizes import wan_umt5_config
    from convert.umt5_table import wan_umt5_rules
    from streamt1_jax.models.umt5 import UMT5Encoder, encode_prompt

    weights = _under(tensors, "t5.")
    config = wan_umt5_config({key: x.shape for key, x in weights.items()})
    encoder = _build(
        lambda: UMT5Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), wan_umt5_rules(), weights, "text"
    )
    ids, mask = tensors["ids"], tensors["mask"]
    hidden = jax.jit(jax.vmap(encoder))(ids, mask)
    yield close("hidden states", hidden, tensors["hidden"], LATENT_TOLERANCE)
    embeds = jax.jit(jax.vmap(lambda i, m: encode_prompt(encoder, i, m)))(ids, mask)
    yield close("prompt embeddings", embeds, tensors["prompt_embeds"], LATENT_TOLERANCE)
