"""The corruption study: counts that can be repeated by hand, errors that can be derived."""

import json
import shutil
from functools import partial

import commands
import jax
import numpy as np
import pytest
import tfds_fixture

from experiments import cli, corruptions, train
from experiments.corruption_scores import ALEXNET, Errors, compared
from experiments.corruptions import Corruptions
from experiments.lines import append
from rain_jax import data
from rain_jax.checks import UsageError
from rain_jax.config import build, corrupted, tree
from rain_jax.config.options import Corrupted
from rain_jax.image.corruptions import FAMILIES
from rain_jax.parallel import choose_devices, image_keys, place
from rain_jax.runs import loading, workdir

IMAGES = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps on digits of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("corrupted")
    scope: dict = {}
    exec(commands.write_config(folder).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    whole["evaluation"] = {
        "images": IMAGES, "attacks": {"fgsm": {"name": "fgsm"}}, "checks": False
    }  # fmt: skip
    whole["parallel"]["devices"] = 1
    whole |= {"method": {"name": "natural"}, "validation": None}
    train.main(tree.changed(whole, [("training.epochs", 1)]), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    experiment = build.experiment(workdir.read_config(run))
    return experiment, loading.restore(experiment, run)[0]


def opened(run):
    return {"run": corruptions.model_of(run, place("shard_map", choose_devices(1)))}


def told(run, *arguments):
    """What the command writes."""
    cli.run(
        corruptions.main,
        lambda folder: corruptions.filled(Corruptions, {}),
        ["corruptions", f"--workdir={run}", *arguments],
        changed=corruptions.changed,
    )
    return json.loads((run / "corruptions.json").read_text())


def test_counts_are_those_of_the_corrupted_test_images(run, model):
    experiment, variables = model
    asked = Corruptions(families=("contrast", "gaussian_noise"), severities=(1, 5), seed=3)
    seen = corruptions.measure(asked, opened(run))["run"]
    (batch,) = data.evaluation_batches(data.first(experiment.splits.test, IMAGES), IMAGES)
    images = np.asarray(data.as_float(batch.image))
    assert set(seen) == {("clean", 0), *asked.cells}
    logits_of = jax.jit(lambda images: experiment.network.apply(variables, images)[0])
    clean = np.asarray(logits_of(images))
    np.testing.assert_array_equal(seen["clean", 0], np.argmax(clean, -1) == batch.label)
    for name, severity in asked.cells:
        corruption = partial(FAMILIES[name], constants="cifar")  # nearer to 8 pixels
        keys = image_keys(corrupted.cell_key(3, name, severity), batch.index)
        worse = jax.jit(jax.vmap(corruption, (0, 0, None)))(keys, images, severity)
        logits = np.asarray(logits_of(worse))
        np.testing.assert_array_equal(seen[name, severity], np.argmax(logits, -1) == batch.label)


def test_an_evaluation_of_corrupted_images_is_of_those_that_the_study_makes(
    run, model, monkeypatch
):
    monkeypatch.setattr(corrupted, "_BLOCK", 20)
    experiment, variables = model
    asked = Corruptions(families=("gaussian_noise",), severities=(4,), seed=3)
    seen = corruptions.measure(asked, opened(run))["run"]["gaussian_noise", 4]
    test = experiment.splits.test
    made = corrupted.corrupted(test, Corrupted("gaussian_noise", 4, seed=3))
    assert made.name == f"{test.name}, gaussian_noise 4"
    images, labels = (np.stack(some) for some in zip(*map(made.read, range(IMAGES)), strict=True))
    logits = np.asarray(jax.jit(experiment.network.apply)(variables, images)[0])
    np.testing.assert_array_equal(seen, np.argmax(logits, -1) == labels)
    # In any order, and behind the first block as in it.
    for number in (test.size - 1, 3, 25, 0):
        image, label = made.read(number)
        again = corrupted.corrupted(test, Corrupted("gaussian_noise", 4, seed=3)).read(number)
        np.testing.assert_array_equal(image, again[0])
        assert label == again[1] == test.read(number)[1]
        if number < IMAGES:
            np.testing.assert_array_equal(image, images[number])
    other = corrupted.corrupted(test, Corrupted("gaussian_noise", 4, seed=4)).read(3)[0]
    assert np.mean(np.abs(other - images[3])) > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(family="fogg", severity=1), "did you mean 'fog'"),
        (dict(family="fog", severity=6), r"expected a number in \[1, 5\]"),
        (dict(family="frost", severity=1), "expected photographs of frost"),
        (dict(family="fog"), "severity is missing"),
        (dict(family="fog", severity=1, sead=2), "did you mean 'seed'"),
    ],
)
def test_mistakes_in_a_corruption_are_met_before_anything_runs(run, change, message):
    whole = workdir.read_config(run)
    with pytest.raises(UsageError, match=message):
        build.experiment(tree.changed(whole, [("evaluation.corruption", change)]))


def test_batches_and_what_else_is_looked_at_change_nothing(run):
    all_of_them = Corruptions(families=("fog", "shot_noise"), severities=(2, 4), batch_size=24)
    one = Corruptions(families="shot_noise", severities=4, batch_size=7, images=20)
    whole, part = (corruptions.measure(asked, opened(run))["run"] for asked in (all_of_them, one))
    np.testing.assert_array_equal(whole["shot_noise", 4][:20], part["shot_noise", 4])
    again = Corruptions(families="shot_noise", severities=4, seed=1)
    other = corruptions.measure(again, opened(run))["run"]
    assert len(other["shot_noise", 4]) == IMAGES


def test_errors_are_divided_by_those_of_the_baseline():
    own = Errors({"fog": 0.3, "snow": 0.5}, 0.1)
    found = compared(own, Errors({"fog": 0.6, "snow": 0.5}, 0.2))
    assert found["ce"] == pytest.approx({"fog": 50, "snow": 100})
    assert found["mce"] == pytest.approx(75)
    assert found["relative_ce"] == pytest.approx({"fog": 50, "snow": 400 / 3})
    assert found["relative_mce"] == pytest.approx((50 + 400 / 3) / 2)
    # A baseline that fog does not hurt has nothing to divide by, and then there is no mean.
    found = compared(own, Errors({"fog": 0.2, "snow": 0.5}, 0.2))
    assert found["relative_ce"]["fog"] is None
    assert found["relative_mce"] is None
    assert found["mce"] == pytest.approx(125)


def test_alexnet_has_the_published_errors():
    assert list(ALEXNET.families) == list(FAMILIES)
    # As rounded in the paper's table.
    assert round(100 * ALEXNET.families["gaussian_noise"]) == 89
    assert round(100 * ALEXNET.families["jpeg_compression"]) == 61
    found = compared(ALEXNET, ALEXNET)
    assert found["mce"] == found["relative_mce"] == pytest.approx(100)


def test_the_command_writes_table_data_and_figure(run, capfd):
    arguments = ("--config.families=contrast,brightness", "--config.severities=2,5")
    record = told(run, *arguments, f"--config.baseline={run}")
    out = capfd.readouterr().out
    assert record["families"] == ["contrast", "brightness"]
    assert record["severities"] == [2, 5]
    assert record["constants"] == "cifar"
    (row,) = record["runs"].values()
    for cells in row["families"].values():
        for cell in cells.values():
            assert cell["of"] == IMAGES
            assert cell["accuracy"] == cell["right"] / IMAGES
            low, high = cell["interval_95"]
            assert low <= cell["accuracy"] <= high
    for name, error in row["mean_errors"].items():
        accuracy = [cell["accuracy"] for cell in row["families"][name].values()]
        assert error == pytest.approx(1 - np.mean(accuracy))
    assert row["mce"] == pytest.approx(100)  # its own baseline
    assert "contrast" in out
    assert "relative CE" in out
    assert "no corruption errors" not in out
    assert (run / "corruptions.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_see_the_same_images_and_plain_means_are_said_to_be_plain(
    run, tmp_path, capfd
):
    twin = tmp_path / "twin"
    shutil.copytree(run, twin)
    record = told(run, "--config.families=fog", "--config.severities=3", f"--config.runs={twin}")
    here, there = record["runs"]["run"], record["runs"]["twin"]
    assert here["families"] == there["families"]
    assert "mce" not in here
    assert "no corruption errors" in capfd.readouterr().out


def test_frost_takes_photographs_or_is_left_out(run, tmp_path):
    from PIL import Image as pillow

    assert "frost" not in Corruptions().asked_families
    assert Corruptions(frost="ice.png").asked_families == tuple(FAMILIES)
    with pytest.raises(UsageError, match=r"config\.frost is missing"):
        Corruptions(families="frost")
    ice = np.full((60, 70, 3), [200, 220, 255], np.uint8)
    for number in range(7):
        pillow.fromarray(ice).save(tmp_path / f"{number}.png")
    asked = Corruptions(families="frost", severities=5, frost=str(tmp_path), batch_size=IMAGES)
    photographs = corrupted.frost_of(asked.frost, "cifar")
    assert photographs.sizes.tolist() == [[12, 14]] * 5
    assert len(corruptions.measure(asked, opened(run))["run"]["frost", 5]) == IMAGES
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"0\.png cannot be read"):
        corrupted.frost_of(asked.frost, "cifar")
    with pytest.raises(UsageError, match="no such file"):
        corrupted.frost_of(str(tmp_path / "none"), "cifar")


def published(folder, dataset, name, images, labels, shape=(8, 8, 1)):
    """A folder of TFDS with one test split, as that of a family at one severity is."""
    features = tfds_fixture.image_features(shape, [str(k) for k in range(10)])
    pairs = list(zip(images, labels.tolist(), strict=True))
    made = tfds_fixture.write(folder / "made", dataset, features, {"test": pairs})
    (folder / dataset / name).mkdir(parents=True)
    shutil.move(made, folder / dataset / name / "1.0.0")


def test_published_images_are_read_from_folders_of_tfds(run, model, tmp_path):
    experiment, variables = model
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (30, 8, 8, 1), np.uint8)
    labels = draw.integers(0, 10, 30)
    # Its name there differs from the paper's.
    published(tmp_path, "cifar10_corrupted", "frosted_glass_blur_2", images, labels)
    asked = Corruptions(
        families="glass_blur", severities=2, published="tfds:cifar10_corrupted", images=30,
        data_dir=str(tmp_path), batch_size=16,
    )  # fmt: skip
    seen = corruptions.measure(asked, opened(run))["run"]
    images_ = np.asarray(data.as_float(images))
    logits = np.asarray(jax.jit(experiment.network.apply)(variables, images_)[0])
    assert len(seen["clean", 0]) == 30  # as many, but others
    # TFDS shuffles, so by their number alone.
    assert seen["glass_blur", 2].sum() == np.sum(np.argmax(logits, -1) == labels)
    assert len(seen["glass_blur", 2]) == 30
    missing = Corruptions(
        families="fog", published="tfds:cifar10_corrupted", data_dir=str(tmp_path)
    )
    with pytest.raises(UsageError, match="cifar10_corrupted/fog_1 cannot be opened"):
        corruptions.measure(missing, opened(run))
    published(tmp_path / "large", "cifar10_corrupted", "fog_1", images.repeat(2, 1), labels,
              (16, 8, 1))  # fmt: skip
    large = Corruptions(families="fog", severities=1, published="tfds:cifar10_corrupted",
                        data_dir=str(tmp_path / "large"))  # fmt: skip
    with pytest.raises(UsageError, match=r"images \[16, 8, 1\] of 10 classes"):
        corruptions.measure(large, opened(run))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--config.families=fogg"], "did you mean 'fog'"),
        (["--config.families=fog,fog"], "each once"),
        (["--config.severities=6"], "config.severities=6"),
        (["--config.images=0"], "config.images=0"),
        (["--config.constants=cifra"], "did you mean 'cifar'"),
        (["--config.familys=fog"], "did you mean 'families'"),
        (["--config.published=cifar10_corrupted"], "'tfds:NAME'"),
        (["--config.baseline=alexnet", "--config.severities=3"], "AlexNet's errors are means"),
        (["--config.baseline=alexnet"], "1,000 classes"),
        (["--config.runs=nowhere"], "expected the folder of a run"),
    ],
)
def test_mistakes_are_met_before_anything_is_measured(run, capfd, arguments, says):
    with pytest.raises(SystemExit) as ended:
        told(run, *arguments)
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_study_of_fewer_images_or_in_other_batches_is_one_of_its_own(run, tmp_path):
    """Lines of others lie in the same file, at places that it never looks at."""
    there = shutil.copytree(run, tmp_path / "run")
    few = ("--config.families=fog", "--config.severities=(3,)")
    ways = ((24, 8), (12, 8), (24, 12), (24, 8))
    found = [told(there, *few, f"--config.images={n}", f"--config.batch_size={b}") for n, b in ways]
    rows = [record["runs"].popitem()[1]["families"]["fog"]["3"] for record in found]
    assert [row["of"] for row in rows] == [24, 12, 24, 24]
    assert rows[0] == rows[2] == rows[3]


def test_a_killed_study_goes_on_behind_its_last_batch(run, tmp_path, monkeypatch):
    there = shutil.copytree(run, tmp_path / "run")
    few = ("--config.families=fog,snow", "--config.severities=(1, 5)", "--config.batch_size=8")
    whole = told(shutil.copytree(run, tmp_path / "whole"), *few)
    counted = []

    def dies(path, line):
        if len(counted) == 4:
            # As a kill leaves it: half of a line.
            path.write_text(path.read_text() + '{"cell": ["fog", 1], "fir')
            raise KeyboardInterrupt
        counted.append(line)
        append(path, line)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(corruptions, "append", dies)
        told(there, *few)
    calls = []
    monkeypatch.setattr(
        corruptions, "append", lambda path, line: (calls.append(line), append(path, line))
    )
    again = told(there, *few)
    # Three batches of the clean images and of four corruptions, of which four were done.
    assert len(calls) == 15 - len(counted)
    for name in ("runs", "families", "data"):
        first, second = (
            {k: v for k, v in record["runs"].popitem()[1].items() if k != "folder"}
            if name == "runs" else record[name] for record in (whole, again)
        )  # fmt: skip
        assert first == second
    # One family more is looked at alone, one run more by that run alone; another seed anew.
    calls.clear()
    told(there, "--config.families=fog,snow,contrast", *few[1:])
    assert {line["cell"][0] for line in calls} == {"contrast"}
    calls.clear()
    twin = shutil.copytree(run, tmp_path / "twin")
    shutil.copy(there / "config.json", twin)
    told(there, *few, f"--config.runs={twin}")
    assert not calls  # its variables are the same
    told(there, *few, "--config.seed=1")
    assert len(calls) == 15
    (there / "corruptions.jsonl").write_text("no JSON\n")
    with pytest.raises(SystemExit):
        told(there, *few)
