"""From names to calls: every value of a config can be seen, changed, saved and read again."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import commands
import drawn
import jax
import numpy as np
import pytest

from experiments import cli, train
from rain_jax import attacks, data, losses, methods, models, norms, optimisers, schedules
from rain_jax.checks import UsageError
from rain_jax.config import build, schema, tree
from rain_jax.methods.common import Staged
from rain_jax.runs import step_programs
from rain_jax.types import Batch, Estimator, Loss, Norm

ROOT = Path(__file__).resolve().parents[1]
PGD = dict(name="pgd", steps=2)


def small(**changes: Any) -> Any:
    """A config on digits, which need no file."""
    sections: dict[str, Any] = dict(
        data=dict(name="digits", limit_train=64, limit_test=8),
        network=dict(name="cnn"),
        threat=dict(radius=0.1),
        method=dict(name="natural"),
        optimiser=dict(name="sgd"),
        schedule=dict(name="constant", peak=0.1),
        training=dict(epochs=1, batch_size=32),
        evaluation=dict(attacks=dict(pgd=PGD)),
    )
    return tree.config(**{**sections, **changes})


def refused(call: Callable[[], Any], *says: str) -> None:
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for said in says:
        assert said in message


# --- convert ---------------------------------------------------------------------------------

RIGHT = [
    (3, int, 3),
    (3, float, 3.0),
    (0.5, float, 0.5),
    (True, bool, True),
    ("x", str, "x"),
    (None, int | None, None),
    (3, int | None, 3),
    (3, float | None, 3.0),
    ("b", Literal["a", "b"], "b"),
    ([1, 2], tuple[int, ...], (1, 2)),
    ((1, 2), tuple[float, ...], (1.0, 2.0)),
    ([1, 2], tuple[int, int], (1, 2)),
    (0.5, float | tuple[float, ...], 0.5),
    ([1, 2], float | tuple[float, ...], (1.0, 2.0)),
    ({"a": 1}, dict[str, Any], {"a": 1}),
    ({"a": 1}, dict[str, Any] | None, {"a": 1}),
    ("x", str | os.PathLike[str] | None, "x"),
    (Path("x"), str | os.PathLike[str] | None, Path("x")),
    ("l2", Norm, norms.l2),
    (norms.l2, Norm, norms.l2),
    ("dlr", Loss, losses.dlr),
    (losses.margin, Loss, losses.margin),
    (None, Estimator | None, None),
    ({"anything": 1}, Any, {"anything": 1}),
]


@pytest.mark.parametrize("value, annotation, expected", RIGHT)
def test_values_become_what_the_annotation_says(value, annotation, expected):
    found = schema.convert("config.x", value, annotation)
    assert found == expected
    assert type(found) is type(expected)


WRONG = [
    ("3", int, "config.x='3': expected a whole number"),
    (3.0, int, "config.x=3.0: expected a whole number"),
    (True, int, "config.x=True: expected a whole number"),
    (False, float, "config.x=False: expected a number"),
    (1, bool, "config.x=1: expected True or False"),
    ("ten", float, "config.x='ten': expected a number"),
    (10**400, float, "expected a number"),
    (3, str, "config.x=3: expected a text"),
    (None, int, "config.x=None: expected a whole number"),
    ("c", Literal["aa", "ab"], "config.x='c': expected one of aa, ab"),
    ("lats", Literal["best", "last"], "did you mean 'last'?"),
    ([1], Literal["aa", "bb"], "expected one of aa, bb"),
    (3, tuple[int, ...], "config.x=3: expected whole numbers"),
    ([1], tuple[int, int], "config.x=[1]: expected 2 whole numbers"),
    ([1, "b"], tuple[int, ...], "config.x[1]='b': expected a whole number"),
    ("x", float | tuple[float, ...], "config.x='x': expected a number or numbers"),
    ([1, "b"], float | tuple[float, ...], "config.x[1]='b': expected a number"),
    ("x", int | None, "config.x='x': expected a whole number or None"),
    (3, dict[str, Any], "config.x=3: expected a section"),
    (3, str | os.PathLike[str] | None, "config.x=3: expected a text or None"),
    ("l3", Norm, "config.x='l3': expected one of l1, l2, linf"),
    (2, Norm, "config.x=2: expected one of l1, l2, linf"),
    ("drl", Loss, "did you mean 'dlr'?"),
    ("etc", Estimator | None, "config.x.name='etc': expected one of eot, exact"),
    ({"draws": 3}, Estimator | None, "expected a section with a name"),
    ({"name": "eot", "drws": 3}, Estimator | None, "did you mean 'draws'?"),
]


@pytest.mark.parametrize("value, annotation, says", WRONG)
def test_wrong_values_are_told(value, annotation, says):
    refused(lambda: schema.convert("config.x", value, annotation), says)


def test_estimators_are_made_by_name_and_by_section():
    made = schema.convert("config.x", "exact", Estimator | None)
    (value, aux), gradient = made(lambda key, x: (x @ x, x))(None, np.ones(3))
    assert value == 3.0
    assert callable(schema.convert("config.x", {"name": "eot", "draws": 3}, Estimator | None))
    np.testing.assert_array_equal(gradient, 2 * aux)


# --- whole configs ---------------------------------------------------------------------------


def test_defaults_are_filled_in():
    found = tree.plain(small(method=dict(name="adversarial", attack=PGD)))
    for column in (found["method"]["attack"], found["evaluation"]["attacks"]["pgd"]):
        assert column == dict(
            name="pgd", steps=2, step_size=None, restarts=1, loss="cross_entropy", estimator=None,
            start="uniform", climber="steepest", keep="best", goal="untargeted", start_scale=1.0,
        )  # fmt: skip
    assert found["method"]["batch_norm"] == "eval"
    assert found["network"]["mean"] == 0.0
    assert found["threat"]["norm"] == "linf"
    assert found["evaluation"]["images"] is None
    assert found["checkpoints"]["keep"] == 2
    assert found["validation"] is None
    assert found["seed"] == 0


def test_a_filled_config_stays_as_it_is():
    found = tree.plain(small(average=dict(decay=0.5)))
    assert tree.plain(tree.config(**found)) == found
    assert build.experiment(found).config == found


REGISTRIES = {"network": models, "method": methods, "optimiser": optimisers, "schedule": schedules}
MEMBERS = [(section, name) for section, m in REGISTRIES.items() for name in m.__all__]


@pytest.mark.parametrize("section, name", MEMBERS)
def test_every_default_of_every_member_can_be_built(section, name):
    """What a maker defaults to is also what a config may say: names, tuples and all."""
    needs: dict[str, Any] = {"schedule": dict(peak=0.1)}.get(section, {})
    if name == "piecewise":
        needs["at"] = (1, 2)
    filled = tree.plain(small(**{section: dict(name=name, **needs)}))[section]
    # Through JSON, as the folder of a run keeps it.
    filled = json.loads(json.dumps(filled))
    given = {
        "network": dict(classes=10),
        "method": dict(network=models.cnn(3), threat=None, attack=None),
        "optimiser": dict(schedule=lambda step: 0.1),
        "schedule": dict(total_steps=100, steps_per_epoch=10),
    }
    assert schema.make(f"config.{section}", REGISTRIES[section], filled, **given[section])


@pytest.mark.parametrize("name", attacks.__all__)
def test_every_default_of_every_attack_can_be_built(name):
    parameters = schema.parameters_of(getattr(attacks, name))
    needed = {key: 1 for key, p in parameters.items() if p.default is p.empty}  # steps
    column = dict(name=name, **needed)
    norm = dict(norm="l2", radius=0.5) if name == "ddn" else dict(norm="linf", radius=0.1)
    whole = small(threat=norm, evaluation=dict(attacks=dict(x=column)))
    found = json.loads(json.dumps(tree.plain(whole)))
    assert "x" in build.experiment(found).columns


CHANGES = [
    ("seed", "7", 7),
    ("training.epochs", "0.1", 0.1),
    ("evaluation.images", "5", 5),
    ("evaluation.attacks.pgd.step_size", "0.01", 0.01),
    ("evaluation.attacks.pgd.estimator", "{'name': 'eot', 'draws': 2}", dict(name="eot", draws=2)),
    ("evaluation.attacks.pgd.loss", "margin", "margin"),
    ("method.attack.step_size", "2/255", 2 / 255),
    ("threat.radius", "8/255", 8 / 255),
    ("network.widths", "(4, 8)", [4, 8]),
    ("network.mean", "(0.5,)", [0.5]),
    ("network.batch_norm", "true", True),
    ("augment.flip", "True", True),
    ("data.limit_test", "None", None),
    ("data.holdout", "8", 8),
    ("optimiser.clip", "1", 1),
    ("parallel.devices", "2", 2),
    ("average.decay", "0.9", 0.9),
    ("average", "None", None),
    ("validation.every_epochs", "0.5", 0.5),
]


@pytest.mark.parametrize("key, text, expected", CHANGES)
def test_every_kind_of_value_can_be_changed(key, text, expected):
    before = tree.plain(small(method=dict(name="adversarial", attack=PGD)))
    changes = [(key, cli.value_of(text))]
    if key.startswith("validation"):
        changes.append(("data.holdout", 8))
    after = tree.plain(tree.changed(before, changes))
    found: Any = after
    for name in key.split("."):
        found = found[name]
    assert found == expected
    assert build.experiment(after).config == after


def test_a_change_leaves_the_config_it_is_made_from():
    before = small()
    tree.changed(before, [("seed", 7), ("network.hidden", 3)])
    assert before.seed == 0
    assert before.network.hidden == 100


NATURAL = dict(name="natural", label_smoothing=0.0, mix="none", mix_alpha=1.0)


def test_another_name_drops_what_only_the_old_one_knew():
    before = small(method=dict(name="adversarial", attack=PGD, label_smoothing=0.1))
    after = tree.changed(before, [("method.name", "natural")])
    assert tree.plain(after)["method"] == {**NATURAL, "label_smoothing": 0.1}


def test_another_name_brings_its_own_defaults():
    """PGD's default start is no wish of the user's, so MI-FGSM keeps its own."""
    key = "evaluation.attacks.pgd"
    after = tree.changed(small(), [(f"{key}.decay", 0.5), (f"{key}.name", "mi_fgsm")])
    column = tree.plain(after)["evaluation"]["attacks"]["pgd"]
    assert column["start"] == "clean"
    assert (column["steps"], column["decay"]) == (2, 0.5)
    assert "keep" not in column
    build.experiment(after)


def test_another_name_does_not_excuse_unknown_keys():
    changes = [("network.name", "preact_resnet"), ("network.widht", 8)]
    refused(lambda: build.experiment(tree.changed(small(), changes)), "'width'")
    # Nor keys of the one that it replaces, where they are asked for now.
    changes = [("network.name", "preact_resnet"), ("network.hidden", 8)]
    refused(lambda: build.experiment(tree.changed(small(), changes)), "config.network.hidden")


def test_another_method_keeps_the_attack_and_one_may_be_added():
    key = "method.attack"
    after = tree.changed(small(), [("method.name", "adversarial"), (f"{key}.name", "pgd"),
                                    (f"{key}.steps", 3)])  # fmt: skip
    assert tree.plain(after)["method"]["attack"]["steps"] == 3
    build.experiment(after)


def test_columns_can_be_added_and_taken_out():
    key = "evaluation.attacks"
    changes = [(f"{key}.pgd", None), (f"{key}.weak.name", "fgsm"), (f"{key}.weak.start", "uniform")]
    assert list(build.experiment(tree.changed(small(), changes)).columns) == ["weak"]


def test_what_a_text_on_the_command_line_means():
    means = {"8/255": 8 / 255, "-1/2": -0.5, "1e-3": 1e-3, "true": True, "False": False,
             "None": None, "(1, 2)": (1, 2), "[1]": [1], "pgd": "pgd", "a/b": "a/b",
             "1/0": "1/0", "": "", "'8'": "8", "nan": "nan", "tfds:mnist": "tfds:mnist",
             "{1}": "{1}"}  # fmt: skip
    for text, value in means.items():
        assert cli.value_of(text) == value
        assert type(cli.value_of(text)) is type(value)


def test_names_become_objects():
    evaluation = dict(attacks=dict(pgd=dict(PGD, loss="dlr", estimator=dict(name="eot", draws=2))))
    found = build.experiment(small(threat=dict(norm="l2", radius=1.5), evaluation=evaluation))
    assert found.threat.norm is norms.l2
    assert found.threat.radius == 1.5
    assert found.network.classes == 10
    assert found.optimiser(100, 10).init is not None
    assert found.average(100, 10) is None
    assert set(found.columns) == {"pgd"}


def test_building_compiles_nothing():
    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: seen.append(name))
    jax.clear_caches()
    build.experiment(small(method=dict(name="adversarial", attack=PGD), average={}))
    seen = [name for name in seen if "mlir" in name or "backend" in name]
    assert not seen


@pytest.mark.parametrize(("dtype", "size"), [(np.uint8, 1), (np.float32, 4)])
def test_a_gigabyte_is_a_gigabyte_of_bytes(dtype, size, monkeypatch):
    experiment = build.experiment(small())
    images, labels = np.zeros((64, 8, 8, 1), dtype), np.arange(64) % 10
    train = data.from_arrays(images, labels, name="black")
    experiment = experiment._replace(splits=experiment.splits._replace(train=train))
    monkeypatch.setattr(step_programs, "RESIDENT_BYTES", 64 * 64 * size)
    assert step_programs.is_resident(experiment)
    monkeypatch.setattr(step_programs, "RESIDENT_BYTES", 64 * 64 * size - 1)
    assert not step_programs.is_resident(experiment)


def test_the_resolved_config_goes_through_json():
    config = small(network=dict(name="cnn", widths=(4, 8), mean=(0.5,)), average=dict(decay=0.5))
    found = build.experiment(config).config
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert build.experiment(again).config == found


def test_a_twin_has_other_sections_and_their_defaults():
    config = small(
        method=dict(name="adversarial", attack=PGD),
        twin=dict(method=dict(name="natural"), threat=dict(radius=0.2)),
    )
    found = tree.twin(config)
    assert found is not None
    assert found["twin"] is None
    assert found["method"] == NATURAL
    assert found["threat"] == dict(norm="linf", radius=0.2)
    own = tree.plain(config)
    same = set(own) - {"twin", "method", "threat"}
    assert {name: found[name] for name in same} == {name: own[name] for name in same}
    build.experiment(found)
    assert tree.twin(small()) is None
    assert tree.twin(small(twin={})) is None
    refused(lambda: tree.twin(small(twin=dict(seed=1))), "seed")
    refused(lambda: tree.twin(small(twin=5)), "config.twin=5", "section")


def blank(
    name: str, *, data_dir: str | None = None, holdout: int = 0, resize: int | None = None,
    limit_train: int | None = None, limit_test: int | None = None,
    extra: str | None = None, extra_fraction: float = 0.7,
) -> data.Splits:  # fmt: skip
    """As many black images as the data set has, without the memory."""
    shape = (28, 28, 1) if "mnist" in name else (32, 32, 3)
    shape = shape if resize is None else (resize, resize, shape[-1])

    def source(size: int) -> data.Source:
        images = np.broadcast_to(np.uint8(0), (size, *shape))
        return data.from_arrays(images, np.arange(size) % 10, name=name, classes=10)

    train = source((limit_train or 50_000) - holdout)
    return data.Splits(train, source(holdout) if holdout else None, source(limit_test or 10_000))


@pytest.mark.parametrize("path", commands.CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = cli.load_config(str(path))
    config = tree.changed(loaded, commands.without_runs(loaded))
    wholes = [tree.plain(config)]
    if (other := tree.twin(config)) is not None:
        wholes.append(other)
    for whole in wholes:
        try:
            built = build.experiment(whole)
        except UsageError as error:
            # The rest of it can be built on images of that shape that nobody had to fetch.
            # stl10_part is a cut of our own, that TFDS has not heard of until it is prepared.
            if "not prepared" not in str(error) and "knows no data set" not in str(error):
                raise
            monkeypatch.setattr(data, "load", blank)
            built = build.experiment(whole)
        assert json.loads(json.dumps(built.config)) == built.config
        assert path.stem != "quickstart" or built.splits.train.name == "digits"
    text = path.read_text()
    assert f"--config=experiments/configs/{path.name}" in text, "opens with its own command"


# --- Free-AT and AWP --------------------------------------------------------------------------


def test_weights_are_perturbed_around_any_method():
    config = small(
        network=dict(name="cnn", widths=(4,), hidden=8),
        method=dict(
            name="trades", attack={**PGD, "loss": "kl", "start": "normal"}, awp=dict(gamma=0.01)
        ),
    )
    experiment = build.experiment(config)
    assert isinstance(experiment.objective, Staged)
    plain = build.experiment(tree.changed(config, [("method.awp", None)]))
    shape = experiment.splits.train.shape
    images = np.random.default_rng(0).uniform(size=(4, *shape)).astype(np.float32)
    batch = Batch(images, np.arange(4), np.arange(4), np.ones(4, bool))
    params = drawn.of(experiment.network, shape)["params"]

    @jax.jit
    def both(params, key):
        return [one.objective(params, {}, key, batch)[0] for one in (experiment, plain)]

    perturbed, left = both(params, jax.random.key(0))
    assert float(perturbed) > float(left)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("method.awp", dict(gama=0.1)), "did you mean 'gamma'"),
        (("method.awp", dict(gamma=-1.0)), "config.method.awp.gamma=-1.0"),
        (("method.awp", 0.1), "expected a section"),
        (("training.replays", 0), "config.training.replays=0"),
    ],
)
def test_mistakes_in_them_are_told(change, says):
    with pytest.raises(UsageError, match=says):
        build.experiment(tree.changed(small(), [change]))


def test_replays_are_of_natural_training():
    method, training = dict(name="adversarial", attack=PGD), dict(batch_size=32, replays=2)
    says = "config.training.replays=2: expected 1 beside the method 'adversarial'"
    refused(lambda: build.experiment(small(method=method, training=training)), says)
    assert build.experiment(small(training=training)).training.replays == 2


@pytest.mark.structure
def test_replays_are_steps_of_the_schedule_and_are_restored(tmp_path, capsys):
    config = tree.changed(
        small(network=dict(name="cnn", widths=(4,), hidden=8)),
        [("training.replays", 3), ("training.epochs", 0.5), ("method", dict(name="natural")),
         ("evaluation.images", 8), ("evaluation.checks", False), ("parallel.devices", 1)],
    )  # fmt: skip
    train.main(config, tmp_path / "run")
    lines = commands.metrics(tmp_path / "run")
    experiment = build.experiment(config)
    plan = step_programs.plan_of(experiment)
    assert lines[-1]["step"] == plan.total
    train.main(config, tmp_path / "run")
    assert f"goes on from step {plan.total}" in capsys.readouterr().out
