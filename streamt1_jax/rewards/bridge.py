"""The one crossing from the traced search to Python: numpy and torch rewards inside `jit`, `scan` and `vmap`.

- Result shapes are declared; prompts cross as an index; a whole batch crosses in one call, a vmapped one too.
- The host side never raises into XLA. A failure is NaN and status FAILED, and waits for `Reward.raise_if_failed`.
- The host side never calls JAX. `jax.pure_callback` itself does: it copies every argument with `device_put` on the
  CPU's own thread pool, and with several programs in flight those copies wait behind the very programs that wait for
  them (a deadlock: always, with jax 0.10.2 on one core at 15 MB). So on a CPU the crossing is `buffer_callback`, which
  shows XLA's own memory; on a GPU, where that memory is out of numpy's reach, it is `pure_callback`.
- A program with a callback is not kept by JAX's persistent compilation cache.
"""

import functools
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Int32, Shaped

from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.rewards.base import FAILED, OK, Failure, Pixels, PromptTable, Reward, Verdict
from streamt1_jax.rewards.placement import torch_device

# Valid frames only, [t, H, W, 3] each, t its own, beside the prompt of each; the arrays are the function's to keep.
HostFn: TypeAlias = Callable[[list[np.ndarray], list[str]], Sequence[float] | np.ndarray]


def per_video(fn: Callable[[np.ndarray, str], float]) -> HostFn:
    """Lifts `fn(video [t, H, W, 3], prompt) -> float` to the batched form that `host_reward` takes."""

    def batched(videos: list[np.ndarray], prompts: list[str]) -> list[float]:
        return [fn(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    return batched


def host_reward(
    name: str,
    fn: HostFn,
    prompts: PromptTable | None = None,
    pixels: Pixels = "uint8",
    *,
    choose: Callable[[int], Sequence[int] | np.ndarray] | None = None,
    borrow: bool = False,
    explain: Callable[[np.ndarray, str, float], dict[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Reward:
    """A reward from a Python function; see `per_video` for one that takes a single video.

    Args:
        name: what records and errors call it.
        fn: `fn(videos, prompts) -> numbers`: a list of arrays [t, H, W, 3] of `pixels` holding valid frames only,
            the prompt of each, and a number for each. It must not call JAX (that can hang). It is never entered
            twice at once.
        prompts: the table that prompt indices point into; None for a reward that reads no prompt and gets "".
        pixels: the pixels it wants.
        choose: the indices of the frames that it wants of a video, by its number of frames; only these cross.
        borrow: hand over views of JAX's own memory instead of copies; `fn` must neither write to nor keep them.
        explain, about: see `Reward`.
    """
    failures: list[Failure] = []
    lock = threading.Lock()  # XLA may run callbacks of two programs at once; few models are made for that

    def host(videos: np.ndarray, num_frames: np.ndarray, prompt_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Arrays of any leading axes that broadcast (what vmap adds), to scores and statuses. Never raises."""
        lead = np.broadcast_shapes(videos.shape[:-5], num_frames.shape[:-1], prompt_index.shape)
        shape = (*lead, videos.shape[-5])
        try:
            clips, texts = _rows(videos, num_frames, prompt_index, lead, prompts, borrow=borrow)
            with lock:
                answer = fn(clips, texts)
            return _as_scores(answer, len(clips)).reshape(shape), np.full(shape, OK, np.int32)
        except BaseException as error:  # KeyboardInterrupt too: nothing may reach XLA
            text = traceback.format_exc()
            failures.append(Failure(error.with_traceback(None), text))
            return np.full(shape, np.nan, np.float32), np.full(shape, FAILED, np.int32)

    cross = functools.partial(_cross, host)
    call = cross if choose is None else functools.partial(_choose_and_cross, cross, choose)
    return Reward(name, call, pixels, "host", failures, explain=explain, about=about or {})


def torch_reward(
    name: str,
    fn: Callable[[Any, list[str]], Any],
    prompts: PromptTable | None = None,
    device: str | None = None,
    pixels: Pixels = "uint8",
) -> Reward:
    """A reward from a torch callable, run under `torch.inference_mode()`; no gradient comes back.

    Args:
        fn: `fn(videos [n, t, H, W, 3] on device, prompts) -> tensor [n]`. Videos of one length come together; a
            batch of several lengths makes one call for each. A `torch.nn.Module` is moved to the device and set to
            evaluation.
        device: a torch device, for example "cpu", "cuda" or "cuda:1"; it need not be the one JAX runs on. None is the
            first GPU that torch sees, or the CPU.
        name, prompts, pixels: as in `host_reward`.

    Raises:
        RewardError: torch is not installed.
        BadInputError: a device that torch does not know or cannot reach.
    """
    where = torch_device(device)
    import torch  # here, not above: an optional dependency, and `import streamt1_jax` must not import it

    if isinstance(fn, torch.nn.Module):
        fn.to(where).eval()

    def batched(videos: list[np.ndarray], texts: list[str]) -> np.ndarray:
        scores = np.empty(len(videos), np.float32)
        with torch.inference_mode():
            for length in sorted({len(video) for video in videos}):
                rows = [i for i, video in enumerate(videos) if len(video) == length]
                clips = torch.stack([torch.from_numpy(videos[i]) for i in rows]).to(where)
                answer = torch.as_tensor(fn(clips, [texts[i] for i in rows]))
                if answer.shape != (len(rows),):
                    raise RewardError(
                        f"it returned shape {tuple(answer.shape)} for {len(rows)} videos, expected ({len(rows)},)"
                    )
                scores[rows] = answer.to("cpu", torch.float32).numpy()
        return scores

    return host_reward(name, batched, prompts, pixels)


def _cross(
    host: Callable[..., tuple[np.ndarray, np.ndarray]],
    videos: Shaped[Array, "n T H W 3"],
    num_frames: Int32[Array, "n"],
    prompt_index: Int32[Array, ""],
) -> Verdict:
    """Runs `host` on the arguments, wherever the program runs. The only place that leaves JAX."""
    n = videos.shape[0]
    declared = (jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32))

    def on_buffers(context, out, *args):
        del context
        for buffer, value in zip(out, host(*(np.asarray(arg) for arg in args)), strict=True):
            np.asarray(buffer)[...] = value

    def on_copies(*args):
        return host(*(np.asarray(arg) for arg in args))

    # "expand_dims": under vmap the whole batch comes in one call, and what is not batched is not copied.
    scores, status = jax.lax.platform_dependent(
        videos,
        num_frames,
        prompt_index,
        cpu=buffer_callback(on_buffers, declared, vmap_method="expand_dims"),
        default=lambda *args: jax.pure_callback(on_copies, declared, *args, vmap_method="expand_dims"),
    )
    return Verdict(scores, status)


def _choose_and_cross(
    cross: Callable[..., Verdict],
    choose: Callable[[int], Sequence[int] | np.ndarray],
    videos: Shaped[Array, "n T H W 3"],
    num_frames: Int32[Array, "n"],
    prompt_index: Int32[Array, ""],
) -> Verdict:
    """Gathers the wanted frames on the device, so that no others are copied to the host."""
    wanted = [np.zeros(0, np.int32)] + [np.asarray(choose(t), np.int32) for t in range(1, videos.shape[1] + 1)]
    counts = np.array([len(indices) for indices in wanted], np.int32)
    table = np.stack([np.pad(indices, (0, counts.max() - len(indices))) for indices in wanted])
    chosen = jax.vmap(lambda video, indices: video[indices])(videos, jnp.asarray(table)[num_frames])
    return cross(chosen, jnp.asarray(counts)[num_frames], prompt_index)


def _rows(
    videos: np.ndarray,
    num_frames: np.ndarray,
    prompt_index: np.ndarray,
    lead: tuple[int, ...],
    prompts: PromptTable | None,
    *,
    borrow: bool,
) -> tuple[list[np.ndarray], list[str]]:
    """Valid frames and prompt of every row, the leading axes and n counted through in order."""
    n, length = videos.shape[-5:-3]
    videos = np.broadcast_to(videos, (*lead, *videos.shape[-5:]))
    num_frames = np.broadcast_to(num_frames, (*lead, n))
    prompt_index = np.broadcast_to(prompt_index, lead)
    clips, texts = [], []
    for place in np.ndindex(*lead, n):
        t = int(num_frames[place])
        if not 1 <= t <= length:
            raise BadInputError(
                f"num_frames is {t}, expected 1 to {length}; pass the number of valid frames of the row"
            )
        # Copied unless told otherwise: the memory is XLA's, and gone after the call.
        clips.append(videos[place][:t] if borrow else np.array(videos[place][:t]))
        texts.append("" if prompts is None else prompts[int(prompt_index[place[:-1]])])
    return clips, texts


def _as_scores(answer: Any, count: int) -> np.ndarray:
    """What a reward returned, as float32 [count]; NaN and infinity are numbers here."""
    values = list(answer)  # TypeError for a single number or None, with Python's own text
    if len(values) != count:
        raise RewardError(f"it returned {len(values)} scores for {count} videos")
    for row, value in enumerate(values):
        plain = value.item() if hasattr(value, "item") else value  # a numpy or torch scalar
        if isinstance(plain, bool) or not isinstance(plain, Real):
            raise RewardError(f"it returned {value!r} for video {row}, which is not a number")
        values[row] = plain
    with np.errstate(over="ignore"):  # a number above float32's range is infinite
        return np.asarray(values, np.float64).astype(np.float32)
