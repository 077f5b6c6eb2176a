"""The compilation cache: the second start of a program should not pay for its compiler again."""

import os
from pathlib import Path

import jax


def enable() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another one.

    Entries are executable code: the folder belongs to the user alone. `RAIN_JAX_CACHE=0` does
    without; a folder that cannot be made is done without too, since only time is lost.
    """
    if os.environ.get("RAIN_JAX_CACHE") == "0" or jax.config.values.get(
        "jax_compilation_cache_dir"
    ):
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "rain_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nobody knows a home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Thresholds of zero: a run is made of a few large programs and many small ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
