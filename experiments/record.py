"""What is left of an evaluation: evaluation.json, verdicts.npz and the adversarial images.

evaluation.json is for people and programs: counts with intervals, settings, cost, provenance.
verdicts.npz has a column of numbers for each thing known of each image. adversarial.npy has the
images that broke the model, from which `experiments.recount` can tell the worst case again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import build
from experiments.proof import Check
from experiments.schema import filled_member
from rain_jax import evaluation, norms
from rain_jax.attacks import suites
from rain_jax.evaluation import ColumnResult, EvaluationRun
from rain_jax.logs import provenance, write_json

# What a radius and a distance are measured in.
UNIT = "pixels in [0, 1]"
# Images are copied so many at a time.
_PART = 1024


def write(
    folder: Path, record: dict[str, Any], measured: EvaluationRun, *, save_images: bool
) -> None:
    """Writes all of it into the run's folder."""
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
    path, index = folder / "adversarial.npy", folder / "evaluation.json"
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
    partial.replace(folder / "verdicts.npz")
    write_json(index, record)


def described(
    experiment: build.Experiment,
    measured: EvaluationRun,
    name: str,
    step: int,
    checks: Sequence[Check] | None,
) -> dict[str, Any]:
    """What evaluation.json says; of `checks` None, that none were made."""
    robust = {title: counted(share) for title, share in measured.robust.items()}
    clean = measured.columns["clean"]
    radius = float(experiment.threat.radius)
    attacks = experiment.evaluation.attacks
    return {
        "model": name,
        "step": step,
        "seed": experiment.seed,
        "images": len(clean.judgement.index),
        "data": experiment.splits.test.name,
        "data_hash": measured.digest,
        "threat": {
            "norm": norms.name_of(experiment.threat.norm),
            "unit": UNIT,
            "radius": radius,
            "radius_in_255": 255 * radius,
        },
        "clean": {
            **robust["clean"],
            **_over_draws(experiment, clean),
            **_near(clean),
            **_cost(clean),
        },
        "attacks": {
            title: {
                **robust[title],
                **_told(column),
                "settings": attacks.get(title, experiment.evaluation.suite),
                "through": experiment.looks[title].through,
            }
            for title, column in measured.columns.items()
            if title != "clean"
        },
        "cascade": measured.cascade,
        # The last column that is no check of another threat.
        "worst_case": {
            **[v for title, v in robust.items() if title not in measured.checks][-1],
            **_over_draws(experiment, measured.worst),
            # On another kind of machine verdicts on the same images may differ for these.
            "near_boundary": near_boundary(measured),
        },
        "distances": {
            title: {
                **_curve(clean.judgement, column, radius),
                **_cost(column),
                "settings": experiment.evaluation.distances[title],
            }
            for title, column in measured.distances.items()
        },
        "broken_by": _broken_by(measured),
        "checks": [check._asdict() for check in checks or ()],
        "flagged": None if checks is None else not all(check.passed for check in checks),
        "draws": experiment.evaluation.draws,
        "eight_bit": experiment.evaluation.eight_bit,
        "condition": experiment.evaluation.condition,
        "corruption": experiment.evaluation.corruption,
        "model_info": model_info(experiment, measured),
        "provenance": provenance(),
    }


def model_info(experiment: build.Experiment, measured: EvaluationRun) -> dict[str, Any]:
    """The fields of RobustBench's `ModelInfo`, accuracies in per cent; None where only people know.

    `autoattack_acc` is there where all of AutoAttack ran, at its own budgets, and nothing beside
    it: on how many images says the record. Common corruptions are another command's.
    """
    spec = experiment.config
    evaluated = experiment.evaluation
    suite = "rand" if experiment.network.random else "standard"
    whole = evaluated.suite == filled_member(suites, {"name": suite}) and not evaluated.attacks
    accuracy = {title: 100 * float(np.mean(share)) for title, share in measured.robust.items()}
    return {
        **dict.fromkeys(("link", "name", "authors", "venue", "reported", "footnote")),
        "additional_data": spec["data"]["extra"] is not None,
        # Of one answer: a member of an ensemble is a pass of its own.
        "number_forward_passes": max(1, len(experiment.assembly.members)),
        "dataset": experiment.splits.test.name.removeprefix("tfds:"),
        "architecture": spec["network"]["name"],
        "eps": float(experiment.threat.radius),
        "clean_acc": accuracy["clean"],
        "corruptions_acc": None,
        "autoattack_acc": list(accuracy.values())[-1] if whole else None,
    }


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


def _over_draws(experiment: build.Experiment, column: ColumnResult | None) -> dict[str, float]:
    """Of a random model: how often its mean, and how often all of its draws, are right."""
    if not experiment.network.random or column is None:
        return {}
    return _of_draws(column.judgement)


def _of_draws(judgement: evaluation.Judgement) -> dict[str, float]:
    return {
        "accuracy_of_the_mean": float(np.mean(evaluation.standing(judgement))),
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


def _told(column: ColumnResult) -> dict[str, Any]:
    """An attack's own figures, over the images that it was given."""
    judgement = column.judgement
    if not len(judgement.index):
        return {"attacked": 0, **_cost(column)}
    told: dict[str, Any] = {
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
        broken = column.queries[~evaluation.standing(judgement)]
        told["queries"] = int(np.sum(column.queries))
        told["median_queries_where_broken"] = float(np.median(broken)) if len(broken) else None
    return told


def _cost(column: ColumnResult) -> dict[str, Any]:
    """What a column took: time, and passes of the model where they can be counted."""
    told: dict[str, Any] = {"seconds": column.seconds}
    if column.passes is not None:
        told["forward_passes"] = int(column.passes.forward)
        told["backward_passes"] = int(column.passes.backward)
    return told


def _broken_by(measured: EvaluationRun) -> dict[str, int]:
    """How many images fell to each column first, those that are wrong as they are to `clean`."""
    first = measured.broken_by
    return {
        name: int(np.sum(first == number))
        for number, name in enumerate(measured.columns)
        if name not in measured.checks
    }


def _curve(clean: evaluation.Judgement, column: ColumnResult, radius: float) -> dict[str, Any]:
    """The accuracy at every radius, by one minimum-norm attack; and the median distance."""
    radii = np.linspace(0, 2 * radius, 33)
    judgement = column.judgement
    found = judgement.distance[~evaluation.standing(judgement)]
    return {
        "attacked": len(judgement.index),
        "found": len(found),
        "median_distance_where_found": float(np.median(found)) if len(found) else None,
        "radius": radii.tolist(),
        "accuracy": evaluation.curve(clean, judgement, radii).tolist(),
    }


def counted(right: np.ndarray) -> dict[str, Any]:
    """Flags or shares [N] as the record tells them, with Wilson's 95 % interval."""
    value = evaluation.proportion(right)
    return {
        "right": value.hits,
        "of": value.total,
        "accuracy": value.value,
        "interval_95": list(value.interval),
    }
