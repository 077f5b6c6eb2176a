"""Cells of a sweep that train side by side end as if each had been trained alone."""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import commands
import drawn
import jax
import numpy as np
import pytest

from experiments import evaluate, sweep, train
from experiments.sweeping import grid, side_by_side
from experiments.sweeping.side_by_side import Group, groups
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import session, step_programs
from rain_jax.training import Diverged

TOTAL, SAVES = 6, 2  # steps of `base`, and between checkpoints
CELLS = [dict(threshold=threshold, seed=seed) for threshold in (0.5, 0.2) for seed in (0, 1)]


def base(**sections) -> dict[str, Any]:
    return tree.plain(tree.config(
        **{
            "data": dict(name="digits", holdout=20, limit_train=96, limit_test=20),
            "network": dict(name="cnn", widths=(4,), hidden=8),
            "threat": dict(norm="linf", radius=0.1),
            "method": dict(name="sense", steps=1, step_size=0.05, warmup=0.4),
            "optimiser": dict(name="sgd", momentum=0.9, weight_decay=5e-4),
            "schedule": dict(name="one_cycle", peak=0.1),
            "average": dict(decay=0.9),
            "augment": dict(crop_padding=1),
            "training": dict(epochs=2, batch_size=32, log_every=2),
            "validation": dict(every_epochs=1, batch_size=20),
            "checkpoints": dict(every_epochs=2 / 3),
            "parallel": dict(devices=1),
            "evaluation": dict(
                attacks=dict(fgsm=dict(name="fgsm")), batch_size=20, checks=False, save_images=False
            ),
            **sections,
        }
    ))  # fmt: skip


def cells_of(folder: Path) -> list[Path]:
    names = [",".join(f"{key}={value}" for key, value in cell.items()) for cell in CELLS]
    return [folder / "cells" / name for name in names]


def swept(folder: Path, *arguments: str, **sections: Any) -> list[str]:
    """Trains the cells side by side; the names of what was compiled for it."""
    pairs = [("sweep.train", True), ("sweep.side_by_side", True)]
    pairs += [(key, grid.value_of(text)) for key, _, text in (a.partition("=") for a in arguments)]
    compiled: list[str] = []

    def heard(event: str, _: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        sweep.main(grid.changed(base(**sections), pairs), folder)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    return compiled


AXES = ("sweep.axes.method.threshold=0.5,0.2", "sweep.axes.seed=0,1")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, swept(folder, *AXES)


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*")} | {
        path.name for path in (folder / "checkpoints").glob("*")
    }


def test_members_share_what_they_learn_from_and_not_what_they_are_judged_by():
    spec = base()
    kinds = [dict(family="contrast", severity=severity) for severity in (1, 5)]
    made = [
        build.experiment({**spec, "evaluation": {**spec["evaluation"], "corruption": kind}})
        for kind in kinds
    ]
    held: dict[str, Any] = {}
    one, other = (side_by_side._sharing(experiment, held).splits for experiment in made)
    assert one.train is other.train
    assert one.valid is other.valid
    assert other.test is made[1].splits.test
    assert (one.test.name, other.test.name) == ("digits, contrast 1", "digits, contrast 5")


def test_members_end_as_if_each_were_alone(four, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "side_by_side", lambda *given: None)
    for place_of, cell in zip(cells_of(four[0]), CELLS, strict=True):
        own = tmp_path / place_of.name
        spec = tree.changed(
            base(), [("method.threshold", cell["threshold"]), ("seed", cell["seed"])]
        )
        train.main(spec, own)
        (step, found), (wanted, leaves) = commands.final(place_of), commands.final(own)
        assert step == wanted == TOTAL
        commands.assert_same(found, leaves)
        assert commands.metrics(place_of) == commands.metrics(own)
        assert tree.plain(json.loads((place_of / "config.json").read_text())) == json.loads(
            (own / "config.json").read_text()
        )
        assert entries(own) < entries(place_of)
    seen = [json.dumps(commands.metrics(place_of)) for place_of in cells_of(four[0])]
    assert len(set(seen)) == len(CELLS)


def test_the_step_is_compiled_once_for_all(four):
    _, compiled = four
    assert compiled.count("jit(dispatch)") == 1


def test_the_sweep_and_other_commands_know_the_members(four):
    folder, _ = four
    record = json.loads((folder / "sweep.json").read_text())
    assert [{key: cell[key] for key in CELLS[0]} for cell in record["cells"]] == CELLS
    one = cells_of(folder)[2]
    before = commands.results(one)
    evaluate.main(json.loads((one / "config.json").read_text()), one)
    assert commands.results(one) == before


def test_killed_between_the_saves_of_two_members_they_end_with_the_same_bits(
    four, tmp_path, monkeypatch
):
    save, count = Checkpoints.save, itertools.count()

    def dying(self, done, *arguments, **options):
        if done == TOTAL and next(count) == 2:
            raise KeyboardInterrupt
        save(self, done, *arguments, **options)

    monkeypatch.setattr(evaluate, "side_by_side", lambda *given: None)
    monkeypatch.setattr(Checkpoints, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, *AXES)
    ends = [max(int(p.name) for p in (place_of / "checkpoints").glob("[0-9]"))
            for place_of in cells_of(tmp_path)]  # fmt: skip
    assert ends == [TOTAL, TOTAL, TOTAL - SAVES, TOTAL - SAVES]
    monkeypatch.setattr(Checkpoints, "save", save)
    swept(tmp_path, *AXES)
    for place_of, wanted in zip(cells_of(tmp_path), cells_of(four[0]), strict=True):
        commands.assert_same(commands.final(place_of)[1], commands.final(wanted)[1])
        assert commands.metrics(place_of) == commands.metrics(wanted)
        assert entries(place_of) < entries(wanted)


def changed(*changes: dict[str, Any], **sections: Any) -> list[build.Experiment]:
    return [
        build.experiment(tree.changed(base(**sections), list(change.items()))) for change in changes
    ]


TRADES = dict(
    method=dict(name="trades", attack=dict(name="pgd", steps=1)),
    schedule=dict(name="constant", peak=0.1),
    defence=dict(name="jpeg", quality=50),
)
NUMBERS = {
    "threat.radius": (0.1, 0.2), "defence.quality": (10, 50), "method.beta": (0, 6.0),
    "optimiser.weight_decay": (5e-4, 1e-3), "schedule.peak": (0.1, 0.2),
    "average.decay": (0.5, 0.9),
}  # fmt: skip


def test_what_is_data_trains_side_by_side():
    """All the numbers at once; seeds and evaluations are no part of the step at all."""
    cells = [{"seed": n, "evaluation.eight_bit": bool(n),
              **{key: values[n] for key, values in NUMBERS.items()}} for n in (0, 1)]  # fmt: skip
    (group,) = groups(changed(*cells, **TRADES))
    assert group.places == (0, 1)
    assert set(group.numbers) == set(NUMBERS)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("training.epochs", (1, 2)),
        ("method.name", ("natural", "sense")),
        # What Python rounds, or decides by.
        ("method.warmup", (0.0, 1.0)),
        ("average.warmup", (0.1, 0.2)),
        # No attack at all, which traced numbers would not tell.
        ("method.threshold", (0.5, 1.0)),
    ],
)
def test_what_is_not_trains_in_groups_of_its_own(key, values):
    found = groups(changed(*({key: value} for value in values)))
    assert found == [Group((0,), ()), Group((1,), ())]


def test_each_shape_is_a_group_of_its_own():
    cells = [{"method.steps": s, "method.threshold": t} for s in (1, 2) for t in (0.5, 0.2)]
    expected = [Group((0, 1), ("method.threshold",)), Group((2, 3), ("method.threshold",))]
    assert groups(changed(*cells)) == expected


def walked(course: train.Course, states: list[Any]) -> Any:
    state = course.join(states)
    for fed in commands.one_by_one(course.feed(0), 2):
        state, metrics = course.step(state, fed)
    return state, course.told(jax.tree.map(lambda leaf: np.asarray(leaf)[0].tolist(), metrics))


def begun(experiments: list[build.Experiment], plan: Any, devices: Any) -> list[Any]:
    variables = [drawn.of(e.network, (8, 8, 1), seed=e.seed) for e in experiments]
    states = [jax.jit(e.method(plan).init)(v) for e, v in zip(experiments, variables, strict=True)]
    return [devices.replicate(state) for state in states]


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_members_on_two_devices_in_one_batch_learn_the_same(mapping):
    """Two steps as an accelerator takes them, beside each member alone on one device."""
    experiments = changed({"seed": 0}, {"seed": 1, "method.threshold": 0.2})
    plan = step_programs.plan_of(experiments[0])
    two, one = place(mapping, choose_devices(2)), place("shard_map", choose_devices(1))
    course = side_by_side.beside(experiments, ("method.threshold",), plan, two, how="vmap")
    joined, metrics = walked(course, begun(experiments, plan, two))
    for number, (experiment, state) in enumerate(
        zip(experiments, begun(experiments, plan, one), strict=True)
    ):
        wanted, (line,) = walked(train.alone(experiment, plan, one), [state])
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            course.part(joined, number), wanted,
        )  # fmt: skip
        assert metrics[number] == pytest.approx(line, rel=1e-4)


def test_the_member_that_diverged_is_named(tmp_path):
    members = [
        session.Member(experiment, tmp_path / str(number), f"cell {number}", lambda devices: None)
        for number, experiment in enumerate(changed({"seed": 0}, {"seed": 1}))
    ]
    losses = iter([[1.0, 2.0], [1.0, np.nan], [1.0, 2.0]])

    def step(state: Any, _: Any) -> tuple[Any, dict[str, Any]]:
        return state, {"loss": np.array([next(losses)]), **dict.fromkeys(
            ("gradient_norm", "images"), np.ones((1, 2)))}  # fmt: skip

    def told(metrics: dict[str, Any]) -> list[dict[str, float]]:
        return [{name: values[m] for name, values in metrics.items()} for m in (0, 1)]

    course = train.Course(
        step,
        lambda first: itertools.repeat((None, None)),
        lambda states: states,
        lambda s, m: s[m],
        told,
    )
    with pytest.raises(Diverged, match=r"^cell 1: loss is nan at step 2$"):
        train.train_members(members, lambda plan, devices: course, "both")


@pytest.mark.parametrize(
    ("arguments", "sections", "message"),
    [
        (["sweep.train=false"], {}, "expected config.sweep.train beside it"),
        ([], dict(start=dict(classifier="nowhere.npz")), "nowhere.npz.*a file that is there"),
        ([], dict(training=dict(epochs=1, batch_size=32, feed="stream")), "resident"),
    ],
)
def test_what_cannot_train_side_by_side_is_refused(tmp_path, arguments, sections, message):
    with pytest.raises(UsageError, match=message):
        swept(tmp_path, "sweep.axes.seed=0,1", *arguments, **sections)
    assert not (tmp_path / "cells").exists()
