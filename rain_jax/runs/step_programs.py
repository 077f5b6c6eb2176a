"""What a config trains, as the steps of one program and what they are fed."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.config import options
from rain_jax.config.options import Plan
from rain_jax import data, training
from rain_jax.members import stacked
from rain_jax.parallel import Devices, image_keys
from rain_jax.types import Array, AxisName, Batch, Key, Method, PyTree, Variables

# A training set up to this many bytes of pixels is kept on every device.
RESIDENT_BYTES = 2**30


class Learner(Protocol):
    """What learns: a `Network`, or anything else that begins as one does."""

    @property
    def init(self) -> Callable[[Key, Array], Variables]: ...


class Task(Protocol):
    """What the loop asks of an experiment: of `build.Experiment`, or of one without classes."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def seed(self) -> int: ...
    @property
    def splits(self) -> data.Splits: ...
    @property
    def network(self) -> Learner: ...
    @property
    def augment(self) -> options.Augment: ...
    @property
    def training(self) -> options.Training: ...
    @property
    def validation(self) -> options.Validation | None: ...
    @property
    def checkpoints(self) -> options.Checkpointing: ...
    @property
    def parallel(self) -> options.Parallel: ...
    def method(self, plan: Plan) -> Method: ...


class Keys(NamedTuple):
    """One key for each use of randomness in a run, so that no two uses share a draw."""

    init: Key
    order: Key
    augment: Key
    train: Key
    validate: Key


def keys_of(seed: int) -> Keys:
    """The run's keys; evaluation has its own root, see `evaluating.evaluation_key`."""
    return Keys(*jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 5))


def plan_of(experiment: Task) -> Plan:
    """How long the experiment's run is."""
    return experiment.training.plan(experiment.splits.train.size)


def augmented(experiment: Task, keys: Keys, step: Any, batch: Batch) -> Batch:
    """The batch as floats in [0, 1], each image cropped and flipped by its own key."""
    image = data.as_float(batch.image)
    if experiment.augment.crop_padding or experiment.augment.flip:
        draw = image_keys(jax.random.fold_in(keys.augment, step), batch.index)
        image = jax.vmap(experiment.augment.change)(draw, image)
    return batch._replace(image=image)


def is_resident(experiment: Task) -> bool:
    """Whether the training images live on the devices."""
    source = experiment.splits.train
    feed = experiment.training.feed
    if feed != "auto":
        return feed == "resident"
    size = source.size + (source.extra.source.size if source.extra else 0)
    pixel: int = source.read(0)[0].dtype.itemsize
    return size * math.prod(source.shape) * pixel <= RESIDENT_BYTES


def body_of(experiment: Task, method: Method, plan: Plan, devices: int) -> Callable[..., Any]:
    """The training step on one of so many devices: `(state, shared, split) -> (state, metrics)`."""
    resident = is_resident(experiment)

    def body(
        state: training.TrainState, shared: PyTree, split: PyTree, axis_name: AxisName = None
    ) -> tuple[training.TrainState, Any]:
        if resident:
            keys, images, labels, order = shared
            # `split` numbers the devices: each takes its own part of the step's batch.
            position = (state.step % plan.per_epoch) * devices + split[0]
            batch = data.take(images, labels, order, position, plan.batch_size // devices)
        else:
            keys, batch = shared, split
        batch = augmented(experiment, keys, state.step, batch)
        return method.step(keys.train, state, batch, axis_name)

    return body


def program_of(body: Callable[..., Any], devices: Devices) -> Any:
    """Such a step as one program: `(state, (shared, splits)) -> (state, metrics)`.

    It takes a step for each of the `splits`, one after the other in one dispatch; metrics have a
    first axis for them.
    """

    def dispatch(
        state: PyTree, shared: PyTree, splits: tuple[PyTree, ...], axis_name: AxisName = None
    ) -> tuple[PyTree, PyTree]:
        if len(splits) == 1:
            state, metrics = body(state, shared, splits[0], axis_name)
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        return jax.lax.scan(
            lambda state, split: body(state, shared, split, axis_name), state, stacked(splits)
        )

    program = devices.map(
        dispatch, inputs=(False, False, True), outputs=(False, False), donate=(0,)
    )
    return lambda state, fed: program(state, *fed)


def make_step(experiment: Task, method: Method, plan: Plan, devices: Devices) -> Any:
    """The training step, one program: `(state, (shared, splits)) -> (state, metrics)`."""
    return program_of(body_of(experiment, method, plan, devices.size), devices)


def in_dispatches(
    feeds: Iterator[tuple[PyTree, PyTree]],
    first: int,
    last: int,
    most: int,
    stops: Callable[[int], bool],
) -> Iterator[tuple[PyTree, tuple[PyTree, ...]]]:
    """What single steps are fed, joined to what dispatches are, from step `first` on to `last`.

    A dispatch takes `most` steps where the run goes through all of them without one of its `stops`
    (steps done -> whether something happens there), and otherwise one. So a run that starts again
    joins the same steps, and there are two programs at most.
    """
    done = first
    while done < last:
        through = done + most <= last and not any(map(stops, range(done + 1, done + most)))
        count = most if through else 1
        some = [next(feeds) for _ in range(count)]
        yield some[0][0], tuple(split for _, split in some)
        done += count


def order_of(experiment: Task, plan: Plan) -> Callable[[Key, Any], Array]:
    """The order of one epoch's images on the device, as a function of a key and the epoch."""
    source = experiment.splits.train
    if source.extra is None:
        return partial(data.epoch_order, size=source.size)
    parts = data.parts_of(source, plan.batch_size)
    return partial(data.shared_order, parts=parts, steps=plan.per_epoch)


def feed(
    experiment: Task, plan: Plan, keys: Keys, devices: Devices, first: int
) -> Iterator[tuple[PyTree, PyTree]]:
    """What each step is fed from step `first` on: (same everywhere for an epoch, split).

    Resident images may be fed to several members: their keys are stacked, and so are the orders.
    """
    source = experiment.splits.train
    if is_resident(experiment):
        images, labels = data.pooled(source)
        keys, images, labels = devices.replicate((keys, jnp.asarray(images), jnp.asarray(labels)))
        local = devices.size // jax.process_count()
        numbers = devices.split(np.arange(local, dtype=np.int32) + jax.process_index() * local)
        order = order_of(experiment, plan)
        shuffle = jax.jit(jax.vmap(order, (0, None)) if keys.order.ndim else order)
        for epoch in range(first // plan.per_epoch, math.ceil(plan.total / plan.per_epoch) + 1):
            orders = devices.replicate(shuffle(keys.order, epoch))
            begin = first % plan.per_epoch if epoch == first // plan.per_epoch else 0
            for _ in range(begin, plan.per_epoch):
                yield (keys, images, labels, orders), numbers
    else:
        shared = devices.replicate(keys)
        batches = data.stream(
            source,
            plan.batch_size,
            seed=experiment.seed,
            first_step=first,
            workers=experiment.training.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            crop=experiment.augment.area,
        )
        for batch in batches:
            yield shared, devices.split(batch)
