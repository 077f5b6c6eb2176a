"""From a source to batches: on the device, in order for evaluation, or streamed by grain."""

import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, whole, within
from rain_jax.data.augment import random_resized_crop
from rain_jax.data.source import Source, read_many, reading_threads
from rain_jax.types import Array, Batch, Key

ENDLESS = 2**62  # steps
# What a generator draws for: streams of one Philox key that never overlap.
ORDER, CROP, EXTRA_ORDER = 0, 1, 2


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


class Part(NamedTuple):
    """Images that have a share of every batch, and are gone through at their own pace."""

    size: int
    share: int  # of each batch, in images
    begin: int  # the index of the first of them, which is behind all of the part before

    @property
    def steps(self) -> int:
        """How many batches see each image once, but for the last size % share."""
        return self.size // self.share


def parts_of(source: Source, batch_size: int) -> tuple[Part, ...]:
    """The source's own images, and the extra ones beside them: `fraction` of a batch, rounded.

    Raises `UsageError` where a batch would hold none of one kind, or more than there are.
    """
    if source.extra is None:
        return (Part(source.size, batch_size, 0),)
    more, fraction = source.extra
    count = round(fraction * batch_size)
    if not 0 < count < batch_size:
        raise UsageError(
            f"extra_fraction={fraction:g}: expected images of both kinds in a batch of "
            f"{batch_size}: {count} of them would be extra ones"
        )
    for name, size, needed in (
        (source.name, source.size, batch_size - count), (more.name, more.size, count)
    ):  # fmt: skip
        if needed > size:
            raise UsageError(
                f"batch_size={batch_size}: expected at most {size} images of {name} in a batch, "
                f"which are {needed}"
            )
    return Part(source.size, batch_size - count, 0), Part(more.size, count, source.size)


def seats(parts: tuple[Part, ...]) -> np.ndarray:
    """Which row of the parts, one after the other, sits at each place [B] of a batch.

    Extra images are spread over it, so that every device gets its share of them, within one.
    """
    total, extra = sum(part.share for part in parts), sum(part.share for part in parts[1:])
    so_far = np.arange(total + 1) * extra // total
    taken = np.diff(so_far)
    return np.where(taken, total - extra + so_far[:-1], np.arange(total) - so_far[:-1])


def shared_order(key: Key, epoch: Any, parts: tuple[Part, ...], steps: int) -> Array:
    """The indices [steps * B] int32 of the batches of one epoch of `steps`, one after the other.

    As `epoch_order`, a function of `key` and `epoch` alone, for batches that parts share. A part
    goes through a permutation of its own images and then through another one, whatever `steps`.
    """
    number = epoch * steps + jnp.arange(steps)
    columns = []
    for own, part in enumerate(parts):
        first = epoch * steps // part.steps
        # As many passes as an epoch can touch.
        passes = first + jnp.arange(-(-steps // part.steps) + 1)
        order = functools.partial(epoch_order, jax.random.fold_in(key, own), size=part.size)
        orders = jax.vmap(order)(passes)
        rows = (number % part.steps * part.share)[:, None] + jnp.arange(part.share)[None]
        columns.append(part.begin + orders[(number // part.steps - first)[:, None], rows])
    return jnp.concatenate(columns, axis=1)[:, seats(parts)].reshape(-1)


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


def evaluation_batches(
    source: Source, batch_size: int, places: np.ndarray | None = None
) -> Iterator[Batch]:
    """Every image of the source exactly once, in order, in batches of one shape.

    With `places`, whole numbers [N] below `source.size`, those alone, in the order given. NumPy
    arrays, images as the source gives them. The last batch is filled up with black images of label
    0 that are not `valid` and whose `index` goes on counting behind the source's end.
    """
    _check_batch_size(batch_size)
    return _in_order(source, batch_size, np.arange(source.size) if places is None else places)


def _in_order(source: Source, batch_size: int, places: np.ndarray) -> Iterator[Batch]:
    with reading_threads() as pool:
        for start in range(0, len(places), batch_size):
            index = places[start : start + batch_size]
            image, label = read_many(source, index.tolist(), pool)
            padding = batch_size - len(index)
            yield _batch(
                np.pad(image, ((0, padding), (0, 0), (0, 0), (0, 0))),
                np.pad(label, (0, padding)),
                np.concatenate([index, source.size + np.arange(padding)]),
                np.arange(batch_size) < len(index),
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
    are left out, others in each epoch. A source with extra images leaves them their share of each
    batch, see `parts_of`, and both go through permutations of their own; the index of an extra
    image counts on behind the source's.

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
    if batch_size > source.size and source.extra is None:
        raise UsageError(f"batch_size={batch_size}: expected at most {source.size} images")
    parts_of(source, batch_size)
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
        parts = parts_of(self.source, self.batch_size)
        found = []
        for part, purpose in zip(parts, (ORDER, EXTRA_ORDER), strict=False):
            epoch, position = divmod(int(step), part.steps)
            order = _stream_order(self.seed, epoch, part.size, purpose)
            places = order[position * part.share : (position + 1) * part.share]
            found += [(part.begin + int(place), epoch) for place in places]
        own = seats(parts)[self.offset : self.offset + self.count]
        pairs = [self._read(*found[row]) for row in own]
        image, label = np.stack([i for i, _ in pairs]), np.array([k for _, k in pairs])
        index = np.array([found[row][0] for row in own])
        return _batch(image, label, index, np.ones(self.count, bool))

    def _read(self, index: int, epoch: int) -> tuple[np.ndarray, int]:
        source, place = self.source, index
        if source.extra is not None and index >= source.size:
            source, place = source.extra.source, index - source.size
        if self.crop is None:
            return source.read(place)
        image, label = (source.original or source.read)(place)
        draw = _generator(self.seed, epoch, index, CROP)
        return random_resized_crop(draw, image, source.shape[:2], self.crop), label


@functools.lru_cache(maxsize=4)  # threads at work on either side of an epoch's end
def _stream_order(seed: int, epoch: int, size: int, purpose: int) -> np.ndarray:
    return _generator(seed, epoch, 0, purpose).permutation(size)


def _generator(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    # The counter's low words count the numbers drawn; its high words keep the streams apart.
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, index, purpose]))


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise UsageError(f"batch_size={batch_size!r}: expected a whole number")
    whole("batch_size", batch_size, 1)


def _batch(image: Any, label: Any, index: Any, valid: Any) -> Batch:
    return Batch(image, label.astype(np.int32), index.astype(np.int32), valid)
