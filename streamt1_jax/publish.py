"""Result files that appear together: all of them or, at a failure, none.

They are written in a hidden folder beside their places and renamed at the end. Earlier files of the same names are
moved into that folder first, and a journal says so: a failed rename puts everything back, and after a kill -9 the
next start does (`sweep_results`).
"""

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamt1_jax.atomic_folder import MARKER, lock, marked, remove
from streamt1_jax.interrupts import uninterrupted
from streamt1_jax.outputs import bring_to_disk, refuse_existing, write_errors

_KIND, _NEW, _OLD, _JOURNAL = "streamt1-results", "new", "old", "journal.json"


@contextlib.contextmanager
def write_together(paths: Sequence[Path], *, overwrite: bool) -> Iterator[tuple[Path, ...]]:
    """Yields a temporary name for each of `paths`, of one folder; at a clean exit they take their names together.

    Args:
        overwrite: False refuses a path that exists by then.

    Raises:
        BadInputError: the disk is full or refuses, or a path exists and `overwrite` is False. Nothing has changed then.
    """
    parent = paths[0].parent
    folder = parent / f".{paths[0].stem[:32]}.{_KIND}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        with write_errors(paths[0]), uninterrupted():
            (folder / _NEW).mkdir(parents=True)
            (folder / _OLD).mkdir()
            stack.enter_context(marked(folder))
            stack.callback(_clean, folder)
        with write_errors(paths[0]):
            yield tuple(folder / _NEW / path.name for path in paths)
            for path in paths:
                bring_to_disk(folder / _NEW / path.name)
                if not overwrite:
                    refuse_existing(path)
            with uninterrupted():
                _move_in(folder, paths)


def _clean(folder: Path) -> None:
    with uninterrupted():
        remove(folder)


def _move_in(folder: Path, paths: Sequence[Path]) -> None:
    had = [path.name for path in paths if path.exists()]
    journal = folder / _JOURNAL
    journal.write_text(json.dumps({"names": [path.name for path in paths], "had": had}))
    bring_to_disk(journal)
    try:
        for path in paths:
            if path.name in had:
                path.rename(folder / _OLD / path.name)
            (folder / _NEW / path.name).rename(path)
    except BaseException:
        _undo(folder)
        raise
    journal.unlink()


def _undo(folder: Path) -> None:
    """Puts the files named in a journal back as they were; may be run again after it was cut short itself."""
    entry = json.loads((folder / _JOURNAL).read_text())
    for name in entry["names"]:
        final, new, old = folder.parent / name, folder / _NEW / name, folder / _OLD / name
        if old.exists():
            old.replace(final)
        elif name not in entry["had"] and not new.exists():
            final.unlink(missing_ok=True)
    (folder / _JOURNAL).unlink()


def sweep_results(parent: Path) -> None:
    """Takes away what killed runs left of `write_together`, and puts earlier files back that they had moved."""
    for marker in parent.glob(f".*.{_KIND}-*/{MARKER}"):
        with marker.open("a") as file:
            if not lock(file):
                continue  # Its writer is alive.
            if (marker.parent / _JOURNAL).exists():
                try:
                    _undo(marker.parent)
                except ValueError:  # The journal itself was cut short: no rename had begun.
                    (marker.parent / _JOURNAL).unlink()
            remove(marker.parent)
