"""A model smaller than `ModelConfig.tiny`: every part of the networks, in programs that compile fast."""

import dataclasses
from typing import Any

from streamt1_jax.config import DiTConfig, ModelConfig, UMT5Config, VAEConfig
from streamt1_jax.networks import network_graph
from streamt1_jax.weights import MiniWeights, random_params

SMALL = ModelConfig(
    dit=DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=8, text_dim=8, text_len=16),
    vae=VAEConfig(dim=8, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)),
    text=UMT5Config(vocab_size=1024, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=1),
    height=16,
    width=32,
)


# As fast in time as the published ones, for the command line: it counts in 12k - 3 frames.
SMALL_IN_TIME = dataclasses.replace(
    SMALL, vae=VAEConfig(dim=8, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True))
)


class SmallWeights:
    """A small model as a source of parameters, with the embedded model's tokenizer."""

    tokenizer = MiniWeights.tokenizer
    default_rewards, own_rewards = "native", None

    def __init__(self, config: ModelConfig = SMALL, seed: int = 0):
        self.config, self.seed = config, seed

    def generator_params(self, dtype: Any) -> Any:
        return {name: self._random(name, dtype) for name in ("dit", "decoder")}

    def text_params(self, dtype: Any) -> Any:
        return self._random("text", dtype)

    def _random(self, name: str, dtype: Any) -> Any:
        return random_params(network_graph(self.config, name, dtype)[1], self.seed)

    def describe(self) -> dict[str, Any]:
        return {"name": "small", "summary": f"random numbers of seed {self.seed}", "trained": False}
