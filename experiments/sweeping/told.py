"""What a sweep says: its accuracies, what stands against them, a table and curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import percent
from experiments.sweeping.grid import Cell, chains
from experiments.sweeping.lanes import Measured
from rain_jax import evaluation
from rain_jax.evaluation.audit import Check, above
from rain_jax.evaluation.record import counted
from rain_jax.logs import table

# Settings of an attack, by the ends of their keys, of which more never helps the model.
STRONGER = ("radius", "steps", "draws", "restarts", "queries", "targets")
# The axis whose values are drawn as one: nobody chooses among seeds.
SEED = "seed"
_COLOURS = 10  # of lines that can be told apart
# Further apart than this, evenly multiplied values are drawn on a logarithmic axis.
_WIDE = 8.0


def closed(
    cells: Sequence[Cell], along: str, stands: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Of each cell what stands there and at every smaller radius.

    An image found at one radius is allowed at every larger one. Of a random model it is the least
    share of the draws, which are the same at all radii.
    """
    found: dict[int, np.ndarray] = {}
    for chain in chains(cells, along):
        least = np.minimum.accumulate([stands[number] for number in chain])
        found |= dict(zip(chain, least, strict=True))
    return found


def rows(
    cells: Sequence[Cell], names: Mapping[str, str], along: str | None, measured: Sequence[Measured]
) -> list[dict[str, Any]]:
    """A record for each cell: where it lies, how much stands, and what stands beside that."""
    stands = {number: one.stands for number, one in enumerate(measured)}
    shut = closed(cells, along, stands) if along is not None else {}
    found = []
    for number, (cell, one) in enumerate(zip(cells, measured, strict=True)):
        row = {names[key]: value for key, value in cell.items()}
        row |= counted(one.stands)
        row["clean"] = counted(one.clean)
        if shut:
            row["closed"] = counted(shut[number])
        row["attack"] = {
            "attacked": one.attacked,
            "outside_the_threat": one.outside,
            "mean_margin": one.margin,
            "mean_steps": one.steps,
            "forward_passes": one.passes and int(one.passes.forward),
            "backward_passes": one.passes and int(one.passes.backward),
        }
        found.append(row)
    return found


def checks(
    cells: Sequence[Cell], names: Mapping[str, str], found: Sequence[Mapping[str, Any]],
    attacked: Iterable[str],
) -> list[Check]:  # fmt: skip
    """What is so where attacks work. `attacked` are the axes that are settings of the attack."""
    told = []
    for key in attacked:
        if key.split(".")[-1] not in STRONGER or any(isinstance(c[key], str) for c in cells):
            continue
        name, weaker = names[key], []
        for chain in chains(cells, key):
            for place, less in enumerate(chain):
                for more in chain[place + 1 :]:
                    one, other = found[less], found[more]
                    if above(other["accuracy"], one["accuracy"], one["of"]):
                        weaker.append((one, other))
        text = [
            f"{100 * one['accuracy']:.1f} % stand at {name} {one[name]:g}, "
            f"{100 * other['accuracy']:.1f} % at {other[name]:g}"
            for one, other in weaker
        ]
        told.append(Check(f"more {name} does not weaken the attack", not weaker,
                          text[0] if text else f"in {len(cells)} cells"))  # fmt: skip
    outside = sum(row["attack"]["outside_the_threat"] for row in found if "attack" in row)
    if any("attack" in row for row in found):
        told.append(Check("images keep to the threat", not outside, f"{outside} do not"))
    return told


def printed(record: Mapping[str, Any]) -> str:
    """The accuracies: the first axis down, the second across, the others beside the first.

    Each has a mark where a check of the sweep did not pass.
    """
    mark = " !" if record["flagged"] else ""
    axes = record["axes"]
    first, *others = sorted(axes, key=lambda name: len(axes[name]) < 2)
    across = others[0] if others and len(axes[others[0]]) > 1 else None
    rest = [name for name in others if name != across and len(axes[name]) > 1]
    lines: dict[tuple[Any, ...], dict[Any, str]] = {}
    for cell in record["cells"]:
        place = (*(cell[name] for name in rest), cell[first])
        shown = "withheld"  # as a ladder does whose checks fail
        if "right" in cell:
            shown = percent(evaluation.Proportion(cell["right"], cell["of"]))
        lines.setdefault(place, {})[cell.get(across)] = shown + mark
    columns = axes[across] if across else [None]
    heads = [f"{across} {_short(value)}" for value in columns] if across else ["accuracy"]
    body = [
        [", ".join(f"{name} {_short(value)}" for name, value in zip([*rest, first], place,
                                                                  strict=True)),
         *(line.get(column, "") for column in columns)]
        for place, line in lines.items()
    ]  # fmt: skip
    return table(body, ["", *heads])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figure(path: Path, record: Mapping[str, Any]) -> None:
    """Draws the accuracy over the first axis of numbers, a line for each of the other values.

    Seeds are one line, their mean, and what is shaded reaches from the least to the most of them;
    of one seed it is the 95 % interval. Dashed is the curve in which what broke at a smaller radius
    is broken, where it is another one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = record["axes"]
    numbers = [n for n, v in axes.items() if len(v) > 1 and not isinstance(v[0], str | bool)]
    if not numbers:
        return
    x = numbers[0]
    others = [name for name, values in axes.items() if name not in (x, SEED) and len(values) > 1]
    if x != SEED and len(axes.get(SEED, ())) > 1:
        shaded = f"mean of {len(axes[SEED])} seeds, their range shaded"
    else:
        shaded = "95 % interval shaded"
    drawn, ax = plt.subplots(figsize=(6.0, 4.0), layout="constrained")
    # Too many to tell apart have the colour of their value on the first axis.
    many = math.prod(len(axes[name]) for name in others) > _COLOURS
    shown = [cell for cell in record["cells"] if "accuracy" in cell]  # others are withheld
    for line, (place, some) in enumerate(lines(shown, x, others).items()):
        colour = f"C{(axes[others[0]].index(place[0]) if many else line) % _COLOURS}"
        named = list(zip(others, place, strict=True))[: 1 if many else None]
        label = ", ".join(f"{name} {_short(value)}" for name, value in named)
        values = sorted(some)
        at = [some[value] for value in values]
        told = [c.get_label() for c in ax.get_lines()]
        mean = [100 * np.mean([cell["accuracy"] for cell in cells]) for cells in at]
        ax.plot(values, mean, marker=".", color=colour, lw=1,
                label=label if label not in told else None)  # fmt: skip
        low, high = np.array([_reach(cells) for cells in at]).T
        ax.fill_between(values, 100 * low, 100 * high, color=colour, alpha=0.15, lw=0)
        shut = [100 * np.mean([c.get("closed", c)["accuracy"] for c in cells]) for cells in at]
        if not np.allclose(mean, shut, atol=1e-7):
            ax.plot(values, shut, color=colour, lw=1, ls="--")
    if geometric(axes[x]):
        ax.set_xscale("log")
    ax.set_xlabel(f"{x} ({shaded})")
    ax.set_ylabel("accuracy, %")
    ax.set_ylim(0, 100)
    ax.grid(alpha=0.3)
    if others:
        ax.legend(fontsize=8)
    if record["flagged"]:
        ax.set_title("flagged: see the checks in sweep.json", fontsize=9, color="tab:red")
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def lines(
    cells: Sequence[Mapping[str, Any]], along: str, others: Sequence[str]
) -> dict[tuple[Any, ...], dict[Any, list[Mapping[str, Any]]]]:
    """The cells of each line, by their values on the other axes: {place on `along`: its seeds}."""
    found: dict[tuple[Any, ...], dict[Any, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        line = found.setdefault(tuple(cell[name] for name in others), {})
        line.setdefault(cell[along], []).append(cell)
    return found


def _reach(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """From the least to the most of several seeds, or the interval of the only one."""
    if len(cells) == 1:
        low, high = cells[0]["interval_95"]
        return low, high
    each = [cell["accuracy"] for cell in cells]
    return min(each), max(each)


def geometric(values: Sequence[float]) -> bool:
    """Whether values are spread by factors rather than by steps."""
    ordered = np.sort(np.asarray(values, float))
    if len(ordered) < 3 or ordered[0] <= 0 or ordered[-1] / ordered[0] < _WIDE:
        return False
    steps, factors = np.diff(ordered), np.diff(np.log(ordered))
    return bool(np.std(factors) / np.mean(factors) < np.std(steps) / np.mean(steps))
