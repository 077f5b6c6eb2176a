"""The command of RAT: rounds on digits, what they say, that they go on, and what is refused."""

import contextlib
import io
import json
import shutil

import commands
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import perturbations, rat, train
from experiments.cli import load_config
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.parallel import AXIS
from rain_jax.types import Batch

RADIUS = 0.25
SHARED = dict(
    seed=3,
    data=dict(name="digits", limit_train=1000, limit_test=120),
    network=dict(name="cnn", widths=(8, 16), hidden=32),
    threat=dict(norm="linf", radius=RADIUS),
    optimiser=dict(name="sgd", momentum=0.9),
    evaluation=dict(attacks=dict(fgsm=dict(name="fgsm")), batch_size=120),
    parallel=dict(devices=1),
)


def run(config, folder):
    """The command in this process; returns what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        rat.main(config, folder)
    return said.getvalue()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """One round for a small CNN that has been trained naturally."""
    folder = tmp_path_factory.mktemp("start")
    natural = tree.config(
        **SHARED,
        method=dict(name="natural"),
        schedule=dict(name="constant", peak=0.05),
        training=dict(epochs=10, batch_size=50),
    )
    train.train(build.experiment(natural), folder, "natural", lambda devices: None)
    return rat.config(
        **SHARED,
        start=dict(classifier=str(folder)),
        method=dict(name="rat"),
        schedule=dict(name="constant", peak=0.02),
        training=dict(epochs=4, batch_size=50, log_every=10),
        rat=dict(number=1, fraction=0.06, passes=3, steps=10),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(config, folder)


def test_it_makes_perturbations_trains_on_them_and_says_what_came_out(finished):
    folder, said = finished
    success = json.loads((folder / "rat.json").read_text())["success"]
    assert list(success) == ["start", "round 0"]
    for row in success.values():
        assert list(row) == ["set 0", "set 1", "random signs"]
        for value in row.values():
            low, high = value["interval_95"]
            assert low <= value["share"] <= high

    def share(network, name):
        return success[network][name]["share"]

    # Universal: the images are unseen ones, and random signs of the same size do far less.
    assert share("start", "set 0") > 0.3
    assert share("start", "set 0") > 5 * share("start", "random signs")
    # What RAT is for: the old ones lose their effect. That proves nothing: new ones have it.
    assert share("round 0", "set 0") < share("start", "set 0") / 2
    assert share("round 0", "set 1") > 1.5 * share("round 0", "set 0")
    places = sorted((folder / "evaluations").iterdir())
    assert places[1].name == f"{places[0].name}.start"
    assert commands.evaluated(folder) == places[0]
    after, before = (json.loads((place / "evaluation.json").read_text()) for place in places)
    assert set(after["attacks"]) == {"fgsm"}
    assert after["clean"]["accuracy"] > before["clean"]["accuracy"] - 0.05
    for word in ("set 1", "random signs", "fgsm", "round 0"):
        assert word in said
    assert (places[0] / "table.txt").read_text().strip() in said
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "provenance.json", "rat.json", "perturbations.npz", "perturbations.png",
        "round0", "evaluations",
    }  # fmt: skip


def test_perturbations_keep_to_the_radius_and_reach_their_rate_or_say_so(finished):
    sets = perturbations.kept(finished[0] / "perturbations.npz")
    assert len(sets) == 2
    for one in sets:
        assert one.perturbation.shape == (10, 8, 8, 1)
        assert np.max(np.abs(one.perturbation)) <= np.float32(RADIUS)
        np.testing.assert_array_equal(one.converged, one.rate >= 0.8)
        assert np.all(one.passes <= 3)
    assert not np.array_equal(sets[0].perturbation, sets[1].perturbation)


def test_started_again_it_goes_on_where_it_stopped(finished, config, tmp_path):
    """Stopped after the training: what is there is kept, and the rest comes out the same."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    record = json.loads((folder / "rat.json").read_text())
    sets = perturbations.kept(folder / "perturbations.npz")
    perturbations.keep(folder / "perturbations.npz", sets[:1], tuple("0123456789"))
    lines = commands.metrics(folder / "round0")
    said = run(config, folder)
    assert "goes on from step 80 of 80" in said
    assert "perturbations 1" in said
    assert "perturbations 0" not in said
    assert commands.metrics(folder / "round0") == lines
    again = json.loads((folder / "rat.json").read_text())
    assert (again["made"], again["success"]) == (record["made"], record["success"])


def test_a_folder_is_of_one_way_to_make_perturbations(finished, config):
    with pytest.raises(UsageError, match=r"holds another run: config.rat.rate=0.8"):
        run(rat.changed(config, [("rat.rate", 0.5)]), finished[0])


def test_rounds_draw_apart(config):
    built, _ = rat.experiment(config)
    rounds = [rat.round_of(built, number) for number in range(3)]
    assert len({built.seed, *(one.seed for one in rounds)}) == 4
    assert all(one.config["seed"] == one.seed for one in rounds)


@pytest.mark.parametrize("of", ["all", "device"])
def test_a_device_normalises_by_its_own_images_where_it_is_told_to(config, of):
    changes = [("parallel.statistics", of), ("network.batch_norm", True)]
    built, _ = rat.experiment(rat.changed(config, changes))
    images = np.random.default_rng(0).uniform(size=(2, 6, 8, 8, 1)).astype(np.float32)
    variables = drawn.of(built.network, (8, 8, 1))
    params = variables.pop("params")

    @jax.jit
    def losses(images):  # of two devices
        index = jnp.arange(6)
        one = lambda own: built.objective(
            params, variables, jax.random.key(2), Batch(own, index, index, index >= 0), AXIS
        )[0]
        return jax.vmap(one, axis_name=AXIS)(images)

    darker = images * np.array([1, 0.5], np.float32).reshape(2, 1, 1, 1, 1)
    before, after = np.asarray(losses(images)), np.asarray(losses(darker))
    assert (abs(before[0] - after[0]) < 1e-6) == (of == "device")


def test_the_config_in_the_house_is_one_of_this_command():
    path = str(commands.ROOT / "experiments/configs/rat/mnist.py")
    spec = load_config(path)
    assert spec["network"] == load_config(f"{path}:start")["network"]
    assert rat.changed(spec, [("rat.generator", "sgd"), ("seed", 7)])["rat"]["generator"] == "sgd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rat.generator", "deepfol"), "config.rat.generator='deepfol'.* did you mean 'deepfool'"),
        (("rat.fraction", 0.0), "config.rat.fraction=0.0"),
        (("rat.radius", 8), "did you mean 8/255"),
        (("rat.delta", 0.2), "config.rat.delta: no such key"),
        (("method.scale", "two"), "config.method.scale='two'"),
        (("training.replays", 2), "config.training.replays=2"),
        (("method.name", "natural"), "config.method.name='natural': expected one of rat"),
        (("start.classifier", None), "config.start.classifier is missing"),
        (("threat.norm", "l1"), "config.rat"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_before_anything_runs(config, change, message):
    with pytest.raises(UsageError, match=message):
        rat.experiment(rat.changed(config, [change]))


def test_training_alone_says_where_its_perturbations_come_from(config, tmp_path):
    spec = tree.plain(config)
    del spec["rat"]
    with pytest.raises(UsageError, match=r"config\.method\.name.*python -m experiments\.rat"):
        train.main(tree.config(**spec), tmp_path / "run")
