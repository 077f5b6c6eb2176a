"""RAT: retrains a classifier on targeted universal perturbations of its own, in rounds.

    python -m experiments.rat --config=experiments/configs/rat/mnist.py --workdir=runs/rat_mnist

Each round makes a perturbation for every class against the network as it stands, from a part of
the training images, and trains on them, into round0/, round1/ .. of `--workdir`. At the end they
are made once more, against the last network: that old ones have lost their effect proves nothing.
Beside the files of an evaluation (the network before it is in start/) the folder gets
perturbations.png and .npz, and rat.json: which share of the test images every set of perturbations
takes to its class, for every network. The same command started again goes on where it stopped.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import evaluate, report, train
from experiments.cli import run
from experiments.perturbations import (
    Made,
    Rounds,
    keep,
    kept,
    made,
    noise,
    rounds,
    searches,
    successes,
)
from rain_jax import methods
from rain_jax.checks import UsageError, one_of, within
from rain_jax.config import build, tree
from rain_jax.config.schema import call, filled, make
from rain_jax.logs import provenance, table, write_json
from rain_jax.methods.rat import carrying, with_perturbations, without_perturbations
from rain_jax.parallel import Devices, initialise, with_statistics
from rain_jax.runs import (
    cache,
    evaluating,
    evaluations,
    initial_weights,
    loading,
    step_programs,
    workdir,
)
from rain_jax.types import Variables


def config(**given: Any) -> ml_collections.ConfigDict:
    """A complete config: the sections of `rain_jax.config.config` and `rat`, see `rounds`."""
    plain = tree.plain(given)
    own = plain.pop("rat", {})
    if not isinstance(own, dict):
        raise UsageError(f"config.rat={own!r}: expected a section, dict(..)")
    whole = tree.config(**plain)
    whole["rat"] = filled(rounds, own)
    return whole


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A config with some values replaced, as `tree.changed` does it."""
    whole = tree.plain(config_)
    own = whole.pop("rat", {})
    mine = {key.removeprefix("rat."): v for key, v in changes if key.startswith("rat.")}
    rest = [change for change in changes if not change[0].startswith("rat.")]
    return config(**tree.plain(tree.changed(whole, rest)), rat={**own, **mine})


def experiment(whole: Any) -> tuple[build.Experiment, Rounds]:
    """Builds what a config describes; its network carries perturbations."""
    spec = tree.plain(config(**tree.plain(whole)))
    own, method = spec.pop("rat"), dict(spec["method"])
    one_of("config.method.name", method.get("name"), ["rat"])
    if spec["start"]["classifier"] is None:
        raise UsageError(
            "config.start.classifier is missing: expected the folder of a naturally trained run"
        )
    if spec["defence"] is not None:
        raise UsageError("config.defence: expected None: RAT trains a bare classifier")
    # Without its own method, which expects in the state what only this command puts there.
    built = build.experiment({**spec, "method": {"name": "natural"}})
    within("config.training.replays", built.training.replays, 1, 1)
    network = with_statistics(built.parallel.statistics, built.network)
    objective = make("config.method", methods, method, network=network)
    built = built._replace(config=spec, network=carrying(built.network), objective=objective)
    return built, call("config.rat", rounds, own, threat=built.threat)


def round_of(built: build.Experiment, number: int) -> build.Experiment:
    """The training of one round, by draws of its own."""
    drawn = np.random.SeedSequence([built.seed, number]).generate_state(1)[0]
    seed = int(drawn) % 2**31
    return built._replace(seed=seed, config={**built.config, "seed": seed})


def retrained(
    built: build.Experiment, own: Rounds, folder: Path, devices: Devices
) -> tuple[list[Variables], list[Made]]:
    """The networks from the start to the last round, and the perturbations against each."""
    path = folder / "perturbations.npz"
    images = jnp.zeros((1, *built.splits.train.shape), jnp.float32)
    drawn = built.assembly.network.init(step_programs.keys_of(built.seed).init, images)
    networks, sets = [initial_weights.begun(built, drawn, devices)], kept(path)
    programs = searches(built, own)
    key = jax.random.fold_in(jax.random.key(built.seed), 2)  # none of training's or evaluation's
    for number in range(own.number + 1):
        if len(sets) == number:
            name = f"perturbations {number}"
            own_key = jax.random.fold_in(key, number)
            sets.append(made(built, own, programs, networks[-1], own_key, name))
            if jax.process_index() == 0:
                keep(path, sets, built.splits.train.class_names)
        if number < own.number:
            one, there = round_of(built, number), folder / f"round{number}"
            variables = with_perturbations(networks[-1], jnp.asarray(sets[number].perturbation))
            train.train(
                one,
                there,
                f"rat, round {number}",
                partial(train.make_validator, one),
                lambda drawn, devices, variables=variables: variables,  # type: ignore[misc]
            )
            networks.append(without_perturbations(loading.restore(one, there)[0]))
            if jax.process_index() == 0:
                report.curves(there)
    return networks, sets


def told(
    built: build.Experiment, own: Rounds, networks: list[Variables], sets: list[Made],
    devices: Devices,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """What rat.json says, and the table of it."""
    key = jax.random.fold_in(evaluating.evaluation_key(built.seed), 1)
    patterns = [*(one.perturbation for one in sets), noise(key, own.threat, sets[0].perturbation)]
    names = [*(f"set {number}" for number in range(len(sets))), "random signs"]
    titles = ["start", *(f"round {number}" for number in range(own.number))]
    found = [successes(built, network, np.stack(patterns), devices) for network in networks]
    record = {
        "radius": float(own.threat.radius),
        "made": [
            {field: value.tolist() for field, value in one._asdict().items()
             if field != "perturbation"}
            for one in sets
        ],
        # Set n was made against the n-th network: the fair tests are on the diagonal.
        "success": {
            title: {
                name: {"share": value.value, "interval_95": list(value.interval)}
                for name, value in zip(names, row, strict=True)
            }
            for title, row in zip(titles, found, strict=True)
        },
        "provenance": provenance(),
    }  # fmt: skip
    lines = [[title, *map(report.percent, row)] for title, row in zip(titles, found, strict=True)]
    return record, table(lines, ["network", *names])


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Retrains, round by round, and measures what came of it."""
    cache.enable()
    initialise()
    built, own = experiment(config)
    build.check_devices(built)
    initial_weights.check(built, folder)
    with workdir.held(folder):
        workdir.claim(folder, tree.plain(config))
        _rounds(built, own, folder)


def _rounds(built: build.Experiment, own: Rounds, folder: Path) -> None:
    devices = built.parallel.placed(training=True)
    networks, sets = retrained(built, own, folder, devices)
    record, success = told(built, own, networks, sets, devices)
    if jax.process_index() == 0:
        write_json(folder / "rat.json", record)
    planned = evaluating.evaluation_of(built, networks[-1], "rat")
    default = evaluations.name_of(built.evaluation, planned.source.size)
    place = evaluations.place(folder, planned, default)
    # The one that the run is about comes last: it is the run's latest evaluation.
    before = place.with_name(f"{place.name}.start")
    start_pair = evaluate.evaluate(built, networks[0], before, "start", 0)
    pairs = [evaluate.evaluate(built, networks[-1], place, "rat", own.number), start_pair]
    if jax.process_index() != 0:
        return
    rows, samples = [row for row, _ in pairs], [sample for _, sample in pairs]
    names = built.splits.test.class_names
    report.figure(place / "examples.png", samples, float(built.threat.radius), names)
    text = f"{report.results_table(rows)}\n\nTaken to their class by perturbations\n\n{success}"
    (place / "table.txt").write_text(text + "\n")
    print(f"\nPer cent of the test images, 95 % intervals\n\n{text}\n\n{folder} holds the rest")


if __name__ == "__main__":
    run(main, changed=changed)
