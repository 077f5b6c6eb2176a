"""An evaluation that is killed, or damaged, ends as if nothing had happened."""

import json
import shutil
import signal

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, evaluate
from rain_jax.config import build, tree
from rain_jax.evaluation import resume
from rain_jax.runs import evaluating
from rain_jax.runs.workdir import read_config

# At a radius at which images are left for every attack.
STANDARD = [
    "--config.threat.radius=0.02", "--config.evaluation.suite.name=standard",
    "--config.evaluation.suite.steps=4", "--config.evaluation.suite.targets=2",
    "--config.evaluation.suite.queries=12", "--config.evaluation.attacks.pgd40=None",
    "--config.evaluation.batch_size=8", "--config.evaluation.block=16",
    "--config.evaluation.distances.fmn.name=fmn", "--config.evaluation.distances.fmn.steps=4",
]  # fmt: skip
COLUMNS = ["clean", "apgd_ce", "apgd_t", "fab_t", "square", "fmn"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return commands.write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config):
    """A run of some steps, so that there is something to break; not evaluated as we want it."""
    folder = tmp_path_factory.mktemp("trained")
    commands.command(
        "train", f"--config={config}", f"--workdir={folder / 'run'}",
        folder=folder, devices=2,
    )  # fmt: skip
    return folder / "run"


def everything(run):
    """What an evaluation says, and every number behind it."""
    place = commands.evaluated(run)
    with np.load(place / "verdicts.npz") as verdicts:
        arrays = {name: verdicts[name] for name in verdicts.files}
    return commands.results(run), arrays, np.load(place / "adversarial.npy")


def assert_same(run, expected):
    found, wanted = everything(run), everything(expected)
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for name in wanted[1]:
        np.testing.assert_array_equal(found[1][name], wanted[1][name], err_msg=name)
    np.testing.assert_array_equal(found[2], wanted[2])
    assert not list(run.rglob(resume.FOLDER))


def copy(trained, folder):
    """A run of its own without the files of its evaluation."""
    shutil.copytree(trained, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = copy(trained, folder)
    commands.command("evaluate", f"--workdir={run}", *STANDARD, folder=folder, devices=2)
    return run


# As soon as the column has its first block; there are more to come.
KILLED = """
import os, signal
from rain_jax.evaluation import resume
write = resume.Pages.write
def write_and_die(self, number, block):
    write(self, number, block)
    if self._folder.name.startswith("{title}."):
        os.kill(os.getpid(), signal.SIGKILL)
resume.Pages.write = write_and_die
"""
# When a block is written in part: at its last call before it takes the name of a whole one.
KILLED_IN_THE_MIDDLE = """
import os, pathlib, signal
replace = pathlib.Path.replace
def replace_or_die(self, target):
    if self.parent.name.startswith("{title}."):
        os.truncate(self, os.path.getsize(self) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = replace_or_die
"""


def test_killed_in_every_attack_it_ends_with_the_same_record(trained, uninterrupted, tmp_path):
    run = copy(trained, tmp_path)
    given = "evaluate", f"--workdir={run}", *STANDARD
    for title in COLUMNS:
        before = (KILLED if title != "square" else KILLED_IN_THE_MIDDLE).format(title=title)
        process = commands.start(*given, folder=tmp_path, devices=2, before=before)
        commands.finish(process, tmp_path, code=-signal.SIGKILL)
        left = [path.suffix for path in run.glob(f"evaluations/*/{resume.FOLDER}/{title}.*/*")]
        assert left == [".npz" if title != "square" else ".tmp"]
    commands.command(*given, folder=tmp_path, devices=2)
    assert_same(run, uninterrupted)


@pytest.fixture(scope="module")
def experiment(uninterrupted):
    whole = tree.changed(read_config(uninterrupted), [])
    return build.experiment(tree.changed(whole, cli.changes_of(STANDARD)))


def variables_of(experiment):
    shape = experiment.splits.train.shape
    return experiment.network.init(jax.random.key(0), jnp.zeros((1, *shape)))


class Stopped(Exception):
    """Stands for a kill."""


def test_what_is_done_is_not_done_again_and_what_is_damaged_is(experiment, tmp_path, monkeypatch):
    variables = variables_of(experiment)
    written = []
    write = resume.Pages.write

    def counting(self, number, block):
        write(self, number, block)
        written.append((self._folder.name.split(".")[0], number))
        if stop_after is not None and len(written) == stop_after:
            raise Stopped

    monkeypatch.setattr(resume.Pages, "write", counting)

    def run(folder):
        written.clear()
        evaluate.evaluate(experiment, variables, folder, "untrained", 0)
        return json.loads((folder / "evaluation.json").read_text()), list(written)

    stop_after = None
    whole, all_written = run(tmp_path)
    assert len(all_written) >= len(COLUMNS)
    other = tmp_path / "other"
    other.mkdir()
    stop_after = len(all_written) // 2
    with pytest.raises(Stopped):
        run(other)
    assert (other / resume.FOLDER).is_dir()
    stop_after = None
    # Cut short, the newest block is measured again; the others are not.
    newest = max((other / resume.FOLDER).rglob("*.npz"), key=lambda path: path.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[:-100])
    again, rest = run(other)
    assert rest == all_written[len(all_written) // 2 - 1 :]
    for record in (whole, again):
        record.pop("provenance")
        for column in [record["clean"], *record["attacks"].values(), *record["distances"].values()]:
            column.pop("seconds")
    assert again == whole


@pytest.fixture(scope="module")
def measured(experiment, tmp_path_factory):
    """A folder that holds every block of an evaluation, and the variables."""
    folder, variables = tmp_path_factory.mktemp("measured"), variables_of(experiment)
    evaluate.evaluate(experiment, variables, folder, "untrained", 0, finish=False)
    return folder, variables


@pytest.mark.parametrize(
    "change", [("seed", 4), ("threat.radius", 0.11), ("evaluation.suite.steps", 5),
               ("evaluation.block", 24), ("evaluation.draws", 2)]
)  # fmt: skip
def test_nothing_of_another_evaluation_is_taken(experiment, measured, tmp_path, change):
    """Blocks of the first are in the folder; none of them is this one's."""
    shutil.copytree(measured[0], tmp_path, dirs_exist_ok=True)
    variables = measured[1]
    other = build.experiment(tree.changed(experiment.config, [change]))
    taken = []
    read = resume.Pages.read

    def spying(self, number):
        taken.append(self._folder.name.split(".")[0])
        return read(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Pages, "read", spying)
        evaluating.evaluation_of(other, variables, "untrained", tmp_path)()
    # Only attacks turn on the suite: the rest may be known.
    known = {"clean"} if change[0] == "evaluation.suite.steps" else set()
    assert set(taken) - {"fmn"} == known


def test_other_weights_or_images_have_other_names():
    one = resume.digest(np.zeros(3, np.float32))
    assert one == resume.digest(np.zeros(3, np.float32))
    assert one != resume.digest(np.zeros(3, np.float64))
    assert one != resume.digest(np.zeros((3, 1), np.float32))
    assert one != resume.digest(np.array([0, 0, 1e-9], np.float32))


def test_the_worst_case_can_be_told_from_the_images(uninterrupted, tmp_path):
    said = commands.command(
        "recount", f"--workdir={uninterrupted}", folder=tmp_path, devices=2,
    )  # fmt: skip
    assert "worst case over the saved images" in said


def test_images_of_another_model_are_found_out(uninterrupted, tmp_path):
    run = copy(uninterrupted, tmp_path)
    saved = commands.evaluated(run) / "adversarial.npy"
    images = np.load(saved)
    assert len(images)
    np.save(saved, np.zeros_like(images))  # far outside the threat
    said = commands.command("recount", f"--workdir={run}", folder=tmp_path, devices=2, code=2)
    assert "stood in the evaluation" in said
    saved.unlink()
    said = commands.command("recount", f"--workdir={run}", folder=tmp_path, devices=2, code=2)
    assert "adversarial.npy" in said
