"""Where tensors come from: one reader for safetensors, sharded safetensors, PyTorch files and plain dicts.

- A source lists every shape up front and reads one tensor at a time.
- safetensors are read with plain file reads, not mapped: mapped pages that were touched count as resident
  memory until the mapping goes.
- A broken file is reported with the size found and the size its own header asks for.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from streamt1_jax.errors import WeightsError

Shape = tuple[int, ...]

# Types of the safetensors format that a network's weights come in; others (8 bits and less) are refused.
_SAFETENSORS_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_ORIGINAL = "Convert the original checkpoint, not a quantised copy of it."
_MAX_HEADER = 100_000_000  # The format's own limit, in bytes.


class Source(Protocol):
    """Named tensors: all shapes known, each read when asked for."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every key and its shape."""
        ...

    def read(self, key: str) -> np.ndarray:
        """One tensor; read-only, and only for use until the next read (it may be a view of a mapped file)."""
        ...


class DictSource:
    """Tensors already in memory: numpy arrays, or anything `as_numpy` takes."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = dict(tensors)
        self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        return as_numpy(self._tensors[key])


def as_numpy(x: Any) -> np.ndarray:
    """A numpy array or a torch tensor as a numpy array, without a copy; bfloat16 crosses as bits.

    Raises:
        WeightsError: numpy has no such numbers.
    """
    if isinstance(x, np.ndarray):
        return x
    import torch

    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return x.numpy()
    except TypeError as error:  # 8 bits and less
        raise WeightsError(f"found a tensor of {x.dtype}, expected 16 or 32 bit numbers. {_ORIGINAL}") from error


def check_weights_file(path: Path) -> None:
    """Refuses what is no weights file at all, before any parser sees it.

    Raises:
        WeightsError: the file is missing, empty, a git-LFS pointer or a web page.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, expected weights. Check the path or download it.")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path}: found 0 bytes, expected weights. Download it again.")
    with path.open("rb") as file:
        head = file.read(1024).lstrip()
    if head.startswith(b"version https://git-lfs"):
        wanted = next((line.split()[1].decode() for line in head.splitlines() if line.startswith(b"size ")), "more")
        raise WeightsError(
            f"{path}: found a git-LFS pointer of {size} bytes, expected the weights of {wanted} bytes. "
            "Run `git lfs pull`, or download the file with the `hf` command."
        )
    if head[:1] == b"<":
        raise WeightsError(
            f"{path}: found a web page of {size} bytes, expected weights. Download the file itself "
            "(its link has /resolve/, not /blob/)."
        )


class SafetensorsSource:
    """One safetensors file.

    Raises:
        WeightsError: the file is missing, cut short, too long, or not safetensors.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._start, self._entries = _safetensors_header(self.path)
        self.shapes = {key: tuple(entry["shape"]) for key, entry in self._entries.items()}

    def read(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        if entry["dtype"] not in _SAFETENSORS_TYPES:
            raise WeightsError(
                f"{self.path}: {key} is of type {entry['dtype']}, expected 16 or 32 bit numbers. {_ORIGINAL}"
            )
        x = np.empty(entry["shape"], _SAFETENSORS_TYPES[entry["dtype"]])
        with self.path.open("rb") as file:
            file.seek(self._start + entry["data_offsets"][0])
            found = file.readinto(x.reshape(-1).view(np.uint8).data)
        if found != x.nbytes:
            raise WeightsError(f"{self.path}: found {found} bytes of {key}, expected {x.nbytes}. Download it again.")
        return x


def _safetensors_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the data start, and the entry of every tensor, checked against the size of the file."""
    check_weights_file(path)
    size = path.stat().st_size
    broken = f"{path}: found {size} bytes that do not begin like safetensors, expected a header. Download it again."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise WeightsError(broken)
        header = file.read(length)
    if len(header) < length:
        raise WeightsError(f"{path}: found {size} bytes, expected more than {8 + length}. Download it again.")
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        for key, entry in entries.items():
            low, high = entry["data_offsets"]
            known = _SAFETENSORS_TYPES.get(entry["dtype"])
            if low < 0 or (known and high - low != math.prod(entry["shape"]) * known.itemsize):
                raise WeightsError(
                    f"{path}: the header gives {key} {high - low} bytes for its shape. Download it again."
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(broken) from error
    if size != 8 + length + end:
        raise WeightsError(f"{path}: found {size} bytes, expected {8 + length + end}. Download it again.")
    return 8 + length, entries


class ShardedSource:
    """Several files and the `*.index.json` that names them.

    Args:
        index: beside its shards.
        reader: of one shard.

    Raises:
        WeightsError: one error for every shard that is missing and every key that is not where the index says;
            or the error of a broken shard.
    """

    def __init__(self, index: Path | str, reader: Callable[[Path], Source] = SafetensorsSource):
        index = Path(index)
        check_weights_file(index)
        try:
            where = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{index}: expected JSON with a weight_map. Download it again.") from error
        files = sorted(set(where.values()))
        escaping = [name for name in files if Path(name).name != name]
        missing = [name for name in files if not (index.parent / name).is_file()]
        if escaping or missing:
            raise WeightsError(
                f"{index}: {len(files)} shards listed, not beside it: {', '.join(escaping or missing)}. "
                "Download the missing files again."
            )
        self._shards = {name: reader(index.parent / name) for name in files}
        lost = [f"- {key} of {name}" for key, name in where.items() if key not in self._shards[name].shapes]
        extra = [
            f"+ {key} in {name}"
            for name, shard in self._shards.items()
            for key in shard.shapes
            if where.get(key) != name
        ]
        if lost or extra:
            raise WeightsError(
                f"{index}: expected the shards to hold the keys it lists: {'; '.join(lost + extra)}. "
                "Download them again."
            )
        self._where = where
        self.shapes: dict[str, Shape] = {key: self._shards[name].shapes[key] for key, name in where.items()}

    def read(self, key: str) -> np.ndarray:
        return self._shards[self._where[key]].read(key)


def open_folder(folder: Path | str) -> SafetensorsSource | ShardedSource:
    """The safetensors of one network in a folder: one file, or an index and its shards.

    Raises:
        WeightsError: there is none, or more than one to choose from.
    """
    folder = Path(folder)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return ShardedSource(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if not indices and len(files) == 1:
        return SafetensorsSource(files[0])
    found = ", ".join(path.name for path in indices + files) or "none"
    raise WeightsError(
        f"{folder}: found {found}, expected one .safetensors file, or shards with one .safetensors.index.json. "
        "Download the folder again, or remove what does not belong to this network."
    )
