"""The record of an evaluation, for people, for programs and for those who want to check it.

evaluation.json has counts with intervals, settings, cost and provenance. verdicts.npz has a column
of numbers for each thing known of each image. adversarial.npy has the images that the model gets
wrong, from which `experiments.recount` counts the worst case again.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rain_jax import norms
from rain_jax.checks import UsageError
from rain_jax.evaluation.columns import AttackColumn, ColumnResult, EvaluationRun
from rain_jax.evaluation.counts import curve, proportion, standing
from rain_jax.evaluation.engine import Evaluation
from rain_jax.evaluation.verdicts import Judgement
from rain_jax.logs import provenance, write_json
from rain_jax.types import Iteration

# What a radius and a distance are measured in.
UNIT = "pixels in [0, 1]"
INDEX, VERDICTS, IMAGES = "evaluation.json", "verdicts.npz", "adversarial.npy"
# Images are copied so many at a time.
_PART = 1024


def identity_in(folder: Path) -> str | None:
    """Which evaluation's record a folder holds (`Evaluation.fingerprint`), "" for one without it.

    None where there is none.
    """
    path = folder / INDEX
    try:
        found = json.loads(path.read_text())["identity"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # damaged, or of an older version: some evaluation's all the same
    return str(found)


def refuse_another(folder: Path, evaluation: Evaluation, remedy: str) -> None:
    """Raises `UsageError` where the folder holds the record of another evaluation."""
    if identity_in(folder) not in (None, evaluation.fingerprint):
        raise UsageError(f"{folder} holds the record of another evaluation: {remedy}")


def write(
    folder: Path, record: Mapping[str, Any], measured: EvaluationRun, *, save_images: bool = True
) -> None:
    """Writes all of it into a folder of its own, in the place of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"{title}/{field}": np.asarray(value)
        for title, column in {
            **measured.columns,
            **({} if measured.worst is None else {"worst case": measured.worst}),
            **measured.distances,
        }.items()
        for field, value in {
            **column.judgement._asdict(), "steps": column.steps, "queries": column.queries
        }.items()
    }  # fmt: skip
    arrays["broken_by"] = measured.broken_by
    arrays["broken_at"] = broken_at(measured)
    arrays["columns"] = np.array(list(measured.columns))
    path, index = folder / IMAGES, folder / INDEX
    # Whoever finds it may take the rest for granted, so it goes first and comes back last.
    index.unlink(missing_ok=True)
    if save_images:
        worst = measured.found
        # Right in every draw, a candidate proves nothing, unless others may draw otherwise.
        places = np.flatnonzero(worst.taken & ((worst.share < 1) | measured.random))
        arrays["adversarial/index"] = places.astype(np.int32)
        whole = (len(places), *worst.image.shape[1:])
        partial = path.with_suffix(".tmp")
        if len(places):
            copy = np.lib.format.open_memmap(partial, "w+", np.float32, whole)
            for start in range(0, len(places), _PART):
                copy[start : start + _PART] = worst.image[places[start : start + _PART]]
            copy.flush()
        else:
            with partial.open("wb") as file:
                np.save(file, np.zeros(whole, np.float32))
        partial.replace(path)
    else:
        path.unlink(missing_ok=True)
    with (partial := folder / "verdicts.tmp").open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(folder / VERDICTS)
    write_json(index, record)


def described(
    evaluation: Evaluation, measured: EvaluationRun, checks: Iterable[Any] | None = None
) -> dict[str, Any]:
    """What evaluation.json says of an evaluation and what it measured.

    `checks` are NamedTuples of a name, whether it passed and what was seen; None, that none were
    made.
    """
    robust = {title: counted(share) for title, share in measured.robust.items()}
    clean = measured.columns["clean"]
    threat, random = evaluation.threat, evaluation.model.random
    checks = None if checks is None else list(checks)
    return {
        "model": evaluation.name,
        "identity": evaluation.fingerprint,
        "images": len(clean.judgement.index),
        "data": evaluation.source.name,
        "data_hash": measured.digest,
        "threat": {
            "norm": norms.name_of(threat.norm),
            "unit": UNIT,
            "radius": float(threat.radius),
            "radius_in_255": 255 * float(threat.radius),
        },
        "clean": {
            **robust["clean"],
            **(_of_draws(clean.judgement) if random else {}),
            **_near(clean),
            **_cost(clean),
        },
        "attacks": {
            title: {
                **robust[title],
                **_figures(measured.columns[title]),
                "settings": _settings(column),
            }
            for title, column in evaluation.columns.items()
        },
        "cascade": measured.cascade,
        # The last column that is no check of another threat.
        "worst_case": {
            **[v for title, v in robust.items() if title not in measured.checks][-1],
            **(_of_draws(measured.worst.judgement) if random and measured.worst else {}),
            # On another kind of machine verdicts on the same images may differ for these.
            "near_boundary": near_boundary(measured),
        },
        "distances": {
            title: {
                **_curve(clean.judgement, column, float(threat.radius)),
                **_cost(column),
                "settings": _settings(evaluation.distances[title]),
            }
            for title, column in measured.distances.items()
        },
        "broken_by": _broken_by(measured),
        "checks": [check._asdict() for check in checks or ()],
        "flagged": None if checks is None else not all(check.passed for check in checks),
        "draws": evaluation.draws,
        "eight_bit": evaluation.eight_bit,
        "provenance": provenance(),
    }


def _settings(column: AttackColumn) -> dict[str, Any]:
    """What an attack declares of itself."""
    attack = column.attack
    if not isinstance(attack, Iteration):
        return {}
    return {"steps": attack.steps, "uses": attack.uses, "draws": attack.draws}


def broken_at(measured: EvaluationRun) -> np.ndarray:
    """How far from each image [N] lay what broke it first (`broken_by`); NaN where nothing did."""
    found = np.full(len(measured.broken_by), np.nan, np.float32)
    places = {int(index): n for n, index in enumerate(measured.columns["clean"].judgement.index)}
    for number, column in enumerate(measured.columns.values()):
        seen = column.judgement
        rows = np.array([places[int(index)] for index in seen.index], int)
        mine = measured.broken_by[rows] == number
        found[rows[mine]] = seen.distance[mine]
    return found


def _of_draws(judgement: Judgement) -> dict[str, float]:
    """Of a random model: how often its mean, and how often all of its draws, are right."""
    return {
        "accuracy_of_the_mean": float(np.mean(standing(judgement))),
        "accuracy_in_all_draws": float(np.mean((judgement.share == 1) | ~judgement.allowed)),
    }


def near_boundary(measured: EvaluationRun) -> int:
    """How many images were judged within rounding of the boundary, in a column that counts."""
    near = np.zeros(len(measured.columns["clean"].judgement.index), bool)
    columns = [c for title, c in measured.columns.items() if title not in measured.checks]
    if measured.worst is not None:
        columns.append(measured.worst)
    for column in columns:
        near[column.judgement.index[np.asarray(column.judgement.near_boundary)]] = True
    return int(np.sum(near))


def _near(column: ColumnResult) -> dict[str, int]:
    """How many of a column's verdicts are of images within rounding of the boundary."""
    return {"near_boundary": int(np.sum(column.judgement.near_boundary))}


def _figures(column: ColumnResult) -> dict[str, Any]:
    """An attack's own figures, over the images that it was given."""
    judgement = column.judgement
    if not len(judgement.index):
        return {"attacked": 0, **_cost(column)}
    found: dict[str, Any] = {
        "attacked": len(judgement.index),
        "outside_the_threat": int(np.sum(~judgement.allowed)),
        "largest_distance": float(np.max(judgement.distance)),
        "mean_margin": float(np.mean(judgement.margin)),
        **_of_draws(judgement),
        **_near(column),
        "mean_steps": float(np.mean(column.steps)),
        **_cost(column),
    }
    if np.any(column.queries >= 0):
        broken = column.queries[~standing(judgement)]
        found["queries"] = int(np.sum(column.queries))
        found["median_queries_where_broken"] = float(np.median(broken)) if len(broken) else None
    return found


def _cost(column: ColumnResult) -> dict[str, Any]:
    """What a column took: time, and passes of the model where they can be counted."""
    found: dict[str, Any] = {"seconds": column.seconds}
    if column.passes is not None:
        found["forward_passes"] = int(column.passes.forward)
        found["backward_passes"] = int(column.passes.backward)
    return found


def _broken_by(measured: EvaluationRun) -> dict[str, int]:
    """How many images fell to each column first, those that are wrong as they are to `clean`."""
    first = measured.broken_by
    return {
        name: int(np.sum(first == number))
        for number, name in enumerate(measured.columns)
        if name not in measured.checks
    }


def _curve(clean: Judgement, column: ColumnResult, radius: float) -> dict[str, Any]:
    """The accuracy at every radius, by one minimum-norm attack; and the median distance."""
    radii = np.linspace(0, 2 * radius, 33)
    judgement = column.judgement
    found = judgement.distance[~standing(judgement)]
    return {
        "attacked": len(judgement.index),
        "found": len(found),
        "median_distance_where_found": float(np.median(found)) if len(found) else None,
        "radius": radii.tolist(),
        "accuracy": curve(clean, judgement, radii).tolist(),
    }


def counted(right: np.ndarray) -> dict[str, Any]:
    """Flags or shares [N] as the record tells them, with Wilson's 95 % interval."""
    value = proportion(right)
    return {
        "right": value.hits,
        "of": value.total,
        "accuracy": value.value,
        "interval_95": list(value.interval),
    }
