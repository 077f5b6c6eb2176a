"""What is attacked: a model of ours and its PyTorch twin, with images and labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import data, evaluation
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.parallel import Devices, choose_devices, place
from rain_jax.runs import loading, workdir
from rain_jax.types import Array, Batch, Key, LogitsFn, Variables

SHIFTS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # as `twins.SHIFTS`


class Subject(NamedTuple):
    """What is attacked: a model of ours and its PyTorch twin, with images and labels."""

    logits_fn_of: evaluation.LogitsFnOf
    variables: Variables
    twin: Any
    images: Any  # NumPy float32 [N, H, W, C]
    labels: Any
    experiment: build.Experiment
    devices: Devices
    batch_size: int

    def batches(self, given: np.ndarray | None = None) -> Iterator[Batch]:
        """The images, or those `given` (bool [N]), in order."""
        wanted = np.ones(len(self.labels), bool) if given is None else given
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            index: Any = np.arange(len(self.labels), dtype=np.int32)[part]
            valid: Any = wanted[part]
            yield Batch(self.images[part], self.labels[part], index, valid)


def subject(folder: Path, images: int, random: str | None, batch_size: int) -> Subject:
    """The model of a run, or one with random weights, or one that shifts its images at random."""
    from experiments import twins

    experiment = build.experiment(workdir.read_config(folder))
    if experiment.config["defence"] is not None:
        raise UsageError(f"{folder}: expected a run without a defence: there is no twin of it")
    devices = place("shard_map", choose_devices())
    source = data.first(experiment.splits.test, images)
    pixels, labels = data.resident(source)
    pixels = np.asarray(data.as_float(pixels))
    if random == "weights":
        variables = experiment.network.init(jax.random.key(0), jnp.zeros((1, *source.shape)))
    else:
        variables, _ = loading.restore(experiment, folder)
    network = experiment.config["network"]
    twin = twins.twin(network, jax.tree.map(np.asarray, variables))
    of = logits_fn_of(experiment.network)
    if random == "weights":
        # It is right about everything that way, and its attacks have something to do.
        labels = np.argmax(np.asarray(_logits(of, variables, pixels)), axis=1).astype(np.int32)
    _check_twin(_logits(of, variables, pixels[:64]), twin, pixels[:64])
    if random == "shift":
        of, twin = shifted(of), twins.Shifted(twin)
    return Subject(
        of, devices.replicate(variables), twin, pixels, labels, experiment, devices, batch_size
    )


def shifted(logits_fn_of: evaluation.LogitsFnOf) -> evaluation.LogitsFnOf:
    """The model that rolls its image by one pixel, in a direction that its key draws."""

    def of(variables: Variables) -> LogitsFn:
        fixed = logits_fn_of(variables)

        def logits_fn(key: Key, image: Array) -> Array:
            move = jnp.asarray(SHIFTS)[jax.random.randint(key, (), 0, len(SHIFTS))]
            return fixed(key, jnp.roll(image, move, axis=(0, 1)))

        return logits_fn

    return of


def _logits(of: evaluation.LogitsFnOf, variables: Variables, pixels: np.ndarray) -> np.ndarray:
    model = jax.jit(lambda v, x: jax.vmap(lambda one: of(v)(jax.random.key(0), one))(x))
    parts = [model(variables, pixels[i : i + 250]) for i in range(0, len(pixels), 250)]
    return np.concatenate([np.asarray(part) for part in parts])


def _check_twin(ours: np.ndarray, twin: Any, pixels: np.ndarray) -> None:
    import torch

    with torch.no_grad():
        images = torch.tensor(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))
        theirs = twin(images).numpy()
    worst = float(np.max(np.abs(theirs - ours)))
    if worst > 1e-3 * max(1.0, float(np.max(np.abs(ours)))):
        raise UsageError(f"the PyTorch twin is another function: its logits differ by {worst:g}")
