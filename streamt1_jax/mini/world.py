"""A little world of moving shapes: what the embedded model is trained on, and what its captions mean.

- A `Scene` is what a caption says, in words; `place` adds what it leaves open (where things start); `render` gives
  the pixels of any frame, so a video has no end and any part of it can be made alone.
- Once placed, nothing is random: a later frame follows from an earlier one, and what a viewer may demand of a video
  of the world (`checks.py`) is exact.
- The world is a torus: what leaves on the right comes back on the left, so that "moves right" is true for ever.

>>> scene = random_scene(seed=7)
>>> scene.caption()                                                   # a sentence of the grammar
>>> video = render(place(scene, draw_openings(seed=7)), jnp.arange(81))              # [81, 80, 128, 3] in [-1, 1]
"""

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from streamt1_jax.errors import BadInputError
from streamt1_jax.mini.shapes import SIGNED_DISTANCES
from streamt1_jax.types import Frames, HostOrDevice

HEIGHT, WIDTH = 80, 128  # pixels
FRAME_RATE = 16  # frames per second

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 60),
    "green": (50, 190, 80),
    "cyan": (70, 215, 225),
    "blue": (50, 85, 235),
    "purple": (160, 60, 210),
    "white": (240, 240, 240),
}
SHAPES = tuple(SIGNED_DISTANCES)
SIZES = {"small": 9.0, "": 13.0, "large": 18.0}  # radius in pixels; an object without a size word is between the two
SPEEDS = {"slowly": 0.8, "": 1.6, "quickly": 3.2}  # pixels per frame
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y) of the picture, y downwards
BACKGROUNDS = ("black", "gray", "brown", "striped", "checkered")  # a caption without one means black
# Muted: none is as bright or as colourful as a thing. The last two are those of stripes and checkers.
MUTED = {"black": (12,) * 3, "gray": (105,) * 3, "brown": (92, 66, 44), "dark": (40,) * 3, "light": (80,) * 3}

SPIN = 2 * math.pi / 48  # radians per frame, clockwise: a turn in three seconds
GROWTH = 0.35  # the radius changes by this share, up and down
GROWTH_PERIOD = 64  # frames
EDGE = 16  # pixels; no centre starts closer to the border
LAST_FRAME = 2000  # clips for training start anywhere before it
CAPTIONS_SEED = 1_000_000  # of the held-out captions that are taken where no other is named


@dataclass(frozen=True)
class Thing:
    """One object in words. `motion` is "moves right" and the like, "bounces", "spins", "grows and shrinks" or
    "stands still"; `speed` belongs to moving and bouncing, and is "" for the rest."""

    colour: str
    shape: str
    motion: str
    size: str = ""
    speed: str = ""

    def __post_init__(self):
        known = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "size": SIZES, "speed": SPEEDS}
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise BadInputError(f"{key} is {getattr(self, key)!r}, expected one of {', '.join(map(repr, values))}")
        if self.speed and self.motion not in (*MOVES, "bounces"):
            raise BadInputError(
                f"speed is {self.speed!r} for what {self.motion}, expected none: only what moves or bounces has one"
            )

    def caption(self) -> str:
        noun = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        article = "an" if noun[0] in "aeiou" else "a"
        return " ".join(word for word in (article, noun, self.motion, self.speed) if word)


MOVES = tuple(f"moves {direction}" for direction in DIRECTIONS)
MOTIONS = (*MOVES, "bounces", "spins", "grows and shrinks", "stands still")


@dataclass(frozen=True)
class Scene:
    """One or two things, the first in front of the second, on a background."""

    things: tuple[Thing, ...]
    background: str = "black"

    def __post_init__(self):
        if not 1 <= len(self.things) <= 2:
            raise BadInputError(f"a scene has {len(self.things)} things, expected one or two")
        if self.background not in BACKGROUNDS:
            raise BadInputError(f"background is {self.background!r}, expected one of {', '.join(BACKGROUNDS)}")

    def caption(self) -> str:
        """The one sentence of the grammar that says this scene."""
        return "".join(self.clauses())

    def clauses(self) -> tuple[str, str, str]:
        """The caption in parts: of the first thing, of the second, of the background; the last two may be empty."""
        first, *second = (thing.caption() for thing in self.things)
        behind = "" if self.background == "black" else f" on a {self.background} background"
        return first, "".join(f" and {caption}" for caption in second), behind


def random_scene(seed: int) -> Scene:
    """A scene of the grammar; two things have different colours."""
    rng = random.Random(seed)
    colours = rng.sample(list(COLOURS), rng.choice((1, 2)))
    things = tuple(_random_thing(rng, colour) for colour in colours)
    return Scene(things, rng.choice(("black", "black", *BACKGROUNDS)))


def _random_thing(rng: random.Random, colour: str) -> Thing:
    motion = rng.choice((*MOVES, *MOTIONS))
    # A turning circle or ring cannot be told from one at rest.
    shape = rng.choice([shape for shape in SHAPES if motion != "spins" or shape not in ("circle", "ring")])
    speed = rng.choice(list(SPEEDS)) if motion in MOVES or motion == "bounces" else ""
    return Thing(colour, shape, motion, rng.choice(list(SIZES)), speed)


def other_looks(scene: Scene, seed: int) -> Scene:
    """The same places and motions before the same background, by things of which at least one looks otherwise.

    Colour, shape and size are each drawn anew or kept. What bounces keeps its size, on which its path depends. Two
    things have different colours, and the scene is not held out.
    """
    rng = random.Random(f"looks {seed}")  # not the numbers that the scene of this seed was drawn with
    words = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}

    def redrawn(thing: Thing) -> Thing:
        changed = {key: rng.choice(known) for key, known in words.items() if rng.random() < 0.5}
        return dataclasses.replace(thing, **changed | ({"size": thing.size} if thing.motion == "bounces" else {}))

    while True:
        other = dataclasses.replace(scene, things=tuple(redrawn(thing) for thing in scene.things))
        colours = {thing.colour for thing in other.things}
        if other != scene and len(colours) == len(other.things) and not is_held_out(other):
            return other


def parse_caption(caption: str) -> Scene:
    """The scene that a sentence of the grammar says; the inverse of `Scene.caption`.

    Raises:
        BadInputError: not a sentence of the grammar.
    """
    text, _, backdrop = caption.strip().lower().removesuffix(".").partition(" on a ")
    return Scene(
        tuple(_parse_thing(part, caption) for part in _split_things(text)),
        backdrop.removesuffix(" background") or "black",
    )


def _split_things(text: str) -> list[str]:
    # "grows and shrinks" has an "and" of its own.
    return [part.replace("&", "and") for part in text.replace("grows and", "grows &").split(" and ")]


def _parse_thing(text: str, caption: str) -> Thing:
    words = text.split()
    words = words[1:] if words and words[0] in ("a", "an", "the") else words
    size = words.pop(0) if words and words[0] in SIZES else ""
    if len(words) < 3:
        raise BadInputError(
            f"{caption!r} is not a sentence of the little world, expected one such as {_EXAMPLE.caption()!r}"
        )
    speed = words.pop() if words[-1] in SPEEDS else ""
    colour, shape, *motion = words
    return Thing(colour, shape, " ".join(motion), size, speed)


_EXAMPLE = Scene((Thing("red", "circle", "moves right"), Thing("blue", "square", "spins", size="large")), "striped")


class Placed(NamedTuple):
    """A scene as numbers: one row an object; an absent second object has radius 0. Lengths in pixels."""

    shape: Int[HostOrDevice, " n"]  # index into SHAPES
    colour: Float[HostOrDevice, "n 3"]  # in [-1, 1]
    radius: Float[HostOrDevice, " n"]
    growth: Float[HostOrDevice, " n"]  # 0, or GROWTH
    phase: Float[HostOrDevice, " n"]  # of growing, radians
    start: Float[HostOrDevice, "n 2"]  # centre (x, y) in frame 0
    velocity: Float[HostOrDevice, "n 2"]  # (x, y) per frame
    bounces: Float[HostOrDevice, " n"]  # 1: reflected at the border; 0: comes back on the other side
    angle: Float[HostOrDevice, " n"]  # in frame 0, radians clockwise
    spin: Float[HostOrDevice, " n"]  # radians per frame
    background: Int[HostOrDevice, ""]  # index into BACKGROUNDS


OPENINGS = 6  # numbers that a caption leaves open, per thing: x, y, direction in x, in y, angle, phase


def draw_openings(seed: int) -> Float[np.ndarray, "2 6"]:
    """What captions leave open, for two things: normal numbers, so that noise can say them (`train_dit.py`)."""
    return np.random.default_rng(seed).standard_normal((2, OPENINGS))


def place(scene: Scene, openings: Float[np.ndarray, "2 6"]) -> Placed:
    """Where things start, which way they bounce, at what angle and in what phase they begin."""
    rows = [_place_thing(thing, opening) for thing, opening in zip(scene.things, openings, strict=False)]
    rows += [{key: np.zeros_like(value) for key, value in rows[0].items()}] * (2 - len(rows))
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return Placed(**columns, background=np.asarray(BACKGROUNDS.index(scene.background), np.int32))


def _place_thing(thing: Thing, opening: Float[np.ndarray, "6"]) -> dict[str, np.ndarray]:
    x, y, right, down, angle, phase = map(NormalDist().cdf, opening)  # uniform in 0 to 1
    radius = SIZES[thing.size]
    start = np.array([EDGE + x * (WIDTH - 2 * EDGE), EDGE + y * (HEIGHT - 2 * EDGE)])
    speed = SPEEDS[thing.speed]
    velocity = np.zeros(2)
    if thing.motion in MOVES:
        velocity = speed * np.array(DIRECTIONS[thing.motion.removeprefix("moves ")], float)
    elif thing.motion == "bounces":
        velocity = speed * np.sqrt(0.5) * np.where(np.array([right, down]) < 0.5, -1.0, 1.0)
    spins, grows = thing.motion == "spins", thing.motion == "grows and shrinks"
    row = {
        "shape": np.array(SHAPES.index(thing.shape), np.int32),
        "colour": np.array(COLOURS[thing.colour]) / 127.5 - 1,
        "radius": radius,
        "growth": GROWTH * grows,
        "phase": 2 * math.pi * phase * grows,
        "start": start,
        "velocity": velocity,
        "bounces": float(thing.motion == "bounces"),
        "angle": 2 * math.pi * angle * spins,  # what does not turn stands upright
        "spin": SPIN * spins,
    }
    return {key: value if key == "shape" else np.asarray(value, np.float32) for key, value in row.items()}


class Pose(NamedTuple):
    """Where the objects are in one frame."""

    centre: Float[HostOrDevice, "n 2"]
    radius: Float[HostOrDevice, " n"]
    angle: Float[HostOrDevice, " n"]


def pose(placed: Placed, frame: Int[Array, ""]) -> Pose:
    """Where the objects are in a frame of any number: no step depends on the one before."""
    t = frame.astype(jnp.float32)
    size = jnp.array([WIDTH, HEIGHT], jnp.float32)
    radius = placed.radius * (1 + placed.growth * jnp.sin(2 * jnp.pi * t / GROWTH_PERIOD + placed.phase))
    moved = placed.start + placed.velocity * t
    # Between two walls a path is a triangle wave: unfold it, then fold it back.
    low, span = placed.radius[:, None], size - 2 * placed.radius[:, None]
    unfolded = jnp.mod(moved - low, 2 * span)
    reflected = low + span - jnp.abs(unfolded - span)
    centre = jnp.where(placed.bounces[:, None] > 0, reflected, jnp.mod(moved, size))
    return Pose(centre, radius, placed.angle + placed.spin * t)


def render(placed: Placed, frames: Int[HostOrDevice, " T"], *, step: int = 1) -> Frames:
    """The pixels of the given frames, [T, 80, 128, 3] in [-1, 1].

    Args:
        step: a divisor of 8; each pixel stands for `step` x `step` of them, as if they were averaged.
    """
    placed = jax.tree.map(jnp.asarray, placed)
    background = _background(placed.background)[::step, ::step]
    return jax.vmap(lambda frame: _draw(placed, pose(placed, frame), background))(jnp.asarray(frames))


def _draw(placed: Placed, posed: Pose, picture: Float[Array, "H W 3"]) -> Float[Array, "H W 3"]:
    for i in reversed(range(placed.shape.shape[0])):  # the first stands in front
        step = WIDTH // picture.shape[1]
        inside = coverage(placed.shape[i], posed.centre[i], posed.radius[i], posed.angle[i], step)[..., None]
        inside = jnp.where(placed.radius[i] > 0, inside, 0.0)
        picture = picture * (1 - inside) + placed.colour[i] * inside
    return picture


def coverage(
    shape: Int[HostOrDevice, ""],
    centre: Float[HostOrDevice, "2"],
    radius: Float[HostOrDevice, ""],
    angle: Float[HostOrDevice, ""],
    step: int = 1,
) -> Float[Array, "H W"]:
    """How much of each pixel, `step` x `step` large, the object covers, 0 to 1: its edge is one pixel soft."""
    x = jnp.arange(0, WIDTH, step, dtype=jnp.float32) + step / 2 - centre[0]
    y = jnp.arange(0, HEIGHT, step, dtype=jnp.float32)[:, None] + step / 2 - centre[1]
    # The shortest way round the torus.
    x, y = (jnp.mod(d + n / 2, n) - n / 2 for d, n in ((x, WIDTH), (y, HEIGHT)))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    unit = jnp.maximum(radius, 1e-3)
    u, v = (cos * x + sin * y) / unit, (cos * y - sin * x) / unit
    distances = jnp.stack([of_shape(u, v) for of_shape in SIGNED_DISTANCES.values()])
    return jnp.clip(0.5 - distances[shape] * unit / step, 0.0, 1.0)


def _background(index: Int[HostOrDevice, ""]) -> Float[Array, "H W 3"]:
    pictures = np.stack([background_picture(name) for name in BACKGROUNDS])
    return jnp.asarray(pictures / 127.5 - 1, jnp.float32)[index]


def background_picture(name: str) -> Int[np.ndarray, "H W 3"]:
    """A background's pixels, 0 to 255."""
    x, y = np.arange(WIDTH)[None, :, None], np.arange(HEIGHT)[:, None, None]
    black, gray, brown, dark, light = map(np.array, MUTED.values())
    pictures = {
        "black": black + 0 * (x + y),
        "gray": gray + 0 * (x + y),
        "brown": brown + 0 * (x + y),
        "striped": np.where(x // 8 % 2 == 0, dark, light) + 0 * y,
        "checkered": np.where((x // 8 + y // 8) % 2 == 0, dark, light),
    }
    return pictures[name]


def held_out_scenes(count: int, seed: int = CAPTIONS_SEED) -> list[Scene]:
    """Scenes with different captions for checking the model, whose first thing is held out of training.

    More of one seed begin with fewer of it.
    """
    found: dict[str, Scene] = {}
    for scene in (random_scene(s) for s in itertools.count(seed)):
        if _is_held_out(scene.things[0]):
            found.setdefault(scene.caption(), scene)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("the count of seeds has no end")


def is_held_out(scene: Scene) -> bool:
    """Whether a thing of the scene is kept out of training, be it the first or the second."""
    return any(map(_is_held_out, scene.things))


def _is_held_out(thing: Thing) -> bool:
    """Whether this colour and shape, together, are kept out of training in this motion.

    One combination in sixteen or so: every word and every pair of words is seen in training, not every thing.
    """
    key = (list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), MOTIONS.index(thing.motion))
    return (5 * key[0] + 3 * key[1] + 7 * key[2]) % 16 == 0


def training_scene(seed: int) -> Scene:
    """The scene of a seed, or of the next one that is not held out."""
    return next(s for s in (random_scene(n) for n in itertools.count(64 * seed)) if not is_held_out(s))


def stack(placed: list[Placed]) -> Placed:
    """Many placed scenes as one batch: every leaf gets a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *placed)
