"""Where a pipeline's parameters come from: a converted checkpoint, or the embedded model.

Both give the same three things: the networks' graphs, their parameters, and a plain description for the record.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from streamt1_jax.config import ModelConfig
from streamt1_jax.generator import decoder_graph, dit_graph
from streamt1_jax.models.dit import CausalWanDiT
from streamt1_jax.models.umt5 import UMT5Encoder
from streamt1_jax.models.vae import Decoder

MINI_SEED = 0


class Weights(Protocol):
    """A source of parameters."""

    config: ModelConfig
    tokenizer: Path

    def generator_params(self, dtype: Any) -> PyTree:
        """`{"dit", "decoder"}`, what `wan_generator` takes."""
        ...

    def text_params(self, dtype: Any) -> PyTree: ...

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of them; `summary` is one line for people."""
        ...


@functools.cache
def text_graph(config: ModelConfig, dtype: Any) -> tuple[Any, PyTree]:
    """(graph, abstract parameters) of the text encoder; no memory is taken."""
    return nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config.text, dtype=dtype, rngs=nnx.Rngs(0))))


class MiniWeights:
    """The embedded model. Its weights are not trained yet: random numbers from a fixed seed."""

    config = ModelConfig.mini()
    tokenizer = Path(__file__).parent / "mini" / "tokenizer"

    def generator_params(self, dtype: Any) -> PyTree:
        return {
            "dit": _draw(lambda rngs: CausalWanDiT(self.config.dit, dtype=dtype, rngs=rngs)),
            "decoder": _draw(lambda rngs: Decoder(self.config.vae, dtype=dtype, rngs=rngs)),
        }

    def text_params(self, dtype: Any) -> PyTree:
        return _draw(lambda rngs: UMT5Encoder(self.config.text, dtype=dtype, rngs=rngs))

    def describe(self) -> dict[str, Any]:
        return {
            "name": "mini",
            "summary": f"untrained: random weights from the fixed seed {MINI_SEED}",
            "trained": False,
        }


def _draw(make: Callable[[nnx.Rngs], nnx.Module]) -> PyTree:
    return jax.jit(lambda: nnx.state(make(nnx.Rngs(MINI_SEED)), nnx.Param))()


class CheckpointWeights:
    """A folder that `streamt1 convert` wrote, verified when it is opened."""

    def __init__(self, folder: str | Path):
        from streamt1_jax.checkpoint import load_checkpoint

        self.checkpoint = load_checkpoint(Path(folder))
        self.config = self.checkpoint.config
        self.tokenizer = self.checkpoint.dir / "tokenizer"

    def generator_params(self, dtype: Any) -> PyTree:
        return {
            "dit": self._load("dit", dit_graph(self.config, dtype)[1], dtype),
            "decoder": self._load("vae", decoder_graph(self.config, dtype)[1], dtype),
        }

    def text_params(self, dtype: Any) -> PyTree:
        return self._load("text", text_graph(self.config, dtype)[1], dtype)

    def describe(self) -> dict[str, Any]:
        return {"name": str(self.checkpoint.dir), "trained": True, "manifest": self.checkpoint.manifest}

    def _load(self, network: str, abstract: PyTree, dtype: Any) -> PyTree:
        raise NotImplementedError


def default_dtype() -> Any:
    """bfloat16 on an accelerator; float32 on a CPU, where 16 bits are emulated."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
