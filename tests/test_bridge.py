"""The crossing to the host: numpy and torch rewards inside `jit`, `scan` and `vmap`."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.rewards import FAILED, OK, PromptTable, host_reward, per_video, torch_reward

SHAPE = (4, 7, 5, 6, 3)
LENGTHS = np.array([7, 3, 1, 5], np.int32)
PROMPTS = ("a cat", "a dog in the rain", "<|Reward|> كلب \U0001f600")


def videos(seed=0, lead=()):
    return np.random.default_rng(seed).integers(0, 256, (*lead, *SHAPE), dtype=np.uint8)


def one(video, prompt):
    """Depends on every valid pixel, on the number of frames and on the prompt."""
    return float((video.astype(np.float64) * np.arange(1, len(video) + 1)[:, None, None, None]).mean() + len(prompt))


def direct(batch, prompt, lengths=LENGTHS):
    return np.array([one(v[:t], prompt) for v, t in zip(batch, lengths, strict=True)])


@pytest.fixture(scope="module")
def reward():
    return host_reward("mine", per_video(one), PromptTable(PROMPTS))


@pytest.fixture(params=["buffers", "copies"])
def crossing(request, monkeypatch):
    """Both ways over: the one taken on a CPU, and the one taken elsewhere (run here on a CPU, with small arrays)."""
    if request.param == "copies":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


class TestTransforms:
    pytestmark = pytest.mark.usefixtures("crossing")

    def test_eager_and_jit(self, reward):
        for run in (reward, jax.jit(reward)):
            for index, prompt in enumerate(PROMPTS):
                verdict = run(jnp.asarray(videos(index)), jnp.asarray(LENGTHS), jnp.int32(index))
                np.testing.assert_allclose(verdict.scores, direct(videos(index), prompt), rtol=1e-6)
                np.testing.assert_array_equal(verdict.status, [OK] * 4)
                assert (verdict.scores.dtype, verdict.status.dtype) == (jnp.float32, jnp.int32)

    def test_scan(self, reward):
        batch, index = videos(1, (3,)), jnp.array([2, 0, 1])

        def body(carry, x):
            verdict = reward(x[0], jnp.asarray(LENGTHS), x[1])
            return carry + verdict.scores.sum(), verdict

        total, verdict = jax.jit(lambda xs: jax.lax.scan(body, 0.0, xs))((jnp.asarray(batch), index))
        expected = np.stack([direct(batch[i], PROMPTS[index[i]]) for i in range(3)])
        np.testing.assert_allclose(verdict.scores, expected, rtol=1e-6)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)

    @pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, None, 0), (None, 0, None)])
    def test_vmapped_is_one_by_one(self, reward, axes):
        batch = videos(2, (3,)) if axes[0] == 0 else videos(2)
        lengths = np.stack([LENGTHS, LENGTHS[::-1], LENGTHS * 0 + 2]) if axes[1] == 0 else LENGTHS
        index = np.array([1, 2, 0], np.int32) if axes[2] == 0 else np.int32(1)
        args = [jnp.asarray(a) for a in (batch, lengths, index)]
        got = jax.jit(jax.vmap(reward, axes))(*args).scores
        pick = [[a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)] for i in range(3)]
        np.testing.assert_array_equal(got, np.stack([reward(*p).scores for p in pick]))
        expected = [direct(np.asarray(p[0]), PROMPTS[int(p[2])], np.asarray(p[1])) for p in pick]
        np.testing.assert_allclose(got, np.stack(expected), rtol=1e-6)

    def test_vmap_of_vmap(self, reward):
        batch, index = videos(3, (2,)), jnp.array([2, 0, 1])
        over_prompts = jax.vmap(reward, (None, None, 0))
        got = jax.vmap(over_prompts, (0, None, None))(jnp.asarray(batch), jnp.asarray(LENGTHS), index).scores
        expected = [[direct(batch[i], PROMPTS[j]) for j in index] for i in range(2)]
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def test_a_batch_crosses_once_and_holds_valid_frames_only(self):
        calls = []

        def fn(clips, prompts):
            calls.append(([clip.shape[0] for clip in clips], list(prompts)))
            for clip in clips:
                assert isinstance(clip, np.ndarray)
                clip[:] = 0  # a reward may write into its frames: nobody else sees it
            return np.zeros(len(clips))

        mine, batch = host_reward("counting", fn, PromptTable(PROMPTS)), jnp.asarray(videos(4, (2,)))
        jax.vmap(mine, (0, None, 0))(batch, jnp.asarray(LENGTHS), jnp.array([1, 0])).scores.block_until_ready()
        assert calls == [([7, 3, 1, 5] * 2, [PROMPTS[1]] * 4 + [PROMPTS[0]] * 4)]
        np.testing.assert_array_equal(batch, videos(4, (2,)))

    def test_a_failure_is_data_and_the_next_call_is_sound(self):
        def fn(clips, prompts):
            if prompts[0] == PROMPTS[1]:
                raise RuntimeError("out of paper")
            return [1.0] * len(clips)

        mine = host_reward("moody", fn, PromptTable(PROMPTS))
        run = jax.jit(jax.vmap(mine, (None, None, 0)))
        for index, good in (([0, 2], True), ([1, 0], False), ([2, 0], True)):
            verdict = run(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.array(index))
            np.testing.assert_array_equal(verdict.scores, np.full((2, 4), 1.0 if good else np.nan))
            np.testing.assert_array_equal(verdict.status, np.full((2, 4), OK if good else FAILED))
        with pytest.raises(RewardError, match="'moody' failed with RuntimeError: out of paper") as caught:
            mine.raise_if_failed()
        assert 'raise RuntimeError("out of paper")' in caught.value.__notes__[0]
        assert mine.failures == []


class TestHostFunctions:
    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([1.0] * 3, "3 scores for 4 videos"),
            ([1.0] * 5, "5 scores for 4 videos"),
            ([], "0 scores for 4 videos"),
            (1.0, "not iterable"),
            (None, "not iterable"),
            (["a", 1, 1, 1], "'a' for video 0, which is not a number"),
            ([1, 2, None, 3], "None for video 2, which is not a number"),
            ([1, 2, 3, 1j], "1j for video 3, which is not a number"),
            ([True, 1, 1, 1], "True for video 0, which is not a number"),
            ("1234", "'1' for video 0, which is not a number"),
            (np.zeros((4, 2)), "ValueError"),
            (np.array([True] * 4), "not a number"),
        ],
    )
    def test_a_wrong_answer(self, answer, message):
        mine = host_reward("wrong", lambda clips, prompts: answer)
        verdict = jax.jit(mine)(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(0))
        assert np.all(np.isnan(verdict.scores))
        np.testing.assert_array_equal(verdict.status, [FAILED] * 4)
        with pytest.raises(RewardError, match=message):
            mine.raise_if_failed()

    @pytest.mark.parametrize(
        "answer",
        [
            [1, np.float64(2), np.int8(-3), torch.tensor(4.0)],
            np.array([1, 2, -3, 4], np.float16),
            (1.0, 2.0, -3.0, 4.0),
            torch.tensor([1, 2, -3, 4]),
        ],
    )
    def test_numbers_of_any_kind(self, answer):
        mine = host_reward("kinds", lambda clips, prompts: answer)
        verdict = mine(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(0))
        mine.raise_if_failed()
        np.testing.assert_array_equal(verdict.scores, [1, 2, -3, 4])

    def test_nan_and_infinity_are_the_rewards_own_word(self):
        mine = host_reward("odd", lambda clips, prompts: [np.nan, np.inf, -np.inf, 1e300])
        verdict = mine(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(0))
        np.testing.assert_array_equal(verdict.scores, [np.nan, np.inf, -np.inf, np.inf])
        np.testing.assert_array_equal(verdict.status, [OK] * 4)
        mine.raise_if_failed()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, StopIteration])
    def test_nothing_reaches_xla(self, error):
        def fn(clips, prompts):
            raise error

        mine = host_reward("grave", fn)
        verdict = jax.jit(mine)(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(0))
        np.testing.assert_array_equal(verdict.status, [FAILED] * 4)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RewardError):
            mine.raise_if_failed()

    @pytest.mark.parametrize(
        ("lengths", "index", "message"),
        [([7, 0, 1, 1], 0, "num_frames is 0"), ([7, 8, 1, 1], 0, "expected 1 to 7"), ([7] * 4, 3, "prompt index 3")],
    )
    def test_a_row_that_cannot_be_read(self, reward, lengths, index, message):
        verdict = reward(jnp.asarray(videos()), jnp.array(lengths), jnp.int32(index))
        np.testing.assert_array_equal(verdict.status, [FAILED] * 4)
        with pytest.raises(RewardError, match=message):
            reward.raise_if_failed()

    def test_a_prompt_added_after_compiling_is_seen(self):
        table = PromptTable(["a cat"])
        mine, traced = host_reward("growing", per_video(one), table), []

        @jax.jit
        def run(*args):
            traced.append(args)
            return mine(*args)

        run(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(0))
        verdict = run(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(table.add("a zebra")))
        np.testing.assert_allclose(verdict.scores, direct(videos(), "a zebra"), rtol=1e-6)
        assert len(traced) == 1

    def test_without_a_table_the_prompt_is_empty(self):
        mine = host_reward("blind", lambda clips, prompts: [float(len(p)) for p in prompts])
        verdict = mine(jnp.asarray(videos()), jnp.asarray(LENGTHS), jnp.int32(99))
        np.testing.assert_array_equal(verdict.scores, [0] * 4)


class Brightness(torch.nn.Module):
    """Mean brightness times a weight; notes what it is given."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.calls = []

    def forward(self, clips, prompts):
        self.calls.append((tuple(clips.shape), clips.dtype, list(prompts), torch.is_inference_mode_enabled()))
        return self.scale * clips.float().mean((1, 2, 3, 4)) + torch.tensor([float(len(p)) for p in prompts])


class TestTorch:
    @pytest.mark.parametrize(("pixels", "dtype"), [("uint8", torch.uint8), ("float32", torch.float32)])
    def test_a_module(self, pixels, dtype):
        model = Brightness()
        mine = torch_reward("torch", model, PromptTable(PROMPTS), pixels=pixels)
        batch = videos(6).astype(pixels)
        verdict = jax.jit(mine)(jnp.asarray(batch), jnp.array([7, 3, 7, 3]), jnp.int32(1))
        mine.raise_if_failed()
        expected = [2 * batch[i, :t].astype(np.float64).mean() + len(PROMPTS[1]) for i, t in enumerate([7, 3, 7, 3])]
        np.testing.assert_allclose(verdict.scores, expected, rtol=1e-5)
        clips = [(2, 3, 5, 6, 3), (2, 7, 5, 6, 3)]
        assert model.calls == [(shape, dtype, [PROMPTS[1]] * 2, True) for shape in clips]
        assert not model.training

    def test_vmapped_in_a_scan_is_one_by_one(self):
        mine = torch_reward("torch", Brightness(), PromptTable(PROMPTS))
        batch, lengths, index = jnp.asarray(videos(7, (2, 3))), jnp.asarray(LENGTHS), jnp.array([2, 0, 1])
        over = jax.vmap(mine, (0, None, 0))
        _, got = jax.lax.scan(lambda c, x: (c, over(x, lengths, index).scores), 0, batch)
        expected = [[mine(batch[i, j], lengths, index[j]).scores for j in range(3)] for i in range(2)]
        np.testing.assert_array_equal(got, np.asarray(expected))

    @pytest.mark.parametrize(
        ("fn", "message"),
        [
            (lambda clips, prompts: clips.float().mean(), r"shape \(\) for 4 videos"),
            (lambda clips, prompts: clips.float().mean((1, 2)), r"shape \(4, 6, 3\)"),
            (lambda clips, prompts: clips.mean(), "RuntimeError"),
            (lambda clips, prompts: None, "RuntimeError"),
        ],
    )
    def test_a_wrong_answer(self, fn, message):
        mine = torch_reward("wrong", fn)
        verdict = mine(jnp.asarray(videos()), jnp.full(4, 7), jnp.int32(0))
        assert np.all(np.isnan(verdict.scores))
        with pytest.raises(RewardError, match=message):
            mine.raise_if_failed()

    def test_bfloat16_scores(self):
        mine = torch_reward("half", lambda clips, prompts: torch.tensor([1.0, 2.5, -3.0, 4.0]).bfloat16())
        verdict = mine(jnp.asarray(videos()), jnp.full(4, 7), jnp.int32(0))
        np.testing.assert_array_equal(verdict.scores, [1, 2.5, -3, 4])

    @pytest.mark.parametrize("device", ["cuda:99", "gpu"])
    def test_a_device_that_is_not_there(self, device):
        with pytest.raises(BadInputError, match=f"device '{device}' cannot be used"):
            torch_reward("far", Brightness(), device=device)


PROGRAM = """
import faulthandler, os, sys
faulthandler.dump_traceback_later(60, exit=True)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, numpy as np
import streamt1_jax
from streamt1_jax.rewards import host_reward, per_video
assert "torch" not in sys.modules, "the bridge imports torch"

reward = host_reward("big", per_video(lambda video, prompt: float(video[:, ::16, ::16].mean())))
lengths = jnp.array([120, 60, 3, 1])

@jax.jit
def step(x):
    verdict = reward((x * 255).astype(jnp.uint8), lengths, jnp.int32(0))
    return jnp.tanh(x + 1e-6 * verdict.scores.mean()), verdict

# Not ready yet when the first steps are dispatched, so those run on the thread pool and not in this thread.
states = [jnp.ones((4, 120, 80, 128, 3)) * 0.3 for _ in range(3)]
verdicts = []
for _ in range(5):
    for i in range(3):
        states[i], verdict = step(states[i])
        verdicts.append(verdict)
scores = np.stack([v.scores for v in verdicts])
assert np.all(np.isfinite(scores)) and scores[0, 0] == 76, scores
reward.raise_if_failed()
print("done")
"""


def test_many_programs_in_flight_with_big_arrays_do_not_hang():
    """With `jax.pure_callback` on a CPU this program never ends (jax 0.10.2, on the one core that it runs on)."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout == "done\n", run.stdout + run.stderr
