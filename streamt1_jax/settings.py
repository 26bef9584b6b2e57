"""What a run is asked to do: config files, `--set`, and the numbers a user types.

- A config file is Python with `get_config() -> ml_collections.ConfigDict`; it is run, so read it before you use it.
- Sections and keys are the fields of the frozen configs, nothing else; what is not mentioned keeps its default.
- Every problem of a file and its overrides is listed in one error.
"""

import dataclasses
import difflib
import math
import runpy
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from streamt1_jax.config import MAX_SEED, RunConfig, SearchConfig, StreamConfig, check_sinks
from streamt1_jax.errors import BadInputError

T = TypeVar("T")

DEFAULT_SECONDS = 5.0
REWARD_PRECISIONS = ("stored", "bfloat16", "float32", "int8")


@dataclass(frozen=True)
class GenerateConfig:
    """What one call is asked for. Give `seconds` or `frames`; neither means 5 seconds."""

    seconds: float | None = None
    frames: int | None = None  # pixel frames, a legal count
    seed: int = 42
    height: int | None = None  # pixels; None: the size the weights were made for
    width: int | None = None
    strict: bool = False  # a prompt that is too long is an error, not a warning

    def __post_init__(self):
        check_seed(self.seed)
        check_size(self.height, self.width)

    def num_frames(self, stream: StreamConfig) -> int:
        """Pixel frames to make: `legal_frames` of what was asked for."""
        seconds = DEFAULT_SECONDS if self.seconds is None and self.frames is None else self.seconds
        return legal_frames(frames=self.frames, seconds=seconds, latent_frames_per_chunk=stream.latent_frames_per_chunk)


@dataclass(frozen=True)
class RewardsConfig:
    """Who judges: names that `streamt1_jax.rewards.resolve` knows."""

    short: str = "default"  # of a chunk's frames: "mini" for the embedded model, "native" for others
    long: str = "default"  # of the window's
    dir: str | None = None  # converted weights of hpsv3 and videoreward, or a folder of train-mini
    device: str | None = None  # of torch rewards: cpu, cuda:1; None: the first GPU that torch sees, or the CPU
    precision: str = "stored"  # of hpsv3 and videoreward in memory: stored, bfloat16, float32, int8
    batch_gb: float = 4.0  # bound on the memory of one batch of clips, in gigabytes

    def __post_init__(self):
        problems = []
        if self.precision not in REWARD_PRECISIONS:
            problems.append(f"precision is {self.precision!r}, expected one of {', '.join(REWARD_PRECISIONS)}")
        if not 0 < self.batch_gb < math.inf:
            problems.append(f"batch_gb is {self.batch_gb!r}, expected a number above 0: try 4")
        if problems:
            raise BadInputError("rewards: " + "; ".join(problems))


@dataclass(frozen=True)
class Settings:
    """Every section of a config file."""

    run: RunConfig = field(default_factory=RunConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)


MAX_FRAMES = 2**31 - 1  # of one video: positions are 32-bit integers on the device

SECTIONS: dict[str, type] = {
    "stream": StreamConfig,
    "search": SearchConfig,
    "generate": GenerateConfig,
    "rewards": RewardsConfig,
}
KEYS: dict[str, Any] = {  # "section.key": the type of its value
    f"{section}.{key}": hint for section, cls in SECTIONS.items() for key, hint in typing.get_type_hints(cls).items()
}


def load_settings(config_file: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a run: defaults, then the config file, then `overrides`, the last of a key winning.

    Args:
        config_file: a Python file with `get_config()`.
        overrides: texts such as "search.beams=4", read by the type of their key.

    Raises:
        BadInputError: all that is wrong, in one message.
    """
    problems: list[str] = []

    def collect(make: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        try:
            return make(*args, **kwargs)
        except BadInputError as error:
            problems.append(str(error))
            return None

    given = dict(_read_config_file(Path(config_file))) if config_file is not None else {}
    given |= dict(filter(None, (collect(_parse_override, text) for text in overrides)))
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in given.items():
        if entry := collect(_checked, key, value):
            section, name, value = entry
            sections[section][name] = value
    stream, search, generate, rewards = (collect(cls, **sections[name]) for name, cls in SECTIONS.items())
    if stream and search:
        run = collect(RunConfig, stream, search)
    else:  # what is wrong between the sections is told too, as far as its numbers are numbers
        run, numbers = None, _sink_numbers(sections)
        if all(_is_integer(number) and number > 0 for number in numbers):
            collect(check_sinks, *numbers)
    if stream and generate:
        collect(generate.num_frames, stream)
    if run is None or generate is None or rewards is None or problems:
        raise BadInputError("; ".join(problems))
    return Settings(run, generate, rewards)


def _sink_numbers(sections: dict[str, dict[str, Any]]) -> list[Any]:
    """The arguments of `check_sinks`, as given or by default."""
    stream, search = StreamConfig(), SearchConfig()
    return [
        sections["stream"].get("latent_frames_per_chunk", stream.latent_frames_per_chunk),
        sections["stream"].get("sink_size", stream.sink_size),
        sections["search"].get("max_sink_size", search.max_sink_size),
    ]


def _read_config_file(path: Path) -> dict[str, Any]:
    """The file's values by full key."""
    from ml_collections import ConfigDict

    name, form = f"config {str(path)!r}", "see configs/stream_t1.py for the form expected"
    if not path.is_file():
        raise BadInputError(
            f"{name} is not a file, expected Python with get_config(), such as configs/longlive.py of the repository"
        )
    try:
        scope = runpy.run_path(str(path))
        config = scope["get_config"]() if "get_config" in scope else None
    except Exception as error:
        raise BadInputError(f"{name} fails with {type(error).__name__} ({error}); {form}") from error
    if not isinstance(config, ConfigDict):
        what = f"get_config() gives {type(config).__name__}" if "get_config" in scope else "has no get_config()"
        raise BadInputError(f"{name} {what}, expected get_config() -> ml_collections.ConfigDict; {form}")
    values: dict[str, Any] = {}
    for section, entries in config.to_dict().items():
        if isinstance(entries, dict):
            values |= {f"{section}.{key}": value for key, value in entries.items()}
        else:
            values[section] = entries  # a key outside every section: unknown, and refused as such
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator:
        raise BadInputError(f"--set {text!r} has no '=', expected KEY=VALUE: try --set search.beams=4")
    hint = _hint_of(key)
    try:
        return key, _parse(value, hint)
    except ValueError:
        raise _wrong_type(key, value) from None


def _hint_of(key: str) -> Any:
    if key in KEYS:
        return KEYS[key]
    # A right key in the wrong section, or in none, is closest; spelling comes after.
    same_name = [known for known in KEYS if known.split(".")[1] == key.split(".")[-1]]
    names = same_name or difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)
    raise BadInputError(f"unknown setting {key!r}: the closest is {names[0]!r}")


def _checked(key: str, value: Any) -> tuple[str, str, Any]:
    """Section, name in it, and the value, if it has the type."""
    hint = _hint_of(key)
    if isinstance(value, list):
        value = tuple(value)
    if not _fits(value, hint):
        _refuse(key, value)
    section, _, name = key.partition(".")
    return section, name, value


def _refuse(key: str, value: Any) -> typing.NoReturn:
    """Raises the error that says most about a value of the wrong type: where there is one, the nearest legal value."""
    match key:
        case "generate.seed":
            check_seed(value)
        case "generate.frames":
            legal_frames(frames=value)
        case "generate.seconds":
            legal_frames(seconds=value)
        case "generate.height":
            check_size(value, None)
        case "generate.width":
            check_size(None, value)
    raise _wrong_type(key, value)


def _wrong_type(key: str, value: Any) -> BadInputError:
    section, _, name = key.partition(".")
    example = next(f.default for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
    text = ",".join(map(str, example)) if isinstance(example, tuple) else str(example).lower()
    return BadInputError(f"{key} is {value!r}, expected {_describe(KEYS[key])}: try {key}={text}")


def _options(hint: Any) -> tuple[Any, ...]:
    """(int, NoneType) for `int | None`, (int,) for `int`."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type; an int is a fine float, a bool is no number."""
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            if isinstance(value, tuple) and all(_fits(entry, typing.get_args(option)[0]) for entry in value):
                return True
        elif isinstance(value, bool):
            if option is bool:
                return True
        elif isinstance(value, (int, float) if option is float else option):
            return True
    return False


def _parse(text: str, hint: Any) -> Any:
    """The value that a text spells. Raises ValueError where it spells none of that type."""
    options = _options(hint)
    if types.NoneType in options and text.lower() == "none":
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        entries = text.strip("()[]").split(",")
        return tuple(_parse(entry.strip(), typing.get_args(kind)[0]) for entry in entries if entry.strip())
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    if kind is str:
        return text.strip("'\"")
    try:
        return int(text)
    except ValueError:
        return float(text)  # whether a float will do is checked with the value


def _describe(hint: Any) -> str:
    def name(option: Any) -> str:
        if typing.get_origin(option) is tuple:
            return f"a tuple of {typing.get_args(option)[0].__name__}"
        words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "none"}
        return words[option]

    return " or ".join(name(option) for option in _options(hint))


def legal_frames(
    *,
    frames: Any = None,
    seconds: Any = None,
    latent_frames_per_chunk: int = 3,
    fps: int = 16,
    time_factor: int = 4,
) -> int:
    """The number of pixel frames of a video that is asked for in frames or in seconds.

    Whole chunks of latent frames are made, and the first latent frame is one pixel frame where every other is
    `time_factor`. So 12k - 3 frames are legal, k = 1, 2, ... chunks: 9, 21, ..., 81 (5 s), ..., 477 (30 s).

    Args:
        frames: must be legal.
        seconds: the nearest legal count is taken, the longer at a tie; at least one chunk.

    Raises:
        BadInputError: an illegal number of frames, named with its two legal neighbours; seconds that are not
            a positive number; both or neither given.
    """
    per_chunk, missing = time_factor * latent_frames_per_chunk, time_factor - 1
    longest = MAX_FRAMES // per_chunk * per_chunk - missing
    if (frames is None) == (seconds is None):
        raise BadInputError(
            f"frames is {frames!r} and seconds is {seconds!r}, expected exactly one of the two: set the other to none"
        )
    if frames is None:
        if not _is_real(seconds) or not 0 < seconds * fps <= longest:
            raise BadInputError(
                f"seconds is {seconds!r}, expected a number above 0, up to {longest // fps}: try 5, which is 81"
            )
        chunks = math.floor((seconds * fps + missing) / per_chunk + 0.5)
        return max(chunks, 1) * per_chunk - missing
    if not _is_real(frames) or not abs(frames) <= longest:
        raise BadInputError(
            f"frames is {frames!r}, expected a whole number {per_chunk}k - {missing} up to {longest}: try 81"
        )
    lower = max((math.floor(frames) + missing) // per_chunk, 1) * per_chunk - missing
    if not _is_integer(frames) or frames != lower:
        raise BadInputError(
            f"frames is {frames!r}, expected a whole number {per_chunk}k - {missing}: "
            f"the nearest are {lower} and {lower + per_chunk}"
        )
    return int(frames)


def chunks_of(frames: int, stream: StreamConfig, *, time_factor: int = 4) -> int:
    """Chunks of a legal number of pixel frames."""
    return (frames + time_factor - 1) // (time_factor * stream.latent_frames_per_chunk)


def _is_real(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real)


def _is_integer(value: Any) -> TypeGuard[int]:
    """NumPy's integers too, but no bools."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_size(height: Any, width: Any, *, multiple: int = 16, trained: tuple[int, int] | None = None) -> None:
    """Whether a video of this size can be made; None leaves a side to the model.

    Args:
        multiple: pixels of one DiT patch: 8 to a latent pixel, times 2.
        trained: (height, width) that the weights were made for; another size warns.

    Raises:
        BadInputError: names the nearest legal size.
    """
    sides = {"height": height, "width": width}
    bad = {k: v for k, v in sides.items() if v is not None and not _is_size(v, multiple)}
    if bad:
        legal = {k: "default" if v is None else _nearest_size(v, multiple) for k, v in sides.items()}
        raise BadInputError(
            f"{' and '.join(f'{k} is {v!r}' for k, v in bad.items())}, expected a positive multiple of {multiple}: "
            f"the nearest legal size is height {legal['height']}, width {legal['width']}"
        )
    if trained and (asked := (height or trained[0], width or trained[1])) != trained:
        warnings.warn(
            f"the size {asked[1]}x{asked[0]} is not the {trained[1]}x{trained[0]} that the weights were made for: "
            "expect a worse picture",
            stacklevel=2,
        )


def _is_size(value: Any, multiple: int) -> bool:
    return _is_integer(value) and value > 0 and value % multiple == 0


def _nearest_size(value: Any, multiple: int) -> int:
    number = value if _is_real(value) and math.isfinite(value) else 0
    return max(math.floor(number / multiple + 0.5), 1) * multiple


def check_seed(seed: Any) -> int:
    """The seed itself, if it is an integer from 0 to 2^32 - 1.

    Raises:
        BadInputError: otherwise; floats and bools too, since both would pass as another seed unnoticed.
    """
    if not _is_integer(seed) or not 0 <= seed < MAX_SEED:
        raise BadInputError(f"seed is {seed!r}, expected an integer from 0 to {MAX_SEED - 1}: try 42")
    return int(seed)
