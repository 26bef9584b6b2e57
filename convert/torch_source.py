"""PyTorch files (.pt, .pth): weights only, mapped, never executed.

- `torch.load(weights_only=True, mmap=True)` and nothing else. A file that asks for code is refused; so is the
  format before PyTorch 1.6, which cannot be mapped: it would have to be held in memory whole.
- Touched pages of a mapping count as resident memory, so the file is mapped anew after every gibibyte read.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from convert.sources import as_numpy, check_weights_file
from streamt1_jax.errors import WeightsError

_REMAP_BYTES = 2**30
# What training wrappers put into parameter names (FSDP, activation checkpointing, torch.compile).
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class Selected(NamedTuple):
    """A flat state dict, the key of the file it stood under ("" for the file itself), and the file's other dicts."""

    tensors: dict[str, Any]
    key: str
    others: tuple[str, ...]


Select = Callable[[Any, Path], Selected]


class TorchSource:
    """One PyTorch file.

    Args:
        path: the file.
        select: picks the flat state dict out of what the file holds.

    Raises:
        WeightsError: the file is missing, broken, of the old format, would run code, or holds no state dict.
    """

    def __init__(self, path: Path | str, select: Select | None = None):
        self.path = Path(path)
        self._select = select or select_flat
        selected = self._map()
        self.key, self.others = selected.key, selected.others
        self.shapes = {key: tuple(value.shape) for key, value in selected.tensors.items()}

    def _map(self) -> Selected:
        selected = self._select(load_torch(self.path), self.path)
        self._tensors, self._touched = selected.tensors, 0
        return selected

    def read(self, key: str) -> np.ndarray:
        if self._touched > _REMAP_BYTES:
            self._tensors = {}
            self._map()
        x = self._tensors[key]
        self._touched += x.numel() * x.element_size()
        return as_numpy(x)


def load_torch(path: Path) -> Any:
    """What a PyTorch file holds, its tensors mapped.

    Raises:
        WeightsError: the file is missing, broken, of the old format or would run code.
    """
    import torch

    check_weights_file(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        raise WeightsError(
            f"{path}: found {path.stat().st_size} bytes that are no zip archive, expected a file of torch.save "
            "from PyTorch 1.6 or later, which can be mapped. Download it again; if it is an old file that you "
            "trust, load it in PyTorch and save it anew."
        )
    if not zipfile.is_zipfile(path):
        raise WeightsError(
            f"{path}: found {path.stat().st_size} bytes, expected {_expected_size(path)}. Download it again."
        )
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if not (named := re.search(r"GLOBAL (\S+)", str(error))):
            raise WeightsError(
                f"{path}: its list of tensors is broken, expected a whole one. Download it again."
            ) from error
        raise WeightsError(
            f"{path}: asks for {named[1]} to be run, expected tensors alone; nothing was run. "
            "Do not use this file unless you know who made it."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: {path.stat().st_size} bytes, not readable by torch.load: {first} Download it again."
        ) from error


class _Inert(dict):
    """Stands for whatever a pickle names: can be called, filled and set, and does nothing."""

    def __init__(self, name: str = ""):
        super().__init__()
        self.name = name

    def __call__(self, *_args: Any) -> "_Inert":
        return _Inert()

    def __setstate__(self, _state: Any) -> None:
        pass


class _StorageSizes(pickle.Unpickler):
    """Adds up the storages that a checkpoint's pickle lists. Every class it names is inert: nothing is run."""

    _BYTES: ClassVar = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _Inert(name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        self.storages[key] = self._BYTES.get(kind.name.removesuffix("Storage"), 1) * count
        return _Inert()


def _expected_size(path: Path) -> str:
    """What a file cut short should have been at least: the storages that its first record lists."""
    with path.open("rb") as file:
        head = file.read(64 * 2**20)
    start = 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    sizes = _StorageSizes(io.BytesIO(head[start:]))
    try:
        sizes.load()
    except Exception:  # Cut inside the list, or no list of torch.save: any error of a pickle can come.
        return "a whole zip archive (its end is missing)"
    return f"more than {sum(sizes.storages.values())} (its end is missing)"


def _nested(loaded: Any, path: Path) -> dict[str, Mapping]:
    """The dicts inside a training checkpoint; empty for a bare state dict."""
    if not isinstance(loaded, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(loaded).__name__}, expected a state dict. Check that this is a checkpoint."
        )
    return {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Mapping)}


def _state_dict(loaded: Any, path: Path, key: str) -> dict[str, Any]:
    """Checks that every entry is a named tensor, and takes the wrappers out of the names."""
    import torch

    where = f"{path}, {key}" if key else str(path)
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{where}: holds a {type(loaded).__name__}, expected a state dict. Check the file.")
    odd = [f"{name} ({type(x).__name__})" for name, x in loaded.items() if not isinstance(x, torch.Tensor)]
    if odd or not loaded:
        raise WeightsError(
            f"{where}: holds {', '.join(odd) or 'nothing'} instead of tensors, expected a state dict. "
            "Check that this is the checkpoint of this network."
        )
    tensors = {_unwrapped(name): x for name, x in loaded.items()}
    if len(tensors) < len(loaded):
        twice = sorted({name for name in loaded if name not in tensors and _unwrapped(name) in loaded})
        raise WeightsError(
            f"{where}: the same parameter with and without a wrapper's name: {', '.join(twice)}. Check the file."
        )
    return tensors


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def select_flat(loaded: Any, path: Path) -> Selected:
    """A file that is one state dict itself."""
    return Selected(_state_dict(loaded, path, ""), "", ())


def select_generator(ema: bool | None) -> Select:
    """Picks the generator of a LongLive or Self-Forcing checkpoint (METHOD section 9).

    Args:
        ema: True takes `generator_ema`, False the weights as trained (`generator` or `model`), None the averaged
            ones where the file has them, as the published inference commands of Self-Forcing do.
    """
    order = {None: ("generator_ema", "generator", "model"), True: ("generator_ema",), False: ("generator", "model")}[
        ema
    ]

    def select(loaded: Any, path: Path) -> Selected:
        nested = _nested(loaded, path)
        key = next((key for key in order if key in nested), None)
        if key is not None:
            return Selected(_state_dict(nested[key], path, key), key, tuple(sorted(nested.keys() - {key})))
        if not nested and ema is not True:
            return select_flat(loaded, path)
        raise WeightsError(
            f"{path}: holds {', '.join(sorted(nested)) or 'a bare state dict'}, expected {' or '.join(order)}. "
            "Choose other weights with --ema or --no-ema, or check the file."
        )

    return select


def select_lora(loaded: Any, path: Path) -> Selected:
    """The LoRA of a file: under `generator_lora`, or the file itself."""
    nested = _nested(loaded, path)
    key = "generator_lora" if "generator_lora" in nested else ""
    return Selected(_state_dict(nested[key] if key else loaded, path, key), key, tuple(sorted(nested.keys() - {key})))
