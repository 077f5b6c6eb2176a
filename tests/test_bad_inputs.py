"""A wrong name, key, shape, range or file is told in one line, before anything compiles."""

import errno
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import drawn
import jax
import numpy as np
import pytest

from experiments import cli, evaluate, train
from rain_jax import data, models
from rain_jax.attacks import pgd
from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.norms import linf
from rain_jax.runs import workdir
from rain_jax.types import Threat

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **__: COMPILED.append(name) if "mlir" in name or "backend" in name else None
)
# What JAX and absl say of themselves, which is no answer to anybody's input.
NOISE = re.compile(r"^(WARNING: All log messages|[IWE]\d{4} |(INFO|WARNING):\d{4}-)")


@dataclass(frozen=True)
class Case:
    """One bad input: what is typed, and what the one line must say."""

    name: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    command: str = "train"
    patch: Callable[[pytest.MonkeyPatch], Any] | None = None
    compiles: bool = False  # what only the run itself can meet


def wrong(name: str, *arguments: str, says: list[str], **more: Any) -> Case:
    """A training of the tiny config, changed by `arguments`."""
    return Case(name, ("--config={files}/tiny.py", *arguments), tuple(says), **more)


def wrong_data(name: str, given: str, *arguments: str, says: list[str]) -> Case:
    """A training on other data, without the tiny config's limits."""
    limits = ("--config.data.holdout=0", "--config.validation=None",
              "--config.data.limit_train=None", "--config.data.limit_test=None")  # fmt: skip
    return wrong(name, f"--config.data.name={given}", *limits, *arguments, says=says)


def wrong_run(name: str, folder: str, *arguments: str, says: list[str], **more: Any) -> Case:
    """An evaluation of one of the runs that `files` holds."""
    # A later --workdir is the one that counts.
    where = f"--workdir={{files}}/{folder}"
    return Case(name, (where, *arguments), tuple(says), "evaluate", **more)


def no_space(patch: pytest.MonkeyPatch) -> None:
    def fsync(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def no_tensorboard(patch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    patch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboardX" else
        real(name, *rest),
    )  # fmt: skip


PGD = "--config.evaluation.attacks.pgd40"
NETWORK = ("--config.network.name=small_cnn", "--config.network.padding=VALID")
CASES = [
    # --- the command line itself
    Case("no config", (), ("--config is missing", "quickstart.py")),
    Case("misspelt flag", ("--confg=x.py",), ("--confg", "did you mean '--config'")),
    Case(
        "misspelt file",
        ("--config=experiments/configs/quickstrat.py",),
        ("quickstrat.py", "no such file", "did you mean 'quickstart.py'"),
    ),
    Case("folder for a file", ("--config=experiments/configs",), ("configs", "no such file")),
    Case("flag without its value", ("--config",), ("--config", "expected one argument")),
    wrong("positional argument", "quick", says=["'quick'", "expected flags, --name=value"]),
    wrong("misspelt root", "--confg.seed=1", says=["--confg.seed", "'--config.seed'"]),
    wrong("misspelt workdir", "--workdri=x", says=["--workdri", "did you mean '--workdir'"]),
    Case("evaluating nothing", (), ("--workdir is missing", "folder of a run"), "evaluate"),
    # --- config files
    Case("syntax error", ("--config={files}/syntax.py",), ("syntax.py:2:",)),
    Case("no get_config", ("--config={files}/empty.py",), ("empty.py", "no get_config")),
    Case("returns no config", ("--config={files}/number.py",), ("number.py", "returned 5")),
    Case("raises", ("--config={files}/raises.py",), ("raises.py:2: NameError", "'tpyo'")),
    Case("takes no text", ("--config={files}/tiny.py:big",), ("tiny.py:big", "no text behind")),
    Case("not Python", ("--config={files}/run/config.json",), ("config.json", "a Python file")),
    Case(
        "text for a number in a file",
        ("--config={files}/text.py",),
        ("config.threat.radius='8/255'", "expected a number"),
    ),
    Case("section of a file", ("--config={files}/section.py",), ("config.thret", "'threat'")),
    # --- keys
    wrong("section", "--config.methd.name=natural", says=["config.methd", "'method'"]),
    wrong("key of a method", "--config.method.nmae=x", says=["config.method.nmae", "'name'"]),
    wrong(
        "key of an optimiser", "--config.optimiser.momentm=0.5",
        says=["config.optimiser.momentm", "did you mean 'momentum'"],
    ),
    wrong("key of an attack", f"{PGD}.step=3", says=["pgd40.step:", "did you mean 'steps'"]),
    wrong("key of training", "--config.training.epoch=3", says=["training.epoch:", "'epochs'"]),
    wrong("key of data", "--config.data.limit_tain=3", says=["limit_tain", "'limit_train'"]),
    wrong("key below a value", "--config.seed.x=3", says=["config.seed.x", "config.seed=3"]),
    wrong(
        "key of another network", "--config.network.depths=(1,)",
        says=["config.network.depths", "cnn takes", "widths"],
    ),
    wrong("value for a section", "--config.network=5", says=["config.network=5", "a section"]),
    wrong("section for a value", "--config.seed={{}}", says=["config.seed={{}}", "whole number"]),
    wrong("twin's section", "--config.twin.methd.name=x", says=["methd", "'method'"]),
    # --- names
    wrong("network", "--config.network.name=cn", says=["config.network.name='cn'", "'cnn'"]),
    wrong("method", "--config.method.name=adversrial", says=["'adversrial'", "'adversarial'"]),
    wrong("attack", "--config.method.attack.name=pdg", says=["'pdg'", "did you mean 'pgd'"]),
    wrong("validation attack", "--config.validation.attack.name=pg", says=["'pg'", "'pgd'"]),
    wrong("column", f"{PGD}.name=fgsn", says=["config.evaluation.attacks.pgd40", "'fgsm'"]),
    wrong("norm", "--config.threat.norm=lif", says=["config.threat.norm='lif'", "'linf'"]),
    wrong("loss", f"{PGD}.loss=drl", says=["pgd40.loss='drl'", "did you mean 'dlr'"]),
    wrong("estimator", f"{PGD}.estimator=eto", says=["pgd40.estimator", "'eto'", "'eot'"]),
    wrong("optimiser", "--config.optimiser.name=sdg", says=["'sdg'", "did you mean 'sgd'"]),
    wrong("schedule", "--config.schedule.name=cosin", says=["'cosin'", "did you mean 'cosine'"]),
    wrong("data", "--config.data.name=digts", says=["config.data.name='digts'", "'digits'"]),
    wrong("mapping", "--config.parallel.mapping=pmp", says=["mapping='pmp'", "'pmap'"]),
    wrong("chain of names", "--config.defence.name=chain", "--config.defence.defences.a.name=jpeg",
          says=["config.defence.defences=", "expected sections, (dict(name=..), dict(name=.."]),
    Case("text for a config that takes none", ("--config={files}/tiny.py:foo",),
         ("tiny.py:foo", "takes no text behind a colon")),
    wrong("start run", "--config.start.classifier=runs/nowhere",
          says=["config.start.classifier: runs/nowhere: expected the folder of a run"]),
    wrong("start file", "--config.start.classifier=nowhere.pt",
          says=["config.start.classifier='nowhere.pt': expected a file that is there"]),
    wrong("statistics", "--config.parallel.statistics=devce", says=["'devce'", "'device'"]),
    wrong("batch norm", "--config.method.batch_norm=tran", says=["'tran'", "'train'"]),
    wrong("activation", "--config.network.activation=rlu", says=["'rlu'", "'relu'"]),
    wrong("dtype", "--config.network.dtype=bfloat61", says=["'bfloat61'", "'bfloat16'"]),
    wrong("feed", "--config.training.feed=residnt", says=["'residnt'", "'resident'"]),
    wrong("checkpoint", "--config.evaluation.checkpoint=bset", says=["'bset'", "'best'"]),
    wrong("pad mode", "--config.augment.pad_mode=refelct", says=["'refelct'", "'reflect'"]),
    # --- types
    wrong("text for a number", "--config.training.epochs=ten", says=["epochs='ten'", "a number"]),
    wrong("fraction for a seed", "--config.seed=1.5", says=["config.seed=1.5", "a whole number"]),
    wrong("maybe", "--config.augment.flip=maybe", says=["flip='maybe'", "True or False"]),
    wrong("list for a number", "--config.threat.radius=[1]", says=["radius=[1]", "a number"]),
    wrong("number for a list", "--config.network.widths=8", says=["widths=8", "whole numbers"]),
    wrong("text in a list", "--config.network.widths=(8,'x')", says=["widths[1]='x'", "whole"]),
    wrong("truth for a number", "--config.seed", says=["config.seed=True", "a whole number"]),
    wrong("number for a name", "--config.method.name=3", says=["config.method.name=3", "natural"]),
    wrong("number for a text", "--config.data.data_dir=3", says=["data_dir=3", "a text or None"]),
    wrong("text for an attack", "--config.method.attack=pgd", says=["attack='pgd'", "a section"]),
    wrong("nothing for a number", "--config.seed=None", says=["config.seed=None", "whole number"]),
    # --- ranges
    wrong("radius of 8", "--config.threat.radius=8", says=["radius=8", "did you mean 8/255?"]),
    wrong("radius below zero", "--config.threat.radius=-0.1", says=["radius=-0.1", "[0, 1]"]),
    wrong("radius of nan", "--config.threat.radius=nan", says=["radius='nan'", "a number"]),
    wrong("radius too large", "--config.threat.radius=1e400", says=["radius=inf", "[0, 1]"]),
    wrong("seed", "--config.seed=-1", says=["config.seed=-1", "[0, "]),
    wrong("steps", f"{PGD}.steps=0", says=["pgd40.steps=0", "[1, inf)"]),
    wrong("step size", f"{PGD}.step_size=-1", says=["pgd40.step_size=-1", "[0, 1]"]),
    wrong("step size of 2", f"{PGD}.step_size=2", says=["step_size=2", "did you mean 2/255?"]),
    wrong("restarts", f"{PGD}.restarts=0", says=["pgd40.restarts=0", "[1, inf)"]),
    wrong("steps of momentum", f"{PGD}.name=mi_fgsm", f"{PGD}.steps=0", says=["steps=0"]),
    wrong("empty batch", "--config.training.batch_size=0", says=["batch_size=0", "[1, inf)"]),
    wrong(
        "batch beyond the data", "--config.training.batch_size=800",
        says=["config.training.batch_size=800", "at most the 640 training images"],
    ),
    wrong(
        "batch beside the devices", "--config.training.batch_size=60",
        says=["config.training.batch_size=60", "multiple of the 8 devices", "64 say"],
    ),
    wrong("twin's batch", "--config.twin.training.batch_size=60",
          says=["config.twin.training.batch_size=60", "8 devices"]),
    wrong("twin's epochs", "--config.twin.training.epochs=0",
          says=["config.twin.training.epochs=0", "(0, inf)"]),
    wrong("twin's start", "--config.twin.start.classifier=nowhere",
          says=["config.twin.start.classifier: nowhere: expected the folder of a run"]),
    wrong("epochs", "--config.training.epochs=0", says=["config.training.epochs=0", "(0, inf)"]),
    wrong("momentum", "--config.optimiser.momentum=1", says=["momentum=1.0", "[0, 1)"]),
    wrong("smoothing", "--config.method.label_smoothing=1", says=["smoothing=1.0", "[0, 1)"]),
    wrong("average", "--config.average.decay=1.5", says=["config.average.decay=1.5", "[0, 1)"]),
    wrong("peak", "--config.schedule.peak=0", says=["config.schedule.peak=0.0", "(0, inf)"]),
    wrong(
        "warm-up beyond the run", "--config.schedule.name=cosine", "--config.schedule.warmup=5",
        says=["config.schedule.warmup=5 epochs", "less than the run's"],
    ),
    wrong(
        "warm-up of a constant", "--config.schedule.name=constant", "--config.schedule.warmup=9",
        says=["config.schedule.warmup=9 epochs", "less than the run's"],
    ),
    wrong(
        "milestones", "--config.schedule.name=piecewise", "--config.schedule.at=(2,1)",
        says=["config.schedule.at=(2.0, 1.0)", "rising milestones"],
    ),
    wrong("no milestones", "--config.schedule.name=piecewise", says=["schedule.at is missing"]),
    wrong("devices", "--config.parallel.devices=99", says=["parallel.devices=99", "1 to 8"]),
    wrong("no devices", "--config.parallel.devices=0", says=["parallel.devices=0", "1 to 8"]),
    wrong("images", "--config.evaluation.images=0", says=["evaluation.images=0", "[1, inf)"]),
    wrong("more images", "--config.evaluation.images=1000000",
          says=["config.evaluation.images=1,000,000: expected at most", "the images of"]),
    wrong("draws", "--config.evaluation.draws=0", says=["evaluation.draws=0", "[1, inf)"]),
    wrong("keep", "--config.checkpoints.keep=0", says=["checkpoints.keep=0", "[1, inf)"]),
    wrong("crop", "--config.augment.crop_padding=9", says=["augment.crop_padding=9", "[0, 8]"]),
    wrong("widths", "--config.network.widths=(0,)", says=["network.widths", "(0,)", ">= 1"]),
    wrong("hold out all", "--config.data.holdout=1297", says=["holdout=1297", "1,297 training"]),
    wrong(
        "hold out none", "--config.data.holdout=0",
        says=["config.validation", "config.data.holdout above 0", "config.validation=None"],
    ),
    # --- what must fit together
    wrong("no attacks", "--config.evaluation.attacks={{}}", says=["evaluation.attacks", "pgd"]),
    wrong("last attack gone", f"{PGD}=None", says=["evaluation.attacks", "an attack at least"]),
    wrong("nameless attack", "--config.evaluation.attacks.new.steps=3",
          says=["config.evaluation.attacks.new", "a section with a name", "pgd"]),
    wrong("attack called clean", "--config.evaluation.attacks.clean.name=noise",
          says=["config.evaluation.attacks.clean", "another name"]),
    wrong("method without its attack", "--config.method.attack=None",
          says=["config.method.attack", "a section with a name"]),
    wrong("method that takes none", "--config.method.name=natural",
          "--config.method.attack.name=pgd", says=["config.method.attack", "natural takes"]),
    wrong("network too deep for 8x8", *NETWORK,
          says=["config.network", "8x8", "at least 16x16", "padding='SAME'"]),
    wrong("three means of one channel", "--config.network.mean=(0.4,0.4,0.4)",
          says=["config.network.mean has 3 values", "1 channels"]),
    wrong("restarts within batch norm", "--config.method.attack.restarts=2",
          "--config.method.batch_norm=train", says=["batch_norm='train'", "restarts=1"]),
    wrong("no steps for batch norm", "--config.method.attack.name=noise",
          "--config.method.batch_norm=train", says=["batch_norm='train'", "made of steps"]),
    wrong("tensorboard", "--config.training.tensorboard", patch=no_tensorboard,
          says=["config.training.tensorboard", "pip install"]),
    wrong("half a cluster", patch=lambda patch: patch.setenv("JAX_COORDINATOR_ADDRESS", "a:1"),
          says=["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]),
    # --- data
    wrong_data("no such archive", "arrays:{files}/god.npz", says=["god.npz", "'good.npz'"]),
    wrong_data("labels too large", "arrays:{files}/high.npz", says=["label 7", "[0, 3)"]),
    wrong_data("labels below zero", "arrays:{files}/low.npz", says=["label -1", "[0, "]),
    wrong_data("labels with fractions", "arrays:{files}/half.npz", says=["float64", "whole"]),
    wrong_data("too few labels", "arrays:{files}/few.npz", says=["(3,)", "expected [40]"]),
    wrong_data("floats to 255", "arrays:{files}/bytes.npz", says=["[0, 255]", "divide by 255?"]),
    wrong_data("floats below zero", "arrays:{files}/minus.npz", says=["[-1, 1]", "[0, 1]"]),
    wrong_data("pixels of nan", "arrays:{files}/nan.npz", says=["nan", "[0, 1]"]),
    wrong_data("flat images", "arrays:{files}/flat.npz", says=["(40, 64)", "[N, H, W, C]"]),
    wrong_data("two sizes", "arrays:{files}/sizes.npz", says=["(9, 9, 1)", "(8, 8, 1)"]),
    wrong_data("empty archive", "arrays:{files}/none.npz", says=["train_image", "nothing"]),
    wrong_data("key of an archive", "arrays:{files}/key.npz",
               says=["no train_label", "'train_labels'"]),
    wrong_data("damaged archive", "arrays:{files}/torn.npz", says=["torn.npz", ".npz"]),
    wrong_data("no such folder", "folder:{files}/pitcures", says=["pitcures", "'pictures'"]),
    wrong_data("damaged picture", "folder:{files}/pictures", says=["1.png", "undamaged"]),
    wrong_data("no data set of TFDS", "tfds:mnst", "--config.data.data_dir={files}/records",
               says=["mnst", "did you mean 'mnist'"]),
    wrong_data("not prepared", "tfds:cifar10", "--config.data.data_dir={files}/records",
               says=["cifar10", "not prepared", "records"]),
    wrong_data("damaged records", "tfds:mnist", "--config.data.data_dir={files}/records",
               says=["mnist-train", "undamaged record file"]),
    wrong_data("kind of data", "array:x.npz", says=["'array:x.npz'", "did you mean 'arrays'"]),
    # --- folders of runs
    wrong("file for a folder", "--workdir={files}/tiny.py", says=["tiny.py", "cannot be written"]),
    wrong("folder below a file", "--workdir={files}/tiny.py/x",
          says=["tiny.py/x", "Not a directory"]),
    wrong("no place for a folder", "--workdir=/proc/nowhere/run", says=["/proc/nowhere"]),
    wrong("full disk", patch=no_space, says=["workdir", "No space left on device"]),
    wrong("another run's folder", "--workdir={files}/run", "--config.threat.radius=0.2",
          says=["config.threat.radius=0.1", "0.2 here", "another --workdir"]),
    wrong("a folder with torn settings", "--workdir={files}/torn", says=["torn/config.json"]),
    wrong_run("no run", "nowhere", says=["nowhere", "with a config.json"]),
    wrong_run("run without its config", "pictures", says=["pictures", "with a config.json"]),
    wrong_run("torn settings", "torn", says=["torn/config.json", "no JSON"]),
    wrong_run("settings of another kind", "list", says=["list/config.json", "holds [1]"]),
    wrong_run("misspelt key of a run", "run", f"{PGD}.stepps=3", says=["stepps", "'steps'"]),
    wrong_run("full disk of a run", "run", patch=no_space, says=["No space left on device"]),
    wrong_run("no checkpoint", "new", says=["new/checkpoints", "no checkpoint here"]),
    wrong_run("all checkpoints broken", "broken", says=["broken/checkpoints", "checkpoint 2"]),
    wrong_run("another network", "run", "--config.network.widths=(8,8)",
              says=["another network", "expected float32"]),
    wrong_run("weights of nan", "nan", says=["weights", "conv1", "not finite"], compiles=True),
]  # fmt: skip


def archive(path: Path, **changes: Any) -> None:
    """An .npz of 40 images 8x8 and three classes; `None` takes an array out."""
    image = np.zeros((40, 8, 8, 1), np.uint8)
    label = np.arange(40) % 3
    arrays = dict(train_image=image, train_label=label, test_image=image, test_label=label)
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(path, **arrays)


def config_file(path: Path, body: str) -> None:
    path.write_text(f"from rain_jax.config import config\n{body}\n")


def write_data(files: Path) -> None:
    import PIL.Image
    import tfds_fixture

    archive(files / "good.npz")
    archive(files / "high.npz", train_label=np.full(40, 7), class_names=np.array(["a", "b", "c"]))
    archive(files / "low.npz", train_label=np.full(40, -1))
    archive(files / "half.npz", train_label=np.full(40, 0.5))
    archive(files / "few.npz", train_label=np.zeros(3, int))
    ramp = np.linspace(0, 1, 40 * 64).reshape(40, 8, 8, 1)
    archive(files / "bytes.npz", train_image=255 * ramp)
    archive(files / "minus.npz", train_image=2 * ramp - 1)
    archive(files / "nan.npz", train_image=np.where(ramp == 1, np.nan, ramp))
    archive(files / "flat.npz", train_image=np.zeros((40, 64), np.uint8))
    archive(files / "sizes.npz", test_image=np.zeros((40, 9, 9, 1), np.uint8))
    archive(files / "key.npz", train_label=None, train_labels=np.zeros(40, int))
    np.savez(files / "none.npz")
    content = (files / "good.npz").read_bytes()
    (files / "torn.npz").write_bytes(content[: len(content) // 2])
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = files / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(2):
                PIL.Image.new("L", (8, 8)).save(folder / f"{number}.png")
    (files / "pictures/train/cat/1.png").write_bytes(b"no picture")
    features = tfds_fixture.image_features((8, 8, 1), list("abc"))
    examples = [(np.zeros((8, 8, 1), np.uint8), i % 3) for i in range(40)]
    version = tfds_fixture.write(
        files / "records", "mnist", features, {"train": examples, "test": examples}
    )
    record = next(version.glob("mnist-train*"))
    record.write_bytes(record.read_bytes()[:100])


def write_runs(files: Path) -> None:
    """Folders as a training leaves them, whole and damaged, without any training."""
    experiment = build.experiment(cli.load_config(str(files / "tiny.py")))
    variables = drawn.of(experiment.network, experiment.splits.train.shape)
    params = variables.pop("params")
    model = {"params": params, "model_state": variables, "average": params}
    workdir.claim(files / "new", experiment.config)
    for name in ("run", "broken", "nan", "torn", "list"):
        shutil.copytree(files / "new", files / name)
    with Checkpoints(files / "run" / "checkpoints") as checkpoints:
        checkpoints.save(2, model, {"step": 2})
    shutil.copytree(files / "run" / "checkpoints", files / "broken" / "checkpoints")
    for path in (files / "broken" / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    model["average"] = {
        **params,
        "conv1": {"kernel": params["conv1"]["kernel"] * np.float32(np.nan)},
    }
    with Checkpoints(files / "nan" / "checkpoints") as checkpoints:
        checkpoints.save(2, model, {"step": 2})
    (files / "torn" / "config.json").write_text('{"seed": 0, "meth')
    (files / "list" / "config.json").write_text("[1]")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files of every kind; nothing writes to them."""
    folder = tmp_path_factory.mktemp("files")
    commands.write_config(folder)
    (folder / "syntax.py").write_text("def get_config():\n    return (\n")
    (folder / "empty.py").write_text("")
    config_file(folder / "number.py", "def get_config():\n    return 5")
    config_file(folder / "raises.py", "tpyo")
    config_file(folder / "section.py", "def get_config():\n    return config(thret=dict())")
    text = (folder / "tiny.py").read_text().replace("radius=0.1", "radius='8/255'")
    (folder / "text.py").write_text(text)
    write_data(folder)
    write_runs(folder)
    return folder


def listing(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_met_by_one_line(
    case: Case, files: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"train": train, "evaluate": evaluate}[case.command]
    arguments = [argument.format(files=files) for argument in case.arguments]
    if case.command == "train" and not any(a.startswith("--workdir=") for a in arguments):
        arguments.append(f"--workdir={tmp_path / 'run'}")
    if case.patch is not None:
        case.patch(monkeypatch)
    before = listing(files)
    jax.clear_caches()  # so that a program which an earlier test compiled is compiled again
    COMPILED.clear()
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        if case.command == "train":
            cli.run(module.main, argv=["train", *arguments])
        else:
            cli.run(module.main, workdir.read_config, ["evaluate", *arguments])
    lines = [line for line in capfd.readouterr().err.splitlines() if not NOISE.match(line)]
    assert ended.value.code == 2, lines
    assert len(lines) == 1, "\n".join(lines)
    assert lines[0].startswith("error: ")
    for said in case.says:
        assert said.format() in lines[0], lines[0]
    if not case.compiles:
        assert not COMPILED
    # Neither the files at hand nor a folder for results: at most the empty folder is made.
    assert listing(files) == before
    assert not listing(tmp_path / "run")


@pytest.mark.parametrize(
    "module, arguments, says",
    [
        ("train", ["--config=experiments/configs/quickstrat.py"], "'quickstart.py'"),
        ("train", ["--config={files}/tiny.py", "--config.threat.radius=8"], "8/255"),
        ("train", ["--config={files}/tiny.py", "--config.network.nam=cnn"], "'name'"),
        ("evaluate", ["--workdir={files}/new"], "no checkpoint here"),
        ("evaluate", ["--workdir={files}/run", "--config.data.name=digts"], "'digits'"),
    ],
)  # fmt: skip
def test_the_commands_themselves(
    module: str, arguments: list[str], says: str, files: Path, tmp_path: Path
) -> None:
    given = [argument.format(files=files) for argument in arguments]
    if module == "train":
        given.append(f"--workdir={tmp_path / 'run'}")
    commands.command(module, *given, folder=tmp_path, code=2)
    lines = (tmp_path / "stderr").read_text().splitlines()
    lines = [line for line in lines if not NOISE.match(line)]
    assert len(lines) == 1, "\n".join(lines)
    assert says in lines[0]
    assert not (tmp_path / "stdout").read_text()
    assert not (tmp_path / "run").exists()


def test_a_platform_that_is_not_here(files: Path, tmp_path: Path) -> None:
    process = commands.start(
        "train", f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'run'}",
        folder=tmp_path, JAX_PLATFORMS="gpuu",
    )  # fmt: skip
    commands.finish(process, tmp_path, code=2)
    lines = (tmp_path / "stderr").read_text().splitlines()
    lines = [line for line in lines if not NOISE.match(line)]
    assert len(lines) == 1, "\n".join(lines)
    assert "gpuu" in lines[0]


def test_where_a_mistake_was_met_is_shown_on_request(capfd: Any) -> None:
    with pytest.raises(SystemExit):
        cli.run(train.main, argv=["train", "--traceback", "--confg=x"])
    assert "Traceback" in capfd.readouterr().err


def test_help_says_what_the_command_does(capfd: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main, argv=["train", "--help"])
    assert ended.value.code == 0
    assert train.__doc__ is not None
    assert train.__doc__.splitlines()[0] in capfd.readouterr().out


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: pgd(Threat(linf, 0.1), steps=0), ["steps=0", "[1, inf)"]),
        (lambda: pgd(Threat(linf, 0.1), steps=1, step_size=2), ["step_size=2", "2/255"]),
        (lambda: models.cnn(10, widths=(8, 0)), ["widths=(8, 0)", ">= 1"]),
        (lambda: models.cnn(10, activation="rlu"), ["activation='rlu'", "'relu'"]),
        (lambda: data.load("digts"), ["'digts'", "'digits'"]),
        (lambda: data.from_arrays(np.zeros((2, 3)), [0, 1], name="x"), ["(2, 3)", "[N, H, W"]),
    ],
)
def test_the_library_refuses_alike(call: Callable[[], Any], says: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        call()
    assert "\n" not in str(refused.value)
    for said in says:
        assert said in str(refused.value)
