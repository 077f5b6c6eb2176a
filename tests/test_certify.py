"""The command that certifies a run: its record, its refusals, and going on after a kill."""

import json
import shutil

import commands
import jax
import numpy as np
import pytest

from experiments import certify, cli, train
from rain_jax import data
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.evaluation import smoothing
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import loading, workdir

NOISE = dict(name="gaussian_noise", scale=0.2)
ASKED = ["sigma=(0.2,0.4)", "draws=200", "selection=20", "images=21", "every=2", "block=4"]


def config_of(folder, **own):
    scope: dict = {}
    exec(commands.write_config(folder).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    whole["evaluation"] = {
        "attacks": {"fgsm": {"name": "fgsm"}}, "batch_size": 100, "images": 5, "draws": 1,
        "checks": False,
    }  # fmt: skip
    whole["parallel"]["devices"] = 1
    # Which learns something in 30 steps, whatever noise it stands behind.
    whole["network"]["widths"] = (8, 16)
    whole |= {"method": dict(name="natural"), "validation": None, **own}
    return tree.config(**whole)


def certified(folder, *changes, code=0):
    arguments = ["certify", f"--workdir={folder}", *(f"--config.{change}" for change in changes)]
    if not code:
        cli.run(certify.main, workdir.read_config, arguments, changed=certify.changed)
        return record(folder)
    with pytest.raises(SystemExit) as ended:
        cli.run(certify.main, workdir.read_config, arguments, changed=certify.changed)
    assert ended.value.code == code
    return None


def record(folder):
    """certify.json without what may differ between two runs: times and provenance."""
    found = json.loads((folder / "certify.json").read_text())
    columns = [{k: v for k, v in c.items() if k != "seconds"} for c in found.pop("sigmas")]
    return {k: v for k, v in found.items() if k != "provenance"} | {"sigmas": columns}


def lines(folder):
    text = (folder / "certify.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run behind noise, that is a base classifier to smooth."""
    folder = tmp_path_factory.mktemp("certified")
    train.main(config_of(folder, defence=NOISE), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The same with a record that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(trained, folder)
    certified(folder, *ASKED)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_the_record_is_what_the_draws_prove(whole):
    found = record(whole)
    experiment = build.experiment(workdir.read_config(whole))
    assert (found["step"], found["draws"], found["alpha"]) == (30, 200, 0.001)
    assert found["smoothed_model"] == "classifier"
    assert [column["sigma"] for column in found["sigmas"]] == [0.2, 0.4]
    source = data.first(experiment.splits.test, 42)
    labels = np.array([source.read(index)[1] for index in range(0, 42, 2)])
    for column in found["sigmas"]:
        images = column["images"]
        assert images["index"] == list(range(0, 42, 2))
        np.testing.assert_array_equal(images["label"], labels)
        proven = smoothing.Certificates(np.array(images["certified"]), np.array(images["radius"]))
        table = [(told["radius"], told["accuracy"]) for told in column["certified"]]
        assert [radius for radius, _ in table] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
        expected = smoothing.certified_accuracy(proven, labels, [radius for radius, _ in table])
        np.testing.assert_allclose([accuracy for _, accuracy in table], expected)
        assert column["average_certified_radius"] == smoothing.average_certified_radius(
            proven, labels
        )
        assert column["abstained"]["certify"]["images"] == np.sum(proven.prediction == -1)
        assert 0 < max(images["radius"]) <= column["largest_radius"]
        assert column["smoothed"]["accuracy"] > 0.3  # something was learnt
    assert (whole / "certify.png").read_bytes().startswith(b"\x89PNG")
    assert "certified, radius 0.25" in certify.printed(found)


def test_blocks_and_devices_do_not_matter(trained, whole, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    changes = [*ASKED[:-1], "block=7", "parallel.devices=4", "evaluation.batch_size=30"]
    found = certified(tmp_path / "run", *changes)
    for ours, theirs in zip(found["sigmas"], record(whole)["sigmas"], strict=True):
        assert ours["images"]["index"] == theirs["images"]["index"]
        # Up to a few answers at ties in the last bit, which convolutions of other shapes round.
        np.testing.assert_allclose(ours["images"]["radius"], theirs["images"]["radius"], atol=0.02)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.4, 0.55, 0.999])
def test_killed_anywhere_it_ends_with_the_same_record(kept, whole, copy):
    path = copy / "certify.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[: int(kept * len(text))])
    (copy / "certify.json").unlink()
    assert certified(copy, *ASKED) == record(whole)
    assert lines(copy) == lines(whole)


def test_what_is_known_is_not_asked_again(whole, copy, monkeypatch):
    before = (copy / "certify.jsonl").read_bytes()
    monkeypatch.setattr(
        smoothing, "counting", lambda *a, **k: lambda *a: pytest.fail("asked again")
    )
    found = certified(copy, *ASKED, "alpha=0.2", "radii=(0.1,)", "images=5", "sigma=0.4")
    assert (copy / "certify.jsonl").read_bytes() == before
    (column,) = found["sigmas"]
    assert column["images"]["index"] == [0, 2, 4, 6, 8]
    old = record(whole)["sigmas"][1]["images"]["radius"][:5]
    assert np.all(np.array(column["images"]["radius"]) >= old)  # surer statements are weaker ones
    assert np.any(np.array(column["images"]["radius"]) > old)


def test_more_images_and_sigmas_go_behind_the_others(whole, copy):
    found = certified(copy, *ASKED, "sigma=(0.4,0.3)", "images=23")
    assert lines(copy)[: len(lines(whole))] == lines(whole)
    assert [column["sigma"] for column in found["sigmas"]] == [0.4, 0.3]
    old = record(whole)["sigmas"][1]["images"]
    assert found["sigmas"][0]["images"]["radius"][:21] == old["radius"]
    assert found["sigmas"][1]["images"]["index"] == list(range(0, 46, 2))


def test_draws_are_of_the_place_and_of_the_purpose(trained, whole, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    changes = ["sigma=0.4", "draws=200", "selection=200", "images=5", "block=4"]
    certified(tmp_path / "run", *changes)
    _, first, second = lines(tmp_path / "run")
    assert first["index"] + second["index"] == [0, 1, 2, 3, 4]
    # Bounds hold for draws that did not choose the class.
    assert first["selection"] != first["estimation"]
    others = next(line for line in lines(whole)[1:] if line["sigma"] == 0.4)
    assert others["index"] == [0, 2, 4, 6]
    ours = [first["estimation"][0], first["estimation"][2], second["estimation"][0]]
    np.testing.assert_allclose(ours, others["estimation"][:3], atol=2)  # ties, in the last bit


def test_the_noise_of_the_run_is_the_default_and_is_not_added_twice(trained, tmp_path):
    config = workdir.read_config(trained)
    asked, through = certify.completed(certify.Certification(), build.experiment(config))
    assert (asked.sigma, through) == (0.2, "classifier")
    experiment = build.experiment(config)
    variables, _ = loading.restore(experiment, trained)
    devices = place("shard_map", choose_devices(1))
    (batch,) = data.evaluation_batches(data.first(experiment.splits.test, 12), 12)

    def share(through, sigma):
        model = certify.logits_fn_of(experiment.assembly.through(through))
        count = smoothing.counting(model, devices, copies=50)
        counts = count(devices.replicate(variables), jax.random.key(1), sigma, 400, batch)
        return counts / 400

    # The defended model has the noise in itself; next to none is added to it here.
    np.testing.assert_allclose(share("classifier", 0.2), share(None, 1e-6), atol=0.12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sigma=0", "config.sigma=0.0: expected a number in (0, inf)"),
        ("sigma=-1", "config.sigma=-1.0"),
        ("sigma=(0.2,0.2)", "config.sigma=(0.2, 0.2): expected one at least, and none twice"),
        ("sigma=()", "config.sigma=(): expected one at least"),
        ("sigma=much", "config.sigma='much': expected a number"),
        ("alpha=1", "config.alpha=1.0: expected a number in (0, 1)"),
        ("alpha=0", "config.alpha=0.0"),
        ("selection=500", "config.draws=200: expected a number in [500, "),
        ("images=0", "config.images=0"),
        ("images=2000", "config.images=2,000: expected at most"),
        ("every=0", "config.every=0"),
        ("block=0", "config.block=0"),
        ("radii=(-1,)", "config.radii=(-1.0,)"),
        ("sigmma=0.2", "did you mean 'sigma'?"),
        ("draws=300", "config.draws=200 there and 300 here"),
        ("seed=4", "config.seed=3 there and 4 here"),
    ],
)
def test_bad_settings_are_refused_in_a_line(change, said, copy, capfd):
    before = (copy / "certify.jsonl").read_bytes()
    certified(copy, *ASKED, change, code=2)
    error = capfd.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert (copy / "certify.jsonl").read_bytes() == before


def test_other_weights_and_other_files_are_refused(copy, capfd):
    path = copy / "certify.jsonl"
    first, rest = path.read_text().split("\n", 1)
    other = json.loads(first)
    other["of"]["weights"] = "others"
    path.write_text(json.dumps(other) + "\n" + rest)
    certified(copy, *ASKED, code=2)
    assert "config.weights=" in capfd.readouterr().err
    path.write_text("idx label\n")
    certified(copy, *ASKED, code=2)
    assert "expected what this command writes" in capfd.readouterr().err


def test_a_run_without_noise_must_be_told_of_some(tmp_path):
    experiment = build.experiment(config_of(tmp_path, defence=None))
    with pytest.raises(UsageError, match=r"config\.sigma is missing"):
        certify.completed(certify.Certification(), experiment)
    asked = certify.Certification(sigma=0.1)
    assert certify.completed(asked, experiment) == (asked, None)
