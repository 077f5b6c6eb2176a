"""What Threefry costs as JAX compiles it for CPUs, and with its rounds written out.

python tests/long_threefry.py [FILE.json]

Seconds of CPU time to compile and milliseconds to run, each as the loop's time over the other's:
the median of nine rounds in turn, with the least and the largest. Bits are compared, too.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax._src.random import threefry2x32 as threefry

from rain_jax import attacks
from rain_jax.keys import unroll_threefry
from rain_jax.norms import linf
from rain_jax.types import Threat

ROUNDS = 9
WEIGHTS = np.random.default_rng(0).normal(size=(2, 3072, 10)).astype(np.float32)


def logits_fn(key, image):
    """A small curved classifier, whose own kernels are few."""
    flat = image.reshape(-1)
    return 2 * jnp.tanh(flat @ WEIGHTS[0]) + flat**2 @ WEIGHTS[1]


def attacked(attack):
    image = np.full((32, 32, 3), 0.5, np.float32)
    one = jax.vmap(lambda key: attack(key, logits_fn, image, 0))
    return lambda key: one(jax.random.split(key, 16))


THREAT = Threat(linf, 8 / 255)
PROGRAMS = {
    "a million words": lambda key: jax.random.bits(key, (1_000_000,)),
    "uniform noise for 64 images": lambda key: jax.vmap(
        lambda key: jax.random.uniform(jax.random.split(key)[0], (32, 32, 3))
    )(jax.random.split(key, 64)),
    "a number for each of 256 keys": lambda key: jax.vmap(jax.random.normal)(
        jax.random.split(key, 256)
    ),
    "APGD, 5 steps": attacked(attacks.apgd(THREAT, steps=5)),
    "Square, 20 queries": attacked(attacks.square(THREAT, queries=20)),
}  # fmt: skip


def by_loops() -> None:
    mlir.register_lowering(
        threefry.threefry2x32_p, threefry._threefry2x32_cpu_lowering_rule, platform="cpu"
    )


def spread(values):
    return statistics.median(values), min(values), max(values)


def main(path: str | None = None) -> None:
    key, found = jax.random.key(0), {}
    for name, program in PROGRAMS.items():
        compiling: dict[str, list[float]] = {"loop": [], "written out": []}
        compiled = {}
        for number in range(ROUNDS):
            for how, choose in (("loop", by_loops), ("written out", unroll_threefry)):
                choose()
                jax.clear_caches()
                lowered = jax.jit(lambda key, n=number, p=program: (p(key), n)).lower(key)
                began = time.process_time()
                compiled[how] = lowered.compile()
                compiling[how].append(time.process_time() - began)
        loop, out = (np.asarray(compiled[how](key)[0]) for how in compiling)
        running: dict[str, list[float]] = {"loop": [], "written out": []}
        for _ in range(ROUNDS):
            for how, run in compiled.items():
                began, count = time.perf_counter(), 0
                while time.perf_counter() - began < 0.2:
                    jax.block_until_ready(run(key))
                    count += 1
                running[how].append(1000 * (time.perf_counter() - began) / count)
        row = {"same": float(np.mean(loop == out))}
        for what, times in (("compile, s", compiling), ("run, ms", running)):
            ratios = [a / b for a, b in zip(*times.values(), strict=True)]
            row[what] = {how: statistics.median(values) for how, values in times.items()}
            row[f"{what}, ratio"] = spread(ratios)
            middle, least, most = spread(ratios)
            print(
                f"{name:32} {what:10} {row[what]['loop']:8.3g} {row[what]['written out']:8.3g} "
                f"{middle:5.2f} [{least:.2f}, {most:.2f}]  same: {row['same']:.4f}",
                flush=True,
            )
        found[name] = row
    assert all(row["same"] == 1 for row in found.values()), "the bits are not the same"
    if path is not None:
        Path(path).write_text(json.dumps({"jax": jax.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
