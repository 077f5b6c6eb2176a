"""The evaluations of a run: each in a folder of its own, none in another's place."""

import json

import commands
import jax
import numpy as np
import pytest

from rain_jax import data
from rain_jax.attacks import noise
from rain_jax.checks import UsageError
from rain_jax.config.options import Evaluation as Settings
from rain_jax.evaluation import AttackColumn, Evaluation
from rain_jax.norms import linf
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import evaluations
from rain_jax.types import Model, Threat

THREAT = Threat(linf, 0.1)
PIXELS, LABELS = np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, int)
SOURCE = data.from_arrays(PIXELS, LABELS, name="zeros", classes=2)
MODEL = Model(lambda weights, key, image: weights, np.zeros(2, np.float32))


def evaluation(**changes):
    usual = dict(
        model=MODEL, source=SOURCE, threat=THREAT, key=jax.random.key(0),
        columns={"noise": AttackColumn(noise(THREAT), settings={"name": "noise"})},
        devices=place("shard_map", choose_devices(1)),
    )  # fmt: skip
    return Evaluation(**{**usual, **changes})


def leave(run, planned, name=None, replace=False):
    """What an evaluation does: it chooses its folder, and leaves its record there."""
    folder = evaluations.place(run, planned, "noise-3", name, replace)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"identity": planned.fingerprint}))
    return folder.name


ANOTHER = {
    "weights": lambda: evaluation(model=MODEL._replace(variables=np.ones(2, np.float32))),
    "images": lambda: evaluation(source=data.first(SOURCE, 2)),
    "threat": lambda: evaluation(threat=THREAT._replace(radius=0.2)),
    "attack": lambda: evaluation(
        columns={"noise": AttackColumn(noise(THREAT), settings={"name": "noise", "draws": 2})}
    ),
    "title": lambda: evaluation(
        columns={"static": AttackColumn(noise(THREAT), settings={"name": "noise"})}
    ),
    "key": lambda: evaluation(key=jax.random.key(1)),
    "draws": lambda: evaluation(draws=2),
    "rounding": lambda: evaluation(eight_bit=True),
    "checks": lambda: evaluation(recorded=["checks"]),
}


@pytest.mark.parametrize("other", ANOTHER)
def test_another_evaluation_gets_another_folder(tmp_path, other):
    one, second = evaluation(), ANOTHER[other]()
    assert leave(tmp_path, one) == "noise-3"
    assert leave(tmp_path, second) == "noise-3.2"
    # Each finds its own again, how many images it looks at once and where being no matter.
    assert leave(tmp_path, evaluation(batch_size=2, block=1)) == "noise-3"
    assert leave(tmp_path, evaluation(devices=place("pmap", choose_devices(2)))) == "noise-3"
    assert leave(tmp_path, second) == "noise-3.2"
    assert evaluations.latest(tmp_path).name == "noise-3.2"
    assert leave(tmp_path, second, replace=True) == "noise-3"


def test_a_name_that_is_given_is_taken_or_refused(tmp_path):
    one, second = evaluation(), ANOTHER["key"]()
    assert leave(tmp_path, one, "mine") == leave(tmp_path, one, "mine") == "mine"
    before = (tmp_path / "evaluations/mine/evaluation.json").read_text()
    with pytest.raises(UsageError, match="another evaluation: another --name, or --replace"):
        leave(tmp_path, second, "mine")
    assert (tmp_path / "evaluations/mine/evaluation.json").read_text() == before
    assert leave(tmp_path, second, "mine", replace=True) == "mine"
    assert (tmp_path / "evaluations/mine/evaluation.json").read_text() != before
    for name in ("../mine", "a/b", "..", "", "a b"):
        with pytest.raises(UsageError, match=r"--name=.*: expected letters, digits"):
            leave(tmp_path, one, name)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_record_that_nobody_can_read_is_left_alone(tmp_path, content):
    folder = tmp_path / "evaluations" / "noise-3"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(content)
    assert leave(tmp_path, evaluation()) == "noise-3.2"
    assert (folder / "evaluation.json").read_text() == content


def test_the_one_that_is_read_is_the_latest_or_the_named(tmp_path):
    assert evaluations.latest(tmp_path) is None
    first = leave(tmp_path, evaluation())
    second = leave(tmp_path, ANOTHER["key"](), "b")
    assert evaluations.latest(tmp_path).name == second
    assert evaluations.latest(tmp_path, first).name == first
    with pytest.raises(UsageError, match=r"--name=c: .* no such evaluation: .* noise-3, b"):
        evaluations.latest(tmp_path, "c")
    own = tmp_path / "evaluations" / first
    assert evaluations.latest(own) == own


def test_names_say_which_attacks_and_how_many_images():
    pgd = dict(name="pgd", steps=5)
    for attacks, distances, suite, name in (
        ({"pgd": pgd, "far away": pgd}, {}, None, "pgd+far-away-7"),
        ({}, {"fmn": pgd}, {"name": "standard"}, "standard+fmn-7"),
    ):
        settings = Settings(attacks, distances, suite)
        assert evaluations.name_of(settings, 7) == name


@pytest.mark.structure
def test_commands_refuse_a_name_that_is_none(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    said = commands.command("recount", f"--workdir={run}", "--nmae=x", folder=tmp_path, code=2)
    assert "--nmae: no such flag" in said
    assert "did you mean '--name'?" in said
