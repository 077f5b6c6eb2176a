"""A run that is killed, stopped or damaged ends as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest

from rain_jax.checks import UsageError
from rain_jax.runs import workdir

TOTAL = 30  # steps of the config in `commands`
SAVES = 3  # steps between checkpoints


def train(folder, config, *overrides, devices=8, code=0):
    return commands.command(
        "train", f"--config={config}", f"--workdir={folder / 'run'}", *overrides,
        folder=folder, devices=devices, code=code,
    )  # fmt: skip


def begin(folder, config, *overrides, devices=8):
    return commands.start(
        "train", f"--config={config}", f"--workdir={folder / 'run'}", *overrides,
        folder=folder, devices=devices,
    )  # fmt: skip


def steps_seen(run: Path) -> int:
    return max([0, *(line["step"] for line in commands.metrics(run))])


def saving(run: Path) -> int | None:
    """The step of a save that is under way, by the temporary folder it writes to."""
    for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        return int(path.name.split(".")[0])
    return None


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return commands.write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, config)
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, config):
    """A run on 8 devices that SIGTERM stopped between two checkpoints, and what it said."""
    folder = tmp_path_factory.mktemp("stopped")
    process = begin(folder, config)
    assert commands.kill_when(process, lambda: steps_seen(folder / "run") >= 18, signal.SIGTERM)
    return folder, commands.finish(process, folder, code=128 + signal.SIGTERM)


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of the stopped run, to go on from."""
    shutil.copytree(stopped[0] / "run", tmp_path / "run")
    return tmp_path


def test_an_evaluation_of_a_run_that_stopped_says_so(again):
    said = commands.command("evaluate", f"--workdir={again / 'run'}", folder=again)
    assert re.search(rf"training stopped at step \d+ of {TOTAL}; what is judged is step \d+", said)


def assert_ends_as(run, expected):
    """All bits of the state, all lines and all counts."""
    (step, found), (wanted, leaves) = commands.final(run), commands.final(expected)
    assert step == wanted == TOTAL
    commands.assert_same(found, leaves)
    # The state has everything that there is to lose.
    for part in ("params", "average", "batch_stats", "trace", "count", "step"):
        assert any(part in name for name in leaves), part
    assert commands.metrics(run) == commands.metrics(expected)
    assert commands.results(run) == commands.results(expected)


def test_every_step_is_logged_once(uninterrupted):
    lines = commands.metrics(uninterrupted)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, 31, 2))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 20, 30]
    assert commands.final(uninterrupted)[0] == TOTAL


def test_killed_five_times_it_ends_with_the_same_bits(tmp_path, config, uninterrupted):
    run = tmp_path / "run"
    draw = random.Random(0)
    early, middle, late = draw.randrange(1, 9), draw.randrange(12, 17), draw.randrange(20, 26)
    moments = [
        # Before there is any checkpoint, or just after: the run may begin anew.
        lambda: steps_seen(run) >= 1,
        # While a checkpoint is written: it must count for nothing.
        lambda: (saving(run) or 0) > early,
        lambda: steps_seen(run) > middle,
        lambda: (saving(run) or 0) > late,
        # When everything is learnt and only the evaluation is to come.
        lambda: "clean: " in (tmp_path / "stdout").read_text(),
    ]
    during_a_save = 0
    for ready in moments:
        process = begin(tmp_path, config)
        assert commands.kill_when(process, ready), (tmp_path / "stderr").read_text()
        assert process.returncode == -signal.SIGKILL
        during_a_save += saving(run) is not None
    assert during_a_save
    said = train(tmp_path, config)
    assert f"goes on from step {TOTAL} of {TOTAL}" in said
    assert_ends_as(run, uninterrupted)


def test_sigterm_saves_and_says_so(stopped, again, config, uninterrupted):
    at = commands.final(stopped[0] / "run")[0]
    assert 18 <= at < TOTAL
    assert f"stopped at step {at}, state saved: the same command goes on from there" in stopped[1]
    assert not (again / "run" / "evaluations").exists()
    assert f"goes on from step {at} of {TOTAL}" in train(again, config)
    assert_ends_as(again / "run", uninterrupted)


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_what_eight_devices_saved_goes_on_with_one(mapping, again, config, uninterrupted):
    said = train(again, config, f"--config.parallel.mapping={mapping}", devices=1)
    assert "goes on from step" in said
    found, expected = commands.final(again / "run")[1], commands.final(uninterrupted)[1]
    assert found.keys() == expected.keys()
    for name in (name for name in expected if "model" in name):
        # Variances are larger than parameters: theirs is a relative measure.
        relative = 1e-3 if "batch_stats" in name else 0.0
        np.testing.assert_allclose(
            found[name], expected[name], rtol=relative, atol=1e-4, err_msg=name
        )


def test_a_damaged_checkpoint_is_passed_over(again, config, uninterrupted):
    folder = again / "run" / "checkpoints"
    newest, before = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())[:-3:-1]
    # All that the merged index leads to; other files may be copies that nobody reads any more.
    files = list((folder / str(newest) / "model" / "d").iterdir())
    assert files
    for file in files:
        file.write_bytes(bytes(byte ^ 0xFF for byte in file.read_bytes()))
    said = train(again, config)
    assert f"checkpoint {newest} is broken" in said
    assert f"goes on from step {before} of {TOTAL}" in said
    assert (folder / f"{newest}.unreadable").is_dir()
    shutil.rmtree(folder / f"{newest}.unreadable")
    assert_ends_as(again / "run", uninterrupted)


# --- Two at once ------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from rain_jax.runs import workdir

with workdir.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_that_is_taken_away_while_it_is_waited_for_is_none(tmp_path, monkeypatch):
    """Whoever leaves removes the file; a lock on what was removed keeps nobody out."""
    fcntl, taken = pytest.importorskip("fcntl"), []
    real = fcntl.flock

    def late(lock, how):
        if not taken:
            (tmp_path / ".lock").unlink()
        taken.append(how)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with workdir.held(tmp_path):
        assert len(taken) == 2
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_what_is_learnt_in_another_way_is_another_run(tmp_path):
    config = {"parallel": {"statistics": "all", "sums": "float32", "devices": 1}, "seed": 0}
    workdir.claim(tmp_path, config)
    workdir.claim(tmp_path, {**config, "parallel": {**config["parallel"], "devices": 2}})
    for key, value in (("statistics", "device"), ("sums", "bfloat16")):
        other = {**config, "parallel": {**config["parallel"], key: value}}
        with pytest.raises(UsageError, match=f"config.parallel.{key}="):
            workdir.claim(tmp_path, other)


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=commands.ROOT, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout.readline() == "held\n"
            said = f"another process writes into it .process {holder.pid}"
            with pytest.raises(UsageError, match=said), workdir.held(folder):
                pass
            config = commands.write_config(tmp_path)
            said = commands.command(
                "train", f"--config={config}", f"--workdir={folder}", folder=tmp_path, code=2
            )
            assert "another process writes into it" in said
        finally:
            holder.kill()
    with workdir.held(folder), workdir.held(folder):  # however the other one ended, and in parts
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} ")
    assert not list(folder.iterdir())
