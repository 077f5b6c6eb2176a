"""What a run's defence does to each frequency of an image, and which ones its classifier needs.

    python -m experiments.frequencies --workdir=runs/cifar10_rain

Looks at test images as they are: their spectra before and after the defence (for RAIN in parts,
too), the energy that is left of high frequencies, and the accuracy of the classifier alone (of an
ensemble, of the mean of its classifiers) on images without them. Writes frequencies.png and
frequencies.json into the run's folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.cli import run
from rain_jax import data, defences, evaluation
from rain_jax.audit.ladder import UNDEFENDED
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.config.schema import make
from rain_jax.defences.network import parts_of
from rain_jax.image import band_energy, low_pass, radial_spectrum
from rain_jax.logs import Progress, provenance, write_json
from rain_jax.parallel import (
    image_keys,
    initialise,
    round_up,
    rows_of_process,
)
from rain_jax.runs import cache, evaluating, loading, workdir
from rain_jax.types import Array, AxisName, Batch, Image, Key, Variables

# Test images where `config.evaluation.images` does not say how many.
IMAGES = 1000
# The high band, in cycles per pixel: above half of what a row can hold.
ABOVE = 0.25
# Of the highest frequency on each axis.
CUTOFFS = tuple((np.arange(1, 11) / 10).tolist())
# What one pixel a level off adds up to, by half: an image with less has nothing in the high band.
LEAST = 0.5 / 255**2

# Variables, key and image to what comes out.
Way = Callable[[Variables, Key, Image], Image]


class Seen(NamedTuple):
    """Of each image [N]."""

    spectrum: dict[str, Any]  # [N, R], by way; R depends on the size of what comes out
    energy: dict[str, Any]  # [N], in the high band
    right: Any  # bool [N, P], of the classifier alone at each cutoff
    side: dict[str, int]  # by way, in order: pixels of the shorter side, of which R - 1 is half


def ways(experiment: build.Experiment) -> dict[str, Way]:
    """What is compared with the clean image: the defence, of each member, and RAIN's parts.

    The parts are clipped as RAIN is, and without its shift: images halved and doubled by bicubic
    interpolation; doubled so after random picks; and doubled by the trained network. To undo a
    shift changes no power, but here it was never made: opposite edges meet in a Fourier transform,
    a seam of high frequencies, which a shift moves to where the network smooths it. That is what
    "defended" and "picks, network" differ in.
    """
    spec, group = experiment.config["defence"], experiment.config["ensemble"]
    if spec is None:
        return {}
    if group is not None:
        key = group["key"].removeprefix("defence.")
        return {
            f"defended, {key} {value:g}": _way({**spec, key: value}, member)
            for member, value in enumerate(group["values"])
        }
    found = {"defended": _way(spec)}
    if spec["name"] == "rain":
        bicubic = {"reach": 0.0, "upscaler": {"name": "bicubic"}}
        found |= {
            "bicubic, bicubic": _way({**spec, **bicubic, "down": "bicubic"}),
            "picks, bicubic": _way({**spec, **bicubic, "down": "random"}),
            "picks, network": _way({**spec, "reach": 0.0, "down": "random"}),
        }
    return found


def _way(spec: dict[str, Any], member: int | None = None) -> Way:
    defence = make("config.defence", defences, spec)

    def way(variables: Variables, key: Key, image: Image) -> Image:
        own = parts_of(variables)["defence"]
        if member is not None:
            own = jax.tree.map(lambda leaf: leaf[member], own)
        return defence.apply(own, key, image)

    return way


def look(experiment: build.Experiment, variables: Variables) -> Seen:
    """Looks at the first test images, on all devices."""
    devices = experiment.parallel.placed()
    compared: dict[str, Way] = {"clean": lambda variables, key, image: image, **ways(experiment)}
    plain = UNDEFENDED if experiment.config["defence"] is not None else None
    classifier = logits_fn_of(experiment.assembly.through(plain))
    source = data.first(experiment.splits.test, experiment.evaluation.images or IMAGES)

    def one(variables: Variables, key: Key, image: Image, label: Array) -> Any:
        out = {name: way(variables, key, image) for name, way in compared.items()}
        spectrum = {name: radial_spectrum(seen) for name, seen in out.items()}
        energy = {name: band_energy(seen, above=ABOVE) for name, seen in out.items()}

        # Not clipped: the classifier gets these frequencies and no others.
        def right(cutoff: Array) -> Array:
            logits = classifier(variables)(key, low_pass(image, cutoff))
            return jnp.argmax(logits) == label

        return spectrum, energy, jax.lax.map(right, jnp.array(CUTOFFS))

    def body(variables: Variables, key: Key, batch: Batch, axis_name: AxisName = None) -> Any:
        keys = image_keys(key, batch.index)
        image = data.as_float(batch.image)
        return jax.vmap(one, (None, 0, 0, 0))(variables, keys, image, batch.label)

    program = devices.map(body, inputs=(False, False, True), outputs=True)
    placed, key = devices.replicate((variables, evaluating.evaluation_key(experiment.seed)))
    size = round_up(experiment.evaluation.batch_size, devices.size)
    parts = []
    with Progress("frequencies", source.size, unit="img") as bar:
        for batch in data.evaluation_batches(source, size):
            found = devices.gather(program(placed, key, devices.split(rows_of_process(batch))))
            parts.append(jax.tree.map(lambda leaf, valid=batch.valid: leaf[valid], found))
            bar.advance(int(np.sum(batch.valid)))
    spectrum, energy, right = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    like = jax.ShapeDtypeStruct(source.shape, jnp.float32)
    side = {
        name: min(jax.eval_shape(way, variables, key, like).shape[:2])
        for name, way in compared.items()
    }
    return Seen(spectrum, energy, right, side)


def described(seen: Seen) -> dict[str, Any]:
    """What frequencies.json says: means over images with their standard errors."""
    clean = seen.energy["clean"]
    textured = clean > LEAST
    return {
        "images": len(clean),
        "spectra": {
            name: {
                "cycles_per_pixel": (np.arange(side // 2 + 1) / side).tolist(),
                **_mean("log10_power", seen.spectrum[name]),
            }
            for name, side in seen.side.items()
        },
        "low_pass": {
            "cutoff": list(CUTOFFS),
            "classifier": [_counted(hits) for hits in seen.right.T],
        },
        "high_band": {
            "above": ABOVE,
            "images": int(np.sum(textured)),
            "energy_over_clean": {
                name: _mean("ratio", seen.energy[name][textured] / clean[textured])
                for name in seen.side
                if name != "clean" and np.any(textured)
            },
        },
    }


def _counted(right: np.ndarray) -> dict[str, Any]:
    value = evaluation.proportion(right)
    return {"accuracy": value.value, "interval_95": list(value.interval)}


def _mean(name: str, values: np.ndarray) -> dict[str, Any]:
    """The mean over images [N, ...], and its standard error."""
    error = np.std(values, axis=0) / np.sqrt(max(len(values) - 1, 1))
    return {name: np.mean(values, axis=0).tolist(), "standard_error": error.tolist()}


def figure(path: Path, record: dict[str, Any]) -> None:
    """Draws what `described` returned: spectra, accuracies, and what is left of the high band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = record["high_band"]["energy_over_clean"]
    count = 3 if ratios else 2
    drawn, axes = plt.subplots(1, count, figsize=(4.2 * count, 3.6), layout="constrained")
    for name, curve in record["spectra"].items():
        frequency, power, error = map(np.array, curve.values())
        (line,) = axes[0].plot(frequency, power, label=name)
        axes[0].fill_between(
            frequency, power - error, power + error, color=line.get_color(), alpha=0.25
        )
    axes[0].set_xlabel("cycles per pixel")
    axes[0].set_ylabel("log10 power of luminance")
    axes[0].legend(fontsize=8)
    passed = record["low_pass"]
    rows = passed["classifier"]
    value = np.array([row["accuracy"] for row in rows])
    low, high = np.array([row["interval_95"] for row in rows]).T
    around = np.maximum([value - low, high - value], 0.0)  # the last bit may be below
    axes[1].errorbar(passed["cutoff"], 100 * value, 100 * around, capsize=2)
    axes[1].set_xlabel("frequencies kept, of the highest on each axis")
    axes[1].set_ylabel("accuracy of the classifier alone, %")
    if ratios:
        values, errors = zip(*(row.values() for row in ratios.values()), strict=True)
        axes[2].barh(list(ratios), values, xerr=errors, color="tab:blue", ecolor="black")
        axes[2].invert_yaxis()
        axes[2].axvline(1.0, color="grey", linewidth=0.8)
        axes[2].set_xlabel(f"energy above {ABOVE:g} cycles per pixel, clean = 1")
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Studies the run in `folder`."""
    cache.enable()
    initialise()
    experiment = build.experiment(config)
    channels = experiment.splits.test.shape[-1]
    if channels not in (1, 3):
        raise UsageError(f"config.data: images of {channels} channels: expected 3, or 1")
    workdir.check_writable(folder)
    with workdir.held(folder):
        variables, step = loading.restore(experiment, folder)
        record = described(look(experiment, variables))
        if jax.process_index() == 0:
            told = {"step": step, "seed": experiment.seed, "data": experiment.splits.test.name}
            write_json(folder / "frequencies.json", {**told, **record, "provenance": provenance()})
            figure(folder / "frequencies.png", record)
            print(f"{folder / 'frequencies.png'} and .json hold the study", flush=True)


if __name__ == "__main__":
    run(main, workdir.read_config)
