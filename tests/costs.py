"""What the tests cost, and why: `pytest -p costs --costs=FILE` adds a line of JSON for each.

With `-n 2` the files are FILEgw0 and FILEgw1. `python tests/costs.py FILE..` prints the tests and
the test files that cost most: seconds of CPU time, how many of them went into tracing and
compiling, and how many programs that was; what came from the compilation cache counts as one, too.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

# What JAX calls its own measurements.
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_now: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", help="a file for what each test cost")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--costs") is None:
        return
    import jax

    def listen(event: str, seconds: float, **_) -> None:
        if event in _EVENTS:
            _now[_EVENTS[event]] += seconds
            _now["programs"] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    config.pluginmanager.register(_Costs(Path(config.getoption("--costs"))))


class _Costs:
    """Writes what a test and its fixtures took."""

    def __init__(self, path: Path):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        self._path = path.with_name(f"{path.name}{worker}")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        _now.clear()
        began, used = time.monotonic(), _cpu()
        yield
        line = {"test": item.nodeid, "wall": time.monotonic() - began, "cpu": _cpu() - used, **_now}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _cpu() -> float:
    """Seconds of this process and of those that it has started and seen end."""
    return sum(os.times()[:4])


def main(paths: list[str]) -> None:
    """Prints the two tables."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    by_file: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in lines:
        for name, value in line.items():
            if name != "test":
                by_file[line["test"].split("::")[0]][name] += value
    for title, rows in (
        ("tests", {line["test"]: line for line in lines}), ("files", by_file), ("all", {"": {
            name: sum(line.get(name, 0.0) for line in lines)
            for name in ("cpu", "wall", "trace", "lower", "compile", "programs")}}),
    ):  # fmt: skip
        print(f"\n{'cpu s':>7} {'wall':>7} {'trace':>7} {'lower':>7} {'compile':>8} "
              f"{'programs':>9}  {title}")  # fmt: skip
        for name, row in sorted(rows.items(), key=lambda one: -one[1]["cpu"])[:60]:
            print(
                f"{row['cpu']:7.1f} {row['wall']:7.1f} {row.get('trace', 0):7.1f} "
                f"{row.get('lower', 0):7.1f} {row.get('compile', 0):8.1f} "
                f"{row.get('programs', 0):9.0f}  {name}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
