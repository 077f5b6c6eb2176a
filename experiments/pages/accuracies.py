"""What evaluation.json says: accuracies under attacks, at radii, and what they cost."""

from collections.abc import Iterator
from typing import Any

from experiments.pages import figures
from experiments.pages.exhibit import Exhibit, is_check, limit, numbered
from experiments.pages.figures import Line
from experiments.pages.load import Group, Record, Run
from experiments.pages.tables import Cell, Percent, Table


def headline(group: Group, place: int) -> Exhibit:
    """Clean and worst-case accuracy, a line for each run."""
    rows: list[tuple[Cell, ...]] = []
    for run in group.runs:
        record = run.evaluation or {}
        worst: Cell = None
        if not record["attacks"]:
            worst = "not attacked"
        elif run.worst is not None:
            worst = Percent.of(run.worst, "†" if run.flags else "")
        elif "worst_case" in record:
            worst = "withheld †"
        titles = list(record["attacks"])
        shown = ", ".join(titles) if len(titles) <= 6 else f"{len(titles)}, listed below"
        shown = shown or "none"
        rows.append(
            (run.name, record.get("model"), Percent.of(record["clean"]), worst, shown,
             record.get("draws"), {True: "yes", False: "no"}.get(record.get("eight_bit", "")))
        )  # fmt: skip
    headers = ("run", "method", "clean, %", "worst case, %", "attacks", "draws", "8 bit")
    return Exhibit(
        numbered("results", place), group.title, "",
        Table(headers, rows, (*flagged(group, "†"), *_which(group))),
        leading=True,
        draw=None if len(group.runs) == 1 else figures.dots(
            [run.name for run in group.runs],
            [(name, [_range(row(run)) for run in group.runs]) for name, row in (
                ("clean", lambda run: run.evaluation["clean"]),
                ("worst case", lambda run: run.worst if run.evaluation["attacks"] else None),
            )],
        ),
        size=(7.0, 1.3 + 0.45 * len(group.runs)),
    )  # fmt: skip


def _which(group: Group) -> list[str]:
    """Which evaluation of each run is shown, a note each."""
    return [
        f"{run.name}: evaluation {run.place.name}"
        + (f"; the run has others: {', '.join(run.others)}." if run.others else ".")
        for run in group.runs
        if run.place != run.folder
    ]


def flagged(group: Group, mark: str) -> list[str]:
    """What the records of the runs hold against their numbers, a note each."""
    return [f"{mark} {run.name}: {'; '.join(run.flags)}." for run in group.runs if run.flags]


def _range(row: Record | None) -> tuple[float, float, float] | None:
    return None if row is None else (row["accuracy"], *row["interval_95"])


def columns_of(run: Run) -> dict[str, Record]:
    """The rows of a run's evaluation by title; those of a cascade but the first after a “+”.

    Checks at a larger radius are no part of the cascade.
    """
    record = run.evaluation or {}
    found, before = {"clean": record["clean"]}, 0
    furthest = limit(record["threat"])
    for title, row in record["attacks"].items():
        alone = not record.get("cascade") or is_check(row, furthest)
        found[title if alone or not before else f"+ {title}"] = row
        before += not alone
    return found


def under_attack(group: Group, place: int) -> Exhibit:
    """Accuracy under each attack: attacks down, runs across."""
    columns = [columns_of(run) for run in group.runs]
    titles = list(dict.fromkeys(title for column in columns for title in column))
    furthest = limit((group.runs[0].evaluation or {})["threat"])
    notes, rows = [], []
    for title in titles:
        held = [column.get(title) for column in columns]
        settings = [row.get("settings") for row in held if row is not None and title != "clean"]
        ways = dict.fromkeys(row["through"] for row in held if row and row.get("through"))
        further = any(r and is_check(r, furthest) for r in held)
        mark = "†" if further else ""
        if any(one != settings[0] for one in settings):
            notes.append(f"‡ {title} has not the same settings in all runs.")
            mark += "‡"
        cells = [
            None if row is None
            # A clean accuracy hangs on no attack.
            else Percent.of(row, mark + ("!" if run.flags and title != "clean" else ""))
            for run, row in zip(group.runs, held, strict=True)
        ]  # fmt: skip
        rows.append((title, ", ".join(ways) or None, *cells))
    if any(isinstance(cell, Percent) and "†" in cell.mark for row in rows for cell in row):
        notes.insert(0, "† goes further than the radius: a check, and no part of the worst case.")
    notes += flagged(group, "!")
    headers = ("attack", "through", *(run.name for run in group.runs))
    caption = "“Through” is the form of the model, or the other run, whose gradients were followed."
    if not any(row[1] for row in rows):
        headers, caption = ("attack", *headers[2:]), ""
        rows = [(row[0], *row[2:]) for row in rows]
    shown = [(run.name, [_range(column.get(t)) for t in titles])
             for run, column in zip(group.runs, columns, strict=True)]  # fmt: skip
    return Exhibit(
        numbered("attacks", place), group.title, caption,
        Table(headers, rows, tuple(notes)), figures.dots(titles, shown),
        (7.0, 1.2 + len(titles) * max(0.27, 0.13 * len(shown))), True,
    )  # fmt: skip


def against_radius(group: Group, place: int) -> Iterator[Exhibit]:
    """What minimum-norm attacks say of every radius."""
    lines, rows = [], []
    for run in group.runs:
        for title, row in ((run.evaluation or {}).get("distances") or {}).items():
            lines.append(
                Line(
                    f"{run.name}, {title}" + (" (flagged)" if run.flags else ""),
                    row["radius"], [100 * float(a) for a in row["accuracy"]],
                )
            )  # fmt: skip
            rows += [
                (run.name, title, r, Percent(a, mark="!" if run.flags else ""))
                for r, a in zip(row["radius"], row["accuracy"], strict=True)
            ]
    if lines:
        radius = float((group.runs[0].evaluation or {})["threat"]["radius"])
        yield Exhibit(
            numbered("radius", place), group.title, "The dotted line is the radius of the threat.",
            Table(("run", "attack", "radius", "accuracy, %"), rows, tuple(flagged(group, "!"))),
            figures.plotted(lines, "radius, of pixels in [0, 1]", "accuracy, %", radius),
        )  # fmt: skip


def cost(group: Group, place: int) -> Exhibit:
    """Seconds, and passes and queries where they are recorded."""
    counted: dict[str, str] = {}
    told: list[tuple[Run, str, Record, Record]] = []
    for run in group.runs:
        columns = columns_of(run)
        columns |= {
            f"{title} (distances)": row
            for title, row in ((run.evaluation or {}).get("distances") or {}).items()
        }
        for title, row in columns.items():
            flat = {key: value for key, value in _flat(row) if _is_cost(key, value)}
            counted |= dict.fromkeys(flat, "")
            told.append((run, title, row, flat))
    rows: list[tuple[Cell, ...]] = []
    for run, title, row, flat in told:
        attacked = row.get("attacked", row.get("of"))
        rows.append(
            (run.name, title, attacked, row.get("mean_steps"), *(flat.get(key) for key in counted),
             row.get("seconds"), _device(run))
        )  # fmt: skip
    timed = [(run, title, row["seconds"]) for run, title, row, _ in told if "seconds" in row]
    headers = ("run", "attack", "images", "mean steps", *counted, "seconds", "device")
    series = {run.name: number for number, run in enumerate(group.runs)}
    labels = [f"{run.name}: {t}" if len(group.runs) > 1 else t for run, t, _ in timed]
    return Exhibit(
        numbered("cost", place), group.title, "", Table(headers, rows),
        figures.bars(labels, [s for _, _, s in timed], [series[r.name] for r, _, _ in timed],
                     "seconds"),
        (7.0, 0.8 + 0.26 * max(len(timed), 2)), True,
    )  # fmt: skip


def _flat(value: Record, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{before}{key} ")
        else:
            yield f"{before}{key}", inner


def _is_cost(key: str, value: Any) -> bool:
    named = key == "queries" or "passes" in key or key.split()[-1] in ("forward", "backward")
    return named and not key.startswith("settings") and isinstance(value, int | float)


def _device(run: Run) -> str | None:
    told = (run.evaluation or {}).get("provenance") or {}
    return f"{told['devices']} × {told['device']}" if {"device", "devices"} <= told.keys() else None
