"""Races between the forms of what a chunk is made of: attention, convolutions, the loop over layers, matrix products.

    python benchmarks/micro.py attention|conv|layers|matmul|all [--preset 1.3b] [--rounds 5] [--json FILE]

Sizes are those of a preset at its own picture size with a window of 12 latent frames. Every form is compared with the
first one of its race before it is timed. A form that cannot run here is listed as such.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, PyTree
from race import race, relative_rms, write_report

from streamt1_jax import flops
from streamt1_jax.config import ModelConfig, StreamConfig
from streamt1_jax.generator import Generator, wan_generator
from streamt1_jax.measure import Spread, machine, matmul_peak
from streamt1_jax.models.attention import _plain_attention, batched_attention
from streamt1_jax.models.conv import conv2d
from streamt1_jax.models.dit import KV, Past
from streamt1_jax.networks import network_graph
from streamt1_jax.weights import default_dtype, random_params

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative RMS
# The 3x3x3 convolutions of the VAE decoder, for one latent frame: frames, height, width, channels in and out.
WAN = (
    (1, 60, 104, 384, 384),
    (2, 120, 208, 384, 384),
    (4, 240, 416, 192, 192),
    (4, 480, 832, 96, 96),
    (4, 480, 832, 96, 3),
)
CONVOLUTIONS = {
    "1.3b": WAN,
    "14b": WAN,
    "mini": (
        (1, 10, 16, 64, 64),
        (2, 20, 32, 32, 32),
        (4, 40, 64, 16, 16),
        (4, 80, 128, 8, 8),
        (4, 80, 128, 8, 3),
        # Of no preset: where the forms chosen on a CPU change places.
        (4, 40, 64, 32, 32),
        (4, 60, 104, 192, 192),
        (4, 120, 208, 96, 96),
    ),
    "tiny": ((2, 12, 20, 24, 8),),
}


@dataclass(frozen=True)
class Sizes:
    """What the races are about."""

    preset: str
    dtype: Any

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.preset(self.preset)

    @property
    def generator(self) -> Generator:
        return wan_generator(self.model, StreamConfig(), self.model.height, self.model.width, self.dtype)

    @property
    def window(self) -> int:
        """Chunks that a chunk attends to, itself not counted when it is made after them."""
        return StreamConfig().sink_chunks + StreamConfig().window_chunks


@dataclass(frozen=True)
class Race:
    """One computation on the same arguments in several forms; the first is what the others are compared with."""

    name: str
    forms: dict[str, Callable]  # compiled functions
    args: tuple
    flop: float


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def attention_races(sizes: Sizes) -> Iterator[Race]:
    """A chunk's queries on the keys of a full window; and on a cache that is only half valid."""
    _, queries, heads, dim = sizes.generator.kv.shape
    keys = queries * (sizes.window + 1)
    for batch in (1, 4):
        for room in (keys, 2 * keys):  # room for sinks that are not there yet
            q, k, v = (normal(i, (batch, n, heads, dim), sizes.dtype) for i, n in enumerate((queries, room, room)))
            lengths = jnp.full((batch,), keys, jnp.int32)
            forms = {
                "plain, by blocks": jax.jit(jax.vmap(_plain_attention)),
                "plain, at once": jax.jit(batched_attention("xla")),
                "cuDNN with lengths": jax.jit(batched_attention("cudnn")),
            }
            name = f"batch {batch}, {queries} queries, {keys} of {room} keys, {heads} heads of {dim}"
            yield Race(name, forms, (q, k, v, lengths), 4 * batch * queries * keys * heads * dim)


def summed(padded: Array, kernel: Array) -> Array:
    """Three 2-d convolutions, one a tap of time, added."""
    frames = padded.shape[0] - 2
    first, *rest = (conv2d(padded[k : k + frames], kernel[k]) for k in range(3))
    return sum(rest, start=first)


def joined(padded: Array, kernel: Array) -> Array:
    """One 2-d convolution over three frames joined in channels."""
    frames = padded.shape[0] - 2
    x = jnp.concatenate([padded[k : k + frames] for k in range(3)], axis=-1)
    return conv2d(x, rearrange(kernel, "k kh kw i o -> kh kw (k i) o"))


def conv3d(padded: Array, kernel: Array, *, layout: str) -> Array:
    """XLA's 3-d convolution, channels last ("NDHWC") or first ("NCDHW")."""
    x = padded[None] if layout == "NDHWC" else rearrange(padded, "t h w i -> 1 i t h w")
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), [(0, 0), (1, 1), (1, 1)], dimension_numbers=(layout, "DHWIO", layout)
    )
    return y[0] if layout == "NDHWC" else rearrange(y, "1 o t h w -> t h w o")


def conv_races(sizes: Sizes) -> Iterator[Race]:
    """The convolutions of the VAE decoder."""
    forms = {
        "three summed": summed,
        "frames joined": joined,
        "3-d, NDHWC": functools.partial(conv3d, layout="NDHWC"),
        "3-d, NCDHW": functools.partial(conv3d, layout="NCDHW"),
    }
    for frames, height, width, din, dout in CONVOLUTIONS[sizes.preset]:
        for batch in (1, 4):
            padded = normal(0, (batch, frames + 2, height, width, din), sizes.dtype)
            kernel = normal(1, (3, 3, 3, din, dout), sizes.dtype) * (27 * din) ** -0.5
            batched = {name: jax.jit(jax.vmap(form, in_axes=(0, None))) for name, form in forms.items()}
            name = f"batch {batch}, {frames} frames of {height}x{width}, {din} to {dout} channels"
            yield Race(name, batched, (padded, kernel), 2 * 27 * batch * frames * height * width * din * dout)


def layer_races(sizes: Sizes) -> Iterator[Race]:
    """A DiT forward with its loop over the layers as it is, and unrolled."""
    model, generator, dtype = sizes.model, sizes.generator, sizes.dtype
    graphdef, abstract = network_graph(model, "dit", dtype)
    params = random_params(abstract, 0)
    layers, tokens, heads, dim = generator.kv.shape
    seen = tokens * sizes.window
    embeds = normal(0, (model.dit.text_len, model.dit.text_dim), jnp.float32)
    conditioning = jax.jit(generator.prepare)({"dit": params}, embeds, jnp.int32(0))
    past = Past(KV(*(normal(i, (layers, seen, heads, dim), dtype) for i in (1, 2))), jnp.int32(seen))

    def forward(params: PyTree, x: Array, past: Past, *, unroll: int) -> Array:
        dit = nnx.merge(graphdef, params)
        dit.unroll = unroll
        return dit(x, conditioning.context, conditioning.text, past, jnp.int32(9))

    forms = {f"{n} layers a turn": functools.partial(forward, unroll=n) for n in sorted({1, 3, layers})}
    for batch in (1, 4):
        batched = {name: jax.jit(jax.vmap(form, in_axes=(None, 0, None))) for name, form in forms.items()}
        work = batch * flops.dit_forward(model.dit, tokens, seen)
        name = f"batch {batch}, {layers} layers, {tokens} tokens on {seen}"
        yield Race(name, batched, (params, normal(3, (batch, *generator.chunk_shape), jnp.float32), past), work)


def matmul_races(sizes: Sizes) -> Iterator[Race]:
    """The DiT's largest products, at one and at four candidates; for large presets square ones too."""
    dim, hidden, tokens = sizes.model.dit.dim, sizes.model.dit.ffn_dim, sizes.generator.kv.shape[1]
    shapes = [(tokens, dim, hidden), (4 * tokens, dim, hidden), (4 * tokens, hidden, dim), (4 * tokens, dim, dim)]
    if sizes.preset not in ("mini", "tiny"):
        shapes += [(n, n, n) for n in (4096, 8192, 16384)]
    for rows, inner, columns in shapes:
        args = normal(0, (rows, inner), sizes.dtype), normal(1, (inner, columns), sizes.dtype)
        yield Race(f"{rows} x {inner} x {columns}", {"product": jax.jit(jnp.matmul)}, args, 2 * rows * inner * columns)


RACES = {"attention": attention_races, "conv": conv_races, "layers": layer_races, "matmul": matmul_races}


def run_race(contest: Race, rounds: int, tolerance: float) -> dict[str, Any]:
    """Leaves out what cannot run here or computes something else, and says so."""
    reference, runs, left_out = None, {}, {}
    errors: dict[str, float] = {}
    for name, form in contest.forms.items():
        try:
            result = jax.block_until_ready(form(*contest.args))
        except Exception as error:  # cuDNN without a GPU, or out of memory: each library raises its own
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
            continue
        reference = result if reference is None else reference
        errors[name] = relative_rms(result, reference)
        if not errors[name] <= tolerance:
            left_out[name] = f"differs by {errors[name]:.3g}"
            continue
        runs[name] = functools.partial(form, *contest.args)
    spreads = {name: Spread.of(values) for name, values in race(runs, rounds).items()}
    rows = {
        name: {
            **asdict(spread),
            "flop_per_second": contest.flop / spread.median,
            "error": errors[name],
        }
        for name, spread in spreads.items()
    }
    return {"name": contest.name, "flop": contest.flop, "forms": rows, "left_out": left_out}


def show(result: dict[str, Any], peak: float) -> None:
    print(result["name"])
    for name, row in result["forms"].items():
        share = 100 * row["flop_per_second"] / peak
        print(
            f"  {name:24}{1e3 * row['median']:10.3f} ms ({1e3 * row['low']:.3f} to {1e3 * row['high']:.3f})"
            f"{row['flop_per_second'] / 1e12:10.3f} TFLOP/s {share:5.1f} % of the peak, error {row['error']:.1e}"
        )
    for name, why in result["left_out"].items():
        print(f"  {name:24}left out: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Races the forms of what a chunk is made of.")
    parser.add_argument("which", choices=[*RACES, "all"])
    parser.add_argument("--preset", choices=sorted(CONVOLUTIONS), default="1.3b", help="default: 1.3b")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--rounds", type=int, default=5, help="times that each form is measured (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the report here too")
    args = parser.parse_args()

    dtype = jnp.dtype(args.dtype or default_dtype())
    peak = matmul_peak(dtype.type)
    report: dict[str, Any] = {"machine": machine(), "dtype": dtype.name, "preset": args.preset}
    report["matmul_peak_flop_per_second"] = peak
    print(
        f"{report['machine']['device']}, jax {report['machine']['jax']}, {dtype.name}, peak {peak / 1e12:.3g} TFLOP/s"
    )
    for which in RACES if args.which == "all" else (args.which,):
        report[which] = []
        for contest in RACES[which](Sizes(args.preset, dtype.type)):
            report[which].append(run_race(contest, args.rounds, TOLERANCE[dtype.name]))
            show(report[which][-1], peak)
            write_report(args.json, report)  # after each: a later one may run out of memory or of time


if __name__ == "__main__":
    main()
