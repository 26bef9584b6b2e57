"""What is fixed while a search runs, and what the verbs of its `step` hand to each other (`stream.py`)."""

from dataclasses import dataclass
from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from streamt1_jax.config import RunConfig
from streamt1_jax.generator import Generator
from streamt1_jax.noise import NoiseFn
from streamt1_jax.rewards.base import Reward
from streamt1_jax.state import Beam
from streamt1_jax.window import RedecodedWindow, StreamingWindow, make_window


@dataclass(frozen=True, eq=False)
class Search:
    """All that is fixed while a program runs. Hashed by identity: keep one, or every call compiles anew."""

    generator: Generator
    short: Reward
    long: Reward
    noise: NoiseFn
    config: RunConfig
    mesh: Mesh | None = None  # devices that share the candidates; None: one device

    @property
    def window(self) -> StreamingWindow | RedecodedWindow:
        return make_window(self.generator, self.config.search, self.long.pixels, self.mesh)


class Candidates(NamedTuple):
    """What `propose` makes."""

    seed: UInt32[Array, "B K"]
    noise: Float[Array, "B K f C h w"]  # what denoising started from
    latents: Float[Array, "B K f C h w"]  # the clean chunk


class Scores(NamedTuple):
    """What `judge` says."""

    short: Float[Array, "B K"]
    long: Float[Array, "B K"]
    fused: Float[Array, "B K"]
    alpha: Float[Array, ""]
    ema: Bool[Array, "B K"]
    append: Bool[Array, "B K"]
    usable: Bool[Array, "B K"]  # latents and score are finite
    failed: Bool[Array, "B K"]  # a reward raised


class Winners(NamedTuple):
    """What `select` keeps, best first; every leaf [B, ...]."""

    flat: Int[Array, " B"]  # beam * K + candidate
    sink_start: Int[Array, "B appended"]  # of the beams before the choice: the appended sinks their candidates saw
    parent: Beam
    candidate: Candidates
    short: Float[Array, " B"]
    long: Float[Array, " B"]
    route: Int[Array, " B"]  # the Route for when the chunk leaves the window
    frames: Float[Array, "B T H W 3"]  # as the short reward saw them
    window: PyTree  # next `Beam.window`
    decoder: PyTree | None  # next `Beam.decoder`, where watching has advanced it
