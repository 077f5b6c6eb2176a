"""How fast ours is, and how fast beside other libraries that calculate the same.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py --workdir=DIR
    python -m experiments.benchmark --config=experiments/configs/benchmark.py:gpu
    python -m experiments.benchmark --config=experiments/configs/benchmark.py --config.suite=steps
    python -m experiments.benchmark ... --config.profile=true         traces of ours as well
    python -m experiments.benching.kernels FILE.trace.json.gz         what a GPU did in one of them
    taskset -c 0 python -m experiments.benchmark ...                  on one core

Prints a table and writes benchmark.json and benchmark.png into `--workdir`. Ratios are a peer's
time over ours, more than 1 where ours is faster: the median over rounds in which all take turns,
and [least, most]. Compiling is told apart: "first call" is the ratio of the first calls, with it.
"of peak" is what ours reaches of a matrix product measured in the same run, where bytes are moved
of a copy; "MB" the most memory that its program holds. Milliseconds are of this machine and
whatever else it did.

Peers that are not installed say so; PyTorch comes with the extra `peers`, and what else is measured
with `pip install --no-deps torchattacks kornia kornia_rs`.
"""

import inspect
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections

from experiments.benching import attacking, convolutions, first, images, machine, show, training
from experiments.benching.clock import Once, Peaks, Row, cpus, measure
from experiments.cli import run
from rain_jax.checks import UsageError, nearest, one_of, within
from rain_jax.config.schema import call, convert, filled
from rain_jax.config.tree import plain
from rain_jax.logs import provenance, table, write_json
from rain_jax.parallel import initialise
from rain_jax.runs import workdir

# "peak" comes before all others and always runs, since their lines tell a fraction of it.
SUITES: dict[str, Callable[..., Sequence[Row | Once]]] = {
    "checkpoint": machine.checkpoint,
    "compile": first.compiling,
    "convolutions": convolutions.convolutions,
    "data": machine.feeds,
    "dispatch": training.dispatch,
    "edsr": images.edsr,
    "evaluation": attacking.against,
    "jpeg": images.jpeg,
    "peak": machine.peak,
    "rain": images.rain,
    "steps": training.steps,
    "sweep": attacking.sweep,
}
PEERS = ("kornia", "pillow", "torch", "torchattacks")
_DEFAULTS = {"suite": "all", "rounds": 7, "seconds": 0.2, "profile": False}


def config(**sections: Any) -> ml_collections.ConfigDict:
    """A complete config: the suite ("all" or one), rounds, seconds a turn, and each suite's own.

    A suite's section are its arguments. With `profile` a trace of each line is written.
    """
    known = [*_DEFAULTS, *SUITES]
    for name in sections:
        if name not in known:
            raise UsageError(
                f"config.{name}: no such key: expected one of {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    whole = {**_DEFAULTS, **plain(sections)}
    for name, suite in SUITES.items():
        whole[name] = filled(suite, whole.get(name) or {})
    one_of("config.suite", whole["suite"], ("all", *SUITES))
    within("config.rounds", convert("config.rounds", whole["rounds"], int), 1)
    within("config.seconds", convert("config.seconds", whole["seconds"], float), 0.0)
    convert("config.profile", whole["profile"], bool)
    return ml_collections.ConfigDict(whole, type_safe=False)


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A config with some values replaced: pairs of a dotted key and its value."""
    whole = plain(config_)
    for key, value in changes:
        section, dot, last = key.partition(".")
        whole[section] = {**(whole.get(section) or {}), last: value} if dot else value
    return config(**whole)


def main(settings: ml_collections.ConfigDict, folder: Path) -> None:
    """Runs the suites that the config names; writes after every line, since the next may fail."""
    spec = plain(config(**plain(settings)))
    # On a GPU that JAX had taken whole, PyTorch would find no room.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    initialise()
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    try:
        _run(spec, folder)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        shutil.rmtree(_scratch(folder), ignore_errors=True)


def _scratch(folder: Path) -> Path:
    return folder / "scratch"


def made(name: str, spec: dict[str, Any], folder: Path) -> Sequence[Row | Once]:
    """The rows of a suite, whose settings are refused here where they are wrong."""
    suite = SUITES[name]
    takes = "folder" in inspect.signature(suite).parameters
    return call(
        f"config.{name}", suite, spec[name], **({"folder": _scratch(folder)} if takes else {})
    )


def _run(spec: dict[str, Any], folder: Path) -> None:
    names = [name for name in SUITES if name != "peak" and spec["suite"] in ("all", name)]
    # All of them now: the last one's mistake should not wait until the others are measured.
    own: Any = made("peak", spec, folder)
    rows = [row for name in names for row in made(name, spec, folder)]
    folder.mkdir(parents=True, exist_ok=True)
    workdir.check_writable(folder)
    about: dict[str, Any] = {
        "asked": {key: spec[key] for key in (*_DEFAULTS, "peak", *names)},
        "threads": cpus(),
        "load": os.getloadavg(),  # what else was running: ratios suffer from it as well
        "peers": {name: _version(name) for name in PEERS},
        "provenance": provenance(),
    }
    print(f"{about['threads']} threads on each side, load {about['load'][0]:.1f}", flush=True)
    lines: list[dict[str, Any]] = []
    peaks = None
    for row in (*own, *rows):
        if len(lines) == len(own):
            peaks = machine.peaks_of(lines, own)
        lines.append(_line(row, spec, folder, peaks))
        print(f"  {row.what}: done", flush=True)
        write_json(folder / "benchmark.json", {**about, "lines": lines})
    print("\n" + table([cell for line in lines for cell in show.cells(line)], show.HEADERS))
    if any("wall" in told for line in lines for told in line.get("peers", {}).values()):
        show.draw(lines, folder / "benchmark.png")


def _line(row: Row | Once, spec: dict[str, Any], folder: Path, peaks: Peaks | None) -> Any:
    if isinstance(row, Once):
        return {"what": row.what, **row.told()}
    trace = None
    if spec["profile"]:
        trace = folder / "profile" / re.sub(r"\W+", "_", row.what)
        print(f"  {row.what}: a trace for TensorBoard and Perfetto in {trace}", flush=True)
    return measure(row, spec["rounds"], spec["seconds"], peaks, trace)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run(main, changed=changed)
