"""What the folders of runs hold: read and checked, nothing made up for what is not there."""

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rain_jax.checks import UsageError
from rain_jax.evaluation.record import INDEX, VERDICTS
from rain_jax.runs import evaluations

Record = dict[str, Any]
Arrays = dict[str, np.ndarray]

# What a run may hold beside its learning curve and evaluation, by the commands that measure it.
STUDIES = ("frequencies", "certify", "corruptions", "sweep")
_FILES = {
    "config.json": "the settings",
    "provenance.json": "how it was trained",
    "metrics.jsonl": "the learning curve",
    "evaluation.json": "the accuracies",
    "verdicts.npz": "the verdicts on single images",
    "examples.npz": "the images of the gallery",
}
_OF_EVALUATION = ("evaluation.json", "verdicts.npz", "examples.npz")


class Run(NamedTuple):
    """A run, as far as it is recorded; what is not is None or empty, and named in `missing`."""

    name: str  # of its folder, with as much of the path as tells it from the others
    folder: Path
    place: Path  # of the evaluation that is shown
    others: tuple[str, ...]  # the names of the run's other evaluations
    config: Record | None
    training: Record | None  # the provenance of its training
    metrics: list[Record]
    evaluation: Record | None  # of a classifier
    verdicts: dict[str, Arrays]  # by column: field -> array [N]
    samples: dict[str, Arrays]  # by model: field -> array [n, ...]
    statistics: Arrays
    studies: dict[str, Record]
    missing: tuple[str, ...]

    @property
    def worst(self) -> Record | None:
        """The headline, or None where it is withheld or was never measured."""
        return (self.evaluation or {}).get("worst_case")

    @property
    def flags(self) -> list[str]:
        """What the record itself holds against its numbers."""
        record = self.evaluation or {}
        checks = [*record.get("checks", []), *record.get("ladder", {}).get("checks", [])]
        found = [f"does not hold: {c['name']} ({c['told']})" for c in checks if not c["passed"]]
        if "checks" in record and not checks:
            found.append("no checks were made")
        if record and record.get("worst_case") is None:
            found.append("no worst case is given")
        for title, row in record.get("attacks", {}).items():
            if row.get("outside_the_threat"):
                found.append(
                    f"{title}: {row['outside_the_threat']:,} images broke the rules and count as "
                    "unbroken"
                )
        return found


class Group(NamedTuple):
    """Evaluated runs whose numbers may stand side by side: the same images, the same threat."""

    title: str
    runs: list[Run]


def load(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each with its latest evaluation, in order.

    A folder may be an evaluation's own, `RUN/evaluations/NAME`: then that one is shown.

    Raises:
      UsageError: a folder is not there, is given twice or holds nothing of a run; a file is
        damaged, or its numbers contradict each other.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder: expected that of a run")
        if resolved.count(place) > 1:
            raise UsageError(f"{folder} is given twice")
    return [_run(folder, name) for folder, name in zip(folders, names_of(resolved), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths: as many as it takes, at least one, that no two are alike."""
    names = []
    for folder in folders:
        others = [other.parts for other in folders if other != folder]
        count = 1
        while any(other[-count:] == folder.parts[-count:] for other in others):
            count += 1
        names.append("/".join(folder.parts[-count:]))
    return names


def groups(runs: Iterable[Run]) -> list[Group]:
    """The evaluated runs by data, threat and number of images, by the first of each."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.evaluation is not None:
            found.setdefault(_title(run.evaluation), []).append(run)
    return [Group(title, members) for title, members in found.items()]


def _title(record: Record) -> str:
    norm, radius = record["threat"]["norm"], float(record["threat"]["radius"])
    shown = {"linf": "L∞", "l2": "L2", "l1": "L1"}.get(norm, norm)
    size = f"{radius:.4g}" + (f" ({255 * radius:.3g}/255)" if norm == "linf" else "")
    return f"{record['data']}, {record['images']:,} test images, {shown} radius {size}"


def _run(folder: Path, name: str) -> Run:
    """A run with its latest evaluation; given the folder of an evaluation, with that one."""
    place = evaluations.latest(folder) or folder
    if folder.parent.name == evaluations.FOLDER:
        folder = folder.parent.parent
    evaluation = read_json(place / INDEX)
    missing = [
        f"{file} ({what})"
        for file, what in _FILES.items()
        if not ((place if file in _OF_EVALUATION else folder) / file).exists()
    ]
    studies = {study: read_json(folder / f"{study}.json") for study in STUDIES}
    if len(missing) == len(_FILES) and not any(studies.values()):
        raise UsageError(f"{folder}: expected the folder of a run, but it holds none of its files")
    if evaluation is not None and "clean" not in evaluation:
        missing.append("accuracies (evaluation.json is not that of a classifier)")
        evaluation = None
    if evaluation is not None:
        check_evaluation(place / INDEX, evaluation)
    return Run(
        name,
        folder,
        place,
        tuple(other.name for other in evaluations.all_of(folder) if other != place),
        read_json(folder / "config.json"),
        read_json(folder / "provenance.json"),
        read_lines(folder / "metrics.jsonl"),
        evaluation,
        _verdicts(place / VERDICTS),
        _samples(place / "examples.npz"),
        read_arrays(folder / "statistics.npz"),
        {study: held for study, held in studies.items() if held is not None},
        tuple(missing),
    )


def check_evaluation(path: Path, record: Record) -> None:
    """Refuses a record that cannot be shown, by the first thing that is wrong with it."""
    threat = record.get("threat")
    if not isinstance(threat, dict) or not {"norm", "radius"} <= threat.keys():
        raise UsageError(f"{path}: threat: expected a norm and a radius, found {threat!r:.60}")
    for key in ("data", "images", "attacks"):
        if key not in record:
            raise UsageError(f"{path}: no {key!r} in it: expected what experiments.evaluate writes")
    rows = {"clean": record["clean"], **{f"attacks.{k}": v for k, v in record["attacks"].items()}}
    if record.get("worst_case") is not None:
        rows["worst_case"] = record["worst_case"]
    for where, row in rows.items():
        try:
            value, hits, total = float(row["accuracy"]), float(row["right"]), int(row["of"])
            low, high = map(float, row["interval_95"])
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"{path}: {where}: expected accuracy, interval_95, right and of, found {row!r:.60}"
            ) from None
        slack = 1e-6  # shares are added up in float32
        whole = 0 <= low <= value + slack and value <= high + slack and high <= 1 + slack
        if total < 1 or not whole or not math.isclose(value, hits / total, abs_tol=slack):
            raise UsageError(
                f"{path}: {where}: {hits:g} of {total} right, accuracy {value:g} and interval "
                f"[{low:g}, {high:g}] contradict each other"
            )


def read_json(path: Path) -> Record | None:
    """The object in a file, or None where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: damaged: no JSON can be read from it ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected an object, found {found!r:.60}")
    return found


def read_lines(path: Path) -> list[Record]:
    """The lines of metrics.jsonl; none where there is no file. Half a last line is let go."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            found.append({**entry, "step": int(entry["step"]), "kind": str(entry["kind"])})
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}:{number}: expected a line of a learning curve") from None
    return found


def read_arrays(path: Path) -> Arrays:
    """The arrays in an .npz; none where there is no file."""
    if not path.exists():
        return {}
    try:
        # Opened here, since NumPy leaves a damaged file open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: damaged: no arrays can be read from it ({error})") from None


def _verdicts(path: Path) -> dict[str, Arrays]:
    fields = {"index", "label", "right", "margin", "prediction", "allowed", "distance"}
    found: dict[str, Arrays] = {}
    for key, value in read_arrays(path).items():
        column, slash, field = key.rpartition("/")
        # Of the whole evaluation, or of the images that it has left: nothing of a column.
        if slash and column != "adversarial":
            found.setdefault(column, {})[field] = value
    known: Any = found.get("clean", {}).get("index", [])
    for column, held in found.items():
        if not fields <= held.keys() or len({len(value) for value in held.values()}) > 1:
            raise UsageError(f"{path}: damaged: {column!r} holds {', '.join(sorted(held))}")
        if not np.isin(held["index"], known).all():
            raise UsageError(f"{path}: damaged: {column!r} judges images that 'clean' does not")
    return found


def _samples(path: Path) -> dict[str, Arrays]:
    fields = ("clean", "adversarial", "label", "clean_prediction", "adversarial_prediction")
    arrays = read_arrays(path)
    models = [key.removesuffix("_label") for key in arrays if key.endswith("_label")]
    try:
        return {model: {f: arrays[f"{model}_{f}"] for f in fields} for model in models}
    except KeyError as error:
        raise UsageError(f"{path}: damaged: no array {error} in it") from None
