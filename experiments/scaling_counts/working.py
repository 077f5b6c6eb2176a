"""What a compiled program multiplies, and what it moves between its processor and its memory."""

import math
import re
from typing import NamedTuple

from experiments.scaling_counts.hlo import FREE, Op, Program

_SLICING = ("slice", "dynamic-slice", "gather")


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
    if op.code in FREE or op.code.endswith("-done"):
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
