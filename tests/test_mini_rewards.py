"""The embedded model's rewards: what they are trained on, that training works, and how they enter a search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from flax import nnx
from jax.flatten_util import ravel_pytree
from small import SmallWeights

from streamt1_jax import SearchConfig, StreamT1Pipeline
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.mini import degrade, rewards, train_rewards, world
from streamt1_jax.mini.rewards import RewardNet, load_reward_params, make_reward, save_reward_params
from streamt1_jax.mini.train_rewards import RECIPES, draw_preferences, reward_task
from streamt1_jax.mini.training import init_train_state, make_train_step
from streamt1_jax.rewards import PromptTokens
from streamt1_jax.text import Tokenizer

ROLES = ["short", "long"]
CAPTIONS = ["a red circle moves right", "a blue square spins on a striped background"]


@functools.cache
def random_params(role: str):
    return nnx.split(RewardNet(role, rngs=nnx.Rngs(0)))[1]


@functools.cache
def reward(role: str):
    return make_reward(role, random_params(role))


def tokens(caption: str) -> PromptTokens:
    prompt = rewards.caption_tokenizer()(caption)
    return PromptTokens(jnp.asarray(prompt.ids), jnp.asarray(prompt.mask))


@functools.cache
def jitted(role: str):
    return jax.jit(reward(role))


def score(role: str, videos: np.ndarray, counts: list[int], caption: str) -> np.ndarray:
    verdict = jitted(role)(jnp.asarray(videos), jnp.array(counts), tokens(caption))
    assert (verdict.status == 0).all()
    return np.asarray(verdict.scores)


@pytest.fixture(scope="module")
def videos() -> np.ndarray:
    return np.stack([worlds.film(world.random_scene(seed), seed, 27)[:21] for seed in range(3)])


@pytest.mark.parametrize("role", ROLES)
class TestCall:
    def test_the_score_depends_on_video_and_caption(self, role, videos):
        scores = np.stack([score(role, videos, [21] * 3, caption) for caption in CAPTIONS])
        assert np.isfinite(scores).all()
        assert len(np.unique(scores)) == scores.size

    def test_only_valid_frames_count(self, role, videos):
        garbage = videos.copy()
        garbage[0, 9:] = 255 - garbage[0, 9:]
        first = score(role, videos, [9, 21, 21], CAPTIONS[0])
        second = score(role, garbage, [9, 21, 21], CAPTIONS[0])
        assert np.array_equal(first, second)
        assert first[0] != score(role, videos, [21] * 3, CAPTIONS[0])[0]

    def test_rows_do_not_leak_into_each_other(self, role, videos):
        assert np.allclose(
            score(role, videos[::-1].copy(), [21] * 3, CAPTIONS[0])[::-1],
            score(role, videos, [21] * 3, CAPTIONS[0]),
            atol=1e-5,
        )

    def test_it_is_the_same_every_time_and_compiles_once(self, role, videos, compile_count):
        first = score(role, videos, [21] * 3, CAPTIONS[0])
        before = compile_count.value
        again, other = score(role, videos, [21] * 3, CAPTIONS[0]), score(role, videos, [20] * 3, CAPTIONS[1])
        assert compile_count.value == before
        assert np.array_equal(first, again)
        assert np.isfinite(other).all()

    @pytest.mark.parametrize("frames", [1, 2, 5])
    def test_very_short_videos_have_scores(self, role, videos, frames):
        for count in range(1, frames + 1):
            verdict = jitted(role)(jnp.asarray(videos[:1, :frames]), jnp.array([count]), tokens(CAPTIONS[0]))
            assert jnp.isfinite(verdict.scores).all()


@pytest.mark.parametrize("role", ROLES)
class TestWeights:
    def test_they_come_back_in_half_precision_and_fit_the_package(self, role, tmp_path):
        file = tmp_path / "reward.safetensors"
        save_reward_params(random_params(role), file)
        assert file.stat().st_size <= 0.5e6
        before, after = (
            ravel_pytree(nnx.to_pure_dict(p))[0] for p in (random_params(role), load_reward_params(role, file))
        )
        assert jnp.abs(before - after).max() <= 1e-3 * jnp.abs(before).max(), "weights changed"

    def test_those_of_another_network_are_refused(self, role, tmp_path):
        file = tmp_path / "reward.safetensors"
        save_reward_params(random_params("long" if role == "short" else "short"), file)
        with pytest.raises(WeightsError, match=f"not of mini_{role}"):
            load_reward_params(role, file)
        file.write_bytes(b"nonsense")
        with pytest.raises(WeightsError, match="cannot be read"):
            load_reward_params(role, file)
        with pytest.raises(WeightsError, match="cannot be read"):
            load_reward_params(role, tmp_path / "none")


@pytest.mark.parametrize("role", ROLES)
class TestTraining:
    def test_batches_are_a_function_of_their_number(self, role):
        task = reward_task(role, groups=2)
        first, again, other = task.batch(3), task.batch(3), task.batch(4)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
        assert not np.array_equal(first.tokens, other.tokens)

    def test_the_good_video_is_the_world_but_for_a_nuisance(self, role):
        recipe = RECIPES[role]
        scene = world.training_scene(5)
        group = degrade.draw_group(scene, 5, recipe.kinds, bad=3, frames=recipe.frames, stride=recipe.stride)
        group = group._replace(nuisance=degrade.Harm(*(np.float32(0) for _ in degrade.HARMS)))
        filmed = jax.jit(degrade.film_group, static_argnums=2)(group, jax.random.key(0), recipe.step)
        truth = jax.jit(world.render, static_argnames="step")(group.good, group.frames, step=recipe.step)
        assert filmed.shape[0] == 4
        assert jnp.abs(filmed[0] - truth).max() < 1e-5
        assert all(jnp.abs(bad - filmed[0]).max() > 0.05 for bad in filmed[1:])

    @pytest.mark.slow
    def test_it_learns_a_batch_by_heart(self, role, standard_promotion):  # optax mixes types
        task = reward_task(role, steps=60, groups=4)
        state, step, batch = init_train_state(task), make_train_step(task, 0), task.batch(0)
        losses = []
        for _ in range(60):
            state, figures = step(state, batch)
            losses.append(float(figures["loss"]))
        assert losses[-1] < 0.7 * losses[0], losses[::10]
        assert figures["accuracy"] > 0.75

    def test_every_kind_can_be_drawn_for_some_scene(self, role):
        recipe, tokenizer = RECIPES[role], rewards.caption_tokenizer()
        batch = draw_preferences(recipe, tokenizer, list(range(120)), world.training_scene)
        assert set(batch.groups.kind.ravel().tolist()) == set(range(len(recipe.kinds)))
        assert (batch.pairs.sum(axis=1) >= 1).all()


def test_a_picture_of_half_the_size_is_the_mean_of_the_whole():
    placed = world.place(world.random_scene(2), world.draw_openings(2))
    render = jax.jit(world.render, static_argnames="step")
    whole, half = (render(placed, jnp.arange(2), step=step) for step in (1, 2))
    mean = whole.reshape(2, 40, 2, 64, 2, 3).mean(axis=(2, 4))
    assert jnp.abs(mean - half).max() < 0.3
    assert jnp.abs(mean - half).mean() < 2e-3


@pytest.fixture(scope="module")
def pipe() -> StreamT1Pipeline:
    return StreamT1Pipeline(SmallWeights())


def test_a_search_asks_them_without_compiling_for_a_new_prompt(pipe, compile_count):
    search = SearchConfig(beams=1, candidates_per_beam=2)
    chosen = (reward("short"), reward("long"))
    first = pipe(CAPTIONS[0], frames=17, search=search, rewards=chosen)
    before = compile_count.value
    second = pipe(CAPTIONS[1], frames=17, search=search, rewards=chosen)
    assert compile_count.value == before
    for out in (first, second):
        assert all(np.isfinite([c.short, c.long]).all() for chunk in out.trace.chunks for c in chunk.candidates)
    told = pipe.tokens(CAPTIONS[0])
    padded = np.zeros((1, 32, *first.frames.shape[1:]), np.uint8)
    padded[0, :17] = first.frames
    expected = reward("long")(jnp.asarray(padded), jnp.array([17]), told).scores[0]
    assert abs(first.trace.final_scores[0] - expected) < 1e-4


def test_the_tokens_of_another_model_are_refused(pipe, tmp_path):
    class Others(SmallWeights):
        tokenizer = tmp_path

    file = SmallWeights.tokenizer / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(file.read_text() + "\n")
    other = StreamT1Pipeline(Others())
    with pytest.raises(BadInputError, match="reads the tokens of another model"):
        other("a red circle", frames=5, rewards=(reward("short"), "native"))


def test_a_conditioning_without_tokens_is_refused():
    with pytest.raises(BadInputError, match="reads the prompt's tokens"):
        reward("short").prompt_of(jnp.int32(0), None)


def test_their_tokenizer_is_that_of_the_embedded_model():
    weights = SmallWeights()
    found = Tokenizer(weights.tokenizer, text_len=64, vocab_size=1024).sha256
    assert reward("short").tokenizer == reward("long").tokenizer == found


def test_the_longest_caption_fits():
    count = rewards.caption_tokenizer()
    assert max(count(world.random_scene(seed).caption()).num_tokens for seed in range(500)) <= rewards.TOKENS
