"""Where a pipeline's parameters come from: a converted checkpoint, or the embedded model.

Both give the same three things: the networks' graphs, their parameters, and a plain description for the record.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from streamt1_jax.checkpoint import load_params, open_checkpoint, verify
from streamt1_jax.config import ModelConfig
from streamt1_jax.mini import shipped
from streamt1_jax.networks import network_graph


@runtime_checkable
class Weights(Protocol):
    """A source of parameters."""

    config: ModelConfig
    tokenizer: Path
    default_rewards: str  # the built-in name that judges where none is asked for
    own_rewards: Path | None  # the folder that "mini" comes from; None: the package's

    def generator_params(self, dtype: Any) -> PyTree:
        """`{"dit", "decoder"}`, what `wan_generator` takes."""
        ...

    def text_params(self, dtype: Any) -> PyTree: ...

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of them; `summary` is one line for people."""
        ...


def random_params(abstract: PyTree, seed: int) -> PyTree:
    """Parameters for measuring or trying a network that has no weights: unit gains, zero biases, kernels of
    variance 1 / fan-in. Drawn by NumPy, in the order of the leaves: no program is compiled for it."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(path[-1].key)
        if name in ("scale", "gamma"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Of three axes the first is the layer: only dense kernels are stacked.
        inputs = leaf.shape[1:-1] if leaf.ndim == 3 else leaf.shape[:-1]
        fan_in = {"kernel": math.prod(inputs), "modulation": leaf.shape[-1]}.get(name, 1)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * fan_in**-0.5, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(abstract))
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return state


class MiniWeights:
    """The embedded model: what the package ships, or what `streamt1 train-mini` wrote."""

    tokenizer = Path(__file__).parent / "mini" / "tokenizer"
    default_rewards = "mini"

    def __init__(self, folder: str | Path = shipped.FOLDER):
        self.folder = Path(folder)
        self.manifest = shipped.read_manifest(self.folder)
        self.config = dataclasses.replace(ModelConfig.mini(), timestep_shift=self.manifest["timestep_shift"])
        self.own_rewards: Path | None = self.folder

    def generator_params(self, dtype: Any) -> PyTree:
        return {"dit": self._load("dit", dtype), "decoder": self._load("vae", dtype)["decoder"]}

    def text_params(self, dtype: Any) -> PyTree:
        return self._load("text", dtype)

    def _load(self, network: str, dtype: Any) -> PyTree:
        return shipped.load_mini(self.folder, network, network_graph(self.config, network, dtype)[1])

    def describe(self) -> dict[str, Any]:
        return {
            "name": "mini",
            "summary": self.manifest["origin"]["summary"],
            "trained": True,
            "origin": self.manifest["origin"],
            "sha256": self.manifest["sha256"],
        }


class CheckpointWeights:
    """A folder that `streamt1 convert` wrote; every file is verified before its parameters are read."""

    default_rewards = "native"
    own_rewards: Path | None = None

    def __init__(self, folder: str | Path):
        self.checkpoint = open_checkpoint(folder)
        self.config = self.checkpoint.config
        self.tokenizer = self.checkpoint.tokenizer_dir

    def generator_params(self, dtype: Any) -> PyTree:
        verify(self.checkpoint)
        vae = load_params(self.checkpoint, "vae", dtype)
        return {"dit": load_params(self.checkpoint, "dit", dtype), "decoder": vae["decoder"]}

    def text_params(self, dtype: Any) -> PyTree:
        return load_params(self.checkpoint, "text", dtype)

    def describe(self) -> dict[str, Any]:
        manifest = self.checkpoint.manifest
        hashes = {name: entry["params_sha256"] for name, entry in manifest["networks"].items()}
        return {
            "name": self.checkpoint.dir.name,
            "summary": manifest["origin"]["summary"],
            "trained": True,
            "origin": manifest["origin"],
            "params_sha256": hashes,
        }


def find_weights(name_or_dir: str | Path) -> Weights:
    """The embedded model for "mini", or what stands in a folder: of the same model, or a converted checkpoint.

    Raises:
        WeightsError: no such checkpoint.
    """
    if str(name_or_dir) == "mini":
        return MiniWeights()
    return MiniWeights(name_or_dir) if shipped.is_mini(name_or_dir) else CheckpointWeights(name_or_dir)


def default_dtype() -> Any:
    """bfloat16 on an accelerator; float32 on a CPU, where 16 bits are emulated."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
