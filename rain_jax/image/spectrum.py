"""What an image holds at which spatial frequency."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from rain_jax.checks import within
from rain_jax.image.given import floats
from rain_jax.image.jpeg import luminance
from rain_jax.types import Array, Image, Scalar

# Keeps the logarithm of an absent frequency finite.
_FLOOR = 1e-8


def _frequencies(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertical [H, 1] and horizontal [1, W] frequency of `fft2`, in cycles per pixel, unsigned."""
    vertical, horizontal = (np.abs(np.fft.fftfreq(side)) for side in (height, width))
    return vertical.reshape(-1, 1), horizontal.reshape(1, -1)


def radial_spectrum(image: Image) -> Array:
    """The mean of log10(|FFT2|^2 + 1e-8) of the luminance over rings of equal frequency.

    [H, W, C] in [0, 1], colour or grey, to [n // 2 + 1] with n = min(H, W): entry r is of the
    frequencies that are r / n cycles per pixel, to the nearest, from black to the finest pattern
    that a row can hold. The corners beyond are left out.
    """
    height, width, _ = floats(image).shape
    shorter = min(height, width)
    vertical, horizontal = _frequencies(height, width)
    ring = np.floor(np.hypot(vertical, horizontal) * shorter + 0.5).astype(np.int32).ravel()
    power = jnp.abs(jnp.fft.fft2(luminance(image))) ** 2
    rings = shorter // 2 + 1
    total = jnp.zeros(rings).at[ring].add(jnp.log10(power + _FLOOR).ravel(), mode="drop")
    return total / np.bincount(ring)[:rings].astype(np.float32)


def band_energy(image: Image, *, above: Any) -> Scalar:
    """The sum of squares that frequencies of more than `above` cycles per pixel add to luminance.

    [H, W, C] in [0, 1], colour or grey, to a scalar. Frequencies are by their length, from 0 to
    0.71 in the corners, and `above`, at least 0, may be traced: energies above 0 are the sum of
    (luminance - its mean)^2. Raises `UsageError` for a negative one.
    """
    within("above", above, 0)
    vertical, horizontal = _frequencies(*floats(image).shape[:2])
    length = np.hypot(vertical, horizontal).astype(np.float32)
    power = jnp.abs(jnp.fft.fft2(luminance(image))) ** 2
    # Of the transform's power, by Parseval: as many times more as there are pixels.
    return jnp.sum(jnp.where(length > jnp.asarray(above, jnp.float32), power, 0.0)) / length.size


def low_pass(image: Image, cutoff: Any) -> Image:
    """Keeps of [H, W, C] the frequencies of at most cutoff / 2 cycles per pixel on both axes.

    `cutoff` is in [0, 1] and may be traced: 0 leaves the mean, 1 everything. A linear projection:
    the result is not clipped and may leave [0, 1]. Raises `UsageError` for other cutoffs.
    """
    within("cutoff", cutoff, 0, 1)
    vertical, horizontal = _frequencies(*floats(image).shape[:2])
    furthest = np.maximum(vertical, horizontal).astype(np.float32)
    kept = (furthest <= jnp.asarray(cutoff, jnp.float32) / 2)[:, :, None]
    waves = jnp.fft.fft2(image, axes=(0, 1))
    return jnp.fft.ifft2(jnp.where(kept, waves, 0.0), axes=(0, 1)).real
