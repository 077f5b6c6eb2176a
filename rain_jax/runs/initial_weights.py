"""The weights that a defended classifier begins with, from other runs and from published files."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.config import build
from rain_jax.runs import loading, workdir
from rain_jax.config.schema import located
from rain_jax.checks import UsageError
from rain_jax.defences.network import parts_of, with_parts
from rain_jax.members import stacked
from rain_jax.models import imports
from rain_jax.parallel import Devices
from rain_jax.types import PyTree, Variables

_FILES = (".npz", ".pt", ".pth")
# Where training scripts put the weights among what else they save.
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "last")


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


def check(experiment: build.Experiment, folder: Path) -> None:
    """Refuses a start that is not there, for a run that has not begun: later none is needed."""
    if (folder / "config.json").is_file():
        return
    for part in ("classifier", "defence"):
        given = getattr(experiment.start, part)
        if given is None:
            continue
        path = Path(given)
        if path.suffix not in _FILES:
            try:
                workdir.read_config(path)
            except UsageError as error:
                raise located(f"config.start.{part}", error) from None
        elif not path.is_file():
            raise UsageError(f"config.start.{part}={given!r}: expected a file that is there")


def _begun(experiment: build.Experiment, variables: PyTree, devices: Devices) -> PyTree:
    start = experiment.start
    if experiment.config["defence"] is None:
        return _weights(
            "config.start.classifier", str(start.classifier), variables, devices, experiment
        )
    whole = parts_of(variables)
    for part, where in ("classifier", start.classifier), ("defence", start.defence):
        if where is not None:
            # A defence's fixed collections, such as tables, are what its section says.
            fixed = {k: v for k, v in whole[part].items() if k == "tables"}
            own = {k: v for k, v in whole[part].items() if k != "tables"}
            found = _weights(f"config.start.{part}", where, own, devices, experiment)
            whole[part] = {**found, **fixed}
    return with_parts(variables, whole)


def _weights(
    where: str, given: str, like: Variables, devices: Devices, experiment: build.Experiment
) -> Variables:
    """The variables in a run's folder or in a published file, checked against `like`."""
    path = Path(given)
    found: Variables
    hint = ""
    if path.suffix in _FILES:
        arrays = _arrays(where, path)
        if where.endswith("classifier"):
            published = imports.resnet_from_torch(arrays)
            _check_told(where, given, published, experiment.config["network"])
            found, hint = published.variables, f"; the file's is {published.network}"
        else:
            # By what is in them: each family's names are its own.
            imdn = "fea_conv.weight" in arrays
            found = (imports.imdn_from_torch if imdn else imports.edsr_from_torch)(arrays)
    else:
        config = workdir.read_config(path)
        shapes = jax.eval_shape(lambda: like)
        # What an evaluation of that run would take: the best by its own validation, or the last.
        which = config.get("evaluation", {}).get("checkpoint", "best")
        average = bool(config.get("average"))
        found, _ = loading.load_like(path, shapes, devices, average, which)
    _check_alike(where, given, found, like, hint)
    return jax.tree.map(jnp.asarray, found)


def _arrays(where: str, path: Path) -> Mapping[str, Any]:
    """The state dictionary in a file, of NumPy arrays or of PyTorch's tensors."""
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise UsageError(
            f"{where}={str(path)!r}: expected PyTorch to be installed, which reads such files: "
            "pip install 'rain_jax[torch]'"
        ) from None
    except pickle.UnpicklingError:
        # PyTorch's own words are about loading it all the same.
        raise UsageError(
            f"{where}={str(path)!r}: expected a file of arrays, a state dictionary and not a whole "
            "module, which Python would have to run to read it"
        ) from None
    except Exception as error:  # a damaged file makes the reader stumble anywhere
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{where}={str(path)!r}: expected a file of arrays ({reason})") from None
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(hasattr(v, "shape") for v in found.values()):
        raise UsageError(
            f"{where}={str(path)!r}: expected a state dictionary, alone or under one of "
            f"{', '.join(_INSIDE)}"
        )
    return found


def _check_told(
    where: str, given: str, published: imports.Published, network: Mapping[str, Any]
) -> None:
    """Refuses a file that says something else than the config of what no array's shape tells."""
    for option, default in {"mean": 0.0, "std": 1.0, "variant": "paper"}.items():
        ours = network.get(option, default)
        theirs = published.network.get(option, ours)
        alike = ours == theirs
        if option != "variant":
            alike = np.size(ours) in (1, np.size(theirs)) and np.allclose(ours, theirs, atol=1e-4)
        if not alike:
            raise UsageError(
                f"config.network.{option}={ours!r}: expected {theirs!r}, as in {where}={given!r}"
            )


def _check_alike(where: str, given: str, found: Variables, like: Variables, hint: str) -> None:
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
                f"here: expected the weights of the network that the config describes{hint}"
            )
