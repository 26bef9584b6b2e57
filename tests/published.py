"""Tiny checkpoints with random weights in every published layout, as files: what the conversion is tested on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import streamt1_jax
from streamt1_jax.config import DiTConfig, ModelConfig, UMT5Config, VAEConfig

DATA = Path(__file__).parent / "data"
TOKENIZER = Path(streamt1_jax.__file__).parent / "mini" / "tokenizer"
LAYERS = 2

# The same in every layout. A prompt has 512 tokens, which no config of diffusers can change; the tokenizer 725 entries.
TINY = ModelConfig(
    dit=DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=LAYERS, freq_dim=8, text_dim=16),
    vae=VAEConfig(dim=4),
    text=UMT5Config(vocab_size=1024, dim=16, num_heads=2, head_dim=8, ffn_dim=40, num_layers=LAYERS),
    height=32,
    width=48,
)

# Full sizes to tiny ones, in the lists of published keys.
_DIT = {1536: 24, 8960: 32, 9216: 144, 256: 8, 4096: 16}
_UMT5 = {256384: 1024, 4096: 16, 10240: 40, 64: 2}


def keys(name: str) -> dict[str, tuple[int, ...]]:
    """Every key and shape of a published full-size checkpoint."""
    return {
        key: tuple(shape) for key, shape in json.loads((DATA / "checkpoint_keys" / f"{name}.json").read_text()).items()
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}


def _first_layers(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {k: s for k, s in shapes.items() if not (m := re.search(r"blocks\.(\d+)\.", k)) or int(m[1]) < LAYERS}


def _shrunk(shapes: dict[str, tuple[int, ...]], sizes: dict[int, int]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(sizes.get(n, n) for n in shape) for key, shape in _first_layers(shapes).items()}


def dit_tensors(prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + key: x for key, x in random_tensors(_shrunk(keys("wan2.1_t2v_1.3b_dit"), _DIT), 1).items()}


def vae_tensors() -> dict[str, np.ndarray]:
    shapes = keys("wan2.1_vae")
    return random_tensors({key: tuple(n // 24 if n % 96 == 0 else n for n in s) for key, s in shapes.items()}, 2)


def umt5_tensors() -> dict[str, np.ndarray]:
    return random_tensors(_shrunk(keys("umt5_xxl_encoder"), _UMT5), 3)


def lora_tensors(rank: int = 3) -> dict[str, np.ndarray]:
    return random_tensors(_shrunk(keys("longlive_lora"), _DIT | {256: rank}), 4)


def as_torch(tensors: dict[str, np.ndarray], dtype: str = "float32") -> dict[str, Any]:
    import torch  # Here, not above: tests that kill a process start many.

    return {key: torch.from_numpy(x).to(getattr(torch, dtype)) for key, x in tensors.items()}


def write_sharded(folder: Path, tensors: dict[str, np.ndarray], stem: str = "diffusion_pytorch_model") -> None:
    """Two safetensors files and their index, as the hub has them."""
    names = [f"{stem}-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: x for key, x in tensors.items() if where[key] == name}, folder / name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_wan(folder: Path, *, dit: dict[str, np.ndarray] | None = None, sharded: bool = True) -> Path:
    """The Wan2.1 release's folder."""
    import torch

    folder.mkdir()
    dit = dit or dit_tensors()
    if sharded:
        write_sharded(folder, dit)
    else:
        save_file(dit, folder / "diffusion_pytorch_model.safetensors")
    c = TINY.dit
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": c.dim, "ffn_dim": c.ffn_dim, "eps": c.eps}
    config |= {"freq_dim": c.freq_dim, "in_dim": c.in_dim, "out_dim": c.out_dim, "num_heads": c.num_heads}
    config |= {"num_layers": c.num_layers, "text_len": c.text_len}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(as_torch(umt5_tensors(), "bfloat16"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(as_torch(vae_tensors()), folder / "Wan2.1_VAE.pth")
    shutil.copytree(TOKENIZER, folder / "google" / "umt5-xxl")
    return folder


def write_diffusers(folder: Path) -> Path:
    """The same sizes, saved by diffusers and transformers themselves."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    torch.manual_seed(0)
    d, t = TINY.dit, TINY.text
    transformer = WanTransformer3DModel(
        num_attention_heads=d.num_heads,
        attention_head_dim=d.head_dim,
        text_dim=d.text_dim,
        freq_dim=d.freq_dim,
        ffn_dim=d.ffn_dim,
        num_layers=d.num_layers,
    )
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    AutoencoderKLWan(base_dim=TINY.vae.dim).save_pretrained(folder / "vae")
    text = TheirConfig(
        vocab_size=t.vocab_size,
        d_model=t.dim,
        d_kv=t.head_dim,
        d_ff=t.ffn_dim,
        num_heads=t.num_heads,
        num_layers=t.num_layers,
        feed_forward_proj="gated-gelu",
    )
    UMT5EncoderModel(text).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    return folder


def golden_lora() -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """The recorded LoRA case by its prefixes (base, lora, merged; the rest under ""), and its JSON."""
    parts: dict[str, dict[str, np.ndarray]] = {"base": {}, "lora": {}, "merged": {}, "": {}}
    for name, x in load_file(DATA / "lora.safetensors").items():
        prefix, _, key = name.partition(".")
        parts[prefix if prefix in parts else ""][key if prefix in parts else name] = x
    return parts, json.loads((DATA / "lora.json").read_text())
