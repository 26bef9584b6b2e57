"""Which frames the reward models see, and at which size: plain numbers, no torch.

Both follow what the models were trained with (the Qwen2-VL processor and VideoReward's reader), half to even wherever
something is rounded.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from streamt1_jax.errors import BadInputError

Resampler = Literal["pil", "torchvision"]

MAX_ASPECT = 200


@dataclass(frozen=True)
class PatchConfig:
    """A Qwen2-VL processor's numbers, and the bounds on a frame's area."""

    min_pixels: int
    max_pixels: int
    resampler: Resampler
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2

    @property
    def factor(self) -> int:
        """Pixels of a side of one visual token."""
        return self.patch_size * self.merge_size

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What frames of this size are resized to."""
        return resized_size(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


class Grid(NamedTuple):
    """Patches of one clip on each axis."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


def grid_of(config: PatchConfig, frames: int, height: int, width: int) -> Grid:
    """The grid of a clip of already resized frames; a single frame is doubled in time."""
    t = math.ceil(frames / config.temporal_patch_size)
    return Grid(t, height // config.patch_size, width // config.patch_size)


def sample_frames(
    count: int, fps: float, *, sample_fps: float = 2.0, fixed: int | None = None
) -> Int64[np.ndarray, "n"]:
    """Indices of the frames that VideoReward takes of a video.

    `n = 2 round(min(max(sample_fps T / fps, 4), floor_even(T)) / 2)`, then n indices evenly from 0 to T - 1:

    >>> sample_frames(9, 16)  ->  [0 3 5 8]

    Args:
        count: frames of the video, T.
        fps: frames a second of the video.
        sample_fps: frames a second to take.
        fixed: take this many instead (rounded to even, at most T).

    Raises:
        BadInputError: fewer than two frames, or a rate that is no positive number.
    """
    if count < 2:
        raise BadInputError(f"the video has {count} frames, expected at least 2; VideoReward judges motion")
    if not (math.isfinite(fps) and fps > 0):
        raise BadInputError(f"the frame rate is {fps}, expected a number above 0; give the video's own, such as 16")
    wanted = max(count / fps * sample_fps, 4) if fixed is None else fixed
    n = 2 * round(min(wanted, count // 2 * 2) / 2)
    # n - 1 is odd, so no index lies half way between two frames, and float32 would give the same.
    return np.round(np.linspace(0, count - 1, n)).astype(np.int64)


def resized_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, the area between the two bounds as far as whole multiples allow.

    Rounded down from above `max_pixels` and up from below `min_pixels`, so that up-scaling may overshoot.

    Raises:
        BadInputError: a frame longer than `MAX_ASPECT` times its width, or the reverse.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadInputError(
            f"frames are {width}x{height}, expected an aspect ratio of at most {MAX_ASPECT}; crop the video"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return rows, columns
