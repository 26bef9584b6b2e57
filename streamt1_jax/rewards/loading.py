"""A reward model from its files: structure first, without memory, then one tensor after the other onto the device."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamt1_jax.errors import StreamT1Error, WeightsError
from streamt1_jax.rewards.chat import RewardTokenizer
from streamt1_jax.rewards.clips import ClipReader
from streamt1_jax.rewards.hpsv3 import HPSv3, hpsv3_head
from streamt1_jax.rewards.model_settings import HPSV3, ModelSettings
from streamt1_jax.rewards.placement import eight_bit_library
from streamt1_jax.rewards.qwen2vl import RewardNetwork, empty_network, fill, reward_config
from streamt1_jax.rewards.videoreward import VideoReward, videoreward_head

HEAD = "rm_head."
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.bfloat16}


def head_of(settings: ModelSettings) -> Callable[[int], nn.Module]:
    """Makes a model's head for a hidden size."""
    if settings.name == HPSV3:
        first, second = settings.head
        return functools.partial(hpsv3_head, first=first, second=second)
    return functools.partial(videoreward_head, output_dim=settings.head[0])


def network_of(settings: ModelSettings, config: Mapping[str, Any], tokenizer: RewardTokenizer) -> RewardNetwork:
    """The network that belongs to a model's settings, its parameters empty.

    Raises:
        WeightsError: the config is of another model, or of none that can be built.
    """
    try:
        return empty_network(reward_config(config, tokenizer.length), head_of(settings), tokenizer.pad_id)
    except StreamT1Error:
        raise
    except Exception as error:  # transformers raises what comes: of types, of divisions by a size, of its own
        raise WeightsError(
            f"the base's config.json makes no network ({type(error).__name__}: {' '.join(str(error).split())}), "
            "expected that of Qwen2-VL; download it again"
        ) from error


def load_scorer(
    settings: ModelSettings,
    *,
    config: Mapping[str, Any],
    tokenizer: str,
    weights: Path,
    device: torch.device,
    precision: str = "stored",
    batch_bytes: float = 4e9,
) -> HPSv3 | VideoReward:
    """A model, ready to score.

    Args:
        config: the base model's `config.json`.
        tokenizer: the text of `tokenizer.json`.
        weights: safetensors under the names of `RewardNetwork`.

    Raises:
        WeightsError: the files do not fit each other.
        BadInputError: the library for eight bits is not installed.
    """
    library = eight_bit_library() if precision == "int8" else None
    words = RewardTokenizer(settings.instruction, tokenizer)
    network = network_of(settings, config, words)
    # Eight bits are made on the host, so that the device never holds sixteen.
    first = torch.device("cpu") if precision == "int8" else device
    network = fill(network, _tensors(weights, first, precision, keep_head=settings.name == HPSV3), first)
    if library is not None:
        # Linear layers of the body alone, a scale for each output; activations stay bfloat16.
        library.quantize_(network.model, library.Int8WeightOnlyConfig())
        network = network.to(device)
    reader = ClipReader(network, words, settings.patches, device, batch_bytes)
    return scorer_of(settings, reader)


def scorer_of(settings: ModelSettings, reader: ClipReader) -> HPSv3 | VideoReward:
    return HPSv3(reader, settings) if settings.name == HPSV3 else VideoReward(reader, settings)


def _tensors(path: Path, device: torch.device, precision: str, *, keep_head: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file in the type that is wanted; HPSv3's head stays float32."""
    from safetensors import SafetensorError, safe_open

    dtype = _TYPES.get(precision)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                yield name, tensor if dtype is None or (keep_head and name.startswith(HEAD)) else tensor.to(dtype)
    except SafetensorError as error:
        raise WeightsError(f"{path}: {error}, expected safetensors; convert the rewards again") from error
