"""The networks by name: their structure and the shapes of their parameters, without taking memory."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx

from streamt1_jax.config import ModelConfig
from streamt1_jax.models.dit import CausalWanDiT
from streamt1_jax.models.umt5 import UMT5Encoder
from streamt1_jax.models.vae import Decoder, WanVAE

_CLASSES = {"dit": CausalWanDiT, "vae": WanVAE, "decoder": Decoder, "text": UMT5Encoder}
_SECTIONS = {"dit": "dit", "vae": "vae", "decoder": "vae", "text": "text"}


def network_graph(config: ModelConfig, network: str, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """(graph, abstract parameters) of a network; `nnx.merge(graph, parameters)` is the module.

    Args:
        network: "dit", "vae" (both halves), "decoder" (all of the VAE that generating needs) or "text".
        dtype: of parameters and activations.
    """
    return _graph(config, network, jnp.dtype(dtype))


@functools.cache
def _graph(config: ModelConfig, network: str, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
    section = getattr(config, _SECTIONS[network])
    return nnx.split(nnx.eval_shape(lambda: _CLASSES[network](section, dtype=dtype, rngs=nnx.Rngs(0))))
