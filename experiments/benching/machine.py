"""What feeds a training step and what keeps it: the machine's own peaks, data, checkpoints."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benching.clock import Once, Peaks, Program, Row, Side, spread
from experiments.benching.images import pictures
from experiments.benching.training import CLASSES, Dtype, Which, Workload, known
from rain_jax import data, training
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import within
from rain_jax.types import Array, Batch

# Up to this many pixels a side a small network is who is fed, beyond a ResNet with ImageNet's stem.
_SMALL = 64


def peak(*, size: int = 1024, megabytes: int = 64) -> list[Row]:
    """A product of two matrices [size, size] in float32 and in bfloat16, and a copy.

    What other lines tell a fraction of. The copy reads and writes so many megabytes; they should be
    more than caches hold. Products are of the precision that JAX chooses, as networks' are.
    """
    within("size", size, 1)
    within("megabytes", megabytes, 1)
    rows = [
        Row(f"product, {size} x {size}, {dtype}", partial(_product, size, dtype), dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    count = megabytes * 2**20 // 8
    what = f"copy, {megabytes} MB read and written"
    return [*rows, Row(what, partial(_copy, count), bytes=8 * count)]


def peaks_of(lines: list[dict[str, Any]], rows: list[Row]) -> Peaks:
    """The best that the rows of `peak` have reached."""
    products, copy = {}, None
    for row, line in zip(rows, lines, strict=True):
        best = line["ours_milliseconds"][1] / 1000
        if row.bytes:
            copy = row.bytes / best
        else:
            products[row.dtype] = line["gflop"] / best
    return Peaks(products, copy)


def feeds(
    folder: Path,
    *,
    images: tuple[tuple[int, int], ...] = ((64, 32), (8, 224)),
    batches: int = 16,
    workers: int = 0,
    method: Which = "natural",
    attack_steps: int = 10,
    dtype: Dtype = "float32",
) -> list[Row]:
    """Images per second of the feeds, for batches of (how many, height and width).

    "resident" is gathered from arrays on the device, "stream" read by grain, from arrays or from
    JPEG files written for it, by `workers` processes or none, and put on the device. The peer is
    whom they feed: a training step of `method`, of the small CNN up to 64 pixels, else ResNet-18.
    A ratio of more than 1 says that the step waits for itself alone. The data set has so many
    `batches`.
    """
    within("images", images, 1)
    within("batches", batches, 1)
    within("workers", workers, 0)
    rows = []
    for count, size in images:
        small = size <= _SMALL
        network = ("small_cnn", None) if small else ("resnet18", "imagenet")
        workload = Workload(network[0], count, size, dtype, network[1])
        fed = {f"step, {workload.network}": partial(_step, workload, method, attack_steps)}
        what = f"{count} x {size}x{size}"
        sides: dict[str, Callable[[], Program | Side]] = {
            "resident": partial(_resident, count, size, batches),
            "stream, arrays": partial(_stream, _arrays, count, size, batches, workers),
            "stream, JPEG": partial(
                _stream, partial(_files, folder / f"jpeg_{size}"), count, size, batches, workers
            ),
        }
        # For every value a byte is read and a float32 written.
        moved = {"resident": 5 * count * size * size * 3}
        rows += [
            Row(f"{name}, {what}", side, fed, False, count, moved.get(name, 0))
            for name, side in sides.items()
        ]
    return rows


def checkpoint(
    folder: Path, *, model: str = "resnet18", saves: int = 3, size: int = 32
) -> list[Once]:
    """Saves and restores of a network's whole training state, on the disk of the run's folder.

    `waits` is how long a training step waits for a save, which goes on in the background; `saved`
    is when everything is on disk. Checksums included. Seconds, [median, least, most] over `saves`.
    """
    within("saves", saves, 1)
    workload = Workload(known(model, "model"), 1, size, "float32")
    told = partial(_checkpoint, folder / "checkpoints", workload, saves)
    return [Once(f"checkpoint, {model}", told)]


def _product(size: int, dtype: str) -> Program:
    return Program(jnp.matmul, (jnp.ones((size, size), dtype), jnp.ones((size, size), dtype)))


def _copy(count: int) -> Program:
    return Program(jnp.negative, (jnp.ones(count, jnp.float32),))


# --- Feeds ------------------------------------------------------------------------------------


def _step(workload: Workload, method: str, attack_steps: int) -> Side:
    """A training step, as somebody to be compared with."""
    function, (state, *rest), _, read = workload.program(method, attack_steps)
    step = jax.jit(function, donate_argnums=(0,))

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, *rest)
        return metrics

    return Side(call, read, jax.block_until_ready)


def _pixels(count: int, size: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, size, size, 3] and labels [N]: one batch of pictures, over and over."""
    levels = np.round(255 * pictures(count, size)).astype(np.uint8)
    return np.tile(levels, (batches, 1, 1, 1)), np.arange(count * batches) % CLASSES


def _resident(count: int, size: int, batches: int) -> Program:
    images, labels = map(jnp.asarray, _pixels(count, size, batches))
    order = data.epoch_order(jax.random.key(0), 0, len(labels))

    def gather(position: Array, images: Array, labels: Array, order: Array) -> tuple[Array, Batch]:
        batch = data.take(images, labels, order, position, count)
        return (position + 1) % batches, batch

    return Program(gather, (jnp.int32(0), images, labels, order), carried=True)


def _stream(
    source: Callable[[int, int, int], data.Source], count: int, size: int, batches: int,
    workers: int,
) -> Side:  # fmt: skip
    found = data.stream(source(count, size, batches), count, seed=0, workers=workers)
    return Side(lambda: jax.device_put(next(found)), wait=jax.block_until_ready)


def _arrays(count: int, size: int, batches: int) -> data.Source:
    return data.from_arrays(*_pixels(count, size, batches), name="pictures", classes=CLASSES)


def _files(folder: Path, count: int, size: int, batches: int) -> data.Source:
    from PIL import Image

    def write(part: str, number: int, image: np.ndarray, label: int) -> None:
        (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / part / str(label) / f"{number}.jpg", quality=90)

    images, labels = _pixels(count, size, batches)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        write("train", number, image, label)
    write("test", 0, images[0], labels.tolist()[0])  # a data set has these as well
    return data.load(f"folder:{folder}").train


# --- Checkpoints ------------------------------------------------------------------------------


def _checkpoint(folder: Path, workload: Workload, saves: int) -> dict[str, Any]:
    state, *_ = workload.program("natural", 1).arguments
    model = training.model_of(state)
    rest = {"step": state.step, "optimiser": state.optimiser}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((model, rest)))
    times: dict[str, list[float]] = {"waits": [], "saved": [], "restored": []}
    with Checkpoints(folder, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(0, model, rest)  # opens the folder as well
        checkpoints.wait()
        for number in range(1, saves + 1):
            began = time.perf_counter()
            checkpoints.save(number, model, rest)
            times["waits"].append(time.perf_counter() - began)
            checkpoints.wait()
            times["saved"].append(time.perf_counter() - began)
            began = time.perf_counter()
            found = checkpoints.restore(model, rest)
            jax.block_until_ready(found)
            times["restored"].append(time.perf_counter() - began)
    rates = {
        f"{name}_bytes_per_second": spread(size / np.array(times[name]))
        for name in ("saved", "restored")
    }
    seconds = {f"{name}_seconds": spread(values) for name, values in times.items()}
    return {"bytes": size, **seconds, **rates}
