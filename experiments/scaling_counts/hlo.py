"""Reads a compiled program as XLA prints it: what it sends, multiplies and moves.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; an attack is such a
loop. Here every operation counts as often as it is executed.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from rain_jax.checks import UsageError

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast", "send", "recv",
)  # fmt: skip
# They move nothing: names for what is there, and what is counted where it is executed.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "async-start", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip
_SLICING = ("slice", "dynamic-slice", "gather")

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


# --- What is sent ------------------------------------------------------------------------------


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
        if running and op.code not in _FREE:
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


# --- What is multiplied, and what is moved ------------------------------------------------------


class Work(NamedTuple):
    """Of one call on one device: of matrix products alone, and of main memory."""

    flops: int
    looped_flops: int  # of these, inside loops
    bytes: int
    unknown_loops: int  # whose bodies are counted once


def work(program: Program) -> Work:
    """Multiplications and additions of convolutions and products, and bytes read and written.

    Products of zeros, which padding and dilation bring in, are not counted.
    """
    flops = looped_flops = moved = 0
    unknown = set()
    for op, times, inside, looped in program.executed():
        if times is None:
            unknown.add(inside)
        often = 1 if times is None else times
        own = often * _flops(program, inside, op)
        flops, looped_flops = flops + own, looped_flops + own * looped
        moved += often * _moved(program, inside, op)
    return Work(flops, looped_flops, moved, len(unknown))


def _flops(program: Program, inside: str, op: Op) -> int:
    computation = program.computations[inside]
    if op.code == "fusion":
        (name,) = op.called("calls")
        return sum(_flops(program, name, part) for part in program.computations[name].values())
    if op.code == "dot":
        left = computation[op.operands[0]].shapes[0].dims
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        summed = [left[int(d)] for d in dims[1].split(",") if d] if dims else []
        return 2 * math.prod(op.shapes[0].dims) * math.prod(summed)
    if op.code == "convolution":
        images, kernel = (computation[name].shapes[0].dims for name in op.operands[:2])
        return _convolution(op, images, kernel)
    return 0


def _convolution(op: Op, images: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None  # every convolution has them
    result = op.shapes[0].dims
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    said = dict(pair.split("=") for pair in window[1].split()) if window else {}
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())
    hits = 1
    for axis, digit in enumerate(spatial):
        span = images[labels[1].index(digit)]
        taps, places = kernel[labels[2].index(digit)], result[labels[3].index(digit)]
        stride, spread, dilation = (
            int(said[name].split("x")[axis]) if name in said else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(said["pad"].split("x")[axis].split("_")[0]) if "pad" in said else 0
        hits *= sum(
            0 <= (at := place * stride + tap * dilation - low) <= (span - 1) * spread
            and at % spread == 0
            for place in range(places)
            for tap in range(taps)
        )
    features = kernel[labels[2].index("i")]
    return 2 * hits * features * result[labels[3].index("b")] * result[labels[3].index("f")]


def _moved(program: Program, inside: str, op: Op) -> int:
    if op.code in _FREE or op.code.endswith("-done"):
        return 0
    computation = program.computations[inside]

    def sizes(name: str) -> int:
        return sum(shape.bytes for shape in computation[name].shapes if not shape.near)

    if op.code.endswith("-start") and op.code != "all-reduce-start":
        # (result, operand, context): what it reads and what it writes.
        return sum(shape.bytes for shape in op.shapes[:2] if not shape.near)
    written = sum(shape.bytes for shape in op.shapes if not shape.near)
    if op.code in _SLICING:
        return 2 * written
    if op.code == "dynamic-update-slice":
        return 2 * sizes(op.operands[1])
    if op.code != "fusion":
        return written + sum(sizes(name) for name in op.operands)
    (name,) = op.called("calls")
    fused = program.computations[name]
    read = 0
    for place, operand in enumerate(op.operands):
        part = _read_of(fused, place)
        read += sizes(operand) if part is None else min(sizes(operand), part)
    root = next(part for part in fused.values() if part.root)
    if root.code == "dynamic-update-slice":  # in place: the rest is not touched
        written = min(written, fused[root.operands[1]].shapes[0].bytes)
    return written + read


def _read_of(fused: dict[str, Op], place: int) -> int | None:
    """Bytes that a fusion reads of an operand of which it takes slices; None for all of it."""
    own = next(op for op in fused.values() if op.code == "parameter" and op.text == str(place))
    users = [op for op in fused.values() if own.name in op.operands]
    total = 0
    for op in users:
        if op.operands[0] != own.name:
            return None
        if op.code in _SLICING:
            total += sum(shape.bytes for shape in op.shapes)
        elif op.code != "dynamic-update-slice":
            return None
    return total
