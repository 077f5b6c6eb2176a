"""Halving an image at random or by means, and resizing to a size known only when it runs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of
from rain_jax.image.given import floats, whole
from rain_jax.types import Array, Image, Key

Method = Literal["nearest", "area", "linear", "cubic"]

# The free parameter of Keys' cubic convolution at which it reproduces quadratics (Keys 1981), as in
# `jax.image.resize` and Pillow; PyTorch and OpenCV have -0.75.
_KEYS = -0.5


def to_even(image: Image) -> Image:
    """[H, W, C] with its last row and column doubled where that makes H and W even."""
    height, width, _ = floats(image).shape
    return jnp.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _windows(image: Image) -> Array:
    """[H, W, C] as its 2x2 windows [H/2, 2, W/2, 2, C]."""
    height, width, channels = floats(image).shape
    if height % 2 or width % 2:
        raise UsageError(f"image {list(image.shape)}: expected even height and width; see to_even")
    return image.reshape(height // 2, 2, width // 2, 2, channels)


def random_pick(key: Key, image: Image, *, per_channel: bool = True) -> Image:
    """Keeps one pixel of each 2x2 window, each with chance 1/4 (RAIN's RdmDU, arXiv:2004.14798).

    [H, W, C] to [H/2, W/2, C]; odd sizes raise `UsageError`. Windows are independent, and so are
    the channels of a window, as in the authors' code (dydjw9/RAIN); without `per_channel` the
    channels of a pixel stay together. The gradient goes to the pixels that were kept.
    """
    windows = _windows(image)
    height, _, width, _, channels = windows.shape
    shape = (height, width, channels if per_channel else 1)
    which = jnp.broadcast_to(jax.random.randint(key, shape, 0, 4), (height, width, channels))
    return jax.lax.select_n(which, *(windows[:, i, :, j] for i in (0, 1) for j in (0, 1)))


def mean_pool(image: Image) -> Image:
    """The mean of each 2x2 window, the expectation of `random_pick`: [H, W, C] to [H/2, W/2, C].

    Odd sizes raise `UsageError`.
    """
    return jnp.mean(_windows(image), axis=(1, 3))


# Each method: place [N, 1] and index [1, n] of output and input pixels along one side, its length
# before and after, to weights [N, n] up to a factor for each row. Places are compared as whole
# numbers, so that no rounding decides which pixel is nearest.


def _nearest(place: Array, index: Array, before: int, after: Array) -> Array:
    return ((2 * place + 1) * before // (2 * after) == index).astype(jnp.float32)


def _area(place: Array, index: Array, before: int, after: Array) -> Array:
    # In units of 1 / after of an input pixel, both pixels' ends are whole numbers.
    end = jnp.minimum((place + 1) * before, (index + 1) * after)
    return jnp.maximum(end - jnp.maximum(place * before, index * after), 0).astype(jnp.float32)


def _distance(place: Array, index: Array, before: int, after: Array) -> Array:
    """How far the centres of output and input pixels are apart, in input pixels."""
    return jnp.abs((2 * place + 1) * before - (2 * index + 1) * after) / (2 * after)


def _linear(place: Array, index: Array, before: int, after: Array) -> Array:
    return jnp.maximum(1 - _distance(place, index, before, after), 0)


def _cubic(place: Array, index: Array, before: int, after: Array) -> Array:
    x = _distance(place, index, before, after)
    near = ((_KEYS + 2) * x - (_KEYS + 3)) * x * x + 1
    far = _KEYS * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


_METHODS: dict[str, Callable[[Array, Array, int, Array], Array]] = {
    "nearest": _nearest,
    "area": _area,
    "linear": _linear,
    "cubic": _cubic,
}


def _matrix(before: int, after: Any, canvas: int, method: str) -> Array:
    """Resamples `before` pixels to the first `after` of `canvas`: [canvas, before]."""
    place = jnp.arange(canvas, dtype=jnp.int32).reshape(-1, 1)
    index = jnp.arange(before, dtype=jnp.int32).reshape(1, -1)
    after = jnp.asarray(after, jnp.int32)
    weights = _METHODS[method](place, index, before, after)
    weights = jnp.where(place < after, weights, 0.0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights / jnp.where(place < after, total, 1.0)


def resize(image: Image, size: Any, *, canvas: Sequence[int], method: Method = "linear") -> Image:
    """Resamples [H, W, C] to `size` = (h, w), in the upper left corner of a black `canvas`.

    The result is [*canvas, C] whatever the size, which is at least 1, at most `canvas`, and may be
    traced: one compiled program resizes each image of a batch to its own size. Pixels are squares
    with values at their centres. "nearest" takes the pixel that the new centre falls in, "area" the
    mean of what the new pixel covers, "linear" and "cubic" (Keys, a = -0.5) interpolate at the new
    centre without a filter against aliasing, as `jax.image.resize(..., antialias=False)` does:
    weights that fall outside the image are shared out among those inside. Only "cubic" can leave
    the range of the image; it is not clipped. The resize is linear in the image and its gradient
    exact. Raises `UsageError` for sizes outside the canvas, or between pixels, and for unknown
    methods.
    """
    one_of("method", method, _METHODS)
    (height, width), (tall, wide) = size, canvas
    before, broad, _ = floats(image).shape
    whole("size", height, 1, tall)
    whole("size", width, 1, wide)
    down, across = _matrix(before, height, tall, method), _matrix(broad, width, wide, method)
    rows = jnp.einsum("yh,hwc->ywc", down, image, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("xw,ywc->yxc", across, rows, precision=jax.lax.Precision.HIGHEST)
