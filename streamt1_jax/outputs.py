"""Where results go: checked before any work, written under a temporary name and then renamed.

Nothing that was not made here is replaced or deleted (FAULTS rows 24 and 25).
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt1_jax.errors import BadInputError
from streamt1_jax.interrupts import uninterrupted

SOFTWARE = "streamt1-jax"  # stands near the start of every record and picture written here
PROBE_BYTES = 1 << 20  # space that must be free before a run starts


@dataclass(frozen=True)
class RunPaths:
    """The files of one result, side by side, and what a run keeps beside them until it is finished."""

    video: Path

    @property
    def results(self) -> tuple[Path, ...]:
        """What a finished run leaves."""
        return self.video, self.record, self.tree, self.report

    @property
    def record(self) -> Path:
        return self.video.with_suffix(".json")

    @property
    def tree(self) -> Path:
        return self.video.with_suffix(".png")

    @property
    def report(self) -> Path:
        return self.video.with_suffix(".html")

    @property
    def live(self) -> Path:
        """The video while it grows."""
        return self.video.with_suffix(".live.mp4")

    @property
    def resume(self) -> Path:
        """The folder of saved states."""
        return self.video.with_suffix(".resume")


def _never(paths: RunPaths, path: Path) -> bool:
    return False


def single_output(
    out: str | Path, *, overwrite: bool = False, replaceable: Callable[[RunPaths, Path], bool] = _never
) -> RunPaths:
    """The files of one video, after every check that can be made before it exists.

    Args:
        overwrite: results that stand there may be replaced.
        replaceable: whether one of them that stands there may be, without `overwrite`.

    Raises:
        BadInputError: a name that does not end in .mp4; a folder that is missing, read-only or full; a file in the way.
    """
    video = Path(out)
    is_folder = os.path.isdir(video)  # unlike Path.is_dir, no error for a name that is too long
    if video.suffix.lower() != ".mp4" or is_folder:
        what = "is a folder" if is_folder else "does not end in .mp4"
        raise BadInputError(f"the output {str(video)!r} {what}, expected a video's name: --out NAME.mp4")
    _check_folder(video.parent)
    paths = RunPaths(video)
    _check_files(paths, overwrite, replaceable)
    return paths


def folder_outputs(
    out: str | Path,
    prompts: Sequence[str],
    *,
    overwrite: bool = False,
    replaceable: Callable[[RunPaths, Path], bool] = _never,
) -> list[RunPaths]:
    """The files of one video per prompt in folder `out`, after the same checks. The folder need not exist yet.

    Names are an index and a hash, never text of a prompt: `0003-1a2b3c4d.mp4` belongs to the fourth prompt.
    """
    folder = Path(out)
    exists = os.path.lexists(folder)
    if exists and not os.path.isdir(folder):
        raise BadInputError(f"the output {str(folder)!r} is no folder, expected one for many prompts: name another")
    _check_folder(folder if exists else folder.parent)
    outputs = [RunPaths(folder / f"{index:04d}-{short_hash(prompt)}.mp4") for index, prompt in enumerate(prompts)]
    for paths in outputs:
        _check_files(paths, overwrite, replaceable)
    return outputs


def short_hash(prompt: str) -> str:
    """Of a prompt, for the name of a file."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def json_output(out: str | Path, *, overwrite: bool = False) -> Path:
    """The path of a single JSON file, after every check that can be made before it exists.

    Raises:
        BadInputError: a folder that is missing, read-only or full; a file in the way.
    """
    path = Path(out)
    _check_folder(path.parent)
    _check_file(path, overwrite, named=True)
    return path


def check_beside(path: Path, *, overwrite: bool) -> None:
    """Raises `BadInputError` unless nothing stands at `path` or, with `overwrite`, a file that this program wrote."""
    with write_errors(path):
        _check_file(path, overwrite, named=False)


def make_folder(folder: Path, *, parents: bool = False) -> None:
    """Makes the last part of a path, if it is not there; or all of them."""
    try:
        folder.mkdir(exist_ok=True, parents=parents)
    except OSError as error:
        raise _write_error(folder, error) from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise BadInputError(f"the output's folder {str(folder)!r} {what}, expected a folder: make it or name another")
    # The mode is read too, because the system lets root write where nobody should.
    if not folder.stat().st_mode & 0o222 or not os.access(folder, os.W_OK):
        raise BadInputError(f"the output's folder {str(folder)!r} is read-only: name another with --out")
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=f".{SOFTWARE}-") as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise _write_error(folder, error) from error


def _check_files(paths: RunPaths, overwrite: bool, replaceable: Callable[[RunPaths, Path], bool]) -> None:
    for path in paths.results:
        try:
            _check_file(path, overwrite or replaceable(paths, path), named=path == paths.video)
        except OSError as error:  # a name too long, a folder that cannot be searched
            raise _write_error(path, error) from error


def _check_file(path: Path, overwrite: bool, *, named: bool) -> None:
    """Whether `path` may be written. `named`: the user typed this very name, it is not one derived from it."""
    if path.is_symlink():
        raise BadInputError(
            f"the output {str(path)!r} is a link to {os.readlink(path)!r}: name the file itself or another"
        )
    if not path.exists():
        return
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadInputError(f"the output {str(path)!r} exists and is no file: name another with --out")
    if not overwrite:
        raise BadInputError(f"the output {str(path)!r} exists: name another with --out, or replace it with --overwrite")
    if not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK):
        raise BadInputError(f"the output {str(path)!r} is read-only: make it writable or name another with --out")
    # The user named the video, so --overwrite means it. Its neighbours only share the name.
    if not named and not made_here(path):
        raise BadInputError(
            f"the output {str(path)!r} exists and was not made by {SOFTWARE}: move it or name another with --out"
        )


def made_here(path: Path) -> bool:
    """Whether a file says near its start that this program wrote it."""
    with path.open("rb") as file:
        return SOFTWARE.encode() in file.read(4096)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What the disk says as one line for the user."""
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> BadInputError:
    reason = error.strerror or str(error)
    return BadInputError(
        f"{str(path)!r} cannot be written ({reason}): check its space and rights, or name another place"
    )


@contextlib.contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary name beside `path`; at a clean exit the file written there takes the name `path`.

    Whatever happens inside, `path` holds what it held before or the whole new file, and the temporary file is gone.

    Raises:
        BadInputError: the disk is full or refuses, or `path` exists and `overwrite` is False.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:32]}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with write_errors(path):
            yield temporary
            bring_to_disk(temporary)
            if not overwrite:
                refuse_existing(path)
            temporary.replace(path)
    finally:
        with uninterrupted():
            temporary.unlink(missing_ok=True)


def bring_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # a full or failing disk may say so only here


def refuse_existing(path: Path) -> None:
    """Raises `BadInputError` where something stands at `path` that was not there when the run began."""
    if path.exists() or path.is_symlink():
        raise BadInputError(f"the output {str(path)!r} appeared meanwhile: name another with --out, or use --overwrite")


def write_json(path: str | Path, data: Any, *, overwrite: bool = True) -> None:
    """Writes `data` as JSON; NaN and infinities become null, since JSON has neither."""
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_text(
            json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def plain(data: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if hasattr(data, "item") and getattr(data, "ndim", 0) == 0:  # a NumPy or JAX number
        data = data.item()
    if isinstance(data, float) and math.isinf(data):
        return str(data)  # a threshold may be infinite, and JSON has no number for it
    return None if isinstance(data, float) and math.isnan(data) else data
