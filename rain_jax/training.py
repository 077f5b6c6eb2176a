"""How an objective becomes a training method, and the host's side of the loop."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rain_jax.checks import within
from rain_jax.parallel import Sums, psum, psum_as
from rain_jax.types import (
    AxisName,
    Batch,
    Key,
    Method,
    Metrics,
    ModelState,
    Objective,
    Params,
    PyTree,
    Scalar,
    Variables,
)


class TrainState(NamedTuple):
    """All that a run carries from step to step, the same on every device."""

    step: Scalar  # int32 [], how many steps are done
    params: Params
    model_state: ModelState
    optimiser: PyTree
    average: Params | None  # the running average of the parameters, where one is kept


class Averaging(NamedTuple):
    """Weight averaging: from `start` steps on, w' <- d w' + (1 - d) w after every step.

    With t steps averaged d = min(decay, (1 + t) / (10 + t)), so that the first ones do not weigh
    for ever (Rebuffi et al., arXiv:2103.01946, and their code). The average is evaluated with
    the batch statistics of the trained weights.
    """

    decay: float
    start: int = 0

    def update(self, average: Params, params: Params, step: Scalar) -> Params:
        since = jnp.maximum(step - self.start, 0).astype(jnp.float32)
        kept = jnp.minimum(self.decay, (1.0 + since) / (10.0 + since))
        kept = jnp.where(step < self.start, 0.0, kept)
        return jax.tree.map(lambda a, p: kept * a + (1.0 - kept) * p, average, params)


def averaging(
    total_steps: int, steps_per_epoch: int, *, decay: float = 0.995, warmup: float = 0.025
) -> Averaging:
    """Averages weights after the first `warmup` (a fraction) of the run."""
    within("decay", decay, 0.0, below=1.0)
    within("warmup", warmup, 0.0, 1.0)
    return Averaging(decay, round(warmup * total_steps))


def begin(
    variables: Variables, optimiser: optax.GradientTransformation, average: Averaging | None
) -> TrainState:
    """The state before the first step."""
    model_state, params = dict(variables), variables["params"]
    del model_state["params"]
    return TrainState(
        jnp.int32(0), params, model_state, optimiser.init(params),
        None if average is None else jax.tree.map(jnp.copy, params),
    )  # fmt: skip


def descend(
    state: TrainState,
    told: tuple[tuple[Scalar, tuple[ModelState, Metrics]], Params],
    batch: Batch,
    optimiser: optax.GradientTransformation,
    average: Averaging | None,
    axis_name: AxisName,
    sums: Sums = "float32",
) -> tuple[TrainState, Metrics]:
    """The optimiser's step, from what `jax.value_and_grad` of an objective told on each device."""
    (loss, (model_state, metrics)), gradient = told
    # Sums, then one division: images that are padding weigh nothing, on whatever device.
    metrics = dict(metrics, loss=loss, images=jnp.sum(batch.valid).astype(jnp.float32))
    if sums == "float32":  # all in one
        metrics, gradient = psum((metrics, gradient), axis_name)
    else:
        metrics, gradient = psum(metrics, axis_name), psum_as(sums, gradient, axis_name)
    number = jnp.maximum(metrics["images"], 1.0)
    gradient = jax.tree.map(lambda leaf: leaf / number, gradient)
    change, optimised = optimiser.update(gradient, state.optimiser, state.params)
    params = optax.apply_updates(state.params, change)
    averaged = state.average
    if average is not None:
        averaged = average.update(averaged, params, state.step)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    return TrainState(state.step + 1, params, model_state, optimised, averaged), metrics


def minimise(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    *,
    average: Averaging | None = None,
    sums: Sums = "float32",
) -> Method:
    """Gradient descent on the mean of `objective` over the valid images of all devices.

    `sums` is what gradients are sent as from device to device, see `parallel.psum_as`.

    The step's metrics are sums over those images (`images` is their number), but for
    `gradient_norm`, which is the mean gradient's own.
    """

    def init(variables: Variables) -> TrainState:
        return begin(variables, optimiser, average)

    def step(
        key: Key, state: TrainState, batch: Batch, axis_name: AxisName = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradient_of = jax.value_and_grad(objective, has_aux=True)
        told = gradient_of(state.params, state.model_state, key, batch, axis_name, state.step)
        return descend(state, told, batch, optimiser, average, axis_name, sums)

    return Method(init, step)


def model_of(state: TrainState) -> PyTree:
    """What evaluation needs of a state: params, model state, and the average where one is kept."""
    model = {"params": state.params, "model_state": state.model_state}
    return model if state.average is None else {**model, "average": state.average}


def variables_of(model: PyTree) -> Variables:
    """The network's variables to evaluate: the averaged weights where there are any."""
    return {"params": model.get("average", model["params"]), **model["model_state"]}


class Diverged(RuntimeError):
    """The loss or the gradient is not a number any more; `step` is the first where it was seen."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"{name} is {value} at step {step}")
        self.step = step


def check_finite(step: int, metrics: dict[str, float], whose: str = "") -> None:
    """Raises `Diverged` when the loss or the gradient norm of this step is not finite.

    `whose` comes before their names.
    """
    for name in ("loss", "gradient_norm"):
        if not np.isfinite(metrics[name]):
            raise Diverged(step, whose + name, metrics[name])


class Passed(NamedTuple):
    """What the host learns after each dispatch of `loop`."""

    done: int  # steps since the run's beginning
    state: TrainState
    # (step, its metrics) that have arrived by now; of several members each is a list.
    metrics: list[tuple[int, dict[str, Any]]]
    due: bool  # whether the caller asked to pause here; then all metrics have arrived


def loop(
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    feeds: Iterator[Any],
    first: int,
    last: int,
    due: Callable[[int], bool] = lambda done: False,
    check: Callable[[int, dict[str, Any]], None] = check_finite,
) -> Iterator[Passed]:
    """Runs the steps after `first` up to `last`, as many in each dispatch as it is fed.

    `step` takes one step or several, and its metrics have a first axis for them. They are fetched
    one dispatch late, so the device never waits for the host; after the last step, and wherever
    `due(steps done)` says so (before a checkpoint, say), all have arrived. Raises `Diverged` at the
    first step whose loss or gradient is not finite, which is for `check` to say.
    """
    done, waiting = first, list[tuple[int, Metrics]]()
    while done < last:
        state, metrics = step(state, next(feeds))
        waiting.append((done, metrics))
        done += len(jax.tree.leaves(metrics)[0])
        pause = due(done)
        arrived = []
        while len(waiting) > (0 if pause or done >= last else 1):
            before, metrics = waiting.pop(0)
            arrays = jax.device_get(metrics)
            steps = {name: np.asarray(value).tolist() for name, value in arrays.items()}
            for number, values in enumerate(zip(*steps.values(), strict=True), start=before + 1):
                own = dict(zip(steps, values, strict=True))
                check(number, own)
                arrived.append((number, own))
        yield Passed(done, state, arrived, pause)
