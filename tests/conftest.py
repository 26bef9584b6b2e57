"""Strict by default: shapes and types are checked, and mixing number types is an error, in every test.

`jax_numpy_rank_promotion` stays on "allow": broadcasting a bias or a modulation over tokens is the normal case here.
"""

import os
import tempfile
from pathlib import Path

# One cache of compiled programs for all workers and for the next session; tests compile far longer than they run.
CACHE = Path(os.environ.get("STREAMT1_TEST_CACHE", Path(tempfile.gettempdir()) / f"streamt1-tests-{os.getuid()}"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))

from jaxtyping import install_import_hook

# Before the package is imported: every annotation in it is checked at every call.
install_import_hook("streamt1_jax", "typechecking.checked")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
