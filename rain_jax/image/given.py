"""Refusals of what is no image: by type and shape, before anything is computed."""

from typing import Any

import jax.numpy as jnp

from rain_jax.checks import UsageError, within
from rain_jax.types import Image


def floats(image: Image) -> Image:
    """Returns `image` if it is [H, W, C] of floats, with a pixel at least; else raises.

    Bytes in the place of [0, 1] would overflow, or come out as white, without a word. Values are
    not looked at, since most images are traced.
    """
    shape = list(image.shape)
    if len(shape) != 3 or 0 in shape or not jnp.issubdtype(image.dtype, jnp.floating):
        raise UsageError(f"image {image.dtype} {shape}: expected floats in [0, 1], [H, W, C]")
    return image


def whole(where: str, value: Any, low: float | None = None, high: float | None = None) -> Any:
    """`checks.within` for whole numbers, which may be traced: fractions are refused by type."""
    within(where, value, low, high)
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise UsageError(f"{where}={value!r}: expected a whole number")
    return value
