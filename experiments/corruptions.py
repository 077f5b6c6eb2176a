"""Accuracy of trained models under the 15 common corruptions (ImageNet-C, CIFAR-10-C).

    python -m experiments.corruptions --workdir=RUN --config.frost=FOLDER
    python -m experiments.corruptions --workdir=RUN --config.baseline=OTHER --config.images=1000
    python -m experiments.corruptions --workdir=RUN --config.families=fog,snow --config.severities=5
    python -m experiments.corruptions --workdir=RUN --config.published=tfds:cifar10_corrupted

Hendrycks & Dietterich, arXiv:1903.12261. Writes corruptions.json and corruptions.png into the run's
folder, and prints a table: per cent right, and against a baseline the mean corruption errors. The
corrupted images follow from the seed and from an image's place in the data set alone. Meanwhile
corruptions.jsonl grows by a line for each batch of each corruption and model: killed, the same
command goes on behind the last one, and one that asks for more looks at what is new alone.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import corruption_scores as scores
from experiments.cli import run
from experiments.corruption_images import published_sources
from experiments.corruption_scores import CLEAN, Cell
from experiments.lines import append, read
from rain_jax import data, evaluation
from rain_jax.checks import UsageError, one_of, within
from rain_jax.config import build, tree
from rain_jax.config.corrupted import batch_of, cell_key, constants_of, frost_of, root_key
from rain_jax.config.networks import logits_fn_of
from rain_jax.config.schema import call, filled
from rain_jax.evaluation.resume import code, digest, digest_of, sample_of
from rain_jax.image.corruptions import (
    FAMILIES,
    SEVERITIES,
    Corruption,
)
from rain_jax.logs import Progress, provenance, write_json
from rain_jax.parallel import (
    Devices,
    image_keys,
    initialise,
    round_up,
    rows_of_process,
)
from rain_jax.runs import cache, loading, workdir
from rain_jax.types import Array, AxisName, Batch, Key, Variables

# Of the judge's key; those of families are checksums of their names.
JUDGE = 0


@dataclass(frozen=True)
class Corruptions:
    """What is looked at.

    `families` and `severities` are all by default, but frost where there are no photographs of it:
    `frost` names a file, or a folder whose first five are taken. `images` takes the first so many
    test images, by default those of the run's own evaluation. `constants` are those of ImageNet-C
    or CIFAR-10-C, by default whichever were made for images of about this size.

    `published` reads corrupted images in place of making them: "tfds:cifar10_corrupted", or
    "tfds:imagenet2012_corrupted", prepared in `data_dir`.

    `runs` are other runs on the same test images. Errors are divided by those of `baseline`, the
    folder of one more run, or "alexnet" for the published ones on ImageNet-C.
    """

    families: tuple[str, ...] | str | None = None
    severities: tuple[int, ...] | int = SEVERITIES
    images: int | None = None
    batch_size: int = 250
    seed: int = 0
    constants: Literal["auto", "imagenet", "cifar"] = "auto"
    frost: str | None = None
    published: str | None = None
    data_dir: str | None = None
    runs: tuple[str, ...] | str = ()
    baseline: str | None = None

    def __post_init__(self) -> None:
        for name in self.asked_families:
            one_of("config.families", name, FAMILIES)
        for severity in self.asked_severities:
            within("config.severities", severity, SEVERITIES[0], SEVERITIES[-1])
        for name in ("asked_families", "asked_severities"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                key = f"config.{name.removeprefix('asked_')}"
                raise UsageError(f"{key}={getattr(self, name)!r}: expected one at least, each once")
        if self.images is not None:
            within("config.images", self.images, 1)
        within("config.batch_size", self.batch_size, 1)
        within("config.seed", self.seed, 0, 2**31 - 1)
        if self.published is None and "frost" in self.asked_families and self.frost is None:
            raise UsageError(
                "config.frost is missing: expected photographs of frost, a file or a folder; the "
                "authors' own come with hendrycks/robustness and with imagecorruptions"
            )
        if self.published is not None and not self.published.startswith("tfds:"):
            raise UsageError(f"config.published={self.published!r}: expected 'tfds:NAME'")
        if self.baseline == "alexnet" and set(self.asked_severities) != set(SEVERITIES):
            raise UsageError(
                "config.severities: expected all: AlexNet's errors are means over them"
            )

    @property
    def asked_families(self) -> tuple[str, ...]:
        if isinstance(self.families, str):
            return tuple(self.families.split(","))
        if self.families is not None:
            return self.families
        here = self.frost is not None or self.published is not None
        return tuple(name for name in FAMILIES if here or name != "frost")

    @property
    def asked_severities(self) -> tuple[int, ...]:
        return self.severities if isinstance(self.severities, tuple) else (self.severities,)

    @property
    def asked_runs(self) -> tuple[str, ...]:
        return tuple(self.runs.split(",")) if isinstance(self.runs, str) else self.runs

    @property
    def cells(self) -> list[Cell]:
        return [(f, severity) for f in self.asked_families for severity in self.asked_severities]


def changed(config: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A complete config with some values replaced, checked."""
    spec = {**tree.plain(config), **dict(changes)}
    call("config", Corruptions, spec)
    return ml_collections.ConfigDict(filled(Corruptions, spec), type_safe=False)


class Model(NamedTuple):
    """A trained run."""

    experiment: build.Experiment
    variables: Variables
    step: int
    digest: str  # of the variables
    judge: Callable[..., Array]  # variables, key, batch, images -> how right it is [B]


def model_of(folder: Path, devices: Devices) -> Model:
    """Opens a run; its judge answers with its share of right draws, 0 or 1 where nothing is drawn.

    The judge's draws depend on the image, and neither on the corruption nor on the batch.
    """
    # The images as they are: what its own evaluation does to them is not this study's.
    plain = tree.changed(workdir.read_config(folder), [("evaluation.corruption", None)])
    experiment = build.experiment(plain)
    variables, step = loading.restore(experiment, folder)
    loading.check_finite(variables, f"{folder} at step {step}")
    draws = experiment.evaluation.draws or 1
    rules = evaluation.Rules(experiment.threat, draws)
    of = logits_fn_of(experiment.network)

    def body(
        variables: Variables, key: Key, batch: Batch, images: Array, axis_name: AxisName = None
    ) -> Array:
        def one(key: Key, image: Array, label: Array) -> Array:
            (right, share, *_), _ = evaluation.judge(of(variables), rules, key, image, image, label)
            return share if draws > 1 else right.astype(jnp.float32)

        keys = image_keys(key, batch.index)
        return jax.vmap(one)(keys, data.as_float(images), batch.label)

    program = devices.map(body, inputs=(False, False, True, True), outputs=True)
    return Model(experiment, devices.replicate(variables), step, digest_of(variables), program)


def corrupters(asked: Corruptions, source: data.Source, devices: Devices) -> dict[str, Any]:
    """A program for each family, `(key, severity, batch) -> images`, and one for all severities."""
    constants = constants_of(asked, source)
    photographs = frost_of(asked.frost, constants)

    def program(corruption: Corruption, given: dict[str, Any]) -> Any:
        def body(
            key: Key, severity: Array, given: dict[str, Any], batch: Batch,
            axis_name: AxisName = None,
        ) -> Array:  # fmt: skip
            images = data.as_float(batch.image)
            return batch_of(corruption, constants, given, key, severity, batch.index, images)

        mapped = devices.map(body, inputs=(False, False, False, True), outputs=True)
        # Photographs are an argument: as a part of the program they would be compiled with it.
        there = devices.replicate(given)
        return lambda key, severity, batch: mapped(key, severity, there, batch)

    found = {}
    for name in asked.asked_families:
        given = {"photographs": photographs} if name == "frost" else {}
        whole = partial(FAMILIES[name], constants=constants, **given)
        image = jax.ShapeDtypeStruct(source.shape, jnp.float32)
        try:  # traced now, so that what does not fit is met before anything is measured
            jax.eval_shape(whole, jax.eval_shape(jax.random.key, 0), image, SEVERITIES[0])
        except UsageError as error:
            raise UsageError(f"config.families {name}: {error}") from None
        found[name] = program(FAMILIES[name], given)
    return found


class Look(NamedTuple):
    """Images of a cell, on the devices, and the batch that they belong to."""

    cell: Cell
    first: int  # place of the first of them
    valid: np.ndarray
    batch: Batch
    images: Array


def looks(
    asked: Corruptions, source: data.Source, size: int, devices: Devices,
    published: dict[Cell, Any], done: Collection[tuple[Cell, int]],
) -> Iterator[Look]:  # fmt: skip
    """The clean images, and every cell of each batch, made here or as they were published.

    Those that are `done`, a cell and the place of its first image, are left out.
    """
    programs = {} if published else corrupters(asked, source, devices)

    def placed(source: data.Source, cells: Sequence[Cell]) -> Iterator[tuple[list[Cell], Look]]:
        for batch in data.evaluation_batches(source, size):
            first = int(batch.index[0])
            left = [cell for cell in cells if (cell, first) not in done]
            if left:
                there = devices.split(rows_of_process(batch))
                yield left, Look(CLEAN, first, np.asarray(batch.valid), there, there.image)

    keys = {cell: devices.replicate(cell_key(asked.seed, *cell)) for cell in asked.cells}
    for cells, clean in placed(source, [CLEAN, *(() if published else asked.cells)]):
        for cell in cells:
            if cell == CLEAN:
                yield clean
                continue
            strength = devices.replicate(jnp.int32(cell[1]))
            images = programs[cell[0]](keys[cell], strength, clean.batch)
            yield clean._replace(cell=cell, images=devices.again(images))
    for cell, other in published.items():
        for _, look in placed(other, [cell]):
            yield look._replace(cell=cell)


def identity(asked: Corruptions, model: Model, source: data.Source, size: int) -> str:
    """A hash of what it turns on, beside the corruption, whether a model is right about images."""
    told = {
        "data": sample_of(model.experiment.splits.test),
        "images": source.size,
        "batch_size": size,
        "constants": None if asked.published else constants_of(asked, source),
        **{name: getattr(asked, name) for name in ("seed", "frost", "published")},
        "model": [model.step, model.digest, model.experiment.evaluation.draws],
        "network": {n: model.experiment.config[n] for n in ("network", "defence", "ensemble")},
        "condition": model.experiment.evaluation.condition,
        "code": code(Path(__file__).parent),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return digest(np.frombuffer(text.encode(), np.uint8))


def measure(
    asked: Corruptions, models: dict[str, Model], path: Path | None = None
) -> dict[str, dict[Cell, np.ndarray]]:
    """How right each model is about each image [N] of each cell, clean ones included.

    Goes on with the file at `path`, if there is one, and leaves in it what was seen.
    """
    first = next(iter(models.values())).experiment
    devices = first.parallel.placed()
    for name, model in models.items():
        here, there = first.splits.test, model.experiment.splits.test
        if (here.name, here.shape, here.size) != (there.name, there.shape, there.size):
            raise UsageError(
                f"{name}: tested on {there.size:,} images of {there.name}, {list(there.shape)}: "
                f"expected {here.size:,} of {here.name}, {list(here.shape)}"
            )
    own = data.at_most("config.images", asked.images, first.splits.test)
    source = data.first(first.splits.test, own or first.evaluation.images)
    published = {}
    if asked.published is not None:
        name, cells = asked.published.removeprefix("tfds:"), asked.cells
        others = published_sources(name, cells, first.splits.test, asked.data_dir)
        limit = asked.images or first.evaluation.images
        published = {cell: data.first(other, limit) for cell, other in others.items()}
    size = round_up(asked.batch_size, devices.size)
    key = devices.replicate(jax.random.fold_in(root_key(asked.seed), JUDGE))
    ids = {name: identity(asked, model, source, size) for name, model in models.items()}
    seen: dict[tuple[Cell, int], dict[str, Any]] = {}
    for line in [] if path is None else read(path):
        cell = (line["cell"][0], line["cell"][1])
        if cell == CLEAN or cell in asked.cells:
            # Lines of other images and batches are somebody else's.
            for name in [name for name in ids if ids[name] == line["of"]]:
                seen.setdefault((cell, line["first"]), {})[name] = line["right"]
    done = {look for look, right in seen.items() if len(right) == len(models)}
    total = source.size * (1 + (0 if published else len(asked.cells)))
    total += sum(other.size for other in published.values())
    with Progress("corruptions", total, unit="img") as bar:
        bar.advance(sum(len(next(iter(seen[look].values()))) for look in done))
        for look in looks(asked, source, size, devices, published, done):
            right = seen.setdefault((look.cell, look.first), {})
            for name, model in models.items():
                if name in right:
                    continue
                rows = devices.gather(model.judge(model.variables, key, look.batch, look.images))
                right[name] = rows[look.valid].tolist()
                if path is not None:
                    line = {"of": ids[name], "cell": look.cell, "first": look.first}
                    append(path, {**line, "right": right[name]})
            bar.advance(int(np.sum(look.valid)))
    parts: dict[str, dict[Cell, list[Any]]] = {name: {} for name in models}
    for (cell, _), right in sorted(seen.items(), key=lambda held: held[0][1]):
        for name in models:
            parts[name].setdefault(cell, []).extend(right[name])
    return {
        name: {cell: np.asarray(rows, np.float32) for cell, rows in cells.items()}
        for name, cells in parts.items()
    }


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Looks at the run in `folder`, and at others beside it."""
    cache.enable()
    initialise()
    asked: Corruptions = call("config", Corruptions, tree.plain(config))
    workdir.check_writable(folder)
    with workdir.held(folder):
        _study(asked, folder)


def _study(asked: Corruptions, folder: Path) -> None:
    """Measures the runs, and writes and prints what came out."""
    paths = [folder, *map(Path, asked.asked_runs)]
    other = asked.baseline if asked.baseline != "alexnet" else None
    paths += [] if other is None else [Path(other)]
    paths = list(dict.fromkeys(paths))
    # By their last names, where these tell them apart.
    short = len({path.name for path in paths}) == len(paths)
    names = {path: path.name if short else str(path) for path in paths}
    devices = build.experiment(workdir.read_config(folder)).parallel.placed()
    models = {names[path]: model_of(path, devices) for path in paths}
    first = models[names[folder]].experiment
    base = None
    if asked.baseline == "alexnet":
        if first.splits.test.classes != scores.ALEXNET_CLASSES:
            raise UsageError(
                f"config.baseline='alexnet': expected images of {scores.ALEXNET_CLASSES:,} "
                f"classes, and {first.splits.test.name} has {first.splits.test.classes}"
            )
        base = scores.ALEXNET
    seen = measure(asked, models, folder / "corruptions.jsonl")
    if other is not None:
        base = scores.errors_of(seen[names[Path(other)]])
    if jax.process_index() != 0:
        return
    record = {
        **asdict(asked),
        "families": list(asked.asked_families),
        "severities": list(asked.asked_severities),
        "constants": None if asked.published else constants_of(asked, first.splits.test),
        "data": first.splits.test.name,
        "runs": {
            names[path]: {
                "folder": path,
                "step": models[names[path]].step,
                **scores.described(seen[names[path]], base),
            }
            for path in paths
        },
        "provenance": provenance(),
    }
    write_json(folder / "corruptions.json", record)
    scores.figure(folder / "corruptions.png", record)
    for name, told in record["runs"].items():
        clean = told["clean"]
        print(
            f"\n{name}, step {told['step']}: {100 * clean['accuracy']:.1f} % of {clean['of']:,} "
            f"clean images right; under corruption, per cent\n\n{scores.text_of(told)}",
            flush=True,
        )
    if base is None:
        print("\nWithout config.baseline these are plain means, and no corruption errors (mCE).")
    if "frost" not in asked.asked_families and asked.families is None:
        print("frost is left out: it needs photographs, --config.frost=FOLDER")
    print(f"{folder / 'corruptions.png'} and .json hold the study", flush=True)


if __name__ == "__main__":
    run(main, lambda folder: filled(Corruptions, {}), changed=changed)
