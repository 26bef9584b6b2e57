"""`streamt1 bench`: where the time of a chunk goes, on random weights.

Every figure says what is in it. A chunk is timed twice: as one compiled step, which is what users run, and stage by
stage, each its own program and waited for. Only chunks with a full window count. Compilation never counts; that none
happened while timing is counted by JAX's own event and reported. What is compared, a lane, is one number of
candidates: lanes differ in their grid of beams and candidates and in nothing else.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from streamt1_jax import flops, stream
from streamt1_jax.bench_lane import Lane, encode, first_frames, prepare, steady_chunk, step_bytes, time_video
from streamt1_jax.config import ModelConfig, RunConfig, grid_of
from streamt1_jax.errors import BadInputError
from streamt1_jax.generator import Conditioning, wan_generator
from streamt1_jax.judge import short_frames
from streamt1_jax.measure import Spread, compilation_cache, compilations, machine, matmul_peak, peak_bytes, timed
from streamt1_jax.memory import size_of
from streamt1_jax.models.attention import attention_path
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.rewards import Reward, native_long, native_short
from streamt1_jax.sharding import candidate_mesh, place
from streamt1_jax.stages import NAMES
from streamt1_jax.stream import Search, init_state, jitted_step
from streamt1_jax.weights import random_params
from streamt1_jax.window import decodes_in_turn

EARLY = 9  # late chunks are compared with this one and the two after; sinks that always grow are full by then
FULL_CHUNKS = 7  # at least, with full windows: three early ones, three late ones, and one between


def lane_config(run: RunConfig, candidates: int) -> RunConfig:
    """The same run with another grid."""
    beams, each = grid_of(candidates)
    search = dataclasses.replace(run.search, beams=beams, candidates_per_beam=each, pruning=True)
    return dataclasses.replace(run, search=search)


class Bench:
    """One model at one size on random weights, with the lanes that were made of it."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        height: int,
        width: int,
        dtype: Any,
        rewards: tuple[Reward, Reward] | None = None,
        devices: int = 1,
    ):
        self.model, self.dtype, self.size, self.devices = model, dtype, (height, width), devices
        self.rewards = rewards or (native_short(), native_long())
        self.params = {
            "dit": random_params(network_graph(model, "dit", dtype)[1], 0),
            "decoder": random_params(network_graph(model, "decoder", dtype)[1], 0),
        }

    def search(self, config: RunConfig) -> Search:
        generator = wan_generator(self.model, config.stream, *self.size, self.dtype)
        noise = gaussian_noise(generator.chunk_shape, len(config.stream.denoising_steps))
        mesh = candidate_mesh(config.search, self.devices) if self.devices > 1 else None
        return Search(generator, *self.rewards, noise, config, mesh)

    def conditioning(self, search: Search) -> Conditioning:
        return prepare(search, place(search.mesh, self.params), self._no_prompt(), jnp.int32(0))

    def lanes(self, candidates: tuple[int, ...], run: RunConfig) -> list[Lane]:
        """Compiles and warms up; what memory a lane takes is read before the next lane is there."""
        lanes = []
        for number in candidates:
            search = self.search(lane_config(run, number))
            lanes.append(Lane(number, search, place(search.mesh, self.params), self.conditioning(search)))
        with tempfile.TemporaryDirectory() as root:
            caches = [str(Path(root) / str(lane.candidates)) for lane in lanes]  # one for all would be warm for some
            for lane, folder in zip(lanes, caches, strict=True):
                with compilation_cache(folder):
                    lane.compile_seconds = {name: self._compile(lane) for name in ("cold", "warm")}
                    lane.peak_bytes = self._peak(lane)
            for lane, folder in zip(lanes, caches, strict=True):  # the last lane's compilation has dropped the others'
                with compilation_cache(folder):
                    time_video(lane, lane.steady + 1)
        return lanes

    def measure(self, lanes: list[Lane], *, chunks: int, repeats: int) -> Iterator[list[dict[str, Any]]]:
        """Times `repeats` videos of `chunks` chunks in each lane; yields what is known after every round of them."""
        for _ in range(repeats):  # in turn, so that a slow minute of the machine meets all lanes
            for lane in lanes:
                with compilations() as compiled:
                    lane.videos.append(time_video(lane, chunks))
                lane.compiled += len(compiled)
            yield [self._report(lane) for lane in lanes]

    def prompt(self, lanes: list[Lane], repeats: int) -> dict[str, Any]:
        """What a prompt costs before its first chunk; also the seconds from its tokens to the first frames, by lane.

        The text encoder's weights are in memory for this call alone.
        """
        graphdef, abstract = network_graph(self.model, "text", self.dtype)
        params, ids = random_params(abstract, 0), self._ids()
        embed = lambda: encode(graphdef, params, ids)  # noqa: E731
        text = Spread.of(timed(embed, repeats))
        lane, embeds = lanes[0], embed()
        prepared = Spread.of(timed(lambda: prepare(lane.search, lane.params, embeds, jnp.int32(0)), repeats))
        dit, tokens = self.model.dit, self.model.dit.text_len
        first = {
            str(lane.candidates): asdict(Spread.of(timed(lambda lane=lane: first_frames(lane, embed), repeats)))
            for lane in lanes
        }
        return {
            "text": {"seconds": asdict(text), "flop": flops.umt5_encode(self.model.text, tokens)},
            "prepare": {"seconds": asdict(prepared), "flop": flops.dit_text(dit)},
            "first_frames_seconds": first,
        }

    def profile(self, lane: Lane, folder: str, chunks: int = 3) -> None:
        """A trace of steady chunks for XProf and Perfetto; every stage is a named scope."""
        state = init_state(lane.search, 0, 1)
        for index in range(lane.steady):
            state, _ = lane.step(state, index)
        jax.block_until_ready(state)
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for index in range(lane.steady, lane.steady + chunks):
                with jax.profiler.StepTraceAnnotation("chunk", step_num=index):
                    state, record = lane.step(state, index)
                    jax.device_get(record)
            jax.block_until_ready(state)

    def _no_prompt(self) -> jax.Array:
        return jnp.zeros((self.model.dit.text_len, self.model.dit.text_dim), jnp.float32)

    def _ids(self) -> jax.Array:
        return jnp.arange(self.model.dit.text_len, dtype=jnp.int32) % self.model.text.vocab_size

    def _compile(self, lane: Lane) -> float:
        """Seconds to trace and compile all that a prompt's first two chunks run, or to find it in the cache."""
        graphdef, abstract = network_graph(self.model, "text", self.dtype)
        jax.clear_caches()
        started = time.perf_counter()
        encode.lower(graphdef, abstract, self._ids()).compile()
        prepare.lower(lane.search, lane.params, self._no_prompt(), jnp.int32(0)).compile()
        state = init_state(lane.search, 0, 1)  # its small programs run as well
        args = (lane.search, lane.params, lane.conditioning, state)
        _, step = (jitted_step.lower(*args, first=first).compile() for first in (True, False))
        seconds = time.perf_counter() - started
        lane.step_bytes = lane.step_bytes or step_bytes(step)  # what comes from the cache may not know it
        return seconds

    def _peak(self, lane: Lane) -> dict[str, int]:
        """The most memory after a video as users make it."""
        state = init_state(lane.search, 0, lane.steady + 1)
        for index in range(lane.steady + 1):
            state, _ = lane.step(state, index)
        jax.block_until_ready(state)
        return peak_bytes()

    def _report(self, lane: Lane) -> dict[str, Any]:
        """What the chunks with a full window took, over the videos so far."""
        full = [video[lane.steady :] for video in lane.videos]
        stage_seconds = {
            name: Spread.of([statistics.median(chunk.stages[name] for chunk in video) for video in full])
            for name in NAMES
        }
        chunk = Spread.of([statistics.median(chunk.whole for chunk in video) for video in full])
        by_index = [statistics.median(chunk.whole for chunk in same) for same in zip(*lane.videos, strict=True)]
        early, late = _compared(lane.steady, len(by_index))
        appended = statistics.mean(chunk.appended for video in full for chunk in video)
        return {
            "candidates": lane.candidates,
            "grid": lane.search.config.search.grid,
            "devices": self.devices,
            "decoded": "in turn" if decodes_in_turn(lane.search.mesh) else "in a batch",
            "appended_sinks": {"mean": appended, "room": lane.search.config.appended_chunks},
            "warm_runs": len(lane.videos),
            "first_chunk_seconds": asdict(Spread.of([video[0].whole for video in lane.videos])),
            "chunk_seconds": asdict(chunk),
            "chunk_seconds_by_index": by_index,
            "late_over_early": {
                "ratio": statistics.median(by_index[late:]) / statistics.median(by_index[early : early + 3]),
                "late": [late, late + 2],
                "early": [early, early + 2],
            },
            "stage_seconds": {name: asdict(spread) for name, spread in stage_seconds.items()},
            "stages_over_chunk": statistics.median(c.staged / c.whole for video in full for c in video),
            "compiled_while_timing": lane.compiled,
            "compile_seconds": lane.compile_seconds,
            "host_bytes": self._host_bytes(lane.search, lane.conditioning),
            "step_bytes": lane.step_bytes,
            "peak_bytes": lane.peak_bytes,
            **self._rates(lane.search, stage_seconds, chunk, appended),
        }

    def _host_bytes(self, search: Search, conditioning: Conditioning) -> int:
        """Bytes of one chunk's record, and of the frames that host rewards are sent, before they choose of them."""

        def chunk(params, conditioning, state):
            seen = {}

            def call(stage, *args, **kwargs):
                seen[stage] = stage(*args, **kwargs)
                return seen[stage]

            _, record = stream.step(search, params, conditioning, state, first=False, call=call)
            watched = seen[stream.watch]
            return record, short_frames(watched.chunk, search.config.search.short_reward_frames), watched.long

        state = jax.eval_shape(lambda: init_state(search, 0, 1))
        record, short, long = jax.eval_shape(chunk, self.params, conditioning, state)
        total = size_of(record)
        for reward, video in ((search.short, short), (search.long, long)):
            if reward.runs_on == "host":
                total += video.size * (1 if reward.pixels == "uint8" else 4)
        return total

    def _rates(self, search: Search, seconds: dict[str, Spread], chunk: Spread, appended: float) -> dict[str, Any]:
        """Frames a second with and without parts, and the work of each stage by formula.

        None holds the text encoder, which runs once a prompt, nor writing a file.
        """
        frames = search.generator.frames_per_chunk
        dit = seconds["propose"].median + seconds["recall"].median
        work = flops.chunk(self.model, search.config, *self.size, appended)
        return {
            "frames_per_second": {
                "the whole chunk": frames / chunk.median,
                "the whole chunk less the rewards, estimated": frames / (chunk.median - seconds["judge"].median),
                "the DiT's two stages alone": frames / dit,
            },
            "flop": work,
            "flop_per_second": {name: flop / seconds[name].median for name, flop in work.items()},
        }


def _compared(steady: int, chunks: int) -> tuple[int, int]:
    """The first of three early chunks and of three late ones.

    Their distance is even: every other chunk is timed stage by stage first, and the same of both must have been.
    """
    late = chunks - 3
    early = max(steady, min(EARLY, late - 3))
    if (late - early) % 2:
        early += 1 if early == steady else -1
    return early, late


def run_bench(
    model: ModelConfig,
    run: RunConfig,
    *,
    candidates: tuple[int, ...],
    chunks: int,
    repeats: int,
    dtype: Any,
    height: int,
    width: int,
    rewards: tuple[Reward, Reward] | None = None,
    devices: int = 1,
    profile: str | None = None,
    on_round: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """The whole report as plain data; see `bench_table` for people.

    Args:
        run: settings of every lane but its grid.
        candidates: numbers of candidates a chunk, each a lane; fewest first, since memory is read as the most so far.
        chunks: of one video, enough for the window to fill.
        repeats: warm runs.
        rewards: short and long; the native ones if None.
        devices: of this machine, that share the candidates.
        profile: a folder for a profiler's trace of a few steady chunks of the last lane.
        on_round: is given the report after every round of runs, before what a prompt costs is known.

    Raises:
        BadInputError: too few chunks for windows that are full.
    """
    report: dict[str, Any] = {"machine": machine()}  # before it is busy with this
    rewards = rewards or (native_short(), native_long())
    fewest = steady_chunk(run, rewards) + FULL_CHUNKS
    if chunks < fewest:
        raise BadInputError(f"--chunks is {chunks}, expected at least {fewest}: earlier not all windows are full")
    bench = Bench(model, height=height, width=width, dtype=dtype, rewards=rewards, devices=devices)
    report |= {
        "model": asdict(model),
        "run": asdict(run),
        "size": {"height": height, "width": width},
        "dtype": jnp.dtype(dtype).name,
        "devices": devices,
        "attention": attention_path(dtype),
        "rewards": [reward.name for reward in bench.rewards],
        "chunks": chunks,
        "repeats": repeats,
        "matmul_peak_flop_per_second": matmul_peak(dtype),
    }
    lanes = bench.lanes(tuple(sorted(candidates)), run)
    for runs in bench.measure(lanes, chunks=chunks, repeats=repeats):
        report["runs"] = runs
        on_round(report)
    report["prompt"] = bench.prompt(lanes, repeats)
    if profile is not None:
        bench.profile(lanes[-1], profile)
    return report
