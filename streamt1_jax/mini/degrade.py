"""Good videos of a caption and degraded ones, as the rewards are trained on them.

Nearly everything that goes wrong with a generated video is a mixture: of the right video with one of another scene,
another placement or another course of time, by shares that may change from frame to frame.

    wrong colour, shape, size, number, background, motion    mixed in by a share of 1, or less: half a wrong colour
    double exposure, which is what an unsure model makes     the same scene placed elsewhere, by a share below a half
    fading, changing, jumping on the way; flicker            shares that rise, step or jump in time
    frozen, backwards, too fast                              the same scene at other times

The rest is done to pixels (`Harm`). Every group has a little of that in all its videos, the good one too, so that a
reward does not take its own world's perfect pixels for the point.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from streamt1_jax.mini import world
from streamt1_jax.mini.world import BACKGROUNDS, COLOURS, MOTIONS, MOVES, SHAPES, SIZES, SPEEDS, Scene, Thing
from streamt1_jax.types import HostOrDevice

SAME_SCENE = ("elsewhere", "absent")  # mixed in from the same caption
WRONG_WORD = ("colour", "shape", "size", "number", "swap", "background")
IN_TIME = ("motion", "rate", "frozen", "change", "jump", "flicker")
HARMS = ("blur", "noise", "blobs", "hole", "warp", "cast", "blink")
# What stands twice is drawn twice as often.
SHORT_KINDS = (*SAME_SCENE, *SAME_SCENE, *WRONG_WORD, *HARMS[:-1])
LONG_KINDS = (*SAME_SCENE, *WRONG_WORD, *IN_TIME, *IN_TIME, "blur", "noise", "warp", "blink")


class Harm(NamedTuple):
    """What is done to the pixels of a video; nothing, if all is 0."""

    blur: Float[HostOrDevice, ""]  # standard deviation, pixels
    noise: Float[HostOrDevice, ""]  # standard deviation; colours are in [-1, 1]
    blobs: Float[HostOrDevice, ""]  # opacity of three soft spots of any colour
    hole: Float[HostOrDevice, ""]  # opacity of a flat rectangle
    warp: Float[HostOrDevice, ""]  # pixels by which outlines are bent, differently in every frame
    cast: Float[HostOrDevice, ""]  # a tint, the same for all frames
    blink: Float[HostOrDevice, ""]  # standard deviation of the brightness from frame to frame


def _harm(**levels: Any) -> Harm:
    """With numbers for arrays, and 0 for what is not said."""
    values: dict[str, Any] = dict.fromkeys(Harm._fields, 0.0) | levels
    return Harm(**values)


FULL_HARM = _harm(blur=3.0, noise=0.3, blobs=1.0, hole=1.0, warp=3.0, cast=0.4, blink=0.15)
NUISANCE = _harm(blur=0.8, noise=0.03, warp=0.5, cast=0.06, blink=0.01)


class Mixture(NamedTuple):
    """How a bad video of k frames is made of the good one."""

    mixed: world.Placed  # what is mixed in; the good one itself where only time or pixels are wrong
    frames: Int[HostOrDevice, " k"]  # of `mixed`
    share: Float[HostOrDevice, " k"]  # of `mixed`
    harm: Harm  # done to the pixels


class Group(NamedTuple):
    """One good video and m bad ones of one caption, k frames each, to be rendered. NumPy arrays."""

    good: world.Placed
    frames: Int[HostOrDevice, " k"]
    mixed: world.Placed  # [m]: what is mixed into the bad ones,
    mixed_frames: Int[HostOrDevice, "m k"]  # at which frames,
    share: Float[HostOrDevice, "m k"]  # and how much of it
    nuisance: Harm  # of all
    harm: Harm  # [m]: of the bad ones, on top of that
    kind: Int[HostOrDevice, " m"]  # index into SHORT_KINDS or LONG_KINDS


class Window(NamedTuple):
    """What a reward looks at in a video."""

    frames: Int[np.ndarray, " k"]  # counted from the first
    pairs: Bool[np.ndarray, " t"]  # which pairs of neighbours among them count; of a single frame: whether it does

    @property
    def counted(self) -> int:
        """Frames before the last one that counts, and that one."""
        return min(int(np.flatnonzero(self.pairs)[-1]) + 2, len(self.frames))


def draw_group(scene: Scene, seed: int, kinds: tuple[str, ...], window: Window, *, bad: int) -> Group:
    """A group of a scene, degraded in `bad` of the given ways; what changes on the way does so where it counts."""
    rng = np.random.default_rng((seed, 7))
    openings = rng.standard_normal((2, world.OPENINGS))
    start = int(rng.integers(world.LAST_FRAME))
    times = start + window.frames
    wanted = list(rng.permutation(len(kinds)))
    made: dict[int, Mixture] = {}
    while len(made) < bad:
        index = int(wanted.pop())
        mixture = _degrade(scene, openings, times, window, kinds[index], rng)
        if mixture is not None:
            made[index] = mixture
    mixtures = list(made.values())
    arrays: dict[str, Any] = {
        "frames": times.astype(np.int32),
        "mixed_frames": np.stack([mixture.frames for mixture in mixtures]).astype(np.int32),
        "share": np.stack([mixture.share for mixture in mixtures]).astype(np.float32),
        "harm": jax.tree.map(lambda *levels: np.array(levels, np.float32), *(mixture.harm for mixture in mixtures)),
        "kind": np.array(list(made), np.int32),
    }
    mixed = world.stack([mixture.mixed for mixture in mixtures])
    nuisance = _harm(**{key: np.float32(full * rng.random() ** 2) for key, full in NUISANCE._asdict().items()})
    return Group(good=world.place(scene, openings), mixed=mixed, nuisance=nuisance, **arrays)


def _degrade(
    scene: Scene, openings: np.ndarray, times: np.ndarray, window: Window, kind: str, rng: np.random.Generator
) -> Mixture | None:
    """One bad video; None where this scene cannot be degraded like that."""
    good, count = world.place(scene, openings), len(times)
    if kind in HARMS:
        level = getattr(FULL_HARM, kind) * rng.uniform(0.3, 1)  # from just worse than a nuisance to ruined
        return Mixture(good, times, np.zeros(count), _harm(**{kind: level}))
    if kind in ("rate", "frozen"):
        other_times = _other_times(scene, times, kind, rng)
        return None if other_times is None else Mixture(good, other_times, np.ones(count), _harm())
    if kind in ("elsewhere", "jump"):
        other = world.place(scene, rng.standard_normal((2, world.OPENINGS)))
    else:
        what = kind
        if kind in ("change", "flicker"):  # at times right, at times wrong in one of these
            what = str(rng.choice(["colour", "shape", "size", "absent"]))
        other = _another(scene, openings, what, rng)
    share = np.pad(_shares(kind, window, rng), (0, count - window.counted), mode="edge")
    return None if other is None else Mixture(other, times, share, _harm())


def _other_times(scene: Scene, times: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray | None:
    """Frames in another course of time; None where that looks the same."""
    if not any(map(_is_moving, scene.things)):
        return None
    rates = [0.0] if kind == "frozen" else [0.5, 2.0]
    if kind != "frozen" and any(map(_has_direction, scene.things)):
        rates.append(-1.0)
    return times[0] + (rng.choice(rates) * (times - times[0])).astype(int)


def _shares(kind: str, window: Window, rng: np.random.Generator) -> np.ndarray:
    """How much of the other scene is in each of the counted frames."""
    count = window.counted
    match kind:
        case "elsewhere":
            return np.full(count, rng.uniform(0.12, 0.5))
        case "jump":
            # Between two frames that are looked at together: after a gap anything may stand elsewhere.
            return np.arange(count) > rng.choice(np.flatnonzero(window.pairs))
        case "change":
            return _ramp(count, rng)
        case "flicker":
            return rng.random(count) * rng.uniform(0.4, 1)
        case "motion":
            return np.ones(count)
        case _:  # half a wrong colour is wrong too
            return np.full(count, 1.0 if rng.random() < 0.6 else rng.uniform(0.3, 1))


def _another(scene: Scene, openings: np.ndarray, kind: str, rng: np.random.Generator) -> world.Placed | None:
    """What the caption does not mean, where nothing else is different; None where there is no such thing."""
    which = int(rng.integers(len(scene.things)))
    if kind == "absent":
        placed = world.place(scene, openings)
        gone = np.arange(2) == which
        return placed._replace(radius=np.where(gone, 0, placed.radius).astype(np.float32))
    other = _other_scene(scene, which, kind, rng)
    if other is None or (world.is_held_out(other) and not world.is_held_out(scene)):
        return None  # in training, what is never a good video must not be learned as a bad one either
    return world.place(other, openings)


def _other_scene(scene: Scene, which: int, kind: str, rng: np.random.Generator) -> Scene | None:
    """The scene with another word, of the thing with this index if of one; None where it has none to change."""
    thing = scene.things[which]
    pick = lambda words, but: str(rng.choice([word for word in words if word not in but]))  # noqa: E731
    taken = [each.colour for each in scene.things]
    if kind == "number":
        if len(scene.things) == 2:
            return None  # "absent" is the other way of being wrong
        added = dataclasses.replace(thing, colour=pick(COLOURS, ()), shape=pick(SHAPES, ()), motion=pick(MOVES, ()))
        return dataclasses.replace(scene, things=(thing, added))
    if kind == "swap":
        if len(scene.things) == 1 or scene.things[0].shape == scene.things[1].shape:
            return None
        a, b = scene.things
        swapped = (dataclasses.replace(a, colour=b.colour), dataclasses.replace(b, colour=a.colour))
        return dataclasses.replace(scene, things=swapped)
    if kind == "background":
        return dataclasses.replace(scene, background=pick(BACKGROUNDS, (scene.background,)))
    if kind == "size" and thing.motion == "bounces":
        return None  # its path depends on its size
    changed = {
        "colour": lambda: {"colour": pick(COLOURS, taken)},
        "shape": lambda: {"shape": pick(SHAPES, (thing.shape,))},
        "size": lambda: {"size": "large" if thing.size == "small" else pick(SIZES, (thing.size,))},
        "motion": lambda: _other_motion(thing, pick),
    }[kind]()
    things = list(scene.things)
    things[which] = dataclasses.replace(thing, **changed)
    return dataclasses.replace(scene, things=tuple(things))


def _other_motion(thing: Thing, pick) -> dict[str, str]:
    if thing.motion in (*MOVES, "bounces") and pick("ab", ()) == "a":
        # The nearest misunderstandings: another direction, another speed.
        if thing.motion in MOVES and pick("ab", ()) == "a":
            return {"motion": pick(MOVES, (thing.motion,))}
        return {"speed": pick(SPEEDS, (thing.speed,))}
    # A turning circle or ring cannot be told from one at rest.
    alike = {"spins", "stands still"} if thing.shape in ("circle", "ring") else set()
    return {"motion": pick(MOTIONS, {thing.motion} | (alike if thing.motion in alike else set())), "speed": ""}


def _is_moving(thing: Thing) -> bool:
    return thing.motion != "stands still" and not (thing.motion == "spins" and thing.shape in ("circle", "ring"))


def _has_direction(thing: Thing) -> bool:
    """Whether it looks wrong backwards."""
    return thing.motion in MOVES or (thing.motion == "spins" and thing.shape not in ("circle", "ring"))


def _ramp(count: int, rng: np.random.Generator) -> np.ndarray:
    """From 0 to 1, at some time, in one step or slowly."""
    middle, width = rng.uniform(0.15, 0.85) * count, rng.uniform(0.05, 0.6) * count
    return np.clip((np.arange(count) - middle) / width + 0.5, 0, 1)


def film_groups(groups: Group, key: Array, step: int) -> Float[Array, "n m k h w 3"]:
    """Renders n groups, in each the good video first; `step` as in `world.render`.

    Four programs, because in one of them XLA would draw every pixel again for each that looks at it.
    """
    videos = _mix(groups, step)
    n, _, *shape = videos.shape
    draws = _draw(jax.random.split(key, n), tuple(shape))
    more = jax.tree.map(lambda levels: np.pad(levels, ((0, 0), (1, 0))), groups.harm)
    harm = jax.tree.map(lambda level, levels: level[:, None] + levels, groups.nuisance, more)
    videos = _warp(videos, draws["warp"], harm.warp, step)
    return _spoil(videos, draws, harm, step)


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.vmap, in_axes=(0, None))
def _mix(group: Group, step: int) -> Float[Array, "m k h w 3"]:
    """One group without harm."""
    good = world.render(group.good, group.frames, step=step)
    mixed = jax.vmap(lambda placed, frames: world.render(placed, frames, step=step))(group.mixed, group.mixed_frames)
    share = group.share[:, :, None, None, None]
    return jnp.concatenate([good[None], good * (1 - share) + mixed * share])


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.vmap, in_axes=(0, None))
def _draw(key: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    """What each harm does to one group in full: what differs between its videos is how much, not where."""
    keys = dict(zip(HARMS, jax.random.split(key, len(HARMS)), strict=True))
    count, height, width, _ = shape
    bend = jax.random.normal(keys["warp"], (count, 5, 8, 2))
    return {
        "warp": jax.image.resize(bend, (count, height, width, 2), "cubic"),
        "blobs": _blobs(keys["blobs"], height, width),
        "hole": _rectangle(keys["hole"], height, width),
        "cast": jax.random.normal(keys["cast"], (3,)),
        "blink": jax.random.normal(keys["blink"], (count, 1, 1, 1)),
        "noise": jax.random.normal(keys["noise"], shape),
    }


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
@functools.partial(jax.vmap, in_axes=(0, None, 0, None))
def _warp(
    video: Float[Array, "k h w 3"], bend: Float[Array, "k h w 2"], level: Float[HostOrDevice, ""], step: int
) -> Float[Array, "k h w 3"]:
    return jax.vmap(_bend)(video, bend * level / step)


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
@functools.partial(jax.vmap, in_axes=(0, None, 0, None))
def _spoil(video: Float[Array, "k h w 3"], draws: dict[str, Any], harm: Harm, step: int) -> Float[Array, "k h w 3"]:
    """All of one video but its warp; what is given in pixels is of the full size."""
    video = _blur(video, harm.blur / step)
    video = _cover(video, draws["blobs"], harm.blobs)
    video = _cover(video, draws["hole"], harm.hole)
    video = video + harm.cast * draws["cast"] + harm.blink * draws["blink"] + harm.noise * draws["noise"]
    return jnp.clip(video, -1.0, 1.0)


def _pixels(height: int, width: int) -> tuple[Float[Array, "h 1"], Float[Array, "1 w"]]:
    """(rows, columns)"""
    return jnp.arange(height, dtype=jnp.float32)[:, None], jnp.arange(width, dtype=jnp.float32)[None]


def _bend(frame: Float[Array, "h w 3"], bend: Float[Array, "h w 2"]) -> Float[Array, "h w 3"]:
    height, width, _ = frame.shape
    rows, columns = _pixels(height, width)
    y, x = rows + bend[..., 0], columns + bend[..., 1]
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    at = lambda dy, dx: frame[(top + dy).astype(int) % height, (left + dx).astype(int) % width]  # noqa: E731
    upper = at(0, 0) * (1 - right) + at(0, 1) * right
    lower = at(1, 0) * (1 - right) + at(1, 1) * right
    return upper * (1 - down) + lower * down


def _blur(video: Float[Array, "k h w 3"], sigma: Float[HostOrDevice, ""]) -> Float[Array, "k h w 3"]:
    reach = 4
    weights = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1, dtype=jnp.float32) / jnp.maximum(sigma, 0.05)) ** 2)
    weights = weights / jnp.sum(weights)
    for axis in (1, 2):
        length = video.shape[axis]
        around = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(video, around, mode="wrap")
        taps = [jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(2 * reach + 1)]
        video = sum((weights[i] * tap for i, tap in enumerate(taps)), start=jnp.zeros_like(video))
    return video


def _cover(video: Array, cover: tuple[Array, Array], opacity: Float[HostOrDevice, ""]) -> Array:
    colour, where = cover
    where = opacity * where
    return video * (1 - where) + colour * where


def _blobs(key: Array, height: int, width: int) -> tuple[Array, Array]:
    """(colour, opacity) of soft spots, [h, w, 3] and [h, w, 1]."""
    key_place, key_colour, key_size = jax.random.split(key, 3)
    places = jax.random.uniform(key_place, (3, 2)) * jnp.array([height, width], jnp.float32)
    colours = jax.random.uniform(key_colour, (3, 3), minval=-1, maxval=1)
    sizes = jax.random.uniform(key_size, (3,), minval=0.04, maxval=0.12) * width
    rows, columns = _pixels(height, width)
    away = (rows[..., None] - places[:, 0]) ** 2 + (columns[..., None] - places[:, 1]) ** 2
    near = jnp.exp(-away / sizes**2)
    return near @ colours / (jnp.sum(near, axis=-1, keepdims=True) + 1e-6), jnp.max(near, axis=-1, keepdims=True)


def _rectangle(key: Array, height: int, width: int) -> tuple[Array, Array]:
    key_place, key_size, key_colour = jax.random.split(key, 3)
    middle = jax.random.uniform(key_place, (2,)) * jnp.array([height, width], jnp.float32)
    half = jax.random.uniform(key_size, (2,), minval=0.08, maxval=0.25) * height
    rows, columns = _pixels(height, width)
    inside = (jnp.abs(rows - middle[0]) < half[0]) & (jnp.abs(columns - middle[1]) < half[1])
    return jax.random.uniform(key_colour, (3,), minval=-1, maxval=1), inside[..., None].astype(jnp.float32)
