"""The ladder of adaptive attacks on a model that somebody has brought, without a config."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import rain_jax
from rain_jax import data
from rain_jax.attacks import suites
from rain_jax.audit import Forms, Ladder, rungs
from rain_jax.checks import UsageError
from rain_jax.gradients import straight_through
from rain_jax.norms import linf
from rain_jax.types import Threat

IMAGES = 60
THREAT = Threat(linf, 0.1)
LEFT_OUT = "fgsm", "pgd", "apgd_t", "fab_t", "rays"
SMALL = Ladder(
    steps=8, restarts=1, queries=40, sweep_draws=(1,), sweep_steps=(2, 6), without=LEFT_OUT
)


@pytest.fixture(scope="module")
def digits():
    splits = data.load("digits")
    images, labels = data.resident(splits.train)
    return *data.resident(data.first(splits.test, IMAGES)), data.as_float(images), labels


@pytest.fixture(scope="module")
def weights(digits):
    """Least squares on the training images: right about most, and robust about few."""
    _, _, images, labels = digits
    rows = np.concatenate([images.reshape(len(images), -1), np.ones((len(images), 1))], axis=1)
    targets = np.eye(10)[labels]
    found = np.linalg.solve(rows.T @ rows + 10 * np.eye(rows.shape[1]), rows.T @ targets)
    return jnp.asarray(found, jnp.float32)


@pytest.fixture(scope="module")
def plain(weights):
    def logits(image):
        assert image.dtype == jnp.float32  # whatever the images were
        return image.ravel() @ weights[:-1] + weights[-1]

    return logits


def coarse(image):
    return jnp.round(image * 16) / 16


@pytest.fixture(scope="module")
def defended(plain):
    """Pixels are rounded, and the gradient goes past it."""
    return lambda image: plain(straight_through(coarse)(image))


@pytest.fixture(scope="module")
def found(defended, plain, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    return folder, rain_jax.evaluate_ladder(
        defended, *digits[:2], THREAT, SMALL, surrogates={"smooth": plain}, undefended=plain,
        folder=folder,
    )  # fmt: skip


def test_every_rung_is_there_and_the_worst_case_is_over_all_of_them(found):
    _, result = found
    assert list(result.robust) == [
        "clean", "noise", "transfer", "apgd_ce", "smooth", "square", "far", "worst case",
    ]  # fmt: skip
    assert result.valid
    assert [line["steps"] for line in result.sweep] == [2, 6]
    inside = [result.robust[t] for t in result.robust if t not in ("far", "worst case")]
    np.testing.assert_array_equal(result.robust["worst case"], np.all(inside, axis=0))
    assert result.robust_accuracy == np.mean(result.robust["worst case"])
    assert result.robust_accuracy < result.accuracy["noise"] <= result.clean_accuracy
    assert "ok   images have gradients" in str(result)


def test_an_attack_of_it_is_the_attack(found, defended, digits):
    _, result = found
    attack = suites.standard(THREAT, steps=SMALL.steps, queries=SMALL.queries)["apgd_ce"]
    alone = rain_jax.evaluate(defended, *digits[:2], THREAT, {"apgd_ce": attack}, checks=False)
    np.testing.assert_array_equal(result.robust["apgd_ce"], alone.robust["apgd_ce"])


def test_it_leaves_the_record_that_the_command_leaves(found):
    folder, result = found
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["ladder"]["valid"]
    assert {c["name"] for c in record["ladder"]["checks"]} == {c.name for c in result.checks}
    assert record["worst_case"]["right"] == np.sum(result.robust["worst case"])


def test_attacks_that_did_not_work_give_no_number(plain, digits, tmp_path):
    """Pixels are rounded and no gradient goes past that."""
    result = rain_jax.evaluate_ladder(
        lambda image: plain(coarse(image)), *digits[:2], THREAT, SMALL, folder=tmp_path
    )
    assert not result.valid
    assert math.isnan(result.robust_accuracy)
    assert "worst case" not in result.robust
    assert "FAILS images have gradients" in str(result)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["flagged"]
    assert record["worst_case"] is None


def test_forms_are_attacked_whatever_else_is_given():
    """The gray form by itself, and along means where a form draws and the model does not."""
    found = rungs(Ladder(), THREAT, Forms(False, ("gray",)))
    assert found["gray"].through == "gray"
    assert "transfer" not in found
    names = "classifier", "gray", "smooth", "still"
    forms = Forms(False, names, (), frozenset({"still"}), frozenset(names) - {"still"})
    found = rungs(Ladder(draws=7), THREAT, forms)
    draws = {name: found[name].attack.draws for name in ("transfer", "gray", "smooth", "still")}
    assert draws == {"transfer": 7, "gray": 7, "smooth": 7, "still": 1}


def test_one_attack_is_the_worst_case_of_itself(plain, digits):
    alone = dataclasses.replace(
        SMALL, without=(*LEFT_OUT, "noise", "square"), sweep_draws=(), sweep_steps=()
    )
    result = rain_jax.evaluate_ladder(plain, *digits[:2], THREAT, alone)
    assert list(result.robust) == ["clean", "apgd_ce", "far"]
    assert result.valid
    assert result.robust_accuracy == result.accuracy["apgd_ce"]
    assert repr(result) == str(result)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"surrogates": {"clean": None}}, "another name than 'clean'"),
        ({"surrogates": {"square": lambda x: x.ravel()[:10]}}, "a rung of the ladder has this one"),
        (
            {"surrogates": {"official": lambda x: x.ravel()[:10]}},
            "a rung of the ladder has this one",
        ),
        (
            {"surrogates": {"transfer": lambda x: x.ravel()[:10]}},
            "a rung of the ladder has this one",
        ),
        ({"surrogates": {"smooth": lambda x: x.ravel()}}, "smooth gives 64 logits: expected 10"),
        ({"surrogates": {1: lambda x: x.ravel()}}, "expected models by name"),
        ({"surrogates": lambda x: x.ravel()}, "expected models by name"),
        ({"ladder": {"steps": 3}}, "expected a rain_jax.audit.Ladder"),
        ({"surrogates": {"smooth": 3}}, "smooth: model=3: expected a function"),
        ({"ladder": Ladder(elsewhere="runs/other")}, "ladder.elsewhere='runs/other': expected"),
        ({"ladder": Ladder(surrogates=("smoth",))}, "surrogates='smoth'"),
    ],
)
def test_mistakes_are_met_first(given, says, plain, digits):
    with pytest.raises(UsageError) as error:
        rain_jax.evaluate_ladder(plain, *digits[:2], THREAT, **given)
    assert says in str(error.value)
