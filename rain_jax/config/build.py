"""From a config to an experiment: everything that it describes, checked and built.

The sections of a config are `tree`'s business, and how one becomes a call is `schema`'s.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optax

from rain_jax import data, methods, optimisers, schedules, training
from rain_jax.audit import ladder
from rain_jax.checks import UsageError, within
from rain_jax.config import attack_columns, corrupted, dry_run, networks, options
from rain_jax.config.schema import call, convert, located, make, registered
from rain_jax.config.tree import CALLS, as_section, config, plain, threat, twin
from rain_jax.methods.awp import awp
from rain_jax.methods.free import free
from rain_jax.methods.members import apart, side_by_side
from rain_jax.methods.rat import carrying
from rain_jax.parallel import check_batch_size, choose_devices, with_statistics
from rain_jax.types import Attack, Method, Network, Objective, Threat


class Experiment(NamedTuple):
    """Everything that a config describes, checked and built; nothing has been compiled yet."""

    config: dict[str, Any]
    seed: int
    splits: data.Splits
    network: Network  # as it is deployed: with its defence, where it has one
    assembly: networks.Assembly  # what it is made of
    threat: Threat
    objective: Objective
    optimiser: Callable[[int, int], optax.GradientTransformation]  # of steps, steps per epoch
    average: Callable[[int, int], training.Averaging | None]
    augment: options.Augment
    training: options.Training
    start: options.Start
    validation: options.Validation | None
    validation_attack: Attack | None
    evaluation: options.Evaluation
    columns: dict[str, attack_columns.Column]  # of the evaluation
    distances: dict[str, Attack]
    ladder: ladder.Ladder | None  # whose rungs are among the columns
    checkpoints: options.Checkpointing
    parallel: options.Parallel

    def method(self, plan: options.Plan) -> Method:
        """How the network is trained in a run of that length."""
        replays = self.training.replays
        total, per_epoch = plan.total * replays, plan.per_epoch * replays
        optimiser, average = self.optimiser(total, per_epoch), self.average(total, per_epoch)
        if self.assembly.together:
            optimiser = apart(optimiser)
        if replays == 1:
            return training.minimise(
                self.objective, optimiser, average=average, sums=self.parallel.sums
            )
        return free(
            self.objective, self.threat, optimiser,
            batch_shape=(plan.batch_size, *self.splits.train.shape),
            replays=replays, average=average, sums=self.parallel.sums,
        )  # fmt: skip


def experiment(whole: Any) -> Experiment:
    """Builds what a config describes, or raises a `UsageError` about the first thing amiss.

    Nothing is compiled: what only shapes can tell is found out by tracing.
    """
    spec = plain(config(**as_section("config", plain(whole))))
    seed = within("config.seed", convert("config.seed", spec["seed"], int), 0, 2**31 - 1)

    the_threat: Threat = call("config.threat", threat, spec["threat"])
    parts = {
        name: call(f"config.{name}", CALLS[name], spec[name])
        for name in ("augment", "training", "evaluation", "checkpoints", "parallel", "start")
    }
    group = spec["ensemble"]
    if group is not None:
        group = call("config.ensemble", options.Ensemble, group)
    validation = None
    validation_attack = None
    if spec["validation"] is not None:
        validation = call("config.validation", options.Validation, spec["validation"])
        if validation.attack is not None:
            validation_attack = attack_columns.attack(
                "config.validation.attack", validation.attack, the_threat
            )
    columns = attack_columns.columns(parts["evaluation"], the_threat)
    distances = attack_columns.distances(parts["evaluation"], the_threat)
    for name in distances:
        if name in columns:
            raise UsageError(
                f"config.evaluation.distances.{name}: expected another name: an attack has this one"
            )

    def optimiser(steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
        rate = make("config.schedule", schedules, spec["schedule"],
                    total_steps=steps, steps_per_epoch=steps_per_epoch)  # fmt: skip
        return make("config.optimiser", optimisers, spec["optimiser"], schedule=rate)

    def average(steps: int, steps_per_epoch: int) -> training.Averaging | None:
        if spec["average"] is None:
            return None
        return call("config.average", training.averaging, spec["average"],
                    total_steps=steps, steps_per_epoch=steps_per_epoch)  # fmt: skip

    def assembled(classes: int) -> networks.Assembly:
        sections = {"network": spec["network"], "defence": spec["defence"]}
        built = networks.assembly({**sections, "start": parts["start"], "ensemble": group}, classes)
        for name, look in columns.items():
            if look.through is None or look.through.startswith(ladder.RUN):
                continue
            try:
                built.through(look.through)
            except UsageError as error:
                where = f"config.evaluation.attacks.{name}"
                raise located(where, error, ("through",)) from None
        return built

    def objective_of(assembly: networks.Assembly, steps_per_epoch: int) -> Objective:
        objectives = [one_objective(network, steps_per_epoch) for network in assembly.members]
        return side_by_side(objectives) if assembly.together else objectives[0]

    def one_objective(network: Network, steps_per_epoch: int) -> Objective:
        network = with_statistics(parts["parallel"].statistics, network)
        method = dict(spec["method"])
        given: dict[str, Any] = {
            "network": network, "threat": the_threat, "steps_per_epoch": steps_per_epoch
        }  # fmt: skip
        around = method.pop("awp", None)
        name = method.get("name")
        maker = registered("config.method", methods, name) if name is not None else None
        if maker is not None and "attack" in inspect.signature(maker).parameters:
            if "attack" not in method:
                raise UsageError(f"config.method.attack is missing: {name} needs it")
            given["attack"] = attack_columns.attack(
                "config.method.attack", method.pop("attack"), the_threat
            )
        objective = make("config.method", methods, method, **given)
        if around is None:
            return objective
        around = as_section("config.method.awp", around)
        return call(
            "config.method.awp", awp, around, objective=objective, steps_per_epoch=steps_per_epoch
        )

    condition = parts["evaluation"].condition
    if condition is not None and spec["network"].get("modulation", "none") == "none":
        raise UsageError(
            f"config.evaluation.condition={condition:g}: expected None: a network without "
            "config.network.modulation has no condition"
        )
    # Built once on made-up lengths and classes, so that a mistake is met now and not after a large
    # data set has been opened.
    optimiser(10**6, 10**3)
    average(10**6, 10**3)
    objective_of(assembled(10), 10**3)

    splits: data.Splits = call("config.data", data.load, spec["data"])
    corruption = parts["evaluation"].corruption
    if corruption is not None:
        asked = call("config.evaluation.corruption", options.Corrupted, corruption)
        splits = splits._replace(test=corrupted.corrupted(splits.test, asked))
    data.at_most("config.evaluation.images", parts["evaluation"].images, splits.test)
    if parts["training"].batch_size > splits.train.size:
        raise UsageError(
            f"config.training.batch_size={parts['training'].batch_size}: expected at most the "
            f"{splits.train.size} training images"
        )
    try:
        data.parts_of(splits.train, parts["training"].batch_size)
    except UsageError as error:
        raise located("config.data", error, spec["data"]) from None
    if parts["augment"].area is not None and parts["training"].feed != "stream":
        raise UsageError(
            f"config.augment.area={parts['augment'].area}: expected None, or "
            "config.training.feed=stream: images on the device are resized already"
        )
    if validation is not None and splits.valid is None:
        raise UsageError(
            "config.validation: no images are held out: expected config.data.holdout above 0, or "
            "config.validation=None"
        )
    plan = parts["training"].plan(splits.train.size)
    optimiser(plan.total, plan.per_epoch)
    if parts["training"].replays > 1 and group is not None:
        raise UsageError("config.training.replays: expected 1 for an ensemble")
    if parts["training"].replays > 1 and spec["method"]["name"] != "natural":
        raise UsageError(
            f"config.training.replays={parts['training'].replays}: expected 1 beside the method "
            f"{spec['method']['name']!r}: Free-AT attacks by the gradients of the method 'natural'"
        )
    assembly = assembled(splits.train.classes)
    network = assembly.network
    if spec["method"].get("name") == "rat":
        # Its checkpoints keep the perturbations beside the weights.
        network = carrying(network)
    evaluation = parts["evaluation"]
    if evaluation.draws is None:
        evaluation = dataclasses.replace(evaluation, draws=20 if assembly.network.random else 1)
    budget = None
    if evaluation.ladder is not None:
        start: options.Start = parts["start"]
        budget = call("config.evaluation.ladder", ladder.Ladder, evaluation.ladder)
        try:
            climbed = ladder.rungs(budget, the_threat, assembly.attackable, start.classifier)
        except UsageError as error:
            raise located("config.evaluation.ladder", error, evaluation.ladder) from None
        rungs = {name: attack_columns.Column(*rung) for name, rung in climbed.items()}
        if evaluation.cascade:
            raise UsageError(
                "config.evaluation.cascade: expected False beside a ladder, whose rungs are "
                "compared on the same images"
            )
        for name in columns:
            if evaluation.suite is not None or name in rungs:
                raise UsageError(
                    "config.evaluation.suite: expected None beside a ladder, which has its attacks"
                    if evaluation.suite is not None
                    else f"config.evaluation.attacks.{name}: expected another name: a rung of the "
                    "ladder has this one"
                )
        columns |= rungs
    built = Experiment(
        spec, seed, splits, network, assembly, the_threat,
        objective_of(assembly, plan.per_epoch),
        optimiser, average, parts["augment"], parts["training"], parts["start"], validation,
        validation_attack, evaluation, columns, distances, budget, parts["checkpoints"],
        parts["parallel"],
    )  # fmt: skip
    dry_run.trace(
        spec, network, splits.train.shape,
        change=built.augment.change, objective=built.objective, attacks=_attacks_of(built),
    )  # fmt: skip
    return built


def _attacks_of(built: Experiment) -> Iterator[dry_run.Attacked]:
    """Every attack of an experiment that runs on the shapes of its data."""
    columns = {name: look.attack for name, look in built.columns.items()}
    for section, members in (("attacks", columns), ("distances", built.distances)):
        specs = getattr(built.evaluation, section)
        for name, attack in members.items():
            # The members of a suite or of the ladder have no section of their own.
            own = f"config.evaluation.{section}.{name}"
            where = own if name in specs else "config.evaluation.suite"
            yield dry_run.Attacked(where, specs.get(name, {}), attack)
    if built.validation_attack is not None:
        keys = built.config["validation"]["attack"]
        yield dry_run.Attacked("config.validation.attack", keys, built.validation_attack)


def check_devices(built: Experiment) -> None:
    """Refuses a training that the devices at hand cannot share."""
    try:
        devices = choose_devices(built.parallel.devices, training=True)
    except UsageError as error:
        raise located("config.parallel", error, ("devices",)) from None
    check_batch_size("config.training.batch_size", built.training.batch_size, len(devices))


def pair(whole: Any, folder: Path) -> list[tuple[str, Experiment, Path]]:
    """The experiment and, where its config asks for one, its twin: name, parts, folder."""
    spec = plain(whole)
    made = [(spec.get("method", {}).get("name", "model"), experiment(spec), folder)]
    with of_twin(spec.get("twin")):
        other = twin(spec)
        if other is not None:
            name = other["method"]["name"]
            name = name if name != made[0][0] else "twin"
            made.append((name, experiment(other), folder / "twin"))
    return made


@contextmanager
def of_twin(changes: Any) -> Iterator[None]:
    """What is wrong in here is told by a twin's keys: `changes` are the sections that it is given.

    Of nobody's twin, with `changes` None, errors are what they are.
    """
    try:
        yield
    except UsageError as error:
        message = str(error)
        if changes is None or message.startswith("config.twin"):
            raise
        first = re.match(r"config\.(\w+)", message)
        own = first is not None and first[1] in changes
        raise UsageError(
            f"config.twin{message.removeprefix('config') if own else f': {message}'}"
        ) from None
