"""How far each fast setting strays from the exact form in float32, from the same noise.

    python benchmarks/fidelity.py --preset mini --chunks 32 --json FILE

`mini` is the embedded model with its trained weights, its own rewards and a prompt; other presets have random weights,
random numbers in the place of a prompt's embeddings and the native rewards.

Both are run chunk by chunk. So that they stay comparable after a different pick, the fast one is given the picks and
the flags of the exact one; what it would have picked itself is recorded. The report counts the routes that evicted
chunks took; the thresholds of the flags can be set so that they take all three.
"""

import argparse
import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from race import rank_correlation, write_report

from streamt1_jax.config import ModelConfig, RunConfig, SearchConfig
from streamt1_jax.generator import wan_generator
from streamt1_jax.measure import machine
from streamt1_jax.mini.rewards import mini_long, mini_short
from streamt1_jax.networks import network_graph
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.pruning import keep_best
from streamt1_jax.rewards import Reward, native_long, native_short
from streamt1_jax.rewards.base import PromptTokens
from streamt1_jax.sink import Route
from streamt1_jax.stages import staged_step
from streamt1_jax.state import ChunkRecord
from streamt1_jax.stream import Candidates, Scores, Search, init_state
from streamt1_jax.weights import MiniWeights, random_params

PROMPT = "a red circle moves right and a blue square spins"


@dataclass(frozen=True)
class Setting:
    """One way of running, and the exact one that it is compared with."""

    name: str
    search: dict[str, Any]  # fields of `SearchConfig`
    dtype: str = "float32"
    exact: tuple[tuple[str, Any], ...] = ()  # fields of the exact form's `SearchConfig`


SETTINGS = (
    Setting("bfloat16 throughout, sinks in float32", {}, "bfloat16"),
    Setting("bfloat16 throughout, sinks too", {"sink_dtype": "bfloat16"}, "bfloat16"),
    Setting("sinks in bfloat16, the rest in float32", {"sink_dtype": "bfloat16"}),
    Setting("3 frames of a chunk for the short reward", {"short_reward_frames": 3}),
    Setting("streaming decode, for window decode", {}, exact=(("decode", "window"),)),
)


class Scene(NamedTuple):
    """What all runs share."""

    model: ModelConfig
    params: PyTree
    embeds: Float[Array, "P text_dim"]
    tokens: PromptTokens  # of the prompt, for rewards that read it
    rewards: tuple[Reward, Reward]
    about: dict[str, Any]  # for the report


def embedded_scene(prompt: str) -> Scene:
    """The embedded model as it is shipped."""
    pipe = StreamT1Pipeline(MiniWeights(), dtype=jnp.float32)
    (embeds,) = pipe.encode([prompt])
    about = {"weights": MiniWeights().describe()["summary"], "prompt": prompt, "rewards": "mini"}
    rewards = mini_short(), mini_long()
    return Scene(pipe.config, pipe.params, jnp.asarray(embeds, jnp.float32), pipe.tokens(prompt), rewards, about)


def random_scene(model: ModelConfig) -> Scene:
    """Random weights and no prompt."""
    params = {name: random_params(network_graph(model, name, jnp.float32)[1], 0) for name in ("dit", "decoder")}
    embeds = jax.random.normal(jax.random.key(0), (model.dit.text_len, model.dit.text_dim))
    nothing = jnp.zeros(model.dit.text_len, jnp.int32)
    about = {"weights": "random weights", "prompt": "random numbers", "rewards": "native"}
    return Scene(model, params, embeds, PromptTokens(nothing, nothing), (native_short(), native_long()), about)


class Run:
    """One search, advanced chunk by chunk."""

    def __init__(self, scene: Scene, search: SearchConfig, dtype: str, chunks: int):
        config, model = RunConfig(search=search), scene.model
        generator = wan_generator(model, config.stream, model.height, model.width, jnp.dtype(dtype).type)
        noise = gaussian_noise(generator.chunk_shape, len(config.stream.denoising_steps))
        self.params = jax.tree.map(lambda x: x.astype(dtype), scene.params)
        self.search = Search(generator, *scene.rewards, noise, config)
        made = jax.jit(generator.prepare)(self.params, scene.embeds, jnp.int32(0))
        self.conditioning = made._replace(tokens=scene.tokens)
        self.state = init_state(self.search, 0, chunks)

    def chunk(self, *, first: bool, picked_by: Scores | None = None) -> tuple[Candidates, Scores, ChunkRecord]:
        """Makes the next chunk: its candidates, their own scores, and the record.

        Args:
            picked_by: scores to pick and to flag by, instead of the chunk's own.
        """
        made: dict[str, Any] = {}

        def around(name, run):
            made[name] = result = run()
            if name != "judge" or picked_by is None:
                return result
            return result._replace(**{key: getattr(picked_by, key) for key in ("fused", "usable", "ema", "append")})

        args = (self.search, self.params, self.conditioning, self.state)
        self.state, record = staged_step(*args, first=first, around=around)
        return made["propose"], made["judge"], record


@dataclass
class Fidelity:
    """What was found of one setting, a number a chunk."""

    picks: list[bool] = field(default_factory=list)  # the same beams, in the same order
    flags: list[float] = field(default_factory=list)  # share of candidates with the same flags
    # Spearman's, over the candidates of the chunk.
    rank_correlation: list[float] = field(default_factory=list)
    rank_correlation_short: list[float] = field(default_factory=list)
    rank_correlation_long: list[float] = field(default_factory=list)
    relative_rms: list[float] = field(default_factory=list)  # of the latents of all candidates
    largest: list[float] = field(default_factory=list)

    def add(self, fast: tuple[Candidates, Scores], exact: tuple[Candidates, Scores], beams: int) -> None:
        (made, scores), (expected, exact_scores) = fast, exact
        kept, exact_kept = (keep_best(s.fused, s.usable, beams) for s in (scores, exact_scores))
        same_flags = (scores.ema == exact_scores.ema) & (scores.append == exact_scores.append)
        difference = made.latents - expected.latents
        self.picks.append(bool((kept == exact_kept).all()))
        self.flags.append(float(same_flags.mean()))
        self.rank_correlation.append(rank_correlation(scores.fused, exact_scores.fused))
        self.rank_correlation_short.append(rank_correlation(scores.short, exact_scores.short))
        self.rank_correlation_long.append(rank_correlation(scores.long, exact_scores.long))
        self.relative_rms.append(float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(expected.latents**2))))
        self.largest.append(float(jnp.abs(difference).max()))

    def summary(self) -> dict[str, float]:
        return {
            "equal_picks": float(np.mean(self.picks)),
            "equal_flags": float(np.mean(self.flags)),
            "rank_correlation": float(np.mean(self.rank_correlation)),
            "rank_correlation_short": float(np.mean(self.rank_correlation_short)),
            "rank_correlation_long": float(np.mean(self.rank_correlation_long)),
            "latent_relative_rms_last": self.relative_rms[-1],
            "latent_relative_rms_worst": max(self.relative_rms),
            "latent_largest_last": self.largest[-1],
            "latent_largest_worst": max(self.largest),
        }


def compare(exact: Run, fast: dict[str, Run], chunks: int) -> tuple[dict[str, Fidelity], Counter]:
    """Runs the exact form and the fast ones side by side; also how often the exact one took each route."""
    found, routes = {name: Fidelity() for name in fast}, Counter()
    beams, _ = exact.search.config.search.grid
    for index in range(chunks):
        candidates, scores, record = exact.chunk(first=index == 0)
        routes.update(Route(route).name for route in record.evicted_route)
        for name, run in fast.items():
            made, own, _ = run.chunk(first=index == 0, picked_by=scores)
            found[name].add((made, own), (candidates, scores), beams)
    return found, routes


def run_fidelity(scene: Scene, search: SearchConfig, chunks: int) -> list[dict[str, Any]]:
    """One row a setting."""

    def run(fields: dict[str, Any], dtype: str = "float32") -> Run:
        return Run(scene, dataclasses.replace(search, **fields), dtype, chunks)

    rows = []
    for fields in dict.fromkeys(setting.exact for setting in SETTINGS):
        group = [setting for setting in SETTINGS if setting.exact == fields]
        fast = {setting.name: run(setting.search, setting.dtype) for setting in group}
        found, routes = compare(run(dict(fields)), fast, chunks)
        rows += [
            {"name": name, **fidelity.summary(), "routes": dict(routes), "by_chunk": dataclasses.asdict(fidelity)}
            for name, fidelity in found.items()
        ]
    return rows


def table(report: dict[str, Any]) -> str:
    head = ("picks", "flags", "ranks", "short", "long", "rms last", "worst", "max last", "worst")
    lines = [
        f"{report['preset']}, {report['weights']}, {report['prompt']!r}, {report['rewards']} rewards",
        f"{report['chunks']} chunks, against float32 exact; "
        f"jax {report['machine']['jax']}, {report['machine']['device']}",
        f"{'':44}" + "".join(f"{name:>10}" for name in head),
    ]
    for row in report["settings"]:
        shares = "".join(f"{100 * row[key]:8.1f} %" for key in ("equal_picks", "equal_flags"))
        errors = "".join(f"{value:10.1e}" for key, value in row.items() if key.startswith("latent_"))
        ranks = "".join(f"{value:10.3f}" for key, value in row.items() if key.startswith("rank_"))
        lines.append(f"{row['name']:44}{shares}{ranks}{errors}")
    routes = "; ".join(str(routes) for routes in {str(row["routes"]) for row in report["settings"]})
    return "\n".join([*lines, f"evicted chunks by route, of the exact forms: {routes}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares each fast setting with the exact form.")
    parser.add_argument("--preset", default="mini", help="1.3b, 14b, mini or tiny (default: mini)")
    parser.add_argument("--chunks", type=int, default=32, help="default: 32")
    parser.add_argument("--prompt", default=PROMPT, help=f"of the embedded model (default: {PROMPT})")
    default = SearchConfig()
    add = functools.partial(parser.add_argument, type=float, help="of the flags (default: %(default)s)")
    add("--short-threshold", default=default.short_threshold)
    add("--long-threshold", default=default.long_threshold)
    parser.add_argument("--json", metavar="FILE", help="write the report here too")
    args = parser.parse_args()

    jax.config.update("jax_default_matmul_precision", "highest")  # or a GPU would round the exact form to TF32
    scene = embedded_scene(args.prompt) if args.preset == "mini" else random_scene(ModelConfig.preset(args.preset))
    search = SearchConfig(short_threshold=args.short_threshold, long_threshold=args.long_threshold)
    report = {
        "machine": machine(),
        "preset": args.preset,
        **scene.about,
        "chunks": args.chunks,
        "search": dataclasses.asdict(search),
        "settings": run_fidelity(scene, search, args.chunks),
    }
    print(table(report))
    write_report(args.json, report)


if __name__ == "__main__":
    main()
