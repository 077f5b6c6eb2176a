"""One job of two processes gives what one process gives, by both mappings."""

import json
import signal

import commands
import numpy as np
import pytest

from rain_jax import data
from rain_jax.runs import workdir

MAPPINGS = ("shard_map", "pmap")
# What is looked at in between and afterwards does not turn on the feed: less to compile, and only
# the first of several processes keeps what it compiles for others.
STREAM = (
    "--config.training.feed=stream", "--config.validation=None", "--config.evaluation.checks=False"
)  # fmt: skip


def together(module, *given, folder):
    return commands.finish_together(commands.start_together(module, *given, folder=folder))


def test_a_folder_that_somebody_holds_is_refused_to_all_of_a_job(tmp_path, config):
    """And not to the first alone, for which the others would wait."""
    with workdir.held(tmp_path / "run"):
        given = arguments(tmp_path, config)
        job = commands.start_together("train", *given, folder=tmp_path)
        first, second = commands.finish_together(job, code=2)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert "another process writes into it" in first
    assert "the first process may not write into it" in second


def arguments(folder, config, *overrides):
    return [
        f"--config={config}", f"--workdir={folder / 'run'}", "--config.training.epochs=2",
        "--config.training.log_every=1", "--config.checkpoints.every_epochs=1",
        "--config.evaluation.batch_size=30", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return commands.write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, config):
    """`run_of(devices, *overrides)`: the folder of a run by one process, made once."""
    made = {}

    def run(devices, *overrides):
        if (devices, overrides) not in made:
            folder = tmp_path_factory.mktemp(f"one_process_{devices}_devices")
            given = arguments(folder, config, *overrides)
            commands.command("train", *given, folder=folder, devices=devices)
            made[devices, overrides] = folder / "run"
        return made[devices, overrides]

    return run


@pytest.fixture(scope="module", params=MAPPINGS)
def job(request, tmp_path_factory, config):
    """The folder of a run by two processes of four devices each, and what each of them said."""
    folder = tmp_path_factory.mktemp(f"two_processes_{request.param}")
    given = arguments(folder, config, f"--config.parallel.mapping={request.param}")
    return folder / "run", together("train", *given, folder=folder)


@pytest.mark.parametrize("devices", [1, 8])
def test_two_processes_draw_the_loss_curve_of_one(job, run_of, devices):
    found, expected = commands.losses(job[0]), commands.losses(run_of(devices))
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_their_checkpoint_is_one_for_a_single_process(job, run_of):
    (step, found), (_, expected) = commands.final(job[0]), commands.final(run_of(8))
    assert step == 20
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-3, atol=1e-4, err_msg=name)


def test_they_count_each_image_once_and_as_one_process_does(job, run_of, tmp_path):
    found, expected = commands.results(job[0]), commands.results(run_of(8))
    for which in (found["clean"], found["attacks"]["pgd40"], found["worst_case"]):
        assert which["of"] == 83
    assert found["clean"]["right"] == expected["clean"]["right"]
    assert found["attacks"]["pgd40"]["right"] == expected["attacks"]["pgd40"]["right"]
    with np.load(commands.evaluated(job[0]) / "verdicts.npz") as verdicts:
        np.testing.assert_array_equal(verdicts["pgd40/index"], np.arange(83))
        labels = data.load("digits").test.arrays[1][:83]
        np.testing.assert_array_equal(verdicts["clean/label"], labels)
    record = (commands.evaluated(job[0]) / "evaluation.json").read_text()
    provenance = json.loads(record)["provenance"]
    assert (provenance["processes"], provenance["devices"]) == (2, 8)
    # One process reads what two have saved, and finds the same.
    commands.command("evaluate", f"--workdir={job[0]}", folder=tmp_path, devices=1)
    again = commands.results(job[0])
    assert again["attacks"]["pgd40"]["right"] == found["attacks"]["pgd40"]["right"]


def test_only_the_first_process_writes_and_speaks(job):
    run, (first, second) = job
    assert "Per cent right of 83 test images" in first
    assert "img" not in second
    assert "Per cent right" not in second
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "evaluations", "checkpoints"} <= names
    assert not [name for name in names if name.startswith((".", "tmp"))], "drafts of a writer"
    lines = [(line["step"], line["kind"]) for line in commands.metrics(run)]
    assert len(lines) == len(set(lines)) == 22


def test_sigterm_for_one_stops_all_at_one_step_and_streams_go_on(run_of, tmp_path, config):
    """The batches of a stream that two processes read, before and after, are those of one.

    They take three steps in a dispatch, and stop behind one.
    """
    given = arguments(tmp_path, config, *STREAM, "--config.training.steps_per_dispatch=3")
    job = commands.start_together("train", *given, folder=tmp_path)
    second = job[1][0]
    commands.kill_when(second, lambda: len(commands.losses(tmp_path / "run")) > 3, signal.SIGTERM)
    for said in commands.finish_together(job, code=128 + signal.SIGTERM):
        assert "state saved: the same command goes on from there" in said
    at = commands.final(tmp_path / "run")[0]
    assert 4 <= at < 20
    assert at % 10 in (0, 3, 6, 9)
    first, _ = together("train", *given, folder=tmp_path)
    assert f"goes on from step {at} of 20" in first
    found, expected = commands.losses(tmp_path / "run"), commands.losses(run_of(8, *STREAM))
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, atol=1e-5)
