"""Training the embedded model's rewards: the good video of a group must score above each degraded one.

The loss of a pair is that of Bradley and Terry (1952), -log sigmoid(good - bad), as for HPSv3 and VideoAlign. Beside
it every good video is matched with the captions of the whole batch, which costs next to nothing and teaches words
quickly (Radford et al. 2021, CLIP, arXiv:2103.00020).

>>> train_reward("short", Path("training"), Path("reward_short.safetensors"))
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PyTree

from streamt1_jax.mini import world
from streamt1_jax.mini.degrade import LONG_KINDS, SHORT_KINDS, Group, draw_group, film_group
from streamt1_jax.mini.rewards import (
    LONG_STEP,
    LONG_STRIDE,
    RewardNet,
    Role,
    caption_tokenizer,
    reward_graph,
    save_reward_params,
)
from streamt1_jax.mini.training import Task, fit
from streamt1_jax.rewards.base import PromptTokens
from streamt1_jax.text import Tokenizer
from streamt1_jax.types import HostOrDevice, Scalar

BAD = 3  # degraded videos in a group
MATCHING_WEIGHT = 0.5
CENTRING = 1e-3  # of the mean square score: a preference leaves the zero point open


class Recipe(NamedTuple):
    """What differs between the two rewards."""

    kinds: tuple[str, ...]
    frames: int  # of a video in training
    stride: int
    step: int  # pixels, as in `world.render`
    groups: int  # in a batch
    steps: int
    learning_rate: float


RECIPES: dict[Role, Recipe] = {
    "short": Recipe(SHORT_KINDS, 1, 1, 1, groups=16, steps=3000, learning_rate=3e-3),
    "long": Recipe(LONG_KINDS, 8, LONG_STRIDE, LONG_STEP, groups=8, steps=2000, learning_rate=3e-3),
}


class Preferences(NamedTuple):
    """A batch. Leading axis n."""

    groups: Group
    pairs: Bool[HostOrDevice, "n t"]  # which frames, or pairs of frames, count
    tokens: Int[HostOrDevice, "n P"]
    mask: Int[HostOrDevice, "n P"]


def draw_preferences(
    recipe: Recipe, tokenizer: Tokenizer, numbers: list[int], scene_of: Callable[[int], world.Scene]
) -> Preferences:
    """Groups of the scenes with these numbers."""
    groups, pairs, prompts = [], [], []
    most = max(recipe.frames - 1, 1)
    for number in numbers:
        scene = scene_of(number)
        groups.append(draw_group(scene, number, recipe.kinds, bad=BAD, frames=recipe.frames, stride=recipe.stride))
        # Windows of all lengths, from that of the first chunk on.
        length = np.random.default_rng((number, 8)).integers(min(2, most), most + 1)
        pairs.append(np.arange(most) < length)
        prompts.append(tokenizer(scene.caption()))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *groups)
    arrays: dict[str, Any] = {
        "pairs": np.stack(pairs),
        "tokens": np.stack([prompt.ids for prompt in prompts]),
        "mask": np.stack([prompt.mask for prompt in prompts]),
    }
    return Preferences(stacked, **arrays)


def reward_task(
    role: Role, *, steps: int | None = None, groups: int | None = None, start: PyTree | None = None, seed: int = 0
) -> Task:
    """The training of one reward.

    Args:
        steps, groups: other than the recipe's.
        start: parameters to go on from; None: random ones.
    """
    recipe = RECIPES[role]
    recipe = recipe._replace(steps=steps or recipe.steps, groups=groups or recipe.groups)
    graph, tokenizer = reward_graph(role)[0], caption_tokenizer()

    def init() -> PyTree:
        # A copy, because a training step consumes its state.
        made = nnx.split(RewardNet(role, rngs=nnx.Rngs(seed)))[1] if start is None else start
        return jax.tree.map(jnp.copy, made)

    def batch(step: int) -> Preferences:
        rng = np.random.default_rng((seed, step))
        numbers = rng.integers(2**31, size=recipe.groups).tolist()
        return draw_preferences(recipe, tokenizer, numbers, world.training_scene)

    def loss(params: PyTree, batch: Preferences, key: Array) -> tuple[Scalar, dict[str, Scalar]]:
        scores, matching = score_preferences(nnx.merge(graph, params), batch, key, recipe.step)
        preference = jnp.mean(jax.nn.softplus(scores[:, 1:] - scores[:, :1]))
        right = jnp.diagonal(matching)
        match = jnp.mean(jax.nn.logsumexp(matching, axis=0) + jax.nn.logsumexp(matching, axis=1) - 2 * right)
        total = preference + MATCHING_WEIGHT * match + CENTRING * jnp.mean(scores**2)
        figures = {
            "preference": preference,
            "accuracy": jnp.mean(scores[:, :1] > scores[:, 1:], dtype=jnp.float32),
            "matched": jnp.mean(jnp.argmax(matching, axis=0) == jnp.arange(len(right)), dtype=jnp.float32),
        }
        return total, figures

    return Task(f"reward_{role}", init, batch, loss, recipe.steps, recipe.learning_rate)


def score_preferences(net: RewardNet, batch: Preferences, key: Array, step: int) -> tuple[Array, Array]:
    """(scores [n, 1 + bad] of every group's videos, the good one first; [n, n] of good video i with caption j)."""
    batch = jax.tree.map(jnp.asarray, batch)
    keys = jax.random.split(key, len(batch.tokens))
    videos = jax.vmap(lambda group, key: film_group(group, key, step))(batch.groups, keys)
    n, m, *rest = videos.shape
    seen = jax.vmap(net.see)(videos.reshape(n * m, *rest))
    seen = seen.reshape(n, m, *seen.shape[1:])
    rows, is_word = jax.vmap(net.read)(PromptTokens(batch.tokens, batch.mask))
    of_group = jax.vmap(net.judge, in_axes=(0, None, None, None))
    scores = jax.vmap(of_group)(seen, batch.pairs, rows, is_word)
    of_captions = jax.vmap(net.judge, in_axes=(None, None, 0, 0))
    matching = jax.vmap(of_captions, in_axes=(0, 0, None, None))(seen[:, 0], batch.pairs, rows, is_word)
    return scores, matching


def train_reward(
    role: Role,
    folder: Path,
    file: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    report: Callable[[dict[str, float]], None] = print,
) -> dict[str, float]:
    """Trains a reward and writes its averaged parameters to `file`; returns `accuracy_by_kind`.

    Args:
        folder: for checkpoints and the log, as in `training.fit`.
        steps: of training; the recipe's if None.
    """
    params = fit(reward_task(role, steps=steps, seed=seed), folder, seed=seed, resume=resume, report=report)
    save_reward_params(params, file)
    return accuracy_by_kind(role, params)


def accuracy_by_kind(role: Role, params: PyTree, *, batches: int = 32, groups: int = 16) -> dict[str, float]:
    """Share of held-out scenes in which the good video scores above one degraded in each way; "all" is the mean."""
    recipe, tokenizer, graph = RECIPES[role], caption_tokenizer(), reward_graph(role)[0]
    scenes = world.held_out_scenes(64)

    @jax.jit
    def score(params: PyTree, batch: Preferences, key: Array) -> Array:
        return score_preferences(nnx.merge(graph, params), batch, key, recipe.step)[0]

    won: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(recipe.kinds)}
    for index in range(batches):
        numbers = [2**32 + index * groups + i for i in range(groups)]
        batch = draw_preferences(recipe, tokenizer, numbers, lambda number: scenes[number % len(scenes)])
        scores = np.asarray(score(params, batch, jax.random.key(index)))
        for kind, better in zip(batch.groups.kind.ravel(), (scores[:, :1] > scores[:, 1:]).ravel(), strict=True):
            won[recipe.kinds[kind]].append(float(better))
    everything = [value for values in won.values() for value in values]
    return {"all": float(np.mean(everything))} | {
        kind: float(np.mean(values)) for kind, values in won.items() if values
    }
