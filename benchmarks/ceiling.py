"""What the checks make of the world's own videos, as they are and through the embedded VAE: no DiT can be better.

    python benchmarks/ceiling.py --prompts 64 --frames 81

The rows are those of `groups.py`: captions with one thing or two, then single things by their shape.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from groups import PREFIX, single_shape, table, things
from jaxtyping import PyTree

from streamt1_jax.compare import check_mini
from streamt1_jax.config import ModelConfig
from streamt1_jax.mini import shipped, world
from streamt1_jax.networks import network_graph
from streamt1_jax.types import Frames


class Scored(NamedTuple):
    method: str
    prompt: str
    scores: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--frames", type=int, default=81, help="12k - 3")
    parser.add_argument("--seed", type=int, default=42, help="of where things start")
    args = parser.parse_args()

    graph, abstract = network_graph(ModelConfig.mini(), "vae", jnp.float32)
    params = shipped.load_mini(shipped.FOLDER, "vae", abstract)

    @jax.jit
    def both(params: PyTree, placed: world.Placed) -> tuple[Frames, Frames]:
        """In [0, 1]: as it is, and coded and decoded."""
        vae, video = nnx.merge(graph, params), world.render(placed, jnp.arange(args.frames))
        return (video + 1) / 2, vae.decoder.decode(vae.encoder.encode(video))

    found = []
    for number, scene in enumerate(world.held_out_scenes(args.prompts)):
        videos = both(params, world.place(scene, world.draw_openings(args.seed + number)))
        for method, video in zip(("the world's own", "through the VAE"), videos, strict=True):
            checks = check_mini(np.round(np.asarray(video) * 255).astype(np.uint8), scene.caption())
            assert checks is not None, scene
            found.append(Scored(method, scene.caption(), {PREFIX + name: value for name, value in checks.items()}))
    checks = [name.removeprefix(PREFIX) for name in found[0].scores]
    print("\n".join([*table(found, things, checks), "", *table(found, single_shape, ["shape", "mean"])]))


if __name__ == "__main__":
    main()
