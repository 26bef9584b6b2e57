"""A video while it is being made: chunks come out, new prompts may go in between them."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
from jaxtyping import PyTree

from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.generator import Conditioning
from streamt1_jax.noise import NoiseSource
from streamt1_jax.result import ChunkResult, to_chunk
from streamt1_jax.rewards import Reward
from streamt1_jax.run_info import asked
from streamt1_jax.search import Search
from streamt1_jax.segments import Segment
from streamt1_jax.state import ChunkRecord, StreamState
from streamt1_jax.stream import init_state, stream_chunks
from streamt1_jax.switch import jitted_recache, replaces_sinks
from streamt1_jax.text import check_prompt
from streamt1_jax.trace import Switch

ENDLESS_CHUNKS = 40  # an endless stream fuses its scores as a 30-second video does, the longest of the paper


class CallSettings(TypedDict, total=False):
    """What a call of the pipeline may be given beside its prompt and its length."""

    seed: int  # 0 to 2^32 - 1 (default 42); the same seed makes the same video
    height: int | None  # pixels, a multiple of 16; the size the weights were made for if None
    width: int | None
    config: RunConfig | None  # stream and search settings; the released ones if None
    search: SearchConfig | None  # replaces `config.search`
    rewards: tuple[str | Reward, str | Reward]  # short and long, as `rewards.resolve` knows them, or made already
    noise: NoiseSource  # a function from a seed to `Draws`, or recorded arrays
    strict: bool  # a prompt that is too long is an error
    switches: Mapping[float, str] | Sequence[tuple[float, str]]  # prompts by seconds: {5.25: "a new prompt"}


@dataclass(frozen=True)
class Request:
    """One checked call of the pipeline."""

    prompt: str
    segments: tuple[Segment, ...]  # the prompts that follow, where they are known beforehand
    seed: int
    chunks: int | None  # None: endless
    search: Search

    @property
    def config(self) -> RunConfig:
        return self.search.config

    @property
    def prompts(self) -> list[str]:
        return [self.prompt, *(segment.prompt for segment in self.segments)]

    def asked(self) -> dict[str, Any]:
        """What the user asked for, as plain data."""
        assert self.chunks is not None, "an endless video has no end to go on to"
        return asked(self.prompt, self.segments, self.seed, self.chunks, self.config)

    def initial_state(self) -> StreamState:
        return init_state(self.search, self.seed, self.chunks or ENDLESS_CHUNKS)

    def prompt_of(self, chunk: int) -> str:
        """What is shown at a chunk, as planned."""
        shown = [segment.prompt for segment in self.segments if segment.chunk <= chunk]
        return shown[-1] if shown else self.prompt


class VideoStream(Iterator[ChunkResult]):
    """Chunk after chunk as they are committed; made by `StreamT1Pipeline.stream`.

    The frames of a chunk are those of the beam that is best then. With several beams a later chunk can belong to
    another beam; the video of one beam is what a call of the pipeline returns. Neither memory nor the time of a chunk
    grows with the length.
    """

    def __init__(
        self,
        request: Request,
        params: PyTree,
        condition: Callable[[str], Conditioning],
        state: StreamState,
        *,
        committed: int = 0,
    ):
        """
        Args:
            params: of the generator.
            condition: makes what the generator takes of a prompt.
            state: to go on from; consumed.
            committed: chunks that `state` has behind it.
        """
        self.request, self.committed = request, committed
        self.switches: list[Switch] = [
            self._switch(segment.chunk, segment.prompt) for segment in request.segments if segment.chunk < committed
        ]
        self._params, self._condition = params, condition
        self._state: StreamState | None = state
        self._prompt = request.prompt_of(max(committed - 1, 0))
        self._next_prompt: str | None = None
        self._chunks: Any = None  # the running driver
        self._closed = False

    @property
    def prompt(self) -> str:
        """What the next chunk will show."""
        return self._due() or self._prompt

    @property
    def open(self) -> bool:
        """Whether another chunk can come."""
        return not self._closed and (self.request.chunks is None or self.committed < self.request.chunks)

    @property
    def state(self) -> StreamState:
        """After the last chunk; the next chunk consumes it."""
        assert self._state is not None, "a closed stream has no state"
        return self._state

    def switch_prompt(self, prompt: str) -> None:
        """Shows another prompt from the next chunk on, with its KV recache (METHOD section 9); the last call counts.

        Raises:
            BadInputError: a prompt that cannot be used, or no chunk is to come.
        """
        check_prompt(prompt)
        if not self.open:
            raise BadInputError("this stream has ended, expected an open one: start another with pipe.stream(prompt)")
        self._next_prompt = prompt

    def close(self) -> None:
        """Ends the stream and lets its memory on the device go; at any time, and more than once."""
        self._closed = True
        self._chunks = self._state = None

    def __enter__(self) -> "VideoStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> ChunkResult:
        if not self.open:
            self.close()
            raise StopIteration
        started = time.perf_counter()
        index = self.committed
        try:
            self._state, on_device = self._advance()
            record = jax.device_get(on_device)  # the one synchronisation of a chunk
            chunk = to_chunk(record, index, self.request.config, time.perf_counter() - started)
            self.committed += 1
            _check(self.request.search, record, index)
        except BaseException:
            self.close()  # the state of the chunk before has been consumed
            raise
        return ChunkResult(record.frames[0], chunk, record, self._prompt)

    def _due(self) -> str | None:
        """The prompt to switch to before the next chunk."""
        planned = [segment.prompt for segment in self.request.segments if segment.chunk == self.committed]
        return self._next_prompt or (planned[0] if planned else None)

    def _advance(self) -> tuple[StreamState, ChunkRecord]:
        following, search, committed = self._due(), self.request.search, self.committed
        self._next_prompt = None
        if following is not None:
            self._prompt = following
            if committed:
                self.switches.append(self._switch(committed, following))
        if self._chunks is not None:
            return self._chunks.send(None if following is None else self._condition(following))
        conditioning, state = self._condition(self._prompt), self.state
        if following is not None and committed:  # a driver that has not begun takes no switch
            state = jitted_recache(search, self._params, conditioning, state, committed=committed)
        self._chunks = stream_chunks(search, self._params, conditioning, state, committed=committed)
        return next(self._chunks)

    def _switch(self, chunk: int, prompt: str) -> Switch:
        return Switch(chunk, prompt, replaces_sinks(self.request.config.stream, chunk))


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
