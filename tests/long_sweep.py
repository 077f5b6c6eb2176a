"""Evaluates some cells of a sweep one after another, and compares with what the sweep says.

    PYTHONPATH=. python tests/long_sweep.py RUN --out=FILE --every=8 --config=SWEEP.py [--config.. ]

The long form of test_sweep.py, for a sweep over one run with as many cells as it has. The sweep is
one command; every `--every`-th value of its first axis is evaluated by a command for each cell, as
people do who have no sweep, without the checks that an evaluation makes and a sweep does not.
Both begin with an empty compilation cache, and the evaluations share theirs. Writes how many images
they disagree about, and the seconds of both. Works on copies of the run.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import commands
import numpy as np

from experiments import cli
from experiments.sweeping import grid
from rain_jax.runs import workdir

OWN_SECONDS = 24 * 3600.0  # nobody waits for this one at a keyboard
CELL = '''"""One cell of a sweep."""

import json


def get_config():
    return json.loads({text!r})
'''


def finished(module: str, *arguments: str, said: Path, cache: Path) -> None:
    """Runs a command to its end, with a compilation cache of its own."""
    process = commands.start(
        module, *arguments, devices=2, folder=said, JAX_COMPILATION_CACHE_DIR=str(cache)
    )
    commands.finish(process, said)


def shares(run: Path, title: str) -> np.ndarray:
    """How often each image [N] stands after the attack `title`, as evaluate's verdicts say."""
    with np.load(commands.evaluated(run) / "verdicts.npz") as found:
        stands, places = found["clean/share"].copy(), {
            index: place for place, index in enumerate(found["clean/index"])
        }  # fmt: skip
        columns = (found[f"{title}/{name}"] for name in ("index", "share", "allowed"))
        for index, share, allowed in zip(*columns, strict=True):
            if allowed:
                stands[places[index]] = share
    return stands


def one_by_one(
    asked: grid.Asked, chosen: list[int], base: dict[str, Any], run: Path, folder: Path
) -> tuple[list[np.ndarray], list[float]]:
    """The verdicts of those cells [cells, N], and the seconds of each command."""
    found, seconds = [], []
    for number in chosen:
        spec = grid.config_of(asked, asked.cells[number], base)
        spec["evaluation"] |= dict(ladder=None, checks=False)
        file = folder / "cell.py"
        file.write_text(CELL.format(text=json.dumps(spec)))
        began = time.monotonic()
        said, cache = folder / f"said_{number}", folder / "cache_one_by_one"
        finished("evaluate", f"--workdir={run}", f"--config={file}", said=said, cache=cache)
        seconds.append(time.monotonic() - began)
        found.append(shares(run, grid.title_of(asked, spec)))
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--config", required=True)
    settings, options = parser.parse_known_args()
    commands.LIMIT = OWN_SECONDS
    asked = grid.changed(cli.load_config(settings.config), cli.changes_of(options))
    first, values = next(iter(asked.sweep.axes.items()))
    kept = values[:: settings.every]
    chosen = [number for number, cell in enumerate(asked.cells) if cell[first] in kept]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        run, swept = shutil.copytree(settings.run, folder / "run"), folder / "swept"
        began = time.monotonic()
        finished(
            "sweep", f"--workdir={swept}", f"--config={settings.config}", *options,
            f"--config.sweep.axes.run={run}", said=folder / "said", cache=folder / "cache",
        )  # fmt: skip
        seconds = time.monotonic() - began
        record = json.loads((swept / "sweep.json").read_text())
        with np.load(swept / "sweep.npz") as found:
            stands = found["stands"][chosen]
        base = workdir.read_config(run)
        alone, each = one_by_one(asked, chosen, base, run, folder)
        apart = np.abs(np.stack(alone) - stands)
        told = {
            "options": [f"--config={settings.config}", *options],
            "cells": len(asked.cells),
            "seconds_of_the_sweep": round(seconds, 1),
            "seconds_a_cell": round(seconds / len(asked.cells), 3),
            "cells_one_by_one": len(chosen),
            "seconds_a_cell_one_by_one": [round(one, 2) for one in each],
            "times_as_long_one_by_one": round(
                float(np.mean(each)) / (seconds / len(asked.cells)), 2
            ),
            "images_apart": int(np.sum(apart > 1e-6)),
            "most_apart": float(apart.max()),
            "programs": record["programs"],
        }
        shutil.copy(swept / "sweep.json", settings.out.with_suffix(".sweep.json"))
        shutil.copy(swept / "sweep.png", settings.out.with_suffix(".png"))
    settings.out.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
