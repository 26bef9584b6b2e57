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
- *Imperfect estimates* (`first_chunk_inputs`). The sampler begins every level of chunk 0 from the estimate of the one
  before, which is less than true. At the second level it is of no use, as the noise is drawn anew: there training
  begins from one of unrelated noise. At the lower levels training begins, more often than not, from the true scene with
  things of other looks mixed in: places are to be taken from the estimate, looks from the caption. The network's own
  estimates do not serve there: what they have lost cannot be known, so a regression leaves it out. Later chunks, which
  have the cache to go by, begin every level from the truth.
- *Clauses*. Of two things the first is to be drawn at the first mark, but the text encoder starts with no bias for any
  position, so that a caption is a bag of words: each thing is drawn at each mark by half, and what would tell them
  apart, words that know their clause and marks that ask for one, is of use together only. Training rested on that
  saddle for a hundred thousand chunks. So the text encoder is also trained to say of every token whose it is.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from streamt1_jax.config import PATCH, ModelConfig, StreamConfig
from streamt1_jax.mini.sequences import CLAUSES, Sequences
from streamt1_jax.mini.training import Task, seed_of
from streamt1_jax.mini.world import OPENINGS
from streamt1_jax.models.dit import KV, CausalWanDiT, Past
from streamt1_jax.models.umt5 import UMT5Encoder, encode_prompt
from streamt1_jax.networks import network_graph
from streamt1_jax.schedule import Schedule, few_step_schedule
from streamt1_jax.types import Chunk, PromptEmbeds, Scalar

COUPLED_LEVELS = 2  # of the schedule, from the noisiest on
FIRST_LEVEL_SHARE = 0.25  # of the coupled draws of chunk 0; of its estimate 17 % enter the second level
OTHER_LOOKS_SHARE = 0.6  # of the draws of chunk 0 at lower levels that begin from things of other looks
CONTEXT_NOISE = 0.3  # at most; the sigma of what is added to a true chunk in the cache
OWN_OUTPUT_SHARE = 0.4  # of the chunks in the cache
APPENDED_SHARE = 0.3  # of the chunks that see a sink more
CLAUSE_WEIGHT = 0.3  # of the loss by which tokens learn their clause

Velocity = Callable[[Chunk, Int[Array, ""]], Chunk]  # of a noisy chunk at a level of the schedule, by the network


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
    sets: list[tuple[Sequences, int]],
    start: PyTree | None = None,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> Task:
    """The training of {"dit", "text"}, and of "clause_head", which training alone needs.

    Args:
        sets: encoded sequences, and how many of them are in a batch; the figures are those of the first set.
        start: parameters to go on from, with or without "clause_head"; None: random ones.
    """
    schedule = few_step_schedule(stream, config)
    dit_graph, _ = network_graph(config, "dit", jnp.float32)
    text_graph, _ = network_graph(config, "text", jnp.float32)

    def init() -> PyTree:
        head = {"clause_head": jnp.zeros((config.text.dim, CLAUSES))}
        return jax.tree.map(jnp.copy, head | (_random_start(config, seed) if start is None else start))

    def one(params: PyTree, example: Sequences, key: Array) -> tuple[Float[Array, " c"], Float[Array, " c"], Scalar]:
        """`sequence_losses` and `clause_loss` by these parameters."""
        dit = nnx.merge(dit_graph, params["dit"])
        dit.unroll = config.dit.num_layers  # its gradient need not gather what every turn of a loop has kept
        tokens, mask, clauses = map(jnp.asarray, (example.tokens, example.mask, example.clauses))
        prompt = encode_prompt(nnx.merge(text_graph, params["text"]), tokens, mask)
        losses, weights = sequence_losses(dit, prompt, stream, schedule, example, key)
        return losses, weights, clause_loss(prompt @ params["clause_head"], clauses, mask)

    def loss(params: PyTree, examples: tuple[Sequences, ...], key: Array) -> tuple[Scalar, dict[str, Scalar]]:
        made = []
        for part, part_key in zip(examples, jax.random.split(key, len(sets)), strict=True):
            keys = jax.random.split(part_key, len(part.latents))
            made.append(jax.vmap(one, in_axes=(None, 0, 0))(params, part, keys))
        losses, weights, clause = (jnp.concatenate([x.ravel() for x in leaves]) for leaves in zip(*made, strict=True))
        first, clause = made[0][0], jnp.mean(clause)
        figures = {"chunk_0": jnp.mean(first[:, 0]), "last_chunk": jnp.mean(first[:, -1]), "clause": clause}
        return jnp.sum(losses * weights) / jnp.sum(weights) + CLAUSE_WEIGHT * clause, figures

    def draw(step: int) -> tuple[Sequences, ...]:
        rng = np.random.default_rng((seed_of(name, seed), step))
        return tuple(_draw(rng, *part) for part in sets)

    return Task(name, init, draw, loss, steps, learning_rate)


def _draw(rng: np.random.Generator, data: Sequences, count: int) -> Sequences:
    rows = np.sort(rng.choice(len(data.latents), count, replace=False))
    return Sequences(*(leaf[rows] for leaf in data))


def clause_loss(logits: Float[Array, "P k"], clauses: Int[Array, "P"], mask: Int[Array, "P"]) -> Scalar:
    """Cross entropy of the clause that every token belongs to; padding does not count."""
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), clauses[:, None], axis=1)[:, 0]
    return -jnp.mean(right, where=mask != 0)


def sequence_losses(
    dit: CausalWanDiT,
    prompt: PromptEmbeds,
    stream: StreamConfig,
    schedule: Schedule,
    example: Sequences,
    key: Array,
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """(loss, weight in the mean) of every chunk of one sequence, each with those before it in the cache.

    Args:
        example: without its leading axis.
    """
    latents, other_looks, openings = map(jnp.asarray, (example.latents, example.other_looks, example.openings))
    if len(schedule.sigmas) != 2 * COUPLED_LEVELS:
        raise ValueError(f"the embedded model is trained for {2 * COUPLED_LEVELS} steps, not {len(schedule.sigmas)}")
    sigmas = jnp.asarray(schedule.sigmas, jnp.float32)
    steps = dit.encode_time(jnp.asarray(schedule.timesteps, jnp.float32))
    context_time = dit.encode_time(jnp.full((1,), stream.context_noise, jnp.float32))
    text = dit.encode_text(prompt)
    losses, caches = [], []
    for chunk, clean in enumerate(latents):
        key, key_inputs, key_context, key_past = jax.random.split(key, 4)
        past, start_frame = _past(caches, stream, key_past), example.start[chunk]

        def velocity(noisy: Chunk, level: Int[Array, ""], past=past, start_frame=start_frame) -> Chunk:
            return dit(noisy, jax.tree.map(lambda x: x[level][None], steps), text, past, start_frame)

        if chunk == 0:
            inputs = first_chunk_inputs(velocity, clean, other_looks, openings, key_inputs)
        else:
            inputs = _later_chunk_inputs(clean, key_inputs)
        loss, estimates = jax.vmap(functools.partial(level_loss, velocity, sigmas, clean))(*inputs)
        losses.append(jnp.mean(loss))
        if chunk + 1 < len(latents):
            seen = _context(clean, estimates[1], key_context)
            caches.append(dit.context(seen, context_time, text, past, start_frame))
    weights = jnp.ones(len(latents))
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


class Inputs(NamedTuple):
    """What a chunk is denoised from in training: at one of the two noisier levels and at a lower one."""

    level: Int[Array, " 2"]
    estimate: Float[Array, "2 f C h w"]
    noise: Float[Array, "2 f C h w"]


def first_chunk_inputs(
    velocity: Velocity, clean: Chunk, other_looks: Chunk, openings: Float[Array, "2 6"], key: Array
) -> Inputs:
    """Stand-ins for what the sampler has at two levels of chunk 0.

    | level | estimate | noise |
    |---|---|---|
    | 0 or 1 | the network's own, made of unrelated noise; not trained by this, and of no weight at 0 | coupled |
    | 2 or 3 | the true chunk, in `OTHER_LOOKS_SHARE` of the draws with some of `other_looks` mixed in | independent |

    Args:
        clean: the true chunk.
        other_looks: the same, if things looked otherwise.
        openings: of the scene.
    """
    keys = dict(zip(("guess", "level", "whether", "share", "lower"), jax.random.split(key, 5), strict=True))
    unrelated = jax.random.normal(keys["guess"], clean.shape)
    guess = jax.lax.stop_gradient(unrelated - velocity(unrelated, jnp.int32(0)))  # sigma is 1 at the first level
    coupled = jnp.where(jax.random.bernoulli(keys["level"], FIRST_LEVEL_SHARE), 0, 1)
    share = jnp.where(jax.random.bernoulli(keys["whether"], OTHER_LOOKS_SHARE), jax.random.uniform(keys["share"]), 0.0)
    lower, noises = _lower_level_and_noises(keys["lower"], clean)
    return Inputs(
        jnp.stack([coupled, lower]),
        jnp.stack([guess, clean + share * (other_looks - clean)]),
        noises.at[0].set(coupled_noise(noises[0], openings)),
    )


def _later_chunk_inputs(clean: Chunk, key: Array) -> Inputs:
    """At both levels the true chunk, and independent noise."""
    key_level, key_lower = jax.random.split(key)
    noisier = jax.random.randint(key_level, (), 0, COUPLED_LEVELS)
    lower, noises = _lower_level_and_noises(key_lower, clean)
    return Inputs(jnp.stack([noisier, lower]), jnp.broadcast_to(clean, noises.shape), noises)


def _lower_level_and_noises(key: Array, clean: Chunk) -> tuple[Int[Array, ""], Float[Array, "2 f C h w"]]:
    key_level, key_noise = jax.random.split(key)
    level = jax.random.randint(key_level, (), COUPLED_LEVELS, 2 * COUPLED_LEVELS)
    return level, jax.random.normal(key_noise, (2, *clean.shape))


def level_loss(
    velocity: Velocity,
    sigmas: Float[Array, " l"],
    clean: Chunk,
    level: Int[Array, ""],
    estimate: Chunk,
    noise: Chunk,
) -> tuple[Scalar, Chunk]:
    """(loss, new estimate of the clean chunk) at a level that begins from `estimate` and `noise`.

    The noisy chunk is x = (1 - sigma) estimate + sigma noise, and the network answers with v, so that its new estimate
    is x - sigma v. That is the clean chunk for v = (x - clean) / sigma, the target; it is noise - clean, that of flow
    matching, if `estimate` is clean. The loss is the mean of (v - target)^2: the squared error over sigma^2 (never 0).
    """
    noisy = (1 - sigmas[level]) * estimate + sigmas[level] * noise
    answer = velocity(noisy, level)
    return jnp.mean((answer - (noisy - clean) / sigmas[level]) ** 2), noisy - sigmas[level] * answer


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
