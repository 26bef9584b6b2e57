"""The recorded case of the reward models (tests/data/rewards_a), and the same models in other published layouts.

Cut down: without the resized frames themselves (their hashes are kept), and vocabularies that repeat tokenizer.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from convert.rewards import RewardSources
from streamt1_jax.rewards.model_settings import MODELS

CASE = Path(__file__).parent / "data" / "rewards_a"
PROMPTS: list[str] = json.loads((CASE / "prompts.json").read_text())["prompts"]
NOTES: dict[str, Any] = json.loads((CASE / "expected.json").read_text())
CHECKPOINT = "videoreward/checkpoint-11"
RANK, ALPHA = 4, 8


def recorded() -> dict[str, np.ndarray]:
    """Inputs and what the original code made of them."""
    return {**np.load(CASE / "inputs.npz"), **np.load(CASE / "expected.npz")}


def copy_case(folder: Path) -> Path:
    """A copy to change."""
    shutil.copytree(CASE, folder)
    return folder


def sources(folder: Path = CASE, models=MODELS, **options: Any) -> RewardSources:
    options = {"templates": [str(folder / "templates.json")], **options}
    places = {name: str(folder / name) for name in ("hpsv3", "videoreward", "base_image", "base_video")}
    return RewardSources(**places | {"models": models, **options})


def cli_sources(folder: Path = CASE) -> list[str]:
    """The same as options of `streamt1 convert rewards`."""
    options = {"--hpsv3": "hpsv3", "--videoreward": "videoreward", "--templates": "templates.json"}
    options |= {"--base-image": "base_image", "--base-video": "base_video"}
    return [word for option, name in options.items() for word in (option, str(folder / name))]


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; a dict changes keys inside, None takes a key away."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del values[key]
        elif isinstance(value, dict):
            values[key] = {**values.get(key, {}), **value}
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def to_adapter_layout(folder: Path) -> None:
    """Rewrites VideoReward as an adapter and what else was trained, over the base's own weights.

    The base's embedding gets the rows that its config speaks of, more than the tokenizer has.
    """
    checkpoint = folder / CHECKPOINT
    state = torch.load(checkpoint / "model.pth", weights_only=True)
    prefix = "base_model.model."
    lora = {key.replace(".default.", "."): x for key, x in state.items() if ".lora_" in key}
    others = {key.removeprefix(prefix): x for key, x in state.items() if ".lora_" not in key}
    plain = {key.replace(".base_layer.", "."): x for key, x in others.items()}
    trained = {key: plain.pop(key) for key in list(plain) if key.startswith(("rm_head.", "visual.merger."))}
    rows = json.loads((folder / "base_video/config.json").read_text())["vocab_size"]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.full((rows - len(plain[key]), plain[key].shape[1]), 7.0, dtype=plain[key].dtype)
        plain[key] = torch.cat([plain[key], extra])
    del plain["lm_head.weight"]  # tied: not in the file
    base_merger = {key: torch.zeros_like(x) for key, x in trained.items() if key.startswith("visual.")}
    save_file({**plain, **base_merger}, folder / "base_video/model.safetensors")
    save_file({key: x.contiguous() for key, x in lora.items()}, checkpoint / "adapter_model.safetensors")
    torch.save({prefix + key: x for key, x in trained.items()}, checkpoint / "non_lora_state_dict.pth")
    (checkpoint / "model.pth").unlink()


def with_three_outputs(folder: Path) -> torch.Tensor:
    """Gives VideoReward a head of three outputs; returns its weight [3, D] in float32."""
    path = folder / CHECKPOINT / "model.pth"
    state = torch.load(path, weights_only=True)
    key = "base_model.model.rm_head.weight"
    head = torch.randn(3, state[key].shape[1], generator=torch.Generator().manual_seed(0)).to(state[key].dtype)
    torch.save({**state, key: head}, path)
    edit_json(folder / "videoreward/model_config.json", model_config={"output_dim": 3})
    return head.float()


def to_hub_config(path: Path) -> None:
    """Rewrites a base's config.json as the hub has it: other rotary words, other vision keys, bfloat16."""
    sections = json.loads(path.read_text())["rope_scaling"]["mrope_section"]
    edit_json(path, torch_dtype="bfloat16", rope_scaling=None)
    vision = {"in_chans": 3, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14}
    edit_json(path, rope_scaling={"type": "mrope", "mrope_section": sections}, vision_config=vision)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
