"""Images on the decision boundary of a network, and what the judge makes of them.

`python tests/evaluation/boundary_images.py IMAGES.npz OUT.npz` judges the images of a file in a
process of its own, whose XLA_FLAGS may name another instruction set.
"""

import sys
from pathlib import Path
from typing import Any

import drawn
import jax
import numpy as np

from rain_jax import data, evaluation, models
from rain_jax.config import networks
from rain_jax.evaluation import boundary
from rain_jax.norms import linf
from rain_jax.parallel import choose_devices, place
from rain_jax.types import Batch, Threat

NETWORK = models.cnn(10, widths=(8, 16), hidden=32)
SHAPE = (8, 8, 1)
ANYWHERE = evaluation.Rules(Threat(linf, 1.0))


def weights() -> Any:
    """Weights by NumPy: JAX draws normal numbers that depend on the instruction set."""
    return drawn.of(NETWORK, SHAPE, seed=1)


def on_the_boundary(count: int, beside: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 8, 8, 1] within 4 ulp of the boundary of their labels [count].

    Found by halving the line between a digit of one predicted class and one of another, in batches
    of `count`: nowhere else need they be as close. With `beside` their margins are so many bounds
    on rounding instead, beyond the boundary and before it in turn, about as closely.
    """
    aim = np.float32(beside * boundary.FLOAT32) * np.where(np.arange(count) % 2, 1, -1)
    variables = weights()
    program = jax.jit(lambda images: NETWORK.apply(variables, images)[0])
    digits = data.as_float(np.concatenate([part.arrays[0] for part in _digits()]))[: 2 * count]
    draw = np.random.default_rng(0)
    predicted = np.concatenate(
        [np.argmax(program(digits[i * count : (i + 1) * count]), axis=1) for i in range(2)]
    )
    one = draw.integers(0, len(digits), count)
    other = np.array([draw.choice(np.flatnonzero(predicted != predicted[n])) for n in one])
    label, rows = predicted[one].astype(np.int32), np.arange(count)

    def at(share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        far = share[:, None, None, None].astype(np.float32)
        images = (1 - far) * digits[one] + far * digits[other]
        logits = np.asarray(program(images))
        wrong = logits.copy()
        wrong[rows, label] = -np.inf
        largest = np.max(np.abs(logits), axis=1)
        return images, np.max(wrong, axis=1) - logits[rows, label] - aim * largest, largest

    low, high = np.zeros(count), np.ones(count)
    best, nearest = digits[one].copy(), np.full(count, np.inf)
    for _ in range(40):
        images, margin, largest = at((low + high) / 2)
        ulps = np.abs(margin) / np.spacing(largest)
        best[ulps < nearest] = images[ulps < nearest]
        nearest = np.minimum(ulps, nearest)
        middle = (low + high) / 2
        low, high = np.where(margin < 0, middle, low), np.where(margin < 0, high, middle)
    assert np.max(nearest) <= 4, np.max(nearest)
    return best, label


def _digits() -> tuple[Any, Any]:
    splits = data.load("digits")
    return splits.train, splits.test


def judged(images: np.ndarray, label: np.ndarray, size: int, devices: int) -> evaluation.Judgement:
    """The judge's word on the images, `size` at a time on so many devices."""
    on = place("shard_map", choose_devices(devices))
    judge = evaluation.judging(networks.logits_fn_of(NETWORK), ANYWHERE, on, batch_size=size)
    index = np.arange(len(label), dtype=np.int32)
    found = evaluation.as_they_are([Batch(images, label, index, np.ones(len(label), bool))])
    some = judge(on.replicate(weights()), jax.random.key(0), found)
    return evaluation.join([verdicts.judgement for verdicts in some])


def table(
    images: np.ndarray, label: np.ndarray, sizes: tuple[int, ...], devices: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """`right` and `near_boundary` [N], by name, batch size and number of devices."""
    found = {}
    for size in sizes:
        for count in devices:
            seen = judged(images, label, size, count)
            found[f"right/{size}/{count}"] = seen.right
            found[f"near_boundary/{size}/{count}"] = seen.near_boundary
            found[f"margin/{size}/{count}"] = seen.margin
    return found


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:3])
    with np.load(source) as given:
        found = table(
            given["images"], given["label"], tuple(given["sizes"].tolist()),
            tuple(given["devices"].tolist()),
        )  # fmt: skip
    np.savez(out, **found)
