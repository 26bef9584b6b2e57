"""The training loop that every network of the embedded model shares.

- A `Task` is what differs from network to network: its parameters, its batches, its loss.
- A batch is a pure function of the step's number and everything else is in `TrainState`, which Orbax saves: a resumed
  run makes the same updates as one that was never stopped.
- What is shipped is an exponential moving average of the parameters.
"""

import contextlib
import functools
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from streamt1_jax.errors import BadInputError, TrainingError
from streamt1_jax.interrupts import Interrupts
from streamt1_jax.types import Scalar

Loss = Callable[[PyTree, PyTree, Array], tuple[Scalar, dict[str, Scalar]]]


@dataclass(frozen=True)
class Task:
    """One network to train."""

    name: str
    init: Callable[[], PyTree]  # the parameters before step 0
    batch: Callable[[int], PyTree]  # of step number i; NumPy arrays of fixed shapes
    loss: Loss  # (parameters, batch, key) -> loss, figures to print
    steps: int
    learning_rate: float
    decay_steps: int | None = None  # where the rate's cosine ends; None: with the last step
    warmup: int = 100  # steps
    ema_decay: float = 0.998


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    ema: PyTree  # moving average of `params`


def make_optimizer(task: Task) -> Any:
    """Muon for the matrices and AdamW for the rest, under a cosine that falls to a hundredth; gradients are clipped.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) takes steps of equal size in every direction of a
    matrix; scaled to the root mean square of Adam's steps (Liu et al. 2025, arXiv:2502.16982), both share one rate.
    """
    import optax

    warmup = min(task.warmup, task.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        task.learning_rate / 100,
        task.learning_rate,
        warmup,
        max(task.decay_steps or task.steps, warmup + 1),
        task.learning_rate / 100,
    )
    muon = optax.contrib.muon(
        schedule, adam_b2=0.99, consistent_rms=0.2, muon_weight_dimension_numbers=_matrices, weight_decay=1e-4
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _matrices(params: PyTree) -> PyTree:
    """Which axes of every kernel are its inputs and which its outputs; None for what is no matrix."""
    from optax.contrib import MuonDimensionNumbers

    def axes(path, leaf):
        if "['kernel']" not in jax.tree_util.keystr(path):
            return None
        # Of three axes the first is the layer; of a convolution all but the last are inputs.
        first = 1 if leaf.ndim == 3 else 0
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)


def init_train_state(task: Task) -> TrainState:
    """The state before step 0."""
    params = task.init()
    return TrainState(jnp.int32(0), params, make_optimizer(task).init(params), jax.tree.map(jnp.copy, params))


def seed_of(stage: str, seed: int) -> int:
    """A seed for the random numbers of one stage: a run has one, and its stages must not draw the same."""
    return zlib.crc32(f"{stage} {seed}".encode())


def make_train_step(task: Task, seed: int) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Scalar]]]:
    """One jitted update, `(state, batch) -> (state, figures)`; consumes the state."""
    import optax

    optimizer = make_optimizer(task)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Scalar]]:
        key = jax.random.fold_in(jax.random.key(seed_of(task.name, seed)), state.step)
        (loss, figures), gradient = jax.value_and_grad(task.loss, has_aux=True)(state.params, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers and multiplies floats by them
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average follows closely, or the random start would stay in it.
        made = state.step.astype(jnp.float32)
        decay = jnp.minimum(task.ema_decay, (1 + made) / (10 + made))
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state.ema, params)
        figures = figures | {"loss": loss, "gradient": optax.global_norm(gradient)}
        return TrainState(state.step + 1, params, optimizer_state, ema), figures

    return train_step


def fit(
    task: Task,
    folder: Path,
    *,
    seed: int,
    resume: bool = False,
    save_every: int = 500,
    report: Callable[[dict[str, float]], None] | None = None,
    report_every: int = 50,
    interrupts: Interrupts | None = None,
) -> PyTree:
    """Trains a network to its last step; returns the averaged parameters.

    Args:
        folder: for checkpoints, `<folder>/<task>/<step>`, of which the last two are kept, and `<task>.jsonl`.
        resume: go on from the newest checkpoint, if there is one.
        report: called every `report_every` steps with the step's number and mean figures; before the first, with the
            number alone.
        interrupts: a signal ends the training after its step, with a checkpoint. None: it interrupts at once.

    Raises:
        BadInputError: checkpoints are there already and `resume` is False.
        TrainingError: the loss is not finite.
        KeyboardInterrupt: a signal asked for it.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    # An interrupt inside the compilation of a step would end the process in a crash (jaxlib 0.10.2, CPU).
    patience = contextlib.nullcontext() if interrupts is None else interrupts.deferred()
    with patience, ocp.CheckpointManager((folder / task.name).absolute(), options=options) as manager:
        state = init_train_state(task)
        newest = manager.latest_step()
        if newest is not None and not resume:
            raise BadInputError(f"{folder / task.name} holds checkpoints already; pass --resume, or another folder")
        if newest is not None:
            state = manager.restore(newest, args=ocp.args.StandardRestore(state))
        log = folder / f"{task.name}.jsonl"
        _cut_log(log, int(state.step))
        if report is not None:  # before the first step compiles, which takes minutes
            report({"step": int(state.step), "steps": task.steps})
        train_step = make_train_step(task, seed)
        started, sums, count = time.monotonic(), {}, 0
        for index in range(int(state.step), task.steps):
            state, figures = train_step(state, task.batch(index))
            sums = {key: sums.get(key, 0.0) + value for key, value in figures.items()}
            count += 1
            if (index + 1) % report_every == 0 or index + 1 == task.steps:
                line = {key: float(value) / count for key, value in sums.items()}
                if not all(map(jnp.isfinite, line.values())):
                    raise TrainingError(
                        f"{task.name}: the loss is not finite at step {index + 1}: {line}; start in another folder, "
                        "with another seed"
                    )
                line = {"step": index + 1, "steps": task.steps, "seconds": time.monotonic() - started} | line
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                if report is not None:
                    report(line)
                sums, count = {}, 0
            stop = interrupts is not None and interrupts.requested
            if stop or (index + 1) % save_every == 0 or index + 1 == task.steps:
                manager.save(index + 1, args=ocp.args.StandardSave(state))
            if stop:
                break
        if interrupts is not None and interrupts.requested:  # be it while a finished stage was restored
            raise KeyboardInterrupt
        return state.ema


def _cut_log(log: Path, step: int) -> None:
    """Takes away the lines of steps that are made again: those after the checkpoint, which a kill has left behind."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if whole != lines:
        log.write_text("".join(whole), encoding="utf-8")
