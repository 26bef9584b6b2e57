"""Training the embedded model: the shared loop, one step of each network, the noise of chunk 0, the recipe."""

import dataclasses
import functools
import json
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from streamt1_jax import cli
from streamt1_jax.config import DiTConfig, ModelConfig, StreamConfig, UMT5Config, VAEConfig
from streamt1_jax.errors import BadInputError, TrainingError, WeightsError
from streamt1_jax.interrupts import Interrupts
from streamt1_jax.measure import compilation_cache
from streamt1_jax.mini import shipped, train, train_dit, train_vae, world
from streamt1_jax.mini.sequences import BATCH, Sequences, clauses_of_tokens, encode_sequences, join
from streamt1_jax.mini.train import Recipe, Run, continue_decoder, continue_dit
from streamt1_jax.mini.train_dit import clause_loss, coupled_noise, dit_task
from streamt1_jax.mini.train_rewards import reward_task
from streamt1_jax.mini.train_vae import decoder_task, standardise, vae_task
from streamt1_jax.mini.training import Task, fit, init_train_state, make_train_step
from streamt1_jax.networks import network_graph
from streamt1_jax.text import Tokenizer
from streamt1_jax.weights import MiniWeights, random_params

SMALL = ModelConfig(
    dit=DiTConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=32),
    vae=VAEConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    text=UMT5Config(vocab_size=1024, dim=16, num_heads=2, head_dim=8, ffn_dim=16, num_layers=1),
    height=80,
    width=128,
)


def line_task(steps: int) -> Task:
    """Fits a plane: the loop itself, without a network; its matrix is stepped by Muon, as theirs are."""

    def batch(step):
        x = np.random.default_rng(step).standard_normal((8, 3)).astype(np.float32)
        return x, x @ np.array([[1.0, 0.0], [-2.0, 1.0], [0.5, 3.0]], np.float32)

    def loss(params, batch, key):
        x, y = batch
        noise = 0.01 * jax.random.normal(key, y.shape)
        return jnp.mean((x @ params["plane"]["kernel"] + params["plane"]["bias"] + noise - y) ** 2), {}

    init = lambda: {"plane": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}  # noqa: E731
    return Task("line", init, batch, loss, steps, learning_rate=0.1, decay_steps=40, warmup=2)


def test_a_resumed_run_makes_the_same_updates(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = fit(line_task(40), tmp_path / "whole", seed=3, save_every=10)
    stopped = dataclasses.replace(line_task(40), batch=lambda step: line_task(40).batch(step) if step < 27 else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in step 27; what follows goes on from step 20
        fit(stopped, tmp_path / "parts", seed=3, save_every=10, report_every=5)
    parts = fit(line_task(40), tmp_path / "parts", seed=3, save_every=10, report_every=5, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    lines = (tmp_path / "parts" / "line.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(5, 41, 5)), "what is made again is told once"
    said = []
    again = fit(line_task(40), tmp_path / "parts", seed=3, save_every=10, resume=True, report=said.append)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert said == [{"step": 40, "steps": 40}], "a stage that is done says so"


def test_a_signal_ends_a_training_after_its_step(tmp_path):
    def signalled(step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return line_task(40).batch(step)

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(line_task(40), batch=signalled), tmp_path, seed=3, interrupts=interrupts)
    assert [path.name for path in (tmp_path / "line").iterdir() if path.name.isdigit()] == ["7"], "the step is kept"
    said = []
    fit(line_task(40), tmp_path, seed=3, resume=True, report=said.append)
    assert said[0] == {"step": 7, "steps": 40}


def test_a_signal_ends_a_training_whose_stage_is_done(tmp_path):
    fit(line_task(2), tmp_path, seed=3)

    def signalled():
        signal.raise_signal(signal.SIGINT)
        return line_task(2).init()

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(line_task(2), init=signalled), tmp_path, seed=3, resume=True, interrupts=interrupts)


def test_checkpoints_are_not_overwritten_unasked(tmp_path):
    fit(line_task(2), tmp_path, seed=0)
    with pytest.raises(BadInputError, match="--resume"):
        fit(line_task(2), tmp_path, seed=0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    task = line_task(2)
    broken = dataclasses.replace(task, loss=lambda params, *_: (jnp.sum(params["plane"]["bias"]) / 0.0, {}))
    with pytest.raises(TrainingError, match=r"not finite at step 2.* another seed"):
        fit(broken, tmp_path, seed=0)


def test_stages_of_a_run_draw_other_scenes(vae):
    """As do runs of other seeds, whatever the stages; all batches hold what the world's videos are made of."""
    short = functools.partial(vae_task, steps=9, batch=2, frames=5, crop=16)
    tasks = [
        *(short(name, SMALL, seed=seed) for name in ("vae", "vae_long") for seed in (0, 1, 2)),
        *(decoder_task(SMALL, vae, steps=9, seed=seed) for seed in (0, 1, 2)),
    ]
    drawn = {tuple(task.batch(0).start[:2].tolist()) for task in tasks}
    assert len(drawn) == len(tasks)
    tokens = {
        reward_task(role, steps=9, groups=2, seed=seed).batch(0).tokens.tobytes()
        for role in ("short", "long")
        for seed in (0, 1)
    }
    assert len(tokens) == 4


@pytest.mark.slow
def test_no_stage_sees_what_is_held_out(vae, monkeypatch):
    """Of the scenes that each draws, one in ten or so would hold such a thing."""
    shown, place = [], world.place
    monkeypatch.setattr(world, "place", lambda scene, openings: shown.append(scene) or place(scene, openings))
    tasks = [
        vae_task("vae", SMALL, steps=9, batch=8, frames=5, crop=16),
        decoder_task(SMALL, vae, steps=9),
        *(reward_task(role, steps=9, groups=2) for role in ("short", "long")),
    ]
    for task in tasks:
        drawn = len(shown)
        while len(shown) < drawn + 60:
            task.batch(len(shown))
    tokenizer = Tokenizer(MiniWeights.tokenizer, text_len=32, vocab_size=1024)
    join(encode_sequences(SMALL, vae, tokenizer, count=60, chunks=1, seed=0, batch=20))
    train._latents_of_the_world(SMALL, vae)
    assert len(shown) > 5 * 60
    assert not any(map(world.is_held_out, shown))


def test_stages_of_a_run_draw_other_numbers():
    def noise(name: str, seed: int) -> float:
        task = dataclasses.replace(
            line_task(4), name=name, loss=lambda params, batch, key: (jnp.float32(0), {"drawn": jax.random.normal(key)})
        )
        return float(make_train_step(task, seed)(init_train_state(task), task.batch(0))[1]["drawn"])

    assert len({noise("dit_first", 1), noise("dit", 1), noise("dit", 2)}) == 3
    assert noise("dit", 1) == noise("dit", 1)


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """Nothing of this module is compiled twice, and XLA has crashed while it wrote so large a program as a training
    step's into the cache (jaxlib 0.10.2, CPU)."""
    with compilation_cache(None):
        yield


def loss_before_and_after(task: Task) -> tuple[float, float]:
    """A step at the full rate, on one fixed batch and key."""
    task = dataclasses.replace(task, warmup=0)
    batch, key = task.batch(0), jax.random.key(0)
    value = jax.jit(lambda params: task.loss(params, batch, key)[0])
    state = init_train_state(task)
    before = float(value(state.params))
    state, _ = make_train_step(task, seed=0)(state, batch)
    return before, float(value(state.params))


@pytest.mark.slow
def test_a_step_of_the_vae_lowers_its_loss():
    task = vae_task("vae", SMALL, steps=100, batch=1, frames=5, crop=16)
    before, after = loss_before_and_after(task)
    assert after < before


@pytest.mark.slow
def test_a_step_of_the_decoder_alone_lowers_its_loss(vae):
    task = decoder_task(SMALL, vae, steps=100)
    before, after = loss_before_and_after(task)
    assert after < before


@pytest.fixture(scope="module")
def vae():
    return random_params(network_graph(SMALL, "vae", jnp.float32)[1], seed=0)


@pytest.fixture(scope="module")
def sequences(vae) -> Sequences:
    tokenizer = Tokenizer(MiniWeights.tokenizer, text_len=32, vocab_size=1024)
    return join(encode_sequences(SMALL, vae, tokenizer, count=3, chunks=3, seed=0, batch=2))


@pytest.mark.slow
def test_sequences_are_chunks_of_the_world(sequences):
    assert sequences.latents.shape == (3, 3, 3, 16, 10, 16)
    assert np.isfinite(sequences.latents).all()
    assert (sequences.start[:, 0] == 0).all()
    assert (np.diff(sequences.start[:, 1:], axis=1) == 3).all()
    assert sequences.openings.shape == (3, 2, 6)


@pytest.fixture(scope="module")
def first_chunks(vae) -> Sequences:
    tokenizer = Tokenizer(MiniWeights.tokenizer, text_len=32, vocab_size=1024)
    return join(encode_sequences(SMALL, vae, tokenizer, count=3, chunks=1, seed=0, batch=2))


def test_first_chunks_alone_are_those_of_sequences(sequences, first_chunks):
    assert first_chunks.latents.shape == (3, 1, 3, 16, 10, 16)
    np.testing.assert_allclose(first_chunks.latents[:, 0], sequences.latents[:, 0], atol=1e-4)
    np.testing.assert_array_equal(first_chunks.openings, sequences.openings)
    np.testing.assert_array_equal(first_chunks.tokens, sequences.tokens)
    np.testing.assert_allclose(first_chunks.other_looks, sequences.other_looks, atol=1e-4)


def test_other_looks_are_of_chunk_0(vae, sequences, monkeypatch):
    monkeypatch.setattr(world, "other_looks", lambda scene, seed: scene)
    tokenizer = Tokenizer(MiniWeights.tokenizer, text_len=32, vocab_size=1024)
    same = join(encode_sequences(SMALL, vae, tokenizer, count=3, chunks=1, seed=0, batch=2))
    np.testing.assert_allclose(same.other_looks, same.latents[:, 0], atol=1e-4)
    assert np.abs(sequences.other_looks - same.other_looks).max() > 1e-2


@pytest.mark.parametrize(
    ("caption", "sizes"),
    [
        ("a red circle grows and shrinks", (6, 0)),
        ("a red circle grows and shrinks and a blue square spins on a gray background", (6, 5)),
        ("a blue square spins on a gray background", (4, 0)),
    ],
)
def test_every_token_knows_its_clause(caption, sizes):
    tokenizer = Tokenizer(MiniWeights.tokenizer, text_len=32, vocab_size=1024)
    clauses = clauses_of_tokens(tokenizer, world.parse_caption(caption))
    first, second = sizes
    np.testing.assert_array_equal(clauses, [0] * first + [1] * second + [2] * (32 - first - second))


def test_the_clause_loss_is_of_the_captions_tokens_alone():
    clauses, mask = jnp.array([0, 1, 2, 0]), jnp.array([1, 1, 1, 0])
    np.testing.assert_allclose(clause_loss(jnp.zeros((4, 3)), clauses, mask), np.log(3), rtol=1e-6)
    sure = 30 * jax.nn.one_hot(jnp.array([0, 1, 2, 1]), 3)  # wrong in the padding
    np.testing.assert_allclose(clause_loss(sure, clauses, mask), 0, atol=1e-6)
    np.testing.assert_allclose(clause_loss(-sure, clauses, mask), 30 + np.log(2), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["first_chunks", "sequences"])
def test_a_step_of_the_dit_lowers_its_loss(data, request):
    task = dit_task("dit", SMALL, StreamConfig(), [(request.getfixturevalue(data), 2)], steps=100, learning_rate=2e-3)
    before, after = loss_before_and_after(task)
    assert after < before


@pytest.mark.slow
def test_a_step_of_the_text_encoder_alone_lowers_the_loss(first_chunks):
    abstract = {name: network_graph(SMALL, name, jnp.float32)[1] for name in ("dit", "text")}
    start = {name: random_params(network, seed=1) for name, network in abstract.items()}
    task = dit_task("dit", SMALL, StreamConfig(), [(first_chunks, 2)], start, steps=100, learning_rate=2e-3)
    batch, key, params = task.batch(0), jax.random.key(0), task.init()
    loss = jax.jit(lambda text: task.loss(params | {"text": text}, batch, key)[0])
    before, slope = jax.jit(jax.value_and_grad(loss))(params["text"])
    size = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(slope))
    assert size > 0
    step = 1e-3 * float(before) / size  # to first order, a thousandth less
    after = loss(jax.tree.map(lambda p, g: p - step * g, params["text"], slope))
    np.testing.assert_allclose(float(before - after), 1e-3 * float(before), rtol=0.2)


@pytest.mark.slow
def test_a_resumed_network_makes_the_same_updates(first_chunks, tmp_path):
    task = dit_task("dit", SMALL, StreamConfig(), [(first_chunks, 2)], steps=4, learning_rate=2e-3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = fit(task, tmp_path / "whole", seed=3)
    stopped = dataclasses.replace(task, batch=lambda step: task.batch(step) if step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(stopped, tmp_path / "parts", seed=3, save_every=2)
    parts = fit(task, tmp_path / "parts", seed=3, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["short", "long"])
def test_a_step_of_a_reward_lowers_its_loss(role):
    task = reward_task(role, steps=100, groups=2)
    before, after = loss_before_and_after(task)
    assert after < before


def test_crops_hold_the_first_thing_when_the_loss_begins():
    for step in range(40):
        clips = train_vae._clips(step, 1, 48, 73, 0)
        placed = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), clips.placed)
        centre = world.pose(placed, jnp.int32(clips.start[0] + 73)).centre[0]
        away = (np.asarray(centre)[::-1] - clips.corner[0]) % (world.HEIGHT, world.WIDTH)
        assert (away < 48).all()


@pytest.mark.slow
def test_standardised_latents_decode_to_the_same_video(vae):
    graph, _ = network_graph(SMALL, "vae", jnp.float32)
    video = jax.random.uniform(jax.random.key(0), (5, 16, 16, 3), minval=-1.0, maxval=1.0)

    def code(params):
        both = nnx.merge(graph, params)
        latents = both.encoder.encode(video)
        return latents, both.decoder.decode_unclamped(latents)

    latents, decoded = code(vae)
    changed_latents, changed = code(standardise(SMALL, vae, latents[None]))
    np.testing.assert_allclose(changed, decoded, atol=1e-4)
    np.testing.assert_allclose(changed_latents.mean(axis=(0, 2, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(changed_latents**2), 1.0, rtol=1e-4)


def test_coupled_noise_says_the_openings_and_stays_normal():
    keys = jax.random.split(jax.random.key(0), 4000)
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 16, 10, 16)))(keys)
    seeds = range(4000)
    openings = np.stack([world.draw_openings(seed) for seed in seeds]).astype(np.float32)
    coupled = np.asarray(jax.jit(jax.vmap(coupled_noise))(noise, openings))
    board = np.array([[0.5, -0.5], [-0.5, 0.5]])
    read = np.einsum("ncyixj,ij->ncyx", coupled[:, 0].reshape(4000, 16, 5, 2, 8, 2), board)
    thing = world.Thing("red", "star", "spins")
    for n in seeds[:100]:
        placed = world.place(world.Scene((thing, thing)), world.draw_openings(n))
        for i, (x, y) in enumerate(placed.start):
            row, column = int(y // 16), int(x // 16)
            assert read[n, 7 * i, row, column] == read[n, 7 * i, 1:-1, 1:-1].max()
            np.testing.assert_allclose(
                norm.cdf(read[n, 7 * i + 1 : 7 * i + 3, row, column]), [x / 16 % 1, y / 16 % 1], atol=2e-3
            )
            np.testing.assert_allclose(read[n, 7 * i + 3 : 7 * i + 7, row, column], openings[n, i, 2:], atol=1e-5)
    np.testing.assert_array_equal(coupled[:, 1], noise[:, 1])
    np.testing.assert_array_equal(coupled[:, 0, 14:], noise[:, 0, 14:])
    # All readings are still of mean 0 and variance 1 and independent of each other.
    for channels in (slice(0, 1), slice(1, 3), slice(7, 8)):
        flat = read[:, channels].reshape(4000, -1)
        np.testing.assert_allclose(flat.mean(axis=0), 0.0, atol=0.07)
        np.testing.assert_allclose(np.cov(flat.T), np.eye(flat.shape[1]), atol=0.12)


def inputs_of_chunk_0(velocity, count=256):
    """(clean, other looks, openings, inputs for `count` keys) of a chunk of noise; nothing depends on its looks."""
    clean, other = jax.random.normal(jax.random.key(1), (2, 3, 16, 10, 16))
    openings = jnp.asarray(world.draw_openings(0), jnp.float32)
    draw = functools.partial(train_dit.first_chunk_inputs, velocity, clean, other, openings)
    return clean, other, openings, jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count))


def test_coupled_levels_of_chunk_0_begin_from_unrelated_noise():
    # Where the velocity is 0, the network's estimate is the noise that it was given.
    _, _, openings, inputs = inputs_of_chunk_0(lambda noisy, level: jnp.zeros_like(noisy))
    assert set(inputs.level[:, 0].tolist()) == {0, 1}
    assert 0.15 < float(jnp.mean(inputs.level[:, 0] == 0)) < 0.35
    given, noise = inputs.estimate[:, 0], inputs.noise[:, 0]
    assert abs(float(jnp.mean(given * noise))) < 0.01
    again = jax.vmap(coupled_noise, in_axes=(0, None))
    np.testing.assert_allclose(again(noise, openings), noise, atol=1e-5)  # it says the openings already
    assert float(jnp.max(jnp.abs(again(given, openings) - given))) > 1


def test_the_guess_of_the_first_level_is_not_trained_by_the_second():
    def total(factor):
        _, _, _, inputs = inputs_of_chunk_0(lambda noisy, level: factor * noisy, count=2)
        return jnp.sum(inputs.estimate)

    assert jax.grad(total)(0.5) == 0


def test_lower_levels_of_chunk_0_begin_from_the_truth_or_on_the_way_to_other_looks():
    clean, other, openings, inputs = inputs_of_chunk_0(lambda noisy, level: noisy)
    assert set(inputs.level[:, 1].tolist()) == {2, 3}
    way = np.asarray(other - clean)
    share = np.einsum("nfchw,fchw->n", inputs.estimate[:, 1] - clean, way) / np.sum(way**2)
    np.testing.assert_allclose(inputs.estimate[:, 1], clean + share[:, None, None, None, None] * way, atol=1e-4)
    assert 0.3 < np.mean(share < 1e-5) < 0.5
    assert share.min() > -1e-5
    assert 0.9 < share.max() < 1
    assert abs(float(jnp.mean(inputs.noise[:, 1] * inputs.noise[:, 0]))) < 0.01
    said = jax.vmap(coupled_noise, in_axes=(0, None))(inputs.noise[:, 1], openings)
    assert not bool(jnp.any(jnp.all(jnp.isclose(said, inputs.noise[:, 1], atol=1e-3), axis=(1, 2, 3, 4))))


def test_the_loss_of_a_level_is_that_of_its_new_estimate():
    sigmas = jnp.array([1.0, 0.9, 0.6])
    clean, estimate, noise, answer = jax.random.normal(jax.random.key(0), (4, 3, 16, 10, 16))
    for level, sigma in enumerate(sigmas):
        right = lambda noisy, _, sigma=sigma: (noisy - clean) / sigma  # noqa: E731
        loss, new = train_dit.level_loss(right, sigmas, clean, jnp.int32(level), estimate, noise)
        np.testing.assert_allclose(loss, 0.0, atol=1e-10)
        np.testing.assert_allclose(new, clean, atol=1e-5)
        wrong = lambda noisy, _: answer  # noqa: E731
        loss, new = train_dit.level_loss(wrong, sigmas, clean, jnp.int32(level), estimate, noise)
        np.testing.assert_allclose(loss, jnp.mean((new - clean) ** 2) / sigma**2, rtol=1e-4)
        loss, _ = train_dit.level_loss(wrong, sigmas, clean, jnp.int32(level), clean, noise)
        np.testing.assert_allclose(loss, jnp.mean((answer - (noise - clean)) ** 2), rtol=1e-4)  # flow matching


def test_sequences_of_another_version_are_refused(tmp_path, vae):
    (tmp_path / "sequences_3x1").mkdir()
    np.savez(tmp_path / "sequences_3x1" / "0.npz", latents=np.zeros(1))
    with pytest.raises(BadInputError, match="another version"):
        Run(tmp_path, Recipe()).encode(SMALL, vae, 3, 1)


@pytest.mark.slow
def test_a_stopped_encoding_goes_on_with_the_next_part(tmp_path, vae, monkeypatch):
    monkeypatch.setattr(train, "ENCODED_PART", BATCH)
    run, count = Run(tmp_path, Recipe()), BATCH + 3
    whole = run.encode(SMALL, vae, count, 1)
    first, second = (tmp_path / f"sequences_{count}x1" / f"{begin}.npz" for begin in (0, BATCH))
    second.unlink()
    written = first.stat().st_mtime_ns
    again = run.encode(SMALL, vae, count, 1)
    assert first.stat().st_mtime_ns == written
    assert len(again.latents) == count
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_run_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train._commit() is None


def test_a_package_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    (tmp_path / "train.py").touch()
    assert train._commit() is None


def test_going_on_under_another_version_is_recorded(tmp_path, monkeypatch):
    first = Run(tmp_path, Recipe(), 3).begin()
    assert "resumed_with" not in Run(tmp_path, Recipe(), 3, resume=True).begin()
    monkeypatch.setattr(train, "_commit", lambda: "another")
    for _ in range(2):
        again = Run(tmp_path, Recipe(), 3, resume=True).begin()
    assert again == {**first, "resumed_with": [{"commit": "another"}]}


def test_recipe_names_are_checked():
    assert Recipe.parse("vae=3,dit=4") == Recipe(vae=3, dit=4)
    assert Recipe.parse(None) == Recipe()
    for text, message in (
        ("vae", "NAME=NUMBER"),
        ("steps=3", "a name of"),
        ("vae=0", "at least 1"),
        ("vae=-1", "NUMBER"),
        ("first_chunks=10", "larger than its set"),
    ):
        with pytest.raises(BadInputError, match=message):
            Recipe.parse(text)
    assert Recipe.parse("dit=4", train.DIT_KEYS) == Recipe(dit=4)
    for keys in (train.DIT_KEYS, train.REWARD_KEYS):
        with pytest.raises(BadInputError, match=r"'vae=3'.* a name of"):
            Recipe.parse("vae=3", keys)


def test_saved_weights_come_back_and_are_verified(tmp_path, vae):
    shipped.add_to_mini(tmp_path, {"vae": vae}, {"summary": "a test"})
    abstract = network_graph(SMALL, "vae", jnp.float32)[1]
    loaded = shipped.load_mini(tmp_path, "vae", abstract)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(vae), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    other = network_graph(ModelConfig.tiny(), "vae", jnp.float32)[1]
    with pytest.raises(WeightsError, match="another size"):
        shipped.load_mini(tmp_path, "vae", other)
    path = tmp_path / shipped.TENSORS
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(WeightsError, match="sha256"):
        shipped.load_mini(tmp_path, "vae", abstract)


def test_weights_are_sampled_at_the_shift_they_were_trained_at(tmp_path, vae):
    shipped.add_to_mini(tmp_path, {"vae": vae}, {"summary": "a test"})
    path = tmp_path / shipped.MANIFEST
    manifest = json.loads(path.read_text())
    assert MiniWeights(tmp_path).config == ModelConfig.mini()
    path.write_text(json.dumps(manifest | {"timestep_shift": 3.0}))
    assert MiniWeights(tmp_path).config == dataclasses.replace(ModelConfig.mini(), timestep_shift=3.0)
    del manifest["timestep_shift"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match="no timestep_shift: another version"):
        MiniWeights(tmp_path)


@pytest.mark.slow
def test_training_goes_on_from_earlier_weights(tmp_path, vae, monkeypatch):
    monkeypatch.setattr(ModelConfig, "mini", classmethod(lambda cls: SMALL))
    monkeypatch.setattr(train, "_commit", lambda: "of now")  # a file saved meanwhile would make the resumed run another
    abstract = {name: network_graph(SMALL, name, jnp.float32)[1] for name in ("dit", "text")}
    old = {name: random_params(network, seed=1) for name, network in abstract.items()}
    start, out = tmp_path / "start", tmp_path / "out"
    shipped.add_to_mini(start, {"vae": vae, **old}, {"summary": "a test", "continued": [{"seed": 5}]})
    recipe = Recipe(
        first_chunks=4, sequences=2, chunks=2, dit_first=2, dit_first_batch=2, dit=2, dit_batch=2, vae=9, reward_long=9
    )
    rates, fit_stage = [], train.fit
    monkeypatch.setattr(
        train, "fit", lambda task, *args, **kwargs: rates.append(task.learning_rate) or fit_stage(task, *args, **kwargs)
    )
    continue_dit(Run(out, recipe, seed=3), start)
    assert tuple(rates) == train.RATES_GOING_ON

    before, after = shipped.read_manifest(start), shipped.read_manifest(out)
    first, record = after["origin"]["continued"]
    assert (after["origin"]["summary"], first) == ("a test", {"seed": 5})
    assert record["start_sha256"] == before["sha256"]
    numbers = "first_chunks=4,sequences=2,dit_first=2,dit_first_batch=2,dit=2,dit_batch=2,chunks=2"
    assert record["command"] == f"streamt1 train-mini --start DIR --steps {numbers} --seed 3"
    for name in ("dit", "text"):
        new = shipped.load_mini(out, name, abstract[name])
        changes = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (new, old[name])), strict=True)]
        assert max(changes) > 1e-3, f"{name} was not trained"
    kept = (shipped.load_mini(folder, "vae", network_graph(SMALL, "vae", jnp.float32)[1]) for folder in (start, out))
    for ours, theirs in zip(*map(jax.tree.leaves, kept), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    shipped.add_to_mini(out, {"reward_short": {"w": jnp.ones(2)}}, {"rewards": "mine"})
    continue_dit(Run(out, recipe, seed=3, resume=True), start)
    again = shipped.read_manifest(out)
    assert (set(again["networks"]), again["origin"]) == (
        {"vae", "dit", "text", "reward_short"},
        {**after["origin"], "rewards": "mine"},
    )
    with pytest.raises(BadInputError, match="seed is 5"):
        continue_dit(Run(out, recipe, seed=5), start)
    for folder, numbers, seed in ((start, recipe, 3), (out, recipe, 4), (out, dataclasses.replace(recipe, dit=3), 3)):
        with pytest.raises(BadInputError, match="another folder"):
            continue_dit(Run(folder, numbers, seed, resume=True), start)
    with pytest.raises(BadInputError, match="pass --resume"):
        continue_dit(Run(out, recipe, seed=3), start)


def with_shift(folder, shift: float) -> None:
    path = folder / shipped.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_shift": shift}))


def test_the_shift_stays_that_of_the_dit(tmp_path, vae):
    old, new = tmp_path / "old", tmp_path / "new"
    shipped.add_to_mini(old, {"dit": {"w": jnp.ones(2)}}, {"summary": "a test"})
    with_shift(old, 3.0)
    shipped.add_to_mini(new, {"reward_short": {"w": jnp.ones(2)}}, {})  # before there is a DiT beside it
    shipped.add_to_mini(new, {"vae": vae}, {}, start=old)
    shipped.add_to_mini(new, {"reward_long": {"w": jnp.ones(2)}}, {})
    assert shipped.read_manifest(new)["timestep_shift"] == 3.0


def test_the_decoder_alone_goes_on_from_earlier_weights(tmp_path, vae, monkeypatch):
    monkeypatch.setattr(ModelConfig, "mini", classmethod(lambda cls: SMALL))
    monkeypatch.setattr(train, "fit", lambda task, *_, **__: jax.tree.map(lambda leaf: leaf + 1, task.init()))
    abstract = {name: network_graph(SMALL, name, jnp.float32)[1] for name in ("vae", "dit", "text")}
    old = {"vae": vae} | {name: random_params(abstract[name], seed=1) for name in ("dit", "text")}
    start, out = tmp_path / "start", tmp_path / "out"
    shipped.add_to_mini(start, old, {"summary": "a test"})
    with_shift(start, 3.0)
    continue_decoder(Run(out, Recipe(decoder=3), seed=3), start)

    assert MiniWeights(out).config.timestep_shift == 3.0
    (record,) = shipped.read_manifest(out)["origin"]["continued"]
    assert record["command"] == "streamt1 train-mini --only decoder --start DIR --steps decoder=3 --seed 3"
    before, after = (
        {name: shipped.load_mini(folder, name, abstract[name]) for name in abstract} for folder in (start, out)
    )
    for ours, theirs in zip(*(jax.tree.leaves(each["vae"]["decoder"]) for each in (after, before)), strict=True):
        np.testing.assert_allclose(ours, theirs + 1, atol=2e-3)
    for each in (before, after):
        del each["vae"]["decoder"]
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--only decoder", "needs --start"),
        ("--only rewards --start mini", "leave one out"),
        ("--only decoder --start mini --steps dit=3", "a name of decoder"),
    ],
)
def test_options_of_train_mini_that_do_not_go_together(tmp_path, capsys, options, message):
    assert cli.main(["train-mini", "--out", str(tmp_path / "out"), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_recipe_fits_together(tmp_path, monkeypatch, capsys):
    """All stages in their order, each traced on its first batch in the place of being trained; stopped and resumed."""
    monkeypatch.setattr(ModelConfig, "mini", classmethod(lambda cls: SMALL))
    monkeypatch.setattr(train, "accuracy_by_kind", lambda role, params: {"all": 0.5})
    made, rates, stop_at = [], {}, ["dit"]

    def fit(task, folder, **options):
        if task.name in stop_at:
            raise KeyboardInterrupt
        loss, _ = jax.eval_shape(task.loss, task.init(), task.batch(0), jax.random.key(0))
        assert loss.shape == ()
        made.append((task.name, task.steps, options["resume"]))
        rates[task.name] = task.learning_rate
        return task.init()

    monkeypatch.setattr(train, "fit", fit)
    numbers = {f.name: 2 for f in dataclasses.fields(Recipe)} | {
        "decoder": 6,
        "first_chunks": 4,
        "dit_first": 3,
        "dit": 4,
        "reward_long": 5,
    }
    steps = ",".join(f"{key}={value}" for key, value in numbers.items())
    argv = ["train-mini", "--out", str(tmp_path), "--steps", steps, "--seed", "7"]
    assert cli.main(argv) == 130
    assert "go on from the last checkpoint with --resume" in capsys.readouterr().err
    assert not (tmp_path / shipped.TENSORS).exists()
    stop_at.clear()
    made.clear()
    assert cli.main([*argv, "--resume"]) == 0

    rewards = [("reward_short", 2, True), ("reward_long", 5, True)]
    vae = [(name, 2, True) for name in ("vae", "vae_long", "vae_stream")]
    assert made == [*vae, ("decoder", 6, True), ("dit_first", 3, True), ("dit", 4, True), *rewards]
    assert (rates["dit_first"], rates["dit"]) == train.RATES_FROM_NOTHING
    manifest = shipped.read_manifest(tmp_path)
    assert set(manifest["networks"]) == {"vae", "dit", "text", "reward_short", "reward_long"}
    assert manifest["origin"]["command"] == f"streamt1 train-mini --steps {steps} --seed 7"
    assert manifest["origin"]["rewards"]["accuracy"]["reward_long"] == {"all": 0.5}
    for name in ("vae", "dit", "text"):
        shipped.load_mini(tmp_path, name, network_graph(SMALL, name, jnp.float32)[1])  # of its sizes, undamaged
