"""A run's trained variables, from its checkpoints."""

import dataclasses
import os
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.config import build
from rain_jax.runs import workdir
from rain_jax.config.networks import followed
from rain_jax import training
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.models.conditional import with_condition
from rain_jax.parallel import Devices
from rain_jax.types import Network, PyTree, Variables


class Trained(NamedTuple):
    """A trained network beside its variables: a model for `rain_jax.evaluate` as it is."""

    network: Network
    variables: Variables


def load(folder: str | os.PathLike[str], checkpoint: Literal["best", "latest"] = "best") -> Trained:
    """The model that a run has trained, with its defence where it has one.

        network, variables = rain_jax.load("runs/quickstart")
        logits, _ = network.apply(variables, images)          # [B, H, W, C] in [0, 1] -> [B, K]
        rain_jax.evaluate((network, variables), images, labels, threat)

    Args:
      folder: what `--workdir` was; a baseline's is `folder/twin`.
      checkpoint: "best" on the held-out images, or where none were held out "latest".

    Returns the network and its variables. Where the run averaged its weights, they are the average.

    Raises `UsageError` for a folder that is no run's, whose data are not there (they say how many
    classes there are), or whose checkpoints cannot be read.
    """
    place = Path(folder)
    experiment = build.experiment(workdir.read_config(place))
    experiment = experiment._replace(
        evaluation=dataclasses.replace(experiment.evaluation, checkpoint=checkpoint),
        parallel=dataclasses.replace(experiment.parallel, devices=1),  # as there are everywhere
    )
    variables = jax.tree.map(np.asarray, restore(experiment, place)[0])
    # On no mesh, so that whoever closes over them may map over one.
    return Trained(experiment.network, jax.tree.map(jnp.asarray, variables))


def restore(experiment: build.Experiment, folder: Path) -> tuple[PyTree, int]:
    """The variables of a run's best (or last) checkpoint, and its step.

    Numbers that variables hold are the experiment's where they are others than the run's own: the
    tables of its defence, and the condition that its evaluation asks for, or else its method. What
    no variable can follow is refused, since then the shapes are others.
    """
    devices = experiment.parallel.placed()
    images = jax.ShapeDtypeStruct((1, *experiment.splits.train.shape), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    like = jax.eval_shape(experiment.network.init, key, images)
    average = bool(experiment.config.get("average"))
    variables, step = load_like(folder, like, devices, average, experiment.evaluation.checkpoint)
    own, asked = workdir.read_config(folder), experiment.config
    others = [name for name in ("defence", "ensemble") if asked[name] != own.get(name)]
    if asked["defence"] is not None and others:
        variables = followed(experiment.network, variables, experiment.splits.train.shape)
    condition, deployed = experiment.evaluation.condition, asked["method"].get("deployed")
    if condition is None and deployed != own.get("method", {}).get("deployed"):
        condition = deployed
    return variables if condition is None else with_condition(variables, condition), step


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


def check_finite(variables: PyTree, where: str) -> None:
    """Refuses weights that are not numbers, naming the first such array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
            raise UsageError(
                f"{where}: weights {jax.tree_util.keystr(path)} hold values that are not finite"
            )
