"""The exact savings, each measured on and off: the same numbers with less work.

    python benchmarks/savings.py --preset mini --json FILE

Random weights; 2 beams of 2 candidates at the tenth chunk of a video, where every window is full and the video
still starts in it. Both forms are compared before they are timed in turn. "Off" is the plain form, without the saving.
"""

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree
from race import race, relative_rms, write_report

from streamt1_jax.bench import Bench
from streamt1_jax.cache import past_of
from streamt1_jax.config import ModelConfig, RunConfig, SearchConfig
from streamt1_jax.denoise import denoise
from streamt1_jax.generator import Conditioning
from streamt1_jax.measure import Spread, machine
from streamt1_jax.models.attention import rope_angles, rotate
from streamt1_jax.models.dit import CausalWanDiT, Past
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import Draws
from streamt1_jax.schedule import few_step_schedule
from streamt1_jax.stages import judge, propose, recall, select, staged_step, watch
from streamt1_jax.state import StreamState
from streamt1_jax.stream import Candidates, Search, Winners, init_state, jitted_step
from streamt1_jax.video import write_mp4
from streamt1_jax.weights import default_dtype
from streamt1_jax.window import Seen, to_pixels

CHUNK = 9  # the last whose long score sees the video from its first frame
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative RMS
LINEARS = (
    *(("self_attn", name) for name in "qkvo"),
    *(("cross_attn", name) for name in "qo"),
    ("ffn_in",),
    ("ffn_out",),
)


@dataclass(frozen=True)
class Saving:
    """One computation in two forms."""

    name: str
    on: Callable[[], Any]
    off: Callable[[], Any]
    difference: Callable[[Any, Any], float] = relative_rms  # of what they return


class Scene(NamedTuple):
    """A search that is about to make chunk number `CHUNK`, and what it makes of it."""

    model: ModelConfig
    search: Search
    params: PyTree
    embeds: Float[Array, "P text_dim"]
    conditioning: Conditioning
    state: StreamState
    history: Float[Array, "B chunks f C h w"]  # latents of the beams
    candidates: Candidates
    winners: Winners

    def network(self, params: PyTree) -> CausalWanDiT:
        graphdef, _ = network_graph(self.model, "dit", self.search.generator.kv.dtype)
        return nnx.merge(graphdef, params["dit"])

    @property
    def start(self) -> Array:
        return self.state.chunk * self.search.config.stream.latent_frames_per_chunk

    def past(self) -> Past:
        """What the candidates of the best beam attend to."""
        best = jax.tree.map(lambda x: x[0], self.state.beams.cache)
        return past_of(best, self.state.chunk, self.search.config)

    def draws(self, flat: int) -> Draws:
        """The noise of one candidate."""
        index = divmod(flat, self.candidates.seed.shape[1])
        return self.search.noise(self.candidates.seed[index])._replace(initial=self.candidates.noise[index])


def make_scene(model: ModelConfig, dtype: Any) -> Scene:
    bench = Bench(model, height=model.height, width=model.width, dtype=dtype, rewards=None)
    search = bench.search(RunConfig(search=SearchConfig()))
    embeds = jax.random.normal(jax.random.key(0), (model.dit.text_len, model.dit.text_dim))
    conditioning = jax.jit(search.generator.prepare)(bench.params, embeds, jnp.int32(0))
    state, history = init_state(search, 0, 2 * CHUNK), None
    for index in range(CHUNK):
        state, record = jitted_step(search, bench.params, conditioning, state, first=index == 0)
        latents = record.latents[:, None]
        parent = record.kept // search.config.search.candidates_per_beam
        history = latents if history is None else jnp.concatenate([history[parent], latents], axis=1)
    assert history is not None
    candidates = propose(search, bench.params, conditioning, state, first=False)
    seen = watch(search, bench.params, state, candidates, first=False)
    scores = judge(search, conditioning, state, candidates, seen, first=False)
    winners = select(search, state, candidates, seen, scores)
    return Scene(model, search, bench.params, embeds, conditioning, state, history, candidates, winners)


def merged_lora(scene: Scene) -> Saving:
    """x (W + A B) against x W + (x A) B, in all linears of the DiT's blocks; rank a sixth of the width, as LongLive."""
    blocks: Any = nnx.to_pure_dict(scene.params["dit"])["blocks"]
    kernels, lora, keys = [], [], jax.random.split(jax.random.key(1), 2 * len(LINEARS))
    for number, path in enumerate(LINEARS):
        node = blocks
        for name in path:
            node = node[name]
        kernel = node["kernel"]
        layers, din, dout = kernel.shape
        rank = scene.model.dit.dim // 6
        down = jax.random.normal(keys[2 * number], (layers, din, rank), kernel.dtype) * din**-0.5
        up = jax.random.normal(keys[2 * number + 1], (layers, rank, dout), kernel.dtype) * 0.1 * rank**-0.5
        kernels.append(kernel)
        lora.append((down, up))
    merged = [kernel + down @ up for kernel, (down, up) in zip(kernels, lora, strict=True)]
    rows = scene.candidates.seed.size * scene.search.generator.kv.shape[1]
    x = jax.random.normal(jax.random.key(2), (rows, scene.model.dit.dim), kernels[0].dtype)

    @jax.jit
    def with_merged(x, merged):
        def layer(total, kernels):
            y = x
            for kernel in kernels:
                y = y @ kernel
            return total + y, None

        return jax.lax.scan(layer, jnp.zeros_like(x), merged)[0]

    @jax.jit
    def with_lora(x, kernels, lora):
        def layer(total, weights):
            y = x
            for kernel, (down, up) in zip(*weights, strict=True):
                y = y @ kernel + (y @ down) @ up
            return total + y, None

        return jax.lax.scan(layer, jnp.zeros_like(x), (kernels, lora))[0]

    return Saving(
        "1 LoRA merged into the linears, not beside them",
        lambda: with_merged(x, merged),
        lambda: with_lora(x, kernels, lora),
    )


def context_of_kept(scene: Scene) -> Saving:
    """The context pass after pruning against one for every candidate."""
    config, generator = scene.search.config, scene.search.generator

    @jax.jit
    def of_all(params, conditioning, state, latents, kept):
        def of_beam(latents, cache):
            past = past_of(cache, state.chunk, config)
            run = jax.vmap(lambda x: generator.context(params, conditioning, x, past, scene.start))
            return run(latents)

        kv = jax.vmap(of_beam)(latents, state.beams.cache)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[kept], kv)

    return Saving(
        "2 context pass of the kept beams, not of all candidates",
        lambda: recall(scene.search, scene.params, scene.conditioning, scene.state, scene.winners, first=False),
        lambda: of_all(scene.params, scene.conditioning, scene.state, scene.candidates.latents, scene.winners.flat),
    )


def short_context(scene: Scene) -> Saving:
    """The context pass without head and without the rest of the last block, against a whole forward."""
    latents, past, last = scene.candidates.latents[0, 0], scene.past(), scene.model.dit.num_layers
    short = jax.jit(scene.search.generator.context)

    @jax.jit
    def whole(params, conditioning, latents, past, start):
        dit = scene.network(params)
        tokens, angles = dit._tokens(latents, start)
        tokens, kv = dit._run(tokens, conditioning.context, conditioning.text, past, angles, last, keep_kv=True)
        return kv, dit.head(tokens, conditioning.context)

    return Saving(
        "2 context pass without head and last block",
        lambda: short(scene.params, scene.conditioning, latents, past, scene.start),
        lambda: whole(scene.params, scene.conditioning, latents, past, scene.start),
        lambda on, off: relative_rms(on, off[0]),
    )


def streaming_decode(scene: Scene) -> Saving:
    """Every frame decoded once, against all ten chunks for every score."""
    search = scene.search
    by_window = dataclasses.replace(
        search,
        config=dataclasses.replace(search.config, search=dataclasses.replace(search.config.search, decode="window")),
    )
    room = search.config.search.sliding_window_size - CHUNK
    window = jnp.pad(scene.history, ((0, 0), (0, room), *[(0, 0)] * 4))
    state = dataclasses.replace(
        scene.state,
        beams=dataclasses.replace(scene.state.beams, window=window),
        window_count=jnp.int32(CHUNK),
    )

    def difference(on: Seen, off: Seen) -> float:
        valid = int(on.long_valid)
        assert valid == int(off.long_valid), "the two windows hold different numbers of frames"
        return relative_rms(on.long[:, :, :valid], to_pixels(off.long, search.long.pixels)[:, :, :valid])

    return Saving(
        "3 decode from the parent's state, not the whole window",
        lambda: watch(search, scene.params, scene.state, scene.candidates, first=False),
        lambda: watch(by_window, scene.params, state, scene.candidates, first=False),
        difference,
    )


def text_once(scene: Scene) -> Saving:
    """Cross-attention keys and values once a prompt, against anew in every forward; one candidate."""
    schedule = few_step_schedule(scene.search.config.stream, scene.model)

    def denoise_chunk(params, conditioning, draws, past, start):
        dit = scene.network(params)

        def flow(x, time):
            # Tied to x, or XLA would take it out of the loop over the steps.
            embeds, x = jax.lax.optimization_barrier((scene.embeds, x))
            return dit(x, time, dit.encode_text(embeds), past, start)

        return denoise(flow, schedule, conditioning.steps, draws)

    variant = dataclasses.replace(scene.search.generator, denoise=denoise_chunk)
    return _one_candidate(scene, "4 prompt keys and values once a prompt, not in every forward", variant, scene.past())


def keys_rotated_once(scene: Scene) -> Saving:
    """The cache's keys rotated when they are stored, against anew in every forward; one candidate."""
    config, generator = scene.search.config, scene.search.generator
    schedule, past = few_step_schedule(config.stream, scene.model), scene.past()
    f, _, h, w = generator.chunk_shape
    each_slot = jax.vmap(lambda start: rope_angles(start, f, h // 2, w // 2, scene.model.dit.head_dim))
    angles = each_slot(scene.state.beams.cache.start[0])
    angles = angles.reshape(-1, angles.shape[-1])

    def denoise_chunk(params, conditioning, draws, past, start):
        dit = scene.network(params)

        def flow(x, time):
            k, x = jax.lax.optimization_barrier((past.kv.k, x))  # as above
            rotated = past._replace(kv=past.kv._replace(k=rotate(k, angles)))
            return dit(x, time, conditioning.text, rotated, start)

        return denoise(flow, schedule, conditioning.steps, draws)

    variant = dataclasses.replace(generator, denoise=denoise_chunk)
    plain = past._replace(kv=past.kv._replace(k=rotate(past.kv.k, -angles)))
    return _one_candidate(scene, "5 cached keys rotated once, not in every forward", variant, plain)


def _one_candidate(scene: Scene, name: str, variant, past: Past) -> Saving:
    """Denoising one candidate by the generator, and by a variant that is given another past."""
    on, off = jax.jit(scene.search.generator.denoise), jax.jit(variant.denoise)
    params, conditioning, draws, usual = scene.params, scene.conditioning, scene.draws(0), scene.past()
    return Saving(
        name,
        lambda: on(params, conditioning, draws, usual, scene.start),
        lambda: off(params, conditioning, draws, past, scene.start),
    )


def candidates_in_a_batch(scene: Scene) -> Saving:
    """All candidates in one program that reads their parents' caches, against one by one on copies of the cache."""
    config, (beams, count) = scene.search.config, scene.candidates.seed.shape
    draws = [scene.draws(flat) for flat in range(beams * count)]

    @jax.jit
    def copy_of(cache, beam):
        return jax.tree.map(lambda x: x[beam], cache)

    @jax.jit
    def one(params, conditioning, draws, cache, chunk, start):
        return scene.search.generator.denoise(params, conditioning, draws, past_of(cache, chunk, config), start)

    def one_by_one():
        results = []
        for flat in range(beams * count):
            cache = copy_of(scene.state.beams.cache, flat // count)
            args = (scene.params, scene.conditioning, draws[flat], cache, scene.state.chunk, scene.start)
            results.append(jax.block_until_ready(one(*args)))
        return jnp.stack(results).reshape(beams, count, *results[0].shape)

    return Saving(
        "6 candidates in a batch on one cache, not each on a copy",
        lambda: propose(scene.search, scene.params, scene.conditioning, scene.state, first=False).latents,
        one_by_one,
    )


def no_files(scene: Scene, folder: Path) -> Saving:
    """A whole chunk, against the same with a PNG of every frame and an mp4 of every window written on the way."""
    generator = scene.search.generator

    def save(seen: Seen) -> None:
        from PIL import Image

        seen = jax.device_get(seen)
        # The released decode of a chunk begins anew and so has as many frames as a first chunk.
        chunk = np.asarray(to_pixels(jnp.asarray(seen.chunk[:, :, : generator.first_frames]), "uint8"))
        for beam, count in np.ndindex(*chunk.shape[:2]):
            for number, frame in enumerate(chunk[beam, count]):
                Image.fromarray(frame).save(folder / f"{beam}_{count}_{number}.png")
            write_mp4(folder / f"{beam}_{count}.mp4", np.asarray(seen.long[beam, count, : int(seen.long_valid)]))

    def chunk(on_seen: Callable[[Seen], None]) -> StreamState:
        def around(name, run):
            result = jax.block_until_ready(run())
            if name == "watch":
                on_seen(result)
            return result

        state = jax.tree.map(jnp.copy, scene.state)  # it is consumed
        args = (scene.search, scene.params, scene.conditioning, state)
        return staged_step(*args, first=False, around=around)[0]

    def difference(on: StreamState, off: StreamState) -> float:
        written = [len(list(folder.glob(pattern))) for pattern in ("*.png", "*.mp4")]
        candidates = scene.candidates.seed.size
        assert written == [candidates * generator.first_frames, candidates], f"{written} PNG and mp4 were written"
        return relative_rms(on.beams.noise, off.beams.noise)

    return Saving("7 a chunk without files", lambda: chunk(lambda seen: None), lambda: chunk(save), difference)


MAKERS = (
    merged_lora,
    context_of_kept,
    short_context,
    streaming_decode,
    text_once,
    keys_rotated_once,
    candidates_in_a_batch,
)


def measure(saving: Saving, error: float, rounds: int) -> dict[str, Any]:
    """Times both forms, which differ by `error`."""
    seconds = race({"on": saving.on, "off": saving.off}, rounds)
    ratios = [off / on for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    return {
        "name": saving.name,
        "error": error,
        "on_seconds": asdict(Spread.of(seconds["on"])),
        "off_seconds": asdict(Spread.of(seconds["off"])),
        "off_over_on": asdict(Spread.of(ratios)),
    }


def table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['device']}, {machine['cpus']} cpus under a load of {machine['load']}, jax {machine['jax']}, "
        f"{report['dtype']}, {report['preset']}, random weights, {report['grid'][0]}x{report['grid'][1]} candidates, "
        f"median of {report['rounds']}",
        f"{'ms':58}{'on':>10}{'off':>10}{'off/on':>9}{'lowest to highest':>20}{'error':>10}",
    ]
    for row in report["savings"]:
        ratio = row["off_over_on"]
        lines.append(
            f"{row['name']:58}{1e3 * row['on_seconds']['median']:10.2f}{1e3 * row['off_seconds']['median']:10.2f}"
            f"{ratio['median']:9.3f}{ratio['low']:11.3f} to {ratio['high']:.3f}{row['error']:10.1e}"
        )
    return "\n".join([*lines, *report["left_out"]])


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the exact savings, each on and off.")
    parser.add_argument("--preset", default="mini", help="1.3b, 14b, mini or tiny (default: mini)")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--rounds", type=int, default=7, help="times that each form is measured (default: 7)")
    parser.add_argument("--json", metavar="FILE", help="write the report here too")
    args = parser.parse_args()

    dtype = jnp.dtype(args.dtype or default_dtype())
    scene = make_scene(ModelConfig.preset(args.preset), dtype.type)
    missing = [name for name in ("av", "PIL") if importlib.util.find_spec(name) is None]
    with tempfile.TemporaryDirectory() as folder:
        savings = [make(scene) for make in MAKERS]
        if not missing:
            savings.append(no_files(scene, Path(folder)))
        report = {
            "machine": machine(),
            "preset": args.preset,
            "dtype": dtype.name,
            "grid": scene.candidates.seed.shape,
            "rounds": args.rounds,
            "savings": [],
            "left_out": [f"7 a chunk without files: {name} is not installed" for name in missing],
        }
        wrong, most = [], TOLERANCE[dtype.name]
        for saving in savings:
            error = saving.difference(saving.on(), saving.off())
            if error <= most:
                report["savings"].append(measure(saving, error, args.rounds))
            else:
                wrong.append(f"{saving.name}: the two forms differ by {error:.3g}, expected at most {most:g}")
            write_report(args.json, report | {"wrong": wrong})  # after each: a later one may run out of time
    print("\n".join([table(report), *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
