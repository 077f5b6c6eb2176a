"""Measures a trained model as its config's `evaluation` section says.

    python -m experiments.evaluate --workdir=runs/quickstart
    python -m experiments.evaluate --workdir=RUN --config.evaluation.attacks.pgd.steps=100

Without `--config` the run's own is read from the workdir. Results go to evaluation.json (counts,
intervals, settings, provenance) and verdicts.npz (what the judge saw of each image).
"""

import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import build, cache, report, workdir
from experiments.cli import run
from experiments.logs import Progress, provenance, write_json
from rain_jax import data, evaluation, norms, training
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.parallel import choose_devices, initialise, place, round_up
from rain_jax.types import Array, Key, LogitsFn, Network, PyTree, Variables

# Images in the figure.
SHOWN = 10


def logits_fn_of(network: Network) -> evaluation.LogitsFnOf:
    """The network in evaluation mode as a function of its variables, one image at a time."""

    def of(variables: Variables) -> LogitsFn:
        def logits_fn(key: Key, image: Array) -> Array:
            return network.apply(variables, image[None], train=False)[0][0]

        return logits_fn

    return of


def evaluation_key(seed: int) -> Key:
    """The root of all draws in an evaluation; training draws nothing from it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def _counted(flags: np.ndarray) -> dict[str, Any]:
    value = evaluation.proportion(flags)
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


class Measured(NamedTuple):
    """What was seen of one model, by column: `clean`, then the attacks."""

    judgements: dict[str, evaluation.Judgement]
    images: dict[str, np.ndarray]  # the first few of each column
    seconds: dict[str, float]

    @property
    def stands(self) -> dict[str, np.ndarray]:
        """Which images [N] are right under each column, and in the worst case of several."""
        clean, *attacked = self.judgements.values()
        names = list(self.judgements)[1:]
        found = {"clean": np.asarray(clean.right)}
        found |= {
            n: evaluation.worst_case(clean, [j]) for n, j in zip(names, attacked, strict=True)
        }
        if len(attacked) > 1:
            found["worst case"] = evaluation.worst_case(clean, attacked)
        return found


def measure(experiment: build.Experiment, variables: PyTree, name: str) -> Measured:
    """Attacks and judges the test images, column by column."""
    settings = experiment.evaluation
    devices = place(experiment.parallel.mapping, choose_devices(experiment.parallel.devices))
    batch_size = round_up(settings.batch_size, devices.size)
    source = data.first(experiment.splits.test, settings.images)
    programs = evaluation.evaluator(
        logits_fn_of(experiment.network),
        experiment.threat,
        experiment.attacks,
        devices,
        draws=settings.draws,
    )
    variables = devices.replicate(variables)
    measured = Measured({}, {}, {})
    for column, program in {"clean": programs.clean, **programs.attacks}.items():
        # Each attack's draws are its own, whichever others stand beside it in the config.
        key = jax.random.fold_in(evaluation_key(experiment.seed), zlib.crc32(column.encode()))
        began = time.monotonic()
        parts: list[evaluation.Judgement] = []
        with Progress(f"{name}: {column}", source.size, unit="img") as bar:
            batches = data.evaluation_batches(source, batch_size)
            for judgement, images in evaluation.run(program, devices, variables, key, batches):
                before = measured.images.get(column, images[:0])
                if len(before) < SHOWN:  # the first batch may be smaller
                    measured.images[column] = np.concatenate([before, images])[:SHOWN]
                parts.append(judgement)
                bar.advance(len(judgement.index))
        measured.judgements[column] = evaluation.join(parts)
        measured.seconds[column] = time.monotonic() - began
    return measured


def described(
    experiment: build.Experiment, measured: Measured, name: str, step: int
) -> dict[str, Any]:
    """What evaluation.json says."""
    stands = {column: _counted(flags) for column, flags in measured.stands.items()}
    attacked = {c: j for c, j in measured.judgements.items() if c != "clean"}
    radius = float(experiment.threat.radius)
    return {
        "model": name,
        "step": step,
        "seed": experiment.seed,
        "images": len(measured.judgements["clean"].index),
        "data": experiment.splits.test.name,
        "threat": {
            "norm": norm_name(experiment),
            "radius": radius,
            "radius_in_255": 255 * radius,
        },
        "clean": {**stands["clean"], "seconds": measured.seconds["clean"]},
        "attacks": {
            column: {
                **stands[column],
                "outside_the_threat": int(np.sum(~judgement.allowed)),
                "largest_distance": float(np.max(judgement.distance)),
                "mean_margin": float(np.mean(judgement.margin)),
                "seconds": measured.seconds[column],
                "settings": experiment.evaluation.attacks[column],
            }
            for column, judgement in attacked.items()
        },
        "worst_case": list(stands.values())[-1],
        "draws": experiment.evaluation.draws,
        "provenance": provenance(),
    }


def evaluate(
    experiment: build.Experiment, variables: PyTree, folder: Path, name: str, step: int
) -> tuple[report.Row, report.Sample]:
    """Clean and attacked accuracy on the test images; writes evaluation.json and verdicts.npz."""
    check_finite(variables, f"{folder} at step {step}")
    measured = measure(experiment, variables, name)
    if jax.process_index() == 0:
        write_json(folder / "evaluation.json", described(experiment, measured, name, step))
        verdicts: dict[str, Any] = {
            f"{column}/{field}": np.asarray(value)
            for column, judgement in measured.judgements.items()
            for field, value in judgement._asdict().items()
        }
        np.savez_compressed(folder / "verdicts.npz", **verdicts)
    clean, last = measured.judgements["clean"], list(measured.judgements)[-1]
    sample = report.Sample(
        name,
        measured.images["clean"],
        measured.images[last],
        clean.label[:SHOWN],
        clean.prediction[:SHOWN],
        measured.judgements[last].prediction[:SHOWN],
    )
    counts = {column: evaluation.proportion(flags) for column, flags in measured.stands.items()}
    return report.Row(name, counts), sample


def norm_name(experiment: build.Experiment) -> str:
    """The name of the threat's norm."""
    return next(n for n in norms.__all__ if getattr(norms, n) is experiment.threat.norm)


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
        f"{norm_name(experiment)} radius {radius:.4g}\n\n{text}\n\n"
        f"{folder} holds evaluation.json, table.txt, examples.png and the rest of the run",
        flush=True,
    )


def load(experiment: build.Experiment, folder: Path) -> tuple[PyTree, int]:
    """The variables of a run's best (or last) checkpoint, and its step."""
    devices = place(experiment.parallel.mapping, choose_devices(experiment.parallel.devices))
    images = jax.ShapeDtypeStruct((1, *experiment.splits.train.shape), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(experiment.network.init, key, images)
    params = variables["params"]
    like = {"params": params, "model_state": {k: v for k, v in variables.items() if k != "params"}}
    if experiment.config.get("average"):
        like["average"] = params
    sharding = jax.sharding.NamedSharding(devices.mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step, model = checkpoints.restore_model(like, experiment.evaluation.checkpoint)
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
