"""What single images tell: galleries, spectra, and what classes are taken for."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.pages import figures
from experiments.pages.exhibit import Exhibit, class_names, limit, of_model, reading, safe
from experiments.pages.figures import Line
from experiments.pages.load import Record, Run
from experiments.pages.studies import swept
from experiments.pages.tables import Cell, Table
from rain_jax.image import radial_spectrum


def galleries(run: Run) -> Iterator[Exhibit]:
    """The first images with what was done to them, for each model looked at."""
    for model, sample in run.samples.items():
        names = class_names(
            run, 1 + max(int(np.max(sample[f])) for f in sample if sample[f].ndim == 1)
        )
        change = np.abs(sample["adversarial"] - sample["clean"]).reshape(len(sample["label"]), -1)
        rows: list[tuple[Cell, ...]] = [
            (str(number), names[label], names[before], names[after],
             float(np.max(moved)), float(np.linalg.norm(moved)))
            for number, (label, before, after, moved) in enumerate(zip(
                sample["label"], sample["clean_prediction"], sample["adversarial_prediction"],
                change, strict=True,
            ))
        ]  # fmt: skip
        scale = max(float(np.max(change)), 1e-12)
        caption = (
            "Each image as the last attack that was given it left it. The ends of the scale are "
            f"±{scale:.3g}."
        )
        if _beyond(run, change):
            caption += " That attack was a check, and goes further than the radius."
        yield Exhibit(
            *of_model("gallery", run, model), caption,
            Table(("image", "label", "clean: taken for", "attacked: taken for", "L∞ distance",
                   "L2 distance"), rows),
            figures.gallery(sample, scale, names), (0.95 * len(rows) + 0.3, 3.5),
        )  # fmt: skip


def _beyond(run: Run, change: np.ndarray) -> bool:
    """Whether changes [n, pixels] leave the threat of the run."""
    threat = (run.evaluation or {}).get("threat")
    orders = {"linf": np.inf, "l2": 2, "l1": 1}
    if threat is None or threat["norm"] not in orders:
        return False
    size = np.linalg.norm(change, ord=orders[threat["norm"]], axis=1)
    return bool(np.max(size) > limit(threat))


def spectra(run: Run) -> Iterator[Exhibit]:
    """The spectra of images and perturbations, of what a defence leaves, and of the gradient."""
    of = jax.jit(jax.vmap(radial_spectrum))
    for model, sample in run.samples.items():
        if sample["clean"].shape[-1] not in (1, 3):
            continue
        change = sample["adversarial"] - sample["clean"]
        kinds = {"clean": sample["clean"], "attacked": sample["adversarial"], "change": change}
        power = {name: np.mean(np.asarray(of(images)), axis=0) for name, images in kinds.items()}
        side = min(change.shape[1:3])
        frequency = (np.arange(side // 2 + 1) / side).tolist()
        slug, title = of_model("spectra", run, model)
        caption = (
            f"Of the {len(change)} images of the gallery: log10 power of luminance, mean over "
            "images and directions."
        )
        lines = [Line(name, frequency, curve.tolist()) for name, curve in power.items()]
        yield _spectrum(slug, title, caption, lines)
    if "frequencies" in run.studies:
        with reading(run.folder / "frequencies.json"):
            yield from _frequencies(run, run.studies["frequencies"])
    if run.statistics:
        with reading(run.folder / "statistics.npz"):
            yield _statistics(run)


def _frequencies(run: Run, study: Record) -> Iterator[Exhibit]:
    lines = []
    for name, one in study["spectra"].items():
        mean, error = np.array(one["log10_power"]), np.array(one["standard_error"])
        low, high = (mean - error).tolist(), (mean + error).tolist()
        lines.append(Line(name, one["cycles_per_pixel"], mean.tolist(), low, high))
    caption = f"Of {study['images']:,} test images; bands are standard errors."
    title = f"{run.name}: through the defence"
    yield _spectrum(f"frequencies-{safe(run.name)}", title, caption, lines)
    passed = study["low_pass"]
    cells = [
        {"cutoff": cutoff, **row}
        for cutoff, row in zip(passed["cutoff"], passed["classifier"], strict=True)
    ]
    title = f"{run.name}: classifier alone, low frequencies only"
    caption = "Cutoffs are shares of the highest frequency on each axis."
    yield from swept(f"low-pass-{safe(run.name)}", title, caption, cells, ("cutoff",))


def _statistics(run: Run) -> Exhibit:
    rows = [
        (f"{kind}, channel {c}", u, v, float(table[c, u, v]))
        for kind, table in run.statistics.items()
        for c, u, v in np.ndindex(table.shape)
    ]
    return Exhibit(
        f"statistics-{safe(run.name)}", f"{run.name}: 8×8 blocks",
        "Of each frequency of a block, the first channel, horizontal to the right: deviation of "
        "clean images and of perturbations, and how much the loss turns on it.",
        Table(("statistic", "vertical", "horizontal", "value"), rows),
        figures.heatmaps(list(run.statistics), [table[0] for table in run.statistics.values()]),
        (7.0, 2.2),
    )  # fmt: skip


def _spectrum(slug: str, title: str, caption: str, lines: list[Line]) -> Exhibit:
    def draw(figure: Any) -> None:
        ax = figure.subplots()
        figures.curves(ax, lines)
        ax.set_xlabel("cycles per pixel")
        ax.set_ylabel("log10 power")
        figures.legend(figure, ax)

    rows = [(line.label, f, p) for line in lines for f, p in zip(line.x, line.y, strict=True)]
    headers = ("of", "cycles per pixel", "log10 power")
    return Exhibit(slug, title, caption, Table(headers, rows), draw, (5.6, 3.3))


class Fallen(NamedTuple):
    """What each image [N] is taken for as it is, and at its worst within the threat."""

    label: np.ndarray
    clean: np.ndarray
    attacked: np.ndarray
    stands: np.ndarray  # bool: right as it is and after every attack


def fallen(run: Run) -> Fallen | None:
    """By the verdicts on single images: the attack with the largest margin says what for.

    Attacks that go further than the radius are left out; the worst case of a random model, which
    was judged again, goes before all others.
    """
    record, clean = run.evaluation, run.verdicts.get("clean")
    if record is None or clean is None:
        return None
    place = {int(index): row for row, index in enumerate(clean["index"])}
    attacked, margin = clean["prediction"].copy(), clean["margin"].copy()
    stands = clean["right"].copy()
    furthest = limit(record["threat"])
    titles = [title for title in record["attacks"] if title in run.verdicts]
    for title in ["worst case"] if "worst case" in run.verdicts else titles:
        seen = run.verdicts[title]
        # An image that broke the rules makes no other threat of its attack's.
        if np.max(seen["distance"][seen["allowed"]], initial=0.0) > furthest:
            continue
        rows = np.array([place[int(index)] for index in seen["index"]], int)
        # Not `>`: a margin that is not a number is a loss.
        worse = seen["allowed"] & ~(seen["margin"] <= margin[rows])
        attacked[rows[worse]] = seen["prediction"][worse]
        margin[rows[worse]] = seen["margin"][worse]
        stands[rows] &= seen["right"] | ~seen["allowed"]
    return Fallen(clean["label"], clean["prediction"], attacked, stands)


def confusion(run: Run) -> Iterator[Exhibit]:
    """What each class is taken for, as it is and at its worst."""
    seen = fallen(run)
    if seen is None:
        return
    count = 1 + int(max(np.max(seen.label), np.max(seen.clean), np.max(seen.attacked)))
    names = class_names(run, count)
    tables = []
    for prediction in (seen.clean, seen.attacked):
        table = np.zeros((len(names), len(names)), int)
        np.add.at(table, (seen.label, prediction), 1)
        tables.append(table)
    rows: list[tuple[Cell, ...]] = [
        (kind, names[label], names[said], int(table[label, said]))
        for kind, table in zip(("clean", "attacked"), tables, strict=True)
        for label, said in np.argwhere(table)
    ]
    caption = (
        f"{np.sum(seen.stands):,} of {len(seen.stands):,} images are right as they are and after "
        "every attack, by verdicts.npz; under attack each counts as what its worst image is taken "
        "for."
    )
    worst = run.worst
    if worst is not None and float(worst["right"]) != float(np.sum(seen.stands)):
        # Of a random model verdicts are by mean logits, and the headline by shares of the draws.
        caption += f" The headline counts {worst['right']:,} of {worst['of']:,}."
    shares = [100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1) for table in tables]
    yield Exhibit(
        f"confusion-{safe(run.name)}", run.name, caption,
        Table(("images", "true class", "taken for", "count"), rows),
        figures.matrices(
            ("clean", "under attack"), shares, names, names, ("true class", "taken for")
        ),
        (7.2, 3.6),
    )  # fmt: skip
