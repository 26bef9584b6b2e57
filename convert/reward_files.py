"""What the files of the published reward models say, beside their weights; each is checked where it is read."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.sources import check_weights_file
from streamt1_jax.errors import WeightsError
from streamt1_jax.rewards.frames import PatchConfig, Resampler
from streamt1_jax.rewards.model_settings import DIMENSIONS, VideoRewardConfig

HUB = {
    "hpsv3": "MizzenAI/HPSv3",
    "videoreward": "KlingTeam/VideoReward",
    "base_image": "Qwen/Qwen2-VL-7B-Instruct",
    "base_video": "Qwen/Qwen2-VL-2B-Instruct",
}
MODEL_CONFIG = "model_config.json"
_SECTIONS = ("data_config", "model_config", "peft_lora_config", "inference_config")
_TOKEN_PIXELS = 28 * 28  # of one visual token, the smallest frame


def tokenizer_with(reserved: Sequence[str], folder: Path) -> str:
    """A folder's tokenizer as the text of `tokenizer.json`, the reserved tokens added where it lacks them.

    Raises:
        WeightsError: no tokenizer in the folder, or a broken one.
    """
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        check_weights_file(file)
    try:
        if file.is_file():
            backend = tokenizers.Tokenizer.from_file(str(file))
        else:  # older saves hold the vocabulary and the merges alone
            from transformers import AutoTokenizer

            backend = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # tokenizers raises the bare class
        raise WeightsError(
            f"{folder}: no usable tokenizer ({error}), expected tokenizer.json; download it again"
        ) from error
    missing = [token for token in reserved if backend.token_to_id(token) is None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in missing])
    return backend.to_str()


def chat_template_of(folder: Path) -> str:
    """The chat template of a base model: its processor's file, else its tokenizer's."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, str):
            return template
    raise WeightsError(
        f"{folder}: no chat_template in chat_template.json or tokenizer_config.json, expected Qwen2-VL's; download the "
        "base model's tokenizer again"
    )


def newest_checkpoint(folder: Path) -> Path:
    """The `checkpoint-N` with the largest N.

    Raises:
        WeightsError: there is none, or it holds neither a whole state dict nor an adapter.
    """
    numbered = [
        (int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    if not numbered:
        raise WeightsError(
            f"{folder}: holds no checkpoint-N, expected VideoReward's; download {HUB['videoreward']} again"
        )
    newest = max(numbered)[1]
    layouts = (("model.pth",), ("adapter_model.safetensors", "non_lora_state_dict.pth"))
    if not any(all((newest / name).is_file() for name in layout) for layout in layouts):
        expected = " or ".join(" with ".join(layout) for layout in layouts)
        raise WeightsError(f"{newest}: holds neither {expected}; download {HUB['videoreward']} again")
    return newest


def patches_of(base: Path, resampler: Resampler, min_pixels: int, max_pixels: int) -> PatchConfig:
    values = read_json(base / "preprocessor_config.json")
    try:
        sizes = {key: int(values[key]) for key in ("patch_size", "temporal_patch_size", "merge_size")}
        mean, std = (tuple(map(float, values[key])) for key in ("image_mean", "image_std"))
        if min(sizes.values()) < 1 or min(std) <= 0 or not all(map(math.isfinite, mean + std)):
            raise ValueError(f"sizes {sizes}, mean {mean}, std {std}")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{base / 'preprocessor_config.json'}: {error!r}, expected Qwen2-VL's processor; download it again"
        ) from error
    return PatchConfig(min_pixels, max_pixels, resampler, mean, std, **sizes)


def model_config_of(path: Path) -> dict[str, Any]:
    """VideoReward's `model_config.json`, its choices checked against those reproduced here."""
    values = read_json(path)
    problems = [
        f"{section} is {values[section]!r}, not an object"
        for section in _SECTIONS
        if section in values and not isinstance(values[section], dict)
    ] or [*_other_choices(values), *_bad_numbers(values)]
    if problems:
        raise WeightsError(f"{path}: {'; '.join(problems)}; give the model_config.json of {HUB['videoreward']}")
    return values


def _other_choices(values: Mapping[str, Any]) -> Iterator[str]:
    """Choices of training and reading that are not reproduced here."""
    supported = {
        ("data_config", "sample_type"): ("uniform",),
        ("data_config", "prompt_template_type"): ("detailed_special",),
        ("model_config", "use_special_tokens"): (True,),
        ("model_config", "reward_token"): ("special",),
        ("peft_lora_config", "use_rslora"): (False, None),
    }
    for (section, key), allowed in supported.items():
        if key in values.get(section, {}) and values[section][key] not in allowed:
            yield f"{section}.{key} is {values[section][key]!r}, not {' or '.join(map(repr, allowed))}"


def _bad_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are missing, or that no score could be made with."""
    real, positive = (_is_finite, "a number"), (lambda x: _is_finite(x) and x > 0, "a number above 0")
    whole = lambda least: (lambda x: type(x) is int and x >= least, f"a whole number, at least {least}")  # noqa: E731
    optional = lambda rule: (lambda x: x is None or rule[0](x), f"null or {rule[1]}")  # noqa: E731
    fixed = values.get("data_config", {}).get("num_frames") is not None
    rules = {
        ("data_config", "num_frames"): optional(whole(2)),
        ("data_config", "fps"): optional(positive) if fixed else positive,
        ("data_config", "max_frame_pixels"): whole(_TOKEN_PIXELS),
        ("peft_lora_config", "lora_r"): optional(whole(1)),
        ("peft_lora_config", "lora_alpha"): positive,
        **{("inference_config", f"{name}_mean"): real for name in DIMENSIONS},
        **{("inference_config", f"{name}_std"): positive for name in DIMENSIONS},
    }
    for (section, key), (is_good, expected) in rules.items():
        found = values.get(section, {}).get(key)
        if not is_good(found):
            yield f"{section}.{key} is {'missing' if found is None else repr(found)}, not {expected}"


def _is_finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def video_config_of(values: Mapping[str, Any]) -> VideoRewardConfig:
    data, scale = values["data_config"], values["inference_config"]
    mean, std = (tuple(float(scale[f"{name}_{kind}"]) for name in DIMENSIONS) for kind in ("mean", "std"))
    fps = data.get("fps")
    return VideoRewardConfig(None if fps is None else float(fps), data.get("num_frames"), mean, std)


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        WeightsError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: is no text ({error}), expected UTF-8; download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, expected a published one; download its folder again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: cannot be read ({error}), expected JSON; download it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: holds a {type(values).__name__}, expected an object; download it again")
    return values
