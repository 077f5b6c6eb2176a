"""Trains what a config describes, evaluates it and draws what came out.

    python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Everything goes into `--workdir`: config.json, provenance.json, metrics.jsonl, checkpoints/,
curves.png and what `experiments.evaluate` leaves in evaluations/NAME. The same command started
again goes on where it stopped, and ends with the same parameters.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import evaluate, report
from experiments.cli import NAME, REPLACE, Interrupt, Stopped, run
from rain_jax import data, evaluation, training
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.config.options import Plan
from rain_jax.logs import MetricsLog, Progress
from rain_jax.parallel import (
    Devices,
    check_batch_size,
    initialise,
    round_up,
)
from rain_jax.runs import cache, initial_weights, workdir
from rain_jax.runs.session import Member, Running, Validator, begun_or_restored, forget_ahead
from rain_jax.runs.step_programs import Task, feed, in_dispatches, keys_of, make_step, plan_of
from rain_jax.types import Key, Variables


class Course(NamedTuple):
    """How all members take their steps by one program, on one state that holds all of theirs."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    feed: Callable[[int], Iterator[Any]]  # of each step, from this one on
    join: Callable[[list[training.TrainState]], Any]
    part: Callable[[Any, int], training.TrainState]  # of a joined state, this member's
    told: Callable[[dict[str, Any]], list[dict[str, float]]]  # metrics of a step, by members


def alone(experiment: Task, plan: Plan, devices: Devices) -> Course:
    """The course of one member by itself."""
    return Course(
        make_step(experiment, experiment.method(plan), plan, devices),
        partial(feed, experiment, plan, keys_of(experiment.seed), devices),
        join=lambda states: states[0],
        part=lambda state, _: state,
        told=lambda metrics: [metrics],
    )


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
    member = Member(experiment, folder, name, validator_on, begun)
    train_members([member], partial(alone, experiment), name)


def train_members(
    members: Sequence[Member], course_of: Callable[[Plan, Devices], Course], name: str
) -> None:
    """Trains all members, each in its own folder as if it were alone there; `name` is shown.

    Their length, and when they are looked at and saved, are those of the first. They go on from the
    newest step that all of them have.
    """
    # --- refusals, before anything is compiled
    first_of = members[0].experiment
    devices = first_of.parallel.placed(training=True)
    plan = plan_of(first_of)
    check_batch_size("config.training.batch_size", plan.batch_size, devices.size)
    _check_dispatches(first_of, plan)
    validators = [member.validator_on(devices) for member in members]
    with contextlib.ExitStack() as alone_there:
        for member in members:
            alone_there.enter_context(workdir.held(member.folder))
            workdir.claim(member.folder, member.experiment.config)
        _take_steps(members, course_of, name, plan, devices, validators)


def _check_dispatches(experiment: Task, plan: Plan) -> None:
    """Refuses dispatches of more steps than ever lie between two events of a run."""
    lengths = {
        "epoch": plan.per_epoch,
        "checkpoint": plan.steps(experiment.checkpoints.every_epochs),
        **({} if (looks := experiment.validation) is None
           else {"look at held-out images": plan.steps(looks.every_epochs)}),
    }  # fmt: skip
    event, most = min(lengths.items(), key=lambda item: item[1])
    count = experiment.training.steps_per_dispatch
    if count > most:
        raise UsageError(
            f"config.training.steps_per_dispatch={count}: expected at most {most}, the steps from "
            f"one {event} to the next"
        )


def _take_steps(
    members: Sequence[Member],
    course_of: Callable[[Plan, Devices], Course],
    name: str,
    plan: Plan,
    devices: Devices,
    validators: Sequence[Validator | None],
) -> None:
    """The steps themselves, in folders that are these members' own."""
    first_of = members[0].experiment
    kept, looks, several = first_of.checkpoints, first_of.validation, len(members) > 1
    # One member may be saved when another is not yet: then both have the step before.
    keep = max(kept.keep, 2) if several else kept.keep
    running = [
        Running(
            member, plan, devices, validator,
            Checkpoints(member.folder / "checkpoints", keep=keep, keep_best=kept.keep_best),
        )
        for member, validator in zip(members, validators, strict=True)
    ]  # fmt: skip
    course = course_of(plan, devices)
    saves = plan.steps(kept.every_epochs)
    look_every = plan.steps(looks.every_epochs) if looks and running[0].validator else 0
    every = first_of.training.log_every

    def looking(done: int) -> bool:
        return bool(look_every) and (done % look_every == 0 or done == plan.total)

    def check(number: int, metrics: dict[str, Any]) -> None:
        for member, own in zip(members, course.told(metrics), strict=True):
            training.check_finite(number, own, f"{member.name}: " if several else "")

    def wait() -> None:
        for one in running:
            one.checkpoints.wait()

    with contextlib.ExitStack() as held:
        for one in running:
            held.enter_context(one.checkpoints)
        interrupt = held.enter_context(Interrupt())
        states = begun_or_restored(running)
        first = int(jax.device_get(states[0].step))
        if first:
            print(f"{name}: goes on from step {first} of {plan.total}", flush=True)
        state = course.join(states)
        del states  # what is joined is held once

        def at_hand(done: int) -> bool:
            return done % saves == 0 or done == plan.total or looking(done)

        def due(done: int) -> bool:
            return interrupt.requested(done) or at_hand(done)

        def stops(done: int) -> bool:  # an epoch has an order of its own
            return done % plan.per_epoch == 0 or at_hand(done)

        feeds = in_dispatches(
            course.feed(first), first, plan.total, first_of.training.steps_per_dispatch, stops
        )
        board = first_of.training.tensorboard
        done, ahead = first, (plan.total - first) * plan.batch_size * len(members)
        with contextlib.ExitStack() as shown:
            for one in running:
                log = MetricsLog(one.member.folder, resume_step=first, tensorboard=board)
                one.log = shown.enter_context(log)
            bar = shown.enter_context(Progress(name, ahead, unit="img"))
            for passed in training.loop(course.step, state, feeds, first, plan.total, due, check):
                taken, done, state = passed.done - done, passed.done, passed.state
                for number, metrics in passed.metrics:
                    for one, own in zip(running, course.told(metrics), strict=True):
                        one.add(own)
                    if number % every == 0 or number == plan.total:
                        lines = [one.tell(number) for one in running]
                        bar.note(
                            **{key: np.mean([line[key] for line in lines]) for key in lines[0]}
                        )
                bar.advance(plan.batch_size * len(members) * taken)
                if passed.due:
                    if several:
                        wait()  # so that all have the step before
                    for m, one in enumerate(running):
                        one.save(done, course.part(state, m), look=looking(done))
                    if interrupt.requested(done):
                        wait()
                        raise Stopped(done, interrupt.signal or signal.SIGTERM)
        wait()
        forget_ahead([member.folder / "checkpoints" for member in members])
        if interrupt.signal is not None:  # asked while the last step was looked at and saved
            raise Stopped(plan.total, interrupt.signal)


def make_validator(experiment: build.Experiment, devices: Devices) -> Validator | None:
    """Accuracy on the held-out images, robust where there is an attack; None without images."""
    looks, source = experiment.validation, experiment.splits.valid
    if looks is None or source is None:
        return None
    attack, of = experiment.validation_attack, logits_fn_of(experiment.network)
    size = round_up(looks.batch_size, devices.size)
    judge = evaluation.judging(of, evaluation.Rules(experiment.threat), devices, batch_size=size)
    drives: dict[str, evaluation.Drive] = {"clean": lambda *given: evaluation.as_they_are(given[2])}
    if attack is not None:
        # Of a random model the first bad draw proves nothing.
        early = not experiment.network.random
        drives["robust"] = evaluation.packed(attack, of, devices, batch_size=size, early=early)

    def validate(state: training.TrainState, key: Key, log: MetricsLog, step: int) -> float:
        variables = training.variables_of(training.model_of(state))
        found = evaluation.cascade(
            drives, judge, variables, key,
            lambda wanted: data.evaluation_batches(source, size, np.flatnonzero(wanted)),
            source.size,
        )  # fmt: skip
        accuracies = {name: float(np.mean(correct)) for name, correct in found.items()}
        log.write(step, "validation", **accuracies)
        return accuracies.get("robust", accuracies["clean"])

    return validate


def main(
    config: ml_collections.ConfigDict,
    folder: Path,
    name: str | None = None,
    replace: bool = False,
) -> None:
    """Trains the model (and its twin), evaluates them side by side, and shows the results."""
    cache.enable()
    initialise()
    runs = build.pair(config, folder)
    # All of them now: the last one's mistake should not wait until the first one is trained.
    for _, experiment, place_of in runs:
        with build.of_twin(None if place_of == folder else runs[0][1].config["twin"]):
            check(experiment)
            initial_weights.check(experiment, place_of)
    for model, experiment, place_of in runs:
        train_members([member_of(model, experiment, place_of)], partial(alone, experiment), model)
        if jax.process_index() == 0:
            report.curves(place_of)
    evaluate.side_by_side(runs, name, replace)


def check(experiment: build.Experiment) -> None:
    """Refuses what this loop, on the devices at hand, does not train."""
    build.check_devices(experiment)
    if experiment.config["method"]["name"] == "rat":
        raise UsageError(
            "config.method.name='rat': expected python -m experiments.rat, which makes the "
            "perturbations that it learns from"
        )


def member_of(name: str, experiment: build.Experiment, folder: Path) -> Member:
    """A classifier's run, with its looks at the held-out images and the weights it begins with."""
    return Member(
        experiment,
        folder,
        name,
        partial(make_validator, experiment),
        partial(initial_weights.begun, experiment),
    )


if __name__ == "__main__":
    run(main, options=(NAME, REPLACE))
