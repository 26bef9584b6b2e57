"""The rewards that the settings of a run name: refused early where they mean nothing, made once."""

from pathlib import Path

from streamt1_jax.rewards.base import PromptTable, Reward
from streamt1_jax.rewards.model_settings import MODELS
from streamt1_jax.rewards.published import PublishedRewards
from streamt1_jax.rewards.registry import Role, resolve
from streamt1_jax.settings import RewardsConfig


def check_choice(config: RewardsConfig) -> PublishedRewards | None:
    """Refuses names that mean nothing, before any weights load; a user's own reward is left to `make_rewards`.

    Returns:
        The folder of published models that the run needs, if it needs one; nothing of it is loaded yet.

    Raises:
        BadInputError: no such reward, or a published one without its folder.
        WeightsError: the folder holds no converted rewards, or not these.
    """
    names = published_names(config)
    if config.dir is None or not names:
        for role, spec in roles(config).items():
            if ":" not in spec:
                resolve(spec, role, PromptTable())
        return None
    published = PublishedRewards(Path(config.dir), config.device, config.precision, batch_bytes=1e9 * config.batch_gb)
    for role, spec in roles(config).items():
        if spec in MODELS:
            published.weight_bytes(spec)
        elif ":" not in spec:
            resolve(spec, role, PromptTable())
    return published


def make_rewards(
    config: RewardsConfig, prompts: PromptTable, published: PublishedRewards | None
) -> tuple[Reward, Reward]:
    """Both rewards of a run; published models are loaded here, the memory for all of them checked first.

    Args:
        prompts: the table that the run's prompt indices point into.
        published: what `check_choice` returned.
    """
    if published is not None:
        published.check_fit(published_names(config))
    chosen = roles(config)
    short, long = (resolve(chosen[role], role, prompts, device=config.device, published=published) for role in chosen)
    return short, long


def roles(config: RewardsConfig) -> dict[Role, str]:
    return {"short": config.short, "long": config.long}


def published_names(config: RewardsConfig) -> tuple[str, ...]:
    """The published models among the two, each once."""
    return tuple(dict.fromkeys(spec for spec in roles(config).values() if spec in MODELS))
