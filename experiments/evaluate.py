"""Measures a trained model as its config's `evaluation` section says.

    python -m experiments.evaluate --workdir=runs/quickstart
    python -m experiments.evaluate --workdir=RUN --config.evaluation.attacks.pgd.steps=100

Without `--config` the run's own is read from the workdir. Results go to evaluation.json (counts,
intervals, settings, provenance) and verdicts.npz (what the judge saw of each image).
"""

import math
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import build, cache, defended, looks, proof, report, workdir
from experiments.cli import run
from experiments.defended import logits_fn_of
from experiments.logs import Progress, provenance, write_json
from rain_jax import data, evaluation, norms, training
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.parallel import Devices, choose_devices, initialise, place, round_up
from rain_jax.types import Batch, Key, Network, PyTree

# Images in the figure.
SHOWN = 10


def evaluation_key(seed: int) -> Key:
    """The root of all draws in an evaluation; training draws nothing from it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def _counted(right: np.ndarray) -> dict[str, Any]:
    value = evaluation.proportion(right)
    return {
        "right": value.hits,
        "of": value.total,
        "accuracy": value.value,
        "interval_95": list(value.interval),
    }


def check_finite(variables: PyTree, where: str) -> None:
    """Refuses weights that are not numbers, naming the first such array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
            raise UsageError(
                f"{where}: weights {jax.tree_util.keystr(path)} hold values that are not finite"
            )


class Column(NamedTuple):
    """What one attack did: verdicts on the images that it was given."""

    judgement: evaluation.Judgement
    steps: np.ndarray  # int32 [N]
    queries: np.ndarray  # int32 [N], -1 for attacks that do not count them
    seconds: float


class Measured(NamedTuple):
    """What was seen of one model, by column: `clean`, then the attacks."""

    columns: dict[str, Column]
    random: bool  # whether verdicts are over several draws
    checks: tuple[str, ...]  # columns of another threat, that are no part of the worst case
    # Of a random model under several attacks: each image's worst one, judged again. Chosen and
    # judged by the same draws, the unluckiest of many would look like the strongest.
    worst: Column | None
    cascade: bool
    distances: dict[str, Column]  # of minimum-norm attacks, without a radius
    # The first few images with what came last to each of them, for the figure.
    clean: np.ndarray
    adversarial: np.ndarray
    adversarial_prediction: np.ndarray

    @property
    def stands(self) -> dict[str, np.ndarray]:
        """How right the model is about each image [N] in each column, and in the worst case.

        That is whether it is, and of a random model the share of the draws. In a cascade it is
        under this column and all before it.
        """
        clean = self.columns["clean"].judgement
        counted = evaluation.shares if self.random else evaluation.worst_case
        found = {"clean": counted(clean, [])}
        before: list[evaluation.Judgement] = []
        for name, column in self.columns.items():
            if name in self.checks:
                found[name] = counted(clean, [column.judgement])
            elif name != "clean":
                before.append(column.judgement)
                found[name] = counted(clean, before if self.cascade else before[-1:])
        if self.worst is not None:
            found["worst case"] = counted(clean, [self.worst.judgement])
        elif len(before) > 1 and not self.cascade:
            found["worst case"] = counted(clean, before)
        return found


def measure(experiment: build.Experiment, variables: PyTree, name: str) -> Measured:
    """Attacks and judges the test images, column by column."""
    settings = experiment.evaluation
    devices = place(experiment.parallel.mapping, choose_devices(experiment.parallel.devices))
    batch_size = round_up(settings.batch_size, devices.size)
    source = data.first(experiment.splits.test, settings.images)
    model = logits_fn_of(experiment.network)
    draws = settings.draws or 1
    rules = evaluation.Rules(experiment.threat, draws, settings.eight_bit)
    boundless = rules._replace(threat=experiment.threat._replace(radius=math.inf))
    variables = devices.replicate(variables)
    cascade = settings.suite is not None if settings.cascade is None else settings.cascade

    def column(
        title: str, look: looks.Look, rules: evaluation.Rules, early: bool, given: np.ndarray
    ) -> Iterator[evaluation.Verdicts]:
        batches = _only(given, data.evaluation_batches(source, batch_size))
        network, weights = climbed(look.through)
        # Of a random model the worst mean is wanted, not the first one that is bad enough; and of
        # another form of the model the judge may think otherwise.
        early = early and draws == 1 and look.through is None
        drive = evaluation.packed(
            look.attack, logits_fn_of(network), devices, batch_size=batch_size, early=early
        )
        if look.threat is not None:
            rules = rules._replace(threat=look.threat)
        return judged(title, rules, drive(weights, key_of(title), batches))

    def climbed(through: str | None) -> tuple[Network, PyTree]:
        if through is None:
            return experiment.network, variables
        if not through.startswith(defended.RUN):
            return experiment.assembly.through(through), variables
        folder = Path(through.removeprefix(defended.RUN))
        other = build.experiment(workdir.read_config(folder))
        return other.network, devices.replicate(load(other, folder)[0])

    def unharmed() -> Iterator[evaluation.Found]:
        return evaluation.as_they_are(data.evaluation_batches(source, batch_size))

    def key_of(title: str) -> Key:
        # Each attack's draws are its own, whichever others stand beside it in the config.
        return jax.random.fold_in(evaluation_key(experiment.seed), zlib.crc32(title.encode()))

    def judged(
        title: str, rules: evaluation.Rules, found: Iterable[evaluation.Found]
    ) -> Iterator[evaluation.Verdicts]:
        judge = evaluation.judging(model, rules, devices, batch_size=batch_size)
        return judge(variables, key_of(title), found)

    def seen(
        title: str, verdicts: Iterator[evaluation.Verdicts], total: int, worst: _Worst | None = None
    ) -> Column:
        began = time.monotonic()
        parts: list[tuple[evaluation.Judgement, np.ndarray, np.ndarray]] = []
        with Progress(f"{name}: {title}", total, unit="img") as bar:
            for some in verdicts:
                parts.append((some.judgement, some.steps, some.queries))
                bar.advance(len(some.steps))
                if worst is not None:
                    worst.offer(some)
                for row, index in enumerate(some.judgement.index):
                    if index < SHOWN:
                        shown[index] = some.image[row]
                        predicted[index] = some.judgement.prediction[row]
        if not parts:  # nobody was left to attack
            return Column(evaluation.nobody(), np.zeros(0, np.int32), np.zeros(0, np.int32), 0.0)
        order = np.argsort(np.concatenate([judgement.index for judgement, _, _ in parts]))
        joined = evaluation.join([judgement for judgement, _, _ in parts])
        steps, queries = (np.concatenate([part[i] for part in parts])[order] for i in (1, 2))
        return Column(joined, steps, queries, time.monotonic() - began)

    count = min(SHOWN, source.size)
    shown = np.zeros((count, *source.shape), np.float32)
    predicted = np.zeros(count, np.int32)
    everyone = np.ones(source.size, bool)
    counted = [title for title, look in experiment.looks.items() if look.threat is None]
    again = draws > 1 and len(counted) > 1
    worst = _Worst(source.size, source.shape) if again else None
    columns = {"clean": seen("clean", judged("clean", rules, unharmed()), source.size, worst)}
    clean = shown.copy()
    right = standing = np.asarray(columns["clean"].judgement.right)
    for title, look in experiment.looks.items():
        counts = title in counted
        given = standing if cascade and counts else everyone
        found = column(title, look, rules, True, given)
        columns[title] = seen(title, found, int(np.sum(given)), worst if counts else None)
        if counts:
            standing = standing & evaluation.worst_case(
                columns["clean"].judgement, [columns[title].judgement]
            )
    last = None
    if worst is not None:
        candidates = worst.found(data.evaluation_batches(source, batch_size))
        last = seen("worst case", judged("worst case", rules, candidates), source.size)
    adversarial, prediction = shown.copy(), predicted.copy()
    distances = {
        title: seen(
            title, column(title, looks.Look(attack), boundless, False, right), int(np.sum(right))
        )
        for title, attack in experiment.distances.items()
    }
    checks = tuple(title for title in experiment.looks if title not in counted)
    return Measured(
        columns, draws > 1, checks, last, cascade, distances, clean, adversarial, prediction
    )


class _Worst:
    """Of every image the candidate that the model is least often right about."""

    def __init__(self, size: int, shape: tuple[int, ...]):
        self.image = np.zeros((size, *shape), np.float32)
        self.share = np.full(size, np.inf, np.float32)
        self.margin = np.full(size, -np.inf, np.float32)

    def offer(self, some: evaluation.Verdicts) -> None:
        seen = some.judgement
        place = seen.index
        # Of candidates that are wrong as often, the one by the larger margin.
        nearer = (seen.share == self.share[place]) & (seen.margin > self.margin[place])
        taken = seen.allowed & ((seen.share < self.share[place]) | nearer)
        self.image[place[taken]] = some.image[taken]
        self.share[place[taken]] = seen.share[taken]
        self.margin[place[taken]] = seen.margin[taken]

    def found(self, batches: Iterable[Batch]) -> Iterator[evaluation.Found]:
        for given in evaluation.as_they_are(batches):
            yield given._replace(image=self.image[given.batch.index])


def _only(given: np.ndarray, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches with other images than the `given` ones, bool [N], marked as padding."""
    for batch in batches:
        wanted = given[np.minimum(batch.index, len(given) - 1)]
        yield batch._replace(valid=np.asarray(batch.valid) & wanted)


def described(
    experiment: build.Experiment, measured: Measured, name: str, step: int
) -> dict[str, Any]:
    """What evaluation.json says."""
    stands = {title: _counted(share) for title, share in measured.stands.items()}
    clean = measured.columns["clean"]
    radius = float(experiment.threat.radius)
    attacks = experiment.evaluation.attacks
    return {
        "model": name,
        "step": step,
        "seed": experiment.seed,
        "images": len(clean.judgement.index),
        "data": experiment.splits.test.name,
        "threat": {
            "norm": norms.name_of(experiment.threat.norm),
            "radius": radius,
            "radius_in_255": 255 * radius,
        },
        "clean": {**stands["clean"], "seconds": clean.seconds},
        "attacks": {
            title: {
                **stands[title],
                **_told(column),
                "settings": attacks.get(title, experiment.evaluation.suite),
                "through": experiment.looks[title].through,
            }
            for title, column in measured.columns.items()
            if title != "clean"
        },
        "cascade": measured.cascade,
        # The last column that is no check of another threat.
        "worst_case": [v for title, v in stands.items() if title not in measured.checks][-1],
        "distances": {
            title: {
                **_curve(clean.judgement, column, radius),
                "seconds": column.seconds,
                "settings": experiment.evaluation.distances[title],
            }
            for title, column in measured.distances.items()
        },
        "draws": experiment.evaluation.draws,
        "eight_bit": experiment.evaluation.eight_bit,
        "provenance": provenance(),
    }


def _told(column: Column) -> dict[str, Any]:
    """An attack's own figures, over the images that it was given."""
    judgement = column.judgement
    if not len(judgement.index):
        return {"attacked": 0, "seconds": column.seconds}
    told: dict[str, Any] = {
        "attacked": len(judgement.index),
        "outside_the_threat": int(np.sum(~judgement.allowed)),
        "largest_distance": float(np.max(judgement.distance)),
        "mean_margin": float(np.mean(judgement.margin)),
        "accuracy_of_the_mean": float(np.mean(evaluation.standing(judgement))),
        "accuracy_in_all_draws": float(np.mean((judgement.share == 1) | ~judgement.allowed)),
        "mean_steps": float(np.mean(column.steps)),
        "seconds": column.seconds,
    }
    if np.any(column.queries >= 0):
        broken = column.queries[~evaluation.standing(judgement)]
        told["queries"] = int(np.sum(column.queries))
        told["median_queries_where_broken"] = float(np.median(broken)) if len(broken) else None
    return told


def _curve(clean: evaluation.Judgement, column: Column, radius: float) -> dict[str, Any]:
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


def evaluate(
    experiment: build.Experiment, variables: PyTree, folder: Path, name: str, step: int
) -> tuple[report.Row, report.Sample]:
    """Clean and attacked accuracy on the test images; writes evaluation.json and verdicts.npz."""
    check_finite(variables, f"{folder} at step {step}")
    measured = measure(experiment, variables, name)
    proven = proven_of(experiment, measured, variables, name)
    if jax.process_index() == 0:
        record = described(experiment, measured, name, step)
        if proven is not None:
            record["ladder"] = proven.told()
            if not proven.valid:
                record["worst_case"] = None
        write_json(folder / "evaluation.json", record)
        if proven is not None:
            report.ladder_figure(folder / "ladder.png", record)
        verdicts: dict[str, Any] = {
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
        np.savez_compressed(folder / "verdicts.npz", **verdicts)
    clean = measured.columns["clean"].judgement
    sample = report.Sample(
        name,
        measured.clean,
        measured.adversarial,
        clean.label[:SHOWN],
        clean.prediction[:SHOWN],
        measured.adversarial_prediction,
    )
    first = next(iter(experiment.looks), None)
    counts = {
        ("+ " if measured.cascade and title not in ("clean", first) else "") + title:
        evaluation.proportion(share)
        for title, share in measured.stands.items()
    }  # fmt: skip
    notes = tuple(_distance(title, column) for title, column in measured.distances.items())
    if proven is not None:
        notes += proven.notes()
        if not proven.valid:
            counts.pop("worst case", None)
    return report.Row(name, counts, notes), sample


def proven_of(
    experiment: build.Experiment, measured: Measured, variables: PyTree, name: str
) -> proof.Proof | None:
    """What the checks say of an evaluation that climbs the ladder; None of others."""
    budget = experiment.ladder
    if budget is None:
        return None
    devices = place(experiment.parallel.mapping, choose_devices(experiment.parallel.devices))
    key = jax.random.fold_in(evaluation_key(experiment.seed), zlib.crc32(b"proof"))
    with Progress(f"{name}: checks", 1, unit="set") as bar:
        seen, lines = proof.looked_into(
            experiment, budget, devices.replicate(variables), key, devices
        )
        bar.advance(1)
    accuracy = {title: float(np.mean(share)) for title, share in measured.stands.items()}
    margins = {
        title: float(np.mean(column.judgement.margin)) for title, column in measured.columns.items()
    }
    images = len(measured.columns["clean"].judgement.index)
    return proof.Proof(proof.checks(accuracy, margins, images, seen, lines), lines)


def _distance(title: str, column: Column) -> str:
    """What a minimum-norm attack found, in a line."""
    lost = ~evaluation.standing(column.judgement)
    found = f"{title} found a way to misclassify {np.sum(lost):,} of {len(lost):,} right images"
    # Where nothing was found the distance is unknown, and larger is the fair guess.
    distance = np.median(np.where(lost, column.judgement.distance, np.inf)) if len(lost) else np.inf
    return f"{found}; median distance {distance:.4g}" if np.isfinite(distance) else found


def side_by_side(runs: list[tuple[str, build.Experiment, Path]]) -> None:
    """Evaluates trained runs, prints their table, and writes it and the figure into the first."""
    pairs = []
    for name, experiment, folder in runs:
        variables, step = load(experiment, folder)
        pairs.append(evaluate(experiment, variables, folder, name, step))
    if jax.process_index() != 0:
        return
    rows, samples = [row for row, _ in pairs], [sample for _, sample in pairs]
    _, experiment, folder = runs[0]
    radius = float(experiment.threat.radius)
    text = report.results_table(rows)
    (folder / "table.txt").write_text(text + "\n")
    names = experiment.splits.test.class_names
    report.figure(folder / "examples.png", samples, radius, names)
    total = rows[0].columns["clean"].total
    print(
        f"\nPer cent right of {total:,} test images, 95 % intervals; "
        f"{norms.name_of(experiment.threat.norm)} radius {radius:.4g}\n\n{text}\n\n"
        f"{folder} holds evaluation.json, table.txt, examples.png and the rest of the run",
        flush=True,
    )


def load(experiment: build.Experiment, folder: Path) -> tuple[PyTree, int]:
    """The variables of a run's best (or last) checkpoint, and its step."""
    devices = place(experiment.parallel.mapping, choose_devices(experiment.parallel.devices))
    images = jax.ShapeDtypeStruct((1, *experiment.splits.train.shape), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    like = jax.eval_shape(experiment.network.init, key, images)
    average = bool(experiment.config.get("average"))
    return load_like(folder, like, devices, average, experiment.evaluation.checkpoint)


def load_like(
    folder: Path,
    variables: PyTree,
    devices: Devices,
    average: bool,
    which: Literal["best", "latest"] = "best",
) -> tuple[PyTree, int]:
    """The same of any run, whose variables have the shapes of `variables`.

    `average` says whether the run kept an average of its weights, which is then what is meant.
    """
    params = variables["params"]
    like = {"params": params, "model_state": {k: v for k, v in variables.items() if k != "params"}}
    if average:
        like["average"] = params
    sharding = jax.sharding.NamedSharding(devices.mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step, model = checkpoints.restore_model(like, which)
    return training.variables_of(devices.to_local(model)), step


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Evaluates the run in `folder`, and its twin where it has one."""
    cache.enable()
    initialise()
    runs = [run for run in build.pair(config, folder) if run[2].is_dir()]
    workdir.check_writable(folder)
    side_by_side(runs)


if __name__ == "__main__":
    run(main, workdir.read_config)
