"""The multiplications and additions of a program, counted in what was traced.

Compilers count the body of a loop once, however often it runs; an attack is a loop.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import numpy as np

from rain_jax.keys import is_key
from rain_jax.models.conv import by_lax


def gflop_of(function: Callable[..., Any], *arguments: Any) -> float | None:
    """Billions of multiplications and additions in the products and convolutions of a function.

    As it is written: what `models.conv` multiplies by zeros on its detours does not count. Those
    with padding, or with the zeros of a dilation, are left out where the convolution itself
    has them, and so is whatever no result depends on: either gradient of a convolution counts as
    much as the convolution. What is written twice of the same operands counts once. Loops count as
    often as they run, but once where only the data tell how often; of branches the longest counts.
    None where there are no products at all.
    """
    # A function of its own: a trace that is remembered may have taken detours.
    with by_lax():
        program = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    return _flops(program, {}) / 1e9 or None


def _contents(value: Any) -> Any:
    """What tells a constant from others; keys have no array to show, and stay themselves."""
    if is_key(value):
        return id(value)
    array = np.asarray(value)
    return array.shape, array.dtype, array.tobytes()


def _flops(program: Any, alike: dict[int, int]) -> float:
    """Of a program whose argument at a place is also that at `alike[place]`, which comes first."""
    from jax.interpreters import partial_eval

    closed, program = program, getattr(program, "jaxpr", program)
    # Of variables the one of the same value that comes before all others.
    first = {program.invars[place]: program.invars[other] for place, other in alike.items()}
    held: dict[Any, Any] = {}
    for variable, value in zip(program.constvars, getattr(closed, "consts", ()), strict=False):
        first[variable] = held.setdefault(_contents(value), variable)
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    total = 0.0
    written: dict[Any, Any] = {}
    for line in program.eqns:
        name, params = line.primitive.name, line.params
        operands = tuple(
            first.get(v, v) if isinstance(v, jax.extend.core.Var) else str(v) for v in line.invars
        )
        if name == "stop_gradient":
            first[line.outvars[0]] = operands[0]
            continue
        told = re.sub(r" at 0x[0-9a-f]+", "", str(params))  # functions, by where they lie
        same = written.setdefault((name, operands, told), line.outvars)
        if same is not line.outvars:
            first.update(zip(line.outvars, same, strict=True))
            continue
        shapes = [getattr(v.aval, "shape", ()) for v in line.invars]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * math.prod(line.outvars[0].aval.shape) * math.prod(
                shapes[0][axis] for axis in contracted
            )  # fmt: skip
            continue
        if name == "conv_general_dilated":
            total += _convolution(shapes, params)
            continue
        # What a loop carries may part ways; other bodies are given what the line is given.
        same = {} if name in ("scan", "while", "cond") else _repeats(operands)
        inner = [_flops(part, same) for part in _bodies(params)]
        if inner:
            whole = max(inner) if name == "cond" else sum(inner)
            # A body of `shard_map` is the share of one device.
            shares = params["mesh"].size if name == "shard_map" else 1
            total += whole * (params["length"] if name == "scan" else shares)
    return total


def _repeats(operands: tuple[Any, ...]) -> dict[int, int]:
    """Places of operands that were there before, with the place of the first."""
    places: dict[Any, int] = {}
    found = {place: places.setdefault(one, place) for place, one in enumerate(operands)}
    return {place: before for place, before in found.items() if before != place}


def _bodies(params: dict[str, Any]) -> list[Any]:
    """The programs within a line, with their constants where they have some."""
    core = jax.extend.core
    values = [
        one for value in params.values()
        for one in (value if isinstance(value, tuple | list) else (value,))
    ]  # fmt: skip
    return [one for one in values if isinstance(one, core.ClosedJaxpr | core.Jaxpr)]


def _convolution(shapes: list[tuple[int, ...]], params: dict[str, Any]) -> float:
    left, right, _ = params["dimension_numbers"]
    image, kernel = shapes[:2]
    meetings = 1  # of a kernel's pixel and an image's
    for place in range(len(left) - 2):
        size, span = image[left[place + 2]], kernel[right[place + 2]]
        low, high = params["padding"][place]
        stride, spread = params["window_strides"][place], params["lhs_dilation"][place]
        reach = params["rhs_dilation"][place]
        width = (size - 1) * spread + 1
        first = np.arange(-low, width + high - (span - 1) * reach, stride)
        pixels = first[:, None] + reach * np.arange(span)[None]
        meetings *= int(np.sum((pixels >= 0) & (pixels < width) & (pixels % spread == 0)))
    # A kernel knows the channels of its own group alone.
    pairs = kernel[right[0]] * kernel[right[1]]
    return 2.0 * image[left[0]] * pairs * meetings / params["batch_group_count"]
