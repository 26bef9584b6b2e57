"""`benchmarks/choice.py`: what each way of choosing among the videos of a prompt takes."""

import sys
from pathlib import Path

from compare import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import choice


def test_every_way_takes_the_video_that_it_prefers():
    videos = [(0.1, 3.0, 0.2), (0.3, 2.0, 0.9), (0.2, 1.0, 0.4)]  # short reward, long reward, check
    prompt = [dict(zip(("short", "long", "mean"), video, strict=True)) for video in videos]
    flat = [{"short": 0.0, "long": 0.0, "mean": 0.5}] * 3  # no reward tells these apart: no correlation, the first one
    (found,) = choice.summary([prompt, flat]).values()
    means = {way: row["mean"] for way, row in found.items()}
    chance = (0.5 + 0.5) / 2
    for way, expected in (("by chance", chance), ("best", 0.7), ("by short", 0.7), ("by long", 0.35)):
        assert_close(way, means[way], expected, 1e-6)
    assert_close("gain", means["gain by short"], 0.7 - chance, 1e-6)
    assert_close("order of short", means["rank correlation of short"], 1.0, 1e-6)
    assert_close("order of long", means["rank correlation of long"], -0.5, 1e-6)
    assert found["rank correlation of short"]["prompts"] == 1
