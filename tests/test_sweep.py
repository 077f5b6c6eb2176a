"""Sweeps: one program for all numbers, the verdicts of separate evaluations, and no work twice."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import commands
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sweep
from experiments.cli import load_config
from experiments.pages import load, studies
from experiments.sweeping import grid, ledger, plan, told
from rain_jax import attacks, data, evaluation, models, norms
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.config import build, networks, schema, tree
from rain_jax.defences import jpeg
from rain_jax.defences.network import in_front
from rain_jax.evaluation.record import counted
from rain_jax.image import standard_tables
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import evaluating, loading
from rain_jax.runs.session import items_of, no_sums
from rain_jax.runs.step_programs import plan_of
from rain_jax.types import Batch, Threat

COUNT = 40
RADII = (0.02, 0.06, 0.12)


def base(**sections) -> dict[str, Any]:
    return tree.plain(tree.config(
        **{
            "seed": 3,
            "data": dict(name="digits", limit_train=640, limit_test=COUNT),
            "network": dict(name="cnn", widths=(4,), hidden=16),
            "threat": dict(norm="linf", radius=0.1),
            "method": dict(name="natural"),
            "optimiser": dict(name="sgd", momentum=0.9),
            "schedule": dict(name="constant", peak=0.1),
            "parallel": dict(devices=1),
            "evaluation": dict(
                attacks=dict(pgd=dict(name="pgd", steps=4, step_size=0.02)),
                # One shape: there is no smaller one to move into.
                batch_size=7, checks=False,
            ),
            **sections,
        }
    ))  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a small network that knows its digits; as `experiments.train` leaves it."""
    experiment = build.experiment(base())
    method = experiment.method(plan_of(experiment))
    images, labels = experiment.splits.train.arrays
    variables = drawn.of(experiment.network, experiment.splits.train.shape)

    @jax.jit
    def learned(variables):
        count = len(labels)
        everyone = Batch(data.as_float(images), labels, jnp.arange(count), jnp.ones(count, bool))
        state = method.init(variables)
        keys = jax.random.split(jax.random.key(1), 60)
        return jax.lax.scan(lambda s, k: (method.step(k, s, everyone)[0], None), state, keys)[0]

    state = learned(variables)
    folder = tmp_path_factory.mktemp("trained") / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(experiment.config))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(0, *items_of(state, no_sums(experiment, method, state)))
        checkpoints.wait()
    return folder


def asked(*arguments: str, sections: dict[str, Any] | None = None) -> grid.Asked:
    """What the command line says."""
    pairs = [argument.partition("=")[::2] for argument in arguments]
    return grid.changed(sections or {}, [(key, grid.value_of(text)) for key, text in pairs])


def swept(trained: Path, folder: Path, *arguments: str) -> tuple[dict[str, Any], np.ndarray]:
    """The record of a sweep and its verdicts [cells, images]."""
    folder.mkdir(exist_ok=True)
    sweep.main(asked(*arguments, f"sweep.axes.run={trained}"), folder)
    record = json.loads((folder / "sweep.json").read_text())
    with np.load(folder / "sweep.npz") as found:
        return record, found["stands"]


def evaluated(trained: Path, changes: list[tuple[str, Any]], variables: Any = None) -> np.ndarray:
    """What an evaluation says of the same settings, image by image."""
    experiment = build.experiment(tree.changed(json.loads(
        (trained / "config.json").read_text()), changes))  # fmt: skip
    if variables is None:
        variables, _ = loading.restore(experiment, trained)
    return evaluating.evaluation_of(experiment, variables, "alone")().robust["pgd"]


NUMBERS = [
    f"sweep.axes.threat.radius={','.join(map(str, RADII))}",
    "sweep.axes.evaluation.attacks.pgd.steps=2,6",
    "sweep.axes.seed=3,4",
]


@pytest.fixture(scope="module")
def numbers(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    return swept(trained, folder, *NUMBERS), folder


def test_cells_are_those_of_separate_evaluations(trained, numbers):
    (record, stands), _ = numbers
    assert len(record["cells"]) == len(stands) == 12
    assert 0.05 < np.mean(stands) < 0.95
    for radius, steps, seed in ((0.06, 6, 3), (0.12, 2, 4)):
        number = next(
            place for place, cell in enumerate(record["cells"])
            if (cell["radius"], cell["steps"], cell["seed"]) == (radius, steps, seed)
        )  # fmt: skip
        alone = evaluated(trained, [
            ("threat.radius", radius), ("evaluation.attacks.pgd.steps", steps), ("seed", seed)
        ])  # fmt: skip
        np.testing.assert_array_equal(stands[number], alone)
        assert record["cells"][number]["right"] == np.sum(alone)


def test_images_are_rounded_as_in_an_evaluation(trained, tmp_path):
    """And nobody leaves before the end, for rounding may undo what was just enough."""
    _, stands = swept(
        trained, tmp_path, "evaluation.eight_bit=True", "sweep.axes.threat.radius=0.06,0.03137"
    )
    for number, radius in enumerate((0.06, 0.03137)):
        changes = [("threat.radius", radius), ("evaluation.eight_bit", True)]
        np.testing.assert_array_equal(stands[number], evaluated(trained, changes))


def test_numbers_are_data_and_cost_no_programs(trained, numbers, tmp_path):
    (record, _), _ = numbers
    assert record["data_axes"] == ["radius", "steps"]
    assert record["programs"]["groups"] == 1
    one, _ = swept(trained, tmp_path, "sweep.axes.threat.radius=0.05")
    # Begin, fill, advance and judge.
    assert one["programs"]["compilations"] == record["programs"]["compilations"] == 4


def test_draws_are_shapes_and_a_defence_stands_in_front(trained, tmp_path):
    told_ = ["defence.name=gaussian_noise", "evaluation.draws=4", f"evaluation.images={COUNT // 2}"]
    record, stands = swept(
        trained, tmp_path, *told_, "evaluation.attacks.pgd.estimator.name=eot",
        "sweep.axes.evaluation.attacks.pgd.estimator.draws=1,3",
        "sweep.axes.defence.scale=0.05,0.4",
    )  # fmt: skip
    assert record["data_axes"] == ["scale"]
    assert record["programs"]["groups"] == 2
    assert record["draws"] == [4]
    assert np.any((stands > 0) & (stands < 1))
    cell = record["cells"][3]
    assert (cell["draws"], cell["scale"]) == (3, 0.4)
    whole = asked(*told_, "sweep.axes.seed=3", f"sweep.axes.run={trained}")
    made = plan.Plan(whole, tmp_path)
    variables = made.variables(made.resolved[0])
    alone = evaluated(trained, [
        ("defence", dict(name="gaussian_noise", scale=0.4)), ("evaluation.draws", 4),
        ("evaluation.images", COUNT // 2),
        ("evaluation.attacks.pgd.estimator", dict(name="eot", draws=3)),
    ], variables)  # fmt: skip
    np.testing.assert_allclose(stands[3], alone, atol=1e-6)


def test_corruptions_are_an_axis_and_cost_no_programs(trained, tmp_path):
    section = "evaluation.corruption"
    record, stands = swept(
        trained, tmp_path, f"sweep.axes.{section}.family=gaussian_noise,contrast",
        f"sweep.axes.{section}.severity=1,5", f"evaluation.images={COUNT // 2}",
    )  # fmt: skip
    assert record["programs"]["groups"] == 1
    assert record["programs"]["compilations"] == 4
    cells = [(cell["family"], cell["severity"]) for cell in record["cells"]]
    assert cells == [(f, s) for f in ("gaussian_noise", "contrast") for s in (1, 5)]
    clean = [cell["clean"]["accuracy"] for cell in record["cells"]]
    assert clean[3] < clean[2]  # whatever was learnt: little is left of contrast
    margins = [cell["attack"]["mean_margin"] for cell in record["cells"]]
    assert len(set(margins)) == 4, "every cell has images of its own"
    for number in (1, 2):
        family, severity = cells[number]
        alone = evaluated(trained, [
            (section, dict(family=family, severity=severity)), ("evaluation.images", COUNT // 2)
        ])  # fmt: skip
        np.testing.assert_array_equal(stands[number], alone)


def test_the_reach_of_a_shift_is_data(trained, tmp_path):
    rain = dict(name="rain", down="bicubic", upscaler=dict(name="bicubic"))
    fixed = [("evaluation.draws", 4), ("evaluation.images", COUNT // 2)]
    record, stands = swept(
        trained, tmp_path, "defence.name=rain", "defence.down=bicubic",
        "defence.upscaler.name=bicubic", *(f"{key}={value}" for key, value in fixed),
        "sweep.axes.defence.reach=0.15,0.3",
    )  # fmt: skip
    assert record["data_axes"] == ["reach"]
    assert record["programs"]["groups"] == 1
    made = plan.Plan(asked(f"sweep.axes.run={trained}", "sweep.axes.seed=3", "defence.name=rain",
                           "defence.down=bicubic", "defence.upscaler.name=bicubic",
                           "defence.reach=0.3"), tmp_path)  # fmt: skip
    variables = made.variables(made.resolved[0])
    alone = evaluated(trained, [("defence", {**rain, "reach": 0.3}), *fixed], variables)
    np.testing.assert_allclose(stands[1], alone, atol=1e-6)


def test_runs_are_an_axis_and_one_draw_of_a_random_model_is_flagged(trained, tmp_path):
    twin = shutil.copytree(trained, tmp_path / "twin")
    noisy = ["defence.name=gaussian_noise", "defence.scale=0.2", "evaluation.draws=1"]
    few = [f"evaluation.images={COUNT // 2}", "sweep.axes.evaluation.attacks.pgd.steps=2,4"]
    (tmp_path / "out").mkdir()
    sweep.main(
        asked(*noisy, *few, f"sweep.axes.run={trained},{twin}", "sweep.axes.seed=3"),
        tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    cells = {(cell["run"], cell["steps"]): cell["right"] for cell in record["cells"]}
    assert len(cells) == 4
    # The same weights, by the same program.
    assert record["programs"]["groups"] == 1
    for steps in (2, 4):
        assert cells[str(trained), steps] == cells[str(twin), steps]
    assert record["flagged"]
    failed = [check["name"] for check in record["checks"] if not check["passed"]]
    assert failed == ["a random model is judged by several draws"]


def test_tables_follow_their_swept_quality(trained, tmp_path):
    """Tables are variables, and a checkpoint holds those of one quality alone."""
    record, stands = swept(
        trained, tmp_path, "defence.name=jpeg", "sweep.axes.defence.quality=2,90",
        f"evaluation.images={COUNT // 2}",
    )  # fmt: skip
    assert record["data_axes"] == ["quality"]
    clean = [cell["clean"]["accuracy"] for cell in record["cells"]]
    assert clean[0] < clean[1]
    changes = ["defence.name=jpeg", "defence.quality=2", "sweep.axes.seed=3"]
    made = plan.Plan(asked(*changes, f"sweep.axes.run={trained}"), tmp_path)
    alone = evaluated(
        trained,
        [("defence", dict(name="jpeg", quality=2)), ("evaluation.images", COUNT // 2)],
        made.variables(made.resolved[0]),
    )
    np.testing.assert_array_equal(stands[0], alone)


def test_fixed_collections_follow_the_settings_and_weights_stay():
    shape = (8, 8, 1)
    classifier = models.cnn(10, widths=(4,), hidden=16)
    low, high = (in_front(jpeg(quality=quality), classifier) for quality in (10, 90))
    variables = drawn.of(low, shape)
    found = networks.followed(high, variables, shape)
    luma, chroma = standard_tables(90)
    tables = found["frozen"]["defence"]["tables"]
    np.testing.assert_array_equal(tables["luma"], luma)
    np.testing.assert_array_equal(tables["chroma"], chroma)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])
    assert jax.tree.structure(found) == jax.tree.structure(variables)


def assert_same(one, other):
    """What is said of the model; steps until an image is let go turn on who was beside it."""
    kept = [
        [{k: v for k, v in c.items() if k != "attack"} for c in r["cells"]] for r in (one, other)
    ]
    assert kept[0] == kept[1]


def test_a_killed_sweep_goes_on(trained, numbers, tmp_path, monkeypatch):
    (record, stands), _ = numbers
    append, written = sweep.append, []

    def dying(path, line):
        if len(written) == 5:
            raise KeyboardInterrupt
        append(path, line)
        written.append(line["cell"])

    monkeypatch.setattr(sweep, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        swept(trained, tmp_path, *NUMBERS)
    assert not (tmp_path / "sweep.json").exists()
    with (tmp_path / "sweep.jsonl").open("a") as file:
        file.write('{"of": "half a li')
    rest = []
    monkeypatch.setattr(sweep, "append", lambda p, one: (append(p, one), rest.append(one["cell"])))
    again, verdicts = swept(trained, tmp_path, *NUMBERS)
    assert len(rest) == 12 - 5
    assert all(cell not in written for cell in rest)
    np.testing.assert_array_equal(verdicts, stands)
    assert_same(again, record)


def test_shares_are_merged_by_whoever_is_last(trained, numbers, tmp_path):
    (record, stands), _ = numbers
    for number in (2, 1):
        assert not (tmp_path / "sweep.json").exists()
        sweep.main(
            asked(*NUMBERS, f"sweep.axes.run={trained}", f"sweep.shard=({number}, 2)"), tmp_path
        )
        lines = (tmp_path / f"sweep.{number}of2.jsonl").read_text().splitlines()
        assert len(lines) == 6
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert_same(found, record)
    with np.load(tmp_path / "sweep.npz") as verdicts:
        np.testing.assert_array_equal(verdicts["stands"], stands)


def test_another_sweep_is_replaced_with_a_word(tmp_path):
    path = tmp_path / "sweep.json"
    record = {"axes": {"radius": [0.1, 0.2], "seed": (1, 2)}}
    assert sweep._replaced(path, record) == []
    path.write_text(json.dumps(record))
    assert sweep._replaced(path, record) == []
    assert sweep._replaced(path, {"axes": {"radius": [0.1]}}) == [
        f"{tmp_path} held another sweep, over radius, seed; it is replaced"
    ]


def test_nothing_of_another_sweep_is_taken(trained, numbers):
    _, folder = numbers
    one = plan.Plan(asked(*NUMBERS, f"sweep.axes.run={trained}"), folder)
    other = plan.Plan(
        asked(*NUMBERS, f"sweep.axes.run={trained}", "evaluation.attacks.pgd.step_size=0.03"),
        folder,
    )
    known = ledger.read(folder)
    assert all(one.identity(number) in known for number in range(12))
    assert not any(other.identity(number) in known for number in range(12))


def test_warm_radii_find_what_cold_ones_find_with_fewer_passes(trained, numbers, tmp_path):
    (cold, alone), _ = numbers
    steps = "evaluation.attacks.pgd.steps=6"
    warm, stands = swept(trained, tmp_path, NUMBERS[0], steps, "sweep.warm=true")
    same = [n for n, cell in enumerate(cold["cells"]) if (cell["steps"], cell["seed"]) == (6, 3)]
    np.testing.assert_array_equal(stands[0], alone[same[0]])
    assert np.all(np.diff(stands, axis=0) <= 0)
    # An ascent that goes on has been on its way for longer.
    differs = np.sum(stands, axis=1) - np.sum(alone[same], axis=1)
    assert np.all((differs <= 1) & (differs >= -8))
    spent = sum(cold["cells"][number]["attack"]["backward_passes"] for number in same)
    assert warm["passes"]["backward"] < 0.9 * spent
    assert warm["programs"]["groups"] == 1


def test_going_on_begins_where_it_is_told():
    threat = Threat(norms.linf, 0.1)
    image, told_ = jnp.full((4, 4, 1), 0.5), jnp.full((4, 4, 1), 0.9)
    model = lambda key, x: jnp.stack([jnp.sum(x), 0.0])
    for restarts, warm in ((1, True), (3, True), (1, False)):
        attack = attacks.pgd(threat, steps=2, restarts=restarts)
        values = {"start": told_, "warm": jnp.bool_(warm)}
        arguments = jax.random.key(0), model, image, 0
        state = plan.going_on(attack, threat, values).init(*arguments)
        begun = np.reshape(state.image, (-1, 4, 4, 1))
        own = np.reshape(attack.init(*arguments).image, (-1, 4, 4, 1))
        np.testing.assert_allclose(begun[0], 0.6 if warm else own[0], atol=1e-6)
        np.testing.assert_array_equal(begun[1:], own[1:])


def linear(variables):
    return lambda key, image: jnp.stack([jnp.sum(variables * image) - 0.1, 0.0])


def test_lanes_have_their_own_radius_and_steps():
    """On a linear model the margin after an attack is known: steps x size, or the radius."""
    on = place("shard_map", choose_devices(1))
    weights = jnp.full((3, 3, 1), 0.1)
    images = np.full((2, 3, 3, 1), 0.5, np.float32)
    radii, steps = np.float32([0.1, 0.1, 0.3, 0.3]), np.int32([1, 9, 2, 9])

    def attack_of(values):
        return attacks.pgd(Threat(norms.linf, values["radius"]), steps=values["steps"],
                           step_size=0.05, start="clean")  # fmt: skip

    def batches():
        for radius, count in zip(radii, steps, strict=True):
            values = {"radius": np.full(2, radius), "steps": np.full(2, count)}
            yield evaluation.Lanes(images, np.zeros(2, np.int32), np.arange(2), np.ones(2, bool),
                                   values, values["steps"])  # fmt: skip

    model_of = lambda variables, values: linear(variables)
    rules_of = lambda values: evaluation.Rules(Threat(norms.linf, values["radius"]))
    drive = evaluation.packed_lanes(attack_of, model_of, on, batch_size=5)
    judge = evaluation.judging_lanes(model_of, rules_of, on, batch_size=3)
    key, seen = jax.random.key(0), {}
    for some in judge(weights, key, drive(weights, key, batches())):
        for row, radius in enumerate(some.values["radius"]):
            lane = float(radius), int(some.values["steps"][row])
            seen.setdefault(lane, []).append(
                (some.judgement.distance[row], some.judgement.allowed[row], some.steps[row])
            )
    for radius, count in zip(radii.tolist(), steps.tolist(), strict=True):
        assert len(seen[radius, count]) == 2
        for distance, allowed, taken in seen[radius, count]:
            assert distance == pytest.approx(min(radius, 0.05 * count), abs=1e-6)
            assert allowed
            assert taken == count


def test_what_broke_at_a_radius_is_broken_at_larger_ones():
    cells = [{"threat.radius": r, "seed": s} for r in (0.3, 0.1, 0.2) for s in (0, 1)]
    rights = {0: [1, 0, 1], 2: [1, 1, 0], 4: [0, 1, 1]}
    stands = {n: np.float32(rights.get(n, [1, 1, 1])) for n in range(6)}
    found = told.closed(cells, "threat.radius", stands)
    np.testing.assert_array_equal(found[2], [1, 1, 0])
    np.testing.assert_array_equal(found[4], [0, 1, 0])
    np.testing.assert_array_equal(found[0], [0, 0, 0])
    np.testing.assert_array_equal(found[1], [1, 1, 1])


@pytest.mark.parametrize(
    ("accuracies", "passed"), [((0.9, 0.5, 0.1), True), ((0.5, 0.51, 0.5), True),
                               ((0.3, 0.9, 0.1), False)]
)  # fmt: skip
def test_a_curve_that_rises_beyond_chance_is_flagged(accuracies, passed):
    cells = [{"threat.radius": r} for r in RADII]
    found = [{"radius": c["threat.radius"], "accuracy": a, "of": 100}
             for c, a in zip(cells, accuracies, strict=True)]  # fmt: skip
    (check,) = told.checks(cells, {"threat.radius": "radius"}, found, ["threat.radius"])
    assert check.passed == passed
    assert passed or "0.02" in check.told


def test_the_report_shows_it(numbers):
    (record, _), folder = numbers
    run = load.load([folder])[0]
    (exhibit,) = studies.studies(run)
    assert exhibit.table.headers == ("radius", "steps", "seed", "run", "accuracy, %")
    assert len(exhibit.table.rows) == len(record["cells"])
    assert (folder / "sweep.png").stat().st_size > 1000
    head, _, *lines = told.printed(record).splitlines()
    assert head.split() == ["steps", "2", "steps", "6"]
    assert len(lines) == 6


def drawn_lines(monkeypatch, tmp_path, axes, accuracy):
    """What the figure of a sweep draws: {label: (values, accuracies)} of its lines, and its x."""
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    names = list(axes)
    cells = [
        dict(zip(names, place, strict=True)) | {"interval_95": [0.0, 1.0]}
        for place in itertools.product(*axes.values())
    ]
    cells = [cell | {"accuracy": accuracy(cell)} for cell in cells]
    told.figure(tmp_path / "s.png", {"axes": axes, "cells": cells, "flagged": False})
    (ax,) = figures[0].axes
    found = {line.get_label(): line.get_data() for line in ax.get_lines()}
    return found, ax.get_xlabel()


def test_a_cell_that_is_withheld_is_told_and_not_drawn(tmp_path):
    """As a ladder's is whose checks fail: it has no accuracy but that of clean images."""
    row = counted(np.arange(10) < 4)
    cells = [{"seed": 0, **row, "clean": row}, {"seed": 1, "clean": row}]
    record = {"axes": {"seed": [0, 1]}, "cells": cells, "flagged": True, "checks": []}
    _, _, first, second = told.printed(record).splitlines()
    assert first.split()[:3] == ["seed", "0", "40.0"]
    assert second.split() == ["seed", "1", "withheld", "!"]
    told.figure(tmp_path / "s.png", record)
    assert studies._measured(record) == cells[:1]


def test_seeds_are_one_line_and_other_values_one_each(monkeypatch, tmp_path):
    axes = {"radius": [0.2, 0.1], "seed": [0, 1, 2], "draws": [1, 8], "run": ["a", "b"]}

    def accuracy(cell):
        return 0.9 - cell["radius"] - 0.01 * cell["draws"] - 0.1 * (cell["run"] == "b") + (
            0.03 * (cell["seed"] - 1)
        )  # fmt: skip

    found, label = drawn_lines(monkeypatch, tmp_path, axes, accuracy)
    assert sorted(found) == [f"draws {d}, run {r}" for d in (1, 8) for r in "ab"]
    values, means = found["draws 8, run b"]
    np.testing.assert_allclose(values, [0.1, 0.2])
    np.testing.assert_allclose(means, [62.0, 52.0])
    assert label == "radius (mean of 3 seeds, their range shaded)"


def test_lines_too_many_to_tell_apart_are_named_by_one_axis(monkeypatch, tmp_path):
    axes = {"radius": [0.1, 0.2], "draws": [1, 8], "steps": list(range(6))}
    found, label = drawn_lines(monkeypatch, tmp_path, axes, lambda cell: 0.5)
    assert {name for name in found if not name.startswith("_")} == {"draws 1", "draws 8"}
    assert label == "radius (95 % interval shaded)"


@pytest.mark.parametrize(("values", "expected"), [
    ((0.001, 0.01, 0.1, 1.0), True), ((1, 2, 4, 8, 16), True), ((0.1, 0.3, 0.5, 0.7, 0.9), False),
    ((0.0, 0.1, 1.0), False), ((1, 100), False),
])  # fmt: skip
def test_factors_are_told_from_steps(values, expected):
    assert told.geometric(values) == expected


def test_trained_cells_are_runs_of_their_own(tmp_path, monkeypatch, capsys):
    """Training itself has tests of its own: here it leaves what it leaves."""
    trained_now = []

    def train(config, folder):
        trained_now.append(folder.name)
        right = 5 * config.seed
        row = counted(np.arange(20) < right)
        checks = [dict(name="so", passed=config.seed == 1, told="or not")]
        record = dict(
            worst_case=row, clean=row, data="digits", images=20, checks=checks, flagged=False
        )
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(tree.plain(config)))
        (folder / "evaluation.json").write_text(json.dumps(record))

    monkeypatch.setattr(sweep.train, "main", train)
    axes = ["sweep.train=true", "sweep.axes.seed=1,2", "sweep.axes.optimiser.weight_decay=0.0"]
    sweep.main(asked(*axes, "sweep.shard=(2, 2)", sections=base()), tmp_path)
    assert trained_now == ["seed=2,weight_decay=0.0"]
    assert not (tmp_path / "sweep.json").exists()
    sweep.main(asked(*axes, sections=base()), tmp_path)
    assert trained_now == ["seed=2,weight_decay=0.0", "seed=1,weight_decay=0.0"]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [(cell["seed"], cell["accuracy"]) for cell in record["cells"]] == [(1, 0.25), (2, 0.5)]
    assert "FLAG, does not hold: so (or not), seed 2, weight_decay 0.0" in capsys.readouterr().out
    # Under other settings what lies there is another run's.
    other = [*axes, "threat.radius=0.2"]
    monkeypatch.setattr(sweep.train, "main", lambda config, folder: trained_now.append("again"))
    sweep.main(asked(*other, sections=base()), tmp_path)
    assert trained_now[2:] == ["again", "again"]


def test_units_are_shared_out_once_and_alike():
    units = [[number] for number in range(11)]
    shares = [grid.share(units, (i, 4)) for i in (1, 2, 3, 4)]
    assert [unit for share in shares for unit in share] == units
    assert {len(share) for share in shares} == {2, 3}


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("sweep_radius.py", 16),
        ("sweep_tradeoff.py", 12),
        ("sweep_tradeoff.py:trades", 12),
        ("sweep_tradeoff.py:pgd_at", 3),
    ],
)
def test_the_examples_describe_sweeps(name, cells):
    config = load_config(str(commands.ROOT / "experiments" / "configs" / name))
    found = grid.changed(config, [])
    assert len(found.cells) == cells
    cell = grid.config_of(found, found.cells[-1], base())
    # These are the digits, and few: all of them.
    build.experiment(tree.changed(cell, [("evaluation.images", None)]))
    if name == "sweep_radius.py":
        assert cell["threat"]["radius"] == pytest.approx(16 / 255)


def test_values_are_read_as_they_are_typed():
    found = asked("sweep.axes.threat.radius=8/255,16/255", "sweep.axes.seed=(1, 2)",
                  "sweep.axes.run=runs/a/,b", "sweep.axes.defence.radius=3").sweep.axes  # fmt: skip
    assert found["threat.radius"] == [8 / 255, 16 / 255]
    assert found["seed"] == [1, 2]
    assert found["run"] == ["runs/a", "b"]
    names = asked("sweep.axes.threat.radius=1,2", "sweep.axes.defence.radius=3,4").names
    assert names == {"threat.radius": "threat.radius", "defence.radius": "defence.radius"}
    assert sweep.arguments(["x", "--shard=2/8"]) == ["x", "--config.sweep.shard=(2, 8)"]
    pairs = asked("sweep.axes.threat.radius=1,2", "sweep.axes.seed=3,4", "sweep.together=true")
    assert pairs.cells == [{"threat.radius": 1, "seed": 3}, {"threat.radius": 2, "seed": 4}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sweep.axes is missing"),
        (["sweep.axes.threat.radius=0.1,0.1"], "none twice"),
        (["sweep.axes.threat.radius="], "one value at least"),
        (["sweep.axes.seed=1", "sweep.shard=(5, 4)"], "config.sweep.shard"),
        (["sweep.axes.seed=1", "sweep.shard=2/x"], "expected 2 whole numbers"),
        (["sweep.axes.seed=1", "sweep.warmm=true"], "did you mean 'warm'"),
        (["sweep.axes.seed=1,2", "sweep.axes.threat.radius=1", "sweep.together=true"],
         "one length"),
        (["sweep.axes.threat.radiu=0.1"], "did you mean 'radius'"),
        (["sweep.axes.threat.radius=0.1,8"], "did you mean 8/255"),
        (["sweep.axes.threat.radius=0.1,far"], "config.threat.radius='far'"),
        (["sweep.axes.method.c=0.1,0.2"], "are for training"),
        (["sweep.axes.seed=1", "sweep.warm=true"], "expected an axis threat.radius"),
        (["sweep.axes.seed=1", "sweep.attack=pdg"], "did you mean 'pgd'"),
        (["sweep.axes.threat.radius=0.1,0.2", "evaluation.attacks.pgd.radius=0.3"],
         "expected None beside"),
        (["sweep.axes.seed=1", "evaluation.attacks.more.name=fgsm"],
         "config.sweep.attack is missing"),
        (["sweep.axes.seed=1", "evaluation.attacks.pgd.through=run:other"], "a form of the model"),
    ],
)  # fmt: skip
def test_mistakes_are_met_before_anything_runs(trained, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        whole = asked(*arguments, *([f"sweep.axes.run={trained}"] if arguments else []))
        plan.Plan(whole, tmp_path).units()


def test_only_ascents_go_on(trained, tmp_path):
    with pytest.raises(UsageError, match="like pgd"):
        swept(
            trained, tmp_path, "sweep.axes.threat.radius=0.1,0.2", "sweep.warm=true",
            "evaluation.attacks.pgd.name=square", "evaluation.attacks.pgd.queries=10",
        )  # fmt: skip


@pytest.mark.parametrize(("annotation", "given", "passes"), [
    (float, 1, True), (float | None, 0.5, True), (int, 3, True), (int, 0.5, False),
    (str, 1, False), (bool, 1, False),
])  # fmt: skip
def test_traced_numbers_pass_where_numbers_do(annotation, given, passes):
    convert = jax.jit(lambda value: schema.convert("here", value, annotation))
    if passes:
        assert convert(given) == given
    else:
        with pytest.raises(UsageError, match="here"):
            convert(given)
