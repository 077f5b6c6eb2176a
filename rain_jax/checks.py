"""Refusals: one line that names the value, what was expected and the nearest right spelling."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


class UsageError(ValueError):
    """The caller's mistake. Its message is one line, meant to be read without a traceback."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or nothing where no choice is near."""
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def one_of(where: str, name: Any, choices: Iterable[str]) -> Any:
    """Returns `name` if it is among `choices`, else raises a `UsageError` that lists them."""
    choices = list(choices)
    if name not in choices:
        raise UsageError(
            f"{where}={name!r}: expected one of {', '.join(choices)}{nearest(str(name), choices)}"
        )
    return name


def within(
    where: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> Any:
    """Returns `value` if low <= value <= high and above < value < below, else raises.

    Tracers pass, and so does all that has one for a bound: what is only known inside a compiled
    program is the program's to bound.
    """
    if any(isinstance(one, jax.core.Tracer) for one in (value, low, high, above, below)):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unlike lengths
        array = np.array(None)
    bad = not np.issubdtype(array.dtype, np.number) or not bool(np.all(np.isfinite(array)))
    bad = bad or (low is not None and bool(np.any(array < low)))
    bad = bad or (high is not None and bool(np.any(array > high)))
    bad = bad or (above is not None and bool(np.any(array <= above)))
    bad = bad or (below is not None and bool(np.any(array >= below)))
    if bad:
        left = f"({above:g}" if above is not None else f"[{low:g}" if low is not None else "(-inf"
        right = f"{below:g})" if below is not None else f"{high:g}]" if high is not None else "inf)"
        raise UsageError(f"{where}={value!r}: expected a number in {left}, {right}{hint}")
    return value


def whole(where: str, value: Any, low: float, high: float | None = None) -> Any:
    """`within`, of a whole number; tracers pass."""
    within(where, value, low, high)
    is_whole = isinstance(value, jax.core.Tracer) or np.issubdtype(
        np.asarray(value).dtype, np.integer
    )
    if not is_whole:
        raise UsageError(f"{where}={value!r}: expected a whole number")
    return value


def pixel_distance(where: str, value: Any, high: float = 1.0) -> Any:
    """A distance in pixel values of [0, 1]; 8 where 8/255 is meant is the field's oldest slip."""
    hint = ""
    if isinstance(value, int | float) and 1 < value <= 255:
        hint = f"; pixels are in [0, 1]: did you mean {value:g}/255?"
    return within(where, value, 0.0, high, hint=hint)
