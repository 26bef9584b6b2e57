"""One network's parameters on disk: several Orbax checkpoints of about one gibibyte each.

- Neither writing nor reading needs much more memory than that beside the parameters themselves. A larger parameter
  is cut along its first axis; `leaves` says which rows are where.
- The hash of the parameters does not depend on how they are cut, nor on Orbax, whose own files hold the time.
- Orbax casts types without a word, so types and shapes are checked after restoring.
"""

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.errors import WeightsError

SHARD_BYTES = 2**30


class _Digest:
    """The hash of one parameter, fed piece by piece: the same however it is cut."""

    def __init__(self, dtype: Any, shape: tuple[int, ...]):
        self.dtype, self.row_shape, self.rows = np.dtype(dtype), shape[1:], 0
        self._sha256 = hashlib.sha256()

    def update(self, array: np.ndarray) -> None:
        assert (array.dtype, array.shape[1:]) == (self.dtype, self.row_shape), "pieces of one parameter differ"
        self.rows += len(array)
        self._sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def line(self, path: str) -> str:
        return f"{path} {self.dtype.name} {[self.rows, *self.row_shape]} {self._sha256.hexdigest()}\n"


def _combine(digests: dict[str, _Digest]) -> str:
    return hashlib.sha256("".join(digests[path].line(path) for path in sorted(digests)).encode()).hexdigest()


def params_sha256(params: nnx.State) -> str:
    """The hash of a network's parameters: names, types, shapes and bytes. Equal after every re-conversion."""
    digests = {}
    for path, leaf in nnx.to_flat_state(params):
        array = np.asarray(leaf[...])
        digests[".".join(map(str, path))] = digest = _Digest(array.dtype, array.shape)
        digest.update(array)
    return _combine(digests)


class ShardWriter:
    """Packs one network's parameters into Orbax checkpoints, in the order they come.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._shard: dict[str, np.ndarray] = {}
        self._count = 0
        self._digests: dict[str, _Digest] = {}
        self._pieces: dict[str, list[list[int]]] = {}

    def add(self, path: str, array: np.ndarray, start: int) -> None:
        """Rows `start` on of a parameter; its pieces come in order. The array is kept until its shard is full."""
        digest = self._digests.setdefault(path, _Digest(array.dtype, array.shape))
        assert digest.rows == start, f"{path}: rows {start} on came after {digest.rows}"
        digest.update(array)
        if path in self._shard or sum(x.nbytes for x in self._shard.values()) + array.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[path] = array
        self._pieces.setdefault(path, []).append([self._count, start, start + len(array)])

    def _flush(self) -> None:
        if self._shard:
            with orbax() as (ocp, checkpointer):
                checkpointer.save(self._folder / _shard_name(self._count), args=ocp.args.PyTreeSave(self._shard))
            self._shard = {}
            self._count += 1

    def finish(self) -> dict[str, Any]:
        """Writes the last shard and returns the network's entry of the manifest."""
        self._flush()
        (dtype,) = {digest.dtype.name for digest in self._digests.values()}
        leaves = {
            path: {"shape": [digest.rows, *digest.row_shape], "pieces": self._pieces[path]}
            for path, digest in sorted(self._digests.items())
        }
        return {"dtype": dtype, "params_sha256": _combine(self._digests), "shards": self._count, "leaves": leaves}


def read_shards(folder: Path, entry: dict[str, Any], dtype: Any) -> Iterator[tuple[str, jax.Array]]:
    """Yields every parameter's dotted path and its array on the default device.

    Host memory holds one shard at a time, and one parameter where it is cut into several.

    Args:
        folder: where a `ShardWriter` wrote.
        entry: what its `finish` returned.
        dtype: the type to cast to.

    Raises:
        WeightsError: a restored array is not of the type and shape of the entry.
    """
    stored = jnp.dtype(entry["dtype"])
    pieces: dict[int, list[tuple[str, int, int]]] = {index: [] for index in range(entry["shards"])}
    for path, leaf in entry["leaves"].items():
        for shard, start, stop in leaf["pieces"]:
            pieces[shard].append((path, start, stop))
    unfinished: dict[str, np.ndarray] = {}
    for shard, rows in pieces.items():
        arrays = _restore(folder / _shard_name(shard), [path for path, _, _ in rows])
        for path, start, stop in rows:
            array, shape = arrays.pop(path), tuple(entry["leaves"][path]["shape"])
            expected = (stop - start, *shape[1:])
            if (array.dtype, array.shape) != (stored, expected):
                raise WeightsError(
                    f"{folder}, {path}: restored as {array.dtype} {array.shape}, expected {stored} {expected}. "
                    "Convert the weights again."
                )
            if expected == shape:
                yield path, jnp.asarray(array, dtype)
                continue
            if start == 0:
                unfinished[path] = np.empty(shape, dtype)
            unfinished[path][start:stop] = array
            if stop == shape[0]:
                yield path, jnp.asarray(unfinished.pop(path))


def _restore(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    with orbax() as (ocp, checkpointer):
        # As numpy arrays of the stored type: asked for a type, Orbax casts silently.
        how = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
        return checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=how))


def _shard_name(index: int) -> str:
    return f"{index:05d}"


@contextlib.contextmanager
def orbax() -> Iterator[tuple[Any, Any]]:
    """Orbax and a checkpointer that writes plain files: one file a parameter, named by it, not compressed.

    (Compression saves a fifth of bfloat16 weights and takes longer than the disk.)
    """
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # It logs every step, and each error that it also raises.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            yield ocp, checkpointer
    except ValueError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    finally:
        logger.setLevel(level)
