"""What robustness cost in clean accuracy: runs of one method as a curve over a number of theirs."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from experiments.pages import figures
from experiments.pages.exhibit import Exhibit, numbered
from experiments.pages.figures import Point
from experiments.pages.load import Group, Record, Run
from experiments.pages.tables import Cell, Percent, Table

Settings = dict[str, Any]

# What does not change how a run is trained, but for its luck.
_APART = ("seed", "data.data_dir", "evaluation", "sweep", "validation", "checkpoints", "parallel")


class Family(NamedTuple):
    """Runs whose configs differ in one number, `key`, or in none."""

    name: str
    key: str | None
    members: list[tuple[float | None, list[Run]]]  # by value, those of other seeds together


def tradeoff(group: Group, place: int) -> Iterator[Exhibit]:
    """Clean against worst-case accuracy, if there are three measured runs to compare."""
    runs = [run for run in group.runs if run.worst is not None and run.config is not None]
    runs = [run for run in runs if (run.evaluation or {})["attacks"]]
    if len(runs) < 3:
        return
    rows: list[tuple[Cell, ...]] = []
    lines: list[tuple[str, list[Point]]] = []
    for family in families(runs):
        points = []
        for value, some in family.members:
            clean = _mean(some, [(run.evaluation or {})["clean"] for run in some])
            worst = _mean(some, [run.worst or {} for run in some])
            setting = None if family.key is None else f"{family.key} = {value:g}"
            rows.append((family.name, setting, len(some), clean, worst))
            points.append(Point(clean, worst, "" if value is None else f"{value:g}"))
        last = "" if family.key is None else f", {family.key.rpartition('.')[2]}"
        lines.append((family.name + last, points))
    notes = tuple(f"† {run.name}: {'; '.join(run.flags)}." for run in runs if run.flags)
    yield Exhibit(
        numbered("tradeoff", place),
        group.title,
        "Mean and range over runs that differ in their seed alone; of a single run its 95 % "
        "interval. Up and to the right is better.",
        Table(("method", "setting", "runs", "clean, %", "worst case, %"), rows, notes),
        figures.scattered(lines, "clean accuracy, %", "worst-case accuracy, %"),
        size=(7.0, 4.4),
    )


def families(runs: Sequence[Run]) -> list[Family]:
    """The runs by all that is no number in their configs; then by the number that varies.

    Where several numbers vary, each setting is a family of its own. Runs that were attacked or
    judged otherwise are none of a family's, whatever their configs say now.
    """
    alike: dict[Any, list[tuple[Settings, Run]]] = {}
    for run in runs:
        settings = dict(_leaves(run.config or {}))
        words = tuple((key, None if _number(v) else repr(v)) for key, v in settings.items())
        alike.setdefault((words, _judged(run.evaluation or {})), []).append((settings, run))
    found: list[tuple[str, str | None, list[tuple[float | None, list[Run]]]]] = []
    for members in alike.values():
        first = members[0][0]
        varying = [
            key for key in first if len({settings[key] for settings, _ in members}) > 1
        ] if len(members) > 1 else []  # fmt: skip
        name = str((members[0][1].evaluation or {}).get("model"))
        if len(varying) == 1:
            values: dict[float, list[Run]] = {}
            for settings, run in members:
                values.setdefault(settings[varying[0]], []).append(run)
            found.append((name, varying[0], sorted(values.items())))
            continue
        settings_of: dict[Any, list[Run]] = {}
        for settings, run in members:
            settings_of.setdefault(tuple(settings.values()), []).append(run)
        found += [(name, None, [(None, some)]) for some in settings_of.values()]
    return [Family(_title(*one[::2], found), *one[1:]) for one in found]


def _judged(record: Record) -> str:
    """What an evaluation's numbers hang on, but for the images and the threat."""
    attacks = {
        title: (row.get("settings"), row.get("through"))
        for title, row in record.get("attacks", {}).items()
    }
    rules = [record.get(name) for name in ("draws", "eight_bit", "cascade", "condition")]
    return json.dumps([attacks, rules], sort_keys=True)


def _title(name: str, members: list[tuple[float | None, list[Run]]], found: Sequence[Any]) -> str:
    """The method's name; where another family has it too, that of the first run beside it."""
    several = sum(other[0] == name for other in found) > 1
    return f"{name} ({members[0][1][0].name})" if several else name


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of all that training depends on but for its seed, with values to compare."""
    if isinstance(value, dict):
        for key, inner in sorted(value.items()):
            inside = f"{path}.{key}" if path else key
            if inside not in _APART:
                yield from _leaves(inner, inside)
    elif isinstance(value, list):
        yield path, tuple(map(repr, value))
    else:
        yield path, value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(runs: Sequence[Run], rows: Sequence[Record]) -> Percent:
    mark = "†" if any(run.flags for run in runs) else ""
    if len(rows) == 1:
        return Percent.of(rows[0], mark)
    found = [float(row["accuracy"]) for row in rows]
    return Percent(sum(found) / len(found), min(found), max(found), mark)
