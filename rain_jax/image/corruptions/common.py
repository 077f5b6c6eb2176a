"""What the families share: severities, the bytes that files hold, and values between pixels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, one_of
from rain_jax.gradients import straight_through
from rain_jax.image.given import floats, whole
from rain_jax.types import Array, Image

Constants = Literal["imagenet", "cifar"]
Table = Mapping[Constants, Sequence[Any]]

SEVERITIES = (1, 2, 3, 4, 5)
# Whole levels that float32 left a few millionths below themselves must not lose one.
_STRAY = 1e-3


def at(table: Table, severity: Any, constants: Constants) -> Array:
    """The row of a table for a severity from 1 to 5, which may be traced."""
    whole("severity", severity, SEVERITIES[0], SEVERITIES[-1])
    rows = table[one_of("constants", constants, table)]
    return row(np.asarray(rows, np.float32), severity)


def row(rows: np.ndarray, severity: Any) -> Array:
    """Of what was made for all severities on the host, [5, ...], that of one."""
    return jnp.asarray(rows)[severity - 1]


def colours(image: Image) -> int:
    """The number of channels of a picture, 3 or 1; others are refused."""
    if floats(image).shape[-1] not in (1, 3):
        raise UsageError(f"image {list(image.shape)}: expected 3 channels, or 1")
    return image.shape[-1]


_cut = straight_through(lambda image: jnp.floor(255 * image + _STRAY) / 255)
_rounded = straight_through(lambda image: jnp.floor(255 * image + 0.5) / 255)


def stored(image: Image) -> Image:
    """Clipped to [0, 1] and cut down to whole levels of 255, as the authors' scripts do it.

    The gradient is that of the clip alone.
    """
    return _cut(jnp.clip(image, 0.0, 1.0))


def rounded(image: Image) -> Image:
    """The same with the nearest level, as ImageMagick and Pillow do it."""
    return _rounded(jnp.clip(image, 0.0, 1.0))


def gaussians(length: int, sigmas: Sequence[float], *, truncate: float, mode: Any) -> np.ndarray:
    """Gaussian filters along one side, [S, length, length], as SciPy has them.

    A kernel reaches `truncate` standard deviations; `mode` is NumPy's name for how the side goes on
    beyond its ends: SciPy's "nearest" is its "edge", SciPy's "reflect" its "symmetric".
    """
    found = np.zeros((len(sigmas), length, length))
    for matrix, sigma in zip(found, sigmas, strict=True):
        reach = int(truncate * sigma + 0.5)
        places = np.arange(-reach, reach + 1)
        weights = np.exp(-0.5 * (places / sigma) ** 2) if reach else np.ones(1)
        around = np.pad(np.arange(length), reach, mode=mode)
        for place, weight in enumerate(weights / weights.sum()):
            np.add.at(matrix, (np.arange(length), around[place : place + length]), weight)
    return found.astype(np.float32)


def along_both(rows: Array, columns: Array, image: Image) -> Image:
    """[H, W, C] times a matrix [h, H] along its rows and one [w, W] along its columns."""
    precision = jax.lax.Precision.HIGHEST
    image = jnp.einsum("xw,hwc->hxc", columns, image, precision=precision)
    return jnp.einsum("yh,hxc->yxc", rows, image, precision=precision)


def mirrored(place: Array, length: int) -> Array:
    """Where a place beyond the ends comes from, if the last pixel is repeated: cba|abc|cba."""
    turn = jnp.mod(place, 2 * length)
    return jnp.where(turn < length, turn, 2 * length - 1 - turn)


def mirrored_once(place: Array, length: int) -> Array:
    """The same with the last pixel as the mirror: cb|abc|ba."""
    turn = jnp.mod(place, max(2 * length - 2, 1))
    return jnp.where(turn < length, turn, 2 * length - 2 - turn)


def between(image: Image, y: Array, x: Array, fold: Callable[[Array, int], Array]) -> Image:
    """Linear interpolation of [H, W, C] at `y` and `x` [h, w], continued by `fold`."""
    height, width, _ = image.shape
    top, left = jnp.floor(y), jnp.floor(x)
    down, across = (y - top)[:, :, None], (x - left)[:, :, None]
    rows = [fold(top.astype(jnp.int32) + i, height) for i in (0, 1)]
    columns = [fold(left.astype(jnp.int32) + i, width) for i in (0, 1)]
    upper, lower = (
        image[row, columns[0]] * (1 - across) + image[row, columns[1]] * across for row in rows
    )
    return upper * (1 - down) + lower * down


def enlarged_places(length: int, factor: float) -> np.ndarray:
    """Where the pixels of a side come from when its middle is enlarged to the same length [length].

    By SciPy's `zoom`, which puts the first and the last pixel of the part onto those of the result;
    what is then too long is cut off on both sides.
    """
    kept = int(np.ceil(length / factor))
    whole_length = round(kept * factor)
    step = (kept - 1) / max(whole_length - 1, 1)
    skipped = (whole_length - length) // 2
    return (length - kept) // 2 + step * (skipped + np.arange(length))


def stretched(image: Image, y: Array, x: Array) -> Image:
    """Linear interpolation of [H, W, C] at rows `y` [h] and columns `x` [w] inside it."""
    for axis, place in enumerate((y, x)):
        first = jnp.floor(place).astype(jnp.int32)
        second = jnp.minimum(first + 1, image.shape[axis] - 1)
        share = jnp.expand_dims(place - first, (1, 2) if axis == 0 else (0, 2))
        image = jnp.take(image, first, axis) * (1 - share) + jnp.take(image, second, axis) * share
    return image


def moved(image: Image, angle: Any, radius: Any, sigma: Any, *, reach: int) -> Image:
    """ImageMagick's motion blur of [H, W, C], towards `angle` in degrees: a comet's tail.

    The kernel is half a Gaussian over 2 radius + 1 pixels, at most `reach` + 1 of them, each at the
    nearest whole pixel along the way; the edges go on. Nothing is rounded.
    """
    step = jnp.arange(reach + 1, dtype=jnp.float32)
    kernel = jnp.where(step <= 2 * radius, jnp.exp(-0.5 * (step / sigma) ** 2), 0.0)
    turn = jnp.deg2rad(angle)
    # Halves go down, as in C's ceil(x - 1/2).
    down = jnp.ceil(step * jnp.sin(turn) - 0.5).astype(jnp.int32)
    across = jnp.ceil(step * jnp.cos(turn) - 0.5).astype(jnp.int32)
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")

    def add(total: Image, here: tuple[Array, Array, Array]) -> tuple[Image, None]:
        weight, dy, dx = here
        part = jax.lax.dynamic_slice(padded, (reach + dy, reach + dx, 0), image.shape)
        return total + weight * part, None

    steps = (kernel / jnp.sum(kernel), down, across)
    return jax.lax.scan(add, jnp.zeros_like(image), steps)[0]
