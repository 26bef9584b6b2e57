"""Results of a comparison on disk, as they come: one line of JSON each, so that a long one can be stopped and resumed.

A folder holds `settings.json`, all that its results depend on beside method, budget and prompt; and `results.jsonl`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import SOFTWARE, make_folder, short_hash, write_json

SETTINGS, RESULTS = "settings.json", "results.jsonl"


@dataclass(frozen=True)
class Part:
    """What was measured of one stretch of a video alone."""

    start: float  # seconds
    end: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """One video by one method, measured.

    Scores are named "reward.short", "reward.long", "check.colour" and so on; a prompt that cannot be checked has no
    checks.
    """

    method: str
    budget: int  # candidates a chunk
    prompt_index: int
    prompt: str
    seed: int
    scores: dict[str, float]  # of the whole video
    parts: list[Part]
    final_scores: list[float]  # by which the best of several videos was chosen, in the order made
    chunks: int  # of one video
    candidates: int  # tried in all
    seconds: float  # to make it: all videos, all final scores; no measuring
    compiled: int  # programs compiled (or loaded from the cache) meanwhile, which `seconds` then holds

    @property
    def key(self) -> tuple[str, int, int, str]:
        return self.method, self.budget, self.prompt_index, self.prompt

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null."""
        return _without_nan(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Result":
        """What `to_json` wrote; null becomes NaN."""
        parts = [Part(part["start"], part["end"], _with_nan(part["scores"])) for part in data["parts"]]
        finals = [math.nan if score is None else score for score in data["final_scores"]]
        return cls(**{**data, "scores": _with_nan(data["scores"]), "parts": parts, "final_scores": finals})


def file_name(method: str, budget: int, prompt_index: int, prompt: str) -> str:
    """Of a result's sheet and video. Another prompt may have had this number before, so its hash is in the name."""
    return f"{prompt_index:03d}-{method}-{budget}-{short_hash(prompt)}"


def _without_nan(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _with_nan(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in scores.items()}


def refuse_results(folder: Path, *, resume: bool) -> None:
    """Refuses a folder that holds another comparison, unless that is to go on."""
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"the output {str(folder)!r} is no folder, expected one: name another with --out")
    if not resume and (folder / RESULTS).exists():
        raise BadInputError(
            f"the folder {str(folder)!r} holds results already: go on with --resume, or name another with --out"
        )


class ResultStore:
    """The results in one folder, by key; the last line of a key counts."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool):
        """Opens the folder, made if need be.

        Args:
            settings: plain data; results under other settings cannot be mixed with these.
            resume: keep what is there.

        Raises:
            BadInputError: results are there and may not be, or are of other settings, or cannot be read.
        """
        refuse_results(folder, resume=resume)
        make_folder(folder)
        self.path = folder / RESULTS
        self.results: dict[tuple[str, int, int, str], Result] = {}
        # As they will be read again: tuples become lists, an infinite threshold a word.
        settings = json.loads(json.dumps({"software": SOFTWARE, **settings}), parse_constant=str)
        if self.path.exists():
            _refuse_other_settings(folder / SETTINGS, settings)
            _end_with_a_whole_line(self.path)
            self.results = {result.key: result for result in read_results(self.path)}
        else:
            write_json(folder / SETTINGS, settings)

    def add(self, result: Result) -> None:
        """Remembers a result and writes its line.

        Raises:
            BadInputError: the disk refuses.
        """
        self.results[result.key] = result
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result.to_json(), allow_nan=False) + "\n")
        except OSError as error:
            raise BadInputError(
                f"{str(self.path)!r} cannot be written ({error.strerror}): make room, then go on with --resume"
            ) from error


def read_results(path: Path) -> list[Result]:
    """The results of a file, line by line.

    Raises:
        BadInputError: a line that is no result.
    """
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            results.append(Result.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{str(path)!r}, line {number} is no result ({error!r}): remove that line and resume"
            ) from error
    return results


def _end_with_a_whole_line(path: Path) -> None:
    """Drops a line that was being written when a run stopped."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("rb+") as file:
            file.truncate(whole)


def _refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{str(path)!r} cannot be read ({error}), expected the settings of its results: name another --out"
        ) from error
    other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if other:
        raise BadInputError(
            f"the results in {str(path.parent)!r} were made with another {', '.join(other)} "
            f"({', '.join(f'{before.get(key)!r:.80}' for key in other)}), expected the same: repeat the earlier "
            "options, or name another folder with --out"
        )
