"""The DiT's tables: Wan2.1's own names, LongLive's (the same behind `model.`) and the diffusers spelling.

The three hold the same tensors in the same order; only the names differ. In particular the patch axis of the
input convolution (channel, row, column) and the output axis of the head (row, column, channel) are the same.
"""

from convert.engine import Rule


def wan_dit_rules(prefix: str = "") -> list[Rule]:
    """Rules for `diffusion_pytorch_model*.safetensors` of Wan2.1-T2V onto `streamt1_jax.models.dit.CausalWanDiT`.

    Args:
        prefix: a regular expression before every key.
    """
    block = prefix + r"blocks\.(?P<layer>\d+)\."
    part = r"(?P<attn>self_attn|cross_attn)\."
    return [
        Rule(prefix + r"patch_embedding\.weight", "patch_embedding.kernel", "conv_as_linear"),
        Rule(prefix + r"patch_embedding\.bias", "patch_embedding.bias"),
        *_linear(prefix + r"text_embedding\.0", "text_in"),
        *_linear(prefix + r"text_embedding\.2", "text_out"),
        *_linear(prefix + r"time_embedding\.0", "time_in"),
        *_linear(prefix + r"time_embedding\.2", "time_out"),
        *_linear(prefix + r"time_projection\.1", "time_projection"),
        Rule(block + "modulation", "blocks.modulation", "squeeze"),
        *_linear(block + part + r"(?P<proj>[qkvo])", "blocks.{attn}.{proj}"),
        Rule(block + part + r"(?P<norm>norm_[qk])\.weight", "blocks.{attn}.{norm}.scale"),
        Rule(block + r"norm3\.weight", "blocks.cross_norm.scale"),
        Rule(block + r"norm3\.bias", "blocks.cross_norm.bias"),
        *_linear(block + r"ffn\.0", "blocks.ffn_in"),
        *_linear(block + r"ffn\.2", "blocks.ffn_out"),
        Rule(prefix + r"head\.modulation", "head.modulation", "squeeze"),
        *_linear(prefix + r"head\.head", "head.projection"),
    ]


def longlive_dit_rules() -> list[Rule]:
    """Rules for the generator of LongLive and Self-Forcing: Wan's names behind `model.` (METHOD section 9)."""
    return wan_dit_rules(prefix=r"model\.")


def diffusers_dit_rules() -> list[Rule]:
    """Rules for the state dict of `diffusers.WanTransformer3DModel`, as in Wan2.1's diffusers folders."""
    block = r"blocks\.(?P<layer>\d+)\."
    condition = r"condition_embedder\."
    rules = [
        Rule(r"patch_embedding\.weight", "patch_embedding.kernel", "conv_as_linear"),
        Rule(r"patch_embedding\.bias", "patch_embedding.bias"),
        *_linear(condition + r"text_embedder\.linear_1", "text_in"),
        *_linear(condition + r"text_embedder\.linear_2", "text_out"),
        *_linear(condition + r"time_embedder\.linear_1", "time_in"),
        *_linear(condition + r"time_embedder\.linear_2", "time_out"),
        *_linear(condition + "time_proj", "time_projection"),
        Rule(block + "scale_shift_table", "blocks.modulation", "squeeze"),
        Rule(block + r"norm2\.weight", "blocks.cross_norm.scale"),
        Rule(block + r"norm2\.bias", "blocks.cross_norm.bias"),
        *_linear(block + r"ffn\.net\.0\.proj", "blocks.ffn_in"),
        *_linear(block + r"ffn\.net\.2", "blocks.ffn_out"),
        Rule("scale_shift_table", "head.modulation", "squeeze"),
        *_linear("proj_out", "head.projection"),
    ]
    for number, attn in ((1, "self_attn"), (2, "cross_attn")):
        theirs, ours = rf"{block}attn{number}\.", f"blocks.{attn}."
        rules += _linear(theirs + r"to_(?P<proj>[qkv])", ours + "{proj}")
        rules += _linear(theirs + r"to_out\.0", ours + "o")
        rules.append(Rule(theirs + r"(?P<norm>norm_[qk])\.weight", ours + "{norm}.scale"))
    return rules


def _linear(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(theirs + r"\.weight", ours + ".kernel", "linear"),
        Rule(theirs + r"\.bias", ours + ".bias"),
    ]
