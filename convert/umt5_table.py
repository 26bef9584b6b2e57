"""The UMT5 encoder's tables: the file of the Wan2.1 release, and the transformers spelling.

Both hold linear weights as [out, in]. In the release's names `ffn.gate.0` is the linear map before the
GELU; transformers calls it `wi_0`, and `wi_1` the map without activation.
"""

from convert.engine import Rule


def wan_umt5_rules() -> list[Rule]:
    """Rules for `models_t5_umt5-xxl-enc-bf16.pth` onto `streamt1_jax.models.umt5.UMT5Encoder`."""
    block = r"blocks\.(?P<layer>\d+)\."
    return [
        Rule(r"token_embedding\.weight", "token_embedding.embedding"),
        Rule(block + r"(?P<norm>norm[12])\.weight", "layers.{norm}.scale"),
        Rule(block + r"attn\.(?P<part>[qkvo])\.weight", "layers.attention.{part}.kernel", "linear"),
        Rule(block + r"pos_embedding\.embedding\.weight", "layers.attention.position_bias"),
        Rule(block + r"ffn\.gate\.0\.weight", "layers.ffn.gate.kernel", "linear"),
        Rule(block + r"ffn\.(?P<part>fc[12])\.weight", "layers.ffn.{part}.kernel", "linear"),
        Rule(r"norm\.weight", "norm.scale"),
    ]


def transformers_umt5_rules() -> list[Rule]:
    """Rules for the state dict of `transformers.UMT5EncoderModel`, as in Wan2.1's diffusers folders."""
    block = r"encoder\.block\.(?P<layer>\d+)\.layer\."
    attention = block + r"0\.SelfAttention\."
    ffn = block + r"1\.DenseReluDense\."
    return [
        Rule(r"shared\.weight", "token_embedding.embedding"),
        # The same tensor under its second name; a file may hold both or `shared` alone.
        Rule(r"encoder\.embed_tokens\.weight", None),
        Rule(block + r"0\.layer_norm\.weight", "layers.norm1.scale"),
        Rule(attention + r"(?P<part>[qkvo])\.weight", "layers.attention.{part}.kernel", "linear"),
        Rule(attention + r"relative_attention_bias\.weight", "layers.attention.position_bias"),
        Rule(block + r"1\.layer_norm\.weight", "layers.norm2.scale"),
        Rule(ffn + r"wi_0\.weight", "layers.ffn.gate.kernel", "linear"),
        Rule(ffn + r"wi_1\.weight", "layers.ffn.fc1.kernel", "linear"),
        Rule(ffn + r"wo\.weight", "layers.ffn.fc2.kernel", "linear"),
        Rule(r"encoder\.final_layer_norm\.weight", "norm.scale"),
    ]
