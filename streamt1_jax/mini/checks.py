"""Checks of a video of the little world against its caption, that no search ever sees.

- Plain formulas on pixels, by way of `tracking.py`; nothing is learned, and no reward uses any of it.
- Every check is a number from 0 to 1, and 1 is what the world's own videos get. A thing that is not there scores 0 in
  the seven checks of things; steadiness and sharpness say nothing of it.
- A thing is measured where nothing hides it; only where that is hardly ever the case, wherever it is seen.

>>> checks = check_video(video, parse_caption("a red circle moves right"))
>>> checks.colour, checks.mean
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import ArrayLike

from streamt1_jax.errors import BadInputError
from streamt1_jax.mini import world
from streamt1_jax.mini.tracking import (
    FOLDS,
    VISIBLE,
    Masks,
    Track,
    box_sum,
    colour_mask,
    palette_labels,
    shape_area,
    track_things,
)
from streamt1_jax.mini.world import Scene, Thing

MIN_FRAMES = 5
ENOUGH = 8  # frames in which nothing hides a thing
LAG = 4  # frames over which a step is measured
EDGE = 3  # pixels around a thing that may be part of its edge, and are not background
SOFT = 6  # pixels around a thing in which a soft edge lies
ENDS = 32  # frames: the first and the last two seconds


@dataclass(frozen=True)
class Checks:
    """Each is the mean over the things of the caption, but for the last four, which are of the whole video."""

    colour: float
    """Share of frames in which something of the right colour is seen (or hidden by the other thing), less where its
    colour is not quite the palette's: 1 up to 12 levels away, 0 from 60 (of 255, distance in RGB)."""
    shape: float
    """Share of frames in which it looks more like the right shape than like any other, less where it does not look much
    like it: 1 from an intersection over union of 0.75 with the perfect shape, 0 at 0.5."""
    size: float
    """Its radius: 1 within 11 %, 0 from 37 %, which is less than the way to the next size word."""
    direction: float
    """The kind of motion. Moving: mean cosine between each step and the right direction. Bouncing: share of steps that
    go diagonally, times share of frames within the walls. Spinning: share of steps that turn clockwise at least a third
    as fast as they should. Growing and shrinking: share of the radius's variation that one oscillation explains.
    Standing still: nothing turns. All but the first two times how well it stays in place: 0 at 0.8 pixels a frame."""
    speed: float
    """Pixels a frame, turns or oscillations a second: 1 if right, 0 if halved or doubled. Standing still: how well it
    stays in place."""
    colour_kept: float
    """Its colour in the last two seconds against the first two: 0 from 40 levels apart; multiplied by the share of the
    last two seconds in which it is there."""
    size_kept: float
    """Its radius in the last two seconds against the first two: 0 where it grew by 41 % or shrank by 29 %, half an
    octave. For what grows and shrinks: the trend of its radius."""
    number: float
    """The mean over frames of one minus (how many things too few or too many, of whatever colour) / things."""
    steadiness: float
    """Temporal flicker: how far background or things' colours lie from the mean of the frames before and after. 1 up
    to one level (of 255), 0 from ten."""
    sharpness: float
    """Width of the things' edges, from a fifth to four fifths of the step: 1 up to 1.5 pixels, 0 from 4."""
    background: float
    """Mean absolute error of the background: 1 up to 4 levels, 0 from 20, which every wrong background exceeds."""

    @property
    def mean(self) -> float:
        """The plain mean of all checks."""
        return float(np.mean(dataclasses.astuple(self)))


def check_video(video: UInt8[np.ndarray, "T H W 3"], scene: Scene) -> Checks:
    """Checks a video at 16 frames a second against the scene that its caption says.

    Args:
        video: 80 x 128 pixels, at least five frames.
        scene: of `parse_caption`; its things have different colours, by which they are told apart.

    Raises:
        BadInputError: a video of another size, or two things of one colour.
    """
    if video.shape[1:] != (world.HEIGHT, world.WIDTH, 3) or len(video) < MIN_FRAMES:
        raise BadInputError(
            f"the video is {video.shape}, expected [T, {world.HEIGHT}, {world.WIDTH}, 3] with T >= {MIN_FRAMES}; "
            "only videos of the embedded model can be checked"
        )
    colours = [thing.colour for thing in scene.things]
    if len(set(colours)) < len(colours):
        raise BadInputError(
            f"both things are {colours[0]} in {scene.caption()!r}, expected two colours, to tell them by; change one"
        )
    labels = palette_labels(video)
    masks = [colour_mask(labels, colour) for colour in colours]
    tracks = track_things(video, masks, scene.things)
    picture = world.background_picture(scene.background)
    of_things = [_check_thing(track, thing) for track, thing in zip(tracks, scene.things, strict=True)]
    behind = ~(box_sum(labels < len(world.COLOURS), EDGE) > 0)
    return Checks(
        *(float(value) for value in np.mean(of_things, axis=0)),
        number=_number(labels, colours, tracks),
        steadiness=_steadiness(video, behind, tracks),
        sharpness=_sharpness(video, picture, tracks),
        background=_background(video, picture, behind),
    )


def _fall(value: ArrayLike, full: float, none: float) -> np.ndarray:
    """1 where the value is at most `full`, 0 from `none` on, a straight line between them."""
    return np.asarray(np.clip((none - np.asarray(value, float)) / (none - full), 0.0, 1.0))


def _octaves(value: float, right: float) -> float:
    """How many times too large or too small, as a power of two."""
    return float(abs(np.log2(max(value, 1e-6) / right)))


def _check_thing(track: Track, thing: Thing) -> tuple[float, ...]:
    """The first seven checks, for one thing."""
    seen = track.visible | track.hidden
    judged = track.clear if track.clear.sum() >= min(ENOUGH, len(seen)) else track.visible
    if not judged.any():
        return (0.0,) * 7
    distance = np.linalg.norm(track.colour - world.COLOURS[thing.colour], axis=1)
    right = track.likeness[:, world.SHAPES.index(thing.shape)]
    is_right = right == track.likeness.max(axis=1)
    radius = np.sqrt(track.area / shape_area(thing.shape))
    present = seen.mean()
    direction, speed = _motion(track, thing, radius, judged)
    return (
        present * _fall(distance[judged], 12, 60).mean(),
        present * (is_right * _fall(-right, -0.75, -0.5))[judged].mean(),
        present * float(_fall(_octaves(_typical(radius[judged]), world.SIZES[thing.size]), 0.15, 0.45)),
        present * direction,
        present * speed,
        *_kept(track, thing, radius, judged),
    )


def _typical(radius: Float[np.ndarray, "n"]) -> float:
    """The radius that an oscillating one oscillates about; of any other, something like the median."""
    return float((np.quantile(radius, 0.05) + np.quantile(radius, 0.95)) / 2)


def _steps(centre: Float[np.ndarray, "T 2"], judged: Bool[np.ndarray, "T"]) -> Float[np.ndarray, "n 2"]:
    """How far the thing went, per frame, over LAG frames; by the shortest way on the torus."""
    size = np.array([world.WIDTH, world.HEIGHT])
    moved = (centre[LAG:] - centre[:-LAG] + size / 2) % size - size / 2
    return (moved / LAG)[judged[LAG:] & judged[:-LAG]]


def _motion(
    track: Track, thing: Thing, radius: Float[np.ndarray, "T"], judged: Bool[np.ndarray, "T"]
) -> tuple[float, float]:
    """(direction, speed)."""
    steps = _steps(track.centre, judged)
    if len(steps) == 0:
        return 0.0, 0.0
    lengths = np.maximum(np.linalg.norm(steps, axis=1), 1e-6)
    moving = lengths > 0.25 * world.SPEEDS["slowly"]
    in_place = float(_fall(np.median(lengths), 0.1, 0.8))
    if thing.motion in world.MOVES:
        towards = np.array(world.DIRECTIONS[thing.motion.removeprefix("moves ")])
        cosine = np.clip(steps @ towards / lengths, 0, 1) * moving
        pace = float(np.linalg.norm(np.median(steps, axis=0)))
        return float(cosine.mean()), float(_fall(_octaves(pace, world.SPEEDS[thing.speed]), 0, 1))
    if thing.motion == "bounces":
        return _bouncing(track, thing, steps, judged)
    turning = _turning(track, thing, judged)
    if thing.motion == "grows and shrinks":
        explained, period = _oscillation(radius, judged)
        return in_place * explained, float(_fall(_octaves(period, world.GROWTH_PERIOD), 0, 1))
    if thing.motion == "spins" and turning is not None:
        right_way = float((turning > world.SPIN / 3).mean())
        return in_place * right_way, float(_fall(_octaves(np.median(turning), world.SPIN), 0, 1))
    still = 1.0 if turning is None else float(_fall(abs(np.median(turning)), world.SPIN / 10, world.SPIN))
    return in_place * (still if thing.motion == "stands still" else 1.0), in_place


def _bouncing(
    track: Track, thing: Thing, steps: Float[np.ndarray, "n 2"], judged: Bool[np.ndarray, "T"]
) -> tuple[float, float]:
    each = np.abs(steps)
    speed = float(np.linalg.norm(np.median(each, axis=0)))
    # A step with a wall in it is shorter in one direction: only the others can be diagonal.
    margin = world.SIZES[thing.size] + (LAG + 1) * max(speed, world.SPEEDS[thing.speed])
    pairs = judged[LAG:] & judged[:-LAG]
    free = _within(track, margin)
    free_steps = each[(free[LAG:] & free[:-LAG])[pairs]]
    chosen = free_steps if len(free_steps) else np.median(each, axis=0, keepdims=True)
    lengths = np.maximum(np.linalg.norm(chosen, axis=1), 1e-6)
    diagonal = (chosen.sum(axis=1) / lengths > np.sqrt(2) * np.cos(np.deg2rad(20))) & (lengths > 0.2)
    walls = 0.75 * world.SIZES[thing.size]
    inside = _within(track, walls)[judged].mean()
    return float(diagonal.mean() * inside), float(_fall(_octaves(speed, world.SPEEDS[thing.speed]), 0, 1))


def _within(track: Track, margin: float) -> Bool[np.ndarray, "T"]:
    """Where the centre is farther than `margin` from every border."""
    far = np.minimum(track.centre, np.array([world.WIDTH, world.HEIGHT]) - track.centre) > margin
    return np.all(far, axis=1)


def _turning(track: Track, thing: Thing, judged: Bool[np.ndarray, "T"]) -> np.ndarray | None:
    """Radians a frame, clockwise; None for what looks the same however turned.

    Over two frames: at twice the right rate a star's spokes have not yet half the way to one another behind them.
    """
    folds = FOLDS[thing.shape]
    pairs = judged[2:] & judged[:-2]
    if folds == 0 or not pairs.any():
        return None
    return np.angle(track.spoke[2:] * track.spoke[:-2].conj())[pairs] / (2 * folds)


def _oscillation(radius: Float[np.ndarray, "T"], judged: Bool[np.ndarray, "T"]) -> tuple[float, float]:
    """(share of the radius's variance that the best sine explains, its period in frames).

    A sine of less than a third of the right amplitude explains less, in proportion.
    """
    t, r = np.flatnonzero(judged), radius[judged]
    best = (0.0, float("inf"))
    for period in world.GROWTH_PERIOD * 2.0 ** np.arange(-2, 1.01, 1 / 8):
        turn = 2 * np.pi * t / period
        basis = np.stack([np.ones_like(turn), np.cos(turn), np.sin(turn)], axis=1)
        found, *_ = np.linalg.lstsq(basis, r, rcond=None)
        explained = 1 - np.var(r - basis @ found) / max(np.var(r), 1e-6)
        amplitude = np.hypot(*found[1:]) / max(found[0], 1e-6)
        best = max(best, (float(explained * np.clip(3 * amplitude / world.GROWTH, 0, 1)), float(period)))
    return best


def _kept(
    track: Track, thing: Thing, radius: Float[np.ndarray, "T"], judged: Bool[np.ndarray, "T"]
) -> tuple[float, float]:
    """(colour_kept, size_kept)."""
    t = np.flatnonzero(judged)
    ends = max(1, min(ENDS, len(t) // 3))
    first, last = t[:ends], t[-ends:]
    there = float((track.visible | track.hidden)[-ENDS:].mean())
    change = np.linalg.norm(track.colour[last].mean(axis=0) - track.colour[first].mean(axis=0))
    if thing.motion == "grows and shrinks":
        turn = 2 * np.pi * t / world.GROWTH_PERIOD
        basis = np.stack([np.ones(len(t)), t / len(judged) - 0.5, np.cos(turn), np.sin(turn)], axis=1)
        (mean, trend, *_), *_ = np.linalg.lstsq(basis, radius[t], rcond=None)
        before, after = mean - trend / 2, mean + trend / 2
    else:
        before, after = np.median(radius[first]), np.median(radius[last])
    return there * float(_fall(change, 3, 40)), there * float(_fall(_octaves(after, max(before, 1e-6)), 0.05, 0.5))


def _number(labels: UInt8[np.ndarray, "T H W"], colours: list[str], tracks: list[Track]) -> float:
    surplus = np.zeros(len(labels))
    for track in tracks:
        surplus += np.maximum(track.parts - 1, 0) - 1.0 * ~(track.visible | track.hidden)
    present = np.bincount(labels.ravel(), minlength=len(world.COLOURS) + 1)
    for index, colour in enumerate(world.COLOURS):
        if colour not in colours and present[index] >= VISIBLE:
            # A blurred line between two things can have a third colour; a thing has a core.
            mask = colour_mask(labels, colour)
            surplus += (box_sum(mask, 2) == 25).sum(axis=(1, 2)) >= 4
    return float(np.maximum(1 - np.abs(surplus) / len(colours), 0).mean())


def _steadiness(video: UInt8[np.ndarray, "T H W 3"], behind: Masks, tracks: list[Track]) -> float:
    """The worse of background and things."""
    x = video.astype(np.int16)
    still = behind[1:-1] & behind[:-2] & behind[2:]
    jumps = [np.abs(2 * x[1:-1] - x[:-2] - x[2:])[still].mean() / 2 if still.any() else 0.0]
    for track in tracks:
        three = track.visible[1:-1] & track.visible[:-2] & track.visible[2:]
        bend = np.abs(track.colour[1:-1] - (track.colour[:-2] + track.colour[2:]) / 2)
        jumps.append(bend[three].mean() if three.any() else 0.0)
    return float(_fall(max(jumps), 1, 10))


def _sharpness(video: UInt8[np.ndarray, "T H W 3"], picture: np.ndarray, tracks: list[Track]) -> float:
    """By the number of pixels on the way from a thing's colour to the background's, per pixel of its outline."""
    width = []
    for track in tracks:
        frames = track.clear if track.clear.any() else track.visible
        mask = track.mask[frames]
        outline = (mask & (box_sum(mask, 1) < 9)).sum()
        if outline == 0:
            continue
        where = np.nonzero(box_sum(mask, SOFT) > 0)
        behind = picture[where[1:]].astype(np.float32)
        contrast = track.colour[frames].astype(np.float32)[where[0]] - behind
        offset = video[frames][where] - behind
        share = (offset * contrast).sum(axis=1) / np.maximum((contrast**2).sum(axis=1), 1)
        width.append(((share > 0.2) & (share < 0.8)).sum() / outline)
    return float(_fall(np.mean(width), 1.5, 4)) if width else 0.0


def _background(video: UInt8[np.ndarray, "T H W 3"], picture: np.ndarray, behind: Masks) -> float:
    if not behind.any():
        return 0.0
    error = np.abs(video.astype(np.int16) - picture.astype(np.int16)).mean(axis=-1)
    return float(_fall(error[behind].mean(), 4, 20))
