"""From a config to an experiment: its sections, their defaults, and what they build.

`config` completes the sections of a config file, `changed` applies what the command line says,
`experiment` builds and checks everything. How a section becomes a call is `schema`'s business.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import optax

from experiments import corrupted, defended, ladder, looks, rehearsal, settings
from experiments.schema import (
    REGISTRIES,
    call,
    convert,
    filled,
    filled_member,
    located,
    make,
    registered,
)
from rain_jax import (
    attacks,
    data,
    methods,
    norms,
    optimisers,
    schedules,
    training,
)
from rain_jax.attacks import suites
from rain_jax.checks import UsageError, nearest, one_of, within
from rain_jax.methods.awp import awp
from rain_jax.methods.free import free
from rain_jax.methods.members import side_by_side
from rain_jax.methods.rat import carrying
from rain_jax.models import upscalers
from rain_jax.parallel import check_batch_size, choose_devices
from rain_jax.types import (
    Attack,
    Method,
    Network,
    Norm,
    Objective,
    Threat,
)


def threat(*, norm: Norm = norms.linf, radius: float) -> Threat:
    """The threat of an experiment; `radius` is in pixel values of [0, 1], measured in `norm`."""
    boundless = Threat(norm, math.inf)
    return Threat(norm, looks.radius("config.threat.radius", radius, boundless))


# Sections that are the arguments of one function.
_CALLS: dict[str, Callable[..., Any]] = {
    "data": data.load,
    "threat": threat,
    "augment": settings.Augment,
    "average": training.averaging,
    "training": settings.Training,
    "validation": settings.Validation,
    "start": settings.Start,
    "ensemble": settings.Ensemble,
    "evaluation": settings.Evaluation,
    "checkpoints": settings.Checkpointing,
    "parallel": settings.Parallel,
}
# What may be None in a config: the thing is left out.
_OPTIONAL = ("average", "defence", "ensemble", "validation", "twin")
# Sections inside sections, and the registries of their names. The attacks of an evaluation have
# names of their own.
_NESTED: dict[tuple[str, str], types.ModuleType] = {
    ("method", "attack"): attacks,
    ("validation", "attack"): attacks,
    ("defence", "upscaler"): upscalers,
}
_ATTACKS_BY_NAME = ("attacks", "distances")


def _section(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}={value!r}: expected a section, dict(..)")
    return dict(value)


def config(**sections: Any) -> ml_collections.ConfigDict:
    """A complete config from the sections that matter: all defaults are filled in.

    What every config file's `get_config` returns. Unknown sections are refused here, unknown keys
    inside them when the experiment is built.
    """
    sections = plain(sections)
    known = ["seed", "twin", *REGISTRIES, *_CALLS]
    for name in sections:
        if name not in known:
            raise UsageError(
                f"config.{name}: no such section: expected one of {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    whole: dict[str, Any] = {"seed": 0, "twin": None, **sections}
    for name in [*REGISTRIES, *_CALLS]:
        if whole.get(name) is None and name in _OPTIONAL:
            whole[name] = None
            continue
        spec = _section(f"config.{name}", {} if whole.get(name) is None else whole[name])
        if name == "evaluation":
            spec = {**{section: {} for section in _ATTACKS_BY_NAME}, **spec}
        function = _CALLS.get(name)
        whole[name] = filled(function, spec) if function else filled_member(REGISTRIES[name], spec)
    for (section, key), registry in _NESTED.items():
        if (whole[section] or {}).get(key) is not None:
            whole[section][key] = filled_member(registry, whole[section][key])
    evaluation = whole["evaluation"]
    for section in _ATTACKS_BY_NAME:
        if isinstance(evaluation.get(section), dict):
            # A column set to None on the command line is a column less.
            columns = {k: v for k, v in evaluation[section].items() if v is not None}
            evaluation[section] = {k: filled_member(attacks, v) for k, v in columns.items()}
    if isinstance(evaluation.get("suite"), str):
        evaluation["suite"] = {"name": evaluation["suite"]}
    evaluation["suite"] = filled_member(suites, evaluation.get("suite"))
    if isinstance(evaluation.get("ladder"), dict):
        evaluation["ladder"] = filled(ladder.Ladder, evaluation["ladder"])
    if isinstance(evaluation.get("corruption"), dict):
        evaluation["corruption"] = filled(settings.Corrupted, evaluation["corruption"])
    # Not type-safe in ml_collections' sense, which knows the types of values (60 epochs, so never
    # half of one); the signatures know better, and `experiment` asks them.
    return ml_collections.ConfigDict(whole, type_safe=False)


def _registry_at(path: Sequence[str]) -> types.ModuleType | None:
    """The registry that the `name` in the section at `path` is looked up in, if in any."""
    path = tuple(path[1:] if path[:1] == ["twin"] else path)
    named = len(path) == 3 and path[0] == "evaluation" and path[1] in _ATTACKS_BY_NAME
    if path in _NESTED:
        return _NESTED[path]
    if named:
        return attacks
    if path == ("evaluation", "suite"):
        return suites
    return REGISTRIES.get(path[0]) if len(path) == 1 else None


def _renamed(spec: dict[str, Any], registry: types.ModuleType, name: Any) -> dict[str, Any]:
    """The section of another member: what was set for the old one and the new one knows, too.

    The old one's defaults go, so that the new one's own may come.
    """
    members = registry.__all__
    if name not in members or spec.get("name") not in members:
        return {**spec, "name": name}
    old = filled(getattr(registry, spec["name"]), {})
    new = inspect.signature(getattr(registry, name)).parameters
    kept = {k: v for k, v in spec.items() if k in new and (k not in old or plain(old[k]) != v)}
    return {**kept, "name": name}


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A config with some values replaced: pairs of a dotted key and its value.

    Names come first, whatever the order: with `("method.name", "natural")` the settings that only
    the old method knew are gone, and the new one's may be given beside it.
    """
    whole = plain(config_)
    for key, value in sorted(changes, key=lambda change: change[0].split(".")[-1] != "name"):
        *path, last = key.split(".")
        section = whole
        for place, name in enumerate(path):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                where = ".".join(["config", *path[: place + 1]])
                raise UsageError(f"config.{key}: {where}={section!r} is a value, not a section")
        registry = _registry_at(path) if last == "name" else None
        if registry is not None and section.get("name") != value:
            renamed = _renamed(section, registry, value)
            section.clear()
            section.update(renamed)
        section[last] = plain(value)
    return config(**whole)


def plain(config: Any) -> Any:
    """A config as plain dictionaries, lists and numbers, as it is saved and compared."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


class Experiment(NamedTuple):
    """Everything that a config describes, checked and built; nothing has been compiled yet."""

    config: dict[str, Any]
    seed: int
    splits: data.Splits
    network: Network  # as it is deployed: with its defence, where it has one
    assembly: defended.Assembly  # what it is made of
    threat: Threat
    objective: Objective
    optimiser: Callable[[int, int], optax.GradientTransformation]  # of steps, steps per epoch
    average: Callable[[int, int], training.Averaging | None]
    augment: settings.Augment
    training: settings.Training
    start: settings.Start
    validation: settings.Validation | None
    validation_attack: Attack | None
    evaluation: settings.Evaluation
    looks: dict[str, looks.Look]  # the columns of the evaluation
    distances: dict[str, Attack]
    ladder: ladder.Ladder | None  # whose rungs are among the looks
    checkpoints: settings.Checkpointing
    parallel: settings.Parallel

    def method(self, plan: settings.Plan) -> Method:
        """How the network is trained in a run of that length."""
        replays = self.training.replays
        total, per_epoch = plan.total * replays, plan.per_epoch * replays
        optimiser, average = self.optimiser(total, per_epoch), self.average(total, per_epoch)
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
    spec = plain(config(**_section("config", plain(whole))))
    seed = within("config.seed", convert("config.seed", spec["seed"], int), 0, 2**31 - 1)

    the_threat: Threat = call("config.threat", threat, spec["threat"])
    parts = {
        name: call(f"config.{name}", _CALLS[name], spec[name])
        for name in ("augment", "training", "evaluation", "checkpoints", "parallel", "start")
    }
    group = spec["ensemble"]
    if group is not None:
        group = call("config.ensemble", settings.Ensemble, group)
    validation = None
    validation_attack = None
    if spec["validation"] is not None:
        validation = call("config.validation", settings.Validation, spec["validation"])
        if validation.attack is not None:
            validation_attack = looks.attack(
                "config.validation.attack", validation.attack, the_threat
            )
    columns = looks.columns(parts["evaluation"], the_threat)
    distances = looks.distances(parts["evaluation"], the_threat)
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

    def assembled(classes: int) -> defended.Assembly:
        sections = {"network": spec["network"], "defence": spec["defence"]}
        built = defended.assembly({**sections, "start": parts["start"], "ensemble": group}, classes)
        for name, look in columns.items():
            if look.through is None or look.through.startswith(defended.RUN):
                continue
            try:
                built.through(look.through)
            except UsageError as error:
                where = f"config.evaluation.attacks.{name}"
                raise located(where, error, ("through",)) from None
        return built

    def objective_of(assembly: defended.Assembly, steps_per_epoch: int) -> Objective:
        objectives = [one_objective(network, steps_per_epoch) for network in assembly.members]
        return side_by_side(objectives) if assembly.together else objectives[0]

    def one_objective(network: Network, steps_per_epoch: int) -> Objective:
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
            given["attack"] = looks.attack("config.method.attack", method.pop("attack"), the_threat)
        objective = make("config.method", methods, method, **given)
        if around is None:
            return objective
        around = _section("config.method.awp", around)
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
        asked = call("config.evaluation.corruption", settings.Corrupted, corruption)
        splits = splits._replace(test=corrupted.corrupted(splits.test, asked))
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
        start: settings.Start = parts["start"]
        budget = call("config.evaluation.ladder", ladder.Ladder, evaluation.ladder)
        rungs = ladder.rungs(budget, the_threat, assembly, start.classifier)
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
    rehearsal.rehearse(
        spec, network, splits.train.shape,
        change=built.augment.change, objective=built.objective, attacks=_attacks_of(built),
    )  # fmt: skip
    return built


def _attacks_of(built: Experiment) -> Iterator[rehearsal.Attacked]:
    """Every attack of an experiment that runs on the shapes of its data."""
    columns = {name: look.attack for name, look in built.looks.items()}
    for section, members in (("attacks", columns), ("distances", built.distances)):
        specs = getattr(built.evaluation, section)
        for name, attack in members.items():
            # The members of a suite or of the ladder have no section of their own.
            own = f"config.evaluation.{section}.{name}"
            where = own if name in specs else "config.evaluation.suite"
            yield rehearsal.Attacked(where, specs.get(name, {}), attack)
    if built.validation_attack is not None:
        keys = built.config["validation"]["attack"]
        yield rehearsal.Attacked("config.validation.attack", keys, built.validation_attack)


def check_devices(built: Experiment) -> None:
    """Refuses a training that the devices at hand cannot share."""
    try:
        devices = choose_devices(built.parallel.devices, training=True)
    except UsageError as error:
        raise located("config.parallel", error, ("devices",)) from None
    check_batch_size("config.training.batch_size", built.training.batch_size, len(devices))


def twin(whole: Any) -> dict[str, Any] | None:
    """The config of the twin: this one with the sections of `twin` in place of its own."""
    spec = plain(whole)
    changes = spec.pop("twin", None)
    if changes is None or changes == {}:
        return None
    for section in _section("config.twin", changes):
        one_of("config.twin section", section, [name for name in spec if name != "seed"])
    return plain(config(**{**spec, **changes, "twin": None}))


def pair(whole: Any, folder: Path) -> list[tuple[str, Experiment, Path]]:
    """The experiment and, where its config asks for one, its twin: name, parts, folder."""
    spec = plain(whole)
    made = [(spec.get("method", {}).get("name", "model"), experiment(spec), folder)]
    other = twin(spec)
    if other is not None:
        name = other["method"]["name"]
        made.append((name if name != made[0][0] else "twin", experiment(other), folder / "twin"))
    return made
