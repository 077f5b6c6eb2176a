"""Corruption errors: counted, divided by a baseline's, told in a table and drawn.

Hendrycks & Dietterich, arXiv:1903.12261, section 4.3.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rain_jax.evaluation.record import counted
from rain_jax.image.corruptions import FAMILIES, SEVERITIES
from rain_jax.logs import table

Cell = tuple[str, int]  # family and severity
Seen = dict[Cell, np.ndarray]  # how right a model is about each image [N] of each cell
CLEAN: Cell = ("clean", 0)


class Errors(NamedTuple):
    """Mean errors: of each family over the severities, and on clean images."""

    families: dict[str, float]
    clean: float


# AlexNet's errors on ImageNet-C, means over the severities (hendrycks/robustness, from where the
# code of AugMix and others have them), and on clean images (table 1 of the paper).
ALEXNET_CLASSES = 1000
ALEXNET = Errors(
    dict(
        zip(
            FAMILIES,
            (
                0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816,
                0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500,
            ),
            strict=True,
        )
    ),
    clean=0.435,
)  # fmt: skip


def axes_of(seen: Seen) -> tuple[list[str], list[int]]:
    """The families and the severities of what was seen, in their order."""
    cells = [cell for cell in seen if cell != CLEAN]
    return list(dict.fromkeys(f for f, _ in cells)), list(dict.fromkeys(s for _, s in cells))


def errors_of(seen: Seen) -> Errors:
    """The mean errors of one model."""
    families, severities = axes_of(seen)
    return Errors(
        {
            name: 1 - float(np.mean([np.mean(seen[name, s]) for s in severities]))
            for name in families
        },
        1 - float(np.mean(seen[CLEAN])),
    )


def compared(own: Errors, base: Errors) -> dict[str, Any]:
    """Corruption errors in per cent of the baseline's, and the same of what corruption adds.

    None where the baseline makes no error that could be divided by: then the mean is none either.
    """

    def ratio(error: float, of: float) -> float | None:
        return 100 * error / of if of > 0 else None

    def mean(values: dict[str, float | None]) -> float | None:
        known = [value for value in values.values() if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    ce = {name: ratio(error, base.families[name]) for name, error in own.families.items()}
    relative = {
        name: ratio(error - own.clean, base.families[name] - base.clean)
        for name, error in own.families.items()
    }
    return {"ce": ce, "mce": mean(ce), "relative_ce": relative, "relative_mce": mean(relative)}


def described(seen: Seen, base: Errors | None) -> dict[str, Any]:
    """What corruptions.json says of one model."""
    own, (families, severities) = errors_of(seen), axes_of(seen)

    found = {
        "clean": counted(seen[CLEAN]),
        "families": {
            name: {str(severity): counted(seen[name, severity]) for severity in severities}
            for name in families
        },
        "mean_errors": own.families,
        "mean_error": float(np.mean(list(own.families.values()))),
    }
    return found if base is None else {**found, **compared(own, base)}


def figure(path: Path, record: dict[str, Any]) -> None:
    """Draws the accuracies over the severities, a picture for each family and a line for each run.

    A dashed line is the accuracy on clean images.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 5
    rows = -(-len(record["families"]) // columns)
    drawn, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.3 * rows), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for ax in axes.flat[len(record["families"]) :]:
        ax.set_axis_off()
    for ax, family in zip(axes.flat, record["families"], strict=False):
        for place_, (name, told) in enumerate(record["runs"].items()):
            cells = told["families"][family]
            severity = sorted(map(int, cells))
            value = np.array([cells[str(s)]["accuracy"] for s in severity])
            low, high = np.array([cells[str(s)]["interval_95"] for s in severity]).T
            around = 100 * np.maximum([value - low, high - value], 0.0)  # the last bit may be below
            ax.errorbar(severity, 100 * value, around, marker=".", color=f"C{place_}", label=name)
            ax.axhline(100 * told["clean"]["accuracy"], color=f"C{place_}", ls="--", lw=0.8)
        ax.set_title(family.replace("_", " "), fontsize=9)
        ax.set_xticks(SEVERITIES)
        ax.tick_params(labelbottom=True)  # the lowest of a column is not in the last row everywhere
        ax.set_ylim(0, 100)
    drawn.supxlabel("severity", fontsize=9)
    drawn.supylabel("per cent right", fontsize=9)
    axes.flat[0].legend(fontsize=7)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def text_of(told: dict[str, Any]) -> str:
    """The table of one run."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    ratios = ("ce", "relative_ce") if "ce" in told else ()
    lines = [
        [
            name,
            *(shown(100 * row["accuracy"]) for row in cells.values()),
            shown(100 - 100 * told["mean_errors"][name]),
            *(shown(told[ratio][name]) for ratio in ratios),
        ]
        for name, cells in told["families"].items()
    ]
    severities = list(next(iter(told["families"].values())))
    blank = [""] * len(severities)
    means = [shown(told[key]) for key in ("mce", "relative_mce") if key in told]
    lines.append(["all", *blank, shown(100 - 100 * told["mean_error"]), *means])
    headers = ["family", *severities, "mean"]
    return table(lines, [*headers, *(["CE", "relative CE"] if ratios else [])])
