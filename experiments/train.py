"""Trains what a config describes, evaluates it and draws what came out.

    python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Everything goes into `--workdir`: config.json, provenance.json, metrics.jsonl, checkpoints/,
evaluation.json, verdicts.npz, table.txt, curves.png and examples.png (.npz). The same command
started again goes on where it stopped, and ends with the same parameters.
"""

import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import build, cache, evaluate, report, settings, start, workdir
from experiments.cli import Interrupt, Stopped, run
from experiments.defended import logits_fn_of
from experiments.logs import MetricsLog, Progress
from experiments.settings import Plan
from rain_jax import data, evaluation, training
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.parallel import (
    Devices,
    check_batch_size,
    choose_devices,
    image_keys,
    initialise,
    place,
    round_up,
)
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
    def augment(self) -> settings.Augment: ...
    @property
    def training(self) -> settings.Training: ...
    @property
    def validation(self) -> settings.Validation | None: ...
    @property
    def checkpoints(self) -> settings.Checkpointing: ...
    @property
    def parallel(self) -> settings.Parallel: ...
    def method(self, plan: Plan) -> Method: ...


# A look at the held-out images: state, key, log, step -> score, larger is better.
Validator = Callable[[training.TrainState, Key, MetricsLog, int], float]


class Keys(NamedTuple):
    """One key for each use of randomness in a run, so that no two uses share a draw."""

    init: Key
    order: Key
    augment: Key
    train: Key
    validate: Key


def keys_of(seed: int) -> Keys:
    """The run's keys; evaluation has its own root, see `measure.evaluation_key`."""
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
    size = source.size + (source.extra.source.size if source.extra else 0)
    return feed == "resident" or (
        feed == "auto" and size * math.prod(source.shape) <= RESIDENT_BYTES
    )


def make_step(experiment: Task, method: Method, plan: Plan, devices: Devices) -> Any:
    """The training step, one program: `(state, (shared, split)) -> (state, metrics)`."""
    resident = is_resident(experiment)

    def body(
        state: training.TrainState, shared: PyTree, split: PyTree, axis_name: AxisName = None
    ) -> tuple[training.TrainState, Any]:
        if resident:
            keys, images, labels, order = shared
            # `split` numbers the devices: each takes its own part of the step's batch.
            position = (state.step % plan.per_epoch) * devices.size + split[0]
            batch = data.take(images, labels, order, position, plan.batch_size // devices.size)
        else:
            keys, batch = shared, split
        batch = augmented(experiment, keys, state.step, batch)
        return method.step(keys.train, state, batch, axis_name)

    program = devices.map(body, inputs=(False, False, True), outputs=(False, False), donate=(0,))
    return lambda state, fed: program(state, *fed)


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
    """What `make_step`'s program is fed from step `first` on: (same everywhere, split)."""
    source = experiment.splits.train
    if is_resident(experiment):
        images, labels = data.pooled(source)
        keys, images, labels = devices.replicate((keys, jnp.asarray(images), jnp.asarray(labels)))
        local = devices.size // jax.process_count()
        numbers = devices.split(np.arange(local, dtype=np.int32) + jax.process_index() * local)
        shuffle = jax.jit(order_of(experiment, plan))
        for epoch in range(first // plan.per_epoch, math.ceil(plan.total / plan.per_epoch) + 1):
            order = devices.replicate(shuffle(keys.order, epoch))
            begin = first % plan.per_epoch if epoch == first // plan.per_epoch else 0
            for _ in range(begin, plan.per_epoch):
                yield (keys, images, labels, order), numbers
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


def restored(
    checkpoints: Checkpoints, state: training.TrainState, sums: dict[str, float], devices: Devices
) -> tuple[training.TrainState, dict[str, float]] | None:
    """State and sums of the newest readable checkpoint, or None where there is none."""
    found = checkpoints.restore(*items_of(devices.to_global(state), sums))
    if found is None:
        return None
    for line in checkpoints.skipped:
        print(f"warning: {line}", flush=True)
    _, model, rest = found
    state = training.TrainState(
        rest["step"], model["params"], model["model_state"], rest["optimiser"],
        model.get("average"),
    )  # fmt: skip
    return devices.to_local(state), {name: float(sum_) for name, sum_ in rest["sums"].items()}


def items_of(state: training.TrainState, sums: dict[str, float]) -> tuple[PyTree, PyTree]:
    """The two items of a checkpoint: the model, and what only training needs.

    `sums` are those of the metrics since the last line of the log: without them the first line
    after a restart would be a mean over fewer steps.
    """
    rest = {"step": state.step, "optimiser": state.optimiser, "sums": sums}
    return training.model_of(state), rest


def no_sums(experiment: Task, method: Method, state: PyTree) -> dict[str, float]:
    """Zeros by the names of the metrics that a step gives, and of the number of `steps`.

    It traces a step to know them, which is for those who have a checkpoint to read.
    """
    size = experiment.training.batch_size
    shape = (size, *experiment.splits.train.shape)
    batch = jax.eval_shape(
        lambda: Batch(
            jnp.zeros(shape), jnp.zeros(size, int), jnp.zeros(size, int), jnp.ones(size, bool)
        )
    )
    _, metrics = jax.eval_shape(method.step, jax.random.key(0), state, batch)
    return dict.fromkeys([*metrics, "steps"], 0.0)


def train(
    experiment: Task,
    folder: Path,
    name: str,
    validator_on: Callable[[Devices], Validator | None],
    begun: Callable[[Variables, Devices], Variables] | None = None,
) -> None:
    """Trains to the end of the plan, from the newest checkpoint in `folder` where there is one.

    Where there is none, from what `begun` makes of the variables that were drawn.
    """
    # --- refusals, before anything is compiled
    devices = place(
        experiment.parallel.mapping, choose_devices(experiment.parallel.devices, training=True)
    )
    plan = plan_of(experiment)
    check_batch_size("config.training.batch_size", plan.batch_size, devices.size)
    validator = validator_on(devices)
    workdir.claim(folder, experiment.config)

    # --- the method and its state
    keys = keys_of(experiment.seed)
    method = experiment.method(plan)
    images = jnp.zeros((1, *experiment.splits.train.shape), jnp.float32)
    variables = jax.jit(experiment.network.init)(keys.init, images)
    state = devices.replicate(jax.jit(method.init)(variables))
    step = make_step(experiment, method, plan, devices)

    kept = experiment.checkpoints
    looks = experiment.validation
    saves = plan.steps(kept.every_epochs)
    look_every = plan.steps(looks.every_epochs) if looks and validator else 0

    def looking(done: int) -> bool:
        return bool(look_every) and (done % look_every == 0 or done == plan.total)

    with (
        Checkpoints(folder / "checkpoints", keep=kept.keep, keep_best=kept.keep_best)
        as checkpoints,
        Interrupt() as interrupt,
    ):  # fmt: skip
        sums: dict[str, float] = {}  # of the metrics since the last line of the log
        if checkpoints.latest() is not None:
            sums = no_sums(experiment, method, state)
            state, sums = restored(checkpoints, state, sums, devices) or (state, sums)
        elif begun is not None:
            state = devices.replicate(jax.jit(method.init)(begun(variables, devices)))
        first = int(jax.device_get(state.step))
        if first:
            print(f"{name}: goes on from step {first} of {plan.total}", flush=True)

        def due(done: int) -> bool:
            at_hand = done % saves == 0 or done == plan.total or looking(done)
            return interrupt.requested(done) or at_hand

        feeds = feed(experiment, plan, keys, devices, first)
        every = experiment.training.log_every
        with (
            MetricsLog(
                folder, resume_step=first, tensorboard=experiment.training.tensorboard
            ) as log,
            Progress(name, (plan.total - first) * plan.batch_size, unit="img") as bar,
        ):
            for passed in training.loop(step, state, feeds, first, plan.total, due):
                done, state = passed.done, passed.state
                for number, metrics in passed.metrics:
                    metrics = {**metrics, "steps": 1.0}
                    sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
                    if number % every == 0 or number == plan.total:
                        line = means(sums)
                        log.write(number, "train", **line)
                        bar.note(**line)
                        sums = dict.fromkeys(sums, 0.0)
                bar.advance(plan.batch_size)
                if passed.due:
                    score = None
                    if validator is not None and looking(done):
                        score = validator(state, keys.validate, log, done)
                    model, rest = items_of(devices.to_global(state), sums)
                    checkpoints.save(done, model, rest, score=score)
                    if interrupt.requested(done):
                        checkpoints.wait()
                        raise Stopped(done, interrupt.signal or signal.SIGTERM)
        checkpoints.wait()
        if interrupt.signal is not None:  # asked while the last step was looked at and saved
            raise Stopped(plan.total, interrupt.signal)


def means(sums: dict[str, float]) -> dict[str, float]:
    """Sums over several steps as means: over images, but for the gradient norm's, over steps."""
    sums = dict(sums)
    images = max(sums.pop("images"), 1.0)
    line = {"gradient_norm": sums.pop("gradient_norm") / sums.pop("steps")}
    if "correct" in sums:
        line["accuracy"] = sums.pop("correct") / images
    return {**{name: value / images for name, value in sums.items()}, **line}


def make_validator(experiment: build.Experiment, devices: Devices) -> Validator | None:
    """Accuracy on the held-out images, robust where there is an attack; None without images."""
    looks, source = experiment.validation, experiment.splits.valid
    if looks is None or source is None:
        return None
    batch_size = round_up(looks.batch_size, devices.size)
    attack = experiment.validation_attack
    programs = evaluation.evaluator(
        logits_fn_of(experiment.network),
        evaluation.Rules(experiment.threat),
        {} if attack is None else {"attack": attack},
        devices,
    )

    def validate(state: training.TrainState, key: Key, log: MetricsLog, step: int) -> float:
        variables = training.variables_of(training.model_of(state))
        results = {}
        for name, program in {"clean": programs.clean, **programs.attacks}.items():
            batches = data.evaluation_batches(source, batch_size)
            judged = evaluation.run(program, devices, variables, key, batches)
            results[name] = evaluation.join([judgement for judgement, _ in judged])
        clean = results.pop("clean")
        stands = evaluation.worst_case(clean, results.values())
        robust = evaluation.proportion(stands).value
        right = evaluation.proportion(clean.right).value
        log.write(step, "validation", clean=right, **({} if attack is None else {"robust": robust}))
        return robust

    return validate


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Trains the model (and its twin), evaluates them side by side, and shows the results."""
    cache.enable()
    initialise()
    runs = build.pair(config, folder)
    # All of them now: the last one's mistake should not wait until the first one is trained.
    for _, experiment, _ in runs:
        build.check_devices(experiment)
        if experiment.config["method"]["name"] == "rat":
            raise UsageError(
                "config.method.name='rat': expected python -m experiments.rat, which makes the "
                "perturbations that it learns from"
            )
    for name, experiment, place_of in runs:
        train(
            experiment,
            place_of,
            name,
            partial(make_validator, experiment),
            partial(start.begun, experiment),
        )
        if jax.process_index() == 0:
            report.curves(place_of)
    evaluate.side_by_side(runs)


if __name__ == "__main__":
    run(main)
