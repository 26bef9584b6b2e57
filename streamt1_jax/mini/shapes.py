"""The outlines of the little world's shapes, as signed distances: negative inside.

Each is of a shape of radius 1 around the origin, upright; x goes to the right, y downwards.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp


def _circle(x, y):
    return jnp.hypot(x, y) - 0.9


def _square(x, y):
    return jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.8


def _triangle(x, y):
    # Of the edges' normals; one points down.
    sides = [(math.cos(a), math.sin(a)) for a in map(math.radians, (90, 210, 330))]
    return jnp.max(jnp.stack([x * c + y * s for c, s in sides]), axis=0) - 0.55


def _star(x, y):
    """Five points: the plane is folded onto a tenth of it, where the outline is one straight edge."""
    turn = 2 * math.pi / 5
    around = jnp.mod(jnp.arctan2(x, -y) + turn / 2, turn) - turn / 2
    length = jnp.hypot(x, y)
    u, v = length * jnp.cos(around), length * jnp.abs(jnp.sin(around))
    notch = 0.45 * math.cos(turn / 2), 0.45 * math.sin(turn / 2)  # the tip is at (1, 0)
    edge = notch[0] - 1, notch[1]
    return (edge[1] * (u - 1) - edge[0] * v) / math.hypot(*edge)


def _ring(x, y):
    return jnp.abs(jnp.hypot(x, y) - 0.72) - 0.25


def _cross(x, y):
    wide, narrow = (jnp.maximum(jnp.abs(a) - 0.95, jnp.abs(b) - 0.32) for a, b in ((x, y), (y, x)))
    return jnp.minimum(wide, narrow)


SIGNED_DISTANCES: dict[str, Callable] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
