"""Clips and prompts to hidden states at the reserved tokens, in few batches: what both reward models share.

- Clips of one size are taken together, as many as a bound on working memory allows.
- Frames go to the device as uint8; resizing, normalising and cutting into patches happen there.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from streamt1_jax.rewards.chat import RewardTokenizer
from streamt1_jax.rewards.frames import Grid, PatchConfig, grid_of
from streamt1_jax.rewards.patches import normalise, patchify, resize
from streamt1_jax.rewards.qwen2vl import RewardNetwork, pad_rows

Clip = UInt8[np.ndarray, "_ _ _ 3"]  # frames of any size; those of one batch may differ


class Seen(NamedTuple):
    """One batch on its way, for those who want to look inside (parity, benchmarks)."""

    rows: list[int]  # the clips it holds
    grid: Grid
    patches: Float32[Tensor, "n p d"]
    ids: np.ndarray  # [n, L]
    features: Float[Tensor, "n v D"]
    hidden: Float[Tensor, "n k D"]


class ClipReader:
    """A network, its tokenizer and its way of cutting frames, on one device.

    Args:
        batch_bytes: bound on the activations of one batch; a single clip may still take more.
    """

    def __init__(
        self,
        network: RewardNetwork,
        tokenizer: RewardTokenizer,
        patches: PatchConfig,
        device: torch.device,
        batch_bytes: float,
    ):
        self.network, self.tokenizer, self.patches = network, tokenizer, patches
        self.device, self.batch_bytes = device, batch_bytes

    @torch.inference_mode()
    def hidden(self, clips: Sequence[Clip], prompts: Sequence[str]) -> Float[Tensor, "n k D"]:
        """Hidden states of every clip at the reserved tokens, in their order."""
        found: dict[int, Tensor] = {}
        for batch in self.batches(clips, prompts):
            found.update(zip(batch.rows, batch.hidden, strict=True))
        return torch.stack([found[row] for row in range(len(clips))])

    def batches(self, clips: Sequence[Clip], prompts: Sequence[str]) -> Iterator[Seen]:
        """The same, batch by batch with what lies between; call it under `torch.inference_mode()`."""
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, clip in enumerate(clips):
            by_shape[clip.shape].append(row)
        for (frames, height, width, _), rows in by_shape.items():
            grid = grid_of(self.patches, frames, *self.patches.size(height, width))
            tokens = grid.patches // self.patches.merge_size**2
            ids = [self.tokenizer(prompts[row], tokens) for row in rows]
            step = max(1, int(self.batch_bytes // self.row_bytes(grid, max(map(len, ids)))))
            for start in range(0, len(rows), step):
                some = slice(start, start + step)
                yield self._batch([clips[row] for row in rows[some]], rows[some], ids[some], grid)

    def row_bytes(self, grid: Grid, length: int) -> float:
        """About what one clip needs while it is read: the widest layer of either network, and its patches."""
        text, vision = self.network.config.text_config, self.network.config.vision_config
        itemsize = self.network.body_dtype.itemsize
        wide = itemsize * (3 * text.intermediate_size + 8 * text.hidden_size)
        seen = itemsize * int(2 * vision.mlp_ratio * vision.embed_dim + 10 * vision.embed_dim)
        pixels = 4 * 3 * self.patches.temporal_patch_size * self.patches.patch_size**2
        return max(length * wide, grid.patches * (seen + 3 * pixels))

    def cut(self, clips: Sequence[Clip]) -> Float32[Tensor, "n p d"]:
        """The patches of clips of one shape."""
        # Stacked before anything else: torch must not see memory that is XLA's and read-only.
        frames = torch.from_numpy(np.stack(clips)).to(self.device).permute(0, 1, 4, 2, 3)
        n, t, _, height, width = frames.shape
        sized = resize(frames.flatten(0, 1), self.patches.size(height, width), self.patches.resampler)
        return patchify(normalise(sized, self.patches).unflatten(0, (n, t)), self.patches)

    def _batch(self, clips: Sequence[Clip], rows: list[int], ids: list[np.ndarray], grid: Grid) -> Seen:
        padded = pad_rows(ids)
        places = np.stack([self.tokenizer.reserved_places(row) for row in ids])
        patches = self.cut(clips)
        features = self.network.look(patches, grid)
        hidden = self.network.read(
            torch.from_numpy(padded).to(self.device), features, torch.from_numpy(places).to(self.device)
        )
        return Seen(rows, grid, patches, padded, features, hidden)
