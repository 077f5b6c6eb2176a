"""Several models of one structure, as one: their variables are stacked along a new first axis."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rain_jax.checks import one_of
from rain_jax.types import PyTree

How = Literal["auto", "vmap", "unroll"]


def over_members(
    members: Sequence[Any], function: Callable[..., Any], variables: PyTree, how: How
) -> PyTree:
    """`function(member, its variables, its number)` of all `members`, results stacked [M, ...].

    `variables` are stacked in the same way. "vmap" runs the members as one, for which they have to
    be the same function of their variables; "unroll" one after another, which is what "auto" does
    on CPU: there a `vmap` over kernels becomes a grouped convolution, several times slower.
    """
    one_of("how", how, ("auto", "vmap", "unroll"))
    numbers = jnp.arange(len(members))
    if how == "auto":
        how = "unroll" if jax.default_backend() == "cpu" else "vmap"
    if how == "vmap":
        return jax.vmap(lambda own, number: function(members[0], own, number))(variables, numbers)
    return stacked(
        [
            function(member, jax.tree.map(lambda leaf, m=m: leaf[m], variables), numbers[m])
            for m, member in enumerate(members)
        ]
    )


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Trees of one structure as one, whose arrays have a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
