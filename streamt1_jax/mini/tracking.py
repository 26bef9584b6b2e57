"""Where the things of a little-world video are, frame by frame, found in its pixels alone. NumPy only.

- A thing is told by its colour: every pixel takes the nearest colour of the world's palette. Muted colours belong to no
  thing, and a soft edge between a thing and its background is muted.
- The world is a torus: centres are circular means, neighbours of the last column are in the first.
- Two things that touch hide parts of each other. Frames in which they do are marked, so that whoever measures can leave
  them out. One may hide the other, for as long as it takes to pass; what stays away longer is gone.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8

from streamt1_jax.mini.shapes import SIGNED_DISTANCES
from streamt1_jax.mini.world import (
    COLOURS,
    DIRECTIONS,
    GROWTH,
    GROWTH_PERIOD,
    HEIGHT,
    MOVES,
    MUTED,
    SHAPES,
    SIZES,
    SPEEDS,
    WIDTH,
    Thing,
)

FAR = 110  # levels in RGB: a colour so far from all of the palette is none of it
VISIBLE = 20  # pixels from which a thing counts as seen
TOUCHING = 3  # pixels of a thing so near the other that they hide each other
UNSEEN = 3  # pixels of a thing that stand out behind the other when it does not count as seen
CELL = 4  # pixels; parts of a thing are counted on a grid as coarse as this

PATCH = 24  # samples a side of the square, around a thing, that its shape is read from
REACH = 1.75  # half that side, in radii of the disc of the same area
FOLDS = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "ring": 0, "cross": 4}  # turns that look the same; 0: all
ANGLES = 8  # tried within one of those

Masks = Bool[np.ndarray, "T H W"]


class Track(NamedTuple):
    """One thing through the T frames of a video. Where it is not visible the numbers mean nothing."""

    mask: Masks
    area: Float[np.ndarray, "T"]  # pixels
    visible: Bool[np.ndarray, "T"]
    clear: Bool[np.ndarray, "T"]  # visible, and not touching the other thing
    hidden: Bool[np.ndarray, "T"]  # not visible, but it may be behind the other: see `_hidden`
    parts: Int[np.ndarray, "T"]  # connected pieces
    centre: Float[np.ndarray, "T 2"]  # (x, y)
    colour: Float[np.ndarray, "T 3"]  # mean of its inner pixels
    likeness: Float[np.ndarray, "T shapes"]  # best intersection over union with each shape of its area, however turned
    spoke: Complex[np.ndarray, "T"]  # its phase is FOLDS times the angle of the thing; 0 for what has no angle


def palette_labels(video: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T H W"]:
    """Of each pixel the index into COLOURS of the nearest colour; len(COLOURS) where that is muted, or far away."""
    fine = (video >> 3).astype(np.uint16)
    return _nearest()[(fine[..., 0] << 10) | (fine[..., 1] << 5) | fine[..., 2]]


@functools.cache
def _nearest() -> UInt8[np.ndarray, "32768"]:
    """The label of every colour, by five bits a channel."""
    levels = np.arange(32) * 8 + 4
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    palette = np.array([*COLOURS.values(), *MUTED.values()])
    distances = ((colours - palette) ** 2).sum(axis=-1)
    labels = np.minimum(distances.argmin(axis=-1), len(COLOURS))
    return np.where(distances.min(axis=-1) < FAR**2, labels, len(COLOURS)).astype(np.uint8)


def box_sum(mask: Bool[np.ndarray, "T H W"], reach: int) -> UInt8[np.ndarray, "T H W"]:
    """How many pixels of the mask lie in the square around each pixel, `reach` to every side, on the torus."""
    total = mask.view(np.uint8)
    for axis in (1, 2):
        total = sum((np.roll(total, shift, axis) for shift in range(-reach, reach + 1)), np.uint8(0) * total)
    return total


def colour_mask(labels: UInt8[np.ndarray, "T H W"], colour: str) -> Masks:
    """The pixels of a colour whose neighbours mostly have it too: no specks, and no lines where two things meet."""
    mask = labels == list(COLOURS).index(colour)
    return mask & (box_sum(mask, 1) >= 5)


def track_things(video: UInt8[np.ndarray, "T H W 3"], masks: list[Masks], things: tuple[Thing, ...]) -> list[Track]:
    """Follows things by the masks of their colours."""
    near = [box_sum(mask, 2) > 0 for mask in masks]
    tracks = []
    for i, (mask, thing) in enumerate(zip(masks, things, strict=True)):
        other = near[1 - i] if len(masks) == 2 else np.zeros_like(mask)
        area, parts = mask.sum(axis=(1, 2)), _count_parts(mask, other)
        visible = (area >= VISIBLE) & (parts > 0)
        touching = (mask & other).sum(axis=(1, 2)) >= TOUCHING
        centre = _circular_centre(mask)
        # The disc of the same area; a thing in many places has no use for a patch larger than the world.
        patches = _patches(mask, centre, np.sqrt(np.maximum(area, VISIBLE) / np.pi))
        track = Track(
            mask=mask,
            area=area.astype(float),
            visible=visible,
            clear=visible & ~touching,
            hidden=_hidden(visible, touching, longest_cover(thing, things[1 - i]) if len(things) == 2 else 0),
            parts=parts,
            centre=centre,
            colour=_inner_colour(video, mask),
            likeness=_likeness(patches),
            spoke=_spoke(patches, FOLDS[thing.shape]),
        )
        tracks.append(track)
    return tracks


def _circular_centre(mask: Masks) -> Float[np.ndarray, "T 2"]:
    centre = []
    for size, sums in ((WIDTH, mask.sum(axis=1)), (HEIGHT, mask.sum(axis=2))):
        turn = 2j * np.pi / size
        centre.append(np.angle(sums @ np.exp(turn * (np.arange(size) + 0.5))) * size / (2 * np.pi) % size)
    return np.stack(centre, axis=1)


def _hidden(visible: Bool[np.ndarray, "T"], touching: Bool[np.ndarray, "T"], longest: int) -> Bool[np.ndarray, "T"]:
    """Where a thing is not visible and may be behind the other.

    That is so where it touched the other when it was last seen, and when it is seen again, if it is; and for no more
    than `longest` frames.
    """
    hidden = np.zeros_like(visible)
    for start, end in np.flatnonzero(np.diff(np.r_[True, visible, True])).reshape(-1, 2):  # a run of frames without it
        sightings = [frame for frame in (start - 1, end) if 0 <= frame < len(visible)]
        if sightings and touching[sightings].all():
            covered = slice(start, min(start + longest, end)) if start > 0 else slice(max(end - longest, 0), end)
            hidden[covered] = True
    return hidden


def longest_cover(thing: Thing, other: Thing) -> int:
    """Frames for which the other thing can hide this one at a time: while it covers all but an edge, or half an
    oscillation; 0 if it is too small for that, or if neither moves against the other nor grows."""
    grows = "grows and shrinks" in (thing.motion, other.motion)
    (least, _), (_, most) = _radii(thing), _radii(other)
    if shape_area(thing.shape) * least**2 - VISIBLE > shape_area(other.shape) * most**2:
        return 0
    speed = _speed_between(thing, other)
    return math.ceil(2 * (max(most - least, 0) + UNSEEN) / speed) if speed > 0 else GROWTH_PERIOD // 2 * grows


def _radii(thing: Thing) -> tuple[float, float]:
    """The least and the largest."""
    change = GROWTH * (thing.motion == "grows and shrinks")
    return SIZES[thing.size] * (1 - change), SIZES[thing.size] * (1 + change)


def _speed_between(*things: Thing) -> float:
    """Pixels a frame; what bounces is taken to go across the other's way."""
    if any(thing.motion == "bounces" for thing in things):
        return math.hypot(*(SPEEDS[thing.speed] * (thing.motion in (*MOVES, "bounces")) for thing in things))
    one, two = (
        SPEEDS[thing.speed] * np.array(DIRECTIONS.get(thing.motion.removeprefix("moves "), (0, 0))) for thing in things
    )
    return float(np.linalg.norm(one - two))


def _count_parts(mask: Masks, other: Masks) -> Int[np.ndarray, "T"]:
    """Connected pieces of at least VISIBLE pixels; what is connected through the other thing is one piece."""
    cells = lambda m: m.reshape(len(m), HEIGHT // CELL, CELL, WIDTH // CELL, CELL).sum(axis=(2, 4))  # noqa: E731
    own = cells(mask)
    inside = (own >= CELL**2 / 4) | (cells(other) > 0)
    numbers = np.where(inside, np.arange(inside.size).reshape(inside.shape) + 1, 0)
    while True:  # every cell takes the largest number next to it, until nothing changes
        spread = numbers
        for axis in (1, 2):
            spread = np.maximum(spread, np.maximum(np.roll(spread, 1, axis), np.roll(spread, -1, axis)))
        spread = np.where(inside, spread, 0)
        if (spread == numbers).all():
            break
        numbers = spread
    sizes = np.bincount(numbers.ravel(), weights=(own * inside).ravel(), minlength=inside.size + 1)[1:]
    return (sizes.reshape(len(mask), -1) >= VISIBLE).sum(axis=1)


def _inner_colour(video: UInt8[np.ndarray, "T H W 3"], mask: Masks) -> Float[np.ndarray, "T 3"]:
    """Mean colour of the pixels with none but their like around them; of all the pixels where there are none such."""
    inner = box_sum(mask, 1) == 9
    chosen = np.where(inner.any(axis=(1, 2), keepdims=True), inner, mask)
    frame, *_ = where = np.nonzero(chosen)
    pixels = video[where]
    counts = np.maximum(np.bincount(frame, minlength=len(mask)), 1)
    return np.stack([np.bincount(frame, pixels[:, c], len(mask)) / counts for c in range(3)], axis=1)


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a patch's samples, [PATCH, PATCH]."""
    steps = (np.arange(PATCH) + 0.5) / PATCH * 2 * REACH - REACH
    x, y = np.meshgrid(steps, steps)
    return x, y


def _patches(mask: Masks, centre: Float[np.ndarray, "T 2"], unit: Float[np.ndarray, "T"]) -> Bool[np.ndarray, "T n"]:
    """The mask around its centre, as large in every frame."""
    x, y = (centre[:, i, None, None] + unit[:, None, None] * axis for i, axis in enumerate(_grid()))
    rows, columns = np.floor(y).astype(int) % HEIGHT, np.floor(x).astype(int) % WIDTH
    return mask[np.arange(len(mask))[:, None, None], rows, columns].reshape(len(mask), -1)


@functools.cache
def shape_area(shape: str) -> float:
    """The area of a shape of radius 1."""
    steps = (np.arange(800) + 0.5) / 400 - 1
    x, y = np.meshgrid(1.2 * steps, 1.2 * steps)
    return float((np.asarray(SIGNED_DISTANCES[shape](x, y)) < 0).mean() * 2.4**2)


@functools.cache
def _templates(shape: str) -> Bool[np.ndarray, "angles n"]:
    """What a patch of the shape looks like, in every distinct way it can be turned."""
    unit = np.sqrt(np.pi / shape_area(shape))  # its radius, where a disc of the same area has radius 1
    x, y = (axis / unit for axis in _grid())
    folds = FOLDS[shape]
    turns = 2 * np.pi / folds * np.arange(ANGLES) / ANGLES if folds else np.zeros(1)
    cos, sin = np.cos(turns)[:, None, None], np.sin(turns)[:, None, None]
    inside = np.asarray(SIGNED_DISTANCES[shape](cos * x + sin * y, cos * y - sin * x)) < 0
    return inside.reshape(len(turns), -1)


def _likeness(patches: Bool[np.ndarray, "T n"]) -> Float[np.ndarray, "T shapes"]:
    columns = []
    for shape in SHAPES:
        templates = _templates(shape)
        both = patches.astype(np.float32) @ templates.T.astype(np.float32)
        either = patches.sum(axis=1)[:, None] + templates.sum(axis=1) - both
        columns.append((both / either).max(axis=1))
    return np.stack(columns, axis=1).astype(float)


def _spoke(patches: Bool[np.ndarray, "T n"], folds: int) -> Complex[np.ndarray, "T"]:
    """The harmonic of the outline that turns `folds` times as fast as the thing."""
    if folds == 0:
        return np.zeros(len(patches), complex)
    x, y = _grid()
    return patches @ ((x + 1j * y) ** folds).ravel()
