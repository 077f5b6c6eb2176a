"""What a classifier feels of each frequency: the statistics that NN-JPEG's tables are made of.

    python -m experiments.analyse --workdir=runs/cifar10_natural

Looks at training images and at what PGD-10 does to them, within the threat of the run. Writes
statistics.npz, which `config.defence.statistics` of a defence names, and statistics.png into the
run's folder. Who names the file has a copy of it in its own run's folder from then on.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from experiments.cli import run
from rain_jax import attacks, data
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.defences import tables
from rain_jax.logs import Progress
from rain_jax.parallel import initialise, round_up
from rain_jax.runs import cache, evaluating, loading, workdir
from rain_jax.types import AxisName, Batch, Key, PyTree

# Training images, at most: their blocks are many, and steps of tables are whole numbers.
IMAGES = 2000
LEVEL = 30.0  # of the tables in the figure


def analyse(experiment: build.Experiment, variables: PyTree) -> tables.Statistics:
    """Statistics over the first training images, on all devices."""
    devices = experiment.parallel.placed()
    threat = experiment.threat
    attack = attacks.pgd(threat, steps=10, step_size=threat.radius / 4)
    of = logits_fn_of(experiment.network)

    def body(
        variables: PyTree, key: Key, batch: Batch, axis_name: AxisName = None
    ) -> tables.Moments:
        return tables.moments(key, of(variables), attack, batch, axis_name)

    program = devices.map(body, inputs=(False, False, True), outputs=False)
    placed, key = devices.replicate((variables, evaluating.evaluation_key(experiment.seed)))
    source = data.first(experiment.splits.train, min(IMAGES, experiment.splits.train.size))
    size = round_up(experiment.evaluation.batch_size, devices.size)

    def parts() -> Iterator[tables.Moments]:
        with Progress("analysis", source.size, unit="img") as bar:
            for batch in data.evaluation_batches(source, size):
                yield jax.device_get(program(placed, key, devices.split(batch)))
                bar.advance(int(np.sum(batch.valid)))

    return tables.statistics(parts())


def figure(path: Path, found: tables.Statistics) -> None:
    """Draws the statistics and the table of each kind, horizontal frequency to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    made = {kind: tables.tables(kind, LEVEL, found)[0] for kind in ("nn", "deepn", "fd")}
    pictures = {
        "clean: log10 deviation": np.log10(found.clean[0] + 1e-6),
        "perturbation: deviation": found.noise[0],
        "slope: log10 mean": np.log10(found.slope[0] + 1e-12),
        **{f"{kind}, level {LEVEL:g}": np.asarray(table) for kind, table in made.items()},
    }
    for ax, (title, picture) in zip(axes.flat, pictures.items(), strict=True):
        shown = ax.imshow(picture)
        ax.set_title(title, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        drawn.colorbar(shown, ax=ax, shrink=0.8)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Analyses the run in `folder`."""
    cache.enable()
    initialise()
    experiment = build.experiment(config)
    if experiment.config["defence"] is not None:
        raise UsageError("config.defence: expected None: the statistics are of a bare classifier")
    workdir.check_writable(folder)
    with workdir.held(folder):
        variables, _ = loading.restore(experiment, folder)
        found = analyse(experiment, variables)
        if jax.process_index() == 0:
            np.savez(folder / "statistics.npz", **found._asdict())
            figure(folder / "statistics.png", found)
            print(f"{folder / 'statistics.npz'} and .png hold the statistics", flush=True)


if __name__ == "__main__":
    run(main, workdir.read_config)
