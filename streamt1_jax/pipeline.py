"""The friendly shell around the pure search: prompts in, videos out."""

import dataclasses
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.generator import Conditioning, Generator, wan_generator
from streamt1_jax.models.attention import attention_path
from streamt1_jax.models.umt5 import encode_prompt
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import NoiseSource, noise_function, noise_key
from streamt1_jax.result import ChunkResult, Output, beam_frames, beam_latents, digests
from streamt1_jax.rewards import PromptTable, PromptTokens, Reward, resolve
from streamt1_jax.rewards.registry import Role
from streamt1_jax.run_info import environment, normal
from streamt1_jax.run_store import RunStore, Saved
from streamt1_jax.segments import first_frame, plan_switches
from streamt1_jax.session import CallSettings, Request, VideoStream
from streamt1_jax.settings import check_seed, check_size, chunks_of, legal_frames
from streamt1_jax.sharding import candidate_mesh, place
from streamt1_jax.stream import Search, place_state, score_video
from streamt1_jax.text import Tokenizer, check_prompt
from streamt1_jax.trace import Trace
from streamt1_jax.weights import Weights, default_dtype, find_weights

FPS = 16
FULL_SIZE = 5e8  # DiT parameters from which a CPU needs hours a video


@jax.jit(static_argnames="generator")
def _prepare(generator: Generator, params, prompt_embeds, prompt_index) -> Conditioning:
    return generator.prepare(params, prompt_embeds, prompt_index)


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
        self._stream: weakref.ref[VideoStream] | None = None  # the last one begun

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

    def tokens(self, prompt: str) -> PromptTokens:
        """The prompt for rewards that read it: `Conditioning.tokens`."""
        tokens = self.tokenizer(prompt)
        return PromptTokens(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask))

    def reward(self, spec: str, role: Role) -> Reward:
        """The reward of a name, by `rewards.resolve`; "default" is what these weights come with."""
        default, own = self.weights.default_rewards, self.weights.own_rewards
        return resolve(spec, role, self.prompts, default=default, mini=own)

    def prompt_for(self, reward: Reward, prompt: str) -> Any:
        """The prompt in the form that `reward.call` takes."""
        tokens = None if reward.tokenizer is None else self.tokens(prompt)
        return reward.prompt_of(jnp.int32(self.prompts.add(prompt)), tokens)

    def _pad(self, rows: Float[np.ndarray, "p text_dim"]) -> Float[np.ndarray, "P text_dim"]:
        """The zero rows past the prompt, which are most of them and not kept."""
        return np.pad(rows, ((0, self.config.dit.text_len - len(rows)), (0, 0)))

    def __call__(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        frames: int | None = None,
        on_chunk: Callable[[ChunkResult], bool | None] | None = None,
        store: RunStore | None = None,
        **settings: Unpack[CallSettings],
    ) -> Output:
        """Makes one video.

        Args:
            prompt: what to show.
            seconds: length at 16 frames/s, the nearest legal one; 5 where neither length is given.
            frames: length in pixel frames, 12k - 3.
            on_chunk: called with each `ChunkResult`; where it returns True, the video ends with that chunk.
            store: keeps the state of every chunk, and goes on from what it holds.
            **settings: see `CallSettings`.

        Raises:
            BadInputError: a bad prompt, length, size, seed or setting; or a store that holds another run.
            RewardError: a reward raised, or no candidate of a chunk has a finite score.
        """
        if seconds is None and frames is None:
            seconds = 5.0
        started = time.perf_counter()
        request = self._request(prompt, seconds=seconds, frames=frames, **settings)
        saved = store.open(self._identity(request), environment(), request.initial_state) if store else None
        stream = self._open(request, saved)
        results: list[ChunkResult] = []
        for result in saved.results(request) if saved else ():
            results.append(result)
            if on_chunk is not None:
                on_chunk(result)
        for result in stream:
            results.append(result)
            if store is not None:
                store.save(stream.committed, stream.state, result)
            if on_chunk is not None and on_chunk(result):
                break
        output = self._finish(request, stream, results, started)
        if store is not None:
            output.info["saving"] = store.cost()
        return output

    def stream(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        frames: int | None = None,
        **settings: Unpack[CallSettings],
    ) -> VideoStream:
        """Chunk after chunk as they are committed; endless where neither length is given.

        Args:
            seconds, frames: a length, as in a call of the pipeline.
            **settings: see `CallSettings`.

        Raises:
            BadInputError: a bad prompt, length, size, seed or setting.
        """
        return self._open(self._request(prompt, seconds=seconds, frames=frames, **settings))

    def switch_prompt(self, prompt: str) -> None:
        """Shows another prompt from the next chunk on, in the stream begun last (`VideoStream.switch_prompt`).

        Raises:
            BadInputError: a prompt that cannot be used, or no stream is open.
        """
        stream = self._stream and self._stream()
        if stream is None or not stream.open:
            raise BadInputError("no stream is open, expected one to switch: start it with pipe.stream(prompt)")
        stream.switch_prompt(prompt)

    def _open(self, request: Request, saved: Saved | None = None) -> VideoStream:
        def condition(prompt: str) -> Conditioning:
            (embeds,) = self.encode([prompt])
            index = jnp.int32(self.prompts.add(prompt))
            made = _prepare(request.search.generator, self.params, embeds, index)
            return made._replace(tokens=self.tokens(prompt))

        state = place_state(request.search, saved.state) if saved else request.initial_state()
        committed = saved.committed if saved else 0
        stream = VideoStream(request, self.params, condition, state, committed=committed)
        self._stream = weakref.ref(stream)
        return stream

    def _request(
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
        rewards: tuple[str | Reward, str | Reward] = ("default", "default"),
        noise: NoiseSource = None,
        strict: bool = False,
        switches: Mapping[float, str] | Sequence[tuple[float, str]] = (),
    ) -> Request:
        """Checks everything first, then encodes the prompts."""
        check_prompt(prompt)
        seed = check_seed(seed)
        trained = (self.config.height, self.config.width)
        check_size(height, width, trained=trained)
        config = config or RunConfig()
        if search is not None:
            config = dataclasses.replace(config, search=search)
        chunks, factor = None, self.config.vae.time_factor
        if seconds is not None or frames is not None:
            f = config.stream.latent_frames_per_chunk
            length = legal_frames(
                frames=frames, seconds=seconds, latent_frames_per_chunk=f, fps=FPS, time_factor=factor
            )
            chunks = chunks_of(length, config.stream, time_factor=factor)
        segments = plan_switches(switches, config.stream, chunks, fps=FPS, time_factor=factor)
        made = self._search(config, height or trained[0], width or trained[1], rewards, noise)
        self.params = place(made.mesh, self.params)
        request = Request(prompt, segments, seed, chunks, made)
        self.encode(request.prompts, strict=strict)
        return request

    def _search(self, config: RunConfig, height: int, width: int, rewards, noise: NoiseSource) -> Search:
        """One `Search` for all calls that share its settings, so that the second compiles nothing."""
        key = (config, height, width, tuple(rewards), noise_key(noise))
        if key not in self._searches:
            size = (config.stream, height, width)
            if size not in self._generators:
                self._generators[size] = wan_generator(self.config, config.stream, height, width, self.dtype)
            generator = self._generators[size]
            short, long = (
                self._check_reads(reward if isinstance(reward, Reward) else self.reward(reward, role))
                for reward, role in zip(rewards, ("short", "long"), strict=True)
            )
            mesh = candidate_mesh(config.search, self.devices) if self.devices > 1 else None
            draws = noise_function(noise, generator.chunk_shape, len(config.stream.denoising_steps))
            self._searches[key] = Search(generator, short, long, draws, config, mesh)
        return self._searches[key]

    def _check_reads(self, reward: Reward) -> Reward:
        """Refuses a reward that reads the ids of another tokenizer."""
        if reward.tokenizer not in (None, self.tokenizer.sha256):
            raise BadInputError(
                f"reward {reward.name!r} reads the tokens of another model, expected a reward for these weights "
                f"({self.weights.describe()['name']}); choose one that reads no tokens, such as native"
            )
        return reward

    def _finish(self, request: Request, stream: VideoStream, results: Sequence[ChunkResult], started: float) -> Output:
        """The whole video of every kept beam is scored once more, and the best is the result (METHOD section 5)."""
        records = [result.record for result in results]
        trace = Trace(tuple(result.chunk for result in results), switches=tuple(stream.switches))
        videos = [beam_frames(trace, records, beam) for beam in range(len(records[-1].kept))]
        trace = dataclasses.replace(trace, final_scores=tuple(self._final_score(request, trace, v) for v in videos))
        request.search.long.raise_if_failed()
        latents, video = beam_latents(trace, records, trace.winner), videos[trace.winner]
        info = self._info(request, trace, started) | {
            "latent_frames": len(latents),
            "complete": len(results) == request.chunks,
            "sha256": digests(latents, video),
        }
        if (explain := request.search.long.explain) is not None:
            # What the score was made of, with the frames and the rate that it depends on; a list for several prompts.
            parts = [
                explain(video[begin:end], prompt, float(FPS))
                for begin, end, prompt in self._parts(request, trace, video)
            ]
            info["final_reward"] = parts if trace.switches else parts[0]
        return Output(video, latents, trace, FPS, info)

    def _parts(self, request: Request, trace: Trace, video: np.ndarray) -> list[tuple[int, int, str]]:
        """(first frame, end, prompt) of what was shown under each prompt."""
        shown = [(0, request.prompt), *((switch.chunk, switch.prompt) for switch in trace.switches)]
        starts = [first_frame(chunk, request.config.stream, self.config.vae.time_factor) for chunk, _ in shown]
        prompts = (prompt for _, prompt in shown)
        return list(zip(starts, [*starts[1:], len(video)], prompts, strict=True))

    def _final_score(self, request: Request, trace: Trace, video: np.ndarray) -> float:
        """Of one beam's video; where the prompt changes, the mean over its parts, each by its own prompt."""
        total, long = 0.0, request.search.long
        for begin, end, prompt in self._parts(request, trace, video):
            score = score_video(long, video[begin:end], self.prompt_for(long, prompt))
            total += score * (end - begin) / len(video)
        return total

    def _identity(self, request: Request) -> dict[str, Any]:
        """All that the bits of a run depend on, but for the machine."""
        height, width = request.search.generator.frame_shape
        rewards = (request.search.short, request.search.long)
        made_with = {
            "rewards": [{"name": reward.name, **reward.about} for reward in rewards],
            "size": {"height": height, "width": width},
            "dtype": jnp.dtype(self.dtype).name,
            "weights": self.weights.describe(),
        }
        return request.asked() | normal(made_with)

    def _info(self, request: Request, trace: Trace, started: float) -> dict[str, Any]:
        search = request.search
        return {
            "prompt": request.prompt,
            "switches": [dataclasses.asdict(switch) for switch in trace.switches],
            "seed": request.seed,
            "history_seeds": [c.seed for c in trace.winning_path()],
            "config": dataclasses.asdict(request.config),
            "grid": dict(zip(("beams", "candidates_per_beam"), request.config.search.grid, strict=True)),  # as run
            "rewards": {"short": search.short.name, "long": search.long.name},
            "reward_models": {
                reward.name: dict(reward.about) for reward in (search.short, search.long) if reward.about
            },
            "size": {"height": search.generator.frame_shape[0], "width": search.generator.frame_shape[1]},
            "fps": FPS,
            "dtype": jnp.dtype(self.dtype).name,
            "attention": attention_path(self.dtype),
            "weights": self.weights.describe(),
            **environment(),
            "seconds": {
                "total": time.perf_counter() - started,
                "chunks": [chunk.seconds for chunk in trace.chunks],  # compilation is in the first two
            },
        }


@jax.jit(static_argnames="graphdef")
def _encode(graphdef, params, ids, mask):
    return encode_prompt(nnx.merge(graphdef, params), ids, mask)
