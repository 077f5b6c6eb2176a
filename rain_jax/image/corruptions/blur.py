"""Blur: out of focus, behind rough glass, moving, zooming."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.image.corruptions.common import (
    Constants,
    Table,
    along_both,
    at,
    colours,
    enlarged_places,
    gaussians,
    moved,
    rounded,
    row,
    stored,
    stretched,
)
from rain_jax.types import Array, Image, Key

# Radius of the disk, deviation of what softens its edge.
_DISK: Table = {
    "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
}
# The authors' kernels have this radius and a softener of 3 x 3, larger ones their own and 5 x 5.
_SMALL_DISK = 8
# Weights that no sum in float32 feels.
_NOTHING = 1e-12
# Deviation of the blur before and after, reach of the scattering, rounds of it.
_GLASS: Table = {
    "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
}
_SKIMAGE_TRUNCATE = 4.0
# Radius and deviation of the tail.
_MOTION: Table = {
    "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
}
_MOTION_ANGLE = 45.0
# End and step of the factors, by NumPy's `arange`, which now and then takes the end along.
_ZOOM: Table = {
    "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
}


def _disk(radius: float, softness: float) -> np.ndarray:
    """A disk of sum 1 with a soft edge, [2 n + 1, 2 n + 1], as OpenCV blurs it."""
    reach, soft = (_SMALL_DISK, 1) if radius <= _SMALL_DISK else (int(radius), 2)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-soft, soft + 1) / softness) ** 2)
    weights /= weights.sum()
    padded = np.pad(disk / disk.sum(), soft, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * soft + 1, 2 * soft + 1))
    return np.einsum("yxab,a,b->yx", windows, weights, weights)


def disks(constants: Constants) -> np.ndarray:
    """The kernels of all severities, [5, k, k] with k as small as the largest of them allows."""
    found = [_disk(*pair) for pair in _DISK[constants]]
    widest = max(len(kernel) for kernel in found)
    padded = np.stack([np.pad(kernel, (widest - len(kernel)) // 2) for kernel in found])
    used = np.flatnonzero(np.any(padded > _NOTHING, axis=(0, 1)))
    inner = slice(used[0], used[-1] + 1)
    return padded[:, inner, inner].astype(np.float32)


def defocus_blur(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """The mean over a disk. Draws nothing."""
    colours(image)
    at(_DISK, severity, constants)
    kernels = disks(constants)
    reach = kernels.shape[1] // 2
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    # By Fourier transforms: kernels of 21 x 21 are slow otherwise. What goes round stays outside.
    sides = padded.shape[:2]
    waves = jnp.fft.rfft2(padded, axes=(0, 1))
    weights = jnp.fft.rfft2(row(kernels, severity), s=sides)[:, :, None]
    blurred = jnp.fft.irfft2(waves * weights, s=sides, axes=(0, 1))
    return stored(blurred[2 * reach :, 2 * reach :])


def scattered(image: Image, moves: Array, reach: Any) -> Image:
    """One round of the authors' loop over [H, W, C], by `moves` [H, W, 2] = (dy, dx) within reach.

    From the last pixel to the first, each becomes what its neighbour at that move is by then; a
    border of about `reach` pixels keeps out. (They meant to swap the two, but NumPy's views make
    `a, b = b, a` a copy.) Here all pixels look at once: chains of pixels that were copied on are
    followed by doubling their links.
    """
    height, width, channels = image.shape
    y, x = jnp.mgrid[:height, :width]

    def within(y: Array, x: Array) -> Array:
        rows, columns = (y > reach) & (y <= height - reach), (x > reach) & (x <= width - reach)
        return rows & columns

    dy, dx = moves[:, :, 0], moves[:, :, 1]
    place = (y * width + x).ravel()
    inside = within(y, x).ravel()
    link = jnp.where(inside, ((y + dy) * width + x + dx).ravel(), place)
    # A link to a pixel that has changed before leads on; all others end in the image as it was.
    leads_on = inside & within(y + dy, x + dx).ravel() & (link > place)

    def double(state: tuple[Array, Array]) -> tuple[Array, Array]:
        link, leads_on = state
        return jnp.where(leads_on, link[link], link), leads_on & leads_on[link]

    link, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), double, (link, leads_on))
    return image.reshape(-1, channels)[link].reshape(image.shape)


def glass_blur(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """Blurs, scatters pixels among their neighbours as the authors' loop does, and blurs again."""
    colours(image)
    height, width, _ = image.shape
    _, reach, rounds = at(_GLASS, severity, constants).astype(jnp.int32)
    sigmas = [sigma for sigma, *_ in _GLASS[constants]]
    rows, columns = (
        row(gaussians(side, sigmas, truncate=_SKIMAGE_TRUNCATE, mode="edge"), severity)
        for side in (height, width)
    )
    most = max(rounds for *_, rounds in _GLASS[constants])
    moves = jax.random.randint(key, (most, height, width, 2), -reach, reach)
    image = stored(along_both(rows, columns, image))
    for place in range(most):
        image = scattered(image, jnp.where(place < rounds, moves[place], 0), reach)
    return stored(along_both(rows, columns, image))


def motion_blur(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """ImageMagick's motion blur, at an angle from -45 to 45 degrees."""
    colours(image)
    radius, sigma = at(_MOTION, severity, constants)
    angle = jax.random.uniform(key, minval=-_MOTION_ANGLE, maxval=_MOTION_ANGLE)
    reach = 2 * max(radius for radius, _ in _MOTION[constants])
    return rounded(moved(image, angle, radius, sigma, reach=reach))


def _zooms(height: int, width: int, constants: Constants) -> tuple[np.ndarray, ...]:
    """Places along both sides, [5, F, n], and weights [5, F] of all factors, padded."""
    # The image itself counts once more than the factor 1 says.
    factors = [[1.0, *np.arange(1, *pair)] for pair in _ZOOM[constants]]
    most = max(map(len, factors))
    weights = np.array([[1 / len(f)] * len(f) + [0.0] * (most - len(f)) for f in factors])
    padded = [f + [1.0] * (most - len(f)) for f in factors]
    sides = (
        np.array([[enlarged_places(n, f) for f in fs] for fs in padded], np.float32)
        for n in (height, width)
    )
    return *sides, weights.astype(np.float32)


def zoom_blur(key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet") -> Image:
    """The mean of the image and of enlargements of its middle. Draws nothing."""
    colours(image)
    at(_ZOOM, severity, constants)
    steps = [row(part, severity) for part in _zooms(image.shape[0], image.shape[1], constants)]

    def add(total: Image, here: list[Array]) -> tuple[Image, None]:
        y, x, weight = here
        return total + weight * stretched(image, y, x), None

    return stored(jax.lax.scan(add, jnp.zeros_like(image), steps)[0])
