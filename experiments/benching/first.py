"""How long it takes to the end of the first training step."""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benching.clock import Once, Program
from experiments.benching.training import Dtype, Which, Workload, matched, said


def compiling(
    *,
    networks: tuple[str, ...] = ("small_cnn", "resnet18"),
    batch_sizes: tuple[int, ...] = (64, 8),
    methods: tuple[Which, ...] = ("pgd",),
    size: int = 32,
    attack_steps: int = 10,
    dtype: Dtype = "float32",
) -> list[Once]:
    """Seconds to the end of the first step: tracing, compiling and running it.

    Of the step's program alone, in a process that has traced others. First into an empty persistent
    cache, and then, with all that JAX remembers cleared, out of it.
    """
    pairs = matched("batch_sizes", networks, batch_sizes, len(networks) * (methods,), size, dtype)
    return [
        Once(
            f"first step, {said(name, attack_steps)}, {workload}",
            partial(_first_steps, workload, name, attack_steps),
        )
        for workload, names in pairs
        for name in names
    ]


def _first_steps(workload: Workload, name: str, attack_steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _cached_in(Path(folder)):
        first = partial(_first_step, partial(workload.program, name, attack_steps))
        return {"empty_cache": first(), "warm_cache": first()}


def _first_step(make: Callable[[], Program]) -> dict[str, float]:
    function, arguments, _, _ = make()
    jax.block_until_ready(arguments)
    jax.clear_caches()
    times = [time.perf_counter()]
    lowered = jax.jit(function, donate_argnums=(0,)).lower(*arguments)
    times.append(time.perf_counter())
    program = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(program(*arguments))
    times.append(time.perf_counter())
    told = dict(zip(("trace", "compile", "run"), np.diff(times).tolist(), strict=True))
    return {**told, "seconds": times[-1] - times[0]}


@contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    """Compiled programs are kept in `folder` in here, and nowhere else."""
    cache = importlib.import_module("jax.experimental.compilation_cache.compilation_cache")
    wanted = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        cache.reset_cache()  # it remembers the folder that it was opened with
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        cache.reset_cache()
