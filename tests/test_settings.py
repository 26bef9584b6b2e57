"""FAULTS rows 5, 6, 8, 9 and 11: what a user may ask for, and what every wrong wish is answered."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt1_jax.config import StreamConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.settings import KEYS, check_seed, check_size, chunks_of, legal_frames, load_settings


def problem(function, *args, **kwargs) -> str:
    with pytest.raises(BadInputError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def config_file(folder, body):
    path = folder / "config.py"
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({body})\n")
    return path


# Lengths (row 6).


@pytest.mark.parametrize(
    ("seconds", "frames"), [(5, 81), (5.0, 81), (30, 477), (0.01, 9), (0.9, 9), (1, 21), (10, 165)]
)
def test_seconds_become_the_nearest_legal_count(seconds, frames):
    assert legal_frames(seconds=seconds) == frames


@given(st.floats(0.001, 1e4))
def test_no_legal_count_is_nearer(seconds):
    frames = legal_frames(seconds=seconds)
    assert frames % 12 == 9
    distance = abs(frames - 16 * seconds)
    assert distance <= abs(frames + 12 - 16 * seconds)
    assert frames == 9 or distance <= abs(frames - 12 - 16 * seconds)


@pytest.mark.parametrize("frames", [9, 21, 81, 477, np.int64(33)])
def test_legal_counts_pass(frames):
    assert legal_frames(frames=frames) == frames
    assert isinstance(legal_frames(frames=frames), int)


@pytest.mark.parametrize(
    ("frames", "lower", "upper"),
    [
        (0, 9, 21),
        (-12, 9, 21),
        (1, 9, 21),
        (10, 9, 21),
        (80, 69, 81),
        (82, 81, 93),
        (81.5, 81, 93),
        (81.0, 81, 93),
        (True, 9, 21),
    ],
)
def test_illegal_counts_name_both_neighbours(frames, lower, upper):
    assert f"the nearest are {lower} and {upper}" in problem(legal_frames, frames=frames)


@pytest.mark.parametrize("frames", [math.nan, math.inf, "81", [81]])
def test_what_is_no_count_is_refused(frames):
    assert "expected a whole number 12k - 3" in problem(legal_frames, frames=frames)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "5", [5]])
def test_seconds_must_be_positive(seconds):
    assert "expected a number above 0" in problem(legal_frames, seconds=seconds)


def test_exactly_one_length_is_asked_for():
    for lengths in ({}, {"frames": 81, "seconds": 5}):
        assert "exactly one" in problem(legal_frames, **lengths)


def test_lengths_follow_the_chunk_size():
    assert legal_frames(frames=5, latent_frames_per_chunk=1, time_factor=4) == 5
    assert "the nearest are 5 and 13" in problem(legal_frames, frames=6, latent_frames_per_chunk=2, time_factor=4)
    assert [chunks_of(frames, StreamConfig()) for frames in (9, 81, 477)] == [1, 7, 40]


# Sizes (row 5).


@pytest.mark.parametrize("size", [(80, 128), (480, 832), (None, None), (16, None)])
def test_legal_sizes_pass(size):
    check_size(*size)


@pytest.mark.parametrize(
    ("size", "legal"),
    [
        ((81, 128), "height 80, width 128"),
        ((80, 121), "height 80, width 128"),
        ((479, 833), "height 480, width 832"),
        ((0, -5), "height 16, width 16"),
        ((88, None), "height 96, width default"),
        ((80.0, 128), "height 80, width 128"),
        ((math.nan, 128), "height 16, width 128"),
        ((True, 128), "height 16, width 128"),
        (("80", 128), "height 16, width 128"),
    ],
)
def test_illegal_sizes_name_the_nearest(size, legal):
    assert legal in problem(check_size, *size)


def test_an_untrained_size_warns():
    with pytest.warns(UserWarning, match="128x96 is not the 128x80"):
        check_size(96, None, trained=(80, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_size(80, None, trained=(80, 128))


# Seeds (row 9).


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, np.uint32(7)])
def test_legal_seeds_pass(seed):
    assert check_seed(seed) == seed
    assert type(check_seed(seed)) is int


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "1", None, math.nan])
def test_other_seeds_are_refused(seed):
    assert f"seed is {seed!r}, expected an integer from 0 to 4294967295" in problem(check_seed, seed)


# Config files and overrides (rows 8 and 11).


def test_the_defaults_are_the_released_ones():
    settings = load_settings()
    assert settings.run.search.grid == (2, 2)
    assert (settings.generate.seed, settings.generate.num_frames(settings.run.stream)) == (42, 81)
    assert (settings.rewards.short, settings.rewards.long) == ("default", "default")


def test_overrides_come_after_the_file_and_the_last_one_wins(tmp_path):
    path = config_file(tmp_path, "{'search': {'beams': 3, 'ema_alpha': 0.5}, 'generate': {'seed': 1}}")
    settings = load_settings(path, ["search.beams=4", "search.beams=5", "generate.frames=21"])
    assert (settings.run.search.beams, settings.run.search.ema_alpha) == (5, 0.5)
    assert (settings.generate.seed, settings.generate.frames) == (1, 21)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("search.beams=4", 4),
        (" search.beams = 4 ", 4),
        ("search.ema_alpha=1", 1),
        ("search.noise_fusion_sigma=-1e-1", -0.1),
        ("search.sinking=False", False),
        ("search.sinking=true", True),
        ("search.short_mean_window=none", None),
        ("search.short_mean_window=5", 5),
        ("search.decode=window", "window"),
        ("search.decode='window'", "window"),
        ("stream.denoising_steps=1000,500", (1000, 500)),
        ("stream.denoising_steps=(1000, 500)", (1000, 500)),
        ("stream.denoising_steps=[1000]", (1000,)),
        ("generate.seconds=2.5", 2.5),
        ("rewards.short=my_rewards:Sharp", "my_rewards:Sharp"),
    ],
)
def test_values_are_read_by_the_type_of_their_key(text, value):
    settings = load_settings(None, [text])
    section, _, name = text.partition("=")[0].strip().partition(".")
    home = settings if section in ("generate", "rewards") else settings.run
    assert getattr(getattr(home, section), name) == value


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("search.beam", "search.beams"),
        ("beams", "search.beams"),
        ("stream.beams", "search.beams"),
        ("serach.beams", "search.beams"),
        ("generate.sed", "generate.seed"),
        ("search.top_k", "search."),
        ("", ""),
    ],
)
def test_an_unknown_key_is_answered_with_the_closest(key, closest):
    assert f"unknown setting '{key}': the closest is '{closest}" in problem(load_settings, None, [f"{key}=1"])


@pytest.mark.parametrize(
    "body", ["{'search': {'beam': 3}}", "{'beams': 3}", "{'serach': {'beams': 3}}", "{'stream': {'beams': 3}}"]
)
def test_an_unknown_key_of_a_file_is_answered_with_the_closest(tmp_path, body):
    assert "the closest is 'search.beams'" in problem(load_settings, config_file(tmp_path, body))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search.beams=two", "search.beams is 'two', expected an integer: try search.beams=2"),
        ("search.beams=2.5", "search.beams is 2.5, expected an integer"),
        ("search.beams=true", "search.beams is 'true', expected an integer"),
        ("search.beams=none", "search.beams is 'none', expected an integer"),
        ("search.beams=", "search.beams is '', expected an integer"),
        ("search.ema_alpha=big", "search.ema_alpha is 'big', expected a number: try search.ema_alpha=0.999"),
        ("search.sinking=1", "search.sinking is '1', expected true or false: try search.sinking=true"),
        ("search.short_mean_window=x", "expected an integer or none: try search.short_mean_window=none"),
        ("stream.denoising_steps=1000,x", "expected a tuple of int: try stream.denoising_steps=1000,750,500,250"),
        ("generate.seed=x", "generate.seed is 'x', expected an integer: try generate.seed=42"),
        ("search.beams", "--set 'search.beams' has no '=', expected KEY=VALUE"),
    ],
)
def test_a_wrong_type_says_what_is_expected(text, expected):
    assert expected in problem(load_settings, None, [text])


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("'beams': 2.0", "search.beams is 2.0, expected an integer"),
        ("'beams': True", "search.beams is True, expected an integer"),
        ("'beams': '2'", "search.beams is '2', expected an integer"),
        ("'pruning': 1", "search.pruning is 1, expected true or false"),
        ("'decode': None", "search.decode is None, expected a text"),
        ("'ema_alpha': {'a': 1}", "search.ema_alpha is {'a': 1}, expected a number"),
    ],
)
def test_a_wrong_type_in_a_file_says_what_is_expected(tmp_path, entry, expected):
    assert expected in problem(load_settings, config_file(tmp_path, f"{{'search': {{{entry}}}}}"))


def test_a_list_in_a_file_is_a_fine_tuple(tmp_path):
    path = config_file(tmp_path, "{'stream': {'denoising_steps': [1000, 500]}}")
    assert load_settings(path).run.stream.denoising_steps == (1000, 500)


def test_one_error_lists_everything(tmp_path):
    """Row 8, with an unknown key, a wrong type and an illegal length thrown in."""
    path = config_file(tmp_path, "{'search': {'sliding_window_size': 0, 'colour': 1}, 'stream': {'sink_size': 4}}")
    overrides = [
        "search.beams=0",
        "search.candidates_per_beam=0",
        "search.noise_fusion_sigma=1.5",
        "search.short_threshold=nan",
        "search.sinking=maybe",
        "generate.seed=-1",
    ]
    text = problem(load_settings, path, overrides)
    named = ("sliding_window_size", "colour", "sink_size", "beams is 0", "candidates_per_beam", "noise_fusion_sigma")
    for name in (*named, "short_threshold is nan", "sinking", "seed is -1"):
        assert name in text, f"{name} is not in: {text}"


def test_sections_are_checked_against_each_other():
    assert "max_sink_size 3 is below stream.sink_size 6" in problem(
        load_settings, None, ["search.max_sink_size=3", "stream.sink_size=6"]
    )
    assert "max_sink_size 16 is not a whole number of chunks" in problem(
        load_settings, None, ["search.max_sink_size=16"]
    )
    assert "the nearest are 81 and 93" in problem(load_settings, None, ["generate.frames=82"])
    assert "exactly one" in problem(load_settings, None, ["generate.frames=81", "generate.seconds=5"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
        ("x = 1", "has no get_config()"),
        ("def get_config():\n    return {}", "get_config() gives dict"),
        ("get_config = 3", "TypeError"),
    ],
)
def test_a_broken_config_file_is_bad_input(tmp_path, text, expected):
    path = tmp_path / "config.py"
    path.write_text(text)
    message = problem(load_settings, path)
    assert expected in message
    assert "configs/stream_t1.py" in message


def test_a_missing_config_file_is_bad_input(tmp_path):
    assert "is not a file" in problem(load_settings, tmp_path / "none.py")


@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind not in (str, str | None)])
def test_every_key_can_describe_what_it_wants(key):
    assert f"{key} is '?', expected " in problem(load_settings, None, [f"{key}=?"])
