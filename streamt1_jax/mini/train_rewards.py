"""Training the embedded model's rewards: the good video of a group must score above each degraded one.

The loss of a pair is that of Bradley and Terry (1952), -log sigmoid(good - bad), as for HPSv3 and VideoAlign. Beside
it every good video is matched with the captions of the whole batch, which costs next to nothing and teaches words
quickly (Radford et al. 2021, CLIP, arXiv:2103.00020).

Nothing here knows the VAE or the DiT; `train.py` runs it as a stage of `streamt1 train-mini`, also alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from streamt1_jax.mini import world
from streamt1_jax.mini.degrade import LONG_KINDS, SHORT_KINDS, Window, draw_group, film_groups
from streamt1_jax.mini.rewards import (
    LONG_STEP,
    LONG_STRIDE,
    RewardNet,
    caption_tokenizer,
    reward_graph,
)
from streamt1_jax.mini.training import Task, seed_of
from streamt1_jax.rewards.base import PromptTokens
from streamt1_jax.rewards.registry import Role
from streamt1_jax.text import Tokenizer
from streamt1_jax.types import HostOrDevice, Scalar

BAD = 3  # degraded videos in a group
LEARNING_RATE = 3e-3
MATCHING_WEIGHT = 0.5
ACCURACY_SCENES = slice(448, 512)  # of the held-out ones; `streamt1 compare` begins with the first
SPREAD_SHARE = 0.5  # of the windows of several frames
SPREAD = 480  # frames, 30 seconds, over which their pairs are spread
CENTRING = 1e-3  # of the mean square score: a preference leaves the zero point open


class ClipSettings(NamedTuple):
    """The videos that a reward is trained on."""

    kinds: tuple[str, ...]
    frames: int  # of a video in training
    stride: int
    step: int  # pixels, as in `world.render`
    groups: int  # in a batch


CLIPS: dict[Role, ClipSettings] = {
    "short": ClipSettings(SHORT_KINDS, frames=1, stride=1, step=1, groups=16),
    "long": ClipSettings(LONG_KINDS, frames=8, stride=LONG_STRIDE, step=LONG_STEP, groups=8),
}


class Preferences(NamedTuple):
    """A batch. Leading axis n."""

    videos: Float[Array, "n m k h w 3"]  # in [-1, 1]; the good one first
    kind: Int[HostOrDevice, "n bad"]  # index into the kinds of `ClipSettings`
    pairs: Bool[HostOrDevice, "n t"]  # which frames, or pairs of frames, count
    tokens: Int[HostOrDevice, "n P"]
    mask: Int[HostOrDevice, "n P"]


def draw_window(clips: ClipSettings, seed: int) -> Window:
    """A run of frames, of several lengths from that of the first chunk on; or pairs with long gaps between them: what
    fades slowly shows in nothing shorter."""
    rng, count = np.random.default_rng((seed, 8)), clips.frames
    if count == 1:
        return Window(np.zeros(1, int), np.ones(1, bool))
    if rng.random() < SPREAD_SHARE:
        first = np.sort(rng.integers(SPREAD, size=count // 2))
        return Window((first[:, None] + [0, clips.stride]).ravel(), np.arange(count - 1) % 2 == 0)
    return Window(clips.stride * np.arange(count), np.arange(count - 1) < rng.integers(2, count))


def draw_preferences(
    clips: ClipSettings, tokenizer: Tokenizer, numbers: list[int], scene_of: Callable[[int], world.Scene], key: Array
) -> Preferences:
    """Groups of the scenes with these numbers; `key` is for what is done to pixels."""
    groups, pairs, prompts = [], [], []
    for number in numbers:
        scene, window = scene_of(number), draw_window(clips, number)
        pairs.append(window.pairs)
        groups.append(draw_group(scene, number, clips.kinds, window, bad=BAD))
        prompts.append(tokenizer(scene.caption()))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *groups)
    arrays: dict[str, Any] = {
        "kind": stacked.kind,
        "pairs": np.stack(pairs),
        "tokens": np.stack([prompt.ids for prompt in prompts]),
        "mask": np.stack([prompt.mask for prompt in prompts]),
    }
    return Preferences(film_groups(stacked, key, clips.step), **arrays)


def reward_task(role: Role, *, steps: int, groups: int | None = None, seed: int = 0) -> Task:
    """The training of one reward.

    Args:
        groups: in a batch, other than `CLIPS` says.
    """
    clips, graph, tokenizer = CLIPS[role], reward_graph(role)[0], caption_tokenizer()
    name = f"reward_{role}"
    own_seed = seed_of(name, seed)
    key = jax.random.key(own_seed)

    def init() -> PyTree:
        return nnx.split(RewardNet(role, rngs=nnx.Rngs(seed)))[1]

    def batch(step: int) -> Preferences:
        rng = np.random.default_rng((own_seed, step))
        numbers = rng.integers(2**31, size=groups or clips.groups).tolist()
        return draw_preferences(clips, tokenizer, numbers, world.training_scene, jax.random.fold_in(key, step))

    def loss(params: PyTree, batch: Preferences, key: Array) -> tuple[Scalar, dict[str, Scalar]]:
        del key  # a batch is drawn with one of its own
        scores, matching = score_preferences(nnx.merge(graph, params), batch)
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

    return Task(name, init, batch, loss, steps, LEARNING_RATE)


def score_preferences(net: RewardNet, batch: Preferences) -> tuple[Array, Array]:
    """(scores [n, 1 + bad] of every group's videos, the good one first; [n, n] of good video i with caption j)."""
    batch = jax.tree.map(jnp.asarray, batch)
    n, m, *rest = batch.videos.shape
    seen = jax.vmap(net.encode_frames)(batch.videos.reshape(n * m, *rest))
    seen = seen.reshape(n, m, *seen.shape[1:])
    rows, is_word = jax.vmap(net.encode_caption)(PromptTokens(batch.tokens, batch.mask))
    of_group = jax.vmap(net.score, in_axes=(0, None, None, None))
    scores = jax.vmap(of_group)(seen, batch.pairs, rows, is_word)
    of_captions = jax.vmap(net.score, in_axes=(None, None, 0, 0))
    matching = jax.vmap(of_captions, in_axes=(0, 0, None, None))(seen[:, 0], batch.pairs, rows, is_word)
    return scores, matching


def accuracy_by_kind(role: Role, params: PyTree, *, batches: int = 32, groups: int = 16) -> dict[str, float]:
    """Share of held-out scenes in which the good video scores above one degraded in each way; "all" is the mean."""
    clips, tokenizer, graph = CLIPS[role], caption_tokenizer(), reward_graph(role)[0]
    scenes = world.held_out_scenes(ACCURACY_SCENES.stop)[ACCURACY_SCENES]

    @jax.jit
    def score(params: PyTree, batch: Preferences) -> Array:
        return score_preferences(nnx.merge(graph, params), batch)[0]

    won: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(clips.kinds)}
    for index in range(batches):
        numbers = [2**32 + index * groups + i for i in range(groups)]
        scene_of = lambda number: scenes[number % len(scenes)]  # noqa: E731
        batch = draw_preferences(clips, tokenizer, numbers, scene_of, jax.random.key(index))
        scores = np.asarray(score(params, batch))
        for kind, better in zip(np.asarray(batch.kind).ravel(), (scores[:, :1] > scores[:, 1:]).ravel(), strict=True):
            won[clips.kinds[kind]].append(float(better))
    everything = [value for values in won.values() for value in values]
    return {"all": float(np.mean(everything))} | {
        kind: float(np.mean(values)) for kind, values in won.items() if values
    }
