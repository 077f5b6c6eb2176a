"""Convolutions of the shapes that networks here are made of, by ours, by `lax` and by PyTorch.

What shows whether `models.detours` on CPU still wins, when XLA's own routines change.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benching.clock import Program, Row, Side, ready
from experiments.benching.images import device_of, direction, torch_side
from rain_jax.checks import UsageError, within
from rain_jax.models.conv import conv_general_dilated
from rain_jax.models.detours import CANONICAL
from rain_jax.types import Array


class Shape(NamedTuple):
    """A batch of `batch` images [size, size, channels] under a square kernel."""

    batch: int
    size: int
    channels: int
    features: int
    kernel: int
    stride: int
    padding: int  # pixels on each side

    def __str__(self) -> str:
        at = f"{self.batch} x {self.size}x{self.size}x{self.channels}"
        steps = f", stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{at} to {self.features}, {self.kernel}x{self.kernel}{steps}, padding {self.padding}"
        )


# The first layers of MNIST's CNN, of TRADES's two and of the small ResNet, then their inner ones;
# the first and the inner ones of a ResNet-18.
SHAPES = (
    (100, 28, 1, 16, 4, 2, 1),
    (64, 28, 1, 32, 3, 1, 0),
    (64, 32, 3, 16, 3, 1, 1),
    (100, 14, 16, 32, 4, 2, 1),
    (64, 26, 32, 32, 3, 1, 0),
    (64, 32, 16, 16, 3, 1, 1),
    (64, 32, 16, 32, 3, 2, 1),
    (64, 16, 32, 32, 3, 1, 1),
    (64, 8, 64, 64, 3, 1, 1),
    (64, 32, 3, 32, 3, 1, 0),
    (64, 12, 64, 64, 3, 1, 0),
    (32, 32, 3, 64, 3, 1, 1),
    (32, 32, 64, 64, 3, 1, 1),
    (32, 16, 128, 128, 3, 1, 1),
    (32, 8, 256, 256, 3, 1, 1),
)


def convolutions(*, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Row]:
    """Each shape (batch, size, channels, features, kernel, stride, padding), both ways.

    `lax` is the convolution as XLA has it, at the top level of a program, where its gradient is
    fast too; "with gradient" is that towards the images, as attacks need it.
    """
    rows = []
    for given in shapes:
        if len(given) != len(Shape._fields):
            raise UsageError(f"shapes={given!r}: expected {', '.join(Shape._fields)}")
        within("shapes", given[:-1], 1)
        shape = Shape(*given)
        if shape.kernel > shape.size + 2 * within("padding", shape.padding, 0):
            raise UsageError(f"shapes={given!r}: expected no kernel larger than its images")
        rows += [_row(shape, with_gradient) for with_gradient in (False, True)]
    return rows


def _row(shape: Shape, with_gradient: bool) -> Row:
    draw = np.random.default_rng(0)
    size = (shape.batch, shape.size, shape.size, shape.channels)
    images = draw.standard_normal(size, np.float32)
    kernel = draw.standard_normal(
        (shape.kernel, shape.kernel, shape.channels, shape.features), np.float32
    )
    out = (shape.size + 2 * shape.padding - shape.kernel) // shape.stride + 1
    slope = direction((shape.batch, out, out, shape.features)) if with_gradient else None

    def program(convolve: Callable[..., Array]) -> Program:
        def forward(batch: Array, kernel: Array) -> Array:
            strides, pads = (shape.stride,) * 2, ((shape.padding,) * 2,) * 2
            return convolve(batch, kernel, strides, pads, dimension_numbers=CANONICAL)

        def both(batch: Array, kernel: Array, slope: Array) -> Any:
            maps, back = jax.vjp(lambda batch: forward(batch, kernel), batch)
            return maps, back(slope)[0]

        operands = (jnp.asarray(images), jnp.asarray(kernel))
        if slope is None:
            return Program(forward, operands)
        return Program(both, (*operands, jnp.asarray(slope)))

    def theirs() -> Side:
        return ready(program(lax.conv_general_dilated))[0]

    return Row(
        f"conv, {shape}{', with gradient' if with_gradient else ''}",
        partial(program, conv_general_dilated),
        {"lax": theirs, "PyTorch": partial(_torch, shape, images, kernel, slope)},
        images=shape.batch,
    )


def _torch(shape: Shape, images: np.ndarray, kernel: np.ndarray, slope: np.ndarray | None) -> Side:
    torch = importlib.import_module("torch")
    weights = torch.tensor(kernel.transpose(3, 2, 0, 1), device=device_of(torch))
    weights = weights.contiguous(memory_format=torch.channels_last)

    def convolve(batch: Any) -> Any:
        return torch.nn.functional.conv2d(
            batch, weights, stride=shape.stride, padding=shape.padding
        )

    return torch_side(convolve, images, slope)
