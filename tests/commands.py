"""Small runs of the real commands, in processes of their own."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import training
from rain_jax.checkpoints import Checkpoints
from rain_jax.config import build
from rain_jax.runs import evaluations
from rain_jax.runs.session import items_of, no_sums
from rain_jax.runs.step_programs import in_dispatches, plan_of

ROOT = Path(__file__).resolve().parents[1]
# Of any run, or of none: what is looked at, and what is measured.
NO_TRAINING = {"benchmark", "cifar10_ablations", "ladder", "sweep_radius", "sweep_tradeoff"}
CONFIGS = sorted(
    path for path in (ROOT / "experiments" / "configs").glob("*.py")
    if path.stem not in NO_TRAINING
)  # fmt: skip
LIMIT = 240.0  # seconds that any command may take, on a busy machine

CONFIG = '''"""Digits, an adversary of two steps, a network with all that a state can hold."""

from rain_jax.config import config


def get_config():
    attack = dict(name="pgd", steps=2, keep="last")
    return config(
        seed=3,
        data=dict(name="digits", holdout=200, limit_train=640, limit_test=83),
        network=dict(name="cnn", widths=(16,), hidden=32, batch_norm=True),
        threat=dict(norm="linf", radius=0.1),
        method=dict(name="adversarial", attack=attack),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.1),
        average=dict(decay=0.9),
        augment=dict(crop_padding=1),
        training=dict(epochs=3, batch_size=64, log_every=2),
        validation=dict(every_epochs=1, attack=attack, batch_size=100),
        checkpoints=dict(every_epochs=0.3),
        evaluation=dict(attacks=dict(pgd40=dict(name="pgd", steps=3)), batch_size=32),
    )
'''


def write_config(folder: Path) -> Path:
    """The file for `--config`; 10 steps make an epoch of it, 3 steps lie between checkpoints."""
    path = folder / "tiny.py"
    path.write_text(CONFIG)
    return path


def start(
    module: str, *arguments: Any, devices: int = 8, folder: Path, before: str = "",
    **environment: str,
) -> subprocess.Popen:  # fmt: skip
    """`python -m experiments.MODULE` on simulated devices; output goes to files in `folder`.

    Compiled as the tests' own programs are. Into files and not pipes: a child that nobody reads
    must not wait, and what a killed one has said must not be lost. `before` is a program that it
    runs first, which may change what the command does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    program = ["-m", f"experiments.{module}"]
    if before:
        run = f"run_module('experiments.{module}', run_name='__main__', alter_sys=True)"
        program = ["-c", f"{before}\nimport runpy\nrunpy.{run}"]
    with (folder / "stdout").open("a") as out, (folder / "stderr").open("a") as err:
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            env=environment, stdout=out, stderr=err, cwd=ROOT,
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path, code: int = 0) -> str:
    """Waits for the end, checks the exit code and returns all that was said."""
    try:
        found = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    said = (folder / "stdout").read_text() + (folder / "stderr").read_text()
    assert found == code, f"exit code {found}, not {code}:\n{said[-6000:]}"
    return said


def command(module: str, *arguments: Any, folder: Path, devices: int = 8, code: int = 0) -> str:
    """Runs a command to its end and returns what it said."""
    return finish(start(module, *arguments, devices=devices, folder=folder), folder, code)


def start_together(
    module: str, *arguments: Any, folder: Path, processes: int = 2, devices: int = 4
) -> list[tuple[subprocess.Popen, Path]]:
    """One job of several processes that share the work: each, and the folder of its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [folder / f"process{number}" for number in range(processes)]
    return [
        (
            start(
                module, *arguments, devices=devices, folder=said,
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES=str(processes), JAX_PROCESS_ID=str(number),
            ),
            said,
        )
        for number, said in enumerate(folders)
    ]  # fmt: skip


def finish_together(job: list[tuple[subprocess.Popen, Path]], code: int = 0) -> list[str]:
    """Waits for the end of all and returns what each said; one that fails ends the others."""
    try:
        return [finish(process, said, code) for process, said in job]
    finally:
        for process, _ in job:
            process.kill()
            process.wait()


def kill_when(
    process: subprocess.Popen, ready: Callable[[], bool], number: int = signal.SIGKILL
) -> bool:
    """Sends the signal at the first moment when `ready()`; False if the process ended before."""
    until = time.monotonic() + LIMIT
    while process.poll() is None:
        if ready():
            process.send_signal(number)
            return process.wait(LIMIT) != 0
        assert time.monotonic() < until, "what the test waits for did not come"
        time.sleep(0.0005)
    return False


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that is only half there yet is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder: Path) -> np.ndarray:
    return np.array([line["loss"] for line in metrics(folder) if line["kind"] == "train"])


def evaluated(run: Path) -> Path:
    """The folder of a run's latest evaluation."""
    found = evaluations.latest(run)
    assert found is not None
    return found


def results(folder: Path) -> dict[str, Any]:
    """evaluation.json without what may differ between two runs: times and provenance."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: kept(v) for k, v in value.items() if k not in ("seconds", "provenance")}

    return kept(json.loads((evaluated(folder) / "evaluation.json").read_text()))


@functools.cache
def shapes_of(config: str) -> tuple[Any, Any]:
    """What the two items of a checkpoint look like in runs of this config: one trace for them all.

    It is JSON, so that it can be remembered.
    """
    experiment = build.experiment(json.loads(config))
    plan = plan_of(experiment)
    method = training.minimise(
        experiment.objective,
        experiment.optimiser(plan.total, plan.per_epoch),
        average=experiment.average(plan.total, plan.per_epoch),
    )
    images = jnp.zeros((1, *experiment.splits.train.shape), jnp.float32)
    state = jax.eval_shape(
        lambda key: method.init(experiment.network.init(key, images)), jax.random.key(0)
    )
    return items_of(state, no_sums(experiment, method, state))


def final(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Everything in the newest checkpoint of a run, by name: read on one device of this process."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore(*shapes_of((folder / "config.json").read_text()))
    assert found is not None
    assert not checkpoints.skipped
    step, *items = found
    leaves, _ = jax.tree.flatten_with_path(dict(zip(("model", "train"), items, strict=True)))
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def one_by_one(feeds: Iterator[tuple[Any, Any]], count: int) -> Iterator[Any]:
    """What dispatches of one step each are fed, `count` of them."""
    return in_dispatches(feeds, 0, count, 1, lambda done: True)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, leaf by leaf."""
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def without_runs(spec: dict[str, Any]) -> list[tuple[str, Any]]:
    """Changes to a config that begins with other runs, so that it can do without them."""
    changes: list[tuple[str, Any]] = [("start.classifier", None), ("start.defence", None)]
    if (spec.get("defence") or {}).get("statistics"):
        changes += [("defence.table", "fd"), ("defence.statistics", None)]
    return changes
