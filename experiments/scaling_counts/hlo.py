"""Reads a compiled program as XLA prints it: its operations, and how often each of them runs.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; an attack is such a
loop. Here every operation counts as often as it is executed.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from rain_jax.checks import UsageError

# They move nothing: names for what is there, and what is counted where it is executed.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "async-start", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_CODE = re.compile(r"^([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array; `near` is memory beside the processor, such as a TPU's VMEM."""

    dtype: str
    dims: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> int:
        """As it is counted, without the padding of a layout."""
        bits = re.search(r"\d+", self.dtype)
        if self.dtype in ("token", "opaque"):
            return 0
        return math.prod(self.dims) * (8 if bits is None else int(bits[0])) // 8


class Op(NamedTuple):
    """One line of a program."""

    name: str
    code: str
    shapes: tuple[Shape, ...]  # of its result, several for a tuple
    operands: tuple[str, ...]
    attributes: str  # all that is said behind the operands
    text: str  # between the operands' brackets
    root: bool

    def called(self, *names: str) -> list[str]:
        """The computations that the attributes `names` name."""
        found = []
        for name in names:
            # One, `body=%a`, or several, `branch_computations={%a, %b}`.
            for many, one in re.findall(
                rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes
            ):
                found += [part.strip().lstrip("%") for part in (many or one).split(",")]
        return found

    @property
    def op_name(self) -> str:
        """Where the operation comes from, as JAX named it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Executed(NamedTuple):
    """An operation of the program, and how often it runs in one call; None where XLA cannot say."""

    op: Op
    times: int | None
    inside: str  # the computation that it is in
    looped: bool


class Program(NamedTuple):
    """Computations by name, each its operations by name."""

    computations: dict[str, dict[str, Op]]
    entry: str

    def executed(self) -> Iterator[Executed]:
        """Every operation that runs as one: those inside of a fusion are part of it."""
        yield from self._run(self.entry, 1, False)

    def _run(self, name: str, times: int | None, looped: bool) -> Iterator[Executed]:
        for op in self.computations[name].values():
            yield Executed(op, times, name, looped)
            if op.code == "while":
                trips = self.trips(op)
                inner = None if times is None or trips is None else times * trips
                for body in op.called("body"):
                    yield from self._run(body, inner, True)
            elif op.code in ("call", "conditional", "async-start"):
                # Of a conditional all branches are counted: an upper bound.
                parts = op.called(
                    "to_apply", "calls", "branch_computations", "true_computation",
                    "false_computation",
                )  # fmt: skip
                for part in parts:
                    yield from self._run(part, times, looped)

    def trips(self, loop: Op) -> int | None:
        """How often a loop runs: as XLA found out, or by its condition `counter < number`.

        JAX's scans count from zero by one, so that the number is what they run.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        (name,) = loop.called("condition")
        condition = self.computations[name]
        root = next(op for op in condition.values() if op.root)
        if root.code == "compare" and "direction=LT" in root.attributes:
            limit = condition[root.operands[1]]
            if limit.code == "constant" and limit.text.isdigit():
                return int(limit.text)
        return None


def read(text: str) -> Program:
    """A program from `compiled.as_text()`."""
    computations: dict[str, dict[str, Op]] = {}
    current: dict[str, Op] = {}
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line)
        if found:
            op = _operation(bool(found[1]), found[2], found[3])
            current[op.name] = op
    if not entry:
        raise UsageError("expected the text of a compiled program, with an ENTRY in it")
    return Program(computations, entry)


def _operation(root: bool, name: str, rest: str) -> Op:
    kind, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    found = _CODE.match(rest.lstrip())
    if found is None:
        raise UsageError(f"expected an operation of HLO, got {name} = {rest:.60}")
    inside, attributes = _split(rest.lstrip()[len(found[1]) :])
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
            "S(1)" in layout,
        )
        for dtype, dims, layout in _SHAPE.findall(kind)
    )
    operands = tuple(_NAME.findall(inside))
    return Op(name, found[1], shapes, operands, attributes, inside[1:-1], root)


def _split(text: str) -> tuple[str, str]:
    """The brackets that `text` begins with, and what is behind them."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    raise UsageError(f"expected closed brackets: {text:.60}")
