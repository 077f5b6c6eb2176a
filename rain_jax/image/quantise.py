"""Quantisers: rounding to whole numbers, by how it is differentiated."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from rain_jax.gradients import straight_through
from rain_jax.types import Array

Rounding = Literal["hard", "sloped", "straight_through", "cubic", "survivors"]
Quantiser = Callable[[Array], Array]


def quantisers(nearest: Quantiser) -> dict[Rounding, Quantiser]:
    """Ways to differentiate `nearest`, which takes each value to a whole number nearest to it.

    Forwards all are `nearest` but "cubic". Backwards, to a value v, a distance d from its whole
    number:

    - "hard": 0, as rounding has it.
    - "sloped": 3 d^2, which is 3/4 where v is about to be rounded the other way, and next to
      nothing where it would have to go far: our own, and what cubic rounding has (below), without
      another value forwards.
    - "straight_through": 1 (BPDA, arXiv:1802.00420).
    - "cubic": 3 d^2, and forwards its whole number + d^3 (Shin & Song 2017).
    - "survivors": 1 where v is not rounded to zero, else 0.
    """

    def bent(values: Array) -> Array:
        """What is beyond the whole number, to the third power."""
        return (values - jax.lax.stop_gradient(nearest(values))) ** 3

    return {
        "hard": nearest,
        "sloped": straight_through(nearest, bent),
        "straight_through": straight_through(nearest),
        "cubic": lambda values: jax.lax.stop_gradient(nearest(values)) + bent(values),
        "survivors": straight_through(
            nearest, lambda values: jnp.where(nearest(values) != 0, values, 0.0)
        ),
    }
