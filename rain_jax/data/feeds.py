"""From a source to batches: on the device, in order for evaluation, or streamed by grain."""

import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, within
from rain_jax.data.augment import random_resized_crop
from rain_jax.data.source import Source, read_many, reading_threads
from rain_jax.types import Array, Batch, Key

ENDLESS = 2**62  # steps
# What a generator draws for: streams of one Philox key that never overlap.
ORDER, CROP = 0, 1


def as_float(image: Any) -> Any:
    """Pixels as the network takes them: uint8 becomes float32 in [0, 1], floats become float32.

    Any shape, NumPy or JAX, inside `jit` or not. It multiplies by 1/255 in float32, since that is
    what XLA makes of a division by 255: host and device agree to the bit, and 255 is exactly 1.
    """
    if image.dtype == np.uint8:
        return image.astype(np.float32) * np.float32(1 / 255)
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise UsageError(f"images of {image.dtype}: expected uint8, or floats in [0, 1]")
    return image.astype(np.float32)


def epoch_order(key: Key, epoch: Any, size: int) -> Array:
    """The places [size] int32 of a source in the order of one epoch: a permutation.

    A function of `key` and `epoch` (which may be traced) alone, so a run that starts again needs
    to remember no more than its step.
    """
    return jax.random.permutation(jax.random.fold_in(key, epoch), size).astype(jnp.int32)


def take(images: Array, labels: Array, order: Array, position: Any, batch_size: int) -> Batch:
    """The batch number `position` of an epoch, gathered from arrays on the device.

    Its images are those at `order[position * batch_size : (position + 1) * batch_size]`, float32
    in [0, 1]; `position` may be traced and must be less than size // batch_size, since past the
    end XLA gives the last images again. All are valid; what is left over at the end of an epoch is
    not seen in it. `images` is [N, H, W, C] uint8 or float, `labels` [N], `order` [N] int32.
    """
    if batch_size > order.shape[0]:
        raise UsageError(f"batch_size={batch_size}: expected at most {order.shape[0]} images")
    index = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
    # "clip" spares XLA the bounds check: a permutation is within bounds.
    image = jnp.take(images, index, axis=0, mode="clip")
    label = jnp.take(labels, index, axis=0, mode="clip").astype(jnp.int32)
    return Batch(as_float(image), label, index, jnp.ones(batch_size, bool))


def evaluation_batches(source: Source, batch_size: int) -> Iterator[Batch]:
    """Every image of the source exactly once, in order, in batches of one shape.

    NumPy arrays, images as the source gives them. The last batch is filled up with black images
    of label 0 that are not `valid` and whose `index` goes on counting.
    """
    _check_batch_size(batch_size)
    return _in_order(source, batch_size)


def _in_order(source: Source, batch_size: int) -> Iterator[Batch]:
    with reading_threads() as pool:
        for start in range(0, source.size, batch_size):
            count = min(batch_size, source.size - start)
            image, label = read_many(source, range(start, start + count), pool)
            padding = batch_size - count
            yield _batch(
                np.pad(image, ((0, padding), (0, 0), (0, 0), (0, 0))),
                np.pad(label, (0, padding)),
                np.arange(start, start + batch_size),
                np.arange(batch_size) < count,
            )


def stream(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    crop: tuple[float, float] | None = None,
) -> Generator[Batch, None, None]:
    """Endless shuffled batches for training, from `first_step` on.

    The batch of step k is a pure function of (source, batch_size, seed, crop, k): whatever
    `first_step`, `workers` and `prefetch` are, so a run that was killed goes on as if it had not
    been. Every epoch is a new permutation of the source; the last size % batch_size images of it
    are left out, others in each epoch.

    `batch_size` is that of all processes together; each gets `batch_size / process_count` images,
    and the slices of processes 0, 1, .. one after the other are the batch of a single process.
    `workers` processes (0: only threads) read ahead `prefetch` batches each. With `crop` = (low,
    high) an image is a random part of the original one, of low to high of its area, resized to
    the source's shape (Inception's crop), drawn from (seed, epoch, index).

    Batches are NumPy arrays, images uint8 or float32 as the source gives them, all valid. `close()`
    ends the workers, which are new interpreters: a script that starts them needs the usual
    `if __name__ == "__main__":`. Raises `UsageError` for numbers out of range.
    """
    _check_batch_size(batch_size)
    if batch_size > source.size:
        raise UsageError(f"batch_size={batch_size}: expected at most {source.size} images")
    within("seed", seed, 0, below=2**63)
    within("first_step", first_step, 0, below=ENDLESS)
    within("workers", workers, 0)
    within("prefetch", prefetch, 1)
    within("process_count", process_count, 1)
    within("process_index", process_index, 0, process_count - 1)
    if batch_size % process_count:
        raise UsageError(
            f"batch_size={batch_size}: expected a multiple of {process_count} processes"
        )
    if crop is not None:
        low, high = crop
        within("crop", low, above=0, high=1)
        within("crop", high, low, 1)
    local = batch_size // process_count
    reader = _StepReader(source, batch_size, process_index * local, local, seed, crop)
    return _prefetched(reader, first_step, workers, prefetch)


def _prefetched(
    read: "_StepReader", first_step: int, workers: int, prefetch: int
) -> Generator[Batch, None, None]:
    import grain
    from absl import flags

    # grain's elements are whole batches by step number. That makes starting in the middle an
    # addition, and leaves nothing to grain's slicing: workers that each sliced single images and
    # batched them afterwards would put other images together for every number of workers.
    steps = grain.MapDataset.range(first_step, ENDLESS).map(read)
    threads = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    batches = steps.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers are handed the values of its flags
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=prefetch
        )
        batches = batches.mp_prefetch(options)
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


@dataclass(frozen=True)
class _StepReader:
    """Step number -> this process's part of that step's batch."""

    source: Source
    batch_size: int
    offset: int
    count: int
    seed: int
    crop: tuple[float, float] | None

    def __call__(self, step: int) -> Batch:
        epoch, position = divmod(int(step), self.source.size // self.batch_size)
        order = _stream_order(self.seed, epoch, self.source.size)
        start = position * self.batch_size + self.offset
        places = order[start : start + self.count]
        pairs = [self._read(int(place), epoch) for place in places]
        image, label = np.stack([i for i, _ in pairs]), np.array([k for _, k in pairs])
        return _batch(image, label, places, np.ones(self.count, bool))

    def _read(self, place: int, epoch: int) -> tuple[np.ndarray, int]:
        if self.crop is None:
            return self.source.read(place)
        image, label = (self.source.original or self.source.read)(place)
        draw = _generator(self.seed, epoch, place, CROP)
        return random_resized_crop(draw, image, self.source.shape[:2], self.crop), label


@functools.lru_cache(maxsize=2)  # threads at work on either side of an epoch's end
def _stream_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return _generator(seed, epoch, 0, ORDER).permutation(size)


def _generator(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    # The counter's low words count the numbers drawn; its high words keep the streams apart.
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, index, purpose]))


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise UsageError(f"batch_size={batch_size!r}: expected a whole number")
    within("batch_size", batch_size, 1)


def _batch(image: Any, label: Any, index: Any, valid: Any) -> Batch:
    return Batch(image, label.astype(np.int32), index.astype(np.int32), valid)
