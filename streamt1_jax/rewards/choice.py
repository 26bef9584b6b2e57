"""The rewards that the settings of a run name: refused early where they mean nothing, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from streamt1_jax.config import ModelConfig
from streamt1_jax.manifest import read_manifest
from streamt1_jax.memory import memory_plan
from streamt1_jax.mini.shipped import is_mini
from streamt1_jax.rewards.base import PromptTable, Reward
from streamt1_jax.rewards.model_settings import MODELS
from streamt1_jax.rewards.placement import eight_bit_library, needed_bytes, refuse_overfull, share_gpu, torch_device
from streamt1_jax.rewards.published import FORMAT, PublishedRewards
from streamt1_jax.rewards.registry import Role, resolve
from streamt1_jax.settings import RewardsConfig, Settings
from streamt1_jax.weights import Weights, default_dtype


def check_choice(config: RewardsConfig) -> PublishedRewards | None:
    """Refuses names that mean nothing, before any weights load; a user's own reward is left to `make_rewards`.

    Returns:
        The folder of published models that the run needs, if it needs one; nothing of it is loaded yet.

    Raises:
        BadInputError: no such reward, or a published one without its folder, or without the library for its precision.
        WeightsError: the folder holds no converted rewards, or not these.
    """
    names = published_names(config)
    if config.dir is None or not names:
        for role, spec in roles(config).items():
            if ":" not in spec:
                resolve(spec, role, PromptTable(), mini=_mini_folder(config))
        if config.dir is not None and not is_mini(config.dir):  # not needed, and still not to be misspelt
            read_manifest(Path(config.dir), FORMAT)
        return None
    if config.precision == "int8":
        eight_bit_library()
    published = PublishedRewards(Path(config.dir), config.device, config.precision, batch_bytes=1e9 * config.batch_gb)
    for role, spec in roles(config).items():
        if spec in MODELS:
            published.weight_bytes(spec)
        elif ":" not in spec:
            resolve(spec, role, PromptTable())
    return published


def leave_room(settings: Settings, model_of: Callable[[], ModelConfig], published: PublishedRewards) -> None:
    """On GPUs, leaves the published models of a run their room; call it before JAX starts.

    Args:
        model_of: sizes of the run's model; asked for once JAX has been told what it may take.

    Raises:
        OutOfMemoryError: the run does not fit into the rest, said before anything is loaded.
    """
    device = torch_device(settings.rewards.device)
    sizes = {name: published.weight_bytes(name) for name in published_names(settings.rewards)}
    needed = needed_bytes(sizes, published.batch_bytes)
    share_gpu(needed, device)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # JAX starts here
    if device.type == "cpu" or limit is None:
        return
    model = model_of()
    size = (settings.generate.height or model.height, settings.generate.width or model.width)
    refuse_overfull(memory_plan(model, settings.run, *size, default_dtype()).peak, limit, needed)


def make_rewards(
    config: RewardsConfig,
    prompts: PromptTable,
    published: PublishedRewards | None,
    weights: Weights | None = None,
) -> tuple[Reward, Reward]:
    """Both rewards of a run; published models are loaded here, the memory for all of them checked first.

    Args:
        prompts: the table that the run's prompt indices point into.
        published: what `check_choice` returned.
        weights: of the model that is judged; None: "default" stands for "native".
    """
    if published is not None:
        published.check_fit(published_names(config))
    chosen = roles(config)
    where: Any = {"device": config.device, "published": published, "mini": _mini_folder(config)}
    if weights is not None:
        where |= {"default": weights.default_rewards, "mini": where["mini"] or weights.own_rewards}
    short, long = (resolve(chosen[role], role, prompts, **where) for role in chosen)
    return short, long


def _mini_folder(config: RewardsConfig) -> Path | None:
    """The folder, where it is one of the embedded model."""
    return Path(config.dir) if config.dir is not None and is_mini(config.dir) else None


def roles(config: RewardsConfig) -> dict[Role, str]:
    return {"short": config.short, "long": config.long}


def published_names(config: RewardsConfig) -> tuple[str, ...]:
    """The published models among the two, each once."""
    return tuple(dict.fromkeys(spec for spec in roles(config).values() if spec in MODELS))
