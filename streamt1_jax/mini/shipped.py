"""The embedded model's weights as they are shipped: one safetensors file in 16 bits and a manifest beside it.

`streamt1 train-mini` writes the same two files, so a folder of its own can be used as a checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from streamt1_jax.config import ModelConfig
from streamt1_jax.errors import WeightsError
from streamt1_jax.manifest import file_sha256

FOLDER = Path(__file__).parent / "weights"
TENSORS, MANIFEST = "mini.safetensors", "mini.json"
STORED = np.float16  # finer than bfloat16 for numbers of the size of weights


def is_mini(folder: str | Path) -> bool:
    """Whether a folder holds weights of the embedded model."""
    return (Path(folder) / MANIFEST).is_file()


def add_to_mini(
    folder: Path, networks: dict[str, PyTree], origin: dict[str, Any], *, start: Path | None = None
) -> None:
    """Writes both files; networks of other names that the folder holds stay beside these.

    The schedule's shift stays that of the DiT that is there.

    Args:
        networks: parameters by the network's name.
        origin: how they were made, for people; goes into that of the manifest, key by key.
        start: another such folder, for the networks that `folder` lacks.

    Raises:
        WeightsError: what stands there is damaged; a number too large for 16 bits.
    """
    from safetensors.numpy import load_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    origins: dict[str, Any] = {}
    shift = ModelConfig.mini().timestep_shift
    for source in (start, folder):
        if source is not None and is_mini(source):
            manifest = _verify(source)
            origins |= manifest["origin"]
            tensors |= load_file(source / TENSORS)
            if "dit" in manifest["networks"]:
                shift = manifest["timestep_shift"]
    kept = {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] not in networks}
    _write(folder, kept | _stored(networks), shift, origins | origin)


def _stored(networks: dict[str, PyTree]) -> dict[str, np.ndarray]:
    tensors = {
        f"{network}/{name}": np.asarray(leaf, STORED)
        for network, params in networks.items()
        for name, leaf in _named(params)
    }
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise WeightsError(f"{name} has values that float16 cannot hold; train again with a lower rate")
    return tensors


def _write(folder: Path, tensors: dict[str, np.ndarray], timestep_shift: float, origin: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    partial = folder / f"{TENSORS}.partial"  # what stands there may be hours of training
    save_file(tensors, partial)
    networks = list(dict.fromkeys(name.partition("/")[0] for name in tensors))
    manifest = {
        "file": TENSORS,
        "sha256": file_sha256(partial),
        "networks": networks,
        "timestep_shift": timestep_shift,  # at which the DiT was trained, and so is to be sampled
        "origin": origin,
    }
    told = folder / f"{MANIFEST}.partial"
    told.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / TENSORS)
    told.replace(folder / MANIFEST)


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest, if the tensors are those that it is of."""
    manifest, path = read_manifest(folder), folder / TENSORS
    found = file_sha256(path) if path.is_file() else "missing"
    if found != manifest["sha256"]:
        raise WeightsError(f"{path}: sha256 is {found}, the manifest says {manifest['sha256']}; {_advice(folder)}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `add_to_mini` wrote beside the tensors.

    Raises:
        WeightsError: no manifest, or not a readable one, or one of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder / MANIFEST} cannot be read ({error}), expected the manifest of the embedded model; "
            f"{_advice(folder)}"
        ) from error
    missing = [key for key in ("sha256", "networks", "timestep_shift", "origin") if key not in manifest]
    if missing:
        raise WeightsError(
            f"{folder / MANIFEST} has no {', '.join(missing)}: another version wrote it; train its weights again"
        )
    return manifest


def _advice(folder: Path) -> str:
    if folder.resolve() == FOLDER.resolve():
        return "install the package again"
    return (
        f"name a folder that streamt1 train-mini has written, or take {TENSORS} and {MANIFEST} away and let the "
        "command that made them write them anew with --resume"
    )


def load_mini(folder: Path, network: str, abstract: PyTree) -> PyTree:
    """The parameters of one network, in the types of `abstract`; the file is verified first.

    Raises:
        WeightsError: the file is not the manifest's, or does not hold the network in these shapes.
    """
    from safetensors import safe_open

    manifest, path = _verify(folder), folder / TENSORS
    if network not in manifest["networks"]:
        only, others = (" --only rewards", ", or name other --rewards") if network.startswith("reward_") else ("", "")
        raise WeightsError(
            f"{path} holds {', '.join(manifest['networks'])} and no {network}, expected it there; "
            f"make it with: streamt1 train-mini --out DIR{only}{others}"
        )
    names = [f"{network}/{name}" for name, _ in _named(abstract)]
    leaves, structure = jax.tree.flatten(abstract)
    with safe_open(path, "numpy") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
        wrong = [
            f"{name} is {stored.get(name, 'missing')}, expected {list(leaf.shape)}"
            for name, leaf in zip(names, leaves, strict=True)
            if list(stored.get(name, [])) != list(leaf.shape)
        ]
        if wrong:
            raise WeightsError(f"{path} was made for another size of the embedded model: {'; '.join(wrong[:3])}")
        made = [jnp.asarray(file.get_tensor(name), leaf.dtype) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def _named(params: PyTree) -> list[tuple[str, Any]]:
    """(name, leaf) of every parameter, such as ("blocks/ffn_in/kernel", ...)."""
    pairs = jax.tree_util.tree_leaves_with_path(params)
    return [("/".join(str(key.key) for key in path if hasattr(key, "key")), leaf) for path, leaf in pairs]
