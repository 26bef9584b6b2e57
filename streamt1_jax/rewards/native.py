"""Rewards in JAX that need no weights, for runs without reward models and for tests.

They know nothing of the prompt and nothing of beauty: a sharp, contrasty, colourful, steadily moving video wins, and
noise looks sharp to them.

Statistics of one frame:
- sharpness: variance of the Laplacian (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a
  comparative study", ICPR 2000).
- contrast: RMS contrast, the standard deviation of luminance (Peli, "Contrast in complex images", JOSA A 1990).
- colourfulness: M of Hasler & Suesstrunk, "Measuring colourfulness in natural images", SPIE 2003; on gamma-coded
  values of 0 to 255, as published.

Statistics of a video, in the sense of VBench (Huang et al., CVPR 2024), whose networks are replaced by plain formulas:
- flicker: mean absolute difference of neighbouring frames ("temporal flickering").
- interpolation error: mean absolute difference of a frame and the mean of its two neighbours ("motion smoothness";
  VBench interpolates with a network).
- motion: RMS of half the difference of a frame's two neighbours ("dynamic degree"; VBench uses optical flow). The
  central difference is blind to a flicker of every other frame, so that flicker does not pass for motion.

Luminance is linear light in [0, 1]. Every statistic enters a score as log(1 + statistic / unit), which makes equal
ratios equally far apart: candidates of one chunk usually differ by 0.01 to 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from streamt1_jax.rewards.base import OK, Reward, Verdict
from streamt1_jax.types import Count, FramesU8, Scalar

LUMINANCE_WEIGHTS = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709

SHARPNESS_UNIT, SHARPNESS_WEIGHT = 1e-4, 0.3  # variance of luminance
CONTRAST_UNIT, CONTRAST_WEIGHT = 0.1, 0.5  # luminance
COLOURFULNESS_UNIT, COLOURFULNESS_WEIGHT = 20.0, 0.3  # M; 15 is "slightly", 33 "moderately", 109 "extremely" colourful

# Motion weighs as much as flicker and interpolation error together. For any moving texture all three grow alike, so a
# smooth motion scores above 0, a frozen video 0, and noise below 0.
MOTION_UNIT, MOTION_WEIGHT = 0.01, 1.0  # luminance per frame, as the next two
FLICKER_UNIT, FLICKER_WEIGHT = 0.01, -0.5
INTERPOLATION_UNIT, INTERPOLATION_WEIGHT = 0.01, -0.5


def linear_luminance(frame: UInt8[Array, "H W 3"]) -> Float[Array, "H W"]:
    """Luminance of an sRGB frame in linear light, 0 to 1 (IEC 61966-2-1)."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    # Three tables of 256 rather than a power of every pixel: thirty times faster on a CPU.
    tables = jnp.asarray(np.outer(LUMINANCE_WEIGHTS, linear), jnp.float32)
    red, green, blue = (tables[c][frame[..., c].astype(jnp.int32)] for c in range(3))
    return red + green + blue


def sharpness(frame: UInt8[Array, "H W 3"]) -> Scalar:
    """Variance of the 4-neighbour Laplacian of luminance; edges are repeated, so a border adds nothing."""
    y = linear_luminance(frame)
    p = jnp.pad(y, 1, mode="edge")
    return jnp.var(p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * y)


def rms_contrast(frame: UInt8[Array, "H W 3"]) -> Scalar:
    """Standard deviation of luminance, 0 to 0.5."""
    return jnp.std(linear_luminance(frame))


def colourfulness(frame: UInt8[Array, "H W 3"]) -> Scalar:
    """Hasler & Suesstrunk's M: spread plus 0.3 times the mean distance from grey. 0 for a grey frame."""
    red, green, blue = (frame[..., c].astype(jnp.float32) for c in range(3))
    red_green = red - green
    yellow_blue = (red + green) / 2 - blue
    spread = jnp.hypot(jnp.std(red_green), jnp.std(yellow_blue))
    return spread + 0.3 * jnp.hypot(jnp.mean(red_green), jnp.mean(yellow_blue))


class TemporalStatistics(NamedTuple):
    """Means over the valid frames of one video, in luminance; 0 where there are too few frames."""

    flicker: Scalar  # of pairs
    interpolation_error: Scalar  # of triples
    motion: Scalar  # of triples


def temporal_statistics(video: FramesU8, num_frames: Count) -> TemporalStatistics:
    """Flicker, interpolation error and motion of the first `num_frames` frames; the rest is not looked at."""
    first = linear_luminance(video[0])

    # One frame after the other: at full size the luminance of a whole window would be 187 MB a candidate.
    def next_frame(carry, frame):
        before, last = carry
        y = linear_luminance(frame)
        flicker = jnp.mean(jnp.abs(y - last))
        error = jnp.mean(jnp.abs(last - (before + y) / 2))
        motion = jnp.sqrt(jnp.mean(jnp.square((y - before) / 2)))
        return (last, y), TemporalStatistics(flicker, error, motion)

    _, each = jax.lax.scan(next_frame, (first, first), video[1:])
    index = jnp.arange(1, video.shape[0])  # the frame that each entry ends in
    pairs = index < num_frames
    triples = pairs & (index >= 2)
    return TemporalStatistics(
        _masked_mean(each.flicker, pairs),
        _masked_mean(each.interpolation_error, triples),
        _masked_mean(each.motion, triples),
    )


def image_quality(frame: UInt8[Array, "H W 3"]) -> Scalar:
    """Weighted logs of sharpness, contrast and colourfulness of one frame; 0 for a constant grey one."""
    return (
        SHARPNESS_WEIGHT * jnp.log1p(sharpness(frame) / SHARPNESS_UNIT)
        + CONTRAST_WEIGHT * jnp.log1p(rms_contrast(frame) / CONTRAST_UNIT)
        + COLOURFULNESS_WEIGHT * jnp.log1p(colourfulness(frame) / COLOURFULNESS_UNIT)
    )


def short_score(video: FramesU8, num_frames: Count) -> Scalar:
    """Mean of `image_quality` over the valid frames of one video."""
    return _masked_mean(jax.vmap(image_quality)(video), jnp.arange(video.shape[0]) < num_frames)


def long_score(video: FramesU8, num_frames: Count) -> Scalar:
    """Weighted logs of motion, flicker and interpolation error of one video.

    0 for a frozen video and for a single frame, above 0 for a smooth motion, below 0 for flicker and noise.
    """
    statistics = temporal_statistics(video, num_frames)
    return (
        MOTION_WEIGHT * jnp.log1p(statistics.motion / MOTION_UNIT)
        + FLICKER_WEIGHT * jnp.log1p(statistics.flicker / FLICKER_UNIT)
        + INTERPOLATION_WEIGHT * jnp.log1p(statistics.interpolation_error / INTERPOLATION_UNIT)
    )


# Cached: a reward is compared by identity, so a new object for every pipeline would compile every step anew.
@functools.cache
def native_short() -> Reward:
    """Image quality of the chunk's frames: `short_score` as a reward."""
    return _reward("native_short", short_score)


@functools.cache
def native_long() -> Reward:
    """Steadiness and motion over the window: `long_score` as a reward."""
    return _reward("native_long", long_score)


def _masked_mean(values: Float[Array, "t"], mask: Array) -> Scalar:
    """Mean of the values where `mask` holds; 0 where it holds nowhere."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)


def _reward(name: str, score: Callable[[Array, Array], Array]) -> Reward:
    def call(videos: UInt8[Array, "n T H W 3"], num_frames: Int[Array, "n"], prompt_index: Int[Array, ""]) -> Verdict:
        del prompt_index  # no statistic of this file reads the prompt
        return Verdict(jax.vmap(score)(videos, num_frames), jnp.full(num_frames.shape, OK, jnp.int32))

    return Reward(name, call, pixels="uint8", runs_on="jax")
