"""How to measure: seconds, compilations, memory, and what they were measured on."""

import contextlib
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from streamt1_jax import __version__

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of repeated measurements, in their unit."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Counts the programs that are compiled or loaded from the cache meanwhile; the list holds the seconds of each."""
    seen: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def compilation_cache(folder: str | None) -> Iterator[None]:
    """Another persistent cache, or none, for a while; it keeps every program, however small or quickly compiled."""
    from jax.experimental.compilation_cache import compilation_cache

    meanwhile = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in meanwhile}
    for name, value in meanwhile.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def matmul_peak(dtype: Any, repeats: int = 5, products: int = 10) -> float:
    """FLOP/s of large square matrix products of this type on random numbers: what utilisation is measured against.

    Each product waits for the one before, in one program: starting a program does not count.
    """
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    b = b * n**-0.5  # the products stay as large as a

    @jax.jit
    def chain(a, b):
        for _ in range(products):
            a = a @ b
        return a

    return products * 2 * n**3 / statistics.median(timed(lambda: chain(a, b), repeats))


def peak_bytes() -> dict[str, int]:
    """The most memory so far: of the device where it tells, else of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"device": stats["peak_bytes_in_use"]}
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),  # jobs that run or wait for a CPU, mean of the last minute
        "python": platform.python_version(),
        "streamt1-jax": __version__,
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def _processor() -> str:
    """The model of the CPU, where the system tells; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
