"""A folder that appears whole or not at all.

- It is written beside its final place under a hidden name, brought to disk, and renamed.
- A marker file, locked while its writer lives, tells our leftovers from everything else: leftovers of killed runs
  are swept when the next one starts, and nothing without the marker is ever touched.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from streamt1_jax.errors import BadInputError

MARKER = ".streamt1-writing"
_PARTIAL, _REPLACED = "streamt1-partial", "streamt1-replaced"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_folder(
    out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], needed_bytes: int = 0
) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` when the block ends, and disappears if it raises.

    Args:
        out: the final place; missing parents are made.
        overwrite: whether a folder that `is_ours` may stand there and be replaced.
        is_ours: whether a folder was made by this program and may be replaced.
        needed_bytes: room that the disk must have before anything is written.

    Raises:
        BadInputError: something stands at `out` that may not be replaced, or the disk is full or read-only.
    """
    out = Path(os.path.abspath(out))
    check_place(out, overwrite=overwrite, is_ours=is_ours)
    with _disk_errors(out, (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)):
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent)
        _check_room(out, needed_bytes)
        partial = out.parent / f".{out.name}.{_PARTIAL}-{secrets.token_hex(4)}"
        partial.mkdir()
    with _disk_errors(out, _FULL), marked(partial):
        try:
            yield partial
            _sync(partial)
            check_place(out, overwrite=overwrite, is_ours=is_ours)
            _move_in(partial, out)
        except BaseException:
            if partial.exists():
                remove(partial)
            raise


def sweep(parent: Path) -> list[Path]:
    """Takes away what killed runs left in a folder, and puts back an earlier result they had moved aside.

    Returns:
        The leftovers found.
    """
    found = []
    for marker in [*parent.glob(f".*.{_PARTIAL}-*/{MARKER}"), *parent.glob(f".*.{_REPLACED}-*/{MARKER}")]:
        with marker.open("a") as file:
            if not lock(file):
                continue  # Its writer is alive.
            leftover = marker.parent
            final = parent / leftover.name[1:].rsplit(".", 1)[0]
            if f".{_REPLACED}-" in leftover.name and not final.exists():
                leftover.rename(final)
                (final / MARKER).unlink()
            else:
                remove(leftover)
            found.append(leftover)
    return found


def check_place(out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raises `BadInputError` where `atomic_folder` would, if something stands at `out`."""
    if out.is_symlink():
        raise BadInputError(f"{out} is a link, expected a new folder. Give the folder it points to, or another name.")
    if not out.exists():
        return
    if not out.is_dir() or not is_ours(out):
        raise BadInputError(f"{out} exists and was not made by this program, expected a new folder. Give another name.")
    if not overwrite:
        raise BadInputError(f"{out} exists, expected a new folder. Give another name, or --overwrite to replace it.")


def _check_room(out: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        raise BadInputError(
            f"{out}: {free / 1e9:.1f} GB free, expected {needed_bytes / 1e9:.1f} GB. Free some or choose another disk."
        )


@contextlib.contextmanager
def _disk_errors(out: Path, kinds: tuple[int, ...]) -> Iterator[None]:
    """What the disk says as one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in kinds:
            raise BadInputError(
                f"{out}: cannot be written ({os.strerror(error.errno)}), expected room and permission. "
                "Nothing was left behind; choose another place."
            ) from error
        raise


def lock(file: IO) -> bool:
    """Whether this process holds the lock of an open file now; it goes when the process does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Marks a folder as being written by this process; the lock goes when the process does."""
    with (folder / MARKER).open("w") as file:
        lock(file)
        yield


def _move_in(partial: Path, out: Path) -> None:
    """Renames; the marker goes last, so that a kill at any moment leaves the earlier result or the new one.

    Two renames are needed to replace a folder. A kill between them leaves the earlier result under its hidden
    name, from where the next run's sweep puts it back.
    """
    if out.exists():
        replaced = out.parent / f".{out.name}.{_REPLACED}-{secrets.token_hex(4)}"
        with marked(out):
            out.rename(replaced)
            try:
                partial.rename(out)
            except BaseException:
                replaced.rename(out)
                (out / MARKER).unlink()
                raise
            remove(replaced)
    else:
        partial.rename(out)
    (out / MARKER).unlink()
    _sync_entry(out.parent)


def remove(folder: Path) -> None:
    """Deletes a marked folder, the marker last: a kill in the middle leaves something that can still be swept."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _sync(folder: Path) -> None:
    """Brings every file and folder below to disk: a rename must not outlive what it renames."""
    with ThreadPoolExecutor() as pool:  # Many small waits for the disk.
        for _ in pool.map(_sync_entry, [folder, *folder.rglob("*")]):
            pass


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
