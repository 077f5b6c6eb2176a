"""A convolution on CPU in the form that is fastest there.

In the canonical layout (images NHWC, kernel HWIO) XLA's routines are of unlike speed. Six detours
lead around slow ones, and which form wins where was found by timing them against each other (jaxlib
0.10, x86, float32); `experiments.benchmark --config.suite=convolutions` times what came of it:

- where many channels meet many, fewer multiplications (`models.winograd`);
- where few leave, as towards the colours of images, one matrix product and sums of its shifts;
- where few enter, several pixels at once;
- backwards from few pixels under a large kernel a product for each tap, none of them transposed;
- a row of zeros for images of many channels and without padding;
- for strides backwards a convolution for each phase.

They add up the same products in another order, and the first sums of them, which costs a bit of
precision.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rain_jax.models import winograd
from rain_jax.types import Array

CANONICAL = ("NHWC", "HWIO", "NHWC")


class Window(NamedTuple):
    """All that is static about a convolution, by the names `lax.conv_general_dilated` knows."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    precision: Any
    preferred_element_type: Any


def convolved(images: Array, kernel: Array, window: Window) -> Array:
    """Images [B, H, W, C] under a kernel [h, w, C, K]: the form that is fastest for these sizes."""
    if not _known(images, kernel, window):
        return plain(images, kernel, window)
    if _fewer_products_are_faster(images.shape, kernel.shape, window):
        return _by_winograd(images, kernel, window)
    if _few_leave(images, kernel, window):
        return _by_shifts(images, kernel, window)
    if window.lhs_dilation != (1, 1):
        if _phases_are_faster(kernel, window):
            return _by_phases(images, kernel, window)
        return plain(images, kernel, window)
    several = _neighbours_at_once(images, kernel, window)
    if several > 1:
        return _wide(images, kernel, window, several)
    area = math.prod(images.shape[1:3])
    unpadded = all(pair == (0, 0) for pair in window.padding) and kernel.shape[0] > 1
    if unpadded and window.window_strides == (1, 1) and images.shape[3] >= 24 and area >= 14 * 14:
        # Without any padding, images of many channels take a route several times slower. One row
        # of zeros below leads off it; what it adds is cut away.
        padded = plain(images, kernel, window._replace(padding=((0, 1), (0, 0))))
        return padded[:, :-1]
    return plain(images, kernel, window)


def image_gradient(cotangent: Array, kernel: Array, window: Window) -> Array | None:
    """What a cotangent [B, H', W', K] sends back to images; None where there is no detour.

    That is its convolution under the kernel [h, w, C, K] turned round, by the geometry of `window`,
    with inputs for outputs. XLA transposes large kernels slowly: here they stay as they are.
    """
    if not _known(cotangent, kernel, window):
        return None
    taps = kernel[::-1, ::-1]
    swapped = (*kernel.shape[:2], *kernel.shape[:1:-1])
    if _fewer_products_are_faster(cotangent.shape, swapped, window):
        return winograd.convolve(cotangent, taps, window.padding, turned=True)
    if _few_pixels(cotangent.shape, kernel.shape) and _moves_by_pixels(window):
        return _by_taps(cotangent, taps, window)
    return None


def kernel_gradient(images: Array, kernel: Array, cotangent: Array, window: Window) -> Array | None:
    """What a cotangent [B, H', W', K] sends back to the kernel; None where there is no detour."""
    if not _known(images, kernel, window):
        return None
    # Of large maps `lax` is as fast, until there are so many that it runs out of cache.
    area, batch = math.prod(images.shape[1:3]), images.shape[0]
    large = area > 16 * 16 and not (isinstance(batch, int) and batch * area >= 2**16)
    if min(kernel.shape[2:]) < 64 or large:
        return None
    if not _fewer_products_are_faster(images.shape, kernel.shape, window):
        return None
    return winograd.kernel_gradient(images, cotangent, window.padding)


def _known(images: Array, kernel: Array, window: Window) -> bool:
    """Whether it was timed at all: float32 by the usual products, and sizes.

    In exported programs a size may be a symbol, of which nobody knows how large it is.
    """
    sizes = all(isinstance(size, int) for size in (*images.shape[1:], *kernel.shape))
    usual = window.preferred_element_type in (None, jnp.float32) and window.precision is None
    return sizes and usual and images.dtype == kernel.dtype == jnp.float32


def plain(images: Array, kernel: Array, window: Window) -> Array:
    """The convolution of `lax`."""
    return lax.conv_general_dilated(images, kernel, **window._asdict(), dimension_numbers=CANONICAL)


def _fewer_products_are_faster(
    images: tuple[int, ...], kernel: tuple[int, ...], window: Window
) -> bool:
    """Where there are channels enough to pay for Winograd's sums, and tiles for the kernel's.

    How many tiles there are nobody can tell who is given one image: under the `vmap` of an attack
    it is one of many, and the kernel's sums stand before the loop.
    """
    *size, channels, features = kernel
    usual = size == [3, 3] and _moves_by_pixels(window)
    many = min(channels, features) >= 32 and channels + features >= 96
    area, batch = math.prod(images[1:3]), images[0] if isinstance(images[0], int) else 1
    return usual and many and area >= 4 * 4 and (batch == 1 or batch * area // 4 >= 64)


def _few_leave(images: Array, kernel: Array, window: Window) -> bool:
    height, width, channels, features = kernel.shape
    several = 1 < height * width <= 25 and features <= 4
    return _moves_by_pixels(window) and several and channels >= 16


def _moves_by_pixels(window: Window) -> bool:
    """Without strides and gaps, and without cutting pixels away."""
    steps = (window.window_strides, window.lhs_dilation, window.rhs_dilation)
    return all(by == (1, 1) for by in steps) and min(map(min, window.padding)) >= 0


def _by_shifts(images: Array, kernel: Array, window: Window) -> Array:
    """What each pixel gives to each of those around it in one product, and the sums of these."""
    height, width, channels, features = kernel.shape
    taps = jnp.transpose(kernel, (2, 0, 1, 3)).reshape(channels, -1)
    given = lax.dot_general(images, taps, (((3,), (0,)), ((), ())), precision=window.precision)
    given = given.reshape(*given.shape[:3], height, width, features)
    return _shifted(lambda y, x: given[:, :, :, y, x], kernel, window)


def _few_pixels(images: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Of a batch that is known; and a large kernel, to transpose which takes longer than to use."""
    batch, *size, _ = images
    known = isinstance(batch, int) and batch > 1
    return known and batch * math.prod(size) <= 128 and min(kernel[2:]) >= 128


def _by_taps(images: Array, taps: Array, window: Window) -> Array:
    """The convolution under taps [h, w, K, C], a product for each of them."""
    contract = (((3,), (1,)), ((), ()))

    def given(y: int, x: int) -> Array:
        return lax.dot_general(images, taps[y, x], contract, precision=window.precision)

    return _shifted(given, taps, window)


def _shifted(given: Callable[[int, int], Array], kernel: Array, window: Window) -> Array:
    """The sum of what each tap of a kernel is given, [B, H, W, K], moved to where it goes."""
    (top, bottom), (left, right) = window.padding
    height, width = kernel.shape[:2]
    total: Any = 0
    for y in range(height):
        for x in range(width):
            rows = top - y, bottom - (height - 1) + y, 0
            columns = left - x, right - (width - 1) + x, 0
            part = given(y, x)
            moved = [(0, 0, 0), rows, columns, (0, 0, 0)]
            total = total + lax.pad(part, jnp.zeros((), part.dtype), moved)
    return total


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _by_winograd(images: Array, kernel: Array, window: Window) -> Array:
    return winograd.convolve(images, kernel, window.padding)


@_by_winograd.defjvp
def _(
    window: Window, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Whoever differentiates this and not `_convolve` asked for the gradients of `lax`."""
    (images, kernel), (images_moved, kernel_moved) = primals, tangents
    moved = plain(images_moved, kernel, window) + plain(images, kernel_moved, window)
    return _by_winograd(images, kernel, window), moved


def _phases_are_faster(kernel: Array, window: Window) -> bool:
    usual = window.window_strides == window.rhs_dilation == (1, 1)
    return usual and 16 <= kernel.shape[3] <= 64


def _by_phases(images: Array, kernel: Array, window: Window) -> Array:
    """A convolution of spread-out images, without the zeros between their pixels.

    Pixels of the result that leave the same remainder by the dilation see the same part of the
    kernel: each such phase is a convolution of the images as they were, and then they are shuffled
    together.
    """
    spread, (batch, *size, _) = window.lhs_dilation, images.shape
    seen = [span(size[i], spread[i]) + sum(window.padding[i]) for i in (0, 1)]
    out = [seen[i] - kernel.shape[i] + 1 for i in (0, 1)]
    m = [-(-out[i] // spread[i]) for i in (0, 1)]  # pixels of each phase

    def along(i: int, phase: int) -> tuple[int, tuple[int, int]]:
        """The first tap that meets pixels of the images, and the padding under the taps met."""
        tap = (window.padding[i][0] - phase) % spread[i]
        low = (window.padding[i][0] - phase - tap) // spread[i]
        met = len(range(tap, kernel.shape[i], spread[i]))
        return tap, (low, m[i] + met - 1 - size[i] - low)

    rows = []
    for y, above in (along(0, phase) for phase in range(spread[0])):
        columns = []
        for x, left in (along(1, phase) for phase in range(spread[1])):
            part = kernel[y :: spread[0], x :: spread[1]]
            if part.size:
                of_phase = window._replace(padding=(above, left), lhs_dilation=(1, 1))
                columns.append(convolved(images, part, of_phase))
            else:  # a kernel smaller than the dilation: these pixels see zeros alone
                columns.append(jnp.zeros((batch, *m, kernel.shape[3]), images.dtype))
        rows.append(jnp.stack(columns, 3))
    maps = jnp.stack(rows, 2)  # [B, m, phases, m, phases, K]
    maps = maps.reshape(batch, m[0] * spread[0], m[1] * spread[1], kernel.shape[3])
    return maps[:, : out[0], : out[1]]


def _neighbours_at_once(images: Array, kernel: Array, window: Window) -> int:
    """How many pixels of a row to compute as channels of one: the routines like them many."""
    height, width, channels, features = kernel.shape
    # Unpadded images have a route of their own, good enough from some ten channels on.
    unpadded = all(pair == (0, 0) for pair in window.padding) and channels > 4
    if window.rhs_dilation != (1, 1) or height * width == 1 or unpadded:
        return 1
    if channels >= 24 or not 3 <= features <= 32:
        return 1
    # For colours no route is fast before 64 channels leave at once.
    several = min(4, 64 // features) if channels == 3 else min(8, 32 // features)
    reach = width + (several - 1) * window.window_strides[1]
    # Not where the wide kernel has more pixels than its image: see `_convolve`.
    return several if height * reach <= math.prod(images.shape[1:3]) else 1


def _wide(images: Array, kernel: Array, window: Window, several: int) -> Array:
    """The convolution by a kernel whose channels are those of `several` pixels side by side.

    The same sums, with zeros among them: the kernel reaches over all that these pixels see.
    """
    stride = window.window_strides[1]
    low, high = window.padding[1]
    height, reach, channels, features = kernel.shape
    width = (images.shape[2] + low + high - reach) // stride + 1
    strips = -(-width // several)
    shifted = [
        jnp.pad(kernel, ((0, 0), (stride * i, stride * (several - 1 - i)), (0, 0), (0, 0)))
        for i in range(several)
    ]
    kernel = jnp.stack(shifted, 3).reshape(height, -1, channels, several * features)
    seen = (strips - 1) * several * stride + kernel.shape[1]
    window = window._replace(
        window_strides=(window.window_strides[0], several * stride),
        padding=(window.padding[0], (low, seen - images.shape[2] - low)),
    )
    maps = plain(images, kernel, window)
    return maps.reshape(*maps.shape[:2], strips * several, features)[:, :, :width]


def span(size: int, dilation: int) -> int:
    """How far `size` points reach with `dilation - 1` gaps between neighbours."""
    return dilation * (size - 1) + 1
