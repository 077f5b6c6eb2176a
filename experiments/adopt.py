"""Makes a run of published weights, so that all that works on runs works on them.

    python -m experiments.adopt --config=CONFIG --workdir=RUN --config.start.classifier=FILE.pt

The network, the data and the evaluation are the config's; the weights, those of `config.start`: a
`.pt`, `.pth` or `.npz` with a state dictionary in one of the layouts that
`rain_jax.models.imports.resnet_from_torch` knows, or another run. What does not fit is refused by
name. They become the checkpoint of step 0, after which experiments.evaluate measures them, and
experiments.train goes on training.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections

from experiments.cli import run
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.parallel import initialise
from rain_jax.runs import cache, initial_weights, loading, workdir
from rain_jax.runs.session import items_of, no_sums
from rain_jax.runs.step_programs import keys_of, plan_of


def adopt(experiment: build.Experiment, folder: Path) -> None:
    """Writes the folder of a run that begins, and so far ends, with the weights of its start."""
    given = experiment.start.classifier
    if given is None:
        raise UsageError("config.start.classifier=None: expected a file of weights, or a run")
    devices = experiment.parallel.placed(training=True)
    images = jnp.zeros((1, *experiment.splits.train.shape), jnp.float32)
    drawn = jax.jit(experiment.network.init)(keys_of(experiment.seed).init, images)
    variables = initial_weights.begun(experiment, drawn, devices)
    loading.check_finite(variables, str(given))
    method = experiment.method(plan_of(experiment))
    state = devices.replicate(jax.jit(method.init)(variables))
    with workdir.held(folder), Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.latest() is not None:
            raise UsageError(f"{folder}: expected a new folder: there are checkpoints in it")
        workdir.claim(folder, experiment.config)
        sums = no_sums(experiment, method, state)
        checkpoints.save(0, *items_of(devices.to_global(state), sums))
        checkpoints.wait()


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Adopts the weights and says what comes next."""
    cache.enable()
    initialise()
    adopt(build.experiment(config), folder)
    if jax.process_index() == 0:
        print(f"{folder} is a run: python -m experiments.evaluate --workdir={folder}", flush=True)


if __name__ == "__main__":
    run(main)
