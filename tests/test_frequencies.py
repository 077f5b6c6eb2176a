"""The frequency study: curves that can be derived, of runs with and without a defence."""

import json

import commands
import drawn
import jax
import numpy as np
import pytest

from experiments import cli, frequencies, train
from rain_jax import data
from rain_jax.config import build, tree
from rain_jax.image import band_energy, low_pass, radial_spectrum
from rain_jax.runs import loading, workdir

BITS = dict(name="bit_depth", bits=8)
RAIN = dict(name="rain", upscaler=dict(name="edsr", blocks=1, width=4, mean=0.5), reach=0.3)


def experiment_of(tmp_path, **sections):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    whole["evaluation"] = {
        "images": 20, "batch_size": 10, "attacks": {"fgsm": {"name": "fgsm"}}, "checks": False
    }  # fmt: skip
    whole["parallel"]["devices"] = 1
    return build.experiment({**whole, **sections})


def studied(experiment):
    variables = drawn.of(experiment.network, experiment.splits.train.shape)
    seen = frequencies.look(experiment, variables)
    return variables, seen, frequencies.described(seen)


def test_a_classifier_alone_has_the_spectrum_of_the_data_and_its_own_accuracy(tmp_path):
    experiment = experiment_of(tmp_path)
    variables, seen, record = studied(experiment)
    (batch,) = data.evaluation_batches(data.first(experiment.splits.test, 20), 20)
    images = np.asarray(data.as_float(batch.image))
    spectra = np.asarray(jax.jit(jax.vmap(radial_spectrum))(images))
    assert set(record["spectra"]) == {"clean"}
    clean = record["spectra"]["clean"]
    np.testing.assert_allclose(clean["log10_power"], np.mean(spectra, axis=0), atol=1e-4)
    error = np.std(spectra, axis=0, ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(clean["standard_error"], error, atol=1e-5)
    np.testing.assert_allclose(clean["cycles_per_pixel"], np.arange(5) / 8)
    energy = jax.jit(jax.vmap(lambda image: band_energy(image, above=0.25)))(images)
    np.testing.assert_allclose(seen.energy["clean"], energy, rtol=1e-4)
    assert record["high_band"]["energy_over_clean"] == {}

    @jax.jit  # one program for all cut-offs
    def passed(cutoff):
        low = jax.vmap(lambda image: low_pass(image, cutoff))(images)
        return experiment.network.apply(variables, low)[0]

    for cutoff, row in zip(frequencies.CUTOFFS, record["low_pass"]["classifier"], strict=True):
        logits = np.asarray(passed(cutoff))
        assert row["accuracy"] == np.mean(np.argmax(logits, axis=-1) == batch.label)
        low, high = row["interval_95"]
        assert low <= row["accuracy"] <= high
    assert record["low_pass"]["cutoff"][-1] == 1.0


def test_rain_is_seen_in_parts(tmp_path):
    experiment = experiment_of(tmp_path, defence=RAIN)
    variables, seen, record = studied(experiment)
    assert list(record["spectra"]) == [
        "clean", "defended", "bicubic, bicubic", "picks, bicubic", "picks, network"
    ]  # fmt: skip
    left = record["high_band"]["energy_over_clean"]
    assert all(row["standard_error"] > 0 for row in left.values())
    # The plain classifier is that behind the defence.
    other = experiment_of(tmp_path, defence=BITS)
    variables["frozen"]["defence"] = {}
    np.testing.assert_array_equal(frequencies.look(other, variables).right, seen.right)


def test_the_parts_of_rain_are_what_they_are_called(tmp_path):
    experiment = experiment_of(tmp_path, defence=RAIN)
    ways = frequencies.ways(experiment)
    image = np.random.default_rng(1).uniform(size=(8, 8, 1)).astype(np.float32)
    variables = drawn.of(experiment.network, image.shape)
    keys = jax.random.split(jax.random.key(2), 60)
    grey = np.full((8, 8, 1), 0.25, np.float32)

    @jax.jit  # one program for all, in which they share their draws
    def seen(variables, keys, image):
        out = {n: jax.vmap(way, (None, 0, None))(variables, keys, image) for n, way in ways.items()}
        smooth = ("bicubic, bicubic", "picks, bicubic")
        return out, {name: ways[name](variables, keys[0], grey) for name in smooth}

    out, flat = jax.device_get(seen(variables, keys, image))
    np.testing.assert_array_equal(out["bicubic, bicubic"][0], out["bicubic, bicubic"][1])
    assert np.any(out["picks, bicubic"][0] != out["picks, bicubic"][1])
    assert len(flat) == 2
    for values in flat.values():
        np.testing.assert_allclose(values, 0.25, atol=1e-6)
    # Of nine shifts one moves nothing: there the network's part is all of RAIN.
    same = np.max(np.abs(out["defended"] - out["picks, network"]), axis=(1, 2, 3)) < 1e-6
    assert 0.01 < np.mean(same) < 0.3


def test_a_defence_that_changes_nothing_leaves_all_energy(tmp_path):
    # Sixteen levels of grey are among the 256 of eight bits.
    _, seen, record = studied(experiment_of(tmp_path, defence=BITS))
    found = record["high_band"]["energy_over_clean"]["defended"]
    assert found["ratio"] == pytest.approx(1.0, abs=0.01)
    assert len(seen.right) == 20
    blank = {name: 0 * np.asarray(values) for name, values in seen.energy.items()}
    record = frequencies.described(seen._replace(energy=blank))
    assert record["high_band"]["images"] == 0
    assert record["high_band"]["energy_over_clean"] == {}


def test_members_have_a_curve_each(tmp_path):
    _, seen, record = studied(
        experiment_of(
            tmp_path,
            defence=dict(name="nn_jpeg", table="fd"),
            ensemble=dict(key="defence.level", values=(5.0, 90.0)),
        )
    )
    left = record["high_band"]["energy_over_clean"]
    assert list(left) == ["defended, level 5", "defended, level 90"]
    assert left["defended, level 5"]["ratio"] > left["defended, level 90"]["ratio"]
    assert seen.right.shape == (20, 10)


def test_larger_results_have_their_own_frequencies(tmp_path):
    _, seen, record = studied(
        experiment_of(
            tmp_path,
            network=dict(name="preact_resnet", depths=(1,), width=4),
            defence=dict(name="resize_and_pad", smallest=1.0, canvas=1.5),
        )
    )
    assert seen.side == {"clean": 8, "defended": 12}
    assert record["spectra"]["defended"]["cycles_per_pixel"] == (np.arange(7) / 12).tolist()


def test_the_command_writes_curves_and_figure(tmp_path, capfd):
    run = tmp_path / "run"
    experiment = experiment_of(tmp_path, defence=BITS, method=dict(name="natural"), validation=None)
    train.main(tree.changed(experiment.config, [("training.epochs", 0.2)]), run)
    cli.run(frequencies.main, workdir.read_config, ["frequencies", f"--workdir={run}"])
    assert f"{run / 'frequencies.png'} and .json" in capfd.readouterr().out
    record = json.loads((run / "frequencies.json").read_text())
    assert record["images"] == 20
    assert record["step"] == loading.restore(experiment, run)[1]
    assert (run / "frequencies.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        cli.run(frequencies.main, workdir.read_config, ["frequencies", f"--workdir={tmp_path}"])
    assert ended.value.code == 2
    assert "expected the folder of a run" in capfd.readouterr().err
