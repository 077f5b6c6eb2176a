"""What runs show: a table and figures at the end of each, and a report of several.

    python -m experiments.report runs/mnist runs/cifar10_small --out=report

The report is one HTML page, `index.html`, that opens from disk and needs no network: tables,
curves, images, spectra, confusion and cost of what the runs' folders hold, with what is missing and
where it all came from. Beside it lies everything shown as CSV and LaTeX, and every figure as PNG
and SVG.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rain_jax.audit.ladder import BLACK_BOX, CONTROLS, OBLIVIOUS
from rain_jax.checks import UsageError
from rain_jax.evaluation import Proportion
from rain_jax.logs import table

# Columns that fit on a line of the table.
WIDE = 6


class Row(NamedTuple):
    """One model's results: column name -> how many of the images."""

    model: str
    columns: dict[str, Proportion]
    notes: tuple[str, ...] = ()  # lines below the table
    flagged: bool = False  # whether a check says that its attacks may have failed


def percent(value: Proportion) -> str:
    """`87.4 [84.1, 90.1]`: per cent, with the 95 % interval."""
    low, high = value.interval
    return f"{100 * value.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def results_table(rows: list[Row]) -> str:
    """Per cent right of all images with Wilson's 95 % interval: models down, attacks across.

    The other way round where there are more attacks than fit on a line.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    cells = [[_cell(row, name) for name in names] for row in rows]
    if len(names) <= WIDE:
        drawn = table([[row.model, *line] for row, line in zip(rows, cells, strict=True)],
                      ["model", *names])  # fmt: skip
    else:
        columns = zip(*cells, strict=True)
        drawn = table([[name, *column] for name, column in zip(names, columns, strict=True)],
                      ["attack", *(row.model for row in rows)])  # fmt: skip
    notes = [f"{row.model}: {note}" for row in rows for note in row.notes]
    return "\n".join([drawn, *([""] if notes else []), *notes])


def _cell(row: Row, name: str) -> str:
    """A figure, with a mark where it may say too much."""
    if name not in row.columns:
        return ""
    return percent(row.columns[name]) + (" !" if row.flagged and name != "clean" else "")


class Sample(NamedTuple):
    """One model's look at the same few images, for the figure; arrays [N, ...]."""

    model: str
    clean: np.ndarray
    adversarial: np.ndarray
    label: np.ndarray
    clean_prediction: np.ndarray
    adversarial_prediction: np.ndarray


def figure(path: Path, samples: list[Sample], radius: float, names: tuple[str, ...]) -> None:
    """Draws clean images, then each model's perturbation and adversarial image; data beside it.

    Perturbations are shown with grey = none and the ends of the scale = +- `radius`; titles are
    predictions, red where wrong. `path` is a .png; the arrays go to the .npz of the same name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(samples[0].label)
    lines = 1 + 2 * len(samples)
    drawn, axes = plt.subplots(
        lines, count, figsize=(1.15 * count, 1.4 * lines), squeeze=False, layout="constrained"
    )

    def show(line: int, column: int, image: np.ndarray, title: str, right: bool) -> None:
        ax = axes[line, column]
        grey = image.shape[-1] == 1
        ax.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
        ax.set_title(title, fontsize=8, color="black" if right else "tab:red", pad=2)
        ax.set_xticks([])
        ax.set_yticks([])

    for column in range(count):
        label = int(samples[0].label[column])
        show(0, column, samples[0].clean[column], names[label], True)
        for place, sample in enumerate(samples):
            change = sample.adversarial[column] - sample.clean[column]
            scaled = np.clip(0.5 + change / (2 * max(radius, 1e-12)), 0, 1)
            before, after = (
                int(sample.clean_prediction[column]),
                int(sample.adversarial_prediction[column]),
            )
            show(1 + 2 * place, column, scaled, f"clean: {names[before]}", before == label)
            show(2 + 2 * place, column, sample.adversarial[column],
                 f"attacked: {names[after]}", after == label)  # fmt: skip
    axes[0, 0].set_ylabel("clean", fontsize=8)
    for place, sample in enumerate(samples):
        axes[1 + 2 * place, 0].set_ylabel(f"{sample.model}:\nperturbation", fontsize=8)
        axes[2 + 2 * place, 0].set_ylabel(f"{sample.model}:\nadversarial", fontsize=8)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)
    arrays: dict[str, Any] = {}
    for sample in samples:
        for field, value in sample._asdict().items():
            if field != "model":
                arrays[f"{sample.model}_{field}"] = value
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def curves(folder: Path) -> None:
    """Draws `curves.png` from the run's metrics.jsonl: loss above, accuracies below, over steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    looks = [line for line in lines if line["kind"] == "validation"]
    if not train:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (above, below) = plt.subplots(2, 1, figsize=(6, 5), sharex=True, layout="constrained")
    steps = [line["step"] for line in train]
    above.plot(steps, [float(line["loss"]) for line in train], color="tab:blue")
    above.set_ylabel("training loss")
    if "accuracy" in train[0]:
        below.plot(steps, [100 * line["accuracy"] for line in train], label="training batches")
    for name in ("clean", "robust"):
        if looks and name in looks[0]:
            below.plot(
                [line["step"] for line in looks],
                [100 * line[name] for line in looks],
                marker="o",
                markersize=3,
                label=f"held out, {name}",
            )
    below.set_ylabel("accuracy, %")
    below.set_xlabel("step")
    below.legend(fontsize=8)
    drawn.savefig(folder / "curves.png", dpi=130)
    plt.close(drawn)


def ladder_figure(path: Path, record: dict[str, Any]) -> None:
    """Draws what evaluation.json says of a ladder: its rungs, and the sweep where there is one.

    On the left the accuracy under each rung with Wilson's 95 % interval: grey for
    controls, orange for what goes without gradients of the defended model, blue for the others;
    "worst case" is missing where a check failed. On the right accuracy against steps, a line for
    each number of draws.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rungs = {"clean": record["clean"], **record["attacks"]}
    if record["worst_case"] is not None:
        rungs["worst case"] = record["worst_case"]
    sweep = record["ladder"]["sweep"]
    drawn, axes = plt.subplots(
        1, 2 if sweep else 1, figsize=(9 if sweep else 5, 1 + 0.24 * len(rungs)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    left = axes[0, 0]
    for place, (name, row) in enumerate(rungs.items()):
        value, (low, high) = 100 * row["accuracy"], (100 * end for end in row["interval_95"])
        blind = name in (*OBLIVIOUS, *BLACK_BOX)
        control = name in ("clean", *CONTROLS)
        colour = "tab:gray" if control else "tab:orange" if blind else "tab:blue"
        error = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        left.barh(place, value, xerr=error, color=colour, ecolor="black", capsize=2)
    left.set_yticks(range(len(rungs)), list(rungs), fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("accuracy, %")
    left.set_title("grey: controls; orange: without gradients of the model", fontsize=8)
    for draws in dict.fromkeys(cell["draws"] for cell in sweep):
        cells = [cell for cell in sweep if cell["draws"] == draws]
        axes[0, 1].plot(
            [cell["steps"] for cell in cells], [100 * cell["accuracy"] for cell in cells],
            marker="o", markersize=3, label=f"{draws} draw{'s' if draws > 1 else ''}",
        )  # fmt: skip
    if sweep:
        axes[0, 1].set_xlabel("steps")
        axes[0, 1].set_ylabel("accuracy, %")
        axes[0, 1].legend(fontsize=8)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report that the command line asks for."""
    from experiments.pages import load, page

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write into")
    asked = parser.parse_args(argv)
    runs = load.load(asked.runs)
    if asked.out.resolve() in [run.resolve() for run in asked.runs]:
        raise UsageError(f"--out={asked.out} is the folder of a run: expected another one")
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        written = page.write(runs, asked.out)
    except OSError as error:
        raise UsageError(f"--out={asked.out}: cannot be written ({error.strerror})") from None
    for run in runs:
        print(f"{run.name}: {'; '.join(run.flags) or 'no flags'}")
    print(f"{written} opens in any browser", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
