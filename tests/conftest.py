"""Strict by default: shapes and types are checked, and mixing number types is an error, in every test.

`jax_numpy_rank_promotion` stays on "allow": adding a bias or a modulation to every token is the normal case here.
"""

import os
from pathlib import Path

# One cache of compiled programs for all workers and for the next session: tests compile far longer than they run.
# A bounded cache is the one that JAX locks, so that no worker reads what another has half written.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from jaxtyping import install_import_hook  # noqa: E402

# Before the package is imported: every annotation in it is checked at every call.
install_import_hook("streamt1_jax", "typechecking.checked")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from typechecking import check_arrays_only, leave_to_itself  # noqa: E402

from streamt1_jax import config  # noqa: E402
from streamt1_jax.cache import Cache  # noqa: E402
from streamt1_jax.state import Beam, StreamState  # noqa: E402

for pytree in (Cache, Beam, StreamState):
    check_arrays_only(pytree)
for name in ("DiTConfig", "VAEConfig", "UMT5Config", "ModelConfig", "StreamConfig", "SearchConfig", "RunConfig"):
    leave_to_itself(getattr(config, name))

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Examples compile programs, so their times say nothing; a failure prints what reproduces it.
settings.register_profile("streamt1", deadline=None, print_blob=True)
settings.load_profile("streamt1")

# XLA maps several pieces of memory for every program on a CPU; Linux allows a process 65,530, and XLA crashes there.
MANY_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Forgets the compiled programs of earlier modules when they have become many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()


COMPILATION = "/jax/core/compile/backend_compile_duration"


class CompileCount:
    """Programs compiled (or taken from the persistent cache) since the session began."""

    def __init__(self):
        self.value = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        self.value += event == COMPILATION


@pytest.fixture(scope="session")
def compile_count() -> CompileCount:
    return CompileCount()


@pytest.fixture
def standard_promotion():
    """For bfloat16: JAX's own attention promotes it to float32, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
