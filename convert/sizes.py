"""The sizes of a published checkpoint: from its config.json where there is one, otherwise from its shapes.

What a config says that this program does not have (image input, another patch, another norm) is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamt1_jax.config import PATCH, DiTConfig, ModelConfig, UMT5Config, VAEConfig
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.models.vae import LATENT_MEAN, LATENT_STD

Shapes = Mapping[str, tuple[int, ...]]

_WAN_HEAD_DIM = 128  # In every published Wan2.1 size; no shape tells it.


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json; empty if it has none.

    Raises:
        WeightsError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path}: is not JSON ({error}), expected a config. Download it again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: holds a {type(config).__name__}, expected an object. Download it again.")
    return config


def _refuse(name: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses a config that sets a key to anything but the one value that this program has."""
    wrong = [
        f"{key} {config[key]!r}, not {value!r}" for key, value in expected.items() if config.get(key, value) != value
    ]
    if wrong:
        raise WeightsError(f"{name}: config.json has {'; '.join(wrong)}. Convert a Wan2.1 text-to-video checkpoint.")


def _shape(name: str, shapes: Shapes, key: str, rank: int) -> tuple[int, ...]:
    if key not in shapes or len(shapes[key]) != rank:
        found = f"of shape {tuple(shapes[key])}" if key in shapes else "missing"
        raise WeightsError(
            f"{name}: {key} is {found}, expected it with {rank} axes. Check that this is its checkpoint."
        )
    return tuple(shapes[key])


def _layers(shapes: Shapes, before: str) -> int:
    numbers = {key.removeprefix(before).split(".")[0] for key in shapes if key.startswith(before)}
    return len(numbers)


def _make(kind: type, name: str, values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except (BadInputError, TypeError) as error:
        raise WeightsError(f"{name}: {error}. Check its config.json.") from error


def model_config(dit: DiTConfig, vae: VAEConfig, text: UMT5Config, size: tuple[int, int]) -> ModelConfig:
    """The three networks together.

    Args:
        size: height and width of video that the weights were made for, in pixels.

    Raises:
        WeightsError: their sizes contradict each other: they are of different models.
    """
    try:
        return ModelConfig(dit, vae, text, *size)
    except BadInputError as error:
        raise WeightsError(f"{error}. Use the VAE and the text encoder of the same release.") from error


def wan_dit_config(shapes: Shapes, config: Mapping[str, Any], prefix: str = "") -> DiTConfig:
    """Sizes of a DiT in Wan's names.

    Args:
        config: its config.json, or empty; what it lacks is taken from the shapes, or is the published value.
        prefix: stands before every key.
    """
    name = "DiT"
    one = {"model_type": "t2v", "patch_size": [1, PATCH, PATCH], "qk_norm": True, "cross_attn_norm": True}
    _refuse(name, config, one)
    dim, in_dim, *_ = _shape(name, shapes, prefix + "patch_embedding.weight", 5)
    sizes = {
        "dim": dim,
        "in_dim": in_dim,
        "ffn_dim": _shape(name, shapes, prefix + "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": _layers(shapes, prefix + "blocks."),
        "freq_dim": _shape(name, shapes, prefix + "time_embedding.0.weight", 2)[1],
        "text_dim": _shape(name, shapes, prefix + "text_embedding.0.weight", 2)[1],
        "out_dim": _shape(name, shapes, prefix + "head.head.weight", 2)[0] // PATCH**2,
    }
    if "num_heads" not in config:
        if dim % _WAN_HEAD_DIM:
            raise WeightsError(
                f"{name}: dim {dim} is no multiple of {_WAN_HEAD_DIM}, expected a config.json with num_heads. "
                "Put it beside the weights."
            )
        sizes["num_heads"] = dim // _WAN_HEAD_DIM
    known = (*sizes, "num_heads", "text_len", "eps")
    return _make(DiTConfig, name, sizes | {key: config[key] for key in known if key in config})


def diffusers_dit_config(config: Mapping[str, Any]) -> DiTConfig:
    """Sizes from the config.json of a `WanTransformer3DModel`."""
    one = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, PATCH, PATCH],
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "image_dim": None,
        "added_kv_proj_dim": None,
    }
    _refuse("transformer", config, one)
    names = {
        "num_heads": "num_attention_heads",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "text_dim": "text_dim",
        "freq_dim": "freq_dim",
        "ffn_dim": "ffn_dim",
        "num_layers": "num_layers",
        "eps": "eps",
    }
    values = _renamed("transformer", config, names | {"dim": "attention_head_dim"})
    return _make(DiTConfig, "transformer", values | {"dim": values["num_heads"] * values["dim"]})


def wan_vae_config(shapes: Shapes) -> VAEConfig:
    """Sizes of a VAE in Wan's names, which comes without a config: read from the encoder's list of stages."""
    name = "VAE"
    dim = _shape(name, shapes, "encoder.conv1.weight", 5)[0]
    z_dim = _shape(name, shapes, "decoder.conv1.weight", 5)[1]
    mults, blocks, temporal, count, at = [], set(), [], 0, 0
    width = dim
    while True:
        stage = f"encoder.downsamples.{at}."
        if stage + "residual.2.weight" in shapes:
            width, count = shapes[stage + "residual.2.weight"][0], count + 1
        else:
            mults.append(width // dim)
            blocks.add(count)
            count = 0
            if stage + "resample.1.weight" not in shapes:
                break
            temporal.append(stage + "time_conv.weight" in shapes)
        at += 1
    if len(blocks) != 1:
        raise WeightsError(
            f"{name}: levels of {sorted(blocks)} residual blocks, expected as many each. Check the file."
        )
    values = {"dim_mult": tuple(mults), "num_res_blocks": blocks.pop(), "temporal_downsample": tuple(temporal)}
    return _make(VAEConfig, name, {"dim": dim, "z_dim": z_dim, **values})


def diffusers_vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """Sizes from the config.json of an `AutoencoderKLWan`."""
    one = {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "decoder_base_dim": None,
        "is_residual": False,
        "patch_size": None,
        "in_channels": 3,
        "out_channels": 3,
        "latents_mean": list(LATENT_MEAN),
        "latents_std": list(LATENT_STD),
    }
    _refuse("vae", config, one)
    names = {
        "dim": "base_dim",
        "z_dim": "z_dim",
        "dim_mult": "dim_mult",
        "num_res_blocks": "num_res_blocks",
        "temporal_downsample": "temperal_downsample",
    }
    values = _renamed("vae", config, names)
    return _make(VAEConfig, "vae", {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()})


def wan_umt5_config(shapes: Shapes) -> UMT5Config:
    """Sizes of a UMT5 encoder in Wan's names, which comes without a config."""
    name = "UMT5"
    vocab_size, dim = _shape(name, shapes, "token_embedding.weight", 2)
    buckets, heads = _shape(name, shapes, "blocks.0.pos_embedding.embedding.weight", 2)
    sizes = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_heads": heads,
        "head_dim": _shape(name, shapes, "blocks.0.attn.q.weight", 2)[0] // heads,
        "ffn_dim": _shape(name, shapes, "blocks.0.ffn.fc1.weight", 2)[0],
        "num_layers": _layers(shapes, "blocks."),
        "num_buckets": buckets,
    }
    return _make(UMT5Config, name, sizes)


def transformers_umt5_config(config: Mapping[str, Any]) -> UMT5Config:
    """Sizes from the config.json of a `UMT5EncoderModel`."""
    one = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}
    _refuse("text_encoder", config, one)
    names = {
        "vocab_size": "vocab_size",
        "dim": "d_model",
        "num_heads": "num_heads",
        "head_dim": "d_kv",
        "ffn_dim": "d_ff",
        "num_layers": "num_layers",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "eps": "layer_norm_epsilon",
    }
    return _make(UMT5Config, "text_encoder", _renamed("text_encoder", config, names))


def _renamed(name: str, config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    missing = [theirs for theirs in names.values() if theirs not in config]
    if missing:
        raise WeightsError(f"{name}: config.json lacks {', '.join(missing)}, expected its sizes. Download it again.")
    return {ours: config[theirs] for ours, theirs in names.items()}
