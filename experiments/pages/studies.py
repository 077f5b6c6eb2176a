"""What other commands and the training itself leave: sweeps, certificates, learning curves."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.pages import figures
from experiments.pages.exhibit import Exhibit, numbered, reading, safe
from experiments.pages.figures import Line
from experiments.pages.load import Record, Run
from experiments.pages.tables import Cell, Percent, Table, plain

# Over what a study's accuracies are drawn, by the first of these that varies.
AXES = ("radius", "severity", "steps", "draws")


SEED = "seed"
# What stands beside an accuracy and is not what was varied.
_BESIDE = {"accuracy", "right", "of", "images", "seconds", "step", "accuracy_of_the_mean",
           "accuracy_in_all_draws"}  # fmt: skip


def against_budget(run: Run) -> Iterator[Exhibit]:
    """The sweep of a ladder, over its steps and over its draws."""
    sweep = (run.evaluation or {}).get("ladder", {}).get("sweep")
    if sweep:
        caption = "On the images that the sweep looked at; it records no intervals."
        yield from swept(f"budget-{safe(run.name)}", run.name, caption, sweep, ("steps", "draws"))


def swept(
    slug: str,
    title: str,
    caption: str,
    cells: list[Record],
    axes: Sequence[str] = AXES,
    flags: Sequence[str] = (),
) -> Iterator[Exhibit]:
    """Accuracies over whatever was varied: along `axes` where they are numbers, else in lines.

    Over draws there is a figure of its own, where another axis varies, too: whether gradients were
    averaged enough is a question by itself. `flags` are what its own record holds against it.
    """
    held = list(
        dict.fromkeys(
            key
            for cell in cells
            for key, value in cell.items()
            if key not in _BESIDE and not isinstance(value, list | dict)
        )
    )
    mark = "!" if flags else ""
    rows: list[tuple[Cell, ...]] = [
        (*(cell.get(key) for key in held), Percent.of(cell, mark)) for cell in cells
    ]
    table = Table((*held, "accuracy, %"), rows, tuple(f"! {flag}" for flag in flags))
    varied = [key for key in held if len({cell.get(key) for cell in cells}) > 1]
    numbers = [
        axis for axis in axes
        if axis in varied and all(isinstance(cell.get(axis), int | float) for cell in cells)
    ]  # fmt: skip
    if not numbers:
        yield Exhibit(slug, title, caption, table, leading=True)
    for x in [*numbers[:1], *(["draws"] if "draws" in numbers[1:] else [])]:
        first = x == numbers[0]
        lines, left = _lines(cells, x, [key for key in varied if key != x])
        told = [caption, "Bands are the range of the seeds." if _seeds(varied, x) else "",
                f"{left} more lines are in the table." if left else ""]  # fmt: skip
        yield Exhibit(
            slug if first else f"{slug}-{x}", title if first else f"{title}, over {x}",
            " ".join(filter(None, told)), table, figures.plotted(lines, x, "accuracy, %"),
            (7.0, 3.2 + 0.08 * len(lines)),
        )  # fmt: skip


def _seeds(varied: Sequence[str], x: str) -> bool:
    """Whether seeds are joined into one line: nobody chooses among them."""
    return SEED in varied and x != SEED


def _lines(cells: list[Record], x: str, others: list[str]) -> tuple[list[Line], int]:
    """A line over `x` for each combination of the others; and how many were too many to draw."""
    seeds = _seeds(others, x)
    held: dict[tuple[Any, ...], dict[float, list[Record]]] = {}
    named = [key for key in others if not (seeds and key == SEED)]
    for cell in cells:
        line = held.setdefault(tuple(cell.get(key) for key in named), {})
        line.setdefault(float(cell[x]), []).append(cell)
    places = list(held)
    if len(places) > len(figures.SERIES):
        # As many as can be told apart, evenly spread.
        kept = np.linspace(0, len(places) - 1, len(figures.SERIES)).round().astype(int)
        places = [places[number] for number in kept]
    lines = []
    for place in places:
        some = sorted(held[place].items())
        ends = [_reach(there, seeds) for _, there in some]
        low, high = zip(*ends, strict=True) if all(ends) else (None, None)
        label = ", ".join(f"{k} {plain(v)}" for k, v in zip(named, place, strict=True))
        accuracy = [100 * float(np.mean([cell["accuracy"] for cell in there])) for _, there in some]
        lines.append(Line(label or "accuracy", [value for value, _ in some], accuracy, low, high))
    return lines, len(held) - len(places)


def _reach(there: list[Record], seeds: bool) -> tuple[float, float] | None:
    """From the least to the most of the seeds, or a single cell's interval where it has one."""
    if seeds:
        each = [100 * float(cell["accuracy"]) for cell in there]
        return min(each), max(each)
    ends = there[-1].get("interval_95")
    return (100 * ends[0], 100 * ends[1]) if ends else None


def cells_of(value: Any, names: tuple[str, ...] = ()) -> Iterator[Record]:
    """Whatever in a record has an accuracy, with the names of where it stood."""
    if isinstance(value, dict) and isinstance(value.get("accuracy"), int | float):
        yield {"where": " / ".join(names), **value} if names else value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from cells_of(inner, (*names, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from cells_of(inner, names)


def studies(run: Run) -> Iterator[Exhibit]:
    """Certified radii, corruptions, sweeps: their accuracies, over what each of them varied."""
    for name in [name for name in run.studies if name != "frequencies"]:
        with reading(run.folder / f"{name}.json"):
            yield from _studied(run, name, run.studies[name])


def _studied(run: Run, name: str, record: Record) -> Iterator[Exhibit]:
    slug, title = f"{name}-{safe(run.name)}", f"{run.name}: {name}"
    if name == "corruptions":
        yield from corrupted(slug, title, record)
    elif name == "certify":
        cells = [
            {"sigma": one["sigma"], **cell} for one in record["sigmas"] for cell in one["certified"]
        ]
        caption = (
            f"Certified accuracy in L2 by randomised smoothing, {record['draws']:,} draws, each "
            f"certificate wrong with a chance of {record['alpha']:g} at most."
        )
        yield from swept(slug, title, caption, cells)
    elif cells := _measured(record):
        if len({cell.get("where") for cell in cells}) == 1:
            cells = [{k: value for k, value in cell.items() if k != "where"} for cell in cells]
        failed = [check for check in record.get("checks", []) if not check["passed"]]
        flags = [f"does not hold: {check['name']} ({check['told']})" for check in failed]
        yield from swept(slug, title, f"All accuracies in {name}.json.", cells, flags=flags)


def _measured(record: Record) -> list[Record]:
    """What a study measured; of a sweep the cells whose number is not withheld."""
    if "axes" in record and "cells" in record:
        return [cell for cell in record["cells"] if "accuracy" in cell]
    return list(cells_of(record))


def corrupted(slug: str, title: str, record: Record) -> Iterator[Exhibit]:
    """Accuracies by family and severity, of each model that the study looked at."""
    for model, told in record["runs"].items():
        families = told["families"]
        levels = list(dict.fromkeys(level for cells in families.values() for level in cells))
        rows: list[tuple[Cell, ...]] = [("clean", Percent.of(told["clean"]), *[None] * len(levels))]
        rows += [
            (family, None, *(Percent.of(cells[v]) if v in cells else None for v in levels))
            for family, cells in families.items()
        ]
        shares = np.array(
            [[100 * cells[v]["accuracy"] if v in cells else np.nan for v in levels]
             for cells in families.values()]
        )  # fmt: skip
        several = len(record["runs"]) > 1
        means = "; ".join(
            f"{name} {unit * told[key]:.3g} %" for key, name, unit in (
                ("mean_error", "mean error", 100), ("mce", "mean corruption error", 1),
                ("relative_mce", "relative mean corruption error", 1),
            ) if told.get(key) is not None
        )  # fmt: skip
        yield Exhibit(
            f"{slug}-{safe(model)}" if several else slug,
            title + (f", {model}" if several else ""),
            f"Accuracy by family and severity, of which 0 is the clean image; {means}.",
            Table(("family", "0", *levels), rows),
            figures.matrices([""], [shares], list(families), levels, ("", "severity")),
            (4.8, 1.0 + 0.27 * len(families)), leading=True,
        )  # fmt: skip


# A field of a learning curve: the kind of its lines, what its axis says, and its unit.
_CURVES = {
    "loss": ("train", "training loss", 1),
    "accuracy": ("train", "training accuracy, %", 100),
    "clean": ("validation", "held out, clean, %", 100),
    "robust": ("validation", "held out, robust, %", 100),
    "psnr": ("validation", "held out, PSNR, dB", 1),
    "bicubic": ("validation", "held out, PSNR of bicubic, dB", 1),
}


def learning(runs: Sequence[Run]) -> list[Exhibit]:
    """The learning curves of the runs, those of the same data together."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        if run.metrics:
            data = (run.config or {}).get("data", {}).get("name") or "data not recorded"
            together.setdefault(data, []).append(run)
    found = []
    for place, (data, some) in enumerate(together.items()):
        panels = [
            (label, [line for place_, run in enumerate(some) for line in _line(run, field, place_)])
            for field, (_, label, _) in _CURVES.items()
        ]
        panels = [panel for panel in panels if panel[1]]
        spared = ", ".join(run.name for run in some if _unattacked(run))
        caption = "Held-out images are attacked as the run's validation says." + (
            f" Those of {spared} were not." if spared else ""
        )
        found.append(
            Exhibit(numbered("learning", place), data, caption, _log(some),
                    figures.learning(panels),
                    (8.6, 0.6 + 2.5 * -(-len(panels) // 2)))
        )  # fmt: skip
    return found


def _unattacked(run: Run) -> bool:
    """Whether “robust” is only what the log calls the accuracy on clean images."""
    return ((run.config or {}).get("validation") or {"attack": ""}).get("attack", "") is None


def _logged(run: Run) -> list[Record]:
    """The lines of the learning curve, without a robust accuracy that was never measured."""
    dropped = {"robust"} if _unattacked(run) else set()
    return [{k: value for k, value in line.items() if k not in dropped} for line in run.metrics]


def _line(run: Run, field: str, number: int) -> Iterator[Line]:
    kind, _, times = _CURVES[field]
    with reading(run.folder / "metrics.jsonl"):
        points = [
            (line["step"], times * float(line[field]))
            for line in _logged(run)
            if line["kind"] == kind and field in line
        ]
    if points:
        steps, values = zip(*points, strict=True)
        yield Line(run.name, steps, values, series=number)


def _log(runs: Sequence[Run]) -> Table:
    lines = [(run.name, line) for run in runs for line in _logged(run)]
    kept = [field for field in _CURVES if any(field in line for _, line in lines)]
    return Table(
        ("run", "step", "kind", *kept),
        [
            (name, line["step"], line["kind"],
             *(float(line[field]) if field in line else None for field in kept))
            for name, line in lines
        ],
    )  # fmt: skip
