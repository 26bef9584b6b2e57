"""Which prompt is shown when: switches as a user types them, and as the chunks where they happen.

A prompt can change where a chunk begins, so a switch goes to the nearest of these moments: at 16 frames/s, chunk c
begins at frame 12c - 3. In a prompts file a line `@5.25s another prompt` continues the video of the line above.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamt1_jax.config import StreamConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.text import check_prompt

FORM = '--switch 5.25s="a new prompt"'
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(s|f)")
_CONTINUES = re.compile(rf"@{_TIME.pattern}\s+(?P<prompt>\S.*)")


@dataclass(frozen=True)
class Segment:
    """A prompt and the chunk from which on it is shown."""

    chunk: int
    prompt: str


@dataclass(frozen=True)
class Script:
    """The prompt of one video, and the prompts it switches to, by seconds."""

    prompt: str
    switches: tuple[tuple[float, str], ...] = ()

    @property
    def prompts(self) -> list[str]:
        return [self.prompt, *(prompt for _, prompt in self.switches)]


def parse_switch(text: str, fps: int = 16) -> tuple[float, str]:
    """(seconds, prompt) of `5.25s=a new prompt` or `84f=a new prompt`.

    Raises:
        BadInputError: another form, or a prompt that cannot be used.
    """
    when, equals, prompt = text.partition("=")
    time = _TIME.fullmatch(when.strip())
    if not equals or time is None:
        raise BadInputError(f"the switch {text!r} is not TIME=PROMPT, expected seconds or frames: try {FORM}")
    return _seconds(time, fps), check_prompt(prompt.strip())


def _seconds(time: re.Match, fps: int) -> float:
    number = float(time[1])
    return number if time[2] == "s" else number / fps


def scripts_of_lines(lines: Sequence[str], fps: int = 16) -> list[Script]:
    """Groups the lines of a prompts file: a line that begins with `@TIME ` belongs to the video above it.

    Raises:
        BadInputError: the first line is such a one.
    """
    scripts: list[Script] = []
    for line in lines:
        continues = _CONTINUES.fullmatch(line)
        if continues is None:
            scripts.append(Script(line))
        elif not scripts:
            raise BadInputError(f"the prompts file begins with {line!r}, expected a prompt above it to switch from")
        else:
            switch = (_seconds(continues, fps), check_prompt(continues["prompt"]))
            scripts[-1] = Script(scripts[-1].prompt, (*scripts[-1].switches, switch))
    return scripts


def plan_switches(
    switches: Mapping[float, str] | Iterable[tuple[float, str]],
    stream: StreamConfig,
    chunks: int | None,
    *,
    fps: int = 16,
    time_factor: int = 4,
) -> tuple[Segment, ...]:
    """The chunks where the prompt changes, in order.

    Args:
        switches: seconds and the prompt from then on.
        chunks: of the whole video; None: endless.

    Raises:
        BadInputError: a time that is no number, or before chunk 1, or past the video; two at one chunk.
    """
    per_chunk, missing = time_factor * stream.latent_frames_per_chunk, time_factor - 1
    planned: dict[int, Segment] = {}
    for seconds, prompt in switches.items() if isinstance(switches, Mapping) else switches:
        chunk = _nearest_chunk(seconds, per_chunk, missing, fps)
        if chunk < 1 or (chunks is not None and chunk >= chunks):
            first, last = ((per_chunk * number - missing) / fps for number in (1, (chunks or 2) - 1))
            raise BadInputError(
                f"a switch at {seconds:g} s is outside the video, expected {first:g} s "
                + ("or later" if chunks is None else f"to {max(first, last):g} s")
                + ", where its chunks begin: choose another time or a longer video"
            )
        if chunk in planned:
            raise BadInputError(
                f"the switches to {planned[chunk].prompt!r} and {prompt!r} both fall on chunk {chunk}, expected one "
                f"a chunk of {per_chunk / fps:g} s: drop one or move it"
            )
        planned[chunk] = Segment(chunk, check_prompt(prompt))
    return tuple(planned[chunk] for chunk in sorted(planned))


def _nearest_chunk(seconds: Any, per_chunk: int, missing: int, fps: int) -> int:
    real = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not real or not math.isfinite(seconds) or abs(seconds) > 1e9:
        raise BadInputError(f"a switch comes at {seconds!r}, expected seconds since the start: try 5.25")
    return math.floor((seconds * fps + missing) / per_chunk + 0.5)


def first_frame(chunk: int, stream: StreamConfig, time_factor: int = 4) -> int:
    """The first pixel frame of a chunk."""
    return max(time_factor * (stream.latent_frames_per_chunk * chunk - 1) + 1, 0)
