"""What a compiled program sends from device to device, and whether it computes meanwhile."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.scaling_counts.hlo import FREE, Op, Program, Shape
from rain_jax.checks import UsageError

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast", "send", "recv",
)  # fmt: skip


class Part(NamedTuple):
    """One array of a collective: XLA combines several into one."""

    bytes: int
    scalar: bool
    op_name: str


class Collective(NamedTuple):
    """One operation between devices, as often as it runs in a call."""

    kind: str
    parts: tuple[Part, ...]
    groups: str  # as XLA writes them, "{{0,1,2,3}}"
    times: int
    looped: bool
    hidden: bool = False  # whether it is under way while something else is computed

    @property
    def bytes(self) -> int:
        """Of one run."""
        return sum(part.bytes for part in self.parts)


def collectives(program: Program) -> list[Collective]:
    """All of them. Raises `UsageError` for one in a loop that runs nobody knows how often.

    A TPU's compiler takes one that it hides into a chain of fusions, which begin it, go on with it
    beside their own work, and end it; each names the whole of it, and it is counted once.
    """
    found = []
    begun: set[tuple[str, str]] = set()
    for op, times, inside, looped in program.executed():
        sent: list[tuple[Op, str, str]] = []  # with the computation it is in, and its chain
        if op.code.removesuffix("-start") in COLLECTIVES:
            sent = [(op, inside, "")]
        elif op.code == "fusion":
            (fused,) = op.called("calls")
            sent = [(own, fused, chain) for own, chain in _chained(program.computations[fused])]
        for own, place, chain in sent:
            if (inside, chain) in begun:
                continue
            if chain:
                begun.add((inside, chain))
            kind = own.code.removesuffix("-start")
            if times is None:
                raise UsageError(
                    f"{own.name}: {kind} in a loop of unknown length: its bytes cannot be counted"
                )
            names = _names_of_parts(program.computations[place], own)
            groups = re.search(r"replica_groups=(\{\{.*?\}\}|\{\}|\[[^ ]*)", own.attributes)
            parts = tuple(
                Part(shape.bytes, not shape.dims, names.get(number, own.op_name))
                for number, shape in enumerate(_results(own, kind))
            )
            hidden = bool(chain) or _beside(program.computations[inside], own)
            found.append(Collective(
                kind, parts, groups[1].rstrip(",") if groups else "", times, looped, hidden
            ))  # fmt: skip
    return found


def _chained(fused: dict[str, Op]) -> Iterator[tuple[Op, str]]:
    """The collectives inside of a fusion, and the chains that they are links of, "" for none."""
    for op in fused.values():
        if op.code.removesuffix("-start") in COLLECTIVES:
            chain = re.search(r'chain_id="(\d+)"', op.attributes)
            yield op, chain[1] if chain else ""


def _beside(computation: dict[str, Op], started: Op) -> bool:
    """Whether something is computed between the start of a collective and its end.

    In a scheduled program, whose lines are in the order in which they run.
    """
    if not started.code.endswith("-start"):
        return False
    running = False
    for op in computation.values():
        if running and started.name in op.operands:
            return False
        if running and op.code not in FREE:
            return True
        running = running or op is started
    return False


def _results(op: Op, kind: str) -> tuple[Shape, ...]:
    """What a collective gives; one that is started early names what it was given before."""
    if op.code == kind or kind == "all-reduce":
        return op.shapes
    arrays = [shape for shape in op.shapes if shape.dims]  # without what the hardware notes
    return tuple(arrays[len(arrays) // 2 :])


def _names_of_parts(computation: dict[str, Op], whole: Op) -> dict[int, str]:
    """Where the parts of a combined collective come from: what takes them out still says."""
    names = {}
    for op in computation.values():
        if op.code == "get-tuple-element" and op.operands == (whole.name,):
            place = re.search(r"index=(\d+)", op.attributes)
            if place and op.op_name:
                names[int(place[1])] = op.op_name
    return names
