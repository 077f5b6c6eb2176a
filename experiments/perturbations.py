"""Universal perturbations of a network for every class: made, measured, kept and drawn."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import data, evaluation
from rain_jax.attacks.universal import Found, Universal, boundary_first, tup
from rain_jax.checks import UsageError, pixel_distance, within
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.data.source import subset
from rain_jax.logs import Progress
from rain_jax.norms import linf
from rain_jax.parallel import Devices, image_keys, round_up, rows_of_process
from rain_jax.runs import evaluating
from rain_jax.types import Array, AxisName, Batch, Image, Key, Threat, Variables

Generator = Literal["deepfool", "sgd", "fgsm"]


class Rounds(NamedTuple):
    """How often perturbations are made, from what, and how."""

    number: int
    fraction: float
    nearest: float
    fallback: bool
    threat: Threat
    search: Universal
    spare: Universal  # where the first one falls short


def rounds(
    *,
    threat: Threat,
    number: int = 1,
    fraction: float = 0.01,
    nearest: float = 1.0,
    radius: float | None = None,
    rate: float = 0.8,
    passes: int = 10,
    steps: int = 50,
    generator: Generator = "deepfool",
    fallback: bool = True,
) -> Rounds:
    """The section `rat` of a config; nothing in it was published, these are our defaults.

    For each class they come from images that are not of it: as many as are a `fraction` of the
    training images, drawn anew in each of the `number` rounds, and of these the share `nearest` to
    its boundary. `radius` is theirs, by default the threat's; `rate`, `passes`, `steps` and
    `generator` are those of `attacks.universal.tup`. With `fallback` classes whose rate is not
    reached are tried again by "sgd", and the better one is taken.
    """
    within("number", number, 1)
    within("fraction", fraction, above=0.0, high=1.0)
    within("nearest", nearest, above=0.0, high=1.0)
    if radius is not None:
        within("radius", radius, above=0.0)
        if threat.norm is linf:
            pixel_distance("radius", radius)
        threat = threat._replace(radius=radius)
    options: Any = {"rate": rate, "passes": passes, "steps": steps}
    search = tup(threat, generator=generator, **options)
    spare = tup(threat, generator="sgd", **options)
    fallback = fallback and generator != "sgd"
    return Rounds(number, fraction, nearest, fallback, threat, search, spare)


class Made(NamedTuple):
    """Perturbations for all K classes, and how their making went."""

    perturbation: np.ndarray  # [K, H, W, C]
    rate: np.ndarray  # [K], on the images they were made from
    converged: np.ndarray  # [K] bool
    passes: np.ndarray  # [K] int32
    spare: np.ndarray  # [K] bool, whether "sgd" did better


Search = Callable[[Variables, Key, Array, Array], Found]


def searches(built: build.Experiment, own: Rounds) -> tuple[Search, Search]:
    """The search and its spare as programs of variables, key, images and class."""
    of = logits_fn_of(built.network)

    def program(universal: Universal) -> Search:
        def search(variables: Variables, key: Key, images: Array, target: Array) -> Found:
            near_key, search_key = jax.random.split(key)
            logits_fn, count = of(variables), max(1, round(own.nearest * len(images)))
            near = boundary_first(logits_fn, near_key, images, target, count)
            return universal(search_key, logits_fn, near, target)

        return jax.jit(search)

    return program(own.search), program(own.spare)


def made(
    built: build.Experiment, own: Rounds, programs: tuple[Search, Search],
    variables: Variables, key: Key, name: str,
) -> Made:  # fmt: skip
    """Perturbations against the network with these variables, class by class."""
    search, spare = programs
    source = built.splits.train
    pool_key, *keys = jax.random.split(key, 1 + source.classes)
    wanted = max(1, round(own.fraction * source.size))
    # Twice as many hold enough that are not of one class, unless it is more than half of them.
    places = np.asarray(jax.random.permutation(pool_key, source.size)[: 2 * wanted])
    images, labels = data.resident(subset(source, places))
    largest = int(np.max(np.bincount(labels, minlength=source.classes)))
    # As many for every class and in every round, so that all are one program.
    count = min(wanted, len(labels) - largest)
    if count == 0:
        raise UsageError(
            f"config.rat.fraction={own.fraction!r}: expected more: the {len(labels)} images drawn "
            "for it are all of one class"
        )
    found: list[tuple[np.ndarray, ...]] = []
    with Progress(name, source.classes, unit="class") as bar:
        for target, class_key in enumerate(keys):
            given = jnp.asarray(data.as_float(images[labels != target][:count]))
            arguments = variables, class_key, given, jnp.int32(target)
            best, better = search(*arguments), False
            if own.fallback and not best.converged:
                other = spare(*arguments)
                better = bool(other.rate > best.rate)
                best = other if better else best
            found.append((*map(np.asarray, best), np.asarray(better)))
            bar.advance(1)
    return Made(*(np.stack(column) for column in zip(*found, strict=True)))


def successes(
    built: build.Experiment, variables: Variables, sets: np.ndarray, devices: Devices
) -> list[evaluation.Proportion]:
    """For each of the `sets` [S, K, H, W, C] the share of test images that it takes to its class.

    The mean over the classes that an image is not of, and over the images.
    """
    source = data.first(built.splits.test, built.evaluation.images)
    of = logits_fn_of(built.network)
    count, classes = sets.shape[:2]

    def body(
        variables: Variables, sets: Array, key: Key, batch: Batch, axis_name: AxisName = None
    ) -> Array:
        keys, images = image_keys(key, batch.index), data.as_float(batch.image)

        def hit(given: tuple[Array, Array]) -> Array:
            perturbation, target = given

            def one(key: Key, image: Image) -> Array:
                seen = jnp.clip(image + perturbation, 0.0, 1.0)
                return jnp.argmax(of(variables)(key, seen)) == target

            return jax.vmap(one)(keys, images)

        targets = jnp.tile(jnp.arange(classes), count)
        return jax.lax.map(hit, (sets.reshape(-1, *sets.shape[2:]), targets)).T

    program = devices.map(body, inputs=(False, False, False, True), outputs=True)
    key = evaluating.evaluation_key(built.seed)
    placed = devices.replicate((variables, jnp.asarray(sets), key))
    shares = []
    for batch in data.evaluation_batches(
        source, round_up(built.evaluation.batch_size, devices.size)
    ):
        hits = devices.gather(program(*placed, devices.split(rows_of_process(batch))))
        hits = hits.reshape(-1, count, classes)[batch.valid]
        others = np.arange(classes) != np.asarray(batch.label)[batch.valid, None]
        shares.append(np.sum(hits & others[:, None], axis=2) / (classes - 1))
    return [evaluation.proportion(share) for share in np.concatenate(shares).T]


def noise(key: Key, threat: Threat, like: np.ndarray) -> np.ndarray:
    """Random signs for every class, as large as perturbations may be: what to compare them with."""
    signs = jax.random.rademacher(key, like.shape, jnp.float32)
    return np.asarray(
        jax.vmap(lambda one: threat.radius * one / threat.norm.measure(one))(signs), np.float32
    )


def kept(path: Path) -> list[Made]:
    """The sets of perturbations that a run has made so far."""
    if not path.exists():
        return []
    with np.load(path) as file:
        arrays = dict(file)
    numbers = range(len(arrays) // len(Made._fields))
    return [Made(*(arrays[f"{n}/{field}"] for field in Made._fields)) for n in numbers]


def keep(path: Path, sets: list[Made], names: Sequence[str]) -> None:
    """Writes the sets, and draws them beside: a line for each set, classes across, grey = none."""
    arrays: dict[str, Any] = {
        f"{n}/{field}": value
        for n, one in enumerate(sets)
        for field, value in one._asdict().items()
    }
    part = path.with_name("partial.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, count = len(sets), len(names)
    drawn, axes = plt.subplots(
        lines, count, figsize=(1.15 * count, 1.4 * lines), squeeze=False, layout="constrained"
    )
    for line, one in enumerate(sets):
        for column, perturbation in enumerate(one.perturbation):
            ax = axes[line, column]
            largest = max(float(np.max(np.abs(perturbation))), 1e-12)
            image = 0.5 + perturbation / (2 * largest)
            ax.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
            ax.set_title(f"to {names[column]}: {100 * one.rate[column]:.0f} %", fontsize=7, pad=2)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[line, 0].set_ylabel(f"set {line}", fontsize=8)
    drawn.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(drawn)
