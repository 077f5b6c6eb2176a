"""What is loaded is what the config describes: trained weights behind the defence it names now."""

import commands
import drawn
import jax
import numpy as np
import pytest

import rain_jax
from experiments import cli, evaluate, train
from rain_jax import data, defences, models
from rain_jax.attacks import fgsm
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.config.networks import logits_fn_of
from rain_jax.defences.network import in_front, parts_of, with_parts
from rain_jax.defences.tables import fd_table
from rain_jax.image import standard_tables
from rain_jax.runs import evaluations, loading, workdir

NETWORK = dict(name="cnn", widths=(4,), hidden=8, batch_norm=True, modulation="film")
IMAGES = 40


def trained(folder, **sections):
    """A few steps on digits behind JPEG."""
    scope: dict = {}
    exec(commands.write_config(folder).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    whole |= {"network": NETWORK, "method": {"name": "natural"}, "validation": None, **sections}
    whole["training"] = dict(epochs=1, batch_size=64)
    whole["parallel"] = dict(devices=1)
    whole["evaluation"] = dict(images=IMAGES, checks=False, attacks=dict(fgsm=dict(name="fgsm")))
    train.main(tree.config(**whole), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("single"), defence=dict(name="jpeg", quality=10))


@pytest.fixture(scope="module")
def voting(tmp_path_factory):
    return trained(
        tmp_path_factory.mktemp("voting"),
        defence=dict(name="nn_jpeg"),
        ensemble=dict(key="defence.level", values=(10.0, 40.0)),
    )


def test_a_run_is_a_model_in_one_line(run):
    """The command's own verdicts, of nothing but the run's folder and the images."""
    network, variables = model = rain_jax.load(run)
    experiment = build.experiment(workdir.read_config(run))
    images, labels = data.resident(data.first(experiment.splits.test, IMAGES))
    threat = experiment.threat
    attacks = {"fgsm": fgsm(threat)}
    result = rain_jax.evaluate(
        model, images, labels, threat, attacks, cascade=False, batch_size=256, checks=False
    )
    with np.load(evaluations.latest(run) / "verdicts.npz") as record:
        for title in ("clean", "fgsm"):
            margin = result.run.columns[title].judgement.margin
            np.testing.assert_allclose(margin, record[f"{title}/margin"], atol=1e-5)
            np.testing.assert_array_equal(margin < 0, record[f"{title}/right"])
    logits, _ = network.apply(variables, images)
    assert np.mean(np.argmax(logits, -1) == labels) == result.clean_accuracy > 0


def test_what_is_no_run_is_no_model(tmp_path):
    with pytest.raises(UsageError, match="expected the folder of a run"):
        rain_jax.load(tmp_path)


def loaded(folder, *changes):
    experiment = build.experiment(tree.changed(workdir.read_config(folder), changes))
    return experiment, loading.restore(experiment, folder)[0]


def logits_of(experiment, variables):
    (batch,) = data.evaluation_batches(data.first(experiment.splits.test, IMAGES), IMAGES)
    images = data.as_float(batch.image)
    model = logits_fn_of(experiment.network)(variables)
    return np.asarray(jax.jit(jax.vmap(model, (None, 0)))(jax.random.key(0), images))


def afresh(defence, trained, shape):
    """A defence as it has just been made, around a classifier that has been trained."""
    options = {key: value for key, value in NETWORK.items() if key != "name"}
    network = in_front(defence, models.cnn(10, **options))
    made = drawn.of(network, shape)
    whole = parts_of(made)
    return network, with_parts(made, {**whole, "classifier": parts_of(trained)["classifier"]})


def test_a_changed_quality_takes_effect_and_the_weights_stay(run):
    experiment, own = loaded(run)
    there = logits_of(experiment, own)
    for quality in (10, 90):
        changed, variables = loaded(run, ("defence.quality", quality))
        shape = experiment.splits.train.shape
        network, expected = afresh(defences.jpeg(quality=quality), own, shape)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
        found = logits_of(changed, variables)
        np.testing.assert_array_equal(
            found, logits_of(experiment._replace(network=network), expected)
        )
        assert (np.abs(found - there).max() > 0.1) == (quality != 10)


def test_another_kind_of_table_takes_effect_too(run):
    _, variables = loaded(run, ("defence.name", "nn_jpeg"), ("defence.level", 60.0))
    tables = variables["frozen"]["defence"]["tables"]
    np.testing.assert_array_equal(tables["luma"], fd_table(60.0)[0])


def test_the_command_measures_the_changed_defence(run, tmp_path):
    """The run's own folder, its quality typed: what the README promises of `--config.KEY`."""
    seen = {}
    for quality in (10, 90):
        cli.run(
            evaluate.main, workdir.read_config,
            ["evaluate", f"--workdir={run}", f"--config.defence.quality={quality}"],
        )  # fmt: skip
        with np.load(commands.evaluated(run) / "verdicts.npz") as verdicts:
            seen[quality] = verdicts["clean/margin"]
        experiment, variables = loaded(run, ("defence.quality", quality))
        logits = logits_of(experiment, variables)
        labels = np.array([experiment.splits.test.read(n)[1] for n in range(IMAGES)])
        own = np.eye(10, dtype=bool)[labels]
        lead = np.where(own, -np.inf, logits).max(axis=1) - logits[own]
        np.testing.assert_allclose(seen[quality], lead, atol=1e-4)
    assert np.any(np.abs(seen[10] - seen[90]) > 0.1)


def test_a_changed_condition_takes_effect_whoever_asks_for_it(run):
    afd = dict(name="afd", attack=dict(name="fgsm"), deployed=0.5)
    for changes, expected in (
        ([], 1.0),
        ([("method", afd)], 0.5),
        ([("evaluation.condition", 0.25)], 0.25),
        ([("method", afd), ("evaluation.condition", 0.25)], 0.25),
    ):
        _, variables = loaded(run, *changes)
        assert float(variables["frozen"]["classifier"]["condition"]["s"]) == expected


def test_what_no_variable_can_follow_is_refused(run):
    with pytest.raises(UsageError, match="of another network") as found:
        loaded(run, ("defence", dict(name="shield")))
    assert "\n" not in str(found.value)


def test_the_tables_of_a_run_stay_as_they_were_saved(run, monkeypatch):
    """Statistics are files, which may have been written anew: a run keeps to its own tables."""
    monkeypatch.setattr(loading, "followed", None)
    _, variables = loaded(run)
    tables = variables["frozen"]["defence"]["tables"]
    np.testing.assert_array_equal(tables["luma"], standard_tables(10)[0])


def test_members_follow_their_values_and_are_told_one_condition(voting):
    shape = loaded(voting)[0].splits.train.shape
    values = ("ensemble.values", (10.0, 90.0))
    condition = ("evaluation.condition", 0.25)
    _, own = loaded(voting)
    experiment, variables = loaded(voting, values, condition)
    tables = variables["frozen"]["defence"]["tables"]["luma"]
    np.testing.assert_array_equal(tables, [fd_table(level)[0] for level in (10, 90)])
    told = variables["frozen"]["classifier"]["condition"]["s"]
    np.testing.assert_array_equal(told, np.float32([0.25, 0.25]))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], own["params"])
    # The second member alone is what is built with its quality.
    members = experiment.assembly.through("member:1")
    second = jax.tree.map(lambda leaf: leaf[1], variables)
    network, expected = afresh(defences.nn_jpeg(level=90.0), second, shape)
    np.testing.assert_allclose(
        logits_of(experiment._replace(network=members), variables),
        logits_of(experiment._replace(network=network), expected),
        atol=1e-5,
    )
