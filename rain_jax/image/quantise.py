"""Quantisers: rounding to whole numbers, by how it is differentiated."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from rain_jax.gradients import straight_through
from rain_jax.types import Array

Rounding = Literal["hard", "sloped", "straight_through", "cubic", "survivors"]
Quantiser = Callable[[Array], Array]

# The slope at whole numbers: small enough that others, where there are any, decide.
_LEAST = 0.03


def quantisers(nearest: Quantiser) -> dict[Rounding, Quantiser]:
    """Ways to differentiate `nearest`, which takes each value to a whole number nearest to it.

    Forwards all are `nearest` but "cubic". Backwards, to a value v, a distance d from its whole
    number:

    - "hard": 0, as rounding has it.
    - "sloped": 3 d^2 + 0.03: 0.78 where v is about to be rounded the other way, and next to nothing
      where it would have to go far. Our own: the slopes of "cubic" without its value, and never
      zero, as whole numbers are common (flat blocks, black pixels).
    - "straight_through": 1 (BPDA, arXiv:1802.00420).
    - "cubic": 3 d^2, and forwards its whole number + d^3 (Shin & Song 2017).
    - "survivors": 1 where v is not rounded to zero, else 0.
    """

    def bent(values: Array) -> Array:
        """The distance to the third power, with its sign."""
        return (values - jax.lax.stop_gradient(nearest(values))) ** 3

    return {
        "hard": nearest,
        "sloped": straight_through(nearest, lambda values: bent(values) + _LEAST * values),
        "straight_through": straight_through(nearest),
        "cubic": lambda values: jax.lax.stop_gradient(nearest(values)) + bent(values),
        "survivors": straight_through(
            nearest, lambda values: jnp.where(nearest(values) != 0, values, 0.0)
        ),
    }
