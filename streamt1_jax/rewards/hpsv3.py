"""HPSv3: how people would like one picture for a prompt, applied to the frames of a video: the paper's short score.

The head gives (mu, sigma) of one frame; the score of a video is the mean of mu over its frames. Negative is normal.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import nn

from streamt1_jax.rewards.clips import ClipReader
from streamt1_jax.rewards.model_settings import ModelSettings

OUTPUTS = 2


def hpsv3_head(hidden_size: int, first: int, second: int) -> nn.Sequential:
    """Parameters `0`, `3` and `5`, in float32 whatever the body's type."""
    outer, inner, last = nn.Linear(hidden_size, first), nn.Linear(first, second), nn.Linear(second, OUTPUTS)
    return nn.Sequential(outer, nn.ReLU(), nn.Dropout(0.05), inner, nn.ReLU(), last)


class HPSv3:
    """Scores videos frame by frame; a host reward (`bridge.host_reward`)."""

    def __init__(self, reader: ClipReader, settings: ModelSettings):
        self.reader, self.settings = reader, settings

    @torch.inference_mode()
    def rate(
        self, videos: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], prompts: Sequence[str]
    ) -> list[Float32[np.ndarray, "_ 2"]]:
        """(mu, sigma) of every frame of every video; sigma is the head's second number as it is."""
        frames = [frame[None] for video in videos for frame in video]
        texts = [prompt for video, prompt in zip(videos, prompts, strict=True) for _ in video]
        hidden = self.reader.hidden(frames, texts)[:, 0]
        outputs = self.reader.network.rm_head(hidden.float()).cpu().numpy()
        return np.split(outputs, np.cumsum([len(video) for video in videos])[:-1])

    def __call__(self, videos: list[np.ndarray], prompts: list[str]) -> list[float]:
        """The mean mu of every video."""
        return [float(rated[:, 0].mean(dtype=np.float64)) for rated in self.rate(videos, prompts)]

    def explain(self, video: UInt8[np.ndarray, "t H W 3"], prompt: str, fps: float) -> dict[str, Any]:
        """Everything there is to say of one video, as plain data."""
        (rated,) = self.rate([video], [prompt])
        return {
            "score": float(rated[:, 0].mean(dtype=np.float64)),
            "mu": rated[:, 0].tolist(),
            "sigma": rated[:, 1].tolist(),
            "frames_used": len(video),
            "fps": fps,
        }
