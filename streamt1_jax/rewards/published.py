"""The published reward models, from a folder that `streamt1 convert rewards` wrote, as rewards of a run.

- `manifest.json` and its seal as in `manifest.py`; in `hpsv3/` and `videoreward/`: `weights.safetensors` (names of
  `RewardNetwork`), `config.json` (the base model's), `tokenizer.json`, `settings.json` (texts and numbers).
- Torch is imported when a model is loaded, not before.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt1_jax.errors import BadInputError, RewardError, WeightsError
from streamt1_jax.manifest import Format, is_of_format, read_manifest, refuse_changed
from streamt1_jax.rewards.base import PromptTable, Reward
from streamt1_jax.rewards.bridge import host_reward
from streamt1_jax.rewards.model_settings import MODELS, ModelSettings
from streamt1_jax.rewards.placement import check_fit, torch_device
from streamt1_jax.settings import REWARD_PRECISIONS

if TYPE_CHECKING:
    from streamt1_jax.rewards.hpsv3 import HPSv3
    from streamt1_jax.rewards.videoreward import VideoReward

FORMAT = Format("streamt1-rewards", 1, "converted rewards", "streamt1 convert rewards --out {out}")
WEIGHTS = "weights.safetensors"
FPS = 16.0  # of every video made here


def is_rewards(folder: Path) -> bool:
    """Whether a folder holds converted rewards by its manifest; nothing is verified."""
    return is_of_format(folder, FORMAT)


@dataclass
class PublishedRewards:
    """The reward models of one folder, each loaded once, when it is first asked for.

    Args:
        folder: what `streamt1 convert rewards` wrote.
        device: a torch device; None: the first GPU that torch sees, or the CPU.
        precision: of the weights in memory: "stored", "bfloat16", "float32" or "int8" (half of bfloat16; by torchao).
        batch_bytes: bound on the activations of one batch of clips.

    Raises:
        WeightsError: the folder holds no converted rewards.
        BadInputError: no such precision.
    """

    folder: Path
    device: str | None = None
    precision: str = "stored"
    batch_bytes: float = 4e9
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.manifest = read_manifest(self.folder, FORMAT)
        if self.precision not in REWARD_PRECISIONS:
            raise BadInputError(f"precision is {self.precision!r}, expected one of {', '.join(REWARD_PRECISIONS)}")

    def weight_bytes(self, name: str) -> float:
        """What a model's weights take in memory.

        Raises:
            WeightsError: the folder was converted without this model.
        """
        if name not in self.manifest["models"]:
            raise WeightsError(
                f"{self.folder}: holds {', '.join(self.manifest['models'])}, expected {name}; convert it too: "
                f"streamt1 convert rewards --out {self.folder} --overwrite"
            )
        stored = self.manifest["models"][name]
        if self.precision == "stored":
            return stored["bytes"]
        # Eight bits are for linear layers; the rest stays at sixteen.
        half = 2 * stored["parameters"]
        return {"bfloat16": half, "float32": 2 * half, "int8": half - stored["linear"]}[self.precision]

    def check_fit(self, names: tuple[str, ...]) -> None:
        """Refuses, before anything is loaded, models that the device has no room for.

        Raises:
            OutOfMemoryError: with sizes and what to lower.
        """
        sizes = {name: self.weight_bytes(name) for name in names if name not in self._loaded}
        if sizes:
            check_fit(sizes, self.batch_bytes, torch_device(self.device))

    def load(self, name: str) -> "HPSv3 | VideoReward":
        """One model, its files verified first.

        Raises:
            WeightsError: files are missing or changed, or do not fit each other.
            OutOfMemoryError: the device has no room for it.
        """
        if name not in self._loaded:
            self.check_fit((name,))
            files = self.manifest["files"].items()
            refuse_changed(self.folder, {file: entry for file, entry in files if file.startswith(f"{name}/")})
            self._loaded[name] = _load(self, name)
        return self._loaded[name]

    def reward(self, name: str, prompts: PromptTable | None) -> Reward:
        """A model as a reward of a run, whose videos have `FPS` frames a second."""
        scorer = self.load(name)
        about = {
            "name": name,
            "weights_sha256": self.manifest["files"][f"{name}/{WEIGHTS}"]["sha256"],
            "origin": self.manifest["models"][name]["origin"],
            "precision": self.precision,
            "device": str(scorer.reader.device),
            "fps": FPS,
        }
        video = scorer.settings.video
        if video is None:
            return host_reward(name, scorer, prompts, borrow=True, explain=scorer.explain, about=about)
        about |= {"frames_a_second": video.fps, "frames_fixed": video.num_frames, "mean": video.mean, "std": video.std}
        # A video of one frame is refused by the model, in its own words.
        choose = lambda count: video.frames(count, FPS) if count > 1 else [0]  # noqa: E731
        return host_reward(name, scorer, prompts, borrow=True, choose=choose, explain=scorer.explain, about=about)


def load_rewards(
    folder: str | Path, prompts: PromptTable, *, device: str | None = None, precision: str = "stored"
) -> tuple[Reward, Reward]:
    """HPSv3 as the short reward and VideoReward as the long one: the search of the paper.

    >>> rewards = load_rewards("rewards", pipe.prompts, device="cuda:1")
    >>> pipe("a red circle moves right", rewards=rewards)
    """
    published = PublishedRewards(Path(folder), device, precision)
    published.check_fit(MODELS)
    short, long = (published.reward(name, prompts) for name in MODELS)
    return short, long


def read_settings(folder: Path, name: str) -> ModelSettings:
    """The settings of one model of a folder of converted rewards."""
    return ModelSettings.from_json(json.loads((folder / name / "settings.json").read_text(encoding="utf-8")))


def _load(published: PublishedRewards, name: str) -> "HPSv3 | VideoReward":
    try:
        import transformers  # noqa: F401 (asked for here, so that its absence is one line)
    except ImportError as error:
        raise RewardError(
            f"reward {name!r} needs PyTorch and transformers, which are not installed; "
            "pip install 'streamt1-jax[torch]'"
        ) from error
    from streamt1_jax.rewards.loading import load_scorer

    folder = published.folder / name
    return load_scorer(
        read_settings(published.folder, name),
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        tokenizer=(folder / "tokenizer.json").read_text(encoding="utf-8"),
        weights=folder / WEIGHTS,
        device=torch_device(published.device),
        precision=published.precision,
        batch_bytes=published.batch_bytes,
    )
