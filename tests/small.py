"""A model smaller than `ModelConfig.tiny`: every part of the networks, in programs that compile fast."""

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


class SmallWeights:
    """The small model as a source of parameters, with the embedded model's tokenizer."""

    config = SMALL
    tokenizer = MiniWeights.tokenizer

    def generator_params(self, dtype: Any) -> Any:
        return {name: random_params(network_graph(SMALL, name, dtype)[1], 0) for name in ("dit", "decoder")}

    def text_params(self, dtype: Any) -> Any:
        return random_params(network_graph(SMALL, "text", dtype)[1], 0)

    def describe(self) -> dict[str, Any]:
        return {"name": "small", "summary": "random numbers", "trained": False}
