"""A converted checkpoint: a folder that is written whole, and verified before it is used.

- `config.json`, `tokenizer/`, `manifest.json` (size and sha256 of every file, where the weights came from) and
  `manifest.sha256` (of the manifest itself).
- A network's parameters lie in `dit/`, `vae/` and `text/`, stored by `params_store.py`.
- The manifest is that of `manifest.py`: Orbax loads a flipped bit without a word.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.atomic_folder import atomic_folder, check_place
from streamt1_jax.config import DiTConfig, ModelConfig, UMT5Config, VAEConfig
from streamt1_jax.errors import WeightsError
from streamt1_jax.manifest import (
    Format,
    is_of_format,
    read_manifest,
    refuse_changed,
    write_manifest,
    write_plain_json,
)
from streamt1_jax.networks import network_graph
from streamt1_jax.params_store import ShardWriter, read_shards

FORMAT = Format(
    name="streamt1-checkpoint",
    version=1,
    what="a converted checkpoint",
    how_to="streamt1 convert longlive --base Wan-AI/Wan2.1-T2V-1.3B --generator gdhe17/Self-Forcing --out {out} "
    "(downloads both; needs the extra streamt1-jax[torch])",
)
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
        write_plain_json(self._folder / "config.json", dataclasses.asdict(config))
        made_with = {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")}
        fields = {"made_with": made_with, "origin": origin, "networks": networks}
        write_manifest(self._folder, FORMAT, fields)


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
    return is_of_format(folder, FORMAT)


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
    manifest = read_manifest(folder, FORMAT)
    refuse_changed(folder, {"config.json": manifest["files"]["config.json"]})
    return Checkpoint(folder, _read_config(folder), manifest)


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Opens a converted checkpoint and verifies every file of its manifest, its size and its sha256.

    Raises:
        WeightsError: as `open_checkpoint`; or files are missing or changed, one error lists them all.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, FORMAT)
    refuse_changed(folder, manifest["files"])
    return Checkpoint(folder, _read_config(folder), manifest)


def verify(checkpoint: Checkpoint) -> None:
    """What `load_checkpoint` checks, of an opened checkpoint."""
    refuse_changed(checkpoint.dir, checkpoint.manifest["files"])


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
