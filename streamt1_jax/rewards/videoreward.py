"""VideoReward: visual quality (VQ), motion quality (MQ) and text alignment (TA) of a video, the paper's long score.

The score is "Overall": the sum of the three, each less its mean and over its standard deviation on the training set.
Negative is normal. The caption stands after the tokens of VQ and MQ, so those two cannot depend on the prompt.
All three come from one pass; a run judges a clip for one prompt, so nothing is computed twice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from streamt1_jax.errors import BadInputError
from streamt1_jax.rewards.clips import ClipReader
from streamt1_jax.rewards.model_settings import DIMENSIONS, ModelSettings


class VideoReward:
    """Scores videos; a host reward (`bridge.host_reward`) of frames that are already chosen."""

    def __init__(self, reader: ClipReader, settings: ModelSettings):
        assert settings.video is not None
        self.reader, self.settings, self.config = reader, settings, settings.video

    @torch.inference_mode()
    def logits(
        self, clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], prompts: Sequence[str]
    ) -> Float64[np.ndarray, "n 3"]:
        """VQ, MQ, TA of clips whose frames are already chosen.

        Raises:
            BadInputError: a clip of a single frame.
        """
        if min(map(len, clips)) < 2:
            raise BadInputError("a video has 1 frame, expected at least 2; VideoReward judges motion")
        outputs = self.reader.network.rm_head(self.reader.hidden(clips, prompts))
        return pick_dimensions(outputs).double().cpu().numpy()

    def normalise(self, logits: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
        """`(x - mean) / std` of each dimension."""
        return (logits - np.array(self.config.mean)) / np.array(self.config.std)

    def __call__(self, clips: list[np.ndarray], prompts: list[str]) -> np.ndarray:
        """Overall of every clip."""
        return self.normalise(self.logits(clips, prompts)).sum(axis=1)

    def explain(self, video: UInt8[np.ndarray, "t H W 3"], prompt: str, fps: float) -> dict[str, Any]:
        """Everything there is to say of one whole video, as plain data."""
        indices = self.config.frames(len(video), fps)
        raw = self.logits([video[indices]], [prompt])
        normalised = self.normalise(raw)
        return {
            "score": float(normalised.sum()),
            "raw": dict(zip(DIMENSIONS, raw[0].tolist(), strict=True)) | {"Overall": float(raw.sum())},
            "normalised": dict(zip(DIMENSIONS, normalised[0].tolist(), strict=True))
            | {"Overall": float(normalised.sum())},
            "mean": dict(zip(DIMENSIONS, self.config.mean, strict=True)),
            "std": dict(zip(DIMENSIONS, self.config.std, strict=True)),
            "frames_used": len(indices),
            "frame_indices": indices.tolist(),
            "fps": fps,
        }


def videoreward_head(hidden_size: int, output_dim: int) -> nn.Linear:
    return nn.Linear(hidden_size, output_dim, bias=False)


def pick_dimensions(outputs: Float[Tensor, "n 3 o"]) -> Float[Tensor, "n 3"]:
    """Of one output: that of each token. Of three: the token's own, the diagonal."""
    return outputs[..., 0] if outputs.shape[-1] == 1 else outputs.diagonal(dim1=1, dim2=2)
