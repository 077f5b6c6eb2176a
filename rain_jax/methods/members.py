"""Several models that train side by side, each by its own objective, in one program."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rain_jax.members import over_members
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Key,
    Metrics,
    ModelState,
    Objective,
    Params,
    PyTree,
    Scalar,
)


def side_by_side(
    objectives: Sequence[Objective], *, how: Literal["unroll", "vmap"] = "unroll"
) -> Objective:
    """The sum of the members' losses, so that each one's gradient is its own.

    Parameters and states are stacked along a new first axis [M]; all members see the same images
    and draw by keys of their own. The metrics are means over members, the loss is their sum.
    With `apart` around its optimiser every member trains as if it were alone. `how` is as in
    `defences.network.ensemble`.
    """

    def objective(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName = None, step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:  # fmt: skip
        def member(
            one: Objective, own: tuple[Params, ModelState], number: Array
        ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
            return one(*own, jax.random.fold_in(key, number), batch, axis_name, step)

        losses, (model_state, metrics) = over_members(
            objectives, member, (params, model_state), how
        )
        means = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), metrics)
        return jnp.sum(losses), (model_state, means)

    return objective


def apart(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser of each member by itself, for parameters that are stacked [M, ...].

    What looks at more than single weights, a gradient's norm or an array's rank, sees those of one
    member. Its state is stacked, too.
    """

    def update(
        gradients: PyTree, state: PyTree, params: PyTree | None = None, **more: Any
    ) -> tuple[PyTree, PyTree]:
        each = jax.vmap(lambda g, s, p: optimiser.update(g, s, p, **more))
        return each(gradients, state, params)

    return optax.GradientTransformation(jax.vmap(optimiser.init), update)
