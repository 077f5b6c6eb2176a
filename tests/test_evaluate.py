"""What an evaluation says: columns, cascades, distances and random models."""

import itertools
import json
from pathlib import Path
from typing import ClassVar

import commands
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, recount
from rain_jax import data, evaluation
from rain_jax.adapters import of_network
from rain_jax.config import attack_columns, build, tree
from rain_jax.runs import evaluating
from rain_jax.runs.model_info import model_info


def experiment_of(tmp_path: Path, **settings):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    changes = [(f"evaluation.{key}", value) for key, value in settings.items()]
    return build.experiment(tree.changed(scope["get_config"](), changes))


@pytest.fixture(scope="module")
def variables():
    """Untrained weights, of which some images are right and attacks have work to do."""
    return drawn.of(build.experiment(_plain()).network, (8, 8, 1), seed=6)


def _plain():
    scope: dict = {}
    exec(commands.CONFIG, scope)
    return scope["get_config"]()


def told(tmp_path, variables, **settings):
    experiment = experiment_of(tmp_path, **settings)
    row, sample = evaluate.evaluate(experiment, variables, tmp_path, "untrained", 0)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    return row, sample, record, dict(np.load(tmp_path / "verdicts.npz"))


def test_a_suite_is_a_cascade(tmp_path, variables):
    suite = dict(name="standard", steps=3, targets=2, queries=5)
    row, sample, record, verdicts = told(
        tmp_path, variables, **{"suite": suite, "attacks.pgd40": None}
    )
    members = ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert list(row.columns) == ["clean", "apgd_ce", "+ apgd_t", "+ fab_t", "+ square"]
    assert list(record["attacks"]) == members
    assert record["cascade"]
    counts = [record["clean"]["right"], *(record["attacks"][m]["right"] for m in members)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    # Each attack was given exactly those that stood before it.
    assert record["attacks"]["apgd_ce"]["attacked"] == counts[0]
    for before, member in itertools.pairwise(members):
        attacked = record["attacks"][member]["attacked"]
        assert attacked == record["attacks"][before]["right"]
        assert len(verdicts.get(f"{member}/index", [])) == attacked
    assert record["worst_case"]["right"] == counts[-1]
    if record["attacks"]["square"]["attacked"]:
        assert record["attacks"]["square"]["queries"] > 0
    assert sample.adversarial.shape == sample.clean.shape


def test_columns_are_independent_without_a_cascade(tmp_path, variables):
    noise = {"attacks.noise": dict(name="noise"), "attacks.fgsm": dict(name="fgsm")}
    row, _, record, _ = told(tmp_path, variables, **noise)
    assert list(row.columns) == ["clean", "noise", "fgsm", "pgd40", "worst case"]
    assert [a["attacked"] for a in record["attacks"].values()] == [83] * 3
    assert row.columns["worst case"].hits <= min(a["right"] for a in record["attacks"].values())


def test_the_first_breaker_its_distance_and_the_passes_are_those_counted_by_hand(
    tmp_path, variables
):
    noise = {"attacks.noise": dict(name="noise"), "attacks.fgsm": dict(name="fgsm")}
    _, _, record, verdicts = told(tmp_path, variables, **noise)
    titles = ["clean", "noise", "fgsm", "pgd40"]
    for image in range(83):
        wrong = [t for t in titles if not verdicts[f"{t}/right"][image]]
        number = titles.index(wrong[0]) if wrong else -1
        assert verdicts["broken_by"][image] == number
        distance = verdicts[f"{wrong[0]}/distance"][image] if wrong else np.nan
        np.testing.assert_equal(verdicts["broken_at"][image], distance)
    counts = [int(np.sum(verdicts["broken_by"] == number)) for number in range(4)]
    assert list(record["broken_by"].values()) == counts
    assert sum(counts[1:]) > 5
    # One gradient at the image, one look at where it ended, and the judge's.
    fgsm = record["attacks"]["fgsm"]
    assert (fgsm["forward_passes"], fgsm["backward_passes"]) == (3 * 83, 83)
    climbed = record["attacks"]["pgd40"]
    assert climbed["backward_passes"] == round(83 * climbed["mean_steps"])


def test_the_hash_of_the_data_knows_each_pixel(tmp_path, variables):
    settings = {"attacks.pgd40": dict(name="noise"), "images": 16, "checks": False}
    experiment = experiment_of(tmp_path, **settings)
    splits = experiment.splits
    images, labels = (
        np.stack(some) for some in zip(*map(splits.test.read, range(16)), strict=True)
    )

    def of(images):
        test = data.from_arrays(images, labels, name=splits.test.name, classes=10)
        return experiment._replace(splits=splits._replace(test=test))

    other = images.copy()
    other[15, 7, 7] = 1 - other[15, 7, 7]
    hashes = [
        evaluating.evaluation_of(e, variables, "x")().digest
        for e in (experiment, of(images), of(other))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_images_within_rounding_of_the_boundary_are_counted(tmp_path, variables):
    settings = {"attacks.pgd40": dict(name="noise"), "images": 16, "checks": False}
    row, _, record, verdicts = told(tmp_path, variables, **settings)
    assert record["worst_case"]["near_boundary"] == 0
    assert not any("within rounding" in note for note in row.notes)
    assert np.all(verdicts["clean/rounding"] > 0)
    (tmp_path / "ties").mkdir()
    # All logits are zero: ties everywhere, which count as wrong.
    nothing = jax.tree.map(jnp.zeros_like, variables)
    row, _, record, verdicts = told(tmp_path / "ties", nothing, **settings)
    assert record["clean"]["near_boundary"] == record["clean"]["of"] == 16
    assert record["attacks"]["pgd40"]["near_boundary"] == 16
    assert record["worst_case"]["near_boundary"] == 16  # images, not verdicts
    assert record["worst_case"]["right"] == 0
    assert np.all(verdicts["pgd40/near_boundary"])
    assert any("16 of 16 images were judged within rounding" in note for note in row.notes)


def test_who_was_not_looked_into_is_not_said_to_be_sound(tmp_path, variables):
    row, _, record, _ = told(tmp_path, variables, checks=False)
    assert (record["checks"], record["flagged"]) == ([], None)
    assert any("no checks were made" in note for note in row.notes)


def test_the_record_has_the_fields_of_robustbench(tmp_path, variables):
    _, _, record, _ = told(tmp_path, variables, checks=False)
    # Of `robustbench.utils.ModelInfo`, version 1.1.
    assert set(record["model_info"]) == {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
        "architecture", "eps", "clean_acc", "reported", "corruptions_acc", "autoattack_acc",
        "footnote",
    }  # fmt: skip
    info = record["model_info"]
    assert info["clean_acc"] == pytest.approx(100 * record["clean"]["accuracy"])
    assert (info["dataset"], info["architecture"], info["eps"]) == ("digits", "cnn", 0.1)
    assert info["additional_data"] is False
    assert info["autoattack_acc"] is None  # a PGD is none


@pytest.mark.parametrize(
    ("suite", "attacks", "told_"),
    [("standard", None, 20.0), (dict(name="standard", queries=100), None, None),
     ("standard", dict(name="noise"), None), ("plus", None, None)],
)  # fmt: skip
def test_autoattack_is_all_of_it_at_its_own_budgets(tmp_path, suite, attacks, told_):
    experiment = experiment_of(tmp_path, **{"suite": suite, "attacks.pgd40": attacks})

    class Measured:
        robust: ClassVar = {"clean": np.ones(5, bool), "+ square": np.arange(5) < 1}

    assert model_info(experiment, Measured())["autoattack_acc"] == told_  # type: ignore[arg-type]


def test_verdicts_of_a_cascade_are_those_of_independent_columns(tmp_path, variables):
    settings = {"attacks.fgsm": dict(name="fgsm"), "attacks.noise": dict(name="noise")}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, _, alone, _ = told(tmp_path / "a", variables, **settings)
    _, _, cascade, _ = told(tmp_path / "b", variables, cascade=True, **settings)
    assert cascade["worst_case"] == alone["worst_case"]


def test_distances_tell_the_accuracy_at_every_radius(tmp_path, variables):
    # Towards one class, so that the boundary lies far from some of its images.
    biased = jax.tree.map(np.copy, variables)
    biased["params"]["classifier"]["bias"][3] += 2.0
    row, _, record, verdicts = told(
        tmp_path, biased, **{"distances.fmn": dict(name="fmn", steps=30)}
    )
    assert "fmn" not in row.columns
    (note,) = row.notes
    assert note.startswith("fmn found a way to misclassify")
    found = record["distances"]["fmn"]
    accuracy, radius = found["accuracy"], found["radius"]
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[0] <= record["clean"]["accuracy"]
    assert radius[0] == 0
    assert radius[-1] == pytest.approx(0.2)
    assert found["attacked"] == record["clean"]["right"]
    distance = verdicts["fmn/distance"]
    # One that was found can be pulled in: some lie beyond the radius of the threat.
    assert np.max(distance) > 0.1
    at = int(np.argmin(np.abs(np.array(radius) - 0.1)))
    # Both search the same ball, one from outside.
    assert abs(accuracy[at] - record["attacks"]["pgd40"]["accuracy"]) < 0.25


def test_eight_bits_are_reported_and_kept(tmp_path, variables):
    _, sample, record, found = told(tmp_path, variables, eight_bit=True)
    assert record["eight_bit"]
    # Who leaves before the end is wrong when rounded, too.
    hasty = found["pgd40/steps"] < 3
    assert np.any(hasty)
    assert not np.any(found["pgd40/right"][hasty])
    levels = sample.adversarial * 255
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    assert record["attacks"]["pgd40"]["outside_the_threat"] == 0


def test_nobody_left_is_no_mistake(tmp_path, variables):
    """After a radius that breaks all, the next attack has nothing to do and says so."""
    experiment = experiment_of(tmp_path, cascade=True, **{"attacks.noise": dict(name="noise")})
    everyone = lambda key, logits_fn, image, label: 1 - image
    experiment = experiment._replace(
        threat=experiment.threat._replace(radius=1.0),
        columns={
            "flip": attack_columns.Column(lambda *a: everyone(*a)),
            "noise": experiment.columns["noise"],
        },
    )

    def constant(variables, images, train=False, axis_name=None, keys=None):
        dark = jnp.mean(images[:, :, :1], axis=(1, 2, 3), keepdims=True)[:, 0, 0]
        return jnp.where(dark < 0.5, 1.0, -1.0) * jax.nn.one_hot(
            jnp.zeros(len(images), int), 10
        ), {}

    experiment = experiment._replace(network=experiment.network._replace(apply=constant))
    measured = evaluating.evaluation_of(experiment, variables, "constant")()
    right = measured.columns["clean"].judgement
    assert np.sum(right.right) > 0
    assert len(measured.columns["noise"].judgement.index) == 0
    assert evaluation.proportion(measured.robust["noise"]).hits == 0


def test_a_random_model_is_told_by_single_draws_too(tmp_path, variables, monkeypatch):
    def noisy(network, variables):
        model = of_network(network, variables)

        def logits(variables, key, image):
            return model.logits(variables, key, image) + jax.random.normal(key, (10,))

        return model._replace(logits=logits)

    # What is measured alone: the checks would find out.
    monkeypatch.setattr(evaluating, "of_network", noisy)
    _, _, record, verdicts = told(
        tmp_path, variables, draws=16, suite=dict(name="rand", steps=2, draws=4),
        **{"attacks.pgd40": None},
    )  # fmt: skip
    found = record["attacks"]["apgd"]
    share = verdicts["apgd/share"]
    # Whoever was not attacked counts as it was.
    whole = verdicts["clean/share"].copy()
    whole[verdicts["apgd/index"]] = share
    np.testing.assert_allclose(found["accuracy"], np.mean(whole), rtol=1e-6)
    assert np.any((share > 0) & (share < 1))
    # Nobody left early: the worst mean is wanted.
    assert np.all(verdicts["apgd/steps"] == 2)
    # All were attacked that some draw gets right, not only those that the mean does.
    assert found["attacked"] == np.sum(verdicts["clean/share"] > 0)
    assert found["attacked"] > np.sum(verdicts["clean/right"])


def test_the_worst_case_of_a_random_model_is_judged_by_other_draws(tmp_path):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    names = [f"noise{number}" for number in range(6)]
    changes = [
        ("defence", dict(name="gaussian_noise", scale=0.5)),
        ("evaluation", dict(attacks={name: dict(name="noise") for name in names}, draws=16)),
    ]
    experiment = build.experiment(tree.changed(scope["get_config"](), changes))
    images = jnp.zeros((1, 8, 8, 1))
    drawn = experiment.network.init(jax.random.key(0), images)
    drawn["params"] = jax.tree.map(lambda leaf: 3 * leaf, drawn["params"])
    evaluate.evaluate(experiment, drawn, tmp_path, "untrained", 0)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    with np.load(tmp_path / "verdicts.npz") as verdicts:
        least = np.min([verdicts[f"{name}/share"] for name in ["clean", *names]], axis=0)
        again = verdicts["worst case/share"]
        shares = {"clean": verdicts["clean/share"], "worst_case": again}
        means = {"clean": verdicts["clean/right"], "worst_case": verdicts["worst case/right"]}
    assert record["worst_case"]["accuracy"] == pytest.approx(np.mean(again), rel=1e-6)
    for place, share in shares.items():
        assert record[place]["accuracy_in_all_draws"] == pytest.approx(np.mean(share == 1))
        assert record[place]["accuracy_of_the_mean"] == pytest.approx(np.mean(means[place]))
    assert np.mean(shares["clean"] == 1) < np.mean(shares["clean"])
    # These attacks find nothing: the least of seven counts is luck, and the worst case is not.
    alone = [record["attacks"][name]["accuracy"] for name in names]
    spread = np.sqrt(0.25 / (16 * 83))
    assert np.mean(least) < min(alone) - 2 * spread
    assert abs(np.mean(again) - np.mean(alone)) < 4 * spread


def test_of_a_random_model_the_worst_case_is_told_again_up_to_chance(tmp_path, monkeypatch):
    noisy = {"attacks.pgd40": dict(name="fgsm"), "draws": 16, "checks": False}
    whole = tree.changed(
        experiment_of(tmp_path, **noisy).config,
        [("defence", dict(name="gaussian_noise", scale=0.2))],
    )
    experiment = build.experiment(whole)
    weights = drawn.of(experiment.network, (8, 8, 1), seed=6)
    evaluate.evaluate(experiment, weights, tmp_path, "untrained", 0)
    monkeypatch.setattr(recount.loading, "restore", lambda experiment, folder: (weights, 0))
    recount.main(whole, tmp_path)
    path = tmp_path / "evaluation.json"
    record = json.loads(path.read_text())
    # By another draw the figure may be another, by a tenth of all draws it may not.
    for shift, fine in ((0.01, True), (0.1, False)):
        worst = {**record["worst_case"], "accuracy": record["worst_case"]["accuracy"] + shift}
        path.write_text(json.dumps({**record, "worst_case": worst}))
        if fine:
            recount.main(whole, tmp_path)
        else:
            with pytest.raises(build.UsageError, match="than draws are by chance"):
                recount.main(whole, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "standrad"}, "did you mean 'standard'"),
        ({"suite": dict(name="standard", querys=3)}, "did you mean 'queries'"),
        ({"distances.pgd": dict(name="pgd", steps=3)}, "expected one of carlini_wagner"),
        ({"suite": "standard", "attacks.square": dict(name="fgsm")}, "column of this one"),
        ({"distances.clean": dict(name="fmn")}, "another name"),
    ],
)
def test_mistakes_are_met_before_anything_runs(tmp_path, settings, message):
    with pytest.raises(build.UsageError, match=message):
        experiment_of(tmp_path, **settings)
