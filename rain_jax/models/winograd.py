"""3x3 convolutions in fewer multiplications, for a CPU.

Winograd's F(2x2, 3x3) (Lavin & Gray, arXiv:1509.09308): of every tile of 4x4 pixels sums and
differences are taken, sixteen of them, each of which meets its own sum of the kernel's taps in one
matrix product over the channels, and sums of the products are the 2x2 pixels that the tile yields:
16 multiplications in the place of 36. What it gains over a direct convolution depends on how many
channels there are to pay for the sums. All of it is slices, sums and matrix products, which XLA:CPU
runs in a loop as it does anywhere, and whose gradients are such again.

The sums take four times the memory of images and maps. A batch for which they would leave the cache
goes some images at a time: of 32 images or more, that decides whether there is any gain.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from rain_jax.types import Array

_TILE = 4  # pixels that are read for 2: neighbours overlap by two
_Numbers = Sequence[Sequence[float]]
# How tiles, the kernel's taps and products are combined along one axis; mostly zeros.
_OF_IMAGES: _Numbers = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_TAPS: _Numbers = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_PRODUCTS: _Numbers = ((1, 1, 1, 0), (0, 1, -1, -1))

Padding = tuple[tuple[int, int], ...]


# Bytes of sums, of images and of products, that a batch may have to be taken at once, and else
# those of its parts; but no less than the kernel's, which every part reads anew. Found by timing.
_AT_ONCE, _OF_A_PART = 16 * 2**20, 2 * 2**20


# Both are programs of their own for each shape, so that a network's many equal convolutions are
# traced and lowered once. The compiler has them inlined again.
@functools.partial(jax.jit, static_argnames=("padding", "turned"))
def convolve(images: Array, kernel: Array, padding: Padding, *, turned: bool = False) -> Array:
    """Images [B, H, W, C] under a kernel [3, 3, C, K], with stride 1: [B, H', W', K].

    `padding` is pairs (low, high), of rows and of columns of zeros, none of them negative. A kernel
    that is `turned` is [3, 3, K, C], as the way back to images has it, and stays as it lies.
    """
    return _convolve(images, kernel, padding, turned)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve(images: Array, kernel: Array, padding: Padding, turned: bool) -> Array:
    """In as many parts as all the images ask for, those of a `vmap` over them among them."""

    @custom_vmap
    def over_batch(images: Array, kernel: Array) -> Array:
        taps, features = _taps(kernel), kernel.shape[2 if turned else 3]
        parts = _parts(images, features, padding)
        if parts == 1:
            return _maps(images, taps, padding, turned)

        def step(maps: Array, some: list[Array], start: Array, seen: Array) -> Array:
            found = _maps(some[0], taps, padding, turned)
            return lax.dynamic_update_slice_in_dim(maps, found, start, 0)

        shape = images.shape[0], *_sizes(images, padding), features
        return _in_parts(step, jnp.zeros(shape, images.dtype), [images], parts)

    @over_batch.def_vmap
    def _(size: int, batched: Sequence[bool], images: Array, kernel: Array) -> tuple[Array, bool]:
        of_images, of_kernel = batched
        if of_kernel or not of_images:  # members, each with a kernel of its own
            axes = (0 if of_images else None, 0 if of_kernel else None)
            each = jax.vmap(lambda x, k: _maps(x, _taps(k), padding, turned), axes)
            return each(images, kernel), True
        maps = over_batch(images.reshape(-1, *images.shape[2:]), kernel)
        return maps.reshape(size, -1, *maps.shape[1:]), True

    return over_batch(images, kernel)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _(
    padding: Padding, turned: bool, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    """Whoever differentiates gets what is linear in each, all images at once."""
    (images, kernel), (images_moved, kernel_moved) = primals, tangents
    moved = [
        _maps(x, _taps(k), padding, turned)
        for x, k in ((images_moved, kernel), (images, kernel_moved))
        if not isinstance(x, SymbolicZero) and not isinstance(k, SymbolicZero)
    ]
    return _convolve(images, kernel, padding, turned), sum(moved[1:], start=moved[0])


def _taps(kernel: Array) -> list[list[Array]]:
    return _combined(_OF_TAPS, [list(row) for row in kernel])


def _maps(images: Array, taps: list[list[Array]], padding: Padding, turned: bool) -> Array:
    """The convolution, all images at once, by the sums of its kernel."""
    height, width = _sizes(images, padding)
    contract = (((3,), (int(turned),)), ((), ()))
    products = _each(
        lambda tile, tap: lax.dot_general(tile, tap, contract),
        _tiles(images, padding),
        taps,
    )
    pixels = _combined(_OF_PRODUCTS, products)  # 2x2 of them, each [B, tiles, tiles, K]
    maps = jnp.stack([jnp.stack(row, 3) for row in pixels], 2)
    batch, rows, _, columns, _, features = maps.shape
    return maps.reshape(batch, 2 * rows, 2 * columns, features)[:, :height, :width]


@functools.partial(jax.jit, static_argnames="padding")
def kernel_gradient(images: Array, cotangent: Array, padding: Padding) -> Array:
    """What `convolve` sends back to its kernel: [3, 3, C, K] of a cotangent [B, H', W', K]."""
    channels, features = images.shape[3], cotangent.shape[3]
    parts = _parts(images, features, padding)
    if parts == 1:
        products = _products(images, cotangent, padding)
    else:

        def step(total: Array, some: list[Array], start: Array, seen: Array) -> Array:
            images, cotangent = some
            fresh = jnp.arange(images.shape[0]) >= seen
            cotangent = jnp.where(fresh[:, None, None, None], cotangent, 0)
            return total + _products(images, cotangent, padding)

        nothing = jnp.zeros((_TILE, _TILE, channels, features), cotangent.dtype)
        products = _in_parts(step, nothing, [images, cotangent], parts)
    rows = _combined(_turned(_OF_TAPS), [list(row) for row in products])
    return jnp.stack([jnp.stack(row) for row in rows])


def _products(images: Array, cotangent: Array, padding: Padding) -> Array:
    """[4, 4, C, K]: sums over all tiles of what each of their sums says to each of the maps'."""
    evened = [(0, 0, 0), *((0, size % 2, 0) for size in cotangent.shape[1:3]), (0, 0, 0)]
    even = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), evened)
    pixels = [[even[:, row::2, column::2] for column in (0, 1)] for row in (0, 1)]
    over_all = (((0, 1, 2), (0, 1, 2)), ((), ()))
    products = _each(
        lambda tile, pixel: lax.dot_general(tile, pixel, over_all),
        _tiles(images, padding),
        _combined(_turned(_OF_PRODUCTS), pixels),
    )
    return jnp.stack([jnp.stack(row) for row in products])


def _parts(images: Array, features: int, padding: Padding) -> int:
    """In how many parts to take these images."""
    batch, channels, itemsize = images.shape[0], images.shape[3], images.dtype.itemsize
    if not isinstance(batch, int):  # a symbol, in an exported program
        return 1
    tiles = math.prod(-(-size // 2) for size in _sizes(images, padding))
    sums = batch * _TILE**2 * tiles * (channels + features) * itemsize
    part = max(_OF_A_PART, 2 * _of_kernel(channels, features) * itemsize)
    return 1 if sums <= max(_AT_ONCE, 2 * part) else min(batch, -(-sums // part))


def _of_kernel(channels: int, features: int) -> int:
    """How many numbers a kernel's sums are."""
    return _TILE**2 * channels * features


def _in_parts(
    step: Callable[[Array, list[Array], Array, Array], Array],
    total: Array,
    arrays: list[Array],
    parts: int,
) -> Array:
    """`total` after a step for each of so many parts of the rows of `arrays` [B, ..].

    `step(total, rows, start, seen)` gets as many rows each time, from `start` on; the last part
    begins in the one before, of which it has `seen` the first rows.
    """
    batch = arrays[0].shape[0]
    size = -(-batch // parts)

    def start_of(number: Array | int) -> Array:
        return jnp.minimum(number * size, batch - size)

    def rows(number: Array | int) -> list[Array]:
        return [lax.dynamic_slice_in_dim(array, start_of(number), size) for array in arrays]

    def body(number: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        # Carried into the next turn rows lie in one piece. Taken in their own, they would be looked
        # up by every sum that reads them, which for images without padding is slow.
        total, some = carry
        start = start_of(number)
        return step(total, some, start, number * size - start), rows(number + 1)

    return lax.fori_loop(0, -(-batch // size), body, (total, rows(0)))[0]


def _sizes(images: Array, padding: Padding) -> list[int]:
    return [images.shape[axis + 1] + sum(padding[axis]) - 2 for axis in (0, 1)]


def _tiles(images: Array, padding: Padding) -> list[list[Array]]:
    """The sums over tiles, 4x4 of them, each [B, tiles, tiles, C]."""
    counts = [-(-size // 2) for size in _sizes(images, padding)]
    config = [
        (low, 2 * count + 2 - size - low, 0)
        for (low, _), count, size in zip(padding, counts, images.shape[1:3], strict=True)
    ]
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *config, (0, 0, 0)])

    def along(axis: int, array: Array) -> list[Array]:
        reach = 2 * counts[axis] - 1
        places = [(place, place + reach) for place in range(_TILE)]
        return _sums(_OF_IMAGES, [lax.slice_in_dim(array, *p, 2, axis + 1) for p in places])

    return [along(1, row) for row in along(0, padded)]


def _each(
    product: Callable[[Array, Array], Array], some: list[list[Array]], others: list[list[Array]]
) -> list[list[Array]]:
    """Of two squares of arrays the products, place by place."""
    rows = zip(some, others, strict=True)
    return [[product(a, b) for a, b in zip(*pair, strict=True)] for pair in rows]


def _turned(numbers: _Numbers) -> _Numbers:
    return tuple(zip(*numbers, strict=True))


def _combined(numbers: _Numbers, parts: list[list[Array]]) -> list[list[Array]]:
    """`numbers` along both axes of a square of arrays."""
    rows = [_sums(numbers, list(column)) for column in zip(*parts, strict=True)]
    return [_sums(numbers, list(row)) for row in zip(*rows, strict=True)]


def _sums(numbers: _Numbers, parts: list[Array]) -> list[Array]:
    """Of each row of numbers the sum over parts, without the terms that are zero."""
    found = []
    for row in numbers:
        terms = [part if by == 1 else by * part for by, part in zip(row, parts, strict=True) if by]
        found.append(sum(terms[1:], start=terms[0]))
    return found
