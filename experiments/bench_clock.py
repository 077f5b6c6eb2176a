"""How long a function of ours takes beside others that do the same: ratios, by turns.

A time says something about a machine and what else it was doing; a ratio of two that took turns in
one process says more about the programs. So the turns are interleaved, each round gives one ratio,
and what is told is their median and how far they spread.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

# Seconds between two turns: PyTorch's threads go on spinning for milliseconds after their work.
PAUSE = 0.05


class Side(NamedTuple):
    """A peer, ready to go: `call()` returns its results once they are there.

    `read` makes arrays of them that lie as ours do.
    """

    call: Callable[[], Any]
    read: Callable[[Any], list[np.ndarray]]


class Row(NamedTuple):
    """A function of ours, jitted here, its arguments, and makers of the peers by name.

    `alike` is False where both draw at random, and results are not compared.
    """

    what: str
    ours: Callable[..., Any]
    arguments: tuple[Any, ...]
    peers: Mapping[str, Callable[[], Side]]
    alike: bool = True


def cpus() -> int:
    """How many cores this process may use: as many as `taskset` has left it."""
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(here) or os.cpu_count() or 1


def measure(row: Row, rounds: int, seconds: float) -> dict[str, Any]:
    """A line of results. A turn repeats its call for about `seconds`, and is one call at least.

    `wall` and `cpu` of a peer are its time over ours, [median, least, most] over the rounds: by the
    clock, and summed over cores. `difference` compares its results with ours, ||theirs - ours|| /
    ||ours|| of each. A peer that cannot run says why instead.
    """
    function = jax.jit(row.ours)
    began = time.perf_counter()
    lowered = function.lower(*row.arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()

    def call() -> Any:
        return jax.block_until_ready(program(*row.arguments))

    results = [np.asarray(leaf) for leaf in jax.tree.leaves(call())]
    line: dict[str, Any] = {
        "what": row.what,
        "trace_seconds": traced - began,
        "compile_seconds": compiled - traced,
        # Additions and multiplications, as the compiler counts them in its program; None where it
        # does not.
        "gflop": _counted(program),
        "peers": {},
    }
    sides = {"ours": call}
    for name, make in row.peers.items():
        try:
            side = make()
            began = time.perf_counter()
            first = side.call()
            told: dict[str, Any] = {"first_call_seconds": time.perf_counter() - began}
            if row.alike:
                pairs = zip(side.read(first), results, strict=True)
                told["difference"] = [_difference(*pair) for pair in pairs]
            sides[name] = side.call
        except Exception as error:  # a peer that does not work here is a line, and not our end
            absent = isinstance(error, ImportError)
            told = {"absent": f"{'not installed' if absent else 'fails'}: {_first_line(error)}"}
        line["peers"][name] = told

    repeats = {who: max(1, math.ceil(seconds / _once(turn))) for who, turn in sides.items()}
    turns = {who: np.zeros((rounds, 2)) for who in sides}
    for number in range(rounds):
        for who, turn in sides.items():
            time.sleep(PAUSE)
            turns[who][number] = _turn(turn, repeats[who])
    line["ours_milliseconds"] = _spread(1000 * turns["ours"][:, 0])
    for who in list(sides)[1:]:
        ratio = turns[who] / turns["ours"]
        line["peers"][who] |= {"wall": _spread(ratio[:, 0]), "cpu": _spread(ratio[:, 1])}
    return line


def _once(call: Callable[[], Any]) -> float:
    return max(_turn(call, 1)[0], 1e-6)


def _turn(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of one call, by the clock and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _spread(values: np.ndarray) -> list[float]:
    return [float(f(values)) for f in (np.median, np.min, np.max)]


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


def _counted(program: Any) -> float | None:
    flops = (program.cost_analysis() or {}).get("flops", 0.0)
    return flops / 1e9 if flops > 0 else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]
