"""`streamt1 bench`: where the time of a chunk goes, on random weights.

Every figure says what is in it. A chunk is timed twice: as one compiled step, which is what users run, and stage by
stage, each its own program and waited for. Only chunks with a full window count. Compilation never counts; that none
happened while timing is counted by JAX's own event and reported.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax import flops
from streamt1_jax import stream as stages
from streamt1_jax.config import ModelConfig, RunConfig, SearchConfig, StreamConfig, grid_of
from streamt1_jax.errors import BadInputError
from streamt1_jax.generator import Conditioning, wan_generator
from streamt1_jax.measure import Spread, compilation_cache, compilations, machine, matmul_peak, peak_bytes, timed
from streamt1_jax.memory import size_of
from streamt1_jax.models.attention import attention_path
from streamt1_jax.models.umt5 import encode_prompt
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.rewards import Reward, native_long, native_short
from streamt1_jax.stream import Search, init_state, jitted_step
from streamt1_jax.weights import random_params

STAGES = ("propose", "watch", "judge", "select", "recall", "commit", "host")
MEANING = {
    "text": "text encoder, once a prompt",
    "propose": "DiT denoise, all steps of all candidates",
    "watch": "VAE decode of all candidates",
    "judge": "rewards",
    "select": "pick and gather the kept beams",
    "recall": "DiT context pass of the kept beams",
    "commit": "write the caches, route what leaves",
    "host": "record to the host",
}


def search_of(candidates: int) -> SearchConfig:
    beams, each = grid_of(candidates)
    return SearchConfig.longlive() if candidates == 1 else SearchConfig(beams=beams, candidates_per_beam=each)


class Bench:
    """One model at one size on random weights; `measure` times one number of candidates."""

    def __init__(
        self, model: ModelConfig, *, height: int, width: int, dtype: Any, rewards: tuple[Reward, Reward] | None
    ):
        self.model, self.dtype, self.size = model, dtype, (height, width)
        self.rewards = rewards or (native_short(), native_long())
        stream = StreamConfig()
        self.steady = stream.sink_chunks + stream.window_chunks + 1  # the first chunk to meet a full window
        self.params = {
            "dit": random_params(network_graph(model, "dit", dtype)[1], 0),
            "decoder": random_params(network_graph(model, "decoder", dtype)[1], 0),
        }

    def search(self, config: RunConfig) -> Search:
        generator = wan_generator(self.model, config.stream, *self.size, self.dtype)
        noise = gaussian_noise(generator.chunk_shape, len(config.stream.denoising_steps))
        return Search(generator, *self.rewards, noise, config)

    def conditioning(self, search: Search) -> Conditioning:
        embeds = jnp.zeros((self.model.dit.text_len, self.model.dit.text_dim), jnp.float32)
        return jax.jit(search.generator.prepare)(self.params, embeds, jnp.int32(0))

    def text_seconds(self, repeats: int) -> Spread:
        """The text encoder for one prompt; its weights live for this call alone."""
        graphdef, abstract = network_graph(self.model, "text", self.dtype)
        params = random_params(abstract, 0)
        ids = jnp.arange(self.model.dit.text_len, dtype=jnp.int32) % self.model.text.vocab_size
        encode = jax.jit(lambda params, ids: encode_prompt(nnx.merge(graphdef, params), ids, jnp.ones_like(ids)))
        return Spread.of(timed(lambda: encode(params, ids), repeats))

    def measure(self, candidates: tuple[int, ...], *, chunks: int, repeats: int) -> list[dict[str, Any]]:
        """Times `repeats` videos of `chunks` chunks with each number of candidates, after one that warms up."""
        if chunks < self.steady + 1:
            raise BadInputError(
                f"--chunks is {chunks}, expected at least {self.steady + 1}: earlier the window is not full"
            )
        lanes = self._lanes(candidates)
        for _ in range(repeats):  # in turn, so that a slow minute of the machine meets all of them
            for lane in lanes:
                with compilations() as compiled:
                    lane.videos.append(self._video(lane.search, lane.conditioning, chunks))
                lane.compiled += len(compiled)
        return [self._report(lane) for lane in lanes]

    def _lanes(self, candidates: tuple[int, ...]) -> list["_Lane"]:
        """Compiles everything, then warms up; what memory a lane takes is read before its stages run one by one."""
        searches = [self.search(RunConfig(search=search_of(n))) for n in candidates]
        conditionings = [self.conditioning(search) for search in searches]
        lanes = []
        with tempfile.TemporaryDirectory() as folder, compilation_cache(folder):
            seconds = [
                {name: self._compile(search, conditioning) for name in ("cold", "warm")}
                for search, conditioning in zip(searches, conditionings, strict=True)
            ]
            for lane in zip(candidates, searches, conditionings, seconds, strict=True):
                lanes.append(_Lane(*lane, peak_bytes=self._peak(*lane[1:3])))
                self._video(*lane[1:3], self.steady + 1)
        return lanes

    def _peak(self, search: Search, conditioning: Conditioning) -> dict[str, int]:
        """The most memory after a video as users make it."""
        state = init_state(search, 0, self.steady + 1)
        for index in range(self.steady + 1):
            state, _ = jitted_step(search, self.params, conditioning, state, first=index == 0)
        jax.block_until_ready(state)
        return peak_bytes()

    def _report(self, lane: "_Lane") -> dict[str, Any]:
        """What the chunks with a full window took."""
        full = [video[self.steady :] for video in lane.videos]
        stage_seconds = {
            name: Spread.of([statistics.median(chunk.stages[name] for chunk in video) for video in full])
            for name in STAGES
        }
        chunk = Spread.of([statistics.median(chunk.whole for chunk in video) for video in full])
        over = statistics.median(sum(chunk.stages.values()) / chunk.whole for video in full for chunk in video)
        by_index = [statistics.median(chunk.whole for chunk in same) for same in zip(*lane.videos, strict=True)]
        return {
            "candidates": lane.candidates,
            "grid": lane.search.config.search.grid,
            "first_chunk_seconds": asdict(Spread.of([video[0].whole for video in lane.videos])),
            "chunk_seconds": asdict(chunk),
            "chunk_seconds_by_index": by_index,
            "late_over_early": statistics.median(by_index[-3:])
            / statistics.median(by_index[self.steady : self.steady + 3]),
            "stage_seconds": {name: asdict(spread) for name, spread in stage_seconds.items()},
            "stages_over_chunk": over,
            "compiled_while_timing": lane.compiled,
            "compile_seconds": lane.compile_seconds,
            "host_bytes": self._host_bytes(lane.search, lane.conditioning),
            "peak_bytes": lane.peak_bytes,
            **self._rates(lane.search, stage_seconds, chunk),
        }

    def _compile(self, search: Search, conditioning: Conditioning) -> float:
        """Seconds to trace and compile both step programs, or to find them in the persistent cache."""
        state = jax.eval_shape(lambda: init_state(search, 0, 1))
        jax.clear_caches()
        started = time.perf_counter()
        for first in (True, False):
            jitted_step.lower(search, self.params, conditioning, state, first=first).compile()
        return time.perf_counter() - started

    def profile(self, candidates: int, folder: str, chunks: int = 3) -> None:
        """A trace of steady chunks for XProf and Perfetto; every stage is a named scope."""
        search = self.search(RunConfig(search=search_of(candidates)))
        conditioning, state = self.conditioning(search), init_state(search, 0, 1)
        for index in range(self.steady):
            state, _ = jitted_step(search, self.params, conditioning, state, first=index == 0)
        jax.block_until_ready(state)
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for index in range(chunks):
                with jax.profiler.StepTraceAnnotation("chunk", step_num=self.steady + index):
                    state, record = jitted_step(search, self.params, conditioning, state, first=False)
                    jax.device_get(record)
            jax.block_until_ready(state)

    def _video(self, search: Search, conditioning: Conditioning, chunks: int) -> list["_Chunk"]:
        """Every chunk of a video is made twice from the same state, stage by stage and by the one program."""
        state, timed = init_state(search, 0, chunks), []
        jax.block_until_ready(state)
        for index in range(chunks):
            clock = _Clock()
            staged_step(search, self.params, conditioning, state, first=index == 0, clock=clock)
            started = time.perf_counter()
            state, record = jitted_step(search, self.params, conditioning, state, first=index == 0)
            jax.device_get(record)
            jax.block_until_ready(state)
            timed.append(_Chunk(clock.seconds, time.perf_counter() - started))
        return timed

    def _host_bytes(self, search: Search, conditioning: Conditioning) -> int:
        """Bytes of one chunk's record, and of the frames that host rewards are sent."""
        state = jax.eval_shape(lambda: init_state(search, 0, 1))
        step = jax.eval_shape(
            lambda p, c, s: stages.step(search, p, c, s, first=False), self.params, conditioning, state
        )
        total = size_of(step[1])
        beams, count = search.config.search.grid
        window = size_of(state.beams.window) // beams
        chunk = search.generator.frames_per_chunk * int(np.prod(search.generator.frame_shape)) * 3
        total += beams * count * (chunk * (search.short.runs_on == "host") + window * (search.long.runs_on == "host"))
        return total

    def _rates(self, search: Search, seconds: dict[str, Spread], chunk: Spread) -> dict[str, Any]:
        """Frames a second with and without parts, and the work of each stage by formula.

        None holds the text encoder, which runs once a prompt, nor writing a file.
        """
        frames = search.generator.frames_per_chunk
        dit = seconds["propose"].median + seconds["recall"].median
        work = chunk_flops(self.model, search)
        return {
            "frames_per_second": {
                "the whole chunk": frames / chunk.median,
                "the whole chunk less the rewards": frames / (chunk.median - seconds["judge"].median),
                "the DiT's two stages alone": frames / dit,
            },
            "flop": work,
            "flop_per_second": {name: flop / seconds[name].median for name, flop in work.items()},
        }


class _Chunk(NamedTuple):
    """Seconds of one chunk."""

    stages: dict[str, float]
    whole: float  # as one program, with its record on the host


@dataclass
class _Lane:
    """One number of candidates, ready to run, and what was measured of it."""

    candidates: int
    search: Search
    conditioning: Conditioning
    compile_seconds: dict[str, float]
    peak_bytes: dict[str, int]
    videos: list[list[_Chunk]] = field(default_factory=list)
    compiled: int = 0


class _Clock:
    """Seconds of each stage of one chunk."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = jax.block_until_ready(run())
        self.seconds[name] = time.perf_counter() - started
        return result


propose = jax.jit(stages.propose, static_argnames=("search", "first"))
watch = jax.jit(stages.watch, static_argnames=("search", "first"))
judge = jax.jit(stages.judge, static_argnames=("search", "first"))
select = jax.jit(stages.select)
recall = jax.jit(stages.recall, static_argnames=("search", "first"))
commit = jax.jit(stages.commit, static_argnames=("search", "first"))


def staged_step(search, params, conditioning, state, *, first: bool, clock: Callable[[str, Callable], Any]):
    """The same as `stream.step`, a program a stage; returns the next state."""
    kw = {"first": first}
    candidates = clock("propose", lambda: propose(search, params, conditioning, state, **kw))
    seen = clock("watch", lambda: watch(search, params, state, candidates, **kw))
    scores = clock("judge", lambda: judge(search, conditioning, state, candidates, seen, **kw))
    winners = clock("select", lambda: select(state, candidates, seen, scores))
    kv = clock("recall", lambda: recall(search, params, conditioning, state, winners, **kw))
    state, record = clock("commit", lambda: commit(search, params, state, candidates, seen, scores, winners, kv, **kw))
    clock("host", lambda: jax.device_get(record))
    return state


def chunk_flops(model: ModelConfig, search: Search) -> dict[str, int]:
    """Work of one steady chunk by stage, of valid tokens; appended sinks are not counted."""
    beams, count = search.config.search.grid
    stream = search.config.stream
    tokens = search.generator.kv.shape[1]
    past = tokens * (stream.sink_chunks + stream.window_chunks)
    h, w = search.generator.chunk_shape[2:]
    steps = len(stream.denoising_steps)
    frame = flops.vae_decode_frame(model.vae, h, w, first=False)
    return {
        "propose": beams * count * steps * flops.dit_forward(model.dit, tokens, past),
        "recall": beams * flops.dit_forward(model.dit, tokens, past, context=True),
        "watch": beams * count * stream.latent_frames_per_chunk * frame,
    }


def run_bench(
    model: ModelConfig,
    *,
    candidates: tuple[int, ...],
    chunks: int,
    repeats: int,
    dtype: Any,
    height: int,
    width: int,
    rewards: tuple[Reward, Reward] | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """The whole report as plain data; see `bench_table` for people.

    Args:
        candidates: numbers of candidates a chunk, each measured.
        chunks: of one video, enough for the window to fill.
        repeats: warm runs.
        profile: a folder for a profiler's trace of a few steady chunks of the last number of candidates.
    """
    measured_on = machine()  # before it is busy with this
    bench = Bench(model, height=height, width=width, dtype=dtype, rewards=rewards)
    runs = bench.measure(candidates, chunks=chunks, repeats=repeats)
    text = bench.text_seconds(repeats)  # last: the peak memory of the runs is without the text encoder
    if profile is not None:
        bench.profile(candidates[-1], profile)
    return {
        "machine": measured_on,
        "model": asdict(model),
        "size": {"height": height, "width": width},
        "dtype": jnp.dtype(dtype).name,
        "attention": attention_path(dtype),
        "rewards": [reward.name for reward in bench.rewards],
        "chunks": chunks,
        "repeats": repeats,
        "text_seconds": asdict(text),
        "matmul_peak_flop_per_second": matmul_peak(dtype),
        "runs": runs,
    }
