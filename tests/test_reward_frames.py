"""Frames for the reward models: which are taken, their size, resizing and cutting as the published processors do."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import assert_close, assert_equal
from PIL import Image
from reward_case import NOTES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from streamt1_jax.errors import BadInputError
from streamt1_jax.rewards.frames import PatchConfig, grid_of, resized_size, sample_frames
from streamt1_jax.rewards.patches import normalise, patchify, resize, resize_by_pil, resize_like_pil

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HPSV3 = PatchConfig(200704, 200704, "pil", MEAN, STD)
VIDEOREWARD = PatchConfig(100352, 200704, "torchvision", MEAN, STD)


def by_hand(count: int, fps: str) -> list[int]:
    """The formula of REWARDS in exact fractions; Python rounds a Fraction half to even."""
    wanted = min(max(Fraction(2) * count / Fraction(fps), 4), count - count % 2)
    n = 2 * round(wanted / 2)
    return [round(Fraction((count - 1) * i, n - 1)) for i in range(n)]


class TestSampling:
    @pytest.mark.parametrize(("count", "taken"), [(9, 4), (81, 10), (117, 14)])
    def test_known_lengths_at_16(self, count, taken):
        indices = sample_frames(count, 16)
        assert len(indices) == taken
        assert (indices[0], indices[-1]) == (0, count - 1)

    def test_every_recorded_length(self):
        table = NOTES["frame_sampling_16fps_to_2fps"]
        assert len(table) == 129
        assert {count: sample_frames(int(count), 16).tolist() for count in table} == table

    @pytest.mark.parametrize("fps", ["8", "12.5", "23.976", "24", "25", "29.97", "30", "60", "0.5"])
    def test_odd_rates(self, fps):
        for count in range(2, 200):
            assert sample_frames(count, float(fps)).tolist() == by_hand(count, fps), count

    def test_a_fixed_number_is_made_even_and_fits(self):
        assert [len(sample_frames(count, 16, fixed=7)) for count in (81, 9, 5, 2)] == [8, 8, 4, 2]

    @pytest.mark.parametrize(
        ("count", "fps", "words"), [(1, 16, "1 frames"), (9, 0, "rate is 0"), (9, math.nan, "nan")]
    )
    def test_what_cannot_be_sampled(self, count, fps, words):
        with pytest.raises(BadInputError, match=words):
            sample_frames(count, fps)


class TestSizes:
    def test_every_recorded_size(self):
        for row in NOTES["resize_table"]:
            assert [*HPSV3.size(*row["hw"])] == row["hpsv3"]
            assert [*VIDEOREWARD.size(*row["hw"])] == row["videoreward"]

    def test_full_size(self):
        assert HPSV3.size(480, 832) == VIDEOREWARD.size(480, 832) == (336, 588)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 500), (2000, 17), (2160, 3840)])
    def test_sides_are_multiples_and_the_area_is_bounded(self, height, width):
        rows, columns = resized_size(height, width, factor=28, min_pixels=100352, max_pixels=200704)
        assert rows % 28 == columns % 28 == 0 < rows * columns
        assert rows * columns <= 200704 or height * width < 100352

    def test_an_extreme_shape_is_refused(self):
        with pytest.raises(BadInputError, match="aspect ratio of at most 200"):
            HPSV3.size(2, 500)


def noise(seed: int, height: int, width: int, n: int = 2) -> np.ndarray:
    """Noise, and a hard black and white pattern whose overshoots must be clipped."""
    frames = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    frames[0] = np.where(frames[0] > 128, 255, 0)
    return frames


def channels_first(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


class TestResizing:
    # Sizes at which one call of Pillow 13 goes through its passes in the order of Pillow 12; at others it may not.
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ((60, 104), (364, 616)),
            ((480, 832), (336, 588)),
            ((720, 1280), (336, 588)),
            ((28, 28), (28, 56)),
            ((7, 9), (28, 28)),
            ((301, 299), (28, 84)),
            ((56, 84), (56, 84)),
        ],
    )
    def test_hpsv3_is_pil_to_the_bit(self, before, after):
        frames = noise(0, *before)
        pil = [np.asarray(Image.fromarray(frame).resize(after[::-1], Image.Resampling.BICUBIC)) for frame in frames]
        for way in (resize_by_pil, resize_like_pil):
            assert_equal(way.__name__, way(channels_first(frames), after).permute(0, 2, 3, 1), np.stack(pil))

    @pytest.mark.parametrize(("before", "after"), [((100, 37), (28, 280)), ((1000, 300), (812, 224))])
    def test_the_order_of_the_passes_is_columns_last(self, before, after):
        """Sizes at which Pillow 13 may choose the other order: PIL a side at a time, in the order of Pillow 12."""
        frames = noise(1, *before)
        (height, width), (rows, _) = after, before
        wide = [Image.fromarray(frame).resize((width, rows), Image.Resampling.BICUBIC) for frame in frames]
        both = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in wide]
        for way in (resize_by_pil, resize_like_pil):
            assert_equal(way.__name__, way(channels_first(frames), after).permute(0, 2, 3, 1), np.stack(both))

    def test_a_batch_is_its_frames(self):
        frames = channels_first(noise(2, 60, 104, n=3))
        for resampler in ("pil", "torchvision"):
            one_by_one = torch.cat([resize(frame[None], (252, 420), resampler) for frame in frames])
            assert_equal(resampler, resize(frames, (252, 420), resampler), one_by_one)


class TestPatches:
    def test_a_picture_is_what_the_published_processor_makes(self):
        frames = noise(3, 60, 104)
        theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 200704, "longest_edge": 200704})(
            [Image.fromarray(frame) for frame in frames], return_tensors="pt"
        )
        sized = resize(channels_first(frames), HPSV3.size(60, 104), "pil")
        ours = patchify(normalise(sized, HPSV3)[:, None], HPSV3)
        grid = grid_of(HPSV3, 1, *sized.shape[-2:])
        assert [list(grid)] * 2 == theirs["image_grid_thw"].tolist()
        assert_close("patches", ours.flatten(0, 1), theirs["pixel_values"], 1e-5)

    def test_the_order_of_a_video_by_hand(self):
        config = PatchConfig(0, 1, "pil", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        clip = torch.arange(4 * 3 * 56 * 84, dtype=torch.float32).reshape(1, 4, 3, 56, 84)
        rows = patchify(clip, config)[0]
        order = itertools.product(range(2), range(2), range(3), range(2), range(2))
        expected = [
            clip[0, 2 * t : 2 * t + 2, :, 28 * y + 14 * dy :, 28 * x + 14 * dx :][:, :, :14, :14].transpose(0, 1)
            for t, y, x, dy, dx in order
        ]
        assert_equal("patches", rows, torch.stack([patch.flatten() for patch in expected]))

    def test_a_single_frame_is_doubled(self):
        frame = torch.rand(1, 1, 3, 28, 28)
        assert_equal("patches", patchify(frame, HPSV3), patchify(frame.expand(-1, 2, -1, -1, -1), HPSV3))
