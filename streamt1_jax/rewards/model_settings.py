"""What is known of a published reward model beside its weights: texts, sizes and numbers of its files. No torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from streamt1_jax.errors import WeightsError
from streamt1_jax.rewards.chat import Instruction
from streamt1_jax.rewards.frames import PatchConfig, sample_frames

HPSV3, VIDEOREWARD = "hpsv3", "videoreward"
MODELS = (HPSV3, VIDEOREWARD)
RESERVED = {HPSV3: ("<|Reward|>",), VIDEOREWARD: ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")}
DIMENSIONS = ("VQ", "MQ", "TA")


@dataclass(frozen=True)
class VideoRewardConfig:
    """VideoReward's own numbers, of its `model_config.json`."""

    fps: float | None  # frames a second that it takes; None only where the next is set
    num_frames: int | None  # or this many of every video
    mean: tuple[float, ...]  # of each dimension, in the order of `DIMENSIONS`
    std: tuple[float, ...]

    def frames(self, count: int, fps: float) -> Int64[np.ndarray, "n"]:
        """Indices of the frames taken of a video of `count` frames at `fps`."""
        if self.num_frames is not None:
            return sample_frames(count, fps, fixed=self.num_frames)
        assert self.fps is not None  # refused where the settings were read
        return sample_frames(count, fps, sample_fps=self.fps)


@dataclass(frozen=True)
class ModelSettings:
    """One model.

    Args:
        head: HPSv3: widths of the head's two hidden layers. VideoReward: the head's outputs, 1 or 3.
        video: VideoReward's numbers.
    """

    name: str
    instruction: Instruction
    patches: PatchConfig
    head: tuple[int, ...]
    video: VideoRewardConfig | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelSettings":
        """The reverse of `to_json` after a trip through a file.

        Raises:
            WeightsError: the settings of another version.
        """
        try:
            parts = {"instruction": Instruction, "patches": PatchConfig, "video": VideoRewardConfig}
            made: dict[str, Any] = {"head": tuple(values["head"])}
            for key in values.keys() - made.keys():
                given = values[key]
                made[key] = _build(parts[key], given) if key in parts and given is not None else given
            return cls(**made)
        except (TypeError, KeyError) as error:
            raise WeightsError(
                f"settings.json of a reward: {error}, expected those of this version; convert the rewards again"
            ) from error


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    return cls(**{key: tuple(x) if isinstance(x, list) else x for key, x in values.items()})
