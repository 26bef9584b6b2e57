"""What a reward is: the protocol between the search and everything that scores videos.

The search knows no reward by name. It hands over a padded batch and gets a `Verdict`: scores and statuses, arrays
both, because a reward runs inside a traced loop where nothing can be raised. What went wrong on the host side waits
in `Reward.failures` until the driver, outside the loop, calls `raise_if_failed`.

- Videos are padded in time to a length that never changes; row i holds `num_frames[i]` frames, the rest is garbage.
- Prompts travel as an index into a `PromptTable`, or as token ids for a reward that reads those; text has no place in
  a compiled program.
- A score that is NaN or infinite with status `OK` is the reward's own word: the search never keeps such a
  candidate while a finite one exists (METHOD section 5). Status `FAILED` means that there is no score at all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.types import HostOrDevice

OK = 0
FAILED = 1

Pixels: TypeAlias = Literal["uint8", "float32"]  # 0 to 255, or float32 in [0, 1]
RunsOn: TypeAlias = Literal["jax", "host"]


class Verdict(NamedTuple):
    """The result of one reward call on n videos."""

    scores: Float[Array, "n"]  # float32; NaN where the reward failed
    status: Int[Array, "n"]  # int32; OK or FAILED


class PromptTokens(NamedTuple):
    """A prompt as the text encoder takes it."""

    ids: Int[HostOrDevice, "P"]
    mask: Int[HostOrDevice, "P"]  # 1 for the prompt's tokens and the EOS, 0 for padding


@dataclass(frozen=True, eq=False)
class Failure:
    """What a reward did wrong on the host side."""

    error: BaseException  # without its traceback, which would keep the videos alive
    text: str  # the traceback as text


@dataclass(frozen=True, eq=False)
class Reward:
    """A named way of scoring videos. Hashable by identity: it is a static argument of the jitted step.

    `call(videos, num_frames, prompt) -> Verdict` must be traceable by JAX; calling the reward itself does the same
    after checking its arguments. `prompt` is an index, or `PromptTokens` where `tokenizer` is set.
    """

    name: str
    call: Callable
    pixels: Pixels
    runs_on: RunsOn
    failures: list[Failure] = field(default_factory=list, repr=False)
    # For the record: `explain(video uint8 [T, H, W, 3], prompt, fps)` gives all a model says of a whole video as plain
    # data, its "score" included; `about` is which model this is.
    explain: Callable[[np.ndarray, str, float], dict[str, Any]] | None = field(default=None, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tokenizer: str | None = None  # sha256 of the tokenizer.json whose ids it reads; None: it takes the prompt's index

    def __call__(
        self, videos: Shaped[Array, "n T H W 3"], num_frames: Int[Array, "n"], prompt: Int[Array, ""] | PromptTokens
    ) -> Verdict:
        """Scores n videos.

        Args:
            videos: padded on the time axis; uint8, or float32 in [0, 1], as `pixels` says.
            num_frames: how many leading frames of each video are valid, 1 to T.
            prompt: the prompt's place in the reward's `PromptTable`, or its tokens, as `tokenizer` says.

        Raises:
            BadInputError: pixels of another type than the reward wants.
        """
        if videos.dtype != jnp.dtype(self.pixels):
            raise BadInputError(
                f"reward {self.name!r} got {videos.dtype} pixels, expected {self.pixels}; convert the frames first"
            )
        return self.call(videos, num_frames.astype(jnp.int32), jax.tree.map(lambda x: x.astype(jnp.int32), prompt))

    def prompt_of(self, index: Int[Array, ""], tokens: PromptTokens | None) -> Int[Array, ""] | PromptTokens:
        """The form of a prompt that `call` takes.

        Raises:
            BadInputError: it reads tokens, and none came.
        """
        if self.tokenizer is None:
            return index
        if tokens is None:
            raise BadInputError(
                f"reward {self.name!r} reads the prompt's tokens and got none, expected them in the conditioning; "
                "let the pipeline make it, or set its `tokens`"
            )
        return tokens

    def raise_if_failed(self) -> None:
        """Raises what failed on the host side since the last call, and forgets it; call it outside the traced loop.

        Raises:
            RewardError: with the text of the first failure; its traceback is attached as a note.
            KeyboardInterrupt: where that is what stopped the reward.
        """
        failures = tuple(self.failures)
        self.failures.clear()
        for failure in failures:
            if isinstance(failure.error, KeyboardInterrupt):
                raise KeyboardInterrupt
        if failures:
            error, more = failures[0].error, len(failures) - 1
            raised = RewardError(
                f"reward {self.name!r} failed with {type(error).__name__}: {error}"
                + (f" (and {more} more {'call' if more == 1 else 'calls'})" if more else "")
                + "; expected one number for every video; mend the reward or choose another one"
            )
            raised.add_note(failures[0].text)
            raise raised


class PromptTable:
    """The prompts that rewards on the host read, by index. Mutable: a run may add prompts between chunks."""

    def __init__(self, prompts: Iterable[str] = ()):
        self._texts: list[str] = []
        self._places: dict[str, int] = {}
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: str) -> int:
        """The index of `prompt`, which is added if it is not in the table yet."""
        if prompt not in self._places:
            self._places[prompt] = len(self._texts)
            self._texts.append(prompt)
        return self._places[prompt]

    def __getitem__(self, index: int) -> str:
        """The prompt at `index`; unlike a list's, a negative index is refused."""
        if not 0 <= index < len(self._texts):
            raise BadInputError(
                f"prompt index {index} is not in the table of {len(self._texts)} prompts; add the prompt first"
            )
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)
