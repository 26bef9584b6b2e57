"""Training the embedded DiT and its text encoder: flow matching, chunk by chunk, with the cache of inference.

A sequence is chunk 0 of a video and a run of later chunks, at once or some seconds on, as the sink and the window see
them. It is trained in its order, as it would be generated:

- *Few steps.* Every chunk is denoised at the noise levels of the few-step schedule, and only there.
- *Own outputs as context* (Bengio et al. 2015, scheduled sampling, arXiv:1506.03099; Huang et al. 2025, Self Forcing,
  arXiv:2506.08009). What enters the cache is in part the network's own one-step estimate of the chunk, in part the
  true chunk with a little noise; the target stays the true next chunk, so errors of the context are corrected.
- *Coupled noise* (Pooladian et al. 2023, multisample flow matching, arXiv:2304.14772). In chunk 0 nothing but noise
  says where things start, and at high noise a regression answers with the mean of all places: a blur that a few
  steps do not mend. So at the two highest levels the noise is drawn given the places (`coupled_noise`). Over all
  videos it stays normal, and the network has one sharp answer.
- *Estimates as the sampler brings them* (`first_chunk_start`). A level of chunk 0 begins from the estimate of the one
  before, which is less than true: at the second level it is one of unrelated noise, as the sampler draws the noise of
  every level anew; at the lower ones things are where they should be and do not look as the caption says. The
  network's own estimates do not serve there: what they have lost cannot be known, so a regression leaves it out.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from streamt1_jax.config import PATCH, ModelConfig, StreamConfig
from streamt1_jax.mini.sequences import Sequences
from streamt1_jax.mini.training import Task
from streamt1_jax.mini.world import OPENINGS
from streamt1_jax.models.dit import KV, CausalWanDiT, Past
from streamt1_jax.models.umt5 import UMT5Encoder, encode_prompt
from streamt1_jax.networks import network_graph
from streamt1_jax.schedule import few_step_schedule
from streamt1_jax.types import Chunk, Scalar

COUPLED_LEVELS = 2  # of the schedule, from the noisiest on
FIRST_CHUNK_WEIGHT = 2.0  # all goes on from chunk 0, for which there is nothing but noise and prompt
FIRST_LEVEL_SHARE = 0.25  # of the coupled draws of chunk 0; of the first level's estimate hardly anything is left later
OTHER_LOOKS_SHARE = 0.6  # of the draws of chunk 0 at lower levels that begin from things of other looks
CONTEXT_NOISE = 0.3  # at most; the sigma of what is added to a true chunk in the cache
OWN_OUTPUT_SHARE = 0.4  # of the chunks in the cache
APPENDED_SHARE = 0.3  # of the chunks that see a sink more

Flow = Callable[[Chunk, Array], Chunk]  # of a noisy chunk at a level of the schedule


def coupled_noise(noise: Float[Array, "f C h w"], openings: Float[Array, "2 6"]) -> Float[Array, "f C h w"]:
    """`noise` that says where and how the two things start, and is still normal over all openings.

    All is said in the first frame, in the patch that the thing's centre starts in, where the network finds it next to
    what it draws. A patch reads one normal number a channel, on a checkerboard, of which a latent has hardly any:

    - a channel a thing is its mark: its reading is the largest of all patches away from the border. Two readings
      change places for that, so they stay independent and normal if starts are uniform.
    - the next six channels read, in the marked patch, where in the patch the centre is (x, y) and the other openings.
    """
    board = jnp.array([[1.0, -1.0], [-1.0, 1.0]], noise.dtype) / PATCH
    first = rearrange(noise[0], "c (y i) (x j) -> c y x i j", i=PATCH, j=PATCH)
    found = jnp.einsum("cyxij,ij->cyx", first, board)
    wanted = found
    inner = jnp.zeros(found.shape[1:], bool).at[1:-1, 1:-1].set(True)
    for i in range(2):
        mark = i * (1 + OPENINGS)
        at, offsets = _start_patch(openings[i], found.shape[1:])
        largest = jnp.unravel_index(jnp.argmax(jnp.where(inner, found[mark], -jnp.inf)), inner.shape)
        wanted = wanted.at[(mark, *largest)].set(found[(mark, *at)]).at[(mark, *at)].set(found[(mark, *largest)])
        said = jnp.concatenate([offsets, openings[i, 2:]])
        wanted = wanted.at[(slice(mark + 1, mark + 1 + OPENINGS), *at)].set(said)
    first = first + (wanted - found)[..., None, None] * board
    return noise.at[0].set(rearrange(first, "c y x i j -> c (y i) (x j)"))


def _start_patch(opening: Float[Array, "6"], grid: tuple[int, ...]) -> tuple[tuple[Array, Array], Float[Array, "2"]]:
    """The patch (row, column) that a thing's centre starts in, and where in it: (x, y) as normal numbers.

    Starts are uniform over all patches but those at the border (`world.EDGE` is a patch).
    """
    inner = jnp.array([grid[1] - 2, grid[0] - 2])
    place = jax.scipy.stats.norm.cdf(opening[:2]) * inner.astype(jnp.float32)
    patch = jnp.minimum(place.astype(jnp.int32), inner - 1)
    inside = jnp.clip(place - patch.astype(jnp.float32), 1e-3, 1 - 1e-3)
    return (1 + patch[1], 1 + patch[0]), jax.scipy.stats.norm.ppf(inside)


def dit_task(
    name: str,
    config: ModelConfig,
    stream: StreamConfig,
    data: Sequences,
    start: PyTree | None = None,
    *,
    steps: int,
    batch: int,
    seed: int = 0,
) -> Task:
    """The training of {"dit", "text"}.

    Args:
        data: encoded sequences; a batch is drawn from them.
        start: parameters to go on from; None: random ones.
    """
    dit_graph, _ = network_graph(config, "dit", jnp.float32)
    text_graph, _ = network_graph(config, "text", jnp.float32)

    def init() -> PyTree:
        return jax.tree.map(jnp.copy, _random_start(config, seed) if start is None else start)

    def one(params: PyTree, example: Sequences, key: Array) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        dit = nnx.merge(dit_graph, params["dit"])
        dit.unroll = config.dit.num_layers  # its gradient need not gather what every turn of a loop has kept
        return sequence_losses(dit, nnx.merge(text_graph, params["text"]), stream, example, key)

    def loss(params: PyTree, examples: Sequences, key: Array) -> tuple[Scalar, dict[str, Scalar]]:
        keys = jax.random.split(key, batch)
        losses, weights = jax.vmap(one, in_axes=(None, 0, 0))(params, examples, keys)
        figures = {"chunk_0": jnp.mean(losses[:, 0]), "last_chunk": jnp.mean(losses[:, -1])}
        return jnp.sum(losses * weights) / jnp.sum(weights), figures

    def draw(step: int) -> Sequences:
        rows = np.random.default_rng((seed, step)).choice(len(data.latents), batch, replace=False)
        return Sequences(*(leaf[np.sort(rows)] for leaf in data))

    return Task(name, init, draw, loss, steps, learning_rate=2e-3)


def sequence_losses(
    dit: CausalWanDiT, encoder: UMT5Encoder, stream: StreamConfig, example: Sequences, key: Array
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """(loss, weight) of every chunk of one sequence, each with those before it in the cache.

    Args:
        example: without its leading axis.
    """
    latents, other_looks, openings, tokens, mask = map(
        jnp.asarray, (example.latents, example.other_looks, example.openings, example.tokens, example.mask)
    )
    schedule = few_step_schedule(stream)
    sigmas = jnp.asarray(schedule.sigmas, jnp.float32)
    steps = dit.encode_time(jnp.asarray(schedule.timesteps, jnp.float32))
    context_time = dit.encode_time(jnp.full((1,), stream.context_noise, jnp.float32))
    text = dit.encode_text(encode_prompt(encoder, tokens, mask))
    losses, caches = [], []
    for chunk, clean in enumerate(latents):
        key, key_levels, key_start, key_context, key_past = jax.random.split(key, 5)
        past, start_frame = _past(caches, stream, key_past), example.start[chunk]

        def flow(noisy: Chunk, level: Array, past=past, start_frame=start_frame) -> Chunk:
            return dit(noisy, jax.tree.map(lambda x: x[level][None], steps), text, past, start_frame)

        levels = _draw_levels(len(sigmas), key_levels, first=chunk == 0)
        if chunk == 0:
            begun, noises = first_chunk_start(flow, clean, other_looks, openings, levels, key_start)
        else:
            noises = jax.random.normal(key_start, (len(levels), *clean.shape))
            begun = jnp.broadcast_to(clean, noises.shape)
        loss, estimates = jax.vmap(functools.partial(_flow_loss, flow, sigmas, clean))(levels, begun, noises)
        losses.append(jnp.mean(loss))
        if chunk + 1 < len(latents):
            seen = _context(clean, estimates[-1], key_context)
            caches.append(dit.context(seen, context_time, text, past, start_frame))
    weights = jnp.ones(len(latents)).at[0].set(FIRST_CHUNK_WEIGHT)
    if len(latents) > 1:  # after a gap in time the first chunk has no neighbour to go on from
        follows = example.start[1] == stream.latent_frames_per_chunk
        weights = weights.at[1].set(follows.astype(jnp.float32))
    return jnp.stack(losses), weights


def _random_start(config: ModelConfig, seed: int) -> PyTree:
    """Random; the flow is zero and every block nearly the identity (Peebles and Xie 2023, arXiv:2212.09748)."""
    dit = CausalWanDiT(config.dit, rngs=nnx.Rngs(seed))
    text = UMT5Encoder(config.text, dtype=jnp.float32, rngs=nnx.Rngs(seed + 1))
    made = {"dit": nnx.split(dit)[1], "text": nnx.split(text)[1]}
    for layer in (made["dit"]["head"]["projection"], made["dit"]["time_projection"]):
        layer["kernel"] = jax.tree.map(jnp.zeros_like, layer["kernel"])
    return made


def _draw_levels(count: int, key: Array, *, first: bool) -> Int[Array, "2"]:
    """One of the noisier half of `count` levels and one of the others."""
    key_high, key_low, key_first = jax.random.split(key, 3)
    noisier = jax.random.randint(key_high, (), 0, count // 2)
    if first:
        noisier = jnp.where(jax.random.bernoulli(key_first, FIRST_LEVEL_SHARE), 0, 1)
    return jnp.stack([noisier, jax.random.randint(key_low, (), count // 2, count)])


def first_chunk_start(
    flow: Flow, clean: Chunk, other_looks: Chunk, openings: Float[Array, "2 6"], levels: Int[Array, " l"], key: Array
) -> tuple[Float[Array, "l f C h w"], Float[Array, "l f C h w"]]:
    """(estimates, noises) that chunk 0 begins from at each of `levels`.

    Args:
        flow: by the network as it is.
        clean: the true chunk.
        other_looks: the same, if things looked otherwise.
        openings: of the scene.
    """
    key_guess, key_starts = jax.random.split(key)
    unrelated = jax.random.normal(key_guess, clean.shape)
    guess = jax.lax.stop_gradient(unrelated - flow(unrelated, jnp.int32(0)))  # sigma is 1 at the first level

    def start(level: Array, key: Array) -> tuple[Chunk, Chunk]:
        key_noise, key_share, key_whether = jax.random.split(key, 3)
        noise = jax.random.normal(key_noise, clean.shape)
        coupled = level < COUPLED_LEVELS
        share = jax.random.uniform(key_share) * jax.random.bernoulli(key_whether, OTHER_LOOKS_SHARE).astype(jnp.float32)
        estimate = jnp.where(coupled, guess, clean + share * (other_looks - clean))
        return estimate, jnp.where(coupled, coupled_noise(noise, openings), noise)

    return jax.vmap(start)(levels, jax.random.split(key_starts, len(levels)))


def _flow_loss(
    flow: Flow, sigmas: Array, clean: Chunk, level: Array, begun: Chunk, noise: Chunk
) -> tuple[Scalar, Chunk]:
    """(loss, estimate of the clean chunk) at a level that begins from the estimate `begun` and noise.

    The loss is the mean square of what the estimate is off the true chunk, over sigma: that of flow matching, where
    `begun` is the true chunk.
    """
    noisy = (1 - sigmas[level]) * begun + sigmas[level] * noise
    found = flow(noisy, level)
    return jnp.mean((found - (noisy - clean) / sigmas[level]) ** 2), noisy - sigmas[level] * found


def _past(caches: list[KV], stream: StreamConfig, key: Array) -> Past | None:
    """What the next chunk attends to: the sinks, the window, and at times one older chunk, as an appended sink."""
    if not caches:
        return None
    sinks, window = stream.sink_chunks, stream.window_chunks
    recent = max(sinks, len(caches) - window)
    seen = caches[:sinks] + caches[recent:]
    tokens = caches[0].k.shape[1]
    length = jnp.int32(len(seen) * tokens)
    older = caches[sinks:recent]
    if older:
        key_which, key_whether = jax.random.split(key)
        which = jax.random.randint(key_which, (), 0, len(older))
        seen = [*seen, jax.tree.map(lambda *leaves: jnp.stack(leaves)[which], *older)]
        length = length + tokens * jax.random.bernoulli(key_whether, APPENDED_SHARE)
    return Past(KV(*(jnp.concatenate(leaves, axis=1) for leaves in zip(*seen, strict=True))), length)


def _context(clean: Chunk, estimate: Chunk, key: Array) -> Chunk:
    """What enters the cache: the network's own estimate, or the true chunk with a little noise."""
    key_own, key_size, key_noise = jax.random.split(key, 3)
    sigma = jnp.maximum(jax.random.uniform(key_size, minval=-CONTEXT_NOISE, maxval=CONTEXT_NOISE), 0.0)
    noisy = clean + sigma * jax.random.normal(key_noise, clean.shape)
    own = jax.random.bernoulli(key_own, OWN_OUTPUT_SHARE)
    return jnp.where(own, jax.lax.stop_gradient(estimate), noisy)
