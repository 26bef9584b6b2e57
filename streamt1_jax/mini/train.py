"""`streamt1 train-mini`: the embedded model from nothing, in stages that each resume where they were stopped.

vae        short clips, on which shapes and colours are learned quickly
vae_long   longer ones: a causal network sees more and more of the past as a video goes on
vae_stream the end of clips after a long past, as in the middle of a video
decoder    the VAE's decoder alone, on latents with noise
(encode)   first chunks of the world as latents, kept in the folder
dit_first  first chunks alone, many at a time: where noise says that things are is learned from nothing else
(encode)   sequences
dit        whole sequences, with the cache of inference, and more first chunks
rewards    one for frames, one for motion; they see pixels and captions alone, so they can be trained at any time
"""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from streamt1_jax.config import ModelConfig, StreamConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.interrupts import Interrupts
from streamt1_jax.mini import world
from streamt1_jax.mini.sequences import BATCH, Sequences, encode_sequences, join
from streamt1_jax.mini.shipped import add_to_mini, load_mini, read_manifest
from streamt1_jax.mini.train_dit import dit_task
from streamt1_jax.mini.train_rewards import accuracy_by_kind, reward_task
from streamt1_jax.mini.train_vae import decoder_task, standardise, vae_task, with_decoder
from streamt1_jax.mini.training import Task, fit
from streamt1_jax.networks import network_graph
from streamt1_jax.outputs import make_folder
from streamt1_jax.rewards.registry import Role
from streamt1_jax.text import Tokenizer
from streamt1_jax.weights import MiniWeights

Report = Callable[[str, dict[str, float]], None]
DIT_KEYS = ("first_chunks", "sequences", "dit_first", "dit_first_batch", "dit", "dit_batch", "chunks")
DECODER_KEYS = ("decoder",)
REWARD_KEYS = ("reward_short", "reward_long")
ONLY_REWARDS = "--only rewards "  # the option that trains them alone
ENCODED_PART = 50 * BATCH  # scenes in a file of an encoded set
# Learning rates of dit_first and dit. High ones learn sooner from nothing, and unlearn what trained weights know.
RATES_FROM_NOTHING = (4e-3, 2e-3)
RATES_GOING_ON = (2e-3, 1e-3)
FIRSTS_A_SEQUENCE = 2  # first chunks in a batch beside each of its sequences


@dataclass(frozen=True)
class Recipe:
    """Steps of every stage, what is encoded, and batch sizes. Two CPU cores need three hours or so for the defaults."""

    vae: int = 1500
    vae_long: int = 1400
    vae_stream: int = 400
    decoder: int = 1200
    first_chunks: int = 12000  # scenes of which chunk 0 alone is encoded
    sequences: int = 1200
    dit_first: int = 9000
    dit_first_batch: int = 12
    dit: int = 1800
    dit_batch: int = 6
    chunks: int = 5  # of a sequence
    reward_short: int = 3000
    reward_long: int = 3000

    def __post_init__(self):
        wrong = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) < 1]
        if wrong:
            raise BadInputError(f"{', '.join(wrong)} must be at least 1; leave the key out for its default")
        firsts = max(self.dit_first_batch, FIRSTS_A_SEQUENCE * self.dit_batch)
        if firsts > self.first_chunks or self.dit_batch > self.sequences:
            raise BadInputError(
                f"a batch cannot be larger than its set: dit_first_batch is {self.dit_first_batch} and "
                f"{FIRSTS_A_SEQUENCE} dit_batch {FIRSTS_A_SEQUENCE * self.dit_batch} of first_chunks "
                f"{self.first_chunks}, dit_batch {self.dit_batch} of sequences {self.sequences}"
            )

    @classmethod
    def parse(cls, text: str | None, keys: tuple[str, ...] | None = None) -> "Recipe":
        """`vae=100,dit=50`: the named numbers instead of the defaults.

        Args:
            keys: the numbers that matter, and so the names there are; None: all.

        Raises:
            BadInputError: an unknown name, or no whole number of at least 1.
        """
        if not text:
            return cls()
        known = keys or [f.name for f in dataclasses.fields(cls)]
        found = {}
        for pair in text.split(","):
            key, _, value = pair.partition("=")
            if key not in known or not value.isdecimal():
                raise BadInputError(f"--steps has {pair!r}, expected NAME=NUMBER with a name of {', '.join(known)}")
            found[key] = int(value)
        return cls(**found)


@dataclass(frozen=True)
class Run:
    """One training: where it is kept, by which numbers, and who hears of it."""

    out: Path  # weights, checkpoints and logs
    recipe: Recipe
    seed: int = 0
    resume: bool = False  # go on in a folder that has checkpoints
    report: Report | None = None  # called with a stage's name and its figures
    interrupts: Interrupts | None = None  # as in `fit`
    commit: str | None = field(default_factory=lambda: _commit())  # read once: a training is of the code it began with

    def begin(
        self, *, keys: tuple[str, ...] = (), options: str = "", more: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """How weights are made, written to `<out>/run.json` before the first stage; a later call must be the same run.

        Args:
            keys: numbers of the recipe that matter; none named: all.
            options: of the command, before the steps.
            more: goes into the record.

        Returns:
            The record; its commit is None without git or a repository, and ends in "-dirty" where files had changed.

        Raises:
            BadInputError: the folder holds a run of other numbers, or one of the same and `resume` is False.
        """
        numbers = dataclasses.asdict(self.recipe).items()
        steps = ",".join(f"{key}={value}" for key, value in numbers if not keys or key in keys)
        record = {
            "summary": f"trained on the little world (seed {self.seed})",
            "command": f"streamt1 train-mini {options}--steps {steps} --seed {self.seed}",
            "commit": self.commit,
            "seed": self.seed,
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            **more,
        }
        make_folder(self.out, parents=True)
        path = self.out / ("run_rewards.json" if keys == REWARD_KEYS else "run.json")
        if not path.exists():
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            return record
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in ("command", "start_sha256") if record.get(key) != earlier.get(key)]
        if other:
            said = "; ".join(f"{key} is {record.get(key)!r}, was {earlier.get(key)!r}" for key in other)
            raise BadInputError(f"{self.out} holds another run: {said}; name another folder")
        if not self.resume:
            raise BadInputError(f"{self.out} holds this run already; pass --resume, or name another folder")
        changed = {key: record[key] for key in ("commit", "python", "jax", "backend") if record[key] != earlier[key]}
        if changed and changed not in earlier.setdefault("resumed_with", []):
            earlier["resumed_with"].append(changed)
            path.write_text(json.dumps(earlier, indent=2) + "\n", encoding="utf-8")
        return earlier

    def fit(self, task: Task) -> PyTree:
        """Trains one stage."""
        say = None if self.report is None else functools.partial(self.report, task.name)
        return fit(task, self.out, seed=self.seed, resume=self.resume, report=say, interrupts=self.interrupts)

    def encode(self, config: ModelConfig, vae: PyTree, count: int, chunks: int) -> Sequences:
        """A training set; a stopped run finds what it had encoded in a folder of its own.

        Raises:
            BadInputError: what it finds was written by another version.
        """
        folder = self.out / f"sequences_{count}x{chunks}"
        make_folder(folder, parents=True)
        paths = [folder / f"{first}.npz" for first in range(0, count, ENCODED_PART)]
        kept = next((i for i, path in enumerate(paths) if not path.exists()), len(paths))
        tokenizer = Tokenizer(MiniWeights.tokenizer, text_len=config.dit.text_len, vocab_size=config.text.vocab_size)
        numbers = {"count": count, "chunks": chunks, "seed": self.seed, "first": kept * ENCODED_PART}
        batches = encode_sequences(config, vae, tokenizer, **numbers)
        for i, path in enumerate(paths[kept:], start=kept):
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **join(itertools.islice(batches, ENCODED_PART // BATCH))._asdict())
            partial.replace(path)
            if self.report is not None:
                self.report("encode", {"step": min((i + 1) * ENCODED_PART, count), "steps": count})
        return join(map(_load_part, paths))


def _load_part(path: Path) -> Sequences:
    with np.load(path) as stored:
        missing = set(Sequences._fields) - set(stored.files)
        if missing:
            raise BadInputError(f"{path} is of another version: it lacks {', '.join(missing)}; name another folder")
        return Sequences(**{key: stored[key] for key in Sequences._fields})


def train_mini(run: Run) -> None:
    """Trains all networks; writes `mini.safetensors` and `mini.json` into `run.out`, and checkpoints beside them.

    Raises:
        BadInputError: checkpoints are there already and `run.resume` is False.
        TrainingError: a loss is not finite.
        KeyboardInterrupt: a signal asked for it.
    """
    config, recipe, seed = ModelConfig.mini(), run.recipe, run.seed
    run.begin(keys=REWARD_KEYS, options=ONLY_REWARDS)  # first, or it would fail at the end
    origin = run.begin()
    short = functools.partial(vae_task, batch=8, frames=5, crop=48, decay_steps=2 * recipe.vae)
    vae = run.fit(short("vae", config, steps=recipe.vae, seed=seed))
    longer = functools.partial(vae_task, batch=4, crop=48)
    vae = run.fit(longer("vae_long", config, vae, steps=recipe.vae_long, frames=17, seed=seed))
    late = functools.partial(longer, frames=8, history=73, ema_decay=0.99)  # a short stage: its average forgets sooner
    vae = run.fit(late("vae_stream", config, vae, steps=recipe.vae_stream, seed=seed))
    vae = standardise(config, vae, _latents_of_the_world(config, vae))
    vae = with_decoder(vae, run.fit(decoder_task(config, vae, steps=recipe.decoder, seed=seed)))
    made = _train_dit(run, config, vae, None)
    add_to_mini(run.out, {"vae": vae, **made}, origin)
    train_rewards(dataclasses.replace(run, resume=True))


def continue_dit(run: Run, start: Path) -> None:
    """Goes on with the DiT and the text encoder of earlier weights; writes them with the other networks into `run.out`.

    Args:
        run: another seed than that of `start` brings other scenes and other noise.
        start: holds `mini.safetensors`.

    Raises:
        BadInputError: as in `train_mini`; also if `run.out` is `start`, or those weights were trained with this seed.
        WeightsError: what stands in `start` is damaged or of another size.
        TrainingError, KeyboardInterrupt: as in `train_mini`.
    """
    config, old, origin = _begin_from(run, start, DIT_KEYS)
    made = _train_dit(run, config, old["vae"], {name: old[name] for name in ("dit", "text")})
    add_to_mini(run.out, made, origin, start=start)


def continue_decoder(run: Run, start: Path) -> None:
    """Goes on with the decoder of earlier weights; arguments, results and errors are those of `continue_dit`."""
    config, old, origin = _begin_from(run, start, DECODER_KEYS, options="--only decoder ")
    task = decoder_task(config, old["vae"], steps=run.recipe.decoder, seed=run.seed)
    add_to_mini(run.out, {"vae": with_decoder(old["vae"], run.fit(task))}, origin, start=start)


def _begin_from(
    run: Run, start: Path, keys: tuple[str, ...], options: str = ""
) -> tuple[ModelConfig, dict[str, PyTree], dict[str, Any]]:
    """(their sizes, the networks to go on from, what to write of their making), after `Run.begin`."""
    if run.out.resolve() == start.resolve():
        raise BadInputError(f"{run.out} is where the training starts from; write into another folder")
    manifest = read_manifest(start)
    config = dataclasses.replace(ModelConfig.mini(), timestep_shift=manifest["timestep_shift"])
    abstract = {name: network_graph(config, name, jnp.float32)[1] for name in ("vae", "dit", "text")}
    old = {name: load_mini(start, name, network) for name, network in abstract.items()}
    origin = manifest["origin"]
    if run.seed in {record.get("seed") for record in (origin, *origin.get("continued", []))}:
        raise BadInputError(
            f"seed is {run.seed}, with which {start} was trained already; name another, for other scenes and noise"
        )
    record = run.begin(keys=keys, options=f"{options}--start DIR ", more={"start_sha256": manifest["sha256"]})
    return config, old, {"continued": [*origin.get("continued", []), record]}


def _train_dit(run: Run, config: ModelConfig, vae: PyTree, start: PyTree | None) -> PyTree:
    """Encodes the world and trains {"dit", "text"} on it, from `start` or from nothing."""
    recipe, rates = run.recipe, RATES_FROM_NOTHING if start is None else RATES_GOING_ON
    dit = functools.partial(dit_task, config=config, stream=StreamConfig(), seed=run.seed)
    first = run.encode(config, vae, recipe.first_chunks, 1)
    alone = [(first, recipe.dit_first_batch)]
    made = run.fit(dit("dit_first", sets=alone, start=start, steps=recipe.dit_first, learning_rate=rates[0]))
    data = run.encode(config, vae, recipe.sequences, recipe.chunks)
    # First chunks beside them and a lower rate: few sequences alone unlearn what many first chunks have taught.
    sets = [(data, recipe.dit_batch), (first, FIRSTS_A_SEQUENCE * recipe.dit_batch)]
    made = run.fit(dit("dit", sets=sets, start=made, steps=recipe.dit, learning_rate=rates[1]))
    return {name: made[name] for name in ("dit", "text")}  # without what training alone needs


def train_rewards(run: Run) -> None:
    """Trains both rewards and puts them beside the networks that stand in `run.out`, if any.

    The record of how they were made says on which share of held-out scenes the good video scores above one degraded in
    each way. Errors are those of `train_mini`.
    """
    origin = run.begin(keys=REWARD_KEYS, options=ONLY_REWARDS)
    stages: dict[Role, int] = {"short": run.recipe.reward_short, "long": run.recipe.reward_long}
    made, accuracy = {}, {}
    for role, steps in stages.items():
        task = reward_task(role, steps=steps, seed=run.seed)
        made[task.name] = run.fit(task)
        accuracy[task.name] = accuracy_by_kind(role, made[task.name])
        if run.report is not None:
            run.report(f"{task.name}, held out", {"step": steps, "steps": steps} | accuracy[task.name])
    add_to_mini(run.out, made, {"rewards": origin | {"accuracy": accuracy}})


def _latents_of_the_world(config: ModelConfig, vae: PyTree) -> jax.Array:
    """Latents of some videos of training, 33 frames each: for their mean and size."""
    graph, _ = network_graph(config, "vae", jnp.float32)
    numbers = range(16)
    placed = world.stack([world.place(world.training_scene(n), world.draw_openings(n)) for n in numbers])

    def encode(vae: PyTree, placed: world.Placed) -> jax.Array:
        return nnx.merge(graph, vae).encoder.encode(world.render(placed, jnp.arange(33)))

    return jax.jit(jax.vmap(encode, in_axes=(None, 0)))(vae, placed)


def _commit() -> str | None:
    """The commit of this file; None where it is in no repository, be it installed inside another one."""
    run = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    try:
        if run(["git", "ls-files", "--error-unmatch", Path(__file__).name]).returncode != 0:
            return None
        return run(["git", "describe", "--always", "--dirty", "--abbrev=40"]).stdout.strip() or None
    except OSError:  # no git
        return None
