"""The checks of the little world: its own videos pass; what is wrong with a video, the check meant for it sees."""

import dataclasses

import numpy as np
import pytest
import worlds

from streamt1_jax.errors import BadInputError
from streamt1_jax.mini.checks import Checks, check_video
from streamt1_jax.mini.world import Scene, Thing, held_out_scenes, parse_caption

NAMES = [field.name for field in dataclasses.fields(Checks)]
SCENES = {
    "moves": "a red circle moves right and a blue square moves up quickly on a striped background",
    "bounces": "a small cyan star bounces and a large purple ring moves left slowly",
    "spins": "a green triangle spins and a small orange cross bounces slowly on a gray background",
    "grows": "a yellow ring grows and shrinks and a white cross spins on a checkered background",
    "stands": "a white square stands still and a small red triangle spins on a brown background",
}
PASSING = parse_caption("a large red square stands still and a small blue circle moves right")
STILL = "a large red square stands still and a small blue circle stands still"


def scene_of(name: str) -> Scene:
    return parse_caption(SCENES[name])


def values(checks: Checks) -> np.ndarray:
    return np.array(dataclasses.astuple(checks))


@pytest.mark.parametrize("frames", [81, pytest.param(477, marks=pytest.mark.slow)])
def test_the_worlds_own_videos_are_near_perfect(frames):
    scenes = held_out_scenes(64 if frames == 81 else 12)
    rows = np.stack([values(check_video(worlds.film(s, i, frames), s)) for i, s in enumerate(scenes)])
    worst = min(zip(rows.mean(axis=1), (s.caption() for s in scenes), strict=True))
    assert rows.mean() > 0.98, dict(zip(NAMES, rows.mean(axis=0).round(3), strict=True))
    assert (rows.mean(axis=0) > 0.95).all(), dict(zip(NAMES, rows.mean(axis=0).round(3), strict=True))
    assert worst[0] > 0.75, worst


def test_a_video_far_from_its_beginning_passes_too():
    scene = scene_of("spins")
    assert check_video(worlds.film(scene, 3, start=100_000), scene).mean > 0.95


# What is wrong, the check that must fall, how far at least, and the scenes in which it can be seen.
CORRUPTIONS = [
    (worlds.wrong_colour, "colour", 0.45, SCENES),
    (worlds.wrong_shape, "shape", 0.4, SCENES),
    (worlds.wrong_size, "size", 0.4, SCENES),
    (worlds.missing, "number", 0.4, SCENES),
    (worlds.extra, "number", 0.3, SCENES),
    (worlds.extra_of_its_own_colour, "number", 0.3, SCENES),
    (worlds.reversed_in_time, "direction", 0.45, ["moves", "spins"]),
    (worlds.twice_as_fast, "speed", 0.45, SCENES),
    (worlds.frozen, "direction", 0.45, SCENES),
    (worlds.frozen, "speed", 0.45, SCENES),
    (worlds.noise, "colour", 0.95, SCENES),
    (worlds.noise, "background", 0.95, SCENES),
    (worlds.blurred, "sharpness", 0.3, SCENES),
    (worlds.drifting_in_colour, "colour_kept", 0.4, SCENES),
    (worlds.shrinking, "size_kept", 0.4, SCENES),
    (worlds.flickering, "steadiness", 0.9, SCENES),
    (worlds.wrong_background, "background", 0.95, SCENES),
]


@pytest.mark.parametrize(("corrupt", "check", "fall", "names"), CORRUPTIONS, ids=lambda x: getattr(x, "__name__", None))
def test_a_corruption_lowers_the_check_that_is_meant_for_it(corrupt, check, fall, names):
    for name in names:
        scene = scene_of(name)
        good, bad = check_video(worlds.film(scene), scene), check_video(corrupt(scene), scene)
        assert getattr(good, check) - getattr(bad, check) >= fall, (name, good, bad)
        assert bad.mean < good.mean - 0.03, (name, good, bad)


@pytest.mark.parametrize("name", SCENES)
def test_a_mild_blur_costs_little(name):
    scene = scene_of(name)
    good, mild, strong = (
        check_video(made(scene), scene) for made in (worlds.film, worlds.slightly_blurred, worlds.blurred)
    )
    assert good.mean - mild.mean < 0.06, (good, mild)
    assert mild.mean > strong.mean


@pytest.mark.parametrize("corrupt", [worlds.wrong_colour, worlds.wrong_shape, worlds.reversed_in_time])
def test_other_checks_stay(corrupt):
    scene = scene_of("moves")
    good, bad = check_video(worlds.film(scene), scene), check_video(corrupt(scene), scene)
    for name in ("number", "steadiness", "background", "sharpness"):
        assert getattr(bad, name) > getattr(good, name) - 0.1, (name, bad)


def test_a_thing_that_crosses_the_border_goes_on():
    scene = parse_caption("a large red square moves left quickly")
    checks = check_video(worlds.film(scene), scene)
    assert min(values(checks)) > 0.95, checks


def test_a_thing_behind_the_other_is_excused():
    checks = check_video(passing_behind(), PASSING)
    assert min(values(checks)) > 0.9, checks


def passing_behind() -> np.ndarray:
    """A small blue circle goes behind a large red square, and comes out again some 20 frames later."""
    placed = worlds.world.place(PASSING, worlds.world.draw_openings(0))
    return worlds.film_placed(placed._replace(start=np.float32([[64, 40], [20, 40]])), 81)


def without_blue(video: np.ndarray, frames: slice) -> np.ndarray:
    """Blue becomes the black background in these frames."""
    made = video.copy()
    part = made[frames].astype(int)
    made[frames] = np.where((part[..., 2:] - part[..., :1]) > 20, 12, part)
    return made


def test_a_thing_that_the_other_swallows_is_missed():
    video = passing_behind()
    blue = (video[..., 2].astype(int) - video[..., 0] > 100).sum(axis=(1, 2))
    first_away = int(np.argmax(blue < 20))
    assert 0 < first_away < 40
    good, gone, late = (
        check_video(made, PASSING)
        for made in (
            video,
            without_blue(video, slice(first_away, None)),  # never comes out again
            without_blue(video, slice(0, first_away + 5)),  # is not there at first
        )
    )
    for bad in (gone, late):
        for name in ("colour", "number", "shape", "size"):
            assert getattr(bad, name) < getattr(good, name) - 0.1, (name, bad)
    assert gone.colour_kept < 0.6, gone


def test_a_thing_that_vanishes_beside_the_other_is_missed():
    """Nothing hides what is larger than the other, or what neither of them moves over."""
    for caption in ("a small red circle moves right and a large blue square stands still", STILL):
        scene = parse_caption(caption)
        placed = worlds.world.place(scene, worlds.world.draw_openings(0))
        video = worlds.film_placed(placed._replace(start=np.float32([[64, 40], [64 + 26, 40]])), 81)
        bad = check_video(without_blue(video, slice(20, None)), scene)
        assert bad.number < 0.7, (caption, bad)


def test_every_check_stays_within_0_and_1():
    rng = np.random.default_rng(0)
    scene = scene_of("spins")
    for frames in (5, 9):
        for video in (rng.integers(0, 256, (frames, 80, 128, 3), np.uint8), worlds.film(scene)[:frames]):
            found = values(check_video(video, scene))
            assert ((found >= 0) & (found <= 1)).all(), found
    for colour in (0, 255):
        found = values(check_video(np.full((9, 80, 128, 3), colour, np.uint8), scene))
        assert ((found >= 0) & (found <= 1)).all(), found


@pytest.mark.parametrize("shape", [(81, 64, 128, 3), (4, 80, 128, 3)])
def test_videos_of_another_size_are_refused(shape):
    with pytest.raises(BadInputError, match="expected"):
        check_video(np.zeros(shape, np.uint8), scene_of("moves"))


def test_two_things_of_one_colour_are_refused():
    thing = Thing("red", "circle", "spins")
    with pytest.raises(BadInputError, match="both things are red"):
        check_video(np.zeros((9, 80, 128, 3), np.uint8), Scene((thing, thing)))
