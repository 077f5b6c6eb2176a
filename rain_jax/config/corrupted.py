"""Test images under a common corruption, made when they are asked for (arXiv:1903.12261)."""

import functools
import threading
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import data
from rain_jax.checks import UsageError
from rain_jax.config.options import Corrupted
from rain_jax.image.corruptions import FAMILIES, Constants, Corruption, Frost, frosted
from rain_jax.parallel import image_keys
from rain_jax.types import Array, Image, Key

# Constants were published for 32 and for 224 pixels: up to here the smaller ones are nearer.
SMALL = 64
# Of the authors' six photographs of frost their code draws among these.
FROSTS = 5
# Images that are corrupted at once.
_BLOCK = 250


def root_key(seed: int) -> Key:
    """The root of all draws here; training and other evaluations draw nothing from it."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"corruptions"))


def cell_key(seed: int, family: str, severity: int) -> Key:
    """That of a family at one severity, whichever others stand beside it."""
    key = jax.random.fold_in(root_key(seed), zlib.crc32(family.encode()))
    return jax.random.fold_in(key, severity)


def constants_of(asked: Any, source: data.Source) -> Constants:
    """Those that are asked for, or the nearer ones."""
    if asked.constants != "auto":
        return asked.constants
    return "cifar" if min(source.shape[:2]) <= SMALL else "imagenet"


def frost_of(frost: str | None, constants: Constants) -> Frost | None:
    """The photographs of frost in a file or a folder, where one is named."""
    if frost is None:
        return None
    path = Path(frost).expanduser()
    if not path.exists():
        raise UsageError(f"frost={frost}: no such file or folder")
    files = sorted(path.iterdir())[:FROSTS] if path.is_dir() else [path]
    return frosted([_pixels(file) for file in files], constants=constants)


def _pixels(file: Path) -> np.ndarray:
    from PIL import Image as pillow

    try:
        with pillow.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # by format and damage: OSError, SyntaxError, ValueError, ..
        raise UsageError(
            f"frost: {file} cannot be read: expected a photograph ({' '.join(str(error).split())})"
        ) from error


class Made:
    """`read` of a source of images that are corrupted when they are asked for, a block at a time.

    Severities of a family share one program. The draws follow from the seed and from an image's
    place alone.
    """

    def __init__(self, source: data.Source, asked: Corrupted):
        self.source, self.asked = source, asked
        self.program = _program(asked.family, constants_of(asked, source), asked.frost)
        self.key = cell_key(asked.seed, asked.family, asked.severity)
        self.lock = threading.Lock()
        self.number, self.images, self.labels = -1, np.zeros(0), np.zeros(0, int)  # of the block
        image = jax.ShapeDtypeStruct((1, *source.shape), jnp.float32)
        index = jax.ShapeDtypeStruct((1,), jnp.int32)
        try:  # traced now, so that what does not fit is met before anything is measured
            jax.eval_shape(self.program, self.key, asked.severity, index, image)
        except UsageError as error:
            raise UsageError(f"config.evaluation.corruption {asked.family}: {error}") from None

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        number, row = divmod(place, _BLOCK)
        with self.lock:
            if self.number != number:
                # The last block is filled up with its last image: one shape for all.
                places = np.minimum(np.arange(_BLOCK) + number * _BLOCK, self.source.size - 1)
                images, labels = zip(*(self.source.read(int(one)) for one in places), strict=True)
                index, given = places.astype(np.int32), data.as_float(np.stack(images))
                self.images = np.asarray(self.program(self.key, self.asked.severity, index, given))
                self.number, self.labels = number, np.asarray(labels)
            return self.images[row], int(self.labels[row])


def corrupted(source: data.Source, asked: Corrupted) -> data.Source:
    """The same images, corrupted: float32 in [0, 1]. Read in order, each is made once.

    Raises `UsageError` for photographs that cannot be read and images that a family is not for.
    """
    name = f"{source.name}, {asked.family} {asked.severity}"
    # What lies in memory, or is read elsewhere, are the images as they were.
    return source._replace(name=name, read=Made(source, asked), arrays=None, original=None)


@functools.cache
def _program(family: str, constants: Constants, frost: str | None) -> Any:
    photographs = frost_of(frost, constants)
    given = {} if photographs is None else {"photographs": photographs}

    return jax.jit(partial(batch_of, FAMILIES[family], constants, given))


def batch_of(
    corruption: Corruption, constants: Constants, given: Mapping[str, Any],
    key: Key, severity: Any, index: Any, images: Any,
) -> Array:  # fmt: skip
    """Images [B, H, W, C] in [0, 1], each corrupted by a key of its place [B]; for a program."""

    def one(key: Key, image: Image) -> Image:
        return corruption(key, image, severity, constants=constants, **given)

    return jax.vmap(one)(image_keys(key, index), images)
