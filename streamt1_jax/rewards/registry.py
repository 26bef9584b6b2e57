"""Rewards by name: the built-in ones, and a user's own as `package.module:Name`.

A user's reward, in `my_rewards.py`, chosen with `--set rewards.short=my_rewards:Brightness`:

    class Brightness:
        takes = "torch"      # or "video" (one numpy video and its prompt; the default), or "batch" (lists of both)
        device = "cuda:1"    # for "torch" alone; the default is the run's reward device
        pixels = "uint8"     # or "float32" in [0, 1]

        def __call__(self, videos, prompts):               # [n, t, H, W, 3] on the device, n prompts
            return videos.float().mean((1, 2, 3, 4)) / 255  # [n]

A plain function `fn(video, prompt) -> float` is a reward as it stands. A class is made without arguments; a
`torch.nn.Module` needs no `takes`; a `Reward` object is used as it is.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from streamt1_jax.errors import BadInputError
from streamt1_jax.rewards.base import Pixels, PromptTable, Reward
from streamt1_jax.rewards.bridge import host_reward, per_video, torch_reward
from streamt1_jax.rewards.model_settings import MODELS
from streamt1_jax.rewards.native import native_long, native_short
from streamt1_jax.rewards.published import PublishedRewards

Role = Literal["short", "long"]


def _native(role: Role, folder: Path | None) -> Reward:
    return native_short() if role == "short" else native_long()


def _mini(role: Role, folder: Path | None) -> Reward:
    from streamt1_jax.mini import rewards  # here: it imports this package

    return rewards.mini_short(folder) if role == "short" else rewards.mini_long(folder)


BUILT_IN: dict[str, Callable[[Role, Path | None], Reward]] = {"native": _native, "mini": _mini}


def resolve(
    spec: str,
    role: Role,
    prompts: PromptTable,
    *,
    device: str | None = None,
    published: PublishedRewards | None = None,
    mini: Path | None = None,
    default: str = "native",
) -> Reward:
    """The reward that a setting names.

    Args:
        spec: a built-in name ("native", "mini"), a published model ("hpsv3", "videoreward"), `package.module:Name`, or
            "default".
        role: "short" scores a chunk's frames, "long" the window; a built-in name means another reward for each.
        prompts: the table that the run's prompt indices point into.
        device: where a torch reward of the user's own runs that does not say so itself; see `torch_reward`.
        published: the folder that published models come from.
        mini: the folder that "mini" comes from; None: what the package ships.
        default: what "default" stands for.

    Raises:
        BadInputError: no such reward, with the closest name; a published one without a folder.
    """
    if role not in get_args(Role):
        raise BadInputError(f"reward role is {role!r}, expected 'short' or 'long'")
    spec = default if spec == "default" else spec
    if ":" in spec:
        return load_reward(spec, prompts, device=device)
    if spec in MODELS:
        if published is None:
            raise BadInputError(
                f"reward {spec!r} needs converted weights, expected their folder; give it with --rewards DIR or --set "
                "rewards.dir=DIR, and make it with: streamt1 convert rewards --out DIR"
            )
        return published.reward(spec, prompts)
    if spec not in BUILT_IN:
        names = ("default", *sorted(BUILT_IN), *MODELS)
        raise BadInputError(
            f"there is no reward {spec!r} and no such folder{_closest(spec, names)}; expected one of "
            f"{', '.join(names)}, your own as package.module:Name, or a folder of converted rewards"
        )
    return BUILT_IN[spec](role, mini)


def load_reward(spec: str, prompts: PromptTable, *, device: str | None = None) -> Reward:
    """A user's own reward, `package.module:Name`; modules in the working folder are found too.

    Raises:
        BadInputError: a name that is not of this form, a module that is missing or breaks while it is imported, a
            name that is missing from it (with the closest one), or an object that is no reward.
    """
    module_name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not attribute.isidentifier():
        raise BadInputError(f"reward is {spec!r}, expected package.module:Name; for example my_rewards:Brightness")
    module = _import(module_name, spec)
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise BadInputError(
            f"module {module_name!r} has no {attribute!r}{_closest(attribute, names)}; "
            "expected the name of a function or a class of that module"
        )
    made = getattr(module, attribute)
    if isinstance(made, Reward):
        return made
    if inspect.isclass(made):
        try:
            made = made()
        except Exception as error:
            raise BadInputError(
                f"reward class {spec!r} cannot be made without arguments ({type(error).__name__}: {error}); "
                "expected a class whose arguments all have defaults"
            ) from error
    return _lift(spec, made, prompts, device)


def _lift(spec: str, made: Any, prompts: PromptTable, device: str | None) -> Reward:
    """A reward from a user's callable, by its `takes`, `pixels` and `device`."""
    if not callable(made):
        raise BadInputError(
            f"reward {spec!r} is a {type(made).__name__}, expected a function or a class that can be called"
        )
    torch = sys.modules.get("torch")  # a module of torch cannot exist before torch is imported
    is_module = torch is not None and isinstance(made, torch.nn.Module)
    takes: str = getattr(made, "takes", "torch" if is_module else "video")
    pixels: Any = getattr(made, "pixels", "uint8")
    score: Callable[..., Any] = made
    if pixels not in get_args(Pixels):
        raise BadInputError(f"reward {spec!r} has pixels = {pixels!r}, expected 'uint8' or 'float32'")
    match takes:
        case "video":
            return host_reward(spec, per_video(score), prompts, pixels)
        case "batch":
            return host_reward(spec, score, prompts, pixels)
        case "torch":
            return torch_reward(spec, score, prompts, getattr(made, "device", None) or device, pixels)
    raise BadInputError(f"reward {spec!r} has takes = {takes!r}, expected 'video', 'batch' or 'torch'")


def _import(module_name: str, spec: str) -> Any:
    """Imports a user's module; the working folder comes last on the path, so it hides nothing installed."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        absent = (
            isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}.")
        )
        raise BadInputError(
            f"reward {spec!r}: module {module_name!r} "
            + ("was not found" if absent else f"broke while it was imported ({type(error).__name__}: {error})")
            + f"; expected an installed module or one in {folder}; check the name and PYTHONPATH"
        ) from error
    finally:
        sys.path.remove(folder)


def _closest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
