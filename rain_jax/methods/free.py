"""Adversarial training for free: one backward pass for the weights and the perturbation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rain_jax.checks import UsageError, within
from rain_jax.parallel import Sums
from rain_jax.training import Averaging, TrainState, begin, descend
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Key,
    Method,
    Metrics,
    Objective,
    Params,
    PyTree,
    Scalar,
    Threat,
    Variables,
)


class Carried(NamedTuple):
    """What goes from step to step in the place of the optimiser's state."""

    optimiser: PyTree
    perturbation: Array  # [B, H, W, C], of the batch over all devices, the same on each


def free(
    objective: Objective,
    threat: Threat,
    optimiser: optax.GradientTransformation,
    *,
    batch_shape: tuple[int, ...],
    replays: int = 8,
    step_size: float | None = None,
    average: Averaging | None = None,
    sums: Sums = "float32",
) -> Method:
    """Free adversarial training (Shafahi et al., arXiv:1904.12843), after the authors' code.

    Each batch is replayed: every time one backward pass of `objective`, which is `natural`, at
    images + perturbation, clipped to the pixel bounds, gives a step of the weights down and one of
    the perturbation up, by `step_size` (the radius itself unless given), back into the ball. The
    perturbation begins at zero and belongs to a place in the batch: the next batch begins with that
    of the last one. So the images of the first replay are those perturbed against the batch before,
    those of the second are FGSM's from there, against the weights before the last step; `replays=1`
    therefore never sees images that were perturbed for themselves.

    `batch_shape` is [B, H, W, C] over all devices, and batches are full. A step of the method is a
    batch, and `replays` steps of the optimiser: its schedule, and `average`, count replays. The
    metrics are sums over replays, `images` too; `gradient_norm` is a mean. `sums` is as in
    `training.minimise`.
    """
    within("replays", replays, 1)
    size = threat.radius if step_size is None else within("step_size", step_size, above=0.0)

    def init(variables: Variables) -> TrainState:
        state = begin(variables, optimiser, average)
        return state._replace(optimiser=Carried(state.optimiser, jnp.zeros(batch_shape)))

    def step(
        key: Key, state: TrainState, batch: Batch, axis_name: AxisName = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        whole = state.optimiser.perturbation
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        rows = len(batch.image)
        if (rows * devices, *batch.image.shape[1:]) != whole.shape:
            raise UsageError(
                f"batch_shape={list(whole.shape)}: expected "
                f"{[rows * devices, *batch.image.shape[1:]]}, the batch over all devices"
            )
        place = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows

        def replay(carry: Any, number: Array) -> tuple[Any, Metrics]:
            inner, perturbation = carry

            def loss(params: Params, perturbation: Array) -> tuple[Scalar, Any]:
                images = jnp.clip(batch.image + perturbation, threat.low, threat.high)
                return objective(
                    params, inner.model_state, jax.random.fold_in(key, number),
                    batch._replace(image=images), axis_name, state.step,
                )  # fmt: skip

            value, (gradient, slope) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                inner.params, perturbation
            )
            inner, metrics = descend(
                inner, (value, gradient), batch, optimiser, average, axis_name, sums
            )
            climbed = perturbation + size * jax.vmap(threat.norm.steepest)(slope)
            back = jax.vmap(lambda one: threat.norm.project(one, threat.radius))(climbed)
            return (inner, back), metrics

        own = jax.lax.dynamic_slice_in_dim(whole, place, rows)
        # Inside, the steps that are counted are the optimiser's.
        inner = state._replace(step=state.step * replays, optimiser=state.optimiser.optimiser)
        (inner, own), metrics = jax.lax.scan(replay, (inner, own), jnp.arange(replays))
        if axis_name is not None:
            own = jax.lax.all_gather(own, axis_name, tiled=True)
        totals = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), metrics)
        totals["gradient_norm"] = totals["gradient_norm"] / replays
        after = inner._replace(step=state.step + 1, optimiser=Carried(inner.optimiser, own))
        return after, totals

    return Method(init, step)
