"""Measures a trained model as its config's `evaluation` section says.

    python -m experiments.evaluate --workdir=runs/quickstart
    python -m experiments.evaluate --workdir=RUN --config.evaluation.attacks.pgd.steps=100

Without `--config` the run's own is read from the workdir. Results go to a folder of their own,
RUN/evaluations/NAME: evaluation.json (counts, intervals, settings, cost, provenance), verdicts.npz
(what the judge saw of each image), adversarial.npy (images that the model gets wrong), a table and
a figure. NAME says which attacks and how many images, unless `--name=NAME` is given; another
evaluation gets another one, and takes the place of an earlier one only with `--replace`. Killed and
started again, an evaluation goes on where it was; before a number is printed, what usually makes
such numbers wrong has been looked for.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments import report, sanity
from experiments.cli import NAME, REPLACE, run
from rain_jax import evaluation, norms
from rain_jax.audit import validity
from rain_jax.audit.ladder import RUN
from rain_jax.checkpoints import Checkpoints
from rain_jax.config import build
from rain_jax.evaluation import audit, probe, record
from rain_jax.logs import Progress
from rain_jax.parallel import initialise
from rain_jax.runs import cache, evaluations, step_programs, workdir
from rain_jax.runs.evaluating import evaluation_of
from rain_jax.runs.loading import check_finite, restore
from rain_jax.runs.model_info import model_info
from rain_jax.types import PyTree


def evaluate(
    experiment: build.Experiment,
    variables: PyTree,
    folder: Path,
    name: str,
    step: int,
    *,
    finish: bool = True,
) -> tuple[report.Row, report.Sample]:
    """Clean and attacked accuracy on the test images; leaves its record in `folder`, its own.

    Without `finish` the resume log stays, and the same evaluation again costs nothing.
    """
    planned = evaluation_of(experiment, variables, name, folder)
    return evaluate_planned(experiment, planned, step, finish=finish)


def evaluate_planned(
    experiment: build.Experiment,
    planned: evaluation.Evaluation,
    step: int,
    *,
    finish: bool = True,
) -> tuple[report.Row, report.Sample]:
    """The same, of an evaluation that `evaluation_of` has made, which has a folder."""
    name, folder = planned.name, planned.folder
    assert folder is not None
    check_finite(planned.model.variables, f"{folder} at step {step}")
    settings = experiment.evaluation
    for look in experiment.columns.values():
        if look.through is not None and look.through.startswith(RUN):
            # Its turn may come after hours.
            workdir.read_config(Path(look.through.removeprefix(RUN)))
    seen = None
    if experiment.ladder is not None:
        # It has checks of its own, but those look at numbers, and not at how they came about.
        sanity.refuse_mistakes(experiment.network, planned)
    elif settings.checks:
        with Progress(f"{name}: checks", 1, unit="set") as bar:
            sanity.refuse_mistakes(experiment.network, planned)
            seen = probe.look(planned)
            bar.advance(1)
    measured = planned()
    proven = None
    if experiment.ladder is not None:
        proven = validity.of_run(planned, experiment.ladder, measured)
    checks = None if seen is None else audit.checks(planned, measured, seen)
    if jax.process_index() == 0:
        content = described(experiment, planned, measured, step, checks)
        if proven is not None:
            content["ladder"] = proven.record()
            if not proven.valid:
                content["worst_case"] = None
        record.write(folder, content, measured, save_images=settings.save_images)
        if proven is not None:
            report.ladder_figure(folder / "ladder.png", content)
    if finish:
        planned.finish()
    clean = measured.columns["clean"].judgement
    sample = report.Sample(
        name,
        measured.clean,
        measured.adversarial,
        clean.label[: evaluation.SHOWN],
        clean.prediction[: evaluation.SHOWN],
        measured.adversarial_prediction,
    )
    apart = ("clean", *measured.checks)
    after = [title for title in measured.columns if title not in apart][1:]
    counts = {
        ("+ " if measured.cascade and not measured.random and title in after else "") + title:
        evaluation.proportion(share)
        for title, share in measured.robust.items()
    }  # fmt: skip
    notes = tuple(_distance(title, column) for title, column in measured.distances.items())
    if proven is not None:
        notes += (*proven.notes(), *_not_climbed(experiment))
        if not proven.valid:
            counts.pop("worst case", None)
    if near := record.near_boundary(measured):
        notes += (
            f"{near:,} of {len(clean.index):,} images were judged within rounding of the decision "
            "boundary: another kind of machine may judge these same images otherwise",
        )
    failed = [check for check in checks or () if not check.passed]
    notes += tuple(check.flag() for check in failed)
    if checks is None:
        notes += ("no checks were made (config.evaluation.checks=False)",)
    return report.Row(name, counts, notes, bool(failed)), sample


def described(
    experiment: build.Experiment,
    planned: evaluation.Evaluation,
    measured: evaluation.EvaluationRun,
    step: int,
    checks: Sequence[audit.Check] | None,
) -> dict[str, Any]:
    """The record, with what only an experiment knows: settings by their keys, step and seed."""
    settings = experiment.evaluation
    content = record.described(planned, measured, checks)
    for title, row in content["attacks"].items():
        row["settings"] = settings.attacks.get(title, settings.suite)
        row["through"] = experiment.columns[title].through
    for title, row in content["distances"].items():
        row["settings"] = settings.distances[title]
    return content | {
        "step": step,
        "seed": experiment.seed,
        "condition": settings.condition,
        "corruption": settings.corruption,
        "model_info": model_info(experiment, measured),
    }


def _not_climbed(experiment: build.Experiment) -> list[str]:
    """The rungs of the ladder that were left out, which a worst case knows nothing of."""
    budget = experiment.ladder
    assert budget is not None  # or there are no checks of it
    found = [f"not climbed: {name}" for name in budget.without]
    if budget.elsewhere is None:
        found.append(
            "not climbed: elsewhere, images made against a run of another seed "
            "(--config.evaluation.ladder.elsewhere=FOLDER)"
        )
    return found


def _distance(title: str, column: evaluation.ColumnResult) -> str:
    """What a minimum-norm attack found, in a line."""
    lost = ~evaluation.standing(column.judgement)
    found = f"{title} found a way to misclassify {np.sum(lost):,} of {len(lost):,} right images"
    # Where nothing was found the distance is unknown, and larger is the fair guess.
    distance = np.median(np.where(lost, column.judgement.distance, np.inf)) if len(lost) else np.inf
    return f"{found}; median distance {distance:.4g}" if np.isfinite(distance) else found


def side_by_side(
    runs: list[tuple[str, build.Experiment, Path]], name: str | None = None, replace: bool = False
) -> None:
    """Evaluates trained runs, prints their table, and writes it and the figure beside the first.

    `name` and `replace` are those of `evaluations.place`.
    """
    with contextlib.ExitStack() as alone_there:
        for _, _, folder in runs:
            alone_there.enter_context(workdir.held(folder))
        _side_by_side(runs, name, replace)


def _side_by_side(
    runs: list[tuple[str, build.Experiment, Path]], asked: str | None, replace: bool
) -> None:
    """The same, in folders that nobody else writes into."""
    pairs, plans = [], []
    for name, experiment, folder in runs:
        variables, step = restore(experiment, folder)
        planned = evaluation_of(experiment, variables, name)
        default = evaluations.name_of(experiment.evaluation, planned.source.size)
        planned.folder = evaluations.place(folder, planned, default, asked, replace)
        row, sample = evaluate_planned(experiment, planned, step, finish=False)
        notes = row.notes + _unfinished(experiment, folder, step)
        pairs.append((row._replace(notes=notes), sample))
        plans.append(planned)
    if jax.process_index() != 0:
        return
    rows, samples = [row for row, _ in pairs], [sample for _, sample in pairs]
    (_, experiment, folder), place = runs[0], plans[0].folder
    assert place is not None
    radius = float(experiment.threat.radius)
    text = report.results_table(rows)
    (place / "table.txt").write_text(text + "\n")
    names = experiment.splits.test.class_names
    report.figure(place / "examples.png", samples, radius, names)
    total = rows[0].columns["clean"].total
    others = [path.name for path in evaluations.all_of(folder) if path != place]
    print(
        f"\nPer cent right of {total:,} test images, 95 % intervals; "
        f"{norms.name_of(experiment.threat.norm)} radius {radius:.4g}\n\n{text}\n\n"
        f"{place} holds evaluation.json, table.txt, examples.png and what they are made of"
        + (f"; beside it {', '.join(others)}" if others else ""),
        flush=True,
    )
    # Only now: killed in the middle of the second run, the first is not measured again.
    for planned in plans:
        planned.finish()


def _unfinished(experiment: build.Experiment, folder: Path, step: int) -> tuple[str, ...]:
    """A line about a training that was stopped; none has begun where weights were adopted."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        latest = checkpoints.latest() or 0
    total = step_programs.plan_of(experiment).total
    if not 0 < latest < total:
        return ()
    return (f"training stopped at step {latest:,} of {total:,}; what is judged is step {step:,}",)


def main(
    config: ml_collections.ConfigDict,
    folder: Path,
    name: str | None = None,
    replace: bool = False,
) -> None:
    """Evaluates the run in `folder`, and its twin where it has one."""
    cache.enable()
    initialise()
    runs = [run for run in build.pair(config, folder) if run[2].is_dir()]
    workdir.check_writable(folder)
    side_by_side(runs, name, replace)


if __name__ == "__main__":
    run(main, workdir.read_config, options=(NAME, REPLACE))
