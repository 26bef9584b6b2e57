"""The embedded model's rewards: what they are trained on, that training works, and how they enter a search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from flax import nnx
from jax.flatten_util import ravel_pytree
from small import SMALL, SmallWeights

from streamt1_jax import SearchConfig, StreamT1Pipeline, cli, cli_score
from streamt1_jax.bench import Bench
from streamt1_jax.compare import Plan, compare
from streamt1_jax.compare_methods import entries_of
from streamt1_jax.config import RunConfig
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.mini import degrade, rewards, shipped, train, world
from streamt1_jax.mini.rewards import RewardNet, make_reward, mini_long, mini_short, reward_graph
from streamt1_jax.mini.train_rewards import CLIPS, accuracy_by_kind, draw_preferences, draw_window, reward_task
from streamt1_jax.rewards import PromptTable, PromptTokens
from streamt1_jax.rewards.choice import check_choice, make_rewards
from streamt1_jax.rewards.registry import Role
from streamt1_jax.run_store import RunStore
from streamt1_jax.settings import GenerateConfig, RewardsConfig, load_settings
from streamt1_jax.stream import init_state, score_video, step
from streamt1_jax.text import Tokenizer
from streamt1_jax.weights import MiniWeights

ROLES: list[Role] = ["short", "long"]
CAPTIONS = ["a red circle moves right", "a blue square spins"]


@functools.cache
def random_params(role: Role):
    return nnx.split(RewardNet(role, rngs=nnx.Rngs(0)))[1]


@functools.cache
def reward(role: Role):
    return make_reward(role, random_params(role))


def tokens(caption: str) -> PromptTokens:
    prompt = rewards.caption_tokenizer()(caption)
    return PromptTokens(jnp.asarray(prompt.ids), jnp.asarray(prompt.mask))


@functools.cache
def jitted(role: Role):
    return jax.jit(reward(role))


def score(role: Role, videos: np.ndarray, counts: list[int], caption: str) -> np.ndarray:
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As `streamt1 train-mini --only rewards` writes it, of random numbers."""
    made = tmp_path_factory.mktemp("rewards")
    shipped.add_to_mini(made, {f"reward_{role}": random_params(role) for role in ROLES}, {"summary": "random"})
    return made


class TestWeights:
    def test_they_come_back_in_half_precision_and_are_small(self, folder):
        assert (folder / shipped.TENSORS).stat().st_size <= 1e6
        for role in ROLES:
            loaded = shipped.load_mini(folder, f"reward_{role}", reward_graph(role)[1])
            before, after = (ravel_pytree(nnx.to_pure_dict(p))[0] for p in (random_params(role), loaded))
            assert jnp.abs(before - after).max() <= 1e-3 * jnp.abs(before).max(), f"weights of {role} changed"

    def test_they_are_added_to_what_stands_there(self, folder, tmp_path):
        shipped.add_to_mini(tmp_path, {"vae": {"w": jnp.ones(3)}}, {"summary": "a VAE"})
        for scale in (1.0, 2.0):
            short = jax.tree.map(lambda x, scale=scale: scale * x, random_params("short"))
            shipped.add_to_mini(tmp_path, {"reward_short": short}, {"rewards": scale})
        manifest = shipped.read_manifest(tmp_path)
        assert manifest["networks"] == ["vae", "reward_short"]
        assert manifest["origin"] == {"summary": "a VAE", "rewards": 2.0}
        loaded = shipped.load_mini(tmp_path, "reward_short", reward_graph("short")[1])
        assert jnp.allclose(ravel_pytree(loaded)[0], 2 * ravel_pytree(random_params("short"))[0], atol=1e-2)
        with pytest.raises(WeightsError, match=r"holds vae, reward_short and no reward_long.* --only rewards, or name"):
            mini_long(MiniWeights(tmp_path).own_rewards)

    def test_damaged_ones_are_refused(self, folder, tmp_path):
        for name in (shipped.TENSORS, shipped.MANIFEST):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        with (tmp_path / shipped.TENSORS).open("ab") as file:
            file.write(b"x")
        with pytest.raises(WeightsError, match="sha256"):
            mini_short(tmp_path)

    def test_a_name_or_a_folder_chooses_them(self, folder):
        config = RewardsConfig(short="mini", long="mini", dir=str(folder))
        assert load_settings(None, cli_score.reward_overrides(str(folder), None, [])).rewards == config
        assert check_choice(config) is None
        chosen = make_rewards(config, PromptTable(), None)
        assert chosen == (mini_short(folder), mini_long(folder)), "another object compiles every step anew"
        assert [each.name for each in chosen] == ["mini_short", "mini_long"]
        assert all(each.about["sha256"] == shipped.read_manifest(folder)["sha256"] for each in chosen)

    @pytest.mark.parametrize("role", ROLES)
    def test_the_shipped_ones_prefer_good_videos(self, role):
        params = shipped.load_mini(shipped.FOLDER, f"reward_{role}", reward_graph(role)[1])
        found = accuracy_by_kind(role, params, batches=4)
        # What cannot be told without the caption; one that reads none would be right about half of these.
        asked = {"short": ("colour", "number", "background"), "long": ("colour", "background", "motion", "rate")}[role]
        assert min(found[kind] for kind in asked) > 0.75, found
        assert found["all"] > 0.9, found


class TestTraining:
    @pytest.mark.parametrize("role", ROLES)
    def test_batches_are_a_function_of_their_number(self, role):
        task = reward_task(role, steps=9, groups=2)
        first, again, other = task.batch(3), task.batch(3), task.batch(4)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
        assert not np.array_equal(first.videos, other.videos)

    def test_the_good_video_is_the_world_but_for_a_nuisance(self):
        clips, scene = CLIPS["long"], world.training_scene(5)
        group = degrade.draw_group(scene, 5, clips.kinds, draw_window(clips, 5), bad=3)
        group = group._replace(nuisance=degrade.Harm(*(np.zeros((), np.float32) for _ in degrade.HARMS)))
        (filmed,) = degrade.film_groups(jax.tree.map(lambda x: x[None], group), jax.random.key(0), clips.step)
        truth = jax.jit(world.render, static_argnames="step")(group.good, group.frames, step=clips.step)
        assert filmed.shape[0] == 4
        assert jnp.abs(filmed[0] - truth).max() < 1e-5
        assert all(jnp.abs(bad - filmed[0]).max() > 0.05 for bad in filmed[1:])

    @pytest.mark.slow
    def test_it_learns_a_batch_by_heart(self):
        task = reward_task("short", steps=9, groups=3)
        batch, key, params = task.batch(0), jax.random.key(0), task.init()
        slope = jax.jit(jax.value_and_grad(lambda params: task.loss(params, batch, key), has_aux=True))
        speed = jax.tree.map(jnp.zeros_like, params)
        losses, figures = [], {}
        for _ in range(60):
            (loss, figures), gradient = slope(params)
            speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, gradient)
            params = jax.tree.map(lambda p, v: p - 0.01 * v, params, speed)
            losses.append(float(loss))
        assert losses[-1] < 0.7 * losses[0], losses[::10]
        assert figures["accuracy"] > 0.75

    def test_every_bad_video_is_bad_where_it_is_looked_at(self):
        clips = CLIPS["long"]._replace(step=8)
        numbers = list(range(40))
        batch = draw_preferences(clips, rewards.caption_tokenizer(), numbers, world.training_scene, jax.random.key(0))
        found = 0
        for videos, kinds, pairs in zip(batch.videos, batch.kind, batch.pairs, strict=True):
            # A jump is seen in a pair of frames, of which the second alone is not that of the good video.
            differs = np.asarray(jnp.abs(videos[1:] - videos[:1]).max(axis=(2, 3, 4)) > 0.02)
            for bad, kind in zip(differs, kinds, strict=True):
                if clips.kinds[kind] in ("change", "jump"):
                    found += 1
                    assert (bad[:-1] | bad[1:])[pairs].any()
                if clips.kinds[kind] == "jump":
                    assert (~bad[:-1] & bad[1:])[pairs].any()
        assert found > 10

    @pytest.mark.parametrize("role", ROLES)
    def test_held_out_things_are_not_learned_as_bad_ones(self, role, monkeypatch):
        shown, place = [], world.place
        monkeypatch.setattr(world, "place", lambda scene, openings: shown.append(scene) or place(scene, openings))
        for number in range(400):
            window = draw_window(CLIPS[role], number)
            degrade.draw_group(world.training_scene(number), number, CLIPS[role].kinds, window, bad=3)
        assert len(set(shown)) > 600
        assert not any(map(world.is_held_out, shown))

    @pytest.mark.parametrize("role", ROLES)
    def test_every_kind_can_be_drawn_for_some_scene(self, role):
        kinds, seen = CLIPS[role].kinds, set()
        for number in range(60):
            window = draw_window(CLIPS[role], number)
            group = degrade.draw_group(world.training_scene(number), number, kinds, window, bad=3)
            seen |= set(group.kind.tolist())
        assert seen == set(range(len(kinds)))

    def test_windows_are_runs_or_pairs_far_apart(self):
        clips = CLIPS["long"]
        windows = [draw_window(clips, number) for number in range(200)]
        spans = [window.frames[window.counted - 1] for window in windows]
        assert all((np.diff(window.frames)[window.pairs] == clips.stride).all() for window in windows)
        assert sum(span < clips.stride * clips.frames for span in spans) in range(70, 130)
        assert max(spans) > 400

    def test_every_video_has_a_frame_that_counts(self):
        numbers, clips = list(range(12)), CLIPS["long"]._replace(step=8)
        batch = draw_preferences(clips, rewards.caption_tokenizer(), numbers, world.training_scene, jax.random.key(0))
        counts = batch.pairs.sum(axis=1)
        assert counts.min() >= 2
        assert counts.max() == clips.frames - 1

    def test_the_stage_writes_beside_what_stands_there(self, tmp_path, monkeypatch, capsys):
        trained = []

        def fit(task, folder, **options):
            trained.append((task.name, task.steps, folder, options["resume"]))
            return task.init()

        monkeypatch.setattr(train, "fit", fit)
        monkeypatch.setattr(train, "accuracy_by_kind", lambda role, params: {"all": 0.5})
        shipped.add_to_mini(tmp_path, {"vae": {"w": jnp.ones(3)}}, {"summary": "a VAE"})
        argv = ["train-mini", "--out", str(tmp_path), "--only", "rewards", "--resume"]
        assert cli.main([*argv, "--steps", "reward_short=7,reward_long=5"]) == 0
        assert trained == [("reward_short", 7, tmp_path, True), ("reward_long", 5, tmp_path, True)]
        manifest = shipped.read_manifest(tmp_path)
        assert manifest["networks"] == ["vae", "reward_short", "reward_long"]
        made = manifest["origin"]["rewards"]
        assert made["command"] == "streamt1 train-mini --only rewards --steps reward_short=7,reward_long=5 --seed 0"
        assert made["accuracy"]["reward_long"] == {"all": 0.5}
        assert f"--rewards {tmp_path}" in capsys.readouterr().out
        assert mini_short(tmp_path).name == "mini_short"


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


(BEAM,) = entries_of(["beam"], [2])
SEARCH = BEAM.search(SearchConfig())  # the same for all, so that its programs are compiled once


@pytest.fixture(scope="module")
def make(pipe):
    return functools.partial(pipe, frames=17, search=SEARCH, rewards=(reward("short"), reward("long")))


@pytest.fixture(scope="module")
def switched(make):
    """Three chunks, the last two of another prompt."""
    return make(CAPTIONS[0], switches={5 / 16: CAPTIONS[1]})


def stop_after(chunks: int):
    count = iter(range(1, 1000))
    return lambda result: next(count) == chunks


class TestSearch:
    def test_nothing_compiles_for_a_new_prompt(self, make, pipe, compile_count):
        first = make(CAPTIONS[0])
        before = compile_count.value
        second = make(CAPTIONS[1])
        assert compile_count.value == before
        for out in (first, second):
            assert all(np.isfinite([c.short, c.long]).all() for chunk in out.trace.chunks for c in chunk.candidates)
        told = pipe.prompt_for(reward("long"), CAPTIONS[0])
        assert abs(first.trace.final_scores[0] - score_video(reward("long"), first.frames, told)) < 1e-4

    def test_after_a_switch_they_read_the_new_prompt(self, make, pipe, switched):
        stream = pipe.stream(CAPTIONS[0], **make.keywords)
        for result in stream:
            if result.chunk.index == 0:
                pipe.switch_prompt(CAPTIONS[1])
            shown = min(result.chunk.index, 1)
            (kept,) = result.record.kept
            expected = [
                jitted("short")(result.record.frames, jnp.array([6 - (shown == 0)]), pipe.tokens(caption))
                for caption in CAPTIONS
            ]
            scores = [float(verdict.scores[0]) for verdict in expected]
            found = float(result.record.short.ravel()[kept])
            assert abs(found - scores[shown]) < 1e-4, f"chunk {result.chunk.index}: {found}, expected {scores[shown]}"
            assert abs(scores[0] - scores[1]) > 1e-3, "both prompts score the same: nothing is tested"
        parts = [
            len(part) / 17 * score_video(reward("long"), part, pipe.prompt_for(reward("long"), caption))
            for part, caption in zip((switched.frames[:5], switched.frames[5:]), CAPTIONS, strict=True)
        ]
        assert abs(switched.trace.final_scores[0] - sum(parts)) < 1e-4

    def test_a_resumed_run_ends_in_the_same_bits(self, make, switched, tmp_path):
        again = functools.partial(make, CAPTIONS[0], switches={5 / 16: CAPTIONS[1]})
        with RunStore(tmp_path / "run") as store:
            again(store=store, on_chunk=stop_after(2))
        other = make_reward("short", random_params("short"), {"sha256": "another"})
        with RunStore(tmp_path / "run", resume=True) as store, pytest.raises(BadInputError, match="rewards"):
            again(store=store, rewards=(other, reward("long")))
        with RunStore(tmp_path / "run", resume=True) as store:
            out = again(store=store)
        assert out.info["sha256"] == switched.info["sha256"]
        assert out.trace.final_scores == switched.trace.final_scores

    def test_a_comparison_measures_by_them_and_knows_their_weights(self, make, pipe, tmp_path):
        plan = Plan((BEAM,), (CAPTIONS[0],), generate=GenerateConfig(frames=17))
        chosen = make.keywords["rewards"]
        (result,) = compare(pipe, plan, tmp_path / "table", rewards=chosen)
        told = pipe.prompt_for(chosen[0], CAPTIONS[0])
        frames = make(CAPTIONS[0], seed=plan.seed(0)).frames
        assert abs(result.scores["reward.short"] - score_video(chosen[0], frames, told)) < 1e-4
        other = make_reward("short", random_params("short"), {"sha256": "another"})
        with pytest.raises(BadInputError, match="another reward model mini_short"):
            compare(pipe, plan, tmp_path / "table", rewards=(other, chosen[1]), resume=True)

    def test_finished_videos_are_scored(self, make, pipe, switched):
        chosen = make.keywords["rewards"]
        pairs = {role: (each, PromptTable()) for role, each in zip(ROLES, chosen, strict=True)}
        said = cli_score._score(pairs, "a.mp4", switched.frames, 16.0, CAPTIONS[0], given=False)["scores"]
        for role, each in zip(ROLES, chosen, strict=True):
            expected = score_video(each, switched.frames, pipe.prompt_for(each, CAPTIONS[0]))
            assert abs(said[role]["score"] - expected) < 1e-6, role

    def test_a_benchmark_has_tokens_for_them(self):
        chosen = (reward("short"), reward("long"))
        bench = Bench(SMALL, height=16, width=32, dtype=jnp.float32, rewards=chosen)
        search = bench.search(RunConfig(search=SEARCH))
        state = init_state(search, 0, 1)
        run = functools.partial(step, search, first=True)
        _, record = jax.eval_shape(run, bench.params, bench.conditioning(search), state)
        assert record.short.shape == (1, 2)


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
    tokenizer = rewards.caption_tokenizer()
    assert max(tokenizer(world.random_scene(seed).caption()).num_tokens for seed in range(500)) <= tokenizer.text_len


@pytest.mark.parametrize("role", ROLES)
def test_the_last_words_of_a_long_prompt_count(role):
    videos, num_frames = jnp.full((1, 9, 80, 128, 3), 100, jnp.uint8), jnp.array([9])
    long = "a red circle moves right on a gray background and " * 4
    prompts = [rewards.read_prompt(long + end) for end in ("a blue star spins", "a green ring bounces")]
    told = [np.flatnonzero(prompt.mask).size for prompt in prompts]
    assert min(told) > 40
    assert max(told) < rewards.caption_tokenizer().text_len
    scores = [float(jitted(role)(videos, num_frames, prompt).scores[0]) for prompt in prompts]
    assert abs(scores[0] - scores[1]) > 1e-3
