"""Circular shifts (RAIN's RdmSCS, arXiv:2004.14798)."""

from typing import Any

import jax
import jax.numpy as jnp

from rain_jax.image.given import floats, whole
from rain_jax.types import Image, Key


def shift(image: Image, move: Any) -> Image:
    """Moves [H, W, C] down and right by `move` = (dy, dx), whole numbers of any size and sign.

    What leaves on one side comes back on the other. `move` may be traced; as a permutation of
    pixels, the shift is undone by the opposite one, and so is its gradient. Raises `UsageError` for
    fractions.
    """
    dy, dx = (whole("move", step) for step in move)
    return jnp.roll(floats(image), (dy, dx), axis=(0, 1))


def random_shift(key: Key, image: Image, *, reach: Any) -> Image:
    """Shifts by (dy, dx), each uniform over the whole numbers of [-reach, reach].

    All (2 reach + 1)^2 shifts of the [H, W, C] image are equally likely; `reach` is a whole number
    of pixels, at least 0, and may be traced. Raises `UsageError` for others.
    """
    whole("reach", reach, 0)
    return shift(image, jax.random.randint(key, (2,), -reach, reach + 1))
