"""The two commands: what they leave behind, what they repeat, and how fast a step is."""

import gzip
import json
import runpy
from functools import partial
from pathlib import Path

import commands
import drawn
import jax
import numpy as np
import pytest

from experiments import train
from rain_jax import training
from rain_jax.config import build, tree
from rain_jax.evaluation import probe
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import step_programs

PROMISED = {"config.json", "provenance.json", "metrics.jsonl", "checkpoints", "evaluations"}
OF_EVALUATION = {
    "evaluation.json", "verdicts.npz", "adversarial.npy", "table.txt", "examples.png",
    "examples.npz",
}  # fmt: skip
DRAWN = {"curves.png"}  # of what is in metrics.jsonl, where there is enough to draw


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return commands.write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    commands.command("train", *two_steps(config, folder), folder=folder)
    return folder / "run"


def two_steps(config, folder):
    return [f"--config={config}", f"--workdir={folder / 'run'}", "--config.training.epochs=0.2"]


def content(folder):
    """All files of a run but for what an evaluation writes, with their bytes."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in OF_EVALUATION | DRAWN | {"provenance.json"}
    }


def test_a_run_leaves_what_is_promised_and_nothing_else(run):
    assert {path.name for path in run.iterdir()} - DRAWN == PROMISED
    place = run / "evaluations" / "pgd40-83"
    assert {path.name for path in place.iterdir()} == OF_EVALUATION
    assert [line["step"] for line in commands.metrics(run)] == [2, 2]
    found = json.loads((place / "evaluation.json").read_text())
    assert found["step"] == 2
    assert found["provenance"]["versions"]["jax"] == jax.__version__
    assert "pgd40" in (place / "table.txt").read_text()
    with np.load(place / "verdicts.npz") as verdicts:
        assert verdicts["clean/right"].shape == (83,)
        assert int(np.sum(verdicts["clean/right"])) == found["clean"]["right"]
        # What the table says follows from the verdicts alone.
        stands = verdicts["clean/right"] & (verdicts["pgd40/right"] | ~verdicts["pgd40/allowed"])
        assert int(np.sum(stands)) == found["attacks"]["pgd40"]["right"]


def test_a_report_takes_what_an_evaluation_leaves(run, tmp_path):
    said = commands.command("report", run, f"--out={tmp_path / 'page'}", folder=tmp_path)
    assert "opens in any browser" in said
    page = (tmp_path / "page" / "index.html").read_text()
    assert "pgd40" in page
    assert "Confusion under attack" in page


def test_evaluate_needs_the_workdir_alone_and_finds_the_same(run, tmp_path):
    before, expected = content(run), commands.results(run)
    said = commands.command("evaluate", f"--workdir={run}", folder=tmp_path)
    assert "beside it" not in said
    assert commands.results(run) == expected
    assert content(run) == before


def test_an_override_changes_what_it_should_and_no_more(run, tmp_path):
    before, expected = content(run), commands.results(run)
    first = commands.evaluated(run)
    kept = (first / "evaluation.json").read_bytes()
    override = "--config.evaluation.attacks.pgd40.steps=5"
    said = commands.command("evaluate", f"--workdir={run}", override, folder=tmp_path)
    assert "pgd40-83.2 holds evaluation.json" in said
    assert "beside it pgd40-83" in said
    assert (first / "evaluation.json").read_bytes() == kept
    found = commands.results(run)
    assert found["attacks"]["pgd40"]["settings"] == {
        **expected["attacks"]["pgd40"]["settings"], "steps": 5,
    }  # fmt: skip
    for measured in (found, expected):
        for key in ("identity", "attacks", "worst_case", "broken_by", "checks", "flagged"):
            del measured[key]
    assert found == expected
    # The run is what it was: its config, its log and its weights.
    assert content(run) == before


def test_a_finished_run_started_again_only_evaluates(run, config, tmp_path):
    commands.command("evaluate", f"--workdir={run}", folder=tmp_path)
    before, expected = content(run), commands.results(run)
    said = commands.command("train", *two_steps(config, run.parent), folder=tmp_path)
    assert "goes on from step 2 of 2" in said
    assert content(run) == before
    assert commands.results(run) == expected


# --- Every config in the house ----------------------------------------------------------------

SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar": (32, 32, 3), "svhn": (32, 32, 3)}


def shape_of(spec):
    """The shape of the images that a config's data section names."""
    known = [shape for name, shape in SHAPES.items() if name in spec["name"]]
    shape = known[0] if known else (32, 32, 3)
    side = spec.get("resize")
    return (side, side, shape[2]) if side else shape


def hurried(section):
    """The same section with the fewest steps, draws, members and channels, however deep.

    The layers are of the same kinds: what a ResNet-18 or an EDSR is tests/models know.
    """
    if isinstance(section, list):
        return [hurried(entry) for entry in section]
    if not isinstance(section, dict):
        return section
    few = {"steps": 1, "restarts": 1, "draws": 1, "queries": 2}
    if section.get("name") == "edsr":
        few |= {"blocks": 1, "width": 4}
    elif section.get("name") == "preact_resnet":
        # Blocks with a detour for the image and without: more of them are no other kinds.
        section = {**section, "depths": (1, 1)}
        few |= {"width": 4}
    elif section.get("key") == "defence.level":
        return {**section, "values": section["values"][:2]}
    return {
        key: few[key] if key in few and isinstance(value, int) else hurried(value)
        for key, value in section.items()
    }


@pytest.mark.structure
@pytest.mark.parametrize("path", commands.CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_two_steps_and_is_evaluated(path, tmp_path, monkeypatch):
    # What the look at a model finds is another test's (tests/test_sanity.py): here it is brief.
    monkeypatch.setattr(probe, "STEPS", 2)
    monkeypatch.setattr(probe, "_DRAWS", 2)
    spec = tree.plain(runpy.run_path(str(path))["get_config"]())
    thin = []
    if spec["network"]["name"] == "preact_resnet18":
        thin = [("network.name", "preact_resnet"), ("network.depths", (1, 1))]
    spec = tree.plain(tree.changed(spec, [*commands.without_runs(spec), *thin]))
    shape = shape_of(spec["data"])
    classes = 100 if "cifar100" in spec["data"]["name"] else 10
    draw = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 12), ("test", 5)):
        arrays[f"{split}_image"] = draw.integers(0, 256, (size, *shape), np.uint8)
        arrays[f"{split}_label"] = np.arange(size) % classes
    arrays["train_label"][-1] = classes - 1  # so that the number of classes can be seen
    np.savez(tmp_path / "data.npz", **arrays)

    # One device: eight would compile no other program and wait for each other.
    quick = {
        "training": {"batch_size": 4, "log_every": 1},
        "validation": {"batch_size": 4, "every_epochs": 1},
        "evaluation": {"batch_size": 4, "images": None},
        "checkpoints": {"every_epochs": 1},
        "parallel": {"devices": 1},
    }
    spec = hurried(spec)
    spec["data"] = {"name": f"arrays:{tmp_path / 'data.npz'}", "holdout": 4}
    for run in (spec, spec.get("twin") or {}):
        for name, changes in quick.items():
            if run.get(name):
                run[name] = {**run[name], **changes}
    # Two batches of four are what the eight images that are not held out make: one epoch.
    spec["training"]["epochs"] = 1
    train.main(spec, tmp_path / "run")
    found = commands.results(tmp_path / "run")
    assert found["step"] in (1, 2)
    assert found["clean"]["of"] == 5
    assert found["attacks"]
    folders = [tmp_path / "run", *([tmp_path / "run" / "twin"] if spec.get("twin") else [])]
    for folder in folders:
        lines = commands.metrics(folder)
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]


# --- A step is one program --------------------------------------------------------------------


def calls_seen(folder):
    """Calls of compiled programs in a profile, by name; what is inside another is part of it."""
    (trace,) = Path(folder).rglob("*.trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    calls = [e for e in events if e.get("ph") == "X" and e["name"].startswith("PjitFunction(")]
    names, until = [], {}
    for call in sorted(calls, key=lambda call: (call["ts"], -call["dur"])):
        if call["ts"] >= until.get(call["tid"], -1.0):
            names.append(call["name"])
            until[call["tid"]] = call["ts"] + call["dur"]
    return names


def memory_of(state):
    """Where each leaf lies, device by device."""
    shards = [part.data for leaf in jax.tree.leaves(state) for part in leaf.addressable_shards]
    return [data.unsafe_buffer_pointer() for data in shards]


@pytest.mark.structure
@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_a_step_is_one_program_and_moves_nothing_between_host_and_device(mapping, config, tmp_path):
    """Nor on the device: the state is donated, and the new one lies where the old one was."""
    experiment = build.experiment(runpy.run_path(str(config))["get_config"]())
    devices = place(mapping, choose_devices(8))
    plan, keys = step_programs.plan_of(experiment), step_programs.keys_of(experiment.seed)
    method = training.minimise(
        experiment.objective,
        experiment.optimiser(plan.total, plan.per_epoch),
        average=experiment.average(plan.total, plan.per_epoch),
    )
    state = devices.replicate(jax.jit(method.init)(drawn.of(experiment.network, (8, 8, 1))))
    step = step_programs.make_step(experiment, method, plan, devices)
    feeds = commands.one_by_one(step_programs.feed(experiment, plan, keys, devices, 0), plan.total)
    for _ in range(2):  # compiles, and takes its own results as arguments for the first time
        old, before = state, memory_of(state)
        state, metrics = step(old, next(feeds))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert memory_of(state) == before
    jax.block_until_ready(metrics)

    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    count = 5  # within one epoch
    try:
        with jax.profiler.trace(str(tmp_path)), jax.transfer_guard("disallow"):
            for passed in training.loop(step, state, feeds, 2, 2 + count):
                assert passed.state is not None
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    called = calls_seen(tmp_path)
    assert len(called) == count, called
    assert len(set(called)) == 1
    # The counting counts: what is done outside the program is seen.
    with jax.profiler.trace(str(tmp_path / "more")):
        jax.block_until_ready(passed.state.step + 1)
    assert len(calls_seen(tmp_path / "more")) == 1


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_several_steps_in_one_dispatch_are_the_steps(feed, mapping, config):
    """Numbers to rounding; each dispatch one program, the state donated."""
    whole = runpy.run_path(str(config))["get_config"]()
    experiment = build.experiment(tree.changed(whole, [("training.feed", feed)]))
    devices = place(mapping, choose_devices(2))
    plan, keys = step_programs.plan_of(experiment), step_programs.keys_of(experiment.seed)
    method = experiment.method(plan)
    init = partial(jax.jit(method.init), drawn.of(experiment.network, (8, 8, 1)))
    step = step_programs.make_step(experiment, method, plan, devices)
    epoch_ends = lambda done: done % plan.per_epoch == 0

    def run(together):
        state = devices.replicate(init())
        feeds = step_programs.feed(experiment, plan, keys, devices, 0)
        last, told, counts = plan.per_epoch + 3, [], []
        feeds = step_programs.in_dispatches(feeds, 0, last, together, epoch_ends)
        for passed in training.loop(step, state, feeds, 0, last):
            counts.append(passed.done)
            told += [values["loss"] for _, values in passed.metrics]
        return jax.tree.map(np.asarray, passed.state), told, np.diff([0, *counts])

    alone, expected, _ = run(1)
    state, told, counts = run(4)
    assert counts.tolist() == [4, 4, 1, 1, 1, 1, 1]  # ten steps an epoch, and three of the next
    np.testing.assert_allclose(told, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state, alone)


def test_a_run_in_dispatches_goes_on_after_a_stop_with_the_same_bits(config, tmp_path, monkeypatch):
    whole = runpy.run_path(str(config))["get_config"]()
    changes = [("training.steps_per_dispatch", 2), ("training.epochs", 2), ("parallel.devices", 1)]
    experiment = build.experiment(tree.changed(whole, changes))

    def run(name):
        train.train(experiment, tmp_path / name, name, lambda devices: None)
        lines = commands.metrics(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(2, 21, 2))
        return commands.final(tmp_path / name), lines

    expected = run("whole")
    with monkeypatch.context() as stopping:
        stopping.setattr(train.Interrupt, "requested", lambda self, step: step >= 11)
        with pytest.raises(train.Stopped, match="stopped at step 12,"):
            run("stopped")
    (step, found), lines = run("stopped")
    assert (step, lines) == (expected[0][0], expected[1])
    commands.assert_same(found, expected[0][1])
    with pytest.raises(build.UsageError, match="dispatch=4: expected at most 3, the steps from"):
        changes[0] = "training.steps_per_dispatch", 4
        train.train(build.experiment(tree.changed(whole, changes)), tmp_path / "no", "no", None)


def test_dispatches_end_where_something_happens():
    feeds = ((epoch, number) for epoch in range(9) for number in range(10))
    made = list(
        step_programs.in_dispatches(feeds, 0, 25, 3, lambda done: done % 10 == 0 or done == 14)
    )
    assert [len(splits) for _, splits in made] == [3, 3, 3, 1, 3, 1, 3, 3, 3, 1, 1]
    fed = [number for _, splits in made for number in splits]
    assert fed == [*range(10), *range(10), *range(5)]
    assert [shared for shared, _ in made] == [0] * 4 + [1] * 4 + [2] * 3
    # From where a dispatch ended it goes on with the same ones.
    feeds = ((1, number) for number in range(3, 10))
    again = list(
        step_programs.in_dispatches(feeds, 13, 20, 3, lambda done: done % 10 == 0 or done == 14)
    )
    assert again == made[5:8]


def test_a_run_that_diverges_stops_and_keeps_what_was_good(tmp_path, config):
    """The rate leaps at the second epoch; the checkpoints from before it are whole and finite."""
    said = commands.command(
        "train", f"--config={config}", f"--workdir={tmp_path / 'run'}",
        "--config.schedule.name=piecewise", "--config.schedule.at=(1.05,)",
        "--config.schedule.factor=1e30",
        folder=tmp_path, code=3,
    )  # fmt: skip
    assert "error: loss is nan at step" in said
    assert "Traceback" not in said
    kept = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit())
    assert kept
    assert max(kept) <= 10
    evaluated = commands.command("evaluate", f"--workdir={tmp_path / 'run'}", folder=tmp_path)
    assert "Per cent right of 83 test images" in evaluated
