"""A converted checkpoint: a folder that is written whole, and verified before it is used.

- `config.json`, `tokenizer/`, `manifest.json` (size and sha256 of every file, where the weights came from) and
  `manifest.sha256` (of the manifest itself).
- A network's parameters lie in `dit/`, `vae/` and `text/`, stored by `params_store.py`.
- Orbax loads a flipped bit without a word: hence the hashes.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.atomic_folder import MARKER, atomic_folder, check_place
from streamt1_jax.config import DiTConfig, ModelConfig, UMT5Config, VAEConfig
from streamt1_jax.errors import WeightsError
from streamt1_jax.networks import network_graph
from streamt1_jax.outputs import file_sha256
from streamt1_jax.params_store import ShardWriter, read_shards

FORMAT, FORMAT_VERSION = "streamt1-checkpoint", 1
NETWORKS = ("dit", "vae", "text")


class CheckpointWriter:
    """What `write_checkpoint` yields: takes the parameters of each network, then its tokenizer."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._networks: dict[str, ShardWriter] = {}

    def add(self, network: str, path: str, array: np.ndarray, start: int = 0) -> None:
        """One parameter, or rows `start` on of one. The pieces of a parameter come in order.

        Args:
            network: one of `NETWORKS`.
            path: dotted path in the network.
        """
        assert network in NETWORKS, f"{network!r} is none of {NETWORKS}"
        if network not in self._networks:
            (self._folder / network).mkdir()
            self._networks[network] = ShardWriter(self._folder / network)
        self._networks[network].add(path, array, start)

    def add_tokenizer(self, folder: Path) -> None:
        """Copies the files of a tokenizer's folder."""
        (self._folder / "tokenizer").mkdir()
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, self._folder / "tokenizer" / file.name)

    def finish(self, config: ModelConfig, origin: dict[str, Any]) -> None:
        """Writes the last parameters, the config and the manifest."""
        networks = {name: writer.finish() for name, writer in self._networks.items()}
        _write_json(self._folder / "config.json", dataclasses.asdict(config))
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file() and path.name != MARKER]
        with ThreadPoolExecutor() as pool:
            entries = {
                path.relative_to(self._folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
                for path, sha256 in zip(files, pool.map(file_sha256, files), strict=True)
            }
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "made_with": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
            "origin": origin,
            "networks": networks,
            "files": entries,
        }
        _write_json(self._folder / "manifest.json", manifest)
        (self._folder / "manifest.sha256").write_bytes(_seal(file_sha256(self._folder / "manifest.json")))


@contextlib.contextmanager
def write_checkpoint(
    out: Path | str,
    config: ModelConfig,
    origin: dict[str, Any],
    *,
    overwrite: bool = False,
    needed_bytes: int = 0,
) -> Iterator[CheckpointWriter]:
    """Writes a converted checkpoint; the folder appears when the `with` block ends, or not at all.

    Args:
        out: the folder to make.
        config: sizes of the three networks.
        origin: where the weights came from, for the manifest; JSON types only. Read when the block ends.
        overwrite: whether an earlier checkpoint at `out` may be replaced.
        needed_bytes: room the disk must have before anything is written.

    Raises:
        BadInputError: something else stands at `out`, or the disk is full or read-only.
    """
    place = atomic_folder(Path(out), overwrite=overwrite, is_ours=is_checkpoint, needed_bytes=needed_bytes)
    with place as folder:
        writer = CheckpointWriter(folder)
        yield writer
        writer.finish(config, origin)


def check_output(out: Path | str, *, overwrite: bool = False) -> None:
    """Raises `BadInputError` where `write_checkpoint` would, if something stands at `out`: before a long download."""
    check_place(Path(out), overwrite=overwrite, is_ours=is_checkpoint)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a converted checkpoint by its manifest; nothing is verified."""
    try:
        return json.loads((folder / "manifest.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _seal(sha256: str) -> bytes:
    """What `manifest.sha256` holds, to the byte: it is compared as it is."""
    return f"{sha256}\n".encode()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder: its sizes, its manifest, and where it is."""

    dir: Path
    config: ModelConfig
    manifest: dict[str, Any]

    @property
    def tokenizer_dir(self) -> Path:
        return self.dir / "tokenizer"


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """The sizes and the manifest of a converted checkpoint; its other files are left to `verify`.

    Raises:
        WeightsError: there is no checkpoint (with the command that makes one), or it is of another version.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _refuse_changed(folder, {"config.json": manifest["files"]["config.json"]})
    return Checkpoint(folder, _read_config(folder), manifest)


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Opens a converted checkpoint and verifies every file of its manifest, its size and its sha256.

    Raises:
        WeightsError: as `open_checkpoint`; or files are missing or changed, one error lists them all.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _refuse_changed(folder, manifest["files"])
    return Checkpoint(folder, _read_config(folder), manifest)


def verify(checkpoint: Checkpoint) -> None:
    """What `load_checkpoint` checks, of an opened checkpoint."""
    _refuse_changed(checkpoint.dir, checkpoint.manifest["files"])


def _refuse_changed(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run.
        found = pool.map(lambda item: _file_problem(folder, *item), files.items())
        problems = [problem for problem in found if problem]
    if problems:
        raise WeightsError(
            f"{folder}: {len(problems)} files are not as they were written: {'; '.join(problems)}. Convert the weights "
            "again, or copy the folder again."
        )


def _how_to(out: Path) -> str:
    return (
        "streamt1 convert longlive --base Wan-AI/Wan2.1-T2V-1.3B --generator gdhe17/Self-Forcing "
        f"--out {out} (downloads both; needs the extra streamt1-jax[torch])"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise WeightsError(f"{folder}: no such folder, expected a converted checkpoint. Make one: {_how_to(folder)}")
    if not (folder / "manifest.json").is_file():
        raise WeightsError(
            f"{folder}: has no manifest.json, expected a converted checkpoint. "
            f"Convert PyTorch weights into a new folder first: {_how_to(folder.with_name(folder.name + '-jax'))}"
        )
    path, seal = folder / "manifest.json", folder / "manifest.sha256"
    found = file_sha256(path)
    expected = seal.read_bytes() if seal.is_file() else b"nothing: it is missing"
    if expected != _seal(found):
        raise WeightsError(f"{path}: sha256 is {found}, {seal.name} says {expected!r}. Convert the weights again.")
    manifest = json.loads(path.read_text())
    came = (manifest.get("format"), manifest.get("version"))
    if came != (FORMAT, FORMAT_VERSION):
        raise WeightsError(f"{path}: is {came}, expected {(FORMAT, FORMAT_VERSION)}. Convert the weights again.")
    return manifest


def _file_problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size} bytes, expected {entry['size']}"
    sha256 = file_sha256(path)
    return None if sha256 == entry["sha256"] else f"{name} has sha256 {sha256}, expected {entry['sha256']}"


def _read_config(folder: Path) -> ModelConfig:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())

    def tuples(fields: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}

    try:
        parts = {"dit": DiTConfig, "vae": VAEConfig, "text": UMT5Config}
        return ModelConfig(**{key: parts[key](**tuples(x)) if key in parts else x for key, x in values.items()})
    except TypeError as error:
        raise WeightsError(
            f"config.json: {error}, expected the sizes of this version. Convert the weights again."
        ) from error


def load_params(checkpoint: Checkpoint, network: str, dtype: Any = None) -> nnx.State:
    """Reads the parameters of one network onto the default device.

    Args:
        network: one of `NETWORKS`.
        dtype: the type to cast to; None keeps the stored one.

    Returns:
        The abstract parameters of `network_graph(config, network, dtype)`, with arrays.

    Raises:
        WeightsError: names, shapes or types are not the network's; one error lists them all.
    """
    entry = checkpoint.manifest["networks"].get(network)
    if entry is None:
        raise WeightsError(f"{checkpoint.dir}: holds no {network!r}, expected {NETWORKS}. Convert the weights again.")
    dtype = jnp.dtype(entry["dtype"] if dtype is None else dtype)
    expected = nnx.to_flat_state(network_graph(checkpoint.config, network, dtype)[1])
    _check_leaves(f"{checkpoint.dir}, {network}", entry["leaves"], expected)
    arrays = dict(read_shards(checkpoint.dir / network, entry, dtype))
    return nnx.from_flat_state([(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in expected])


def _check_leaves(name: str, leaves: dict[str, Any], expected: Iterable[tuple[tuple, Any]]) -> None:
    wanted = {".".join(map(str, path)): list(leaf.shape) for path, leaf in expected}
    found = {path: leaf["shape"] for path, leaf in leaves.items()}
    problems = [f"- {path} {shape}" for path, shape in wanted.items() if path not in found]
    problems += [f"+ {path} {shape}" for path, shape in found.items() if path not in wanted]
    problems += [
        f"+ {path} {shape}, not {wanted[path]}" for path, shape in found.items() if shape != wanted.get(path, shape)
    ]
    if problems:
        raise WeightsError(
            f"{name}: expected the network's parameters: {', '.join(problems)}. Convert the weights again."
        )
