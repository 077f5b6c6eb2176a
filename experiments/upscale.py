"""Trains a super-resolution network and measures it against bicubic interpolation.

    python -m experiments.upscale --config=experiments/configs/upscaling/edsr_small.py --workdir=RUN

Into `--workdir` go config.json, provenance.json, metrics.jsonl, checkpoints/, evaluation.json and
table.txt: the PSNR on the test images, halved at random as RAIN does and by bicubic interpolation.
The same command started again goes on where it stopped. Labels are read and not used.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments import train
from experiments.cli import run
from rain_jax import data, optimisers, schedules, training
from rain_jax.checks import UsageError, nearest, within
from rain_jax.config import options
from rain_jax.config.schema import call, convert, filled, filled_member, located, make
from rain_jax.config.tree import plain
from rain_jax.image import to_even
from rain_jax.logs import MetricsLog, provenance, table, write_json
from rain_jax.methods.upscaling import DOWN, psnr, upscaling
from rain_jax.models import upscalers
from rain_jax.parallel import (
    Devices,
    image_keys,
    initialise,
    round_up,
    rows_of_process,
)
from rain_jax.runs import cache, loading, session, workdir
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Image,
    Key,
    Method,
    Objective,
    Upscaler,
    Variables,
)

BICUBIC = upscalers.bicubic()


def validation(*, every_epochs: float = 1.0, batch_size: int = 64) -> options.Validation:
    """The PSNR on held-out images every so many epochs; the best checkpoint is chosen by it."""
    return options.Validation(every_epochs, None, batch_size)


class Evaluation(NamedTuple):
    """The PSNR on the first `images` test images, of the best held-out checkpoint or the last."""

    images: int | None
    batch_size: int
    checkpoint: Literal["best", "latest"]


def evaluation(
    *,
    images: int | None = None,
    batch_size: int = 64,
    checkpoint: Literal["best", "latest"] = "best",
) -> Evaluation:
    """See `Evaluation`."""
    if images is not None:
        within("images", images, 1)
    return Evaluation(images, within("batch_size", batch_size, 1), checkpoint)


_CALLS: dict[str, Callable[..., Any]] = {
    "data": data.load,
    "method": upscaling,
    "average": training.averaging,
    "training": options.Training,
    "validation": validation,
    "evaluation": evaluation,
    "checkpoints": options.Checkpointing,
    "parallel": options.Parallel,
}
_MEMBERS: dict[str, Any] = {
    "upscaler": upscalers,
    "optimiser": optimisers,
    "schedule": schedules,
}
_OPTIONAL = ("average", "validation")


def config(**sections: Any) -> ml_collections.ConfigDict:
    """A complete config from the sections that matter: all defaults are filled in."""
    known = ["seed", *_MEMBERS, *_CALLS]
    whole: dict[str, Any] = {"seed": 0, **plain(sections)}
    for name, spec in whole.items():
        if name not in known:
            raise UsageError(
                f"config.{name}: no such section: expected one of {', '.join(known)}"
                f"{nearest(name, known)}"
            )
        if name != "seed" and not isinstance(spec, dict | None):
            raise UsageError(f"config.{name}={spec!r}: expected a section, dict(..)")
    for name in known[1:]:
        spec = whole.get(name)
        if spec is None and name in _OPTIONAL:
            whole[name] = None
        elif name in _CALLS:
            whole[name] = filled(_CALLS[name], spec or {})
        else:
            whole[name] = filled_member(_MEMBERS[name], spec)
    return ml_collections.ConfigDict(whole, type_safe=False)


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A config with some values replaced: pairs of a dotted key and its value.

    Names come first: with `("upscaler.name", "imdn")` the old network's settings are gone.
    """
    whole = plain(config_)
    for key, value in sorted(changes, key=lambda change: not change[0].endswith(".name")):
        section, dot, last = key.partition(".")
        if not dot:
            whole[section] = value
        elif last == "name" and section in _MEMBERS:
            whole[section] = {"name": value}
        elif isinstance(whole.get(section) or {}, dict):
            whole[section] = {**(whole.get(section) or {}), last: value}
    return config(**whole)


class Beginner(NamedTuple):
    """An upscaler as the training loop begins it: on a batch of images."""

    init: Callable[[Key, Array], Variables]


class Experiment(NamedTuple):
    """Everything that a config describes, checked and built: a `step_programs.Task`."""

    config: dict[str, Any]
    seed: int
    splits: data.Splits
    upscaler: Upscaler
    objective: Objective
    optimiser: Callable[[int, int], optax.GradientTransformation]
    average: Callable[[int, int], training.Averaging | None]
    training: options.Training
    validation: options.Validation | None
    evaluation: Evaluation
    checkpoints: options.Checkpointing
    parallel: options.Parallel

    @property
    def network(self) -> Beginner:
        """What the loop begins; convolutions do not mind the size of the image."""
        return Beginner(lambda key, images: self.upscaler.init(key, images[0]))

    @property
    def augment(self) -> options.Augment:
        """None: crops and flips are the objective's own."""
        return options.Augment()

    def method(self, plan: options.Plan) -> Method:
        """Descent on the objective."""
        optimiser = self.optimiser(plan.total, plan.per_epoch)
        average = self.average(plan.total, plan.per_epoch)
        return training.minimise(
            self.objective, optimiser, average=average, sums=self.parallel.sums
        )


def experiment(whole: Any) -> Experiment:
    """Builds what a config describes, or raises a `UsageError` about the first thing amiss."""
    spec = plain(config(**plain(whole)))
    seed = within("config.seed", convert("config.seed", spec["seed"], int), 0, 2**31 - 1)
    parts: dict[str, Any] = {
        name: None if spec[name] is None else call(f"config.{name}", _CALLS[name], spec[name])
        for name in ("training", "validation", "evaluation", "checkpoints", "parallel")
    }
    within("config.training.replays", parts["training"].replays, 1, 1)
    upscaler: Upscaler = make("config.upscaler", upscalers, spec["upscaler"])
    objective: Objective = call("config.method", upscaling, spec["method"], upscaler=upscaler)

    def optimiser(steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
        given = {"total_steps": steps, "steps_per_epoch": steps_per_epoch}
        rate = make("config.schedule", schedules, spec["schedule"], **given)
        return make("config.optimiser", optimisers, spec["optimiser"], schedule=rate)

    def average(steps: int, steps_per_epoch: int) -> training.Averaging | None:
        given = {"total_steps": steps, "steps_per_epoch": steps_per_epoch}
        if spec["average"] is None:
            return None
        return call("config.average", training.averaging, spec["average"], **given)

    splits: data.Splits = call("config.data", data.load, spec["data"])
    if parts["training"].batch_size > splits.train.size:
        raise UsageError(
            f"config.training.batch_size={parts['training'].batch_size}: expected at most the "
            f"{splits.train.size} training images"
        )
    try:
        data.parts_of(splits.train, parts["training"].batch_size)
    except UsageError as error:
        raise located("config.data", error, spec["data"]) from None
    if parts["validation"] is not None and splits.valid is None:
        raise UsageError(
            "config.validation: no images are held out: expected config.data.holdout above 0, or "
            "config.validation=None"
        )
    plan = parts["training"].plan(splits.train.size)
    optimiser(plan.total, plan.per_epoch)
    average(plan.total, plan.per_epoch)
    built = Experiment(
        spec, seed, splits, upscaler, objective, optimiser, average,
        parts["training"], parts["validation"], parts["evaluation"], parts["checkpoints"],
        parts["parallel"],
    )  # fmt: skip
    _dry_run(built)
    return built


def _dry_run(built: Experiment) -> None:
    """Traces a step on the shapes of the data, so that what does not fit is met before a run."""
    key = jax.eval_shape(jax.random.key, 0)
    shape = (1, *built.splits.train.shape)
    batch = jax.eval_shape(
        lambda: Batch(jnp.zeros(shape), jnp.zeros(1, int), jnp.zeros(1, int), jnp.ones(1, bool))
    )
    try:
        variables = jax.eval_shape(built.network.init, key, batch.image)
        if not variables:
            raise UsageError(f"name={built.config['upscaler']['name']!r} has nothing to train")
    except UsageError as error:
        raise located("config.upscaler", error, built.config["upscaler"]) from None
    try:
        jax.eval_shape(built.objective, variables["params"], {}, key, batch)
    except UsageError as error:
        raise located("config.method", error, built.config["method"]) from None


Measure = Callable[[Variables, Key, data.Source], dict[str, np.ndarray]]


def measuring(upscaler: Upscaler, batch_size: int, devices: Devices) -> Measure:
    """Makes `(variables, key, source) -> {way of halving: PSNR [N, 2]}`: ours, and bicubic's.

    Both enlarge the same halves, to images whose sides have been made even.
    """
    batch_size = round_up(batch_size, devices.size)

    def one(variables: Variables, key: Key, image: Image) -> dict[str, Array]:
        image = to_even(image)
        halves = {name: halve(key, image) for name, halve in DOWN.items()}
        return {
            name: jnp.stack([
                psnr(upscaler.apply(variables, half), image), psnr(BICUBIC.apply({}, half), image)
            ])
            for name, half in halves.items()
        }  # fmt: skip

    def body(
        variables: Variables, key: Key, batch: Batch, axis_name: AxisName = None
    ) -> dict[str, Array]:
        keys = image_keys(key, batch.index)
        return jax.vmap(one, (None, 0, 0))(variables, keys, data.as_float(batch.image))

    program = devices.map(body, inputs=(False, False, True), outputs=True)

    def measure(variables: Variables, key: Key, source: data.Source) -> dict[str, np.ndarray]:
        found: list[dict[str, np.ndarray]] = []
        key = devices.replicate(key)
        for batch in data.evaluation_batches(source, batch_size):
            results = devices.gather(program(variables, key, devices.split(rows_of_process(batch))))
            found.append({name: rows[batch.valid] for name, rows in results.items()})
        return {name: np.concatenate([part[name] for part in found]) for name in DOWN}

    return measure


def make_validator(built: Experiment, devices: Devices) -> session.Validator | None:
    """The mean PSNR on the held-out images, halved as in training; None where there are none."""
    looks, source = built.validation, built.splits.valid
    if looks is None or source is None:
        return None
    measure = measuring(built.upscaler, looks.batch_size, devices)
    down = built.config["method"]["down"]

    def validate(state: training.TrainState, key: Key, log: MetricsLog, step: int) -> float:
        variables = training.variables_of(training.model_of(state))
        ours, bicubic = np.mean(measure(variables, key, source)[down], axis=0)
        log.write(step, "validation", psnr=ours, bicubic=bicubic)
        return float(ours)

    return validate


def judge(built: Experiment, folder: Path) -> None:
    """Measures the trained network on the test images; writes and prints what was found."""
    devices = built.parallel.placed(training=True)
    image = jax.ShapeDtypeStruct(built.splits.train.shape, jnp.float32)
    like = jax.eval_shape(built.upscaler.init, jax.eval_shape(jax.random.key, 0), image)
    averaged = built.config["average"] is not None
    variables, step = loading.load_like(
        folder, like, devices, averaged, built.evaluation.checkpoint
    )
    source = data.first(built.splits.test, built.evaluation.images)
    measure = measuring(built.upscaler, built.evaluation.batch_size, devices)
    key = jax.random.fold_in(jax.random.key(built.seed), 1)  # training draws nothing from it
    found = measure(devices.replicate(variables), key, source)
    if jax.process_index() != 0:
        return
    name = built.config["upscaler"]["name"]
    measured: dict[str, dict[str, float]] = {}
    for down, rows in found.items():
        ours, bicubic = map(float, rows.astype(np.float64).mean(axis=0))
        error = float(np.std(rows[:, 0] - rows[:, 1]) / np.sqrt(len(rows)))
        measured[down] = {
            name: ours, "bicubic": bicubic, "gain": ours - bicubic, "gain_standard_error": error
        }  # fmt: skip
    write_json(
        folder / "evaluation.json",
        {"step": step, "images": source.size, "psnr": measured, "provenance": provenance()},
    )
    lines = [
        [enlarged, *(f"{row[enlarged]:.2f}" for row in measured.values())]
        for enlarged in (name, "bicubic")
    ]
    text = table(lines, ["enlarged by", *(f"halved by {down}" for down in measured)])
    (folder / "table.txt").write_text(text + "\n")
    print(f"\nMean PSNR in dB of {source.size:,} test images, step {step}\n\n{text}", flush=True)


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Trains the network, measures it and shows the results."""
    cache.enable()
    initialise()
    built = experiment(config)
    train.train(built, folder, built.config["upscaler"]["name"], partial(make_validator, built))
    workdir.check_writable(folder)
    with workdir.held(folder):
        judge(built, folder)


if __name__ == "__main__":
    run(main, changed=changed)
