"""Frames to the patches that Qwen2-VL takes, in memory and on any torch device: resize, normalise, cut.

- Equal to the published processors, which go frame by frame through PIL (HPSv3) or torchvision (VideoReward).
- `resize_like_pil` is PIL's own fixed-point arithmetic on whole batches: a pass along rows, rounded to uint8, then one
  along columns. All its numbers are integers, so every device gives the same. This is always the order up to Pillow 12,
  and so of the published scores. Pillow 13 may choose either order, also where both sides shrink, and the two differ by
  a rounding; so the passes are asked for one at a time, and any Pillow gives the same.
"""

import numpy as np
import torch
from jaxtyping import Float32, Int32, UInt8
from PIL import Image
from torch import Tensor

from streamt1_jax.rewards.frames import PatchConfig, Resampler, grid_of

PRECISION_BITS = 22  # of PIL's coefficients: 32, less 8 of a pixel and 2 to be safe from overflow
BICUBIC_A = -0.5


def resize(frames: UInt8[Tensor, "n 3 h w"], size: tuple[int, int], resampler: Resampler) -> UInt8[Tensor, "n 3 H W"]:
    """Bicubic, antialiased, rounded to uint8, as one of two libraries does it."""
    if frames.shape[-2:] == size:
        return frames
    if resampler == "pil":
        return (resize_by_pil if frames.device.type == "cpu" else resize_like_pil)(frames, size)
    resized = torch.nn.functional.interpolate(
        frames.float().contiguous(), size, mode="bicubic", antialias=True, align_corners=False
    )
    return resized.clamp(0, 255).round().to(torch.uint8)


def resize_by_pil(frames: UInt8[Tensor, "n 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "n 3 H W"]:
    """PIL frame by frame, one pass at a time: faster on a CPU than the same arithmetic in torch."""
    height, width = size

    def one(frame: np.ndarray) -> np.ndarray:
        wide = Image.fromarray(frame).resize((width, len(frame)), Image.Resampling.BICUBIC)
        return np.asarray(wide.resize((width, height), Image.Resampling.BICUBIC))

    resized = np.stack([one(np.ascontiguousarray(frame)) for frame in frames.permute(0, 2, 3, 1).numpy()])
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def resize_like_pil(frames: UInt8[Tensor, "n 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "n 3 H W"]:
    """`PIL.Image.resize(..., BICUBIC)` of every frame, to the bit."""
    columns = _pil_pass(frames, size[1])
    return _pil_pass(columns.transpose(2, 3), size[0]).transpose(2, 3)


def _pil_pass(x: UInt8[Tensor, "*b a"], out: int) -> UInt8[Tensor, "*b A"]:
    """One pass, along the last axis."""
    if x.shape[-1] == out:
        return x
    places, weights = (torch.from_numpy(table).to(x.device) for table in _pil_taps(x.shape[-1], out))
    wide = x.to(torch.int32)
    total = torch.full((*x.shape[:-1], out), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=x.device)
    for place, weight in zip(places, weights, strict=True):  # a few taps, each over the whole batch
        total += wide[..., place] * weight
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


def _pil_taps(size: int, out: int) -> tuple[np.ndarray, Int32[np.ndarray, "k A"]]:
    """Which pixels make up each output pixel, [taps, out], and their weights in units of 2^-PRECISION_BITS."""
    scale = size / out
    stretch = max(scale, 1.0)  # the filter grows with the picture's shrinking: that is the antialiasing
    support = 2.0 * stretch
    centers = (np.arange(out) + 0.5) * scale
    low = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centers + support + 0.5).astype(np.int64), size)
    steps = np.arange(int((high - low).max()))
    places = low[:, None] + steps
    inside = places < high[:, None]
    weights = np.where(inside, _bicubic((places - centers[:, None] + 0.5) / stretch), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    return np.minimum(places, size - 1).T.copy(), fixed.T.copy()


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((BICUBIC_A + 2.0) * x - (BICUBIC_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * BICUBIC_A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def normalise(frames: UInt8[Tensor, "*n 3 H W"], config: PatchConfig) -> Float32[Tensor, "*n 3 H W"]:
    """To [0, 1], less the mean, over the standard deviation of each channel."""
    mean = torch.tensor(config.image_mean, dtype=torch.float32, device=frames.device)[:, None, None]
    std = torch.tensor(config.image_std, dtype=torch.float32, device=frames.device)[:, None, None]
    return (frames.float() / 255.0 - mean) / std


def patchify(clips: Float32[Tensor, "n t 3 H W"], config: PatchConfig) -> Float32[Tensor, "n p d"]:
    """Every clip as rows of d = (channel, time, y, x), in the order (time, row of tokens, column of tokens, then the
    patches of a token). The last frame is repeated where the frames do not fill the last patch in time."""
    n, t, channels, height, width = clips.shape
    time, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    if missing := -t % time:
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    grid = grid_of(config, t, height, width)
    rows_columns = (grid.h // merge, merge, patch, grid.w // merge, merge, patch)
    cut = clips.reshape(n, grid.t, time, channels, *rows_columns)
    rows = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return rows.reshape(n, grid.t * grid.h * grid.w, channels * time * patch * patch)
