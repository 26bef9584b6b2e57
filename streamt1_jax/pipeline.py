"""The friendly shell around the pure search: prompts in, videos out."""

import dataclasses
import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from streamt1_jax import __version__
from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.generator import Conditioning, Generator, wan_generator
from streamt1_jax.models.attention import attention_path
from streamt1_jax.models.umt5 import encode_prompt
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import NoiseFn, gaussian_noise, recorded_noise
from streamt1_jax.result import ChunkResult, Output, beam_frames, beam_latents, to_chunk
from streamt1_jax.rewards import PromptTable, Reward, resolve
from streamt1_jax.settings import check_seed, check_size, chunks_of, legal_frames
from streamt1_jax.sharding import candidate_mesh, place
from streamt1_jax.state import ChunkRecord
from streamt1_jax.stream import Search, init_state, score_video, stream_chunks
from streamt1_jax.text import Tokenizer, check_prompt
from streamt1_jax.trace import Trace
from streamt1_jax.weights import Weights, default_dtype, find_weights

FPS = 16
ENDLESS_CHUNKS = 40  # an endless stream fuses its scores as a 30-second video does, the longest of the paper
FULL_SIZE = 5e8  # DiT parameters from which a CPU needs hours a video

NoiseSource = NoiseFn | Mapping[str, Any] | None


@jax.jit(static_argnames="generator")
def _prepare(generator: Generator, params, prompt_embeds, prompt_index) -> Conditioning:
    return generator.prepare(params, prompt_embeds, prompt_index)


@dataclass(frozen=True)
class _Request:
    """One checked call."""

    prompt: str
    seed: int
    chunks: int | None  # None: endless
    config: RunConfig
    search: Search
    conditioning: Conditioning


class StreamT1Pipeline:
    """Text to video by Stream-T1's test-time search over a streaming generator.

    >>> pipe = StreamT1Pipeline.from_pretrained("mini")
    >>> pipe("a red circle moves right", seconds=5, seed=42).save("out.mp4")
    """

    def __init__(self, weights: Weights, *, dtype: Any = None, keep_text_encoder: bool = False, devices: int = 1):
        """Loads the DiT and the VAE's decoder; the text encoder is loaded when a prompt needs it.

        Args:
            weights: where the parameters come from.
            dtype: of parameters and activations; bfloat16 on an accelerator, float32 on a CPU, if None.
            keep_text_encoder: keep it in memory between prompts (11 GB at full size) instead of loading it
                again for every call with new prompts.
            devices: of this machine, that share the candidates of a chunk; the result is the same.
        """
        self.devices = devices
        self.weights, self.config = weights, weights.config
        self.dtype = default_dtype() if dtype is None else jnp.dtype(dtype).type
        self.tokenizer = Tokenizer(
            weights.tokenizer, text_len=self.config.dit.text_len, vocab_size=self.config.text.vocab_size
        )
        self.params = weights.generator_params(self.dtype)
        self.prompts = PromptTable()
        self._keep_text_encoder, self._text_params = keep_text_encoder, None
        self._embeds: dict[str, np.ndarray] = {}
        self._generators: dict[Any, Generator] = {}
        self._searches: dict[Any, Search] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        dtype: Any = None,
        allow_cpu: bool = False,
        keep_text_encoder: bool = False,
        devices: int = 1,
    ) -> "StreamT1Pipeline":
        """The embedded model ("mini"), or the folder of a checkpoint converted by `streamt1 convert`.

        Args:
            allow_cpu: let a full-size model run without an accelerator, which takes hours.

        Raises:
            WeightsError: no such checkpoint, or one that is not what its manifest says.
            BadInputError: a full-size model on a CPU without `allow_cpu`.
        """
        weights = find_weights(name_or_dir)
        dit = weights.config.dit
        size = dit.num_layers * dit.dim * (8 * dit.dim + 2 * dit.ffn_dim)
        if jax.default_backend() == "cpu" and size > FULL_SIZE and not allow_cpu:
            raise BadInputError(
                f"the model has {size / 1e9:.1f} billion parameters and the only device is a CPU, expected a GPU: "
                "install jax[cuda12] or jax[cuda13], or pass allow_cpu (--allow-cpu) and wait for hours"
            )
        return cls(weights, dtype=dtype, keep_text_encoder=keep_text_encoder, devices=devices)

    def encode(self, prompts: Sequence[str], *, strict: bool = False) -> list[Float[np.ndarray, "P text_dim"]]:
        """Prompt embeddings, remembered; the text encoder is loaded once for all that are new.

        Args:
            strict: a prompt longer than the encoder's length is an error instead of a warning.
        """
        tokens = {p: self.tokenizer.encode(p, strict=strict) for p in dict.fromkeys(prompts) if p not in self._embeds}
        if tokens:
            graphdef, _ = network_graph(self.config, "text", self.dtype)
            params = self._text_params or self.weights.text_params(self.dtype)
            if self._keep_text_encoder:
                self._text_params = params
            for prompt, prompt_tokens in tokens.items():
                embeds = _encode(graphdef, params, prompt_tokens.ids, prompt_tokens.mask)
                self._embeds[prompt] = np.asarray(embeds)[: prompt_tokens.mask.sum()]
        return [self._pad(self._embeds[p]) for p in prompts]

    def _pad(self, rows: Float[np.ndarray, "p text_dim"]) -> Float[np.ndarray, "P text_dim"]:
        """The zero rows past the prompt, which are most of them and not kept."""
        return np.pad(rows, ((0, self.config.dit.text_len - len(rows)), (0, 0)))

    def __call__(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        frames: int | None = None,
        on_chunk: Callable[[ChunkResult], None] | None = None,
        **settings: Any,
    ) -> Output:
        """Makes one video.

        Args:
            prompt: what to show.
            seconds: length at 16 frames/s, the nearest legal one; 5 where neither length is given.
            frames: length in pixel frames, 12k - 3.
            on_chunk: called with each `ChunkResult`.
            **settings: the other arguments of `stream`.

        Raises:
            BadInputError: a bad prompt, length, size, seed or setting.
            RewardError: a reward raised, or no candidate of a chunk has a finite score.
        """
        if seconds is None and frames is None:
            seconds = 5.0
        started = time.perf_counter()
        request = self._request(prompt, seconds=seconds, frames=frames, **settings)
        assert request.chunks is not None
        results = []
        for result in itertools.islice(self._run(request), request.chunks):
            results.append(result)
            if on_chunk is not None:
                on_chunk(result)
        return self._finish(request, results, started)

    def stream(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        frames: int | None = None,
        seed: int = 42,
        height: int | None = None,
        width: int | None = None,
        config: RunConfig | None = None,
        search: SearchConfig | None = None,
        rewards: tuple[str | Reward, str | Reward] = ("native", "native"),
        noise: NoiseSource = None,
        strict: bool = False,
    ) -> Iterator[ChunkResult]:
        """Chunk after chunk as they are committed; endless where neither length is given.

        The frames of a chunk are those of the beam that is best then. With several beams a later chunk can
        belong to another beam; the video of one beam is what a call of the pipeline returns.

        Args:
            seed: 0 to 2^32 - 1; the same seed makes the same video.
            height, width: pixels, multiples of 16; the size the weights were made for if None.
            config: stream and search settings; the released ones if None.
            search: replaces `config.search`.
            rewards: short and long: "native", "package.module:Name" or a `Reward`.
            noise: a function from a seed to `Draws`, or recorded arrays `{"seeds", "noise", "renoise"}`.
            strict: a prompt that is too long is an error.
        """
        request = self._request(
            prompt,
            seconds=seconds,
            frames=frames,
            seed=seed,
            height=height,
            width=width,
            config=config,
            search=search,
            rewards=rewards,
            noise=noise,
            strict=strict,
        )
        return itertools.islice(self._run(request), request.chunks)

    def _request(
        self,
        prompt: str,
        *,
        seconds: float | None,
        frames: int | None,
        seed: int = 42,
        height: int | None = None,
        width: int | None = None,
        config: RunConfig | None = None,
        search: SearchConfig | None = None,
        rewards: tuple[str | Reward, str | Reward] = ("native", "native"),
        noise: NoiseSource = None,
        strict: bool = False,
    ) -> _Request:
        """Checks everything first, then encodes the prompt."""
        check_prompt(prompt)
        seed = check_seed(seed)
        trained = (self.config.height, self.config.width)
        check_size(height, width, trained=trained)
        config = config or RunConfig()
        if search is not None:
            config = dataclasses.replace(config, search=search)
        chunks = None
        if seconds is not None or frames is not None:
            f, factor = config.stream.latent_frames_per_chunk, self.config.vae.time_factor
            length = legal_frames(
                frames=frames, seconds=seconds, latent_frames_per_chunk=f, fps=FPS, time_factor=factor
            )
            chunks = chunks_of(length, config.stream, time_factor=factor)
        made = self._search(config, height or trained[0], width or trained[1], rewards, noise)
        self.params = place(made.mesh, self.params)
        (embeds,) = self.encode([prompt], strict=strict)
        index = jnp.int32(self.prompts.add(prompt))
        return _Request(prompt, seed, chunks, config, made, _prepare(made.generator, self.params, embeds, index))

    def _search(self, config: RunConfig, height: int, width: int, rewards, noise: NoiseSource) -> Search:
        """One `Search` for all calls that share its settings, so that the second compiles nothing."""
        key = (config, height, width, tuple(rewards), _noise_key(noise))
        if key not in self._searches:
            size = (config.stream, height, width)
            if size not in self._generators:
                self._generators[size] = wan_generator(self.config, config.stream, height, width, self.dtype)
            generator = self._generators[size]
            short, long = (
                reward if isinstance(reward, Reward) else resolve(reward, role, self.prompts)
                for reward, role in zip(rewards, ("short", "long"), strict=True)
            )
            mesh = candidate_mesh(config.search, self.devices) if self.devices > 1 else None
            self._searches[key] = Search(generator, short, long, _noise_fn(noise, generator, config), config, mesh)
        return self._searches[key]

    def _run(self, request: _Request) -> Iterator[ChunkResult]:
        search = request.search
        state = init_state(search, request.seed, request.chunks or ENDLESS_CHUNKS)
        chunks = stream_chunks(search, self.params, request.conditioning, state)
        for index in itertools.count():
            started = time.perf_counter()
            _, on_device = next(chunks)
            record = jax.device_get(on_device)  # the one synchronisation of a chunk
            chunk = to_chunk(record, index, request.config, time.perf_counter() - started)
            _check(search, record, index)
            yield ChunkResult(record.frames[0], chunk, record)

    def _finish(self, request: _Request, results: Sequence[ChunkResult], started: float) -> Output:
        """The whole video of every kept beam is scored once more, and the best is the result (SPEC section 5)."""
        records = [result.record for result in results]
        trace = Trace(tuple(result.chunk for result in results))
        beams = len(records[-1].kept)
        videos = [beam_frames(trace, records, beam) for beam in range(beams)]
        scores = [score_video(request.search.long, video, request.conditioning.prompt_index) for video in videos]
        request.search.long.raise_if_failed()
        trace = dataclasses.replace(trace, final_scores=tuple(scores))
        latents = beam_latents(trace, records, trace.winner)
        info = self._info(request, trace, latents, started)
        long = request.search.long
        if long.explain is not None:  # what the score was made of, with the frames and the rate that it depends on
            info["final_reward"] = long.explain(videos[trace.winner], request.prompt, float(FPS))
        return Output(videos[trace.winner], latents, trace, FPS, info)

    def _info(self, request: _Request, trace: Trace, latents: np.ndarray, started: float) -> dict[str, Any]:
        search = request.search
        device = jax.devices()[0]
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "history_seeds": [c.seed for c in trace.winning_path()],
            "config": dataclasses.asdict(request.config),
            "grid": dict(zip(("beams", "candidates_per_beam"), request.config.search.grid, strict=True)),  # as run
            "rewards": {"short": search.short.name, "long": search.long.name},
            "reward_models": {
                reward.name: dict(reward.about) for reward in (search.short, search.long) if reward.about
            },
            "size": {"height": search.generator.frame_shape[0], "width": search.generator.frame_shape[1]},
            "latent_frames": len(latents),
            "fps": FPS,
            "dtype": jnp.dtype(self.dtype).name,
            "attention": attention_path(self.dtype),
            "weights": self.weights.describe(),
            "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
            "versions": {"streamt1-jax": __version__}
            | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
            "seconds": {
                "total": time.perf_counter() - started,
                "chunks": [chunk.seconds for chunk in trace.chunks],  # compilation is in the first two
            },
        }


@jax.jit(static_argnames="graphdef")
def _encode(graphdef, params, ids, mask):
    return encode_prompt(nnx.merge(graphdef, params), ids, mask)


def _noise_key(noise: NoiseSource) -> Any:
    """Equal for equal noise: recorded arrays are constants of the program, so new contents are a new program."""
    if noise is None or callable(noise):
        return noise
    return tuple((key, hashlib.sha256(np.asarray(x).tobytes()).hexdigest()) for key, x in noise.items())


def _noise_fn(noise: NoiseSource, generator: Generator, config: RunConfig) -> NoiseFn:
    if noise is None:
        return gaussian_noise(generator.chunk_shape, len(config.stream.denoising_steps))
    if callable(noise):
        return noise
    missing = {"seeds", "noise", "renoise"} - set(noise)
    if missing:
        raise BadInputError(f"noise has {sorted(noise)}, expected seeds, noise and renoise: add {sorted(missing)}")
    arrays = (jnp.asarray(noise[key]) for key in ("seeds", "noise", "renoise"))
    return recorded_noise(*arrays)


def _check(search: Search, record: ChunkRecord, index: int) -> None:
    """What went wrong inside the compiled step surfaces here, after the chunk."""
    for reward in (search.short, search.long):
        reward.raise_if_failed()
    bad = int((~record.usable).sum())
    if bad == record.usable.size:
        raise RewardError(
            f"no candidate of chunk {index} has finite latents and scores: the rewards {search.short.name} and "
            f"{search.long.name} gave {record.short.tolist()} and {record.long.tolist()}"
        )
    if bad:
        warnings.warn(
            f"{bad} of {record.usable.size} candidates of chunk {index} are not finite and were not kept", stacklevel=3
        )
