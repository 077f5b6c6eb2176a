"""Adversarial weight perturbation: the loss where the weights around are worst."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, within
from rain_jax.methods.common import Staged
from rain_jax.parallel import psum
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Key,
    Metrics,
    ModelState,
    Objective,
    Params,
    Scalar,
)

_TINY = 1e-20  # the authors' guard against division by zero


def awp(
    objective: Objective, *, gamma: float, warmup: float = 0.0, steps_per_epoch: int = 1
) -> Objective:
    """`objective` at W + V instead of W (Wu et al., arXiv:2004.05884).

    The images are found against W. On them V is one step up the same loss, array by array of
    `gamma` times the array's own norm, for arrays of rank 2 and more; then the objective's loss and
    gradient are taken at W + V, and the step is made from W. Running averages see the pass at W + V
    alone. The authors' gamma is 0.01 for adversarial training, from the start, and 0.005 for TRADES
    after a `warmup` of 9 epochs, during which V is zero (at the same cost). Their weight decay sees
    W + V, here it sees W.

    Raises `UsageError` for an objective that does not come in two stages: every method here does.
    """
    within("gamma", gamma, 0.0)
    within("warmup", warmup, 0.0)
    if not isinstance(objective, Staged):
        raise UsageError("awp: expected the objective of a training method, in its two stages")
    begins = math.ceil(warmup * steps_per_epoch)

    def find(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName, step: Scalar | int,
    ) -> tuple[Any, ModelState]:  # fmt: skip
        params = jax.lax.stop_gradient(params)
        found, model_state = objective.find(params, model_state, key, batch, axis_name, step)

        def loss(params: Params) -> Scalar:
            return objective.learn(params, model_state, key, found, axis_name)[0]

        # The same on all devices: each one has a part of the images.
        uphill = psum(jax.grad(loss)(params), axis_name)
        reach = jnp.where(jnp.asarray(step) >= begins, gamma, 0.0)

        def shift(weights: Array, slope: Array) -> Array:
            if weights.ndim < 2:
                return jnp.zeros_like(weights)
            size, steepness = jnp.linalg.norm(weights.ravel()), jnp.linalg.norm(slope.ravel())
            return reach * size / (steepness + _TINY) * slope

        return (found, jax.tree.map(shift, params, uphill)), model_state

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Any, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        inner, shifts = found
        moved = jax.tree.map(jnp.add, params, shifts)
        return objective.learn(moved, model_state, key, inner, axis_name)

    return Staged(find, learn)
