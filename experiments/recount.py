"""Counts the worst case again, from the images that an evaluation left behind.

    python -m experiments.recount --workdir=RUN

The latest evaluation of the run is looked at, or the one of `--name=NAME`.

The model is asked anew about every test image: about the adversarial one of adversarial.npy where
there is one, else about the clean one, within the recorded threat. Draws are others than those of
the evaluation. A fixed model gives the recorded figure to the image, or the command says so and
fails; a random one gives it up to chance, within five standard errors of the difference. What the
evaluation was told about the model on its command line, this must be told again.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from experiments import report
from experiments.cli import NAME, run
from rain_jax import data, evaluation, norms
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.evaluation.record import IMAGES, INDEX, VERDICTS
from rain_jax.logs import Progress
from rain_jax.parallel import initialise, round_up
from rain_jax.runs import cache, evaluating, evaluations, loading, workdir

# Standard errors by which two counts over other draws may differ.
_CHANCE = 5.0


def recount(
    experiment: build.Experiment, folder: Path, name: str | None = None
) -> tuple[np.ndarray, Any]:
    """How right the model is [N] about the saved images, and what evaluation.json says of it."""
    place = evaluations.latest(folder, name) or folder
    record = _read(place / INDEX, lambda path: json.loads(path.read_text()))
    found = _read(place / VERDICTS, _arrays)
    if "adversarial/index" not in found:
        raise UsageError(f"{place}: no images were saved: expected evaluation.save_images=True")
    images = _read(place / IMAGES, lambda path: np.load(path, mmap_mode="r"))
    settings = experiment.evaluation
    devices = experiment.parallel.placed()
    size = round_up(settings.batch_size, devices.size)
    source = data.first(experiment.splits.test, record["images"])
    norm, radius = record["threat"]["norm"], record["threat"]["radius"]
    threat = experiment.threat._replace(norm=getattr(norms, norm), radius=radius)
    row = np.full(source.size, -1)
    row[found["adversarial/index"]] = np.arange(len(images))
    variables, step = loading.restore(experiment, folder)
    if step != record["step"]:
        raise UsageError(f"{folder}: the checkpoint is of step {step}, evaluation.json of "
                         f"{record['step']}: evaluate again")  # fmt: skip

    def candidates() -> Iterator[evaluation.Found]:
        for given in evaluation.as_they_are(data.evaluation_batches(source, size)):
            rows = row[given.batch.index]
            there = np.flatnonzero(rows >= 0)
            tried = given.image.copy()
            tried[there] = images[rows[there]]
            yield given._replace(image=tried)

    rules = evaluation.Rules(threat, record["draws"], record["eight_bit"])
    judge = evaluation.judging(logits_fn_of(experiment.network), rules, devices, batch_size=size)
    key = evaluating.key_of(experiment.seed, "recount")
    judgements = []
    with Progress("recount", source.size, unit="img") as bar:
        for some in judge(devices.replicate(variables), key, candidates()):
            judgements.append(some.judgement)
            bar.advance(len(some.steps))
    seen = evaluation.join(judgements)
    return np.where(seen.allowed, seen.share, 1.0), record["worst_case"]


def by_chance(share: np.ndarray, draws: int) -> float:
    """How far apart two means of shares [N] may be, each of so many draws of every image."""
    # Of a few draws all may agree by luck: one more of either kind keeps the error from vanishing.
    likely = (share * draws + 1) / (draws + 2)
    return _CHANCE * float(np.sqrt(2 * np.sum(likely * (1 - likely)) / draws)) / len(share)


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: expected the file of an evaluation: run experiments.evaluate") \
            from None  # fmt: skip
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return {name: found[name] for name in found.files if name.startswith("adversarial/")}


def main(config: ml_collections.ConfigDict, folder: Path, name: str | None = None) -> None:
    """Counts again and compares."""
    cache.enable()
    initialise()
    experiment = build.experiment(config)
    share, known = recount(experiment, folder, name)
    value = evaluation.proportion(share)
    print(f"\nworst case over the saved images: {report.percent(value)}", flush=True)
    if known is None:
        print("the evaluation gave none: its checks failed")
        return
    low, high = known["interval_95"]
    print(
        f"evaluation.json says: {100 * known['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    )
    if not experiment.network.random:
        if known["right"] != value.hits:
            raise UsageError(
                f"{folder}: {known['right']} images stood in the evaluation and {value.hits} "
                f"stand now; {known.get('near_boundary', 0)} lie within rounding of the decision "
                "boundary, where another kind of machine may differ"
            )
        return
    apart = abs(known["accuracy"] - float(np.mean(share)))
    if apart > by_chance(share, experiment.evaluation.draws or 1):
        raise UsageError(
            f"{folder}: {100 * known['accuracy']:.1f} per cent stood in the evaluation and "
            f"{100 * np.mean(share):.1f} stand now, further apart than draws are by chance"
        )


if __name__ == "__main__":
    run(main, workdir.read_config, options=(NAME,))
