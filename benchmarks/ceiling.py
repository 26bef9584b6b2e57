"""What the checks make of the world's own videos, as they are and through the embedded VAE, with no DiT between.

    python benchmarks/ceiling.py --prompts 64 --frames 81 --json FILE

For orientation: how much of what a generated video lacks is the VAE's. Where things start is drawn anew, so single
captions differ from those of a comparison.
"""

import argparse
import collections

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from groups import PREFIX, kinds, means
from jaxtyping import PyTree
from race import write_report

from streamt1_jax.compare import check_mini
from streamt1_jax.config import ModelConfig
from streamt1_jax.measure import machine
from streamt1_jax.mini import shipped, world
from streamt1_jax.networks import network_graph
from streamt1_jax.types import Frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--frames", type=int, default=81, help="12k - 3")
    parser.add_argument("--seed", type=int, default=42, help="of where things start")
    parser.add_argument("--captions-seed", type=int, default=world.CAPTIONS_SEED)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    graph, abstract = network_graph(ModelConfig.mini(), "vae", jnp.float32)
    params = shipped.load_mini(shipped.FOLDER, "vae", abstract)

    @jax.jit
    def both(params: PyTree, placed: world.Placed) -> tuple[Frames, Frames]:
        """In [0, 1]: as it is, and coded and decoded."""
        vae, video = nnx.merge(graph, params), world.render(placed, jnp.arange(args.frames))
        return (video + 1) / 2, vae.decoder.decode(vae.encoder.encode(video))

    scenes = world.held_out_scenes(args.prompts, args.captions_seed)
    found: dict[str, dict[str, list[float]]] = {
        way: collections.defaultdict(list) for way in ("as it is", "through the VAE")
    }
    for number, scene in enumerate(scenes):
        videos = both(params, world.place(scene, world.draw_openings(args.seed + number)))
        for by_prompt, video in zip(found.values(), videos, strict=True):
            checks = check_mini(np.round(np.asarray(video) * 255).astype(np.uint8), scene.caption())
            assert checks is not None, scene
            for name, value in checks.items():
                by_prompt[PREFIX + name].append(value)

    table = {
        kind: {way: means(by_prompt, numbers) | {"captions": len(numbers)} for way, by_prompt in found.items()}
        for kind, numbers in kinds([scene.caption() for scene in scenes]).items()
    }
    print("| captions with | captions | world's own videos | mean of the checks | shape |\n|---|---|---|---|---|")
    for kind, ways in table.items():
        for way, of in ways.items():
            print(f"| {kind} | {of['captions']} | {way} | {of['mean']:.3f} | {of['shape']:.3f} |")
    weights = shipped.read_manifest(shipped.FOLDER)["sha256"]
    asked = {key: getattr(args, key) for key in ("prompts", "frames", "seed", "captions_seed")}
    write_report(args.json, {"machine": machine(), "weights": weights, **asked, "kinds": table})


if __name__ == "__main__":
    main()
