"""`streamt1 convert rewards`: the published HPSv3 and VideoReward into one folder that `PublishedRewards` loads.

Nothing is hard-coded that a file says: sizes, tokens, texts, rates, means. Weights are checked by names and shapes
before any is read, a LoRA is merged in float32 as tensors pass, and one tensor is in memory at a time.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.engine import Plan, convert, plan
from convert.hub import Located, locate_folder
from convert.instructions import read_instructions
from convert.lora import LoRASource
from convert.reward_files import (
    HUB,
    MODEL_CONFIG,
    chat_template_of,
    model_config_of,
    newest_checkpoint,
    patches_of,
    read_json,
    tokenizer_with,
    video_config_of,
)
from convert.rewards_table import EMBEDDING, OverlaidSource, ShrunkSource, as_published, reward_rules, split_peft
from convert.safetensors_writer import write_safetensors
from convert.sources import SafetensorsSource, ShardedSource, Source, open_folder
from convert.torch_source import TorchSource
from streamt1_jax.atomic_folder import atomic_folder
from streamt1_jax.errors import WeightsError
from streamt1_jax.manifest import write_manifest, write_plain_json
from streamt1_jax.rewards.chat import Instruction, Kind, RewardTokenizer
from streamt1_jax.rewards.loading import HEAD, network_of
from streamt1_jax.rewards.model_settings import DIMENSIONS, HPSV3, MODELS, RESERVED, ModelSettings
from streamt1_jax.rewards.published import FORMAT, WEIGHTS, is_rewards
from streamt1_jax.rewards.qwen2vl import is_linear, parameter_shapes

HPSV3_PIXELS = 200704  # HPSv3 shows every frame at this area: its processor's lower and upper bound
VIDEOREWARD_MIN_PIXELS = 100352  # its upper bound is in model_config.json
HPSV3_FILE = "HPSv3.safetensors"
_WORDS = ("config.json", "preprocessor_config.json", "tokenizer*", "vocab.json", "merges.txt", "chat_template*")
_TORCH_FILES = (".bin", ".pth", ".pt")
_TYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True)
class RewardSources:
    """Where the files are: folders or hub repositories.

    Args:
        templates: see `read_instructions`.
        models: which of the two to convert.
        offline: take what was downloaded before, and nothing else.
    """

    hpsv3: str = HUB["hpsv3"]
    videoreward: str = HUB["videoreward"]
    base_image: str = HUB["base_image"]
    base_video: str = HUB["base_video"]
    templates: Sequence[str] = ()
    models: Sequence[str] = MODELS
    revisions: Mapping[str, str] = field(default_factory=dict)  # of the hub, by the name of the source
    offline: bool = False

    def locate(self, name: str, patterns: Sequence[str]) -> Located:
        return locate_folder(getattr(self, name), self.revisions.get(name), patterns, HUB[name], offline=self.offline)


class Prepared(NamedTuple):
    """One model, every check made and no weight read."""

    settings: ModelSettings
    config: dict[str, Any]  # the base model's
    tokenizer: str
    source: Source
    plan: Plan
    origin: dict[str, Any]


def convert_rewards(
    sources: RewardSources, out: Path | str, *, dtype: str = "bfloat16", overwrite: bool = False
) -> None:
    """Converts into the folder `out`, which appears whole or not at all; with progress on a terminal.

    Args:
        dtype: of the body's weights. HPSv3's head stays float32.

    Raises:
        WeightsError: files that are missing, broken, or do not fit each other.
        BadInputError: `out` cannot be written.
    """
    texts = read_instructions(sources.templates, sources.models, offline=sources.offline)
    prepare = {HPSV3: prepare_hpsv3}
    made = [prepare.get(name, prepare_videoreward)(sources, texts[name]) for name in sources.models]
    total = sum(one.plan.size for one in made) * _TYPES[dtype].itemsize
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not sys.stderr.isatty())
    with closing(bar), atomic_folder(Path(out), overwrite=overwrite, is_ours=is_rewards, needed_bytes=total) as folder:
        models = {one.settings.name: _write(folder / one.settings.name, one, dtype, bar) for one in made}
        made_with = {name: version(name) for name in ("torch", "transformers", "safetensors")}
        write_manifest(folder, FORMAT, {"made_with": made_with, "models": models})


def prepare_hpsv3(sources: RewardSources, text: str) -> Prepared:
    """One full state dict, and the base's config, tokenizer and chat template."""
    folder = sources.locate("hpsv3", ("*.safetensors*",))
    base = sources.locate("base_image", _WORDS)
    one = folder.path / HPSV3_FILE
    source = as_published(SafetensorsSource(one) if one.is_file() else _open_weights(folder.path))
    tokenizer = tokenizer_with(RESERVED[HPSV3], base.path)
    patches = patches_of(base.path, "pil", HPSV3_PIXELS, HPSV3_PIXELS)
    settings = ModelSettings(HPSV3, _instruction(HPSV3, "image", text, base.path), patches, _hpsv3_widths(source))
    origin = {"weights": folder.origin, "base": base.origin}
    return _prepared(settings, base.path, tokenizer, source, origin)


def prepare_videoreward(sources: RewardSources, text: str) -> Prepared:
    """The newest checkpoint, whole (`model.pth`) or as an adapter over the base's weights; its LoRA is merged."""
    patterns = (MODEL_CONFIG, "checkpoint-*/*")
    folder = sources.locate("videoreward", patterns)
    published = model_config_of(folder.path / MODEL_CONFIG)
    checkpoint = newest_checkpoint(folder.path)
    whole = checkpoint / "model.pth"
    base = sources.locate("base_video", _WORDS if whole.is_file() else (*_WORDS, "*.safetensors*"))
    words = checkpoint / "tokenizer"
    tokenizer = tokenizer_with(RESERVED["videoreward"], words if words.is_dir() else base.path)
    if whole.is_file():
        weights, lora = split_peft(TorchSource(whole))
    else:
        weights, lora = _adapter(checkpoint, base.path, tokenizer)
    source = weights if lora is None else _merged(weights, lora, published["peft_lora_config"])
    settings = ModelSettings(
        "videoreward",
        _instruction("videoreward", "video", text, base.path),
        patches_of(base.path, "torchvision", VIDEOREWARD_MIN_PIXELS, published["data_config"]["max_frame_pixels"]),
        _output_dim(published, source),
        video_config_of(published),
    )
    origin: dict[str, Any] = {"weights": folder.origin | {"checkpoint": checkpoint.name}, "base": base.origin}
    origin["lora"] = {"merged": lora is not None, "ranks": source.ranks if isinstance(source, LoRASource) else []}
    return _prepared(settings, base.path, tokenizer, source, origin)


def _prepared(settings: ModelSettings, base: Path, tokenizer: str, source: Source, origin: dict[str, Any]) -> Prepared:
    """Fits tokens to rows and names to the network.

    Raises:
        WeightsError: the reserved tokens have not the ids that the weights were trained with, or the weights do not
            fit the network.
    """
    words = RewardTokenizer(settings.instruction, tokenizer)
    rows = source.shapes.get(EMBEDDING, (0,))[0]
    if rows != words.length:
        raise WeightsError(
            f"{settings.name}: the weights have rows for {rows} tokens, expected the tokenizer's {words.length} with "
            f"{' '.join(settings.instruction.reserved)} as the last; use the tokenizer that belongs to these weights"
        )
    config = read_json(base / "config.json")
    network = network_of(settings, config, words)
    fitted = plan(source.shapes, reward_rules(), parameter_shapes(network), name=settings.name)
    return Prepared(settings, config, tokenizer, source, fitted, origin)


def tensors_of(one: Prepared, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter by name, in the types that are stored: HPSv3's head in float32."""
    in_float32 = {name for name in one.plan.leaves if one.settings.name == HPSV3 and name.startswith(HEAD)}
    for names, kind in ((in_float32, "float32"), (one.plan.leaves.keys() - in_float32, dtype)):
        some = {name: leaf for name, leaf in one.plan.leaves.items() if name in names}
        others = {fill.key for name, leaf in one.plan.leaves.items() if name not in names for fill in leaf.fills}
        yield from convert(Plan(some, one.plan.unused | others), one.source, _TYPES[kind])


def _write(folder: Path, one: Prepared, dtype: str, bar: tqdm) -> dict[str, Any]:
    """One model's files; returns its entry in the manifest."""
    folder.mkdir()
    bar.set_postfix_str(one.settings.name)
    write_plain_json(folder / "config.json", one.config)
    write_plain_json(folder / "settings.json", one.settings.to_json())
    (folder / "tokenizer.json").write_text(one.tokenizer, encoding="utf-8")
    shapes = {name: leaf.shape for name, leaf in one.plan.leaves.items()}
    in_float32 = {name for name in shapes if one.settings.name == HPSV3 and name.startswith(HEAD)}
    types = {name: "F32" if name in in_float32 or dtype == "float32" else "BF16" for name in shapes}
    size = write_safetensors(folder / WEIGHTS, shapes, types, tensors_of(one, dtype), bar)
    linear = sum(math.prod(shape) for name, shape in shapes.items() if is_linear(name, shape))
    return {"bytes": size, "parameters": one.plan.size, "linear": linear, "dtype": dtype, "origin": one.origin}


def _adapter(checkpoint: Path, base: Path, tokenizer: str) -> tuple[Source, Source]:
    """(weights, LoRA) of the layout that stores only what was trained."""
    import tokenizers

    rows = tokenizers.Tokenizer.from_str(tokenizer).get_vocab_size(with_added_tokens=True)
    trained, extra = split_peft(TorchSource(checkpoint / "non_lora_state_dict.pth"))
    plain, lora = split_peft(SafetensorsSource(checkpoint / "adapter_model.safetensors"))
    if lora is None or plain.shapes or extra is not None:
        raise WeightsError(
            f"{checkpoint}: adapter_model.safetensors holds {len(plain.shapes)} weights beside "
            f"{0 if lora is None else len(lora.shapes)} LoRA halves, expected halves alone, and none in "
            "non_lora_state_dict.pth; download it again"
        )
    shrunk = ShrunkSource(OverlaidSource(trained, as_published(_open_weights(base))), rows)
    return shrunk, lora


def _open_weights(folder: Path) -> Source:
    """A folder's weights: safetensors, or else the PyTorch files of older saves; whole or in shards.

    Raises:
        WeightsError: there are none, or more than one to choose from.
    """
    if any(folder.glob("*.safetensors*")):
        return open_folder(folder)
    indices = sorted(folder.glob("*.bin.index.json"))
    if len(indices) == 1:
        return ShardedSource(indices[0], TorchSource)
    usual = folder / "pytorch_model.bin"  # beside which other .bin files may lie, such as a training's arguments
    files = [usual] if usual.is_file() else sorted(path for path in folder.iterdir() if path.suffix in _TORCH_FILES)
    if not indices and len(files) == 1:
        return TorchSource(files[0])
    found = ", ".join(path.name for path in indices + files) or "neither"
    raise WeightsError(
        f"{folder}: found {found}, expected one .safetensors file or one of PyTorch ({', '.join(_TORCH_FILES)}), or "
        "shards of either with their .index.json; download the folder again, or remove what does not belong to it"
    )


def _output_dim(published: Mapping[str, Any], source: Source) -> tuple[int]:
    """The head's outputs, by its weight."""
    found = source.shapes.get(f"{HEAD}weight", (0,))[0]
    stated = published.get("model_config", {}).get("output_dim", found)
    if found not in (1, len(DIMENSIONS)) or found != stated:
        raise WeightsError(
            f"VideoReward: the head has {found} outputs and model_config.json says {stated}, expected 1 or "
            f"{len(DIMENSIONS)} in both; download both again"
        )
    return (found,)


def _instruction(model: str, kind: Kind, text: str, base: Path) -> Instruction:
    return Instruction(text, chat_template_of(base), kind, RESERVED[model])


def _hpsv3_widths(source: Source) -> tuple[int, ...]:
    try:
        return tuple(source.shapes[f"{HEAD}{layer}.weight"][0] for layer in (0, 3))
    except (KeyError, IndexError) as error:
        raise WeightsError(
            f"HPSv3: found no {HEAD}0 and {HEAD}3, expected the reward head; give {HPSV3_FILE} of {HUB['hpsv3']}"
        ) from error


def _merged(weights: Source, lora: Source, config: Mapping[str, Any]) -> LoRASource:
    """The weights with their LoRA, of the rank that its config says."""
    merged = LoRASource(weights, lora, float(config["lora_alpha"]))
    rank = config.get("lora_r")
    if rank is not None and merged.ranks != [rank]:
        raise WeightsError(
            f"VideoReward: the LoRA's ranks are {merged.ranks}, expected rank {rank} of {MODEL_CONFIG}; download both "
            "again"
        )
    return merged
