"""What made a run, as plain data: what was asked for, the weights, the machine. Two runs that agree in it make the
same video to the bit."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamt1_jax import __version__
from streamt1_jax.config import RunConfig
from streamt1_jax.outputs import plain
from streamt1_jax.segments import Segment


def asked(prompt: str, segments: Sequence[Segment], seed: int, chunks: int, config: RunConfig) -> dict[str, Any]:
    """What a user asked for, as far as it is known before JAX is imported."""
    return normal(
        {
            "prompt": prompt,
            "switches": {str(segment.chunk): segment.prompt for segment in segments},
            "seed": seed,
            "chunks": chunks,
            "stream": asdict(config.stream),
            "search": asdict(config.search),
        }
    )


def normal(data: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(plain(data)))


def differences(saved: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """What two descriptions disagree in, in words, for keys that both have."""
    found = []
    for key in saved.keys() & ours.keys():
        name, old, new = f"{prefix}{key}", saved[key], ours[key]
        if isinstance(old, dict) and isinstance(new, dict):
            missing = dict.fromkeys(old.keys() ^ new.keys())
            found += differences({**missing, **old}, {**missing, **new}, f"{name}.")
        elif old != new:
            found.append(f"{name} is {_short(new)}, saved was {_short(old)}")
    return sorted(found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def code_sha256() -> str:
    """A hash of the package's source files with their names: results of two versions of it are no table."""
    package, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def environment() -> dict[str, Any]:
    """Programs and devices; on another machine a run goes on, but not to the bit."""
    import platform
    from importlib.metadata import version

    import jax

    device = jax.devices()[0]
    return {
        "versions": {"streamt1-jax": __version__}
        | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "machine": platform.machine(),
    }
