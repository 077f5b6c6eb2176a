"""From a trained classifier to the tables of NN-JPEG, and published weights to RAIN's network."""

import shutil
from functools import partial

import commands
import drawn
import jax
import numpy as np
import pytest

from experiments import analyse, train
from rain_jax import attacks, data
from rain_jax.checks import UsageError
from rain_jax.config import build, networks, tree
from rain_jax.defences import tables
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import initial_weights, loading, workdir


def config_of(folder, *changes, **sections):
    scope: dict = {}
    exec(commands.write_config(folder).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    # What is judged, and how, is not what is asked here.
    whole["evaluation"] = {
        "attacks": {"fgsm": {"name": "fgsm"}}, "images": 10, "batch_size": 32, "checks": False
    }  # fmt: skip
    whole["parallel"]["devices"] = 1
    # Any classifier can be analysed: one that compiles soon.
    whole |= {"method": {"name": "natural"}, "validation": None}
    return tree.changed({**whole, **sections}, changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    config = config_of(folder)
    train.main(tree.changed(config, [("training.epochs", 0.2)]), folder / "run")
    analyse.main(config, folder / "run")
    return config, folder / "run"


def test_statistics_are_those_of_the_training_images(run):
    config, folder = run
    assert (folder / "statistics.png").is_file()
    with np.load(folder / "statistics.npz") as file:
        found = tables.Statistics(**dict(file))
    experiment = build.experiment(config)
    images = data.resident(experiment.splits.train)[0]
    coefficients = jax.jit(lambda x: jax.vmap(tables.coefficients)(data.as_float(x)))(images)
    clean = np.std(np.asarray(coefficients), axis=(0, 2, 3))
    np.testing.assert_allclose(found.clean, clean, rtol=1e-3)
    # An attack of radius 0.1 adds noise of about 25 levels to each coefficient, and no more.
    assert 5 < np.mean(found.noise) < 26
    assert np.all(found.slope >= 0)
    assert np.mean(found.slope) > 0


def test_a_config_names_the_file_and_gets_its_tables(run, tmp_path):
    config, folder = run
    statistics = str(folder / "statistics.npz")
    defence = dict(name="nn_jpeg", table="nn", level=40.0, statistics=statistics)
    experiment = build.experiment(tree.changed(config, [("defence", defence)]))
    variables = drawn.of(experiment.network, experiment.splits.train.shape)
    with np.load(statistics) as file:
        luma, _ = tables.nn_table(tables.Statistics(**dict(file)), 40.0)
    np.testing.assert_allclose(variables["frozen"]["defence"]["tables"]["luma"], luma)


@pytest.fixture
def behind_jpeg(run, tmp_path):
    """The config of a run behind NN-JPEG and of such a twin, and the file that it names."""
    config, folder = run
    file = tmp_path / "statistics.npz"
    shutil.copyfile(folder / "statistics.npz", file)
    defence = dict(name="nn_jpeg", table="nn", level=40.0, statistics=str(file))
    changes = [("defence", defence), ("twin", dict(defence=defence))]
    return tree.plain(tree.changed(config, changes)), file


def test_a_run_can_be_moved_without_the_file_that_it_was_made_of(behind_jpeg, tmp_path):
    config, file = behind_jpeg
    for _, experiment, place_of in build.pair(config, tmp_path / "run"):
        workdir.claim(place_of, experiment.config)
    held = file.read_bytes()
    file.unlink()
    with pytest.raises(UsageError, match=r"config\.defence\.statistics"):
        build.experiment(config)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    found = workdir.read_config(moved)
    assert [one.config["defence"] for _, one, _ in build.pair(found, moved)] == [
        {**config["defence"], "statistics": str(moved / copy / "defence_statistics.npz")}
        for copy in ("", "twin")
    ]
    assert (moved / "defence_statistics.npz").read_bytes() == held
    assert workdir.as_written(moved)["defence"] == config["defence"]


def test_a_run_goes_on_by_the_statistics_that_it_began_with(behind_jpeg, tmp_path):
    config, file = behind_jpeg
    workdir.claim(tmp_path / "run", config)
    workdir.claim(tmp_path / "run", config)
    with np.load(file) as arrays:
        others = {name: values + 1 for name, values in arrays.items()}
    np.savez(file, **others)
    with pytest.raises(UsageError, match="is not what it was when that run began"):
        workdir.claim(tmp_path / "run", config)
    workdir.claim(tmp_path / "another", config)


def test_a_defended_run_is_refused(run):
    config, folder = run
    with pytest.raises(UsageError, match="bare classifier"):
        analyse.main(tree.changed(config, [("defence", dict(name="jpeg"))]), folder)


def test_moments_do_not_depend_on_batches(run):
    config, folder = run
    experiment = build.experiment(config)
    variables, _ = loading.restore(experiment, folder)
    attack = attacks.fgsm(experiment.threat)
    of = networks.logits_fn_of(experiment.network)
    moments = jax.jit(partial(tables.moments, jax.random.key(0), of(variables), attack))

    def told(size):
        batches = data.evaluation_batches(data.first(experiment.splits.train, 20), size)
        return tables.statistics(jax.device_get(moments(b)) for b in batches)

    for a, b in zip(told(20), told(8), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_published_weights_come_from_a_file(tmp_path):
    """An EDSR's state dict with the published names, as somebody's .npz."""
    rain = dict(name="rain", upscaler=dict(name="edsr", blocks=1, width=4))
    images = np.zeros((80, 8, 8, 3), np.uint8)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "data.npz", train_image=images, train_label=labels,
             test_image=images, test_label=labels)  # fmt: skip
    shapes = {
        "head.0": (4, 3), "body.0.body.0": (4, 4), "body.0.body.2": (4, 4), "body.1": (4, 4),
        "tail.0.0": (16, 4), "tail.1": (3, 4),
    }  # fmt: skip
    draw = np.random.default_rng(0)
    state = {}
    for name, (out, into) in shapes.items():
        state[f"{name}.weight"] = draw.normal(size=(out, into, 3, 3)).astype(np.float32)
        state[f"{name}.bias"] = draw.normal(size=out).astype(np.float32)
    np.savez(tmp_path / "edsr.npz", **state)

    def begun(**more):
        sections = dict(
            data=dict(name=f"arrays:{tmp_path / 'data.npz'}", holdout=10),
            defence=rain,
            start=dict(defence=str(tmp_path / "edsr.npz"), trained="defence"),
        )
        experiment = build.experiment(config_of(tmp_path, **{**sections, **more}))
        variables = drawn.of(experiment.network, (8, 8, 3))
        return initial_weights.begun(experiment, variables, place("shard_map", choose_devices(1)))

    found = begun()["params"]["defence"]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found)]
    assert sorted(leaf.size for leaf in leaves) == sorted(v.size for v in state.values())
    assert np.isclose(sum(leaf.sum() for leaf in leaves), sum(v.sum() for v in state.values()))
    wide = {**rain, "upscaler": dict(name="edsr", blocks=1, width=8)}
    with pytest.raises(UsageError, match=r"config\.start\.defence.*expected the weights"):
        begun(defence=wide)
    nowhere = dict(defence=str(tmp_path / "no.npz"), trained="defence")
    with pytest.raises(UsageError, match=r"config\.start\.defence.*\.npz"):
        begun(start=nowhere)
