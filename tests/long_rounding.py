"""How far rounding moves logits: between batch sizes, and between kinds of CPU.

    PYTHONPATH=.:tests python tests/long_rounding.py [--out=FILE.json]

Random images through untrained networks in float32 and bfloat16, in batches of 1, 7, 16, 32 and 64,
compiled for each instruction set in a process of its own. Prints the largest move of a logit as a
share of the image's largest one, from the logits of the image alone in the last set.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import drawn
import jax
import numpy as np

from rain_jax import models

SETS = ("SSE4_2", "AVX", "AVX2")
SIZES = (1, 7, 16, 32, 64)
COUNT = 64
EIGHT, EIGHTEEN = dict(depths=(1, 1, 1), width=16), dict(depths=(2, 2, 2, 2), width=16)
NETWORKS = {
    "CNN": (models.cnn(10, widths=(8, 16), hidden=32), (8, 8, 1)),
    "ResNet-8": (models.preact_resnet(10, **EIGHT), (32, 32, 3)),
    "ResNet-18 of width 16": (models.preact_resnet(10, **EIGHTEEN), (32, 32, 3)),
    "ResNet-8, bfloat16": (models.preact_resnet(10, **EIGHT, dtype="bfloat16"), (32, 32, 3)),
    "ResNet-18 of width 16, bfloat16": (
        models.preact_resnet(10, **EIGHTEEN, dtype="bfloat16"), (32, 32, 3),
    ),
}  # fmt: skip


def logits(out: Path) -> None:
    """Writes the logits [64, 10] of every network in every batch size."""
    found = {}
    for name, (network, shape) in NETWORKS.items():
        images = np.random.default_rng(0).random((COUNT, *shape)).astype(np.float32)
        variables = drawn.of(network, shape, seed=1)
        alone = lambda v, image, n=network: n.apply(v, image[None])[0][0]
        program = jax.jit(jax.vmap(alone, (None, 0)))
        for size in SIZES:
            parts = [
                np.asarray(program(variables, np.resize(images[at : at + size], (size, *shape))))
                for at in range(0, COUNT, size)
            ]
            found[f"{name}/{size}"] = np.concatenate(parts)[:COUNT]
    np.savez(out, **found)


def main() -> None:
    """Runs a process for each instruction set, and prints what moved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logits", type=Path)
    asked = parser.parse_args()
    if asked.logits:
        return logits(asked.logits)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa in SETS:
            out = Path(folder) / f"{isa}.npz"
            command = [sys.executable, __file__, f"--logits={out}"]
            subprocess.run(
                command, check=True, env={**os.environ, "XLA_FLAGS": f"--xla_cpu_max_isa={isa}"}
            )
            with np.load(out) as seen:
                found[isa] = dict(seen)
    moves: dict[str, dict[str, float]] = {}
    for name in NETWORKS:
        one = found[SETS[-1]][f"{name}/1"]
        scale = np.max(np.abs(one), axis=1, keepdims=True)
        moves[name] = {
            isa: max(float(np.max(np.abs(seen[f"{name}/{size}"] - one) / scale)) for size in SIZES)
            for isa, seen in found.items()
        }
        told = ", ".join(
            f"{isa} {f'2^{np.log2(move):.1f}' if move else 'nothing'}"
            for isa, move in moves[name].items()
        )
        print(f"{name}: {told}")
    if asked.out:
        asked.out.write_text(json.dumps(moves, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
