"""What every source of labelled images is: random access, and what can be made of it."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rain_jax.checks import UsageError
from rain_jax.data.augment import resize_and_centre

Read = Callable[[int], tuple[np.ndarray, int]]

SPLIT_SEED = 0  # of the digits' test images and of every held-out draw: never changes
MARGIN = 256 / 224  # shorter side before the centre crop, to the crop: the usual ImageNet protocol


class Source(NamedTuple):
    """Labelled images by place: random access, the same answer every time.

    `read(place)` gives (image, label) for place in [0, size): uint8 [H, W, C], or float32 in
    [0, 1], and a label in [0, classes). It is safe to call from several threads and can be
    pickled. It raises `UsageError` for a file that cannot be read.
    """

    name: str
    size: int
    shape: tuple[int, int, int]  # H, W, C of every image it gives
    classes: int
    class_names: tuple[str, ...]  # "0", "1", .. where unknown
    read: Read
    arrays: tuple[np.ndarray, np.ndarray] | None = None  # where they are in memory already
    original: Read | None = None  # before `resize`, where there was one: for random crops
    extra: "Extra | None" = None  # what shares the batches that training makes of them


class Extra(NamedTuple):
    """Further labelled images, generated ones for example, that training mixes in."""

    source: Source
    fraction: float  # of each batch


class Splits(NamedTuple):
    """Training images, images held out of them (or the data set's own), and test images."""

    train: Source
    valid: Source | None
    test: Source


def from_arrays(
    image: Any,
    label: Any,
    *,
    name: str,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Source:
    """A source over arrays: images [N, H, W, C] or [N, H, W] and labels [N].

    Images are uint8, or floats in `bounds`, which become float32; labels are whole numbers in
    [0, classes), where `classes` is by default the number of names, or else the largest label
    plus one. The arrays are not copied unless they must be converted. Raises `UsageError`.
    """
    image, label = np.asarray(image), np.asarray(label)
    if image.ndim == 3:
        image = image[..., None]
    if image.ndim != 4 or 0 in image.shape:
        raise UsageError(
            f"{name}: images of shape {image.shape}: expected [N, H, W, C] or [N, H, W], none empty"
        )
    if np.issubdtype(image.dtype, np.floating):
        low, high = image.min(), image.max()
        if not (low >= bounds[0] and high <= bounds[1]):  # so that NaN is refused too
            hint = "; divide by 255?" if 1 < high <= 255 else ""
            raise UsageError(
                f"{name}: pixels in [{low:g}, {high:g}]: expected "
                f"[{bounds[0]:g}, {bounds[1]:g}]{hint}"
            )
        image = image.astype(np.float32, copy=False)
    elif image.dtype != np.uint8:
        raise UsageError(f"{name}: images of {image.dtype}: expected uint8, or floats in [0, 1]")
    if label.shape != image.shape[:1]:
        raise UsageError(
            f"{name}: labels of shape {label.shape}: expected [{len(image)}], one for each image"
        )
    if not np.issubdtype(label.dtype, np.integer):
        raise UsageError(f"{name}: labels of {label.dtype}: expected whole numbers")
    if classes is None:
        classes = len(class_names) if class_names is not None else int(label.max()) + 1
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if len(wrong):
        raise UsageError(
            f"{name}: label {label[wrong[0]]} of image {wrong[0]}: expected [0, {classes})"
        )
    names = tuple(map(str, range(classes) if class_names is None else class_names))
    if len(names) != classes:
        raise UsageError(
            f"{name}: {len(names)} class names: expected {classes}, one for each class"
        )
    label = label.astype(np.int32, copy=False)
    shape = (image.shape[1], image.shape[2], image.shape[3])
    reader = _FromArrays(image, label)
    return Source(name, len(image), shape, classes, names, reader, (image, label))


def resident(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The whole source in memory: images [N, H, W, C] as it gives them and labels int32 [N].

    Arrays that are in memory already are returned as they are; files are decoded once, by several
    threads.
    """
    if source.arrays is not None:
        return source.arrays
    with reading_threads() as pool:
        return read_many(source, range(source.size), pool)


def pooled(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """As `resident`, with the extra images behind the source's own, where it has some."""
    if source.extra is None:
        return resident(source)
    (images, labels), (more, others) = resident(source), resident(source.extra.source)
    return np.concatenate([images, more]), np.concatenate([labels, others])


def at_most(where: str, count: int | None, source: Source) -> int | None:
    """Returns `count` where a source has so many images, or is not asked for a number; raises."""
    if count is not None and count > source.size:
        raise UsageError(
            f"{where}={count:,}: expected at most {source.size:,}, the images of {source.name}"
        )
    return count


def first(source: Source, count: int | None) -> Source:
    """The first `count` images of a source; all of them where `count` is None or too large."""
    return limited(source, count, spaced=False)


def reading_threads() -> concurrent.futures.ThreadPoolExecutor:
    """As many threads as there are processors: decoding PNG and JPEG leaves the interpreter."""
    return concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1), "rain_jax-read")


def read_many(
    source: Source, places: Sequence[int], pool: concurrent.futures.Executor
) -> tuple[np.ndarray, np.ndarray]:
    """The images at `places`, at least one, stacked, and their labels int32."""
    if source.arrays is not None:
        image, label = source.arrays
        return image[np.asarray(places)], label[np.asarray(places)]
    first, _ = source.read(places[0])
    images = np.zeros((len(places), *source.shape), first.dtype)
    labels = np.zeros(len(places), np.int32)

    def fill(start: int) -> None:
        for row in range(start, min(start + 16, len(places))):
            images[row], labels[row] = source.read(places[row])

    for _ in pool.map(fill, range(0, len(places), 16)):
        pass  # consumed, so that what a thread raises is raised here
    return images, labels


# Readers are classes and not closures, so that worker processes can be sent them.


@dataclass(frozen=True)
class _FromArrays:
    image: np.ndarray
    label: np.ndarray

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        return self.image[place], int(self.label[place])


@dataclass(frozen=True)
class _Subset:
    read: Read
    places: np.ndarray

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        return self.read(int(self.places[place]))


@dataclass(frozen=True)
class _Resized:
    read: Read
    size: int
    shorter: int

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        image, label = self.read(place)
        return resize_and_centre(image, self.size, self.shorter), label


def subset(source: Source, places: np.ndarray) -> Source:
    return source._replace(
        size=len(places),
        read=_Subset(source.read, places),
        original=None if source.original is None else _Subset(source.original, places),
        arrays=source.arrays and (source.arrays[0][places], source.arrays[1][places]),
    )


def limited(source: Source, limit: int | None, spaced: bool) -> Source:
    if limit is None or limit >= source.size:
        return source
    return subset(source, np.arange(limit) * source.size // limit if spaced else np.arange(limit))


def resized(source: Source, size: int, shorter: int) -> Source:
    return source._replace(
        shape=(size, size, source.shape[2]),
        read=_Resized(source.read, size, shorter),
        original=source.read,
        arrays=None,
    )


def draw(label: np.ndarray, count: int) -> np.ndarray:
    """`count` places, ascending, with every class in proportion: the same ones at every call."""
    order = np.random.Generator(np.random.Philox(key=SPLIT_SEED)).permutation(len(label))
    rank = np.empty(len(label))
    for k in np.unique(label):
        own = order[label[order] == k]
        rank[own] = (np.arange(len(own)) + 0.5) / len(own)
    return np.sort(order[np.argsort(rank[order], kind="stable")[:count]])


def one_line(error: Exception) -> str:
    """The first line of what a library says, since a refusal is one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
