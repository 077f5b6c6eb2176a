"""How long a function of ours takes beside others that do the same: ratios, by turns.

A time says something about a machine and what else it was doing; a ratio of two that took turns in
one process says more about the programs. So the turns are interleaved, each round gives one ratio,
and what is told is their median and how far they spread.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benching.counted import gflop_of

# Seconds between two turns: PyTorch's threads go on spinning for milliseconds after their work.
PAUSE = 0.05


def _leaves(found: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def _nothing(found: Any) -> Any:
    return found


class Side(NamedTuple):
    """Somebody ready to go.

    `call()` does the work, `wait` returns once the results of a call are there: after every turn,
    so that steps which follow from each other need not wait one by one. `read` makes arrays of
    results that lie as the other sides' do. `memory()` tells the most bytes it has held since it
    was made, where it knows; `gflop` is the work of a call of ours, if that is no single program.
    """

    call: Callable[[], Any]
    read: Callable[[Any], list[np.ndarray]] = _leaves
    wait: Callable[[Any], Any] = _nothing
    memory: Callable[[], int | None] = lambda: None
    gflop: float | None = None


class Program(NamedTuple):
    """A function of ours, which is compiled here, and its arguments.

    Where it is `carried` its results are (state, results): the first argument is donated, and the
    state takes its place in the next call.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    carried: bool = False
    read: Callable[[Any], list[np.ndarray]] = _leaves


class Row(NamedTuple):
    """What is measured by turns: ours, and makers of the peers by name.

    Ours is made when its turn comes, since a state may take much room. `alike` is False where both
    draw at random, and results are not compared. A call goes through so many `images` and has to
    move so many `bytes`, read or written, where that is the point of it; `dtype` is what its
    products are calculated in.
    """

    what: str
    ours: Callable[[], Program | Side]
    peers: Mapping[str, Callable[[], Side]] = {}
    alike: bool = True
    images: int = 0
    bytes: int = 0
    dtype: str = "float32"


class Once(NamedTuple):
    """What is measured in its own way, and the entries of its line."""

    what: str
    told: Callable[[], dict[str, Any]]


class Peaks(NamedTuple):
    """What this machine reaches: GFLOP/s of a matrix product by dtype, bytes/s of a copy."""

    products: Mapping[str, float] = {}
    copy: float | None = None


def cpus() -> int:
    """How many cores this process may use: as many as `taskset` has left it."""
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(here) or os.cpu_count() or 1


def spread(values: Any) -> list[float]:
    """[median, least, most]."""
    return [float(f(np.asarray(values))) for f in (np.median, np.min, np.max)]


def measure(
    row: Row,
    rounds: int,
    seconds: float,
    peaks: Peaks | None = None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """A line of results. A turn repeats its call for about `seconds`, and is one call at least.

    `wall` and `cpu` of a peer are its time over ours, [median, least, most] over the rounds: by the
    clock, and summed over cores; `first_call` is the ratio of the first calls, compiling included,
    of which there is one. `difference` compares its results with ours, ||theirs - ours|| /
    ||ours|| of each. A peer that cannot run says why instead. `peak_fraction` is what ours reaches
    of a matrix product's speed, `copy_fraction` of a copy's. A profile of one call of ours goes
    into the folder `trace`.
    """
    found = row.ours()
    began = time.perf_counter()
    mine, told = ready(found)
    first = mine.wait(mine.call())
    line: dict[str, Any] = {
        "what": row.what,
        **told,
        "first_call_seconds": time.perf_counter() - began,
        "peers": {},
    }
    results = mine.read(first) if row.alike and row.peers else []
    sides = {"ours": mine}
    for name, make in row.peers.items():
        try:
            side = make()
            began = time.perf_counter()
            first = side.wait(side.call())
            took = time.perf_counter() - began
            told = {
                "first_call_seconds": took,
                "first_call": took / line["first_call_seconds"],
            }
            if (most := side.memory()) is not None:
                told["peak_bytes"] = most
            if row.alike:
                pairs = zip(side.read(first), results, strict=True)
                told["difference"] = [_difference(*pair) for pair in pairs]
            sides[name] = side
        except Exception as error:  # a peer that does not work here is a line, and not our end
            absent = isinstance(error, ImportError)
            told = {"absent": f"{'not installed' if absent else 'fails'}: {_first_line(error)}"}
        line["peers"][name] = told

    repeats = {who: max(1, math.ceil(seconds / _once(side))) for who, side in sides.items()}
    turns = {who: np.zeros((rounds, 2)) for who in sides}
    for number in range(rounds):
        for who, side in sides.items():
            time.sleep(PAUSE)
            turns[who][number] = _turn(side, repeats[who])
    own = turns["ours"][:, 0]
    line["ours_milliseconds"] = spread(1000 * own)
    line |= _rates(row, line.get("gflop"), own, peaks or Peaks())
    for who in list(sides)[1:]:
        ratio = turns[who] / turns["ours"]
        line["peers"][who] |= {"wall": spread(ratio[:, 0]), "cpu": spread(ratio[:, 1])}
    if trace is not None:
        with jax.profiler.trace(trace):
            mine.wait(mine.call())
        line["profile"] = str(trace)
    return line


def ready(given: Program | Side) -> tuple[Side, dict[str, Any]]:
    """Ours, compiled and ready to go, and what is known of it by then."""
    if isinstance(given, Side):
        return given, {"gflop": given.gflop}
    function = jax.jit(given.function, donate_argnums=(0,) if given.carried else ())
    began = time.perf_counter()
    traced = function.trace(*given.arguments)
    lowered = traced.lower()
    written = time.perf_counter()
    program = lowered.compile()
    told = {
        "trace_seconds": written - began,
        "compile_seconds": time.perf_counter() - written,
        "gflop": gflop_of(given.function, *given.arguments),
        "peak_bytes": _most_bytes(program),
    }
    held = list(given.arguments)
    # On CPU calls that nothing ties together would run side by side.
    side_by_side = jax.default_backend() == "cpu" and not given.carried

    def call() -> Any:
        found = program(*held)
        if given.carried:
            held[0], found = found
        return jax.block_until_ready(found) if side_by_side else found

    return Side(call, given.read, jax.block_until_ready), told


def _most_bytes(program: Any) -> int | None:
    """The most memory that a compiled program holds at once, its arguments included."""
    found = program.memory_analysis()
    if found is None:
        return None
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(max(kept + found.temp_size_in_bytes, found.peak_memory_in_bytes))


def _rates(row: Row, gflop: float | None, own: np.ndarray, peaks: Peaks) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if row.images:
        told["images_per_second"] = spread(row.images / own)
    if row.bytes:
        told["bytes_per_second"] = spread(row.bytes / own)
        if peaks.copy:
            told["copy_fraction"] = spread(row.bytes / own / peaks.copy)
    if gflop and row.dtype in peaks.products:
        told["peak_fraction"] = spread(gflop / own / peaks.products[row.dtype])
    return told


def _once(side: Side) -> float:
    return max(_turn(side, 1)[0], 1e-6)


def _turn(side: Side, repeats: int) -> tuple[float, float]:
    """Seconds of one call, by the clock and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        found = side.call()
    side.wait(found)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]
