"""Where torch rewards run, and how torch and JAX share the memory of a GPU.

JAX takes a fixed part of every GPU when it starts (three quarters by default), whatever it needs; torch gets the rest.
So the part is worked out before JAX starts, from the memory plan of the run and the sizes of the reward models.
"""

import importlib
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamt1_jax.errors import BadInputError, OutOfMemoryError, RewardError

if TYPE_CHECKING:
    import torch

GIGABYTE = 1e9
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
CONTEXT_BYTES = 1.5e9  # CUDA's context and the libraries' buffers of torch, beside its tensors


def eight_bit_library() -> Any:
    """torchao's module that makes eight-bit weights.

    Raises:
        BadInputError: it is not installed.
    """
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise BadInputError(
            "rewards.precision is int8, and torchao is not installed; pip install 'streamt1-jax[int8]', or choose "
            "bfloat16"
        ) from error


def torch_device(name: str | None) -> "torch.device":
    """A torch device by name; None is the first GPU that torch sees, or the CPU.

    Raises:
        RewardError: torch is not installed.
        BadInputError: a device that torch does not know or cannot reach.
    """
    try:
        import torch  # here, not above: an optional dependency, and `import streamt1_jax` must not import it
    except ImportError as error:
        raise RewardError(
            "a torch reward was asked for, and torch is not installed; pip install 'streamt1-jax[torch]'"
        ) from error
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise BadInputError(
            f"reward device {name!r} cannot be used ({error}); expected 'cpu' or one of "
            f"{torch.cuda.device_count()} CUDA devices; choose another device"
        ) from error
    return device


def needed_bytes(sizes: Mapping[str, float], batch_bytes: float) -> float:
    """What torch takes of a GPU for reward models of these sizes."""
    return sum(sizes.values()) + batch_bytes + CONTEXT_BYTES


def check_fit(sizes: Mapping[str, float], batch_bytes: float, device: "torch.device") -> None:
    """Refuses models that a GPU has no room for now.

    Raises:
        OutOfMemoryError: with every size, and what to lower.
    """
    if device.type != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if (needed := needed_bytes(sizes, batch_bytes)) > free:
        parts = ", ".join(f"{name} {size / GIGABYTE:.1f} GB" for name, size in sizes.items())
        raise OutOfMemoryError(
            f"the reward models need {needed / GIGABYTE:.1f} GB of {device} ({parts}, batches "
            f"{batch_bytes / GIGABYTE:.1f} GB), and {free / GIGABYTE:.1f} of its {total / GIGABYTE:.1f} GB are free; "
            f"lower {FRACTION} (what JAX takes) or rewards.batch_gb, set rewards.precision=int8, or choose another "
            "device with --reward-device"
        )


def jax_fraction(total: float, torch_bytes: float) -> float:
    """The part of a GPU of `total` bytes that JAX may take, so that torch has room; rounded down to a hundredth.

    Raises:
        OutOfMemoryError: torch alone needs more.
    """
    fraction = math.floor((total - torch_bytes) / total * 100) / 100
    if fraction <= 0:
        raise OutOfMemoryError(
            f"the reward models need {torch_bytes / GIGABYTE:.1f} GB of a device of {total / GIGABYTE:.1f} GB; put "
            "them elsewhere with --reward-device, or set rewards.precision=int8 or a lower rewards.batch_gb"
        )
    return fraction


def share_gpu(torch_bytes: float, device: "torch.device") -> None:
    """Sets the part of the GPUs that JAX takes, where the user has not; call it before JAX starts.

    Raises:
        OutOfMemoryError: the rewards do not fit on the device.
    """
    if device.type != "cuda":
        return
    import torch

    _, total = torch.cuda.mem_get_info(device)
    os.environ.setdefault(FRACTION, f"{jax_fraction(total, torch_bytes):.2f}")


def refuse_overfull(jax_bytes: float, limit: float, torch_bytes: float) -> None:
    """Refuses a run that does not fit into what JAX may take beside the reward models.

    Args:
        jax_bytes: the peak of the run's memory plan, without the rewards.
        limit: what JAX may take of the device.
        torch_bytes: what the rewards take of it.

    Raises:
        OutOfMemoryError: with all three numbers and what to lower.
    """
    if jax_bytes > limit:
        raise OutOfMemoryError(
            f"the run needs {jax_bytes / GIGABYTE:.1f} GB, and beside {torch_bytes / GIGABYTE:.1f} GB of reward models "
            f"JAX may take {limit / GIGABYTE:.1f} GB; put the rewards elsewhere with --reward-device (cuda:1, cpu), "
            "lower search.candidates_per_beam or search.beams, or set rewards.precision=int8"
        )
