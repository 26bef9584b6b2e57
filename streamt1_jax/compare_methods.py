"""The ways of spending candidates that `streamt1 compare` compares, at an equal number of candidates a chunk.

- A method that prunes tries all its candidates for every chunk of one video: a budget of 4 is 2 beams of 2 candidates,
  8 is 2x4, 2 is 1x2 (`config.grid_of`).
- One that does not prune makes as many independent videos of one candidate, and the best of them is its result.
- Both choose at the end by one rule, the search's own: the best long reward of the whole video (METHOD section 5).
- `stream_t1-UNIT` is Stream-T1 with that unit switched off alone, at the same budget.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from streamt1_jax.config import SearchConfig, grid_of
from streamt1_jax.errors import BadInputError

MAX_BUDGET = 100  # seeds of a chunk are seed + 100 * beam + candidate: more would meet the next beam's
DECIDED = ("beams", "candidates_per_beam", "noise_propagation", "pruning", "sinking")  # keys that methods set


@dataclass(frozen=True)
class Method:
    """One way of spending a budget of candidates a chunk."""

    name: str
    about: str  # for people
    noise_propagation: bool = False
    pruning: bool = False
    sinking: bool = False
    one_candidate: bool = False  # whatever the budget

    def search(self, base: SearchConfig, budget: int) -> SearchConfig:
        """`base` with the units and the grid of this method."""
        # One candidate leaves nothing to prune, so the key stays on, as in `SearchConfig.longlive()`.
        beams, each = grid_of(budget) if self.pruning else (1, 1)
        return dataclasses.replace(
            base,
            beams=beams,
            candidates_per_beam=each,
            noise_propagation=self.noise_propagation,
            pruning=True,
            sinking=self.sinking,
        )


METHODS = {
    method.name: method
    for method in (
        Method("longlive", "one candidate, streamed", one_candidate=True),
        Method("best_of_n", "independent videos of one candidate, the best one"),
        Method("beam", "reward pruning alone", pruning=True),
        Method("stream_t1", "all three units", noise_propagation=True, pruning=True, sinking=True),
        Method("stream_t1-noise", "without noise propagation", pruning=True, sinking=True),
        Method(
            "stream_t1-pruning",
            "without pruning: independent videos of one candidate, the best one",
            noise_propagation=True,
            sinking=True,
        ),
        Method("stream_t1-sinking", "without memory sinking", noise_propagation=True, pruning=True),
    )
}
DEFAULT_METHODS = ("longlive", "best_of_n", "beam", "stream_t1")
REFERENCE = "stream_t1"  # what the others are subtracted from


@dataclass(frozen=True)
class Entry:
    """One method at one budget: a column of the table."""

    method: Method
    budget: int  # candidates a chunk

    @property
    def videos(self) -> int:
        """How many videos are made for one result."""
        return 1 if self.method.pruning else self.budget

    def search(self, base: SearchConfig) -> SearchConfig:
        return self.method.search(base, self.budget)


def entries_of(names: Sequence[str], budgets: Sequence[int]) -> tuple[Entry, ...]:
    """Every method at every budget, by rising budget; one that takes a single candidate comes once.

    Raises:
        BadInputError: a method or a budget that there is not.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        near = difflib.get_close_matches(unknown[0], METHODS, n=1) if unknown else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise BadInputError(f"method {', '.join(unknown)!r} is unknown{hint}, expected some of {', '.join(METHODS)}")
    wrong = [budget for budget in budgets if not 1 <= budget <= MAX_BUDGET]
    if wrong or not budgets:
        raise BadInputError(
            f"budget is {wrong or 'missing'}, expected numbers of candidates a chunk, 1 to {MAX_BUDGET}: try 4"
        )
    methods = [METHODS[name] for name in dict.fromkeys(names)]
    pairs = [
        Entry(method, 1 if method.one_candidate else budget) for budget in sorted(set(budgets)) for method in methods
    ]
    return tuple(dict.fromkeys(pairs))
