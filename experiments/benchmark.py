"""How fast ours is beside other libraries that calculate the same.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py --workdir=DIR
    python -m experiments.benchmark --config=experiments/configs/benchmark.py --config.suite=jpeg
    taskset -c 0 python -m experiments.benchmark ...                  on one core

Prints a table and writes benchmark.json into `--workdir`. Ratios are a peer's time over ours, more
than 1 where ours is faster: the median over rounds in which all take turns, and [least, most].
Compiling is told apart. Milliseconds are of this machine and whatever else it did. Peers that are
not installed say so; PyTorch comes with the extra `peers`, and what is measured beside it with
`pip install --no-deps kornia kornia_rs`.
"""

import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections

from experiments import bench_suites, workdir
from experiments.bench_clock import Row, cpus, measure
from experiments.build import plain
from experiments.cli import run
from experiments.logs import provenance, table, write_json
from experiments.schema import call, convert, filled
from rain_jax.checks import UsageError, nearest, one_of, within

SUITES: dict[str, Callable[..., list[Row]]] = {
    "edsr": bench_suites.edsr,
    "jpeg": bench_suites.jpeg,
    "rain": bench_suites.rain,
}
PEERS = ("kornia", "pillow", "torch")
_DEFAULTS = {"suite": "all", "rounds": 7, "seconds": 0.2}


def config(**sections: Any) -> ml_collections.ConfigDict:
    """A complete config: `suite` ("all" or one), `rounds`, `seconds` a turn, and each suite's own.

    A suite's section are its arguments.
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
    return ml_collections.ConfigDict(whole, type_safe=False)


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A config with some values replaced: pairs of a dotted key and its value."""
    whole = plain(config_)
    for key, value in changes:
        section, dot, last = key.partition(".")
        whole[section] = {**(whole.get(section) or {}), last: value} if dot else value
    return config(**whole)


def cells(line: dict[str, Any]) -> list[list[str]]:
    """The rows of the table that a line makes, one for each peer."""
    flops = "" if line["gflop"] is None else f"{line['gflop']:.3g}"
    own = [f"{line['ours_milliseconds'][0]:.3g}", f"{line['compile_seconds']:.2f}", flops]
    found = []
    for peer, told in line["peers"].items():
        if "absent" in told:
            found.append([line["what"], peer, told["absent"], "", "", *own])
            continue
        differs = f"{max(told['difference']):.1g}" if "difference" in told else "drawn"
        found.append([line["what"], peer, *map(_ratio, (told["wall"], told["cpu"])), differs, *own])
    return found


def _ratio(spread: Sequence[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*spread)


HEADERS = ("what", "peer", "peer / ours", "CPU time", "difference",
           "ours ms", "compile s", "GFLOP")  # fmt: skip


def main(settings: ml_collections.ConfigDict, folder: Path) -> None:
    """Runs the suites that the config names; writes after every line, since the next may fail."""
    spec = plain(config(**plain(settings)))
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    try:
        _run(spec, folder)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _run(spec: dict[str, Any], folder: Path) -> None:
    names = list(SUITES) if spec["suite"] == "all" else [spec["suite"]]
    rows = [row for name in names for row in call(f"config.{name}", SUITES[name], spec[name])]
    folder.mkdir(parents=True, exist_ok=True)
    workdir.check_writable(folder)
    about: dict[str, Any] = {
        "asked": {key: spec[key] for key in (*_DEFAULTS, *names)},
        "threads": cpus(),
        "load": os.getloadavg(),  # what else was running: ratios suffer from it as well
        "peers": {name: _version(name) for name in PEERS},
        "provenance": provenance(),
    }
    print(f"{about['threads']} threads on each side, load {about['load'][0]:.1f}", flush=True)
    lines: list[dict[str, Any]] = []
    for row in rows:
        lines.append(measure(row, spec["rounds"], spec["seconds"]))
        print(f"  {row.what}: done", flush=True)
        write_json(folder / "benchmark.json", {**about, "lines": lines})
    print("\n" + table([cell for line in lines for cell in cells(line)], HEADERS), flush=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run(main, changed=changed)
