"""A pytree of arrays as a folder that is written whole and verified when it is read.

- Orbax holds the numbers; `state.json` their names, types and shapes, and the sha256 of every file: Orbax loads a
  flipped bit without a word, and its threads outlive the failure to read a file that was cut short.
- All leaves of a type are packed into one long array: a hundred small files take far longer to reach the disk.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree

from streamt1_jax.atomic_folder import atomic_folder
from streamt1_jax.errors import StreamT1Error
from streamt1_jax.manifest import file_sha256
from streamt1_jax.params_store import orbax

ARRAYS, NOTES = "arrays", "state.json"

Packed: TypeAlias = dict[str, np.ndarray]  # a type's name: all leaves of that type, flat, in the order of the tree


class DamagedStateError(StreamT1Error):
    """A saved state that is not what was written."""


def to_host(tree: PyTree) -> Packed:
    """A copy in NumPy: the arrays on the device may be consumed by the next step, on a CPU their memory too."""
    leaves = jax.device_get(jax.tree.leaves(tree))
    kinds = {leaf.dtype.name: leaf.dtype for leaf in leaves}
    return {
        name: np.concatenate([leaf.reshape(-1) for leaf in leaves if leaf.dtype == kind])
        for name, kind in kinds.items()
    }


def save_state(folder: Path, packed: Packed, like: PyTree, notes: dict[str, Any]) -> None:
    """Writes a tree of arrays; the folder appears when it is complete.

    Args:
        packed: what `to_host` made of it.
        like: a tree of its shapes and types.
        notes: plain data to keep with it.

    Raises:
        BadInputError: the disk is full or refuses.
    """
    with atomic_folder(folder, overwrite=True, is_ours=is_state) as partial:
        with orbax() as (ocp, checkpointer):
            checkpointer.save((partial / ARRAYS).absolute(), args=ocp.args.PyTreeSave(packed))
        # The notes hold the sums of everything else, and one of their own.
        text = json.dumps({"notes": notes, "arrays": _layout(like), "files": _sums(partial / ARRAYS)})
        (partial / NOTES).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")


def load_state(folder: Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """(the tree in NumPy, the notes).

    Args:
        like: a tree of the shapes and types expected.

    Raises:
        DamagedStateError: something is missing, cut short or changed, or of another shape.
    """
    entry = _read_notes(folder)
    if entry["arrays"] != _layout(like):
        raise DamagedStateError(f"{folder} holds arrays of other names, types or shapes than this run's state")
    if _sums(folder / ARRAYS) != entry["files"]:
        raise DamagedStateError(f"{folder} is not what was written: its sha256 differs")
    try:
        with orbax() as (ocp, checkpointer):
            how = {dtype: ocp.RestoreArgs(restore_type=np.ndarray) for _, dtype, _ in entry["arrays"]}
            packed = checkpointer.restore(
                (folder / ARRAYS).absolute(), args=ocp.args.PyTreeRestore(item=how, restore_args=how)
            )
    except Exception as error:  # Orbax and its stores raise many classes, another version's files among the reasons.
        raise DamagedStateError(f"{folder} cannot be read ({type(error).__name__})") from error
    return _unpack(packed, like), entry["notes"]


def _unpack(packed: Packed, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    used = dict.fromkeys(packed, 0)
    arrays = []
    for leaf in leaves:
        dtype = np.dtype(leaf.dtype).name
        begin = used[dtype]
        used[dtype] += leaf.size
        arrays.append(packed[dtype][begin : used[dtype]].reshape(leaf.shape))
    return jax.tree.unflatten(structure, arrays)


def is_state(folder: Path) -> bool:
    """Whether a folder is a saved state by the names in it; nothing is verified."""
    return (folder / NOTES).is_file() or (folder / ARRAYS).is_dir()


def _read_notes(folder: Path) -> dict[str, Any]:
    try:
        text, _, check = (folder / NOTES).read_text().partition("\n")
        if check.strip() != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError("its sha256 differs")
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise DamagedStateError(f"{folder / NOTES} cannot be read ({error})") from error


def _layout(tree: PyTree) -> list[list[Any]]:
    """Name, type and shape of every leaf, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [[jax.tree_util.keystr(path), np.dtype(x.dtype).name, list(x.shape)] for path, x in leaves]


def _sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file below, in parallel: hashlib lets other threads run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(file_sha256, files), strict=True))
