"""Videos of the little world for tests, and what can go wrong with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax.mini import world
from streamt1_jax.mini.world import COLOURS, SHAPES, Scene

BLOCK = 27  # frames rendered at once: 81 and 477 are made of such blocks, so one program renders all


@functools.cache
def _render():
    return jax.jit(world.render)


@functools.cache
def film(scene: Scene, seed: int = 0, frames: int = 81, start: int = 0) -> np.ndarray:
    """A video of a scene, uint8 [T, 80, 128, 3]."""
    video = film_placed(world.place(scene, world.draw_openings(seed)), frames, start)
    video.flags.writeable = False
    return video


def film_placed(placed: world.Placed, frames: int, start: int = 0) -> np.ndarray:
    parts = [np.asarray(_render()(placed, start + first + jnp.arange(BLOCK))) for first in range(0, frames, BLOCK)]
    return np.round((np.concatenate(parts)[:frames] + 1) * 127.5).astype(np.uint8)


def other(words, word):
    """Another word of the list."""
    words = list(words)
    return words[(words.index(word) + 3) % len(words)]


def with_first(scene: Scene, **changes) -> Scene:
    """The scene with another first thing."""
    first, *rest = scene.things
    return dataclasses.replace(scene, things=(dataclasses.replace(first, **changes), *rest))


def wrong_colour(scene: Scene) -> np.ndarray:
    taken = {thing.colour for thing in scene.things}
    return film(with_first(scene, colour=next(c for c in COLOURS if c not in taken)))


def wrong_shape(scene: Scene) -> np.ndarray:
    return film(with_first(scene, shape=other(SHAPES, scene.things[0].shape)))


def wrong_size(scene: Scene) -> np.ndarray:
    return film(with_first(scene, size="large" if scene.things[0].size == "small" else "small"))


def missing(scene: Scene) -> np.ndarray:
    placed = world.place(scene, world.draw_openings(0))
    return film_placed(placed._replace(radius=placed.radius * np.float32([1, 0])), 81)


def _with_one_more(scene: Scene, thing: world.Thing) -> np.ndarray:
    """The video with another thing in front, as far from the first as it can begin."""
    start = world.place(scene, world.draw_openings(0)).start[0] + np.float32([world.WIDTH / 2, world.HEIGHT / 2])
    alone = world.place(Scene((thing,)), world.draw_openings(0))
    added = film_placed(alone._replace(start=np.stack([start, start])), 81)
    there = (np.abs(added.astype(int) - 12).max(axis=-1) > 60)[..., None]
    return np.where(there, added, film(scene))


def extra(scene: Scene) -> np.ndarray:
    taken = {thing.colour for thing in scene.things}
    return _with_one_more(scene, world.Thing(next(c for c in COLOURS if c not in taken), "square", "stands still"))


def extra_of_its_own_colour(scene: Scene) -> np.ndarray:
    return _with_one_more(scene, dataclasses.replace(scene.things[0], motion="stands still", speed=""))


def reversed_in_time(scene: Scene) -> np.ndarray:
    return film(scene)[::-1].copy()


def twice_as_fast(scene: Scene) -> np.ndarray:
    return film(scene, frames=162)[::2].copy()


def frozen(scene: Scene) -> np.ndarray:
    return np.repeat(film(scene)[:1], 81, axis=0)


def noise(scene: Scene) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (81, world.HEIGHT, world.WIDTH, 3), np.uint8)


def blurred(scene: Scene, reach: int = 3) -> np.ndarray:
    video = film(scene).astype(np.float32)
    for axis in (1, 2):
        video = sum(np.roll(video, shift, axis) for shift in range(-reach, reach + 1)) / (2 * reach + 1)
    return np.round(video).astype(np.uint8)


def slightly_blurred(scene: Scene) -> np.ndarray:
    return blurred(scene, reach=1)


def drifting_in_colour(scene: Scene) -> np.ndarray:
    placed = world.place(scene, world.draw_openings(0))
    there = np.float32(placed.radius > 0)[:, None]
    parts = []
    for first in range(0, 81, BLOCK):
        towards = there * np.float32(first / 81 * 0.5)
        mixed = placed.colour * (1 - towards) + towards * placed.colour.mean(axis=1, keepdims=True)
        parts.append(film_placed(placed._replace(colour=mixed), BLOCK, first))
    return np.concatenate(parts)


def shrinking(scene: Scene) -> np.ndarray:
    placed = world.place(scene, world.draw_openings(0))
    radii = [placed.radius * np.float32(1 - first / 81 * 0.6) for first in range(0, 81, BLOCK)]
    return np.concatenate([film_placed(placed._replace(radius=r), BLOCK, i * BLOCK) for i, r in enumerate(radii)])


def flickering(scene: Scene) -> np.ndarray:
    gain = np.where(np.arange(81) % 2, 30.0, 0.0)[:, None, None, None]
    return np.clip(film(scene) + gain, 0, 255).astype(np.uint8)


def wrong_background(scene: Scene) -> np.ndarray:
    return film(dataclasses.replace(scene, background="brown" if scene.background != "brown" else "striped"))
