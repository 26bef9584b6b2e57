"""Two small learned rewards for the embedded model, in the spirit of HPSv3 and VideoAlign.

- `mini_short` looks at single frames: is it a clean picture of what the caption says? `mini_long` looks at pairs of
  frames a quarter of a second apart, over the whole window: does it move as the caption says, and does it stay itself?
  It is trained on runs of such pairs and on pairs drawn from 30 seconds.
- Both are trained on pairs, a good video of the world against a degraded one (`train_rewards.py`). They know nothing of
  the formulas in `checks.py`, and see nothing but pixels and the caption's tokens: they belong to no VAE or DiT.
- Every word looks for itself in the picture (attention from the caption's rows to the picture's places); what is wrong
  with the picture as a whole is judged beside that, under the caption (FiLM, Perez et al. 2018, arXiv:1709.07871).
- The world is a torus, so convolutions go round it.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from streamt1_jax.config import ModelConfig, UMT5Config
from streamt1_jax.mini import shipped
from streamt1_jax.models.layers import linear
from streamt1_jax.models.umt5 import UMT5Encoder, encode_prompt
from streamt1_jax.rewards.base import OK, PromptTokens, Reward, Verdict
from streamt1_jax.rewards.registry import Role
from streamt1_jax.text import Tokenizer
from streamt1_jax.types import Count, FramesU8, HostOrDevice, Scalar

TOKENIZER = Path(__file__).parent / "tokenizer"
SHORT_STRIDE, LONG_STRIDE = 3, 4  # frames; neighbours hardly differ
LONG_STEP = 2  # pixels; motion is read from a picture of half the size
DIM = 48  # channels of words and of places in the picture
HIDDEN = 64
TEXT = UMT5Config(vocab_size=1024, dim=DIM, num_heads=3, head_dim=16, ffn_dim=96, num_layers=2)


class CircularConv(nnx.Module):
    """A convolution on the torus, as one matrix product of all its taps.

    (XLA's gradient of a convolution's kernel runs in a naive loop on a CPU; see `models/conv.py`.)
    """

    def __init__(self, din: int, dout: int, *, size: int, stride: int, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, din, dout), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dout,)))
        self.stride = stride

    def __call__(self, x: Float[Array, "t h w i"]) -> Float[Array, "t h2 w2 o"]:
        kernel = self.kernel[...]
        size, (_, height, width, _) = kernel.shape[0], x.shape
        before = (size - 1) // 2
        around = (before, size - 1 - before)
        x = jnp.pad(x, ((0, 0), around, around, (0, 0)), mode="wrap")
        taps = [
            x[:, a : a + height : self.stride, b : b + width : self.stride] for a in range(size) for b in range(size)
        ]
        return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...]


def _blocks(frames: Float[Array, "t H W 3"]) -> Float[Array, "t h w 12"]:
    """2 x 2 pixels as one, with four times the channels."""
    return rearrange(frames, "t (h a) (w b) c -> t h w (a b c)", a=2, b=2)


class FrameEncoder(nnx.Module):
    """Frames to features of 8 x 8 pixels each."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = CircularConv(12, 12, size=2, stride=1, rngs=rngs)
        self.conv2 = CircularConv(12, 24, size=3, stride=2, rngs=rngs)
        self.conv3 = CircularConv(24, DIM, size=3, stride=2, rngs=rngs)
        self.conv4 = CircularConv(DIM, DIM, size=3, stride=1, rngs=rngs)

    def __call__(self, frames: Float[Array, "t H W 3"]) -> Float[Array, "t s M"]:
        x = nnx.relu(self.conv1(_blocks(frames)))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.conv3(x))
        x = x + nnx.relu(self.conv4(x))
        return x.reshape(len(x), -1, DIM)


class PairEncoder(nnx.Module):
    """Frames of half the size to features of each pair of neighbours."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = CircularConv(12, 16, size=2, stride=1, rngs=rngs)
        self.conv2 = CircularConv(32, DIM, size=3, stride=2, rngs=rngs)
        self.conv3 = CircularConv(DIM, DIM, size=3, stride=1, rngs=rngs)

    def __call__(self, frames: Float[Array, "k H W 3"]) -> Float[Array, "t s M"]:
        x = nnx.relu(self.conv1(_blocks(frames)))
        x = nnx.relu(self.conv2(jnp.concatenate([x[:-1], x[1:]], axis=-1)))
        x = x + nnx.relu(self.conv3(x))
        return x.reshape(len(x), -1, DIM)


class RewardNet(nnx.Module):
    """A reward's parameters: an encoder of pictures, one of captions, and what compares the two."""

    def __init__(self, role: Role, *, rngs: nnx.Rngs):
        dense = functools.partial(linear, dtype=jnp.float32, rngs=rngs)
        self.image = FrameEncoder(rngs) if role == "short" else PairEncoder(rngs)
        self.text = UMT5Encoder(TEXT, dtype=jnp.float32, rngs=rngs)
        self.query, self.key, self.value = dense(DIM, DIM), dense(DIM, DIM), dense(DIM, DIM)
        self.word_in, self.word_out = dense(3 * DIM, HIDDEN), dense(HIDDEN, 1)
        self.film, self.whole_in = dense(DIM, 2 * HIDDEN), dense(2 * DIM, HIDDEN)
        self.whole_mid, self.whole_out = dense(2 * HIDDEN, HIDDEN), dense(HIDDEN, 1)

    def encode_frames(self, frames: Float[Array, "k H W 3"]) -> Float[Array, "t s M"]:
        """Features of s places in t frames, or pairs of frames, in [-1, 1]."""
        return self.image(frames)

    def encode_caption(self, tokens: PromptTokens) -> tuple[Float[Array, "p M"], Float[Array, " p"]]:
        """Rows of the caption's tokens, and 1 for those that are there."""
        ids, mask = map(jnp.asarray, tokens)
        return encode_prompt(self.text, ids, mask), (mask != 0).astype(jnp.float32)

    def score(
        self,
        seen: Float[Array, "t s M"],
        valid: Bool[HostOrDevice, " t"],
        rows: Float[Array, "p M"],
        is_word: Float[Array, " p"],
    ) -> Scalar:
        """The score of one video."""
        share = jnp.asarray(valid, jnp.float32)
        share = share / jnp.sum(share)
        # Each word finds what it means in every picture; how much that varies over time counts too.
        logits = jnp.einsum("pm,tsm->tps", self.query(rows), self.key(seen)) / DIM**0.5
        found = jnp.einsum("tps,tsm->tpm", jax.nn.softmax(logits, axis=-1), self.value(seen))
        words = jnp.concatenate([rows, *_mean_and_spread(found, share)], axis=-1)
        by_word = self.word_out(nnx.relu(self.word_in(words)))[:, 0]
        # The picture as a whole, under the caption.
        about = is_word @ rows / jnp.sum(is_word)
        scale, shift = jnp.split(self.film(about), 2)
        pooled = self.whole_in(jnp.concatenate([jnp.mean(seen, axis=1), jnp.max(seen, axis=1)], axis=-1))
        whole = nnx.relu(pooled * (1 + scale) + shift)
        whole = nnx.relu(self.whole_mid(jnp.concatenate(_mean_and_spread(whole, share), axis=-1)))
        return is_word @ by_word / 4 + self.whole_out(whole)[0]


def _mean_and_spread(x: Float[Array, "t *n"], share: Float[Array, " t"]) -> tuple[Array, Array]:
    """Over time, each weighted by its share; the spread is a standard deviation."""
    mean = jnp.tensordot(share, x, axes=1)
    variance = jnp.tensordot(share, jnp.square(x - mean), axes=1)
    return mean, jnp.sqrt(variance + 1e-4)  # a root has no slope at 0


@functools.cache
def reward_graph(role: Role) -> tuple[nnx.GraphDef, nnx.State]:
    """(graph, abstract parameters); `nnx.merge(graph, parameters)` is the network."""
    return nnx.split(nnx.eval_shape(lambda: RewardNet(role, rngs=nnx.Rngs(0))))


def short_score(net: RewardNet, video: FramesU8, num_frames: Count, rows: Array, is_word: Array) -> Scalar:
    """Mean score of every third frame."""
    seen = net.encode_frames(_to_unit(video[::SHORT_STRIDE], 1))
    scores = jax.vmap(lambda frame: net.score(frame[None], jnp.ones(1, bool), rows, is_word))(seen)
    valid = jnp.arange(0, len(video), SHORT_STRIDE) < num_frames
    return jnp.sum(jnp.where(valid, scores, 0.0)) / jnp.sum(valid, dtype=jnp.float32)


def long_score(net: RewardNet, video: FramesU8, num_frames: Count, rows: Array, is_word: Array) -> Scalar:
    """Score of every fourth frame beside the next; a video too short for that is judged as if it stood still."""
    index = jnp.arange(0, max(len(video), LONG_STRIDE + 1), LONG_STRIDE)
    seen = net.encode_frames(_to_unit(video[jnp.minimum(index, num_frames - 1)], LONG_STEP))
    valid = (index[1:] < num_frames).at[0].set(True)
    return net.score(seen, valid, rows, is_word)


def _to_unit(frames: UInt8[Array, "t H W 3"], step: int) -> Float[Array, "t h w 3"]:
    """Pixels in [-1, 1]; each the mean of `step` x `step`."""
    t, height, width, _ = frames.shape
    blocks = frames.reshape(t, height // step, step, width // step, step, 3).astype(jnp.float32)
    return blocks.mean(axis=(2, 4)) / 127.5 - 1


SCORES = {"short": short_score, "long": long_score}


def make_reward(role: Role, params: PyTree, about: Mapping[str, Any] = MappingProxyType({})) -> Reward:
    """A trained network as a reward that reads the prompt's tokens.

    Args:
        about: which weights these are, for the record of a run.
    """
    graph, _ = reward_graph(role)
    score = SCORES[role]

    def call(videos: UInt8[Array, "n T H W 3"], num_frames: Int[Array, "n"], prompt: PromptTokens) -> Verdict:
        net = nnx.merge(graph, params)
        rows, is_word = net.encode_caption(prompt)
        scores = jax.vmap(lambda video, count: score(net, video, count, rows, is_word))(videos, num_frames)
        return Verdict(scores, jnp.full(num_frames.shape, OK, jnp.int32))

    tokenizer = caption_tokenizer().sha256
    return Reward(f"mini_{role}", call, pixels="uint8", runs_on="jax", about=about, tokenizer=tokenizer)


def mini_short(folder: Path | None = None) -> Reward:
    """Does every frame look like the caption, cleanly? For the embedded model's tokenizer only.

    Args:
        folder: that `streamt1 train-mini` wrote; None: what the package ships.

    Raises:
        WeightsError: the folder holds no trained rewards, or damaged ones.
    """
    return _load("short", folder or shipped.FOLDER)


def mini_long(folder: Path | None = None) -> Reward:
    """Does the video move as the caption says, and stay itself? Otherwise as `mini_short`."""
    return _load("long", folder or shipped.FOLDER)


# Cached: a reward is compared by identity, so a new object for every pipeline would compile every step anew.
@functools.cache
def _load(role: Role, folder: Path) -> Reward:
    params = shipped.load_mini(folder, f"reward_{role}", reward_graph(role)[1])
    return make_reward(role, params, {"sha256": shipped.read_manifest(folder)["sha256"]})


@functools.cache
def caption_tokenizer() -> Tokenizer:
    """The embedded model's own, so that a prompt is the same to a reward whoever tokenized it."""
    return Tokenizer(TOKENIZER, text_len=ModelConfig.mini().dit.text_len, vocab_size=TEXT.vocab_size)


def read_prompt(prompt: str) -> PromptTokens:
    """A prompt as these rewards take it, where no pipeline is at hand."""
    tokens = caption_tokenizer()(prompt)
    return PromptTokens(tokens.ids, tokens.mask)
