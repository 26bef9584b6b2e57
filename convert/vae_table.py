"""The Wan VAE's parameters in the two published spellings: `Wan2.1_VAE.pth` and diffusers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from convert.engine import Rule
from streamt1_jax.config import VAEConfig
from streamt1_jax.models.vae import decoder_widths, encoder_widths


@dataclass(frozen=True)
class Spelling:
    """How a checkpoint names what both spellings hold.

    `block(side, level, index)` is a residual block; index `num_blocks` of a level is its resampling.
    """

    quant: str
    post_quant: str
    conv_in: str
    norm_out: str
    conv_out: str
    middle: tuple[str, str, str]
    residual: dict[str, str]
    block: Callable[[str, int, int, int], str]


def _wan_block(side: str, level: int, index: int, num_blocks: int) -> str:
    """One flat list: every level is its blocks and one resampling."""
    return f"{'downsamples' if side == 'encoder' else 'upsamples'}.{level * (num_blocks + 1) + index}"


def _diffusers_block(side: str, level: int, index: int, num_blocks: int) -> str:
    """The encoder is one flat list, the decoder one of levels."""
    if side == "encoder":
        return f"down_blocks.{level * (num_blocks + 1) + index}"
    return f"up_blocks.{level}." + (f"resnets.{index}" if index < num_blocks else "upsamplers.0")


WAN = Spelling(
    quant="conv1",
    post_quant="conv2",
    conv_in="conv1",
    norm_out="head.0",
    conv_out="head.2",
    middle=("middle.0", "middle.1", "middle.2"),
    residual={
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "shortcut": "shortcut",
    },
    block=_wan_block,
)
DIFFUSERS = Spelling(
    quant="quant_conv",
    post_quant="post_quant_conv",
    conv_in="conv_in",
    norm_out="norm_out",
    conv_out="conv_out",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    residual={"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"},
    block=_diffusers_block,
)


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(re.escape(f"{source}.gamma"), f"{target}.scale", "vector")]


def _conv(source: str, target: str, layout: str) -> list[Rule]:
    return [
        Rule(re.escape(f"{source}.weight"), f"{target}.kernel", layout),
        Rule(re.escape(f"{source}.bias"), f"{target}.bias"),
    ]


def _residual(source: str, target: str, names: dict[str, str], widths: tuple[int, int]) -> list[Rule]:
    rules = _norm(f"{source}.{names['norm1']}", f"{target}.norm1") + _norm(
        f"{source}.{names['norm2']}", f"{target}.norm2"
    )
    for conv in ("conv1", "conv2"):
        rules += _conv(f"{source}.{names[conv]}", f"{target}.{conv}", "conv3d")
    if widths[0] != widths[1]:
        rules += _conv(f"{source}.{names['shortcut']}", f"{target}.shortcut", "conv_as_linear")
    return rules


def _middle(side: str, names: Spelling) -> list[Rule]:
    block1, attention, block2 = (f"{side}.{name}" for name in names.middle)
    return [
        *_residual(block1, f"{side}.middle.block1", names.residual, (1, 1)),
        *_norm(f"{attention}.norm", f"{side}.middle.attention.norm"),
        *_conv(f"{attention}.to_qkv", f"{side}.middle.attention.qkv", "conv_as_linear"),
        *_conv(f"{attention}.proj", f"{side}.middle.attention.out", "conv_as_linear"),
        *_residual(block2, f"{side}.middle.block2", names.residual, (1, 1)),
    ]


def _levels(
    side: str, names: Spelling, widths: list[tuple[int, int]], in_time: tuple[bool, ...], num_blocks: int
) -> list[Rule]:
    rules = []
    for level, (din, dout) in enumerate(widths):
        target = f"{side}.levels.{level}"
        for index in range(num_blocks):
            source = f"{side}.{names.block(side, level, index, num_blocks)}"
            pair = (din if index == 0 else dout, dout)
            rules += _residual(source, f"{target}.blocks.{index}", names.residual, pair)
        if level < len(in_time):
            source = f"{side}.{names.block(side, level, num_blocks, num_blocks)}"
            rules += _conv(f"{source}.resample.1", f"{target}.resample.conv", "conv2d")
            if in_time[level]:
                rules += _conv(f"{source}.time_conv", f"{target}.resample.time_conv", "conv3d")
    return rules


def _rules(config: VAEConfig, names: Spelling) -> list[Rule]:
    rules = _conv(names.quant, "encoder.quant", "conv_as_linear")
    rules += _conv(names.post_quant, "decoder.post_quant", "conv_as_linear")
    for side in ("encoder", "decoder"):
        rules += _conv(f"{side}.{names.conv_in}", f"{side}.conv_in", "conv3d")
        rules += _middle(side, names)
        rules += _norm(f"{side}.{names.norm_out}", f"{side}.norm_out")
        rules += _conv(f"{side}.{names.conv_out}", f"{side}.conv_out", "conv3d")
    down, blocks = config.temporal_downsample, config.num_res_blocks
    rules += _levels("encoder", names, encoder_widths(config), down, blocks)
    rules += _levels("decoder", names, decoder_widths(config), down[::-1], blocks + 1)
    return rules


def wan_vae_rules(config: VAEConfig) -> list[Rule]:
    """`Wan2.1_VAE.pth` into `WanVAE`."""
    return _rules(config, WAN)


def diffusers_vae_rules(config: VAEConfig) -> list[Rule]:
    """The `vae` folder of a diffusers repository (`AutoencoderKLWan`) into `WanVAE`."""
    return _rules(config, DIFFUSERS)
