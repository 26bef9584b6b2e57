"""A deterministic stand-in for the networks: small formulas that depend on all that the real ones depend on.

- `denoise` depends on the draws of every step, on the past through an attention with a valid length and rotated keys,
  on the first frame's number, and on the prompt.
- `context` depends on the chunk, the past, the position and the prompt.
- `decode` carries a state, and its first chunk has fewer frames.

`reference_search.py` has the same formulas once more, in plain NumPy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax.generator import Conditioning, Generator
from streamt1_jax.models.attention import frame_shift_angles, rope_angles, rotate
from streamt1_jax.models.dit import KV, TimeModulation
from streamt1_jax.rewards.base import OK, Reward, Verdict

F, C, H, W = 2, 2, 2, 2  # a chunk of latents
LAYERS, HEADS, DIM = 2, 1, 6  # a token a frame; of DIM = 6, one rotary pair for frame, row and column each
TIME = 2  # pixel frames of a latent frame after the first
FRAMES, FIRST_FRAMES = TIME * F, TIME * (F - 1) + 1
STEPS = 3
CHUNK = (F, C, H, W)


class FakeParams(NamedTuple):
    """Random numbers in the places of weights."""

    key: np.ndarray  # [LAYERS, DIM, C*H*W]
    value: np.ndarray  # [LAYERS, DIM, C*H*W]
    query: np.ndarray  # [LAYERS, DIM]
    mix: np.ndarray  # [C*H*W, DIM]
    step: np.ndarray  # [STEPS]
    colour: np.ndarray  # [C, 3]
    time: np.ndarray  # [TIME]


def fake_params(seed: int = 0) -> FakeParams:
    rng = np.random.default_rng(seed)
    size = C * H * W
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return FakeParams(
        key=draw(LAYERS, DIM, size) / 2,
        value=draw(LAYERS, DIM, size) / 2,
        query=draw(LAYERS, DIM) / 2,
        mix=draw(size, DIM) / 2,
        step=draw(STEPS) / 4 + 0.5,
        colour=draw(C, 3),
        time=draw(TIME) / 4 + 0.5,
    )


def _attend(params: FakeParams, past, start):
    """softmax(q k) v summed over layers, the query standing at `start`; zeros without a past."""
    if past is None:
        return jnp.zeros(DIM)
    query = rotate(jnp.asarray(params.query)[:, None, None], frame_shift_angles(start, DIM))[:, 0, 0]
    logits = jnp.einsum("ld,ltd->lt", query, past.kv.k[:, :, 0])
    valid = jnp.arange(logits.shape[1]) < past.length
    weights = jax.nn.softmax(jnp.where(valid, logits, -jnp.inf), axis=1)
    return jnp.einsum("lt,ltd->d", weights, jnp.where(valid[:, None], past.kv.v[:, :, 0], 0.0))


def _prepare(params, prompt_embeds, prompt_index):
    none = TimeModulation(jnp.zeros((1, 1)), jnp.zeros((1, 6, 1)))
    text = KV(*(jnp.tanh(prompt_embeds.sum(axis=0)) for _ in range(2)))
    return Conditioning(text, none, none, prompt_index)


def _denoise(params, conditioning, draws, past, start_frame):
    x = draws.initial
    pull = jnp.asarray(params.mix) @ _attend(params, past, start_frame)
    drift = pull.reshape(C, H, W) + conditioning.text.k.mean() + 0.05 * start_frame.astype(jnp.float32)
    for i in range(STEPS):
        x = jnp.tanh(params.step[i] * x + drift)
        if i < STEPS - 1:
            x = x + 0.5 * draws.renoise[i]
    return x


def _context(params, conditioning, latents, past, start_frame):
    frames = len(latents)  # one chunk, or all that a prompt switch recaches
    flat = latents.reshape(frames, -1)
    k = jnp.einsum("ldi,ti->ltd", params.key, flat) + conditioning.text.v.mean()
    v = jnp.einsum("ldi,ti->ltd", params.value, flat) + 0.3 * _attend(params, past, start_frame)
    turned = rotate(k[:, :, None], rope_angles(start_frame, frames, 1, 1, DIM))
    return KV(turned, v[:, :, None])


def _decode(params, state, latents, *, first):
    frames = []
    for i in range(F):
        state = 0.5 * state + latents[i]
        picture = jnp.einsum("chw,cr->hwr", state, params.colour)
        for t in range(1 if first and i == 0 else TIME):
            frames.append(jax.nn.sigmoid(params.time[t] * picture))
    return jnp.stack(frames), state


def fake_generator() -> Generator:
    return Generator(
        chunk_shape=CHUNK,
        kv=jax.ShapeDtypeStruct((LAYERS, F, HEADS, DIM), jnp.float32),
        prepare=_prepare,
        denoise=_denoise,
        context=_context,
        init_decoder=lambda: jnp.zeros((C, H, W)),
        decode=_decode,
        frames_per_chunk=FRAMES,
        first_frames=FIRST_FRAMES,
        frame_shape=(H, W),
    )


def _short(videos, num_frames, prompt_index):
    """12 * mean(sin(5 * valid frames)) + the prompt's index / 8."""
    valid = jnp.arange(videos.shape[1]) < num_frames[:, None]
    each = jnp.sin(5 * videos).mean(axis=(2, 3, 4))
    total = jnp.where(valid, each, 0.0).sum(axis=1) / num_frames.astype(jnp.float32)
    scores = 12 * total + prompt_index.astype(jnp.float32) / 8
    return Verdict(scores, jnp.full(scores.shape, OK))


def _long(videos, num_frames, prompt_index):
    """The mean over valid frames t of 9 * cos(t) * mean(frame): it sees which frames there are, and their order."""
    t = jnp.arange(videos.shape[1])
    each = jnp.cos(t.astype(jnp.float32)) * videos.mean(axis=(2, 3, 4))
    total = jnp.where(t < num_frames[:, None], each, 0.0).sum(axis=1) / num_frames.astype(jnp.float32)
    scores = 9 * total
    return Verdict(scores, jnp.full(scores.shape, OK))


def fake_rewards() -> tuple[Reward, Reward]:
    return Reward("short", _short, "float32", "jax"), Reward("long", _long, "float32", "jax")
