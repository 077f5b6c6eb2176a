"""The weights that a defended classifier begins with, from other runs and from published files."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, evaluate, workdir
from rain_jax.checks import UsageError
from rain_jax.defences.network import parts_of, with_parts
from rain_jax.members import stacked
from rain_jax.models import imports
from rain_jax.parallel import Devices
from rain_jax.types import PyTree, Variables


def begun(experiment: build.Experiment, variables: PyTree, devices: Devices) -> PyTree:
    """`variables` of the experiment's network with the weights that `config.start` names.

    Members of an ensemble all begin alike. Raises `UsageError` for a run or a file that is not
    there, or whose weights are of another network.
    """
    start = experiment.start
    if start.classifier is None and start.defence is None:
        return variables
    if not experiment.assembly.together:
        return _begun(experiment, variables, devices)
    members = len(experiment.assembly.members)
    each = [jax.tree.map(lambda leaf, m=m: leaf[m], variables) for m in range(members)]
    return stacked([_begun(experiment, one, devices) for one in each])


def _begun(experiment: build.Experiment, variables: PyTree, devices: Devices) -> PyTree:
    start = experiment.start
    if experiment.config["defence"] is None:
        return _weights("config.start.classifier", str(start.classifier), variables, devices)
    whole = parts_of(variables)
    for part, where in ("classifier", start.classifier), ("defence", start.defence):
        if where is not None:
            # A defence's fixed collections, such as tables, are what its section says.
            fixed = {k: v for k, v in whole[part].items() if k == "tables"}
            own = {k: v for k, v in whole[part].items() if k != "tables"}
            whole[part] = {**_weights(f"config.start.{part}", where, own, devices), **fixed}
    return with_parts(variables, whole)


def _weights(where: str, given: str, like: Variables, devices: Devices) -> Variables:
    """The variables in a run's folder or in a published file, checked against `like`."""
    path = Path(given)
    if path.suffix == ".npz":
        found: Variables = _published(where, path)
    else:
        config = workdir.read_config(path)
        shapes = jax.eval_shape(lambda: like)
        # What an evaluation of that run would take: the best by its own validation, or the last.
        which = config.get("evaluation", {}).get("checkpoint", "best")
        average = bool(config.get("average"))
        found, _ = evaluate.load_like(path, shapes, devices, average, which)
    _check_alike(where, given, found, like)
    return jax.tree.map(jnp.asarray, found)


def _published(where: str, path: Path) -> Variables:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}={str(path)!r}: expected an .npz of arrays ({error})") from None
    # By what is in them: each family's names are its own.
    read = imports.imdn_from_torch if "fea_conv.weight" in arrays else imports.edsr_from_torch
    return read(arrays)


def _check_alike(where: str, given: str, found: Variables, like: Variables) -> None:
    shapes = {
        jax.tree_util.keystr(path): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    others = {
        jax.tree_util.keystr(path): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }
    for name in shapes.keys() | others.keys():
        if shapes.get(name) != others.get(name):
            raise UsageError(
                f"{where}={given!r}: {name} is {others.get(name)} there and {shapes.get(name)} "
                "here: expected the weights of the network that the config describes"
            )
