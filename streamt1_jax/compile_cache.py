"""The persistent compilation cache: a second start of the same program compiles nothing."""

import os
import warnings
from pathlib import Path

ENVIRONMENT = "STREAMT1_CACHE_DIR"
JAX_FLAG = "jax_compilation_cache_dir"
MIN_COMPILE_SECONDS = 0.5  # cheaper programs are not worth a file


def cache_folder() -> Path | None:
    """`$STREAMT1_CACHE_DIR`, else a folder of ours in the user's cache; None when the variable is empty: no cache."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a path that is not absolute.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "streamt1-jax" / "xla"


def enable_compilation_cache() -> Path | None:
    """Lets JAX keep compiled programs on disk. A folder set through JAX itself (`JAX_COMPILATION_CACHE_DIR`) wins.

    Returns:
        The folder in use; None when switched off, or not possible, which warns.
    """
    import jax

    if chosen := getattr(jax.config, JAX_FLAG):
        return Path(chosen)
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        warnings.warn(
            f"{str(folder)!r} cannot hold the compilation cache, so every start compiles anew: "
            f"set {ENVIRONMENT} to a folder that can be written, or to nothing to switch the cache off",
            stacklevel=2,
        )
        return None
    jax.config.update(JAX_FLAG, str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder
