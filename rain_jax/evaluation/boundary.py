"""Verdicts on the decision boundary: where rounding would decide, one fixed program does.

A verdict compares two logits. The same model rounds its logits differently in another batch size,
on another number of devices and on another kind of machine, and an image whose margin is smaller
than that could be judged either way. Such images are judged once more, one at a time, by a program
whose shape never changes. Verdicts on given images are then equal for every batch size and every
number of devices of one kind of machine; between kinds they can differ only on those images, which
the record counts.

That holds as far as the bound does. A model that rounds inside, such as JPEG, or that counts votes
may jump by more, and one behind a callback (PyTorch's) is taken to compute in float32.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.parallel import Devices
from rain_jax.types import PyTree

# A bound on how far rounding moves a margin, as a share of the image's largest logit. In float32
# the largest move of a logit seen between batch sizes and instruction sets was 2^-21, and a margin
# moves by two of them (docs/evaluation.md). A wider bound costs some images a second pass, a
# narrower one might miss some.
FLOAT32 = 2.0**-14
# With 16 bit numbers inside, of which bfloat16 keeps 8 bits: the largest move seen was 2^-8.5. An
# accelerator multiplies float32 in fewer bits too, unless JAX is asked not to; there the bound is a
# guess.
FEWER_BITS = 2.0**-5

_EXACT = ("highest", "float32")  # of jax_default_matmul_precision


def rounding(model: Callable[..., Any], *arguments: Any, platform: str) -> float:
    """The bound for a model, by the numbers that it computes in: it is traced, and not run."""
    if (
        platform != "cpu"
        and getattr(jax.config, "jax_default_matmul_precision", None) not in _EXACT
    ):
        return FEWER_BITS
    narrow = any(
        jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
        for dtype in _dtypes(jax.make_jaxpr(model)(*arguments).jaxpr)
    )
    return FEWER_BITS if narrow else FLOAT32


def _dtypes(jaxpr: Any) -> Iterator[Any]:
    """The types of all that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.dtype for var in equation.outvars if hasattr(var.aval, "dtype"))
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _dtypes(inner)


def one_by_one(body: Callable[..., PyTree], devices: Devices) -> Callable[..., PyTree]:
    """The program of fixed shape: `body(variables, key, *rows)` on each row alone, one device.

    Called with variables and a key as programs of `devices` take them and rows [n, ...] of NumPy
    arrays, n at least 1; returns the results of all rows as NumPy arrays [n, ...].
    """
    device = devices.mesh.local_devices[0]
    # Sums are split among threads by how many there are: one adds in one order.
    options = {"xla_cpu_multi_thread_eigen": False} if device.platform == "cpu" else None
    program = jax.jit(body, compiler_options=options)

    def here(leaf: Any) -> Any:
        local = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        return jax.device_put(local, device)

    def run(variables: PyTree, key: Any, *rows: PyTree) -> PyTree:
        variables, key = jax.tree.map(here, (variables, key))
        found = []
        for row in range(len(jax.tree.leaves(rows)[0])):
            one = jax.tree.map(lambda leaf, r=row: leaf[r : r + 1], rows)
            found.append(jax.tree.map(np.asarray, program(variables, key, *one)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)

    return run


def replaced(results: PyTree, places: np.ndarray, rows: PyTree) -> PyTree:
    """Results [N, ...] with `rows` [n, ...] at `places` [n]; the arrays given are not changed."""

    def write(leaf: np.ndarray, new: np.ndarray) -> np.ndarray:
        leaf = np.array(leaf)
        leaf[places] = new
        return leaf

    return jax.tree.map(write, results, rows)


def warn_where_it_is_too_narrow(
    before: np.ndarray, after: np.ndarray, rounding: np.ndarray
) -> None:
    """Warns of margins [n] that moved further between the two programs than the bound allows."""
    moved = np.abs(before - after)
    if np.any(moved > rounding):
        worst = int(np.argmax(moved / np.maximum(rounding, np.finfo(np.float32).tiny)))
        warnings.warn(
            f"a margin moved by {moved[worst]:.2g} between batch sizes, where rounding is taken "
            f"for at most {rounding[worst]:.2g}: verdicts on the decision boundary may depend on "
            "the batch size",
            stacklevel=2,
        )
