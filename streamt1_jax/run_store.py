"""A run that survives: the state and the record of every chunk in a folder, from which `--resume` goes on.

    out.resume/run.json                what was asked, the weights, the machine
               lock                    held while a process writes here
               chunk-000007.npz        the record of a chunk, all of them kept: the video is put together from them
               state-000008/           after 8 chunks; the last two are kept
               results.json            sums of the results that an interrupted run left, which may be replaced

- A background thread writes while the next chunk is made: first the record, then the state, then what is too old goes.
- Whatever moment a process is killed at, the newest whole state is there, or the one before.
- A state knows the sum of all records up to it. One that is damaged is passed over with a warning.
"""

import contextlib
import hashlib
import json
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from streamt1_jax.atomic_folder import lock, sweep
from streamt1_jax.errors import BadInputError
from streamt1_jax.manifest import file_sha256
from streamt1_jax.outputs import SOFTWARE, atomic_write, write_errors, write_json
from streamt1_jax.run_info import differences, normal

if TYPE_CHECKING:
    from streamt1_jax.result import ChunkResult
    from streamt1_jax.session import Request
    from streamt1_jax.state import ChunkRecord, StreamState

RUN, LOCK, RESULTS = "run.json", "lock", "results.json"
KEPT_STATES = 2


@dataclass(frozen=True)
class Saved:
    """What a run goes on from."""

    state: "StreamState"
    committed: int
    records: "list[tuple[ChunkRecord, float]]"  # of every chunk so far, with its seconds

    def results(self, request: "Request") -> "Iterator[ChunkResult]":
        """The chunks as they were handed out."""
        from streamt1_jax.result import ChunkResult, to_chunk

        for index, (record, seconds) in enumerate(self.records):
            chunk = to_chunk(record, index, request.config, seconds)
            frames = np.asarray(record.frames[0])
            yield ChunkResult(frames, chunk, record, request.prompt_of(index), restored=True)


class RunStore:
    """The folder of one run. Nothing is made before the first chunk is saved.

    Args:
        folder: its parent exists.
        resume: go on from what is there, if something is; else an earlier run there is cleared away.
    """

    def __init__(self, folder: Path, *, resume: bool = False):
        self.folder, self._resume = folder, resume
        self._lock: IO | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._identity: dict[str, Any] = {}
        self._like: Any = None
        self._sum = ""  # over all records so far
        self._waited: list[float] = []  # seconds that each chunk's saving has held up the run
        self._bytes = 0

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(
        self, identity: dict[str, Any], environment: dict[str, Any], init: "Callable[[], StreamState]"
    ) -> Saved | None:
        """What there is to go on from; None: begin at chunk 0.

        Args:
            identity: all that the run's bits depend on, plain data.
            environment: the machine; another one only warns.
            init: makes a state of the run's shapes; not called, only traced.

        Raises:
            BadInputError: the folder holds a run with another identity (with the difference), is in use, or none of
                its states can be used.
        """
        import jax

        self._identity = {"software": SOFTWARE, "identity": identity, "environment": normal(environment)}
        self._like = jax.eval_shape(init)
        if not self.folder.exists():
            if self._resume:
                warnings.warn(f"{self.folder} does not exist: nothing to resume, beginning at chunk 0", stacklevel=3)
            return None
        if not holds_run(self.folder) and any(self.folder.iterdir()):
            raise BadInputError(f"{self.folder} was not made by this program: move it or name another --out")
        self._hold()
        if not self._resume:
            self.clear()
            return None
        if not (self.folder / RUN).exists() and not self.holds_state:  # killed before the first chunk was saved
            return None
        self._compare(_read_run(self.folder))
        sweep(self.folder)
        for leftover in self.folder.glob(".state-*.old-*"):
            shutil.rmtree(leftover)
        return self._newest()

    def save(self, committed: int, state: "StreamState", result: "ChunkResult") -> None:
        """Keeps the state after `committed` chunks and the record of the last; returns when both are copied.

        Raises:
            BadInputError: what an earlier save met: the disk is full or refuses. What was saved before is whole.
        """
        from streamt1_jax.saved_state import to_host

        started = time.perf_counter()
        self.wait()
        if self._thread is None:
            self._begin()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="streamt1-save")
        packed = to_host(state)
        self._bytes = sum(array.nbytes for array in packed.values())
        self._pending = self._thread.submit(self._write, committed, packed, result.record, result.seconds)
        self._waited.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Until all that was handed in is on the disk; raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def holds_state(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.folder.glob("state-*"))

    def cost(self) -> dict[str, Any]:
        """What saving took: seconds a chunk that the run was held up, and the bytes of a state."""
        mean = sum(self._waited) / len(self._waited) if self._waited else 0.0
        return {"seconds_per_chunk": mean, "state_bytes": self._bytes, "chunks": len(self._waited)}

    def note_results(self, files: dict[str, Path]) -> None:
        """Remembers results of an unfinished run that are about to take their names, so that a resumed run may
        replace them, and only them."""
        if self._lock is not None:
            known = known_results(self.folder)  # stay known: a kill before the renames leaves the earlier ones
            sums = {name: [*known.get(name, ()), file_sha256(path)] for name, path in files.items()}
            write_json(self.folder / RESULTS, sums)

    def clear(self) -> None:
        """Deletes what this program made in the folder, and the folder if nothing else is in it."""
        self.close()
        if self.folder.exists():
            _delete(self.folder)

    def close(self) -> None:
        """Waits for the thread and lets the folder go; what was saved stays."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> None:
        if self._lock is None:
            with write_errors(self.folder):
                file = (self.folder / LOCK).open("a")
            if not lock(file):
                file.close()
                raise BadInputError(f"{self.folder} is in use by another process: wait for it, or name another --out")
            self._lock = file

    def _begin(self) -> None:
        with write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        self._hold()
        write_json(self.folder / RUN, self._identity)

    def _compare(self, saved: dict[str, Any]) -> None:
        ours = self._identity
        if different := differences(saved["identity"], ours["identity"]):
            raise BadInputError(
                f"{self.folder} holds another run: {'; '.join(different)}; expected the same settings, weights and "
                "seed: give those, or begin anew with --overwrite in place of --resume"
            )
        if different := differences(saved["environment"], ours["environment"]):
            warnings.warn(
                f"the run was begun on another machine or with other versions ({'; '.join(different)}): it goes on, "
                "but not to the same bits",
                stacklevel=4,
            )

    def _newest(self) -> Saved | None:
        """The newest state that is whole, with the records up to it."""
        import jax

        from streamt1_jax.saved_state import DamagedStateError, load_state

        folders = sorted(self.folder.glob("state-*"), reverse=True)
        for number, folder in enumerate(folders):
            try:
                state, notes = load_state(folder, self._like)
                records = self._records(notes["committed"], notes["records"])
            except DamagedStateError as error:
                warnings.warn(f"{error}: the state before it is used", stacklevel=4)
                continue
            for damaged in folders[:number]:  # Else it would stand in the way of its successor, or of the last two.
                _discard(damaged)
            self._sum = notes["records"]
            # Copies: NumPy's memory must not become a buffer that the step consumes.
            return Saved(jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state), notes["committed"], records)
        if folders:
            raise BadInputError(
                f"none of the {len(folders)} states in {self.folder} can be used, expected at least one that is whole: "
                "begin anew with --overwrite in place of --resume"
            )
        return None

    def _records(self, committed: int, expected: str) -> "list[tuple[ChunkRecord, float]]":
        from streamt1_jax.saved_state import DamagedStateError

        found, total = [], ""
        for index in range(committed):
            path = self._record_path(index)
            try:
                total = _chain(total, path)
                found.append(_read_record(path))
            except Exception as error:  # NumPy and zipfile raise many classes for a file that is cut short.
                raise DamagedStateError(f"{path} cannot be read ({error})") from error
        if total != expected:
            raise DamagedStateError(f"the records up to chunk {committed - 1} in {self.folder} are not as written")
        return found

    def _record_path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.npz"

    def _write(self, committed: int, packed: Any, record: "ChunkRecord", seconds: float) -> None:
        """In the background: no JAX here, only NumPy arrays."""
        from streamt1_jax.saved_state import save_state

        path = self._record_path(committed - 1)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, seconds=np.float64(seconds), **record._asdict())
        self._sum = _chain(self._sum, path)
        notes = {"committed": committed, "records": self._sum}
        save_state(self.folder / f"state-{committed:06d}", packed, self._like, notes)
        for old in sorted(self.folder.glob("state-*"))[:-KEPT_STATES]:
            _discard(old)


def known_results(folder: Path) -> dict[str, list[str]]:
    """Sums by name of the results that an interrupted run has left, or was about to."""
    try:
        return json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return {}


def holds_run(folder: Path) -> bool:
    """Whether a folder is one of ours."""
    return (folder / RUN).is_file() or (folder / LOCK).is_file()


def sweep_run(folder: Path) -> None:
    """Takes away what a kill has left of a run whose results are there."""
    if holds_run(folder):
        with write_errors(folder), (folder / LOCK).open("a") as file:
            if lock(file):  # Else its writer is alive.
                _delete(folder)


def is_known(path: Path, folder: Path) -> bool:
    """Whether a file is, to the byte, what the interrupted run of `folder` wrote."""
    known = known_results(folder).get(path.name)
    return known is not None and path.is_file() and file_sha256(path) in known


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        saved = json.loads((folder / RUN).read_text())
        if saved["software"] == SOFTWARE:
            return saved
        raise ValueError("another program's")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{folder / RUN} cannot be read ({error}), expected the run to resume: begin anew with --overwrite"
        ) from error


def _read_record(path: Path) -> "tuple[ChunkRecord, float]":
    from streamt1_jax.state import ChunkRecord

    with np.load(path, allow_pickle=False) as file:
        return ChunkRecord(**{name: file[name] for name in ChunkRecord._fields}), float(file["seconds"])


def _chain(total: str, path: Path) -> str:
    return hashlib.sha256(f"{total} {file_sha256(path)}".encode()).hexdigest()


def _discard(folder: Path) -> None:
    """Deletes a state; under a hidden name first, so that a kill leaves no half of one."""
    hidden = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _delete(folder: Path) -> None:
    """What this program makes in a run's folder, by name; `run.json` and the lock last, then the empty folder."""
    for pattern in ("state-*", ".state-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else None
    for pattern in ("chunk-*.npz", ".chunk-*.tmp.npz", ".run-*.tmp.json", ".results-*.tmp.json", RESULTS, RUN, LOCK):
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):  # Something else is in it.
        folder.rmdir()
