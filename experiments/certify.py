"""Certified L2 radii of a run's classifier under randomised smoothing (arXiv:1902.02918).

    python -m experiments.certify --workdir=RUN --config.sigma=0.25 --config.images=500
    python -m experiments.certify --workdir=RUN '--config.sigma=(0.12, 0.25, 0.5)'

What is smoothed is the run's model with its defence; of a run that was trained behind the defence
`gaussian_noise`, whose place the smoothing takes, the classifier alone, by default at that scale.
Test images only, and asked so often that it takes long: certify.jsonl in the run's folder grows by
a line for each block of images, and the same command started again goes on behind the last one.
Then certify.json holds what is proven about each image, and certify.png the curves.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments.cli import run
from experiments.lines import append, read
from experiments.report import percent
from rain_jax import data, evaluation
from rain_jax.audit.ladder import UNDEFENDED
from rain_jax.checks import UsageError, nearest, within
from rain_jax.config import build, tree
from rain_jax.config.networks import logits_fn_of
from rain_jax.config.schema import call, filled
from rain_jax.data.source import subset
from rain_jax.evaluation import smoothing
from rain_jax.evaluation.resume import digest_of, sample_of
from rain_jax.logs import Progress, provenance, table, write_json
from rain_jax.parallel import initialise, round_up
from rain_jax.runs import cache, workdir
from rain_jax.runs.evaluating import key_of
from rain_jax.runs.loading import check_finite, restore
from rain_jax.types import PyTree

# How many images published tables take.
_IMAGES = 500


@dataclass(frozen=True)
class Certification:
    """What is asked, as top-level keys of the config beside the run's sections.

    `sigma` is the noise, one or several; None is that of the run's `gaussian_noise`. `selection`
    draws (n0) choose the class of an image, `draws` others (n) bound its probability, each
    statement wrong with a chance of `alpha` at most: published defaults. `images` are as many test
    images, every `every`-th, by default 500 or all there are; published tables take 500, on
    CIFAR-10 every 20th. `block` images are asked at a time, `config.evaluation.batch_size` copies
    in all. `radii` are those of the table.
    """

    sigma: float | tuple[float, ...] | None = None
    draws: int = 100_000
    selection: int = 100
    alpha: float = 0.001
    images: int | None = None
    every: int = 1
    block: int = 8
    radii: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

    def __post_init__(self) -> None:
        if self.sigma is not None:
            within("config.sigma", self.sigma, above=0.0)
        if self.sigma == () or len(set(self.sigmas)) < len(self.sigmas):
            raise UsageError(f"config.sigma={self.sigma}: expected one at least, and none twice")
        for name in ("draws", "selection", "images", "every", "block"):
            if getattr(self, name) is not None:
                within(f"config.{name}", getattr(self, name), 1)
        within("config.draws", self.draws, self.selection, smoothing.MOST_DRAWS,
               hint="; at least as many as config.selection")  # fmt: skip
        within("config.alpha", self.alpha, above=0.0, below=1.0)
        within("config.radii", self.radii, 0.0)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma or 0.0,)


OWN = tuple(field.name for field in fields(Certification))


class Counts(NamedTuple):
    """What was counted of images [N], at one sigma."""

    place: np.ndarray  # in the data set
    label: np.ndarray
    selection: np.ndarray  # [N, K]
    estimation: np.ndarray  # [N, K]
    seconds: float


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """The run's config and our own keys, with some values replaced."""
    whole = tree.plain(config_)
    own = {key: whole.pop(key) for key in OWN if key in whole}
    own |= {key: value for key, value in changes if key in OWN}
    rest = [(key, value) for key, value in changes if key not in OWN]
    for key, _ in rest:
        if key.split(".")[0] not in whole:
            raise UsageError(
                f"config.{key}: no such key: expected one of {', '.join(OWN)}, or a section of the "
                f"run's config{nearest(key, OWN)}"
            )
    run = tree.plain(tree.changed(whole, rest))
    return ml_collections.ConfigDict({**run, **filled(Certification, own)}, type_safe=False)


def completed(asked: Certification, experiment: build.Experiment) -> tuple[Certification, Any]:
    """The same with sigma where it was None, and which form of the run's model is smoothed."""
    spec = experiment.config["defence"]
    noise = spec is not None and spec["name"] == "gaussian_noise"
    if asked.sigma is None:
        if not noise or experiment.config["ensemble"] is not None:
            raise UsageError("config.sigma is missing: expected the noise to smooth with, 0.25 say")
        asked = Certification(**{**vars(asked), "sigma": float(spec["scale"])})
    return asked, UNDEFENDED if noise else None


def identity(
    asked: Certification, experiment: build.Experiment, variables: PyTree, step: int
) -> dict[str, Any]:
    """What counts depend on, as JSON; other images, sigmas, levels alpha and radii go beside."""
    told = {name: experiment.config[name] for name in ("network", "defence", "ensemble", "seed")}
    told |= {"data": sample_of(experiment.splits.test), "weights": digest_of(variables)}
    told |= {"step": step, "draws": asked.draws, "selection": asked.selection}
    return json.loads(json.dumps(told))


def begun(path: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks that are done, behind a line that says what they are of; it is written here.

    Raises `UsageError` where they are of another certification.
    """
    held = read(path)
    if not held:
        append(path, {"of": wanted})
        return []
    first, *blocks = held
    if "of" not in first:
        raise UsageError(f"{path}: expected what this command writes; remove the file")
    for line in workdir.differences(first["of"], wanted):
        raise UsageError(f"{path} holds another certification: {line}; expected it out of the way")
    return blocks


def places_of(asked: Certification, source: data.Source) -> np.ndarray:
    """The images that are certified, by their places; raises where there are not so many."""
    places = np.arange(0, source.size, asked.every)
    if asked.images is not None and asked.images > len(places):
        each = f", every {asked.every}th" if asked.every > 1 else ""
        raise UsageError(
            f"config.images={asked.images:,}: expected at most {len(places):,}, the images of "
            f"{source.name}{each}"
        )
    return places[: _IMAGES if asked.images is None else asked.images]


def measure(
    asked: Certification, through: str | None, experiment: build.Experiment, variables: PyTree,
    path: Path, done: list[dict[str, Any]],
) -> dict[float, Counts]:  # fmt: skip
    """Counts by sigma: reads those that are `done`, asks the model for the others, block by block.

    They go into the file at `path`.
    """
    devices = experiment.parallel.placed()
    size = round_up(asked.block, devices.size)
    copies = max(1, experiment.evaluation.batch_size // size)
    model = logits_fn_of(experiment.assembly.through(through))
    count = smoothing.counting(model, devices, copies=copies)
    variables = devices.replicate(variables)
    keys = devices.replicate(tuple(jax.random.split(key_of(experiment.seed, "smoothing"))))
    source = experiment.splits.test
    places = places_of(asked, source)
    known = {(line["sigma"], index) for line in done for index in line["index"]}
    todo = {s: np.array([p for p in places if (s, p) not in known], int) for s in asked.sigmas}
    lines = list(done)
    with Progress("certify", sum(map(len, todo.values())), unit="img") as bar:
        for sigma, left in todo.items():
            for batch in data.evaluation_batches(subset(source, left), size):
                began = time.monotonic()
                # Keys belong to places in the data set, and not in what is left of it.
                mine: Any = left[np.minimum(batch.index, len(left) - 1)].astype(np.int32)
                batch = batch._replace(index=mine)
                selection = count(variables, keys[0], sigma, asked.selection, batch)
                estimation = count(variables, keys[1], sigma, asked.draws, batch)
                line = {
                    "sigma": sigma,
                    "index": mine[batch.valid].tolist(),
                    "label": np.asarray(batch.label)[batch.valid].tolist(),
                    "selection": selection.tolist(),
                    "estimation": estimation.tolist(),
                    "seconds": round(time.monotonic() - began, 3),
                }
                append(path, line)
                lines.append(line)
                bar.advance(int(np.sum(batch.valid)), sigma=sigma)
    return {sigma: _joined(lines, sigma, places) for sigma in asked.sigmas}


def _joined(lines: list[dict[str, Any]], sigma: float, places: np.ndarray) -> Counts:
    mine = [line for line in lines if line["sigma"] == sigma]
    place, label, selection, estimation = (
        np.concatenate([np.array(line[name]) for line in mine])
        for name in ("index", "label", "selection", "estimation")
    )
    order = np.argsort(place)
    order = order[np.isin(place[order], places)]
    seconds = sum(line["seconds"] for line in mine)
    return Counts(place[order], label[order], selection[order], estimation[order], seconds)


def described(asked: Certification, sigma: float, counts: Counts) -> dict[str, Any]:
    """What certify.json says of one sigma; abstaining counts as wrong."""
    alpha, label = asked.alpha, counts.label
    found = smoothing.certify(
        counts.selection, counts.estimation, draws=asked.draws, sigma=sigma, alpha=alpha
    )
    smoothed = smoothing.predict(counts.estimation, alpha=alpha)
    return {
        "sigma": sigma,
        "smoothed": _counted("accuracy", smoothed == label),
        "certified": [
            {"radius": radius, **_counted("accuracy", smoothing.certified(found, label, radius))}
            for radius in (0.0, *(radius for radius in asked.radii if radius))
        ],
        "average_certified_radius": smoothing.average_certified_radius(found, label),
        "abstained": {
            "predict": _counted("share", smoothed == smoothing.ABSTAIN),
            "certify": _counted("share", found.prediction == smoothing.ABSTAIN),
        },
        # More draws would prove more of the images that reach it.
        "largest_radius": smoothing.largest_radius(asked.draws, sigma=sigma, alpha=alpha),
        "seconds": counts.seconds,
        "images": {
            "index": counts.place,
            "label": label,
            "smoothed": smoothed,
            "certified": found.prediction,
            "radius": found.radius,
        },
    }


def _counted(name: str, flags: np.ndarray) -> dict[str, Any]:
    value = evaluation.proportion(flags)
    told = {"images": value.hits, "of": value.total, name: value.value}
    return {**told, "interval_95": list(value.interval)}


def printed(record: dict[str, Any]) -> str:
    """The table: sigmas across."""

    def cell(told: dict[str, Any]) -> str:
        return percent(evaluation.Proportion(told["images"], told["of"]))

    columns = record["sigmas"]
    radii = [told["radius"] for told in columns[0]["certified"]]
    rows = [["smoothed classifier right", *(cell(column["smoothed"]) for column in columns)]]
    for at, radius in enumerate(radii):
        cells = (
            # None of so few draws could prove it, whatever the model.
            "out of reach" if radius > column["largest_radius"] else cell(column["certified"][at])
            for column in columns
        )
        rows.append([f"certified, radius {radius:g}", *cells])
    for kind in ("predict", "certify"):
        rows.append([f"abstains, {kind}", *(cell(c["abstained"][kind]) for c in columns)])
    rows.append(["average radius", *(f"{c['average_certified_radius']:.4f}" for c in columns)])
    rows.append(["largest radius possible", *(f"{c['largest_radius']:.4f}" for c in columns)])
    return table(rows, ["", *(f"sigma {column['sigma']:g}" for column in columns)])


def figure(path: Path, record: dict[str, Any]) -> None:
    """Certified accuracy at every radius, by sigma."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, ax = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for column in record["sigmas"]:
        images = column["images"]
        radius, right = np.array(images["radius"]), images["certified"] == images["label"]
        edges = np.unique([0.0, *radius[right]])
        above = [100 * np.mean(right & (radius >= edge)) for edge in edges]
        # Up to its radius an image counts, so that each step goes down behind its edge.
        ax.step([*edges, edges[-1]], [*above, 0.0], where="pre", label=f"sigma {column['sigma']:g}")
    ax.set_xlabel("L2 radius, pixels in [0, 1]")
    ax.set_ylabel("certified accuracy, %")
    ax.set_ylim(0, 100)
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Certifies the run in `folder`."""
    cache.enable()
    initialise()
    spec = tree.plain(config)
    asked = call("config", Certification, {key: spec.pop(key) for key in OWN if key in spec})
    experiment = build.experiment(spec)
    asked, through = completed(asked, experiment)
    places_of(asked, experiment.splits.test)  # or it is refused after the weights are read
    workdir.check_writable(folder)
    with workdir.held(folder):
        _certify(asked, through, experiment, folder)


def _certify(
    asked: Certification, through: str | None, experiment: build.Experiment, folder: Path
) -> None:
    variables, step = restore(experiment, folder)
    check_finite(variables, f"{folder} at step {step}")
    told, path = identity(asked, experiment, variables, step), folder / "certify.jsonl"
    done = begun(path, told)
    found = measure(asked, through, experiment, variables, path, done)
    if jax.process_index() != 0:
        return
    record = {
        "step": step,
        "seed": experiment.seed,
        "data": experiment.splits.test.name,
        "smoothed_model": through or "the whole model",
        "norm": "l2",
        **{name: getattr(asked, name) for name in ("draws", "selection", "alpha", "every")},
        "sigmas": [described(asked, sigma, counts) for sigma, counts in found.items()],
        "provenance": provenance(),
    }
    write_json(folder / "certify.json", record)
    figure(folder / "certify.png", record)
    total = len(next(iter(found.values())).place)
    print(
        f"\nPer cent of {total:,} test images, 95 % intervals; L2 radii for pixels in [0, 1], "
        f"{asked.draws:,} draws, alpha {asked.alpha:g}\n\n{printed(record)}\n\n"
        f"{folder / 'certify.json'} and .png hold it",
        flush=True,
    )


if __name__ == "__main__":
    run(main, workdir.read_config, changed=changed)
