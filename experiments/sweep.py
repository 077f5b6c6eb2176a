"""Measures a trained run over many settings at once, or trains a run for each of them.

    python -m experiments.sweep --workdir=RUN --config.sweep.axes.threat.radius=0.1,0.2,0.3
    python -m experiments.sweep --workdir=OUT --config=experiments/configs/sweep_radius.py \\
        --config.sweep.axes.run=runs/a,runs/b --config.sweep.axes.seed=0,1,2
    python -m experiments.sweep --workdir=OUT --config=FILE --config.sweep.train \\
        --config.sweep.axes.method.c=0.5,0.6,0.7 --shard=$SLURM_ARRAY_TASK_ID/8
    python -m experiments.sweep --workdir=OUT --config=FILE --config.sweep.train \\
        --config.sweep.side_by_side --config.sweep.axes.method.threshold=0.5,0.6 \\
        --config.sweep.axes.seed=0,1,2

Axes are keys of the config, and `run`, folders of runs; cells are their combinations. What programs
can take as numbers, they do: all radii are one program, and so are all qualities of JPEG or reaches
of a shift; numbers of draws, which are shapes, have one each. A cell says what
`experiments.evaluate` says of the same settings, image by image. One that is trained ends as if it
had been trained alone; with `side_by_side` one program trains those that differ in seeds and such
numbers. The folder gets sweep.jsonl, a line for each cell that is done, so that a killed sweep goes
on; `--shard=i/n` (1 to n) does a share of the cells into a file of its own, in any order and on any
machines that see the folder. Whoever is last writes sweep.json, sweep.npz (verdicts of each image)
and sweep.png.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import train
from experiments.cli import run
from experiments.lines import append, read
from experiments.sweeping import grid, ledger, side_by_side, told
from experiments.sweeping.grid import Asked, Cell
from experiments.sweeping.lanes import Measured, Measurer
from experiments.sweeping.plan import Plan
from rain_jax import norms
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.evaluation import record as records
from rain_jax.evaluation.audit import Check
from rain_jax.logs import Progress, provenance, write_json
from rain_jax.parallel import initialise
from rain_jax.runs import cache, evaluations, workdir

# The programs that a sweep is made of, by the names of their functions in `evaluation`.
_PROGRAMS = ("empty", "fill", "advance", "shrink", "body")
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts what the compiler is asked for, also where its cache knows the answer.

    `own` are the programs that attack and judge, `all` includes the many small ones around them.
    """

    def __init__(self) -> None:
        self.own, self.all = 0, 0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILED:
            self.all += 1
            self.own += about.get("fun_name") in [f"jit({name})" for name in _PROGRAMS]


def measure(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """Measures this process's share of the cells; what is told when all of them are done."""
    shard = plan.asked.sweep.shard
    ids = [plan.identity(number) for number in range(len(plan.cells))]
    done = ledger.read(folder)
    units = grid.share(plan.units(), shard)
    # A chain whose end is missing is walked again from its beginning.
    left = [unit for unit in units if any(ids[number] not in done for number in unit)]
    path, count = ledger.path_of(folder, shard), sum(map(len, left))
    read(path)  # cuts off what a kill left behind of half a line; others' files are theirs
    with Compilations() as compiled, Progress("sweep", count, unit="cell") as bar:
        before, began = (0, 0), time.monotonic()
        for number, one in Measurer(plan).measure(left):
            line = {
                "of": ids[number],
                "cell": plan.cells[number],
                **ledger.packed(one),
                "seconds": time.monotonic() - began,
                "compilations": [compiled.own - before[0], compiled.all - before[1]],
            }
            before, began = (compiled.own, compiled.all), time.monotonic()
            append(path, line)
            bar.advance(1, accuracy=float(np.mean(one.stands)))
    lines = ledger.read(folder)
    if any(name not in lines for name in ids):
        return None
    return described(plan, [lines[name] for name in ids], folder)


def described(plan: Plan, lines: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What sweep.json says; writes the verdicts beside it."""
    asked, cells = plan.asked, plan.cells
    measured: list[Measured] = [ledger.unpacked(line) for line in lines]
    found = told.rows(cells, asked.names, plan.along, measured)
    attacked = [key for key in asked.sweep.axes if key.startswith(("threat.", "evaluation.at"))]
    first = plan.resolved[0]
    spec = grid.replaced(first.spec, {key: "swept" for key in first.cell if key != grid.RUN})
    passes = [one.passes for one in measured]
    own, every = np.sum([line["compilations"] for line in lines], axis=0).tolist()
    if jax.process_index() == 0:
        np.savez_compressed(
            folder / "sweep.npz",
            stands=np.stack([one.stands for one in measured]),
            clean=np.stack([one.clean for one in measured]),
        )
    outcomes = told.checks(cells, asked.names, found, attacked)
    if plan.random:
        least = min(one.draws for one in measured)
        outcomes.append(
            Check("a random model is judged by several draws", least > 1, f"by {least}")
        )
    return {
        "attack": plan.title,
        "settings": spec["evaluation"]["attacks"][plan.title],
        "norm": norms.name_of(plan.experiments[first.run].threat.norm),
        "data": plan.source(first).name,
        "images": plan.source(first).size,
        "draws": sorted({one.draws for one in measured}),
        "warm": asked.sweep.warm,
        **_axes(asked, cells),
        "data_axes": [asked.names[key] for key in plan.data],
        "programs": {
            "groups": len({one.programs for one in plan.resolved}),
            "compilations": own,
            "all_compilations": every,
        },
        "seconds": sum(line["seconds"] for line in lines),
        "passes": None if None in passes else {
            "forward": int(sum(one.forward for one in passes if one)),
            "backward": int(sum(one.backward for one in passes if one)),
        },
        "cells": found,
        "checks": [check._asdict() for check in outcomes],
        "flagged": not all(check.passed for check in outcomes),
        "provenance": provenance(),
    }  # fmt: skip


def _axes(asked: Asked, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "axes": {asked.names[key]: values for key, values in asked.sweep.axes.items()},
        "keys": {name: key for key, name in asked.names.items()},
    }


def train_all(asked: Asked, folder: Path) -> dict[str, Any] | None:
    """Trains and evaluates this process's share of the cells, each in a folder of its own."""
    cells, names = asked.cells, asked.names
    if grid.RUN in asked.sweep.axes or not asked.sections:
        raise UsageError("config.sweep.train: expected a --config to train, and no axis run")
    specs = [grid.config_of(asked, cell, {}) for cell in cells]
    folders = [folder / "cells" / _named(cell, names) for cell in cells]
    if len(set(folders)) < len(folders):
        raise UsageError("config.sweep.axes: expected values that differ in their names")
    own = grid.share(list(zip(specs, folders, strict=True)), asked.sweep.shard)
    left = [(spec, place) for spec, place in own if not _evaluated(place, spec)]
    if asked.sweep.side_by_side:
        side_by_side.train_all(left)
    else:
        for spec, _ in left:
            build.check_devices(build.experiment(spec))
        for spec, place in left:
            print(f"{place}", flush=True)
            train.main(tree.config(**spec), place)
    if not all(map(_evaluated, folders, specs)):
        return None
    records = [json.loads(_record(place).read_text()) for place in folders]
    found = []
    for cell, record in zip(cells, records, strict=True):
        # Where checks of its ladder failed there is no worst case; clean accuracy is none.
        worst = record["worst_case"] or {}
        row = {names[key]: value for key, value in cell.items()}
        kept = ("right", "of", "accuracy", "interval_95")
        found.append({**row, **worst, "clean": {key: record["clean"][key] for key in kept}})
    flagged: bool | None = any(r["flagged"] or r["worst_case"] is None for r in records)
    if not flagged and any(record["flagged"] is None for record in records):
        flagged = None  # no checks were made
    return {
        "trained": [str(place.relative_to(folder)) for place in folders],
        "data": records[0]["data"],
        "images": records[0]["images"],
        **_axes(asked, cells),
        "cells": found,
        "checks": [
            {**check, "cell": {names[key]: value for key, value in cell.items()}}
            for cell, record in zip(cells, records, strict=True)
            for check in record["checks"]
        ],
        "flagged": flagged,
        "provenance": provenance(),
    }


def _shown(cell: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in cell.items())


def _named(cell: Cell, names: dict[str, str]) -> str:
    text = ",".join(f"{names[key]}={value}" for key, value in cell.items())
    return "".join(c if c.isalnum() or c in "._-=," else "-" for c in text)


def _record(place: Path) -> Path:
    """The record of a run's latest evaluation."""
    return (evaluations.latest(place) or place) / records.INDEX


def _evaluated(place: Path, spec: dict[str, Any]) -> bool:
    """Whether a cell's run is done: trained and evaluated as its config says."""
    if not _record(place).exists():
        return False
    held, wanted = workdir.as_written(place), json.loads(json.dumps(spec))
    return not workdir.differences(held, wanted) and held["evaluation"] == wanted["evaluation"]


def main(asked: Asked, folder: Path) -> None:
    """Does this process's share; whoever finds all of them done tells."""
    cache.enable()
    initialise()
    if asked.sweep.train:
        folder.mkdir(parents=True, exist_ok=True)
        workdir.check_writable(folder)
        record = train_all(asked, folder)
    else:
        plan = Plan(asked, folder)
        folder.mkdir(parents=True, exist_ok=True)
        workdir.check_writable(folder)
        record = measure(plan, folder)
    if jax.process_index() != 0:
        return
    number, count = asked.sweep.shard
    if record is None:
        print(f"share {number} of {count} is done; others are not", flush=True)
        return
    replaced = _replaced(folder / "sweep.json", record)
    write_json(folder / "sweep.json", record)
    told.figure(folder / "sweep.png", record)
    # Where runs are trained each has attacks of its own.
    under = f" under {record['attack']}, {record['norm']}" if "attack" in record else ""
    lines = [
        Check(c["name"], c["passed"], c["told"]).flag()
        + (f", {_shown(c['cell'])}" if "cell" in c else "")
        for c in record["checks"]
        if not c["passed"]
    ]
    print(
        f"\nPer cent right of {record['images']:,} test images{under}, 95 % intervals\n\n"
        + "\n".join(
            [
                told.printed(record),
                "",
                *lines,
                *(["no checks were made"] if record["flagged"] is None else []),
                *replaced,
                f"{folder} holds sweep.json and sweep.png",
            ]
        ),
        flush=True,
    )


def _replaced(path: Path, record: dict[str, Any]) -> list[str]:
    """A line about the sweep over other axes that was here before."""
    try:
        axes = json.loads(path.read_text())["axes"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if axes == json.loads(json.dumps(record["axes"])):
        return []
    return [f"{path.parent} held another sweep, over {', '.join(axes)}; it is replaced"]


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line with `--shard=i/n` as the config knows it."""
    named = [re.sub(r"^--shard=", "--config.sweep.shard=", a) for a in argv]
    return [re.sub(r"(?<=^--config\.sweep\.shard=)(\d+)/(\d+)$", r"(\1, \2)", a) for a in named]


if __name__ == "__main__":
    run(main, lambda folder: {}, arguments(sys.argv), changed=grid.changed)
