"""`streamt1 parity FOLDER`: the published reward models against a recorded case of their original code.

A folder holds published files as they are (`hpsv3/`, `videoreward/` in either layout, `base_image/`, the base that
`model_config.json` names), `templates.json`, `prompts.json`, `inputs.npz`, and what the original code made of them:
`expected.npz` and `expected.json`. Sizes, texts and numbers are read from the files. The case goes the way of a user's
files: converted (to float32) into a folder, loaded from there, scored on the CPU.
"""

import hashlib
import itertools
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamt1_jax.errors import BadInputError
from streamt1_jax.recorded_case import Comparison, close, equal
from streamt1_jax.rewards.frames import sample_frames
from streamt1_jax.rewards.model_settings import HPSV3, MODELS, VIDEOREWARD
from streamt1_jax.rewards.published import PublishedRewards

if TYPE_CHECKING:
    from streamt1_jax.rewards.clips import ClipReader, Seen
    from streamt1_jax.rewards.hpsv3 import HPSv3
    from streamt1_jax.rewards.videoreward import VideoReward

PIXEL_TOLERANCE = 1e-5
SCORE_TOLERANCE = 5e-5
_FILES = ("templates.json", "prompts.json", "inputs.npz", "expected.npz", "expected.json")


class _Arrays(dict[str, np.ndarray]):
    """What a record lacks is the record's fault, not the program's."""

    def __missing__(self, key: str) -> np.ndarray:
        raise BadInputError(f"the case lacks {key!r}, expected a whole recorded case: copy the folder again")


class _Case:
    """The files of a case beside its weights."""

    def __init__(self, folder: Path):
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise BadInputError(
                f"{folder} lacks {', '.join(missing)}, expected a recorded case of the reward models: copy all of it"
            )
        self.folder = folder
        try:
            self.inputs, self.arrays = (dict(np.load(folder / name)) for name in ("inputs.npz", "expected.npz"))
            self.prompts: list[str] = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["prompts"]
            self.notes: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise BadInputError(
                f"{folder} cannot be read ({error!r}), expected a recorded case: copy it again"
            ) from error
        self.models = tuple(name for name in MODELS if (folder / name).is_dir())

    def recorded(self, model: str) -> "_Arrays":
        """The arrays of one model, without its name."""
        arrays = ((key.removeprefix(f"{model}_"), x) for key, x in self.arrays.items() if key.startswith(f"{model}_"))
        return _Arrays(arrays)

    def sources(self) -> Any:
        from convert.rewards import RewardSources

        base_video = self.folder / "base_video"
        config = self.folder / VIDEOREWARD / "model_config.json"
        if config.is_file():
            named = json.loads(config.read_text(encoding="utf-8")).get("model_config", {}).get("model_name_or_path", "")
            base_video = self.folder / named if named and (self.folder / named).is_dir() else base_video
        return RewardSources(
            *(str(self.folder / name) for name in (HPSV3, VIDEOREWARD, "base_image")),
            base_video=str(base_video),
            templates=[str(self.folder / "templates.json")],
            models=self.models,
            offline=True,
        )


def replay_rewards(folder: str | Path) -> list[Comparison]:
    """Replays one case.

    Raises:
        BadInputError: not a case of the reward models.
        WeightsError: its files do not fit each other.
    """
    import torch

    from convert.rewards import convert_rewards

    case = _Case(Path(folder))
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "rewards"
        convert_rewards(case.sources(), converted, dtype="float32")
        published = PublishedRewards(converted, device="cpu")
        replays = {HPSV3: _replay_hpsv3, VIDEOREWARD: _replay_videoreward}
        with torch.inference_mode():
            compared = [list(replays[name](case, published.load(name))) for name in case.models]
            return [*itertools.chain(*compared), *_tables(case, published)]


def _replay_hpsv3(case: _Case, model: "HPSv3") -> Iterator[Comparison]:
    notes, recorded = case.notes.get(HPSV3, {}), case.recorded(HPSV3)
    videos = list(case.inputs["frames"])
    clips = [frame[None] for video in videos for frame in video]
    prompts = [prompt for prompt, video in zip(case.prompts, videos, strict=True) for _ in video]
    batches = list(model.reader.batches(clips, prompts))
    yield from _compare_words(HPSV3, case, model.reader, batches[0])
    yield from _compare_pixels(HPSV3, notes, recorded, model.reader, clips, batches, "frame0_")
    if "image_embeds_0_0" in recorded:
        yield close("hpsv3 visual tokens", batches[0].features[0], recorded["image_embeds_0_0"], SCORE_TOLERANCE)
    rated = np.stack(model.rate(videos, case.prompts))
    yield close("hpsv3 mu", rated[..., 0], recorded["mu"], SCORE_TOLERANCE)
    yield close("hpsv3 sigma", rated[..., 1], recorded["sigma"], SCORE_TOLERANCE)
    yield close("hpsv3 score", model(videos, case.prompts), recorded["score"], SCORE_TOLERANCE)
    if "hidden" in recorded:
        hidden = model.reader.hidden(clips, prompts)[:, 0].unflatten(0, (len(videos), -1))
        yield close("hpsv3 hidden states", hidden, recorded["hidden"], SCORE_TOLERANCE)
    if "mixed_batch" in recorded:
        mixed = np.concatenate(model.rate([video[:1] for video in videos], case.prompts))
        yield close("hpsv3 batch of all prompts", mixed, recorded["mixed_batch"], SCORE_TOLERANCE)


def _replay_videoreward(case: _Case, model: "VideoReward") -> Iterator[Comparison]:
    notes, recorded = case.notes.get(VIDEOREWARD, {}), case.recorded(VIDEOREWARD)
    windows = list(case.inputs["window"])
    indices = model.config.frames(len(windows[0]), notes.get("fps", 16))
    yield equal("videoreward frames taken", indices.tolist(), recorded["frame_indices"].tolist())
    clips = [window[indices] for window in windows]
    batches = list(model.reader.batches(clips, case.prompts))
    yield from _compare_words(VIDEOREWARD, case, model.reader, batches[0])
    yield from _compare_pixels(VIDEOREWARD, notes, recorded, model.reader, clips, batches, "")
    if "video_embeds_0" in recorded:
        yield close("videoreward visual tokens", batches[0].features[0], recorded["video_embeds_0"], SCORE_TOLERANCE)
    if "hidden" in recorded:
        hidden = model.reader.hidden(clips, case.prompts)
        yield close("videoreward hidden states", hidden, recorded["hidden"], SCORE_TOLERANCE)
    logits = model.logits(clips, case.prompts)
    yield close("videoreward logits", logits, recorded["logits"], SCORE_TOLERANCE)
    yield close("videoreward normalised", model.normalise(logits), recorded["normalised"], SCORE_TOLERANCE)
    yield close("videoreward overall", model(clips, case.prompts), recorded["overall"], SCORE_TOLERANCE)


def _compare_words(name: str, case: _Case, reader: "ClipReader", batch: "Seen") -> Iterator[Comparison]:
    """Rendered texts, token ids and the tokens' own numbers."""
    notes, recorded = case.notes.get(name, {}), case.recorded(name)
    tokenizer = reader.tokenizer
    if "text" in notes:
        yield equal(f"{name} texts", [tokenizer.instruction.render(prompt) for prompt in case.prompts], notes["text"])
    ours = dict(zip(tokenizer.instruction.reserved, tokenizer.reserved_ids, strict=True))
    reserved = notes.get("reward_token_ids", ours)
    if "reward_token_id" in notes:
        reserved = {tokenizer.instruction.reserved[0]: notes["reward_token_id"]}
    yield equal(f"{name} reserved tokens", sorted(ours.items()), sorted(reserved.items()))
    yield equal(f"{name} tokenizer length", [tokenizer.length], [notes.get("tokenizer_length", tokenizer.length)])
    for i, prompt in enumerate(case.prompts):
        ids = tokenizer(prompt, batch.features.shape[1])
        yield equal(f"{name} token ids of {i}", ids.tolist(), recorded[f"input_ids_{i}"].reshape(-1).tolist())


def _compare_pixels(
    name: str,
    notes: Mapping[str, Any],
    recorded: _Arrays,
    reader: "ClipReader",
    clips: list[np.ndarray],
    batches: list["Seen"],
    rows_of: str,
) -> Iterator[Comparison]:
    """Grids, resized frames and patches."""
    import torch

    from streamt1_jax.rewards.patches import resize

    kind = "image" if name == HPSV3 else "video"
    yield equal(f"{name} grid", list(batches[0].grid), recorded[f"{kind}_grid_thw"].reshape(-1)[:3].tolist())
    size = reader.patches.size(*clips[0].shape[1:3])
    yield equal(f"{name} resized size", list(size), list(notes.get("resized_hw", size)))
    frames = torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2)
    resized = resize(frames, size, reader.patches.resampler).permute(0, 2, 3, 1).numpy()
    if "resized_sha256" in notes:
        hashes = [hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest() for frame in resized]
        yield equal(f"{name} resized frames", hashes, list(itertools.chain(*notes["resized_sha256"])))
    for key, ours in (("resized_0_0", resized[0]), ("resized", resized.reshape(len(clips), -1, *resized.shape[1:]))):
        if key in recorded:
            yield close(f"{name} {key.replace('_', ' ')}", ours, recorded[key], 0.0)
    patches = torch.cat([batch.patches for batch in batches]).numpy()
    # Recorded: some rows of one clip for each prompt, and the mean of every clip.
    rows = recorded.get(f"pixel_values_{rows_of}rows")
    if rows is not None:
        every = len(clips) // len(rows)
        yield close(f"{name} patches", patches[::every][:, recorded["pixel_rows"]], rows, PIXEL_TOLERANCE)
    if "pixel_mean" in recorded:
        means = patches.mean(axis=(1, 2), dtype=np.float64).reshape(recorded["pixel_mean"].shape)
        yield close(f"{name} mean of patches", means, recorded["pixel_mean"], PIXEL_TOLERANCE)


def _tables(case: _Case, published: PublishedRewards) -> Iterator[Comparison]:
    """The formulas for frames and sizes over the lengths and sizes that the case lists."""
    for key, table in case.notes.items():
        if rates := re.fullmatch(r"frame_sampling_([\d.]+)fps_to_([\d.]+)fps", key):
            fps, sample_fps = map(float, rates.groups())
            ours = [sample_frames(int(count), fps, sample_fps=sample_fps).tolist() for count in table]
            yield equal(f"frames taken at {fps:g} fps", ours, list(table.values()))
    sizes = case.notes.get("resize_table", [])
    for name in case.models if sizes else ():
        ours = [list(published.load(name).reader.patches.size(*row["hw"])) for row in sizes]
        yield equal(f"{name} sizes", ours, [row[name] for row in sizes])
