"""3x3 convolutions in fewer multiplications, for a CPU.

Winograd's F(2x2, 3x3) (Lavin & Gray, arXiv:1509.09308): of every tile of 4x4 pixels sums and
differences are taken, sixteen of them, each of which meets its own sum of the kernel's taps in one
matrix product over the channels, and sums of the products are the 2x2 pixels that the tile yields:
16 multiplications in the place of 36. What it gains over a direct convolution depends on how many
channels there are to pay for the sums. All of it is slices, sums and matrix products, which XLA:CPU
runs in a loop as it does anywhere, and whose gradients are such again.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rain_jax.types import Array

_TILE = 4  # pixels that are read for 2: neighbours overlap by two
_Numbers = Sequence[Sequence[float]]
# How tiles, the kernel's taps and products are combined along one axis; mostly zeros.
_OF_IMAGES: _Numbers = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_TAPS: _Numbers = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_PRODUCTS: _Numbers = ((1, 1, 1, 0), (0, 1, -1, -1))

Padding = tuple[tuple[int, int], ...]


# Both are programs of their own for each shape, so that a network's many equal convolutions are
# traced and lowered once. The compiler has them inlined again.
@functools.partial(jax.jit, static_argnames=("padding", "turned"))
def convolve(images: Array, kernel: Array, padding: Padding, *, turned: bool = False) -> Array:
    """Images [B, H, W, C] under a kernel [3, 3, C, K], with stride 1: [B, H', W', K].

    `padding` is pairs (low, high), of rows and of columns of zeros, none of them negative. A kernel
    that is `turned` is [3, 3, K, C], as the way back to images has it, and stays as it lies.
    """
    height, width = _sizes(images, padding)
    taps = _combined(_OF_TAPS, [list(row) for row in kernel])
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
    evened = [(0, 0, 0), *((0, size % 2, 0) for size in cotangent.shape[1:3]), (0, 0, 0)]
    even = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), evened)
    pixels = [[even[:, row::2, column::2] for column in (0, 1)] for row in (0, 1)]
    over_all = (((0, 1, 2), (0, 1, 2)), ((), ()))
    products = _each(
        lambda tile, pixel: lax.dot_general(tile, pixel, over_all),
        _tiles(images, padding),
        _combined(_turned(_OF_PRODUCTS), pixels),
    )
    return jnp.stack([jnp.stack(row) for row in _combined(_turned(_OF_TAPS), products)])


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
