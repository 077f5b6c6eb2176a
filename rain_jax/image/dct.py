"""The discrete cosine transform (DCT-II) of 8x8 blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError
from rain_jax.types import Array

BLOCK = 8


def _cosines() -> np.ndarray:
    """The orthonormal DCT matrix [frequency, place] of a block's side."""
    frequency, place = np.arange(BLOCK).reshape(-1, 1), np.arange(BLOCK).reshape(1, -1)
    waves = np.sqrt(2 / BLOCK) * np.cos(np.pi * frequency * (2 * place + 1) / (2 * BLOCK))
    waves[0] = np.sqrt(1 / BLOCK)
    return waves.astype(np.float32)


_COSINES = _cosines()


def dct(block_image: Array) -> Array:
    """One plane [H, W] to the orthonormal DCT of its 8x8 blocks, [H/8, W/8, 8, 8].

    The last two axes are vertical and horizontal frequency. Energy is kept, and coefficient (0, 0)
    is 8 times the mean of its block. Raises `UsageError` unless H and W are multiples of 8.
    """
    shape = list(block_image.shape)
    if len(shape) != 2 or 0 in shape or any(side % BLOCK for side in shape):
        raise UsageError(f"block_image {shape}: expected [H, W], multiples of {BLOCK}")
    height, width = shape
    blocks = block_image.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("uy,ayxb,vb->axuv", _COSINES, blocks, _COSINES, precision=highest)


def idct(coefficients: Array) -> Array:
    """The inverse of `dct`: [H/8, W/8, 8, 8] to [H, W]."""
    tall, wide, _, _ = coefficients.shape
    highest = jax.lax.Precision.HIGHEST
    blocks = jnp.einsum("uy,axuv,vb->ayxb", _COSINES, coefficients, _COSINES, precision=highest)
    return blocks.reshape(tall * BLOCK, wide * BLOCK)
