"""The three conversions: where each network of a published checkpoint lies, by which table it is read.

A recipe only looks at names and shapes; `run_recipe` checks all of them before it writes anything.
"""

import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from tqdm import tqdm

from convert.dit_table import diffusers_dit_rules, longlive_dit_rules, wan_dit_rules
from convert.engine import Plan, Rule, convert_pieces, dotted, plan
from convert.hub import (
    GENERATOR_FILES,
    LORA_FILES,
    WAN,
    WAN_DIFFUSERS,
    Located,
    locate_file,
    locate_folder,
    require_files,
)
from convert.lora import LoRASource, adapter_alpha
from convert.sizes import (
    diffusers_dit_config,
    diffusers_vae_config,
    model_config,
    read_config,
    transformers_umt5_config,
    wan_dit_config,
    wan_umt5_config,
    wan_vae_config,
)
from convert.sources import SafetensorsSource, ShardedSource, Source, open_folder
from convert.torch_source import Select, TorchSource, select_flat, select_generator, select_lora
from convert.umt5_table import transformers_umt5_rules, wan_umt5_rules
from convert.vae_table import diffusers_vae_rules, wan_vae_rules
from streamt1_jax.checkpoint import is_checkpoint, write_checkpoint
from streamt1_jax.config import DiTConfig, ModelConfig
from streamt1_jax.errors import WeightsError
from streamt1_jax.manifest import file_sha256
from streamt1_jax.networks import network_graph
from streamt1_jax.text import Tokenizer

WAN_TEXT, WAN_VAE, WAN_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl"
_BASE_PATTERNS = ("config.json", WAN_TEXT, WAN_VAE, WAN_TOKENIZER + "/*")
_WAN_PATTERNS = (*_BASE_PATTERNS, "diffusion_pytorch_model*")
_DIFFUSERS_PATTERNS = ("transformer/*", "vae/*", "text_encoder/*", "tokenizer/*")
# Without these a folder is no such checkpoint; what else it needs, its tables and indices say.
_BASE_FILES = (WAN_TEXT, WAN_VAE, WAN_TOKENIZER + "/tokenizer.json")
_DIFFUSERS_FILES = (
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
)
_PIECE_BYTES = 2**29  # What is in memory of one parameter at a time.


class Part(NamedTuple):
    """One network: its tensors, the table they are read by, and the type they are stored as."""

    source: Source
    rules: list[Rule]
    dtype: str


@dataclass(frozen=True)
class Recipe:
    """A whole conversion, before any weight is read.

    Args:
        parts: by the name of the network.
        tokenizer: the folder whose files are copied.
        origin: for the manifest; its `summary` is one sentence for people.
    """

    config: ModelConfig
    parts: dict[str, Part]
    tokenizer: Path
    origin: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What every conversion can be told.

    Args:
        dtype: type of the DiT and the text encoder. The VAE stays float32: it is small, and its rounding is seen.
        size: height and width of video that the weights were made for, in pixels.
    """

    dtype: str = "bfloat16"
    size: tuple[int, int] = (480, 832)


def wan_recipe(source: str, options: Options, revision: str | None = None) -> Recipe:
    """A folder or hub repository of the Wan2.1 text-to-video release, of any size."""
    folder = locate_folder(source, revision, _WAN_PATTERNS)
    dit_files = () if any(folder.path.glob("*.safetensors*")) else ("diffusion_pytorch_model.safetensors",)
    require_files(folder, (*dit_files, *_BASE_FILES), WAN)
    dit = open_folder(folder.path)
    config = wan_dit_config(dit.shapes, read_config(folder.path))
    part = Part(dit, wan_dit_rules(), options.dtype)
    summary = f"{folder.name}, converted to {options.dtype}"
    origin = {"recipe": "wan", "summary": summary, "source": folder.origin}
    return _with_wan_parts(config, part, folder.path, options, origin)


def longlive_recipe(
    base: str,
    generator: str,
    options: Options,
    *,
    lora: str | None = None,
    lora_alpha: float | None = None,
    ignore_lora: bool = False,
    ema: bool | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> Recipe:
    """A LongLive or Self-Forcing generator, with the VAE, text encoder and tokenizer of the Wan2.1 release.

    Args:
        base: Wan2.1 folder or hub repository.
        generator, lora: files, or hub repositories.
        lora_alpha: None takes it from an adapter_config.json beside the LoRA, otherwise the rank.
        ignore_lora: leaves out a LoRA that stands in the generator's own file.
        ema: see `select_generator`.
        revision: of the generator's and the LoRA's repository.
    """
    folder = locate_folder(base, base_revision, _BASE_PATTERNS)
    require_files(folder, _BASE_FILES, WAN)
    if is_checkpoint(Path(generator)):
        raise WeightsError(
            f"{generator}: is a converted checkpoint, where a LoRA may be merged already; expected the PyTorch file of "
            "the generator. Convert that one."
        )
    file = locate_file(generator, revision, GENERATOR_FILES)
    lora_file = None if lora is None else locate_file(lora, revision, LORA_FILES)
    source = _open_file(file.path, select_generator(ema))
    key = source.key if isinstance(source, TorchSource) else ""
    if isinstance(source, TorchSource) and "generator_lora" in source.others and not lora_file and not ignore_lora:
        raise WeightsError(
            f"{file.path}: holds a LoRA (generator_lora) beside the {key}, expected a choice. Merge it with --lora "
            "and the same file, or leave it out with --no-lora."
        )
    added = f" with LoRA {lora_file.name}" if lora_file else ""
    summary = f"Causal generator {file.name}{added} on {folder.name}, converted to {options.dtype}"
    origin = {"recipe": "longlive", "summary": summary}
    origin |= {"base": folder.origin, "generator": file.origin | {"key": key}}
    origin |= {"ema": key == "generator_ema", "lora": {"merged": False}}
    dit: Source = source
    if lora_file:
        dit, origin["lora"] = _with_lora(source, lora_file, lora_alpha)
    wrapped = any(key.startswith("model.") for key in dit.shapes)
    config = wan_dit_config(dit.shapes, read_config(folder.path), prefix="model." if wrapped else "")
    rules = longlive_dit_rules() if wrapped else wan_dit_rules()
    return _with_wan_parts(config, Part(dit, rules, options.dtype), folder.path, options, origin)


def diffusers_recipe(source: str, options: Options, revision: str | None = None) -> Recipe:
    """A folder or hub repository in the diffusers format."""
    folder = locate_folder(source, revision, _DIFFUSERS_PATTERNS, WAN_DIFFUSERS)
    require_files(folder, _DIFFUSERS_FILES, WAN_DIFFUSERS)
    transformer, vae, text = (folder.path / name for name in ("transformer", "vae", "text_encoder"))
    config = model_config(
        diffusers_dit_config(read_config(transformer)),
        diffusers_vae_config(read_config(vae)),
        transformers_umt5_config(read_config(text)),
        options.size,
    )
    parts = {
        "dit": Part(open_folder(transformer), diffusers_dit_rules(), options.dtype),
        "vae": Part(open_folder(vae), diffusers_vae_rules(config.vae), "float32"),
        "text": Part(open_folder(text), transformers_umt5_rules(), options.dtype),
    }
    summary = f"{folder.name} in the diffusers format, converted to {options.dtype}"
    origin = {"recipe": "diffusers", "summary": summary, "source": folder.origin}
    return Recipe(config, parts, folder.path / "tokenizer", origin)


def _with_wan_parts(dit: DiTConfig, part: Part, folder: Path, options: Options, origin: dict[str, Any]) -> Recipe:
    """Adds what all checkpoints share that come from the Wan2.1 release."""
    vae, text = TorchSource(folder / WAN_VAE), TorchSource(folder / WAN_TEXT)
    vae_config = wan_vae_config(vae.shapes)
    config = model_config(dit, vae_config, wan_umt5_config(text.shapes), options.size)
    parts = {
        "dit": part,
        "vae": Part(vae, wan_vae_rules(vae_config), "float32"),
        "text": Part(text, wan_umt5_rules(), options.dtype),
    }
    return Recipe(config, parts, folder / WAN_TOKENIZER, origin)


def _with_lora(base: Source, file: Located, alpha: float | None) -> tuple[Source, dict[str, Any]]:
    alpha = adapter_alpha(file.path) if alpha is None else alpha
    merged = LoRASource(base, _open_file(file.path, select_lora), alpha)
    sha256 = file_sha256(file.path)
    return merged, {"merged": True, **file.origin, "sha256": sha256, "ranks": merged.ranks, "alpha": alpha or "rank"}


def _open_file(path: Path, select: Select = select_flat) -> Source:
    """One file by its ending; `select` picks the state dict of a PyTorch file."""
    if path.name.endswith(".safetensors.index.json"):
        return ShardedSource(path)
    return SafetensorsSource(path) if path.suffix == ".safetensors" else TorchSource(path, select)


def plan_recipe(recipe: Recipe) -> dict[str, Plan]:
    """Fits the names and shapes of every network to its table, and the tokenizer to the text encoder.

    Raises:
        WeightsError: the problems of the tokenizer and of all networks.
    """
    plans, problems = {}, []
    try:
        # The one that generating opens: a checkpoint whose tokenizer it would refuse must not come into being.
        Tokenizer(recipe.tokenizer, text_len=recipe.config.dit.text_len, vocab_size=recipe.config.text.vocab_size)
    except WeightsError as error:
        problems.append(str(error))
    for name, part in recipe.parts.items():
        target = dotted(network_graph(recipe.config, name, jnp.dtype(part.dtype))[1])
        try:
            plans[name] = plan(part.source.shapes, part.rules, target, name=name)
        except WeightsError as error:
            problems.append(str(error))
    if problems:
        raise WeightsError(" ".join(problems))
    return plans


def run_recipe(recipe: Recipe, out: Path | str, *, overwrite: bool = False) -> None:
    """Converts into the folder `out`, with progress on a terminal.

    Raises:
        WeightsError: the checkpoint does not fit its table, or is broken.
        BadInputError: `out` cannot be written.
    """
    plans = plan_recipe(recipe)
    total = _total_bytes(plans, recipe.parts)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not sys.stderr.isatty())
    checkpoint = write_checkpoint(out, recipe.config, recipe.origin, overwrite=overwrite, needed_bytes=total)
    with closing(bar), checkpoint as writer:
        writer.add_tokenizer(recipe.tokenizer)
        for name, part in recipe.parts.items():
            bar.set_postfix_str(name)
            for piece in convert_pieces(plans[name], part.source, part.dtype, _PIECE_BYTES):
                writer.add(name, piece.path, piece.array, piece.start)
                bar.update(piece.array.nbytes)


def _total_bytes(plans: Mapping[str, Plan], parts: Mapping[str, Part]) -> int:
    return sum(plans[name].size * jnp.dtype(part.dtype).itemsize for name, part in parts.items())
