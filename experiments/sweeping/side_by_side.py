"""Cells of a sweep that train side by side: which of them one program can train, and how it does.

Numbers that a step can take as data are arguments of the program, stacked as the states are: seeds,
and of the sections that a step is made of all that Python need not know. Found out by tracing: what
decides about shapes, or in Python's own branches, makes another group, as whatever else differs.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import evaluate, report, train
from experiments.sweeping import grid
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.options import Plan
from rain_jax.members import How, over_members, stacked
from rain_jax.parallel import Devices
from rain_jax.runs import initial_weights, session, step_programs
from rain_jax.types import AxisName, PyTree

# The sections that a step is made of.
_SECTIONS = (
    "threat.", "network.", "defence.", "method.", "optimiser.", "schedule.", "average.", "augment.",
)  # fmt: skip
# Rounded to whole steps, which float32 may do otherwise than Python's numbers.
_LENGTHS = ("average.warmup",)
# What members may differ in without a word of it in their program.
_OUTSIDE = ("seed", "twin", "evaluation")
# What a look at the held-out images turns on.
_LOOKED_THROUGH = (
    "data", "network", "defence", "ensemble", "start", "threat", "validation", "parallel",
)  # fmt: skip


class Group(NamedTuple):
    """Runs that one program trains, by their places, and the numbers in which they differ."""

    places: tuple[int, ...]
    numbers: tuple[str, ...]


def groups(experiments: Sequence[build.Experiment]) -> list[Group]:
    """Which of the experiments train side by side, in the order of their first ones."""
    found: dict[str, list[int]] = {}
    for place, experiment in enumerate(experiments):
        leaves = flat(experiment.config)
        alike = {key: None if _perhaps(key, value) else value for key, value in leaves.items()}
        found.setdefault(json.dumps(alike, sort_keys=True), []).append(place)
    split = [group for places in found.values() for group in _alike(experiments, places)]
    return sorted(split, key=lambda group: group.places[0])


def flat(spec: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """A config's values by their dotted keys, without those that no step turns on."""
    found: dict[str, Any] = {}
    for key, value in spec.items():
        if head + key in _OUTSIDE:
            continue
        inner = flat(value, f"{head}{key}.") if isinstance(value, Mapping) else None
        found |= {head + key: value} if inner is None else inner or {head + key: {}}
    return found


def _perhaps(key: str, value: Any) -> bool:
    return key.startswith(_SECTIONS) and key not in _LENGTHS and grid.numeric([value])


def _alike(experiments: Sequence[build.Experiment], places: Sequence[int]) -> list[Group]:
    """Experiments that differ in numbers alone, by what these make of their steps."""
    told = [json.dumps(flat(experiments[place].config), sort_keys=True) for place in places]
    if len(set(told)) == 1:
        return [Group(tuple(places), ())]
    # A number may have chosen a branch of Python's: a threshold of 1, say, and no attack at all.
    known: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    for place, text in zip(places, told, strict=True):
        if text not in known:
            known[text] = " ".join(_equations(_traced(experiments[place], {}).jaxpr))
        found.setdefault(known[text], []).append(place)
    return [group for some in found.values() for group in _split(experiments, some)]


def _split(experiments: Sequence[build.Experiment], places: Sequence[int]) -> list[Group]:
    """Experiments whose steps are alike, by those of the numbers that cannot be data."""
    leaves = [flat(experiments[place].config) for place in places]
    columns = {key: [own[key] for own in leaves] for key in leaves[0]}
    kinds = {
        key: grid.traced_type(column)
        for key, column in columns.items()
        if len(set(map(repr, column))) > 1
    }
    numbers = list(kinds)

    def are_data(some: Sequence[str]) -> bool:
        try:
            _traced(experiments[places[0]], {key: kinds[key] for key in some})
        except (TypeError, ValueError, IndexError):
            return False  # one decides about shapes, or about Python's own branches
        return True

    if not numbers or are_data(numbers):
        return [Group(tuple(places), tuple(numbers))]
    ends = range(1, len(numbers) + 1)
    other = next(numbers[end - 1] for end in ends if not are_data(numbers[:end]))
    parts = [
        [place for place, value in zip(places, columns[other], strict=True) if value == wanted]
        for wanted in dict.fromkeys(columns[other])
    ]
    return [group for part in parts for group in _split(experiments, part)]


def _traced(experiment: build.Experiment, kinds: Mapping[str, np.dtype]) -> Any:
    """A step as JAX sees it, with numbers of these kinds as its arguments.

    Raises what JAX raises where a number must be known, and `TypeError` where another state than
    the one before comes out.
    """
    plan, source = step_programs.plan_of(experiment), experiment.splits.train
    method = experiment.method(plan)
    keys = jax.eval_shape(lambda: step_programs.keys_of(0))

    def begun(key: Any) -> PyTree:
        return method.init(experiment.network.init(key, jnp.zeros((1, *source.shape))))

    def fed() -> PyTree:
        images, places = jnp.zeros((source.size, *source.shape)), jnp.zeros(source.size, int)
        return images, places, places

    def step(values: PyTree, state: PyTree, keys: PyTree, fed: PyTree) -> PyTree:
        made = rebuilt(experiment, values)
        body = step_programs.body_of(made, made.method(plan), plan, 1)
        return body(state, (keys, *fed), jnp.zeros(1, int))

    values = {key: jax.ShapeDtypeStruct((), kind) for key, kind in kinds.items()}
    state = jax.eval_shape(begun, keys.init)
    traced, (after, _) = jax.make_jaxpr(step, return_shape=True)(
        values, state, keys, jax.eval_shape(fed)
    )
    shapes = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (state, after)
    ]
    if kinds and shapes[0] != shapes[1]:
        raise TypeError("expected a step from a state to one of its shapes")
    return traced


def _equations(jaxpr: Any) -> Iterator[str]:
    """The names of all operations in a traced program, in their order."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def rebuilt(experiment: build.Experiment, values: Mapping[str, Any]) -> build.Experiment:
    """The experiment, for its steps alone, with `values`, which may be traced, at their keys."""
    if not values:
        return experiment
    spec = grid.replaced(experiment.config, values)
    columns = {"attacks": {"none": {"name": "fgsm"}}}
    return build.experiment({**spec, "twin": None, "validation": None, "evaluation": columns})


def beside(
    experiments: Sequence[build.Experiment],
    numbers: Sequence[str],
    plan: Plan,
    devices: Devices,
    *,
    how: How = "auto",
) -> train.Course:
    """The course of several members that differ in their seeds and in `numbers`.

    The images are held once. `how` is as in `members.over_members`.
    """
    first, count = experiments[0], len(experiments)
    leaves = [flat(experiment.config) for experiment in experiments]
    columns = {key: [own[key] for own in leaves] for key in numbers}
    values = devices.replicate(
        {key: np.array(column, grid.traced_type(column)) for key, column in columns.items()}
    )

    def all_steps(
        state: PyTree, shared: PyTree, split: PyTree, axis_name: AxisName = None
    ) -> tuple[PyTree, PyTree]:
        (keys, images, labels, orders), values = shared

        @jax.jit  # traced once, however many members there are
        def step(own: PyTree, images: Any, labels: Any, split: PyTree) -> tuple[PyTree, PyTree]:
            state, keys, order, values = own
            made = rebuilt(first, values)
            one = step_programs.body_of(made, made.method(plan), plan, devices.size)
            return one(state, (keys, images, labels, order), split, axis_name)

        def member(_: Any, own: PyTree, number: Any) -> tuple[PyTree, PyTree]:
            return step(own, images, labels, split)

        return over_members(range(count), member, (state, keys, orders, values), how)

    def feed(begin: int) -> Iterator[tuple[PyTree, PyTree]]:
        keys = stacked([step_programs.keys_of(experiment.seed) for experiment in experiments])
        for shared, split in step_programs.feed(first, plan, keys, devices, begin):
            yield (shared, values), split

    join = jax.jit(stacked)
    part = jax.jit(lambda state, number: jax.tree.map(lambda leaf: leaf[number], state))

    def told(metrics: dict[str, Any]) -> list[dict[str, float]]:
        return [{name: value[m] for name, value in metrics.items()} for m in range(count)]

    return train.Course(
        step_programs.program_of(all_steps, devices),
        feed,
        join=lambda states: devices.replicate(join(states)),
        part=lambda state, number: devices.replicate(part(state, number)),
        told=told,
    )


def train_all(cells: Sequence[tuple[dict[str, Any], Path]]) -> None:
    """Trains the cells, configs and their folders, as far as possible at once; evaluates each."""
    if jax.process_count() > 1:
        raise UsageError("config.sweep.side_by_side: expected one process; --shard shares cells")
    held: dict[str, Any] = {}
    runs = [
        [(name, _sharing(experiment, held), place) for name, experiment, place in pair]
        for pair in (build.pair(spec, folder) for spec, folder in cells)
    ]
    every = [run for some in runs for run in some]
    experiments = [experiment for _, experiment, _ in every]
    for experiment, (_, _, folder) in zip(experiments, every, strict=True):
        train.check(experiment)
        initial_weights.check(experiment, folder)
        if not step_programs.is_resident(experiment):
            raise UsageError(
                f"config.training.feed={experiment.training.feed!r}: expected images that are "
                "resident, or no config.sweep.side_by_side: a stream has one order for all"
            )
    looks: dict[str, Any] = {}
    members = []
    for experiment, (_, _, folder) in zip(experiments, every, strict=True):
        name = "/".join(folder.parts[-2:]) if folder.name == "twin" else folder.name
        one = train.member_of(name, experiment, folder)
        members.append(one._replace(validator_on=_shared(one, experiment, looks)))
    for group in groups(experiments):
        some = [members[place] for place in group.places]
        names = [member.name for member in some]
        if len(some) == 1:
            course_of = partial(train.alone, some[0].experiment)
        else:
            course_of = partial(beside, [experiments[p] for p in group.places], group.numbers)
            told = ", ".join(("seed", *group.numbers))
            print(f"side by side, with {told} as data: {' '.join(names)}", flush=True)
        began = time.monotonic()
        title = names[0] if len(some) == 1 else f"{len(some)} runs"
        train.train_members(some, course_of, title)
        print(f"{title}: trained in {time.monotonic() - began:.1f} s", flush=True)
    for some_runs in runs:
        for _, _, folder in some_runs:
            report.curves(folder)
        evaluate.side_by_side(some_runs)


def _sharing(experiment: build.Experiment, held: dict[str, Any]) -> build.Experiment:
    """The experiment, with the images of the first one on the same data.

    But for the test images, which its evaluation may corrupt.
    """
    data = json.dumps(experiment.config["data"], sort_keys=True)
    shared = held.setdefault(data, experiment.splits)
    return experiment._replace(splits=shared._replace(test=experiment.splits.test))


def _shared(
    member: session.Member, experiment: build.Experiment, known: dict[str, Any]
) -> Callable[[Devices], session.Validator | None]:
    """The member's looks at the held-out images, by one program for all that look alike."""
    kind = json.dumps([experiment.config[name] for name in _LOOKED_THROUGH], sort_keys=True)

    def on(devices: Devices) -> session.Validator | None:
        if kind not in known:
            known[kind] = member.validator_on(devices)
        return known[kind]

    return on
