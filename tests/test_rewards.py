"""The reward protocol, the rewards that need no weights, rewards in words, rewards by name."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.rewards import Failure, PromptTable, Reward, load_reward, native_long, native_short, resolve
from streamt1_jax.rewards import native as N
from streamt1_jax.rewards.expression import expression_reward, parse

T, H, W = 12, 24, 32


@pytest.fixture(scope="module")
def score():
    """score(reward, videos, num_frames=None) -> numpy scores, compiled once for each reward and shape."""

    def run(reward, videos, num_frames=None):
        lengths = jnp.full(len(videos), videos.shape[1]) if num_frames is None else jnp.asarray(num_frames)
        verdict = jitted[reward.name](jnp.asarray(videos), lengths, jnp.int32(0))
        assert np.all(np.asarray(verdict.status) == 0)
        assert verdict.scores.dtype == jnp.float32
        return np.asarray(verdict.scores)

    jitted = {r.name: jax.jit(r) for r in (native_short(), native_long())}
    return run


def pan(step, seed=0, frames=T):
    """A window moving `step` pixels a frame over a smooth texture, uint8 [frames, H, W, 3]."""
    rng = np.random.default_rng(seed)
    texture = rng.uniform(0, 255, (H // 4 + 2, (W + step * frames) // 4 + 2, 3))
    texture = blur(np.kron(texture, np.ones((4, 4, 1))))
    return np.stack([texture[:H, step * t : step * t + W] for t in range(frames)]).astype(np.uint8)


def blur(image):
    """Mean of 3x3 neighbours, edges wrapped, of float [H, W, 3]."""
    return np.mean([np.roll(image, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)


def luminance(frame):
    x = frame.astype(np.float64) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ np.array([0.2126, 0.7152, 0.0722])


class TestFormulas:
    """Each statistic against its published formula in float64 numpy."""

    frame = np.random.default_rng(3).integers(0, 256, (H, W, 3), dtype=np.uint8)

    def test_sharpness(self):
        y = np.pad(luminance(self.frame), 1, mode="edge")
        kernel = {(0, 1): 1, (2, 1): 1, (1, 0): 1, (1, 2): 1, (1, 1): -4}
        laplacian = np.sum([k * y[i : i + H, j : j + W] for (i, j), k in kernel.items()], axis=0)
        np.testing.assert_allclose(N.sharpness(jnp.asarray(self.frame)), laplacian.var(), rtol=1e-5)

    def test_contrast(self):
        np.testing.assert_allclose(N.rms_contrast(jnp.asarray(self.frame)), luminance(self.frame).std(), rtol=1e-5)

    def test_colourfulness(self):
        r, g, b = np.moveaxis(self.frame.astype(np.float64), -1, 0)
        rg, yb = r - g, 0.5 * (r + g) - b
        m = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
        np.testing.assert_allclose(N.colourfulness(jnp.asarray(self.frame)), m, rtol=1e-5)

    def test_temporal(self):
        video = np.random.default_rng(4).integers(0, 256, (7, H, W, 3), dtype=np.uint8)
        y = luminance(video[:5])  # the last two frames are not valid
        got = N.temporal_statistics(jnp.asarray(video), jnp.int32(5))
        np.testing.assert_allclose(got.flicker, np.abs(np.diff(y, axis=0)).mean(), rtol=1e-5)
        np.testing.assert_allclose(got.interpolation_error, np.abs(y[1:-1] - (y[:-2] + y[2:]) / 2).mean(), rtol=1e-5)
        motion = np.sqrt(np.square((y[2:] - y[:-2]) / 2).mean((1, 2))).mean()
        np.testing.assert_allclose(got.motion, motion, rtol=1e-5)


class TestNative:
    def test_order_of_images(self, score):
        sharp = pan(0)
        blurred = np.stack([blur(f.astype(float)) for f in sharp]).astype(np.uint8)
        flat = ((sharp.astype(float) - 128) / 2 + 128).astype(np.uint8)
        grey = np.repeat(sharp.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
        constant = np.full_like(sharp, 128)
        s = score(native_short(), np.stack([sharp, blurred, flat, grey, constant]))
        assert s[0] > s[1:4].max()
        assert s[1:4].min() > s[4]
        assert abs(s[4]) < 1e-6

    def test_order_of_videos(self, score):
        moving, frozen = pan(1), pan(0)
        noise = np.random.default_rng(1).normal(0, 12, moving.shape)
        noisy = np.clip(moving + noise, 0, 255).astype(np.uint8)
        blinking = frozen.copy()
        blinking[::2] = blinking[::2] * 0.8
        s = score(native_long(), np.stack([moving, frozen, noisy, blinking]))
        moving, frozen, noisy, blinking = s
        assert moving > frozen == 0
        assert moving > noisy
        assert frozen > blinking

    def test_an_object_on_a_plain_ground_beats_a_frozen_one(self, score):
        row, column = np.mgrid[:H, :W]
        disc = [(np.hypot(row - 12, column - 6 - t) < 5)[..., None] * np.array([200, 30, 30]) + 20 for t in range(T)]
        video = np.stack(disc).astype(np.uint8)
        moving, frozen = score(native_long(), np.stack([video, np.repeat(video[:1], T, 0)]))
        assert moving > frozen + 0.2

    def test_motion_is_blind_to_a_flicker_of_every_other_frame(self):
        blinking = np.repeat(pan(0)[:1], T, 0)
        blinking[::2] //= 2
        still = N.temporal_statistics(jnp.asarray(blinking), jnp.int32(T))
        moving = N.temporal_statistics(jnp.asarray(pan(1)), jnp.int32(T))
        assert float(still.motion) == 0 < float(moving.motion)
        assert float(still.flicker) > float(moving.flicker)

    @pytest.mark.parametrize("reward", [native_short(), native_long()], ids=lambda r: r.name)
    def test_frames_past_the_valid_ones_change_nothing(self, score, reward):
        videos = np.stack([pan(1, seed) for seed in range(4)])
        lengths = [1, 2, 9, T]
        other = videos.copy()
        for row, t in enumerate(lengths):
            other[row, t:] = np.random.default_rng(row).integers(0, 256, other[row, t:].shape)
        np.testing.assert_array_equal(score(reward, videos, lengths), score(reward, other, lengths))
        nine = jax.jit(reward)(jnp.asarray(videos[2:3, :9]), jnp.array([9]), jnp.int32(0)).scores[0]
        np.testing.assert_allclose(score(reward, videos, lengths)[2], nine, rtol=1e-5)

    @pytest.mark.parametrize("reward", [native_short(), native_long()], ids=lambda r: r.name)
    def test_finite_and_of_a_sensible_size(self, score, reward):
        rng = np.random.default_rng(7)
        black, white = np.zeros((T, H, W, 3), np.uint8), np.full((T, H, W, 3), 255, np.uint8)
        noise = rng.integers(0, 256, black.shape, dtype=np.uint8)
        strobe = black.copy()
        strobe[::2] = 255
        videos = np.stack([black, white, noise, strobe])
        for lengths in ([1] * 4, [2] * 4, [T] * 4):
            s = score(reward, videos, lengths)
            assert np.all(np.isfinite(s)), s
            assert np.all(np.abs(s) < 10), s
        np.testing.assert_allclose(score(reward, videos, [T] * 4)[:2], 0, atol=1e-6)

    @pytest.mark.parametrize("reward", [native_short(), native_long()], ids=lambda r: r.name)
    def test_candidates_of_one_scene_differ_by_a_hundredth_to_one(self, score, reward):
        videos = np.stack([pan(1, seed) for seed in range(4)])
        spread = np.ptp(score(reward, videos))
        assert 0.01 < spread < 1, spread

    def test_vmapped_is_one_by_one(self, score):
        videos = np.stack([pan(step, step) for step in range(4)])
        for reward in (native_short(), native_long()):
            alone = [reward.call(jnp.asarray(v[None]), jnp.array([T]), jnp.int32(0)).scores[0] for v in videos]
            np.testing.assert_allclose(score(reward, videos), np.stack(alone), atol=1e-5)

    def test_one_object_for_all_pipelines(self):
        assert native_short() is native_short()
        assert resolve("native", "long", PromptTable()) is native_long()


class TestProtocol:
    def test_pixels_of_another_type_are_refused(self):
        with pytest.raises(BadInputError, match="got float32 pixels, expected uint8"):
            native_short()(jnp.zeros((1, 2, H, W, 3)), jnp.array([2]), jnp.int32(0))

    def test_failures_are_raised_once(self):
        reward = Reward("mine", lambda *args: None, pixels="uint8", runs_on="host")
        reward.raise_if_failed()
        reward.failures.extend([Failure(ValueError("boom"), "Traceback: here"), Failure(ValueError("bang"), "")])
        with pytest.raises(RewardError, match=r"'mine' failed with ValueError: boom \(and 1 more call\)") as caught:
            reward.raise_if_failed()
        assert caught.value.__notes__ == ["Traceback: here"]
        reward.raise_if_failed()

    def test_an_interrupt_stays_one(self):
        reward = Reward("mine", lambda *args: None, pixels="uint8", runs_on="host")
        reward.failures.extend([Failure(ValueError("boom"), ""), Failure(KeyboardInterrupt(), "")])
        with pytest.raises(KeyboardInterrupt):
            reward.raise_if_failed()

    def test_prompt_table(self):
        table = PromptTable(["a cat"])
        assert [table.add("a dog"), table.add("a cat"), table.add("<|Reward|> \U0001f600")] == [1, 0, 2]
        assert table[2] == "<|Reward|> \U0001f600"
        for index in (-1, 3):
            with pytest.raises(BadInputError, match=f"prompt index {index} is not in the table of 3"):
                table[index]


VIDEO = np.random.default_rng(5).uniform(0, 1, (12, 4, 6, 3)).astype(np.float32)
V = VIDEO.astype(np.float64)


class TestExpression:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8 * mean(sin(6 * video))", 8 * np.mean(np.sin(6 * V))),
            (
                "20 * mean(cos(4 * video[-9:])) - 5 * mean(abs(diff(video, axis=frames)))",
                20 * np.mean(np.cos(4 * V[-9:])) - 5 * np.mean(np.abs(np.diff(V, axis=0))),
            ),
            ("-std(video) ** 2 + max(video) / min(video)", -(np.std(V) ** 2) + V.max() / V.min()),
            ("mean(exp(-video) * sqrt(video)) + tanh(0.5)", np.mean(np.exp(-V) * np.sqrt(V)) + np.tanh(0.5)),
            ("mean(square(diff(video[::2], axis=width)))", np.mean(np.diff(V[::2], axis=2) ** 2)),
            (
                "max(diff(video[:, 1:-1], axis=height)[:3] - 2)",
                np.max(np.diff(V[:, 1:-1], axis=1)[:3] - 2),
            ),
            ("mean(diff(video, axis=channels) ** 2)", np.mean(np.diff(V, axis=3) ** 2)),
            ("+1e-3 * 2 ** -1", 0.0005),
            (" \n 1 + mean(video) \n", 1 + np.mean(V)),
        ],
    )
    def test_against_numpy(self, text, expected):
        assert parse(text)(VIDEO) == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("__import__('os').system('true')", "__import__"),
            ("mean(video.T)", "video.T"),
            ("video.__class__", "video.__class__"),
            ("(lambda: 1)()", "lambda"),
            ("mean([v for v in video])", "v for v in video"),
            ("open('x')", "open"),
            ("mean(median(video))", "median"),
            ("mean(vide0)", "vide0"),
            ("mean(video, axis=frames)", "axis=frames"),
            ("mean(video, video)", "mean"),
            ("mean(*video)", "mean"),
            ("mean(video, **video)", "mean"),
            ("mean(diff(video))", "diff"),
            ("mean(diff(video, axis=0))", "axis=0"),
            ("mean(diff(video, axis=time))", "axis=time"),
            ("diff(2, axis=frames)", "diff"),
            ("mean(video[0])", "0"),
            ("mean(video[::0])", "::0"),
            ("mean(video[True:])", "True"),
            ("mean(video[1.5:])", "1.5"),
            ("mean(video[min(video):])", "min"),
            ("mean(video[:,:,:,:,:])", ":,:"),
            ("mean(video)[1:]", r"mean\(video\)"),
            ("'a' * 10", "'a'"),
            ("True + mean(video)", "True"),
            ("2j * mean(video)", "2j"),
            ("mean(video) if 1 else 2", "if"),
            ("1 < 2", "1 < 2"),
            ("mean(video) // 2", "//"),
            ("~1", "~1"),
            ("mean(video) @ 2", "@"),
            ("(x := 1)", "x := 1"),
            ("video", "is an array"),
            ("video[1:] * 2", "is an array"),
            ("mean(video", "cannot be read"),
            ("1; 2", "cannot be read"),
            ("1\0", "cannot be read"),
            ("10" + "0" * 400, "1e308"),
            ("1" * 1999, "1e308"),
            ("9" * 5000, "1 to 2000"),
            ("", "1 to 2000"),
            ("-" * 200 + "1", "50 deep"),
            ("(" * 900 + "1" + ")" * 900, "cannot be read"),
            ("1" + "+1" * 900, "50 deep"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, text, named):
        with pytest.raises(BadInputError, match=named):
            parse(text)

    def test_overflow_is_a_value_not_a_hang(self):
        assert parse("9 ** 9 ** 9 ** 9")(VIDEO) == np.inf
        assert np.isnan(parse("sqrt(0 - 1)")(VIDEO))
        assert parse("1 / 0")(VIDEO) == np.inf

    def test_as_a_reward(self):
        reward = expression_reward("short", "8 * mean(sin(6 * video))")
        videos = jnp.stack([jnp.asarray(VIDEO), jnp.asarray(VIDEO) / 2])
        verdict = jax.jit(reward)(videos, jnp.array([12, 5]), jnp.int32(3))
        expected = [8 * np.sin(6 * V).mean(), 8 * np.sin(6 * (V[:5] / 2)).mean()]
        np.testing.assert_allclose(verdict.scores, expected, rtol=1e-6)
        assert (reward.pixels, reward.runs_on) == ("float32", "host")

    def test_too_few_frames_fail_on_the_host(self):
        reward = expression_reward("long", "mean(video[5:] - video[:5])")
        verdict = reward(jnp.asarray(VIDEO)[None], jnp.array([12]), jnp.int32(0))
        assert np.isnan(verdict.scores[0])
        with pytest.raises(RewardError, match="could not be broadcast"):
            reward.raise_if_failed()


MODULE = """
import numpy as np, torch
from streamt1_jax.rewards import native_long
def brightness(video, prompt): return float(video.mean()) + len(prompt)
class Batch:
    takes = "batch"
    pixels = "float32"
    def __call__(self, videos, prompts): return [v.mean() for v in videos]
class Torch:
    takes = "torch"
    def __call__(self, videos, prompts): return videos.float().mean((1, 2, 3, 4))
class Net(torch.nn.Module):
    def forward(self, videos, prompts): return videos.float().amax((1, 2, 3, 4))
class Needs:
    def __init__(self, size): ...
class Wrong(Batch):
    pixels = "int8"
class Odd(Batch):
    takes = "bytes"
ready = native_long()
number = 3
"""


class TestByName:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        (tmp_path / "my_rewards.py").write_text(MODULE)
        (tmp_path / "broken_rewards.py").write_text("import torch\n1 / 0\n")
        (tmp_path / "lacking_rewards.py").write_text("import nothing_of_this_name\n")
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        yield
        assert sys.path == before
        for name in ("my_rewards", "broken_rewards", "lacking_rewards"):
            sys.modules.pop(name, None)

    @pytest.mark.parametrize(
        ("name", "pixels", "expected"),
        [("brightness", "uint8", 45.0), ("Batch", "float32", 0.4), ("Torch", "uint8", 40.0), ("Net", "uint8", 40.0)],
    )
    def test_own_rewards(self, name, pixels, expected):
        reward = resolve(f"my_rewards:{name}", "short", PromptTable(["a cat"]))
        assert (reward.name, reward.pixels) == (f"my_rewards:{name}", pixels)
        value = 40 if pixels == "uint8" else 0.4
        verdict = reward(jnp.full((2, 3, 4, 4, 3), value, pixels), jnp.array([3, 2]), jnp.int32(0))
        reward.raise_if_failed()
        np.testing.assert_allclose(verdict.scores, [expected] * 2, rtol=1e-6)

    def test_a_reward_is_used_as_it_is(self):
        assert load_reward("my_rewards:ready", PromptTable()) is native_long()

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("natve", "did you mean 'native'"),
            ("", "there is no reward ''"),
            ("my_rewards:Brightnes", "did you mean 'brightness'"),
            ("my_rewards:", r"expected package\.module:Name"),
            (":Name", r"expected package\.module:Name"),
            ("my-rewards:Name", r"expected package\.module:Name"),
            ("a:b:c", r"expected package\.module:Name"),
            ("my_reward:brightness", "was not found"),
            ("my_rewards.inner:Name", "was not found"),
            ("broken_rewards:Name", "ZeroDivisionError"),
            ("lacking_rewards:Name", "nothing_of_this_name"),
            ("my_rewards:Needs", "without arguments"),
            ("my_rewards:Wrong", "pixels = 'int8'"),
            ("my_rewards:Odd", "takes = 'bytes'"),
            ("my_rewards:number", "is a int"),
        ],
    )
    def test_what_is_refused(self, spec, message):
        with pytest.raises(BadInputError, match=message):
            resolve(spec, "short", PromptTable())
