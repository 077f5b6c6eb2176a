"""A convolution whose gradients stay fast inside compiled loops on CPU.

XLA:CPU hands a convolution to its fast library routine only in the canonical layout (images NHWC,
kernel HWIO, `b01f_01io` in HLO). The transposes that `lax` writes for its gradients are in other
layouts. At the top level of a program XLA rewrites them; inside `scan`, `fori_loop`, `while_loop`,
`cond` and `switch` it does not, and emits naive loops, slower by an order of magnitude. An attack
is such a loop. Here both gradients are written as canonical convolutions to begin with.

There is a second way out of the layout, in a loop or not: where a kernel has more pixels than its
image, as on 8x8 digits after two halvings, XLA swaps the two and is slow again. Such images are
padded first.

In the canonical layout, too, XLA's routines are of unlike speed: `models.detours` leads around the
slow ones.

The gradients are convolutions by the same function, so gradients of gradients stay canonical as
well. What it costs is forward mode: a `custom_vjp` has no `jvp`, so take Jacobians with `jacrev`.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from rain_jax.models import detours
from rain_jax.models.detours import CANONICAL, Window, span
from rain_jax.types import Array

_Left = Literal["nothing", "gradients", "all"]
_to_lax: contextvars.ContextVar[_Left] = contextvars.ContextVar("to_lax", default="nothing")


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    **others: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, loop-safe on CPU: for `nn.Conv(conv_general_dilated=...)`.

    Values and gradients are those of `lax`. Left to `lax` altogether are other backends, grouped
    convolutions, what comes out empty, and anything but NHWC images [B, H, W, C] with an HWIO
    kernel [h, w, C, K].
    """
    # Chosen while tracing. On GPU cuDNN's own backward kernels are expected to be better than
    # convolutions written out by us (not measured), so only the CPU backend takes our rule.
    usual = all(value in (None, 1) for value in others.values())  # no groups
    usual = usual and _is_canonical(lhs, rhs, padding, lhs_dilation, dimension_numbers)
    if usual and needs_loop_safety():
        window = _window(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation,
            precision, preferred_element_type,
        )  # fmt: skip
        if _has_output(lhs, rhs, window):
            return (_values if _to_lax.get() == "gradients" else _convolve)(lhs, rhs, window)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **others,
    )


def needs_loop_safety() -> bool:
    """Whether this process computes on CPU by default, and nobody asked for `lax` itself."""
    return jax.default_backend() == "cpu" and _to_lax.get() != "all"


def left_to_lax() -> _Left:
    """What is left to `lax` here: what is traced turns on it, and JAX does not know."""
    return _to_lax.get()


@contextlib.contextmanager
def by_lax() -> Iterator[None]:
    """What is traced in here convolves by `lax`, also on CPU."""
    with _left_to_lax("all"):
        yield


@contextlib.contextmanager
def gradients_by_lax() -> Iterator[None]:
    """What is traced in here convolves as ever, and backwards as `lax` would.

    For kernels that learn under a `vmap` over images: our rule would give every image a gradient of
    its own, by a grouped convolution, before they are added; that of `lax` is one convolution. The
    values are those of our rule to the operation, so that a compiler which meets both computes them
    once.
    """
    with _left_to_lax("gradients") if _to_lax.get() != "all" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _left_to_lax(what: _Left) -> Iterator[None]:
    token = _to_lax.set(what)
    try:
        yield
    finally:
        _to_lax.reset(token)


def loop_safe_conv(
    images: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """Convolves images [B, H, W, C] with a kernel [h, w, C, K] by our rule, also by accelerators.

    `padding` is "SAME", "VALID" or pairs (low, high), which may be negative. The gradients are
    canonical convolutions again.
    """
    window = _window(
        images, kernel, strides, padding, lhs_dilation, rhs_dilation,
        precision, preferred_element_type,
    )  # fmt: skip
    return _convolve(images, kernel, window)


def _window(
    images: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    precision: Any,
    preferred_element_type: Any,
) -> Window:
    """What `lax` was asked for, with all that may be left out filled in."""
    lhs_dilation = tuple(lhs_dilation or (1, 1))
    rhs_dilation = tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        reach = [span(size, by) for size, by in zip(kernel.shape[:2], rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(images.shape[1:3], reach, strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    dtype = None if preferred_element_type is None else jnp.dtype(preferred_element_type)
    return Window(tuple(strides), pairs, lhs_dilation, rhs_dilation, precision, dtype)


def _has_output(images: Array, kernel: Array, window: Window) -> bool:
    """Whether the window fits into the padded image at all."""
    sides = zip(images.shape[1:3], kernel.shape[:2], window.padding, window.lhs_dilation,
                window.rhs_dilation, strict=True)  # fmt: skip
    return all(
        span(side, by) + low + high >= span(reach, apart)
        for side, reach, (low, high), by, apart in sides
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: Array, kernel: Array, window: Window) -> Array:
    return _values(images, kernel, window)


def _values(images: Array, kernel: Array, window: Window) -> Array:
    if math.prod(kernel.shape[:2]) > math.prod(images.shape[1:3]):
        # XLA would swap such operands, which leaves the canonical layout. With its padding written
        # out an image is as large as the kernel; the barrier keeps XLA from folding it back in.
        sides = zip(window.padding, window.lhs_dilation, strict=True)
        config = [(0, 0, 0), *((low, high, by - 1) for (low, high), by in sides), (0, 0, 0)]
        images = lax.optimization_barrier(lax.pad(images, jnp.zeros((), images.dtype), config))
        window = window._replace(padding=((0, 0), (0, 0)), lhs_dilation=(1, 1))
    maps = detours.convolved(images, kernel, window)
    if maps.dtype == jnp.bfloat16:
        # XLA:CPU of jax 0.12.0 fuses conv, relu, conv, relu, max-pool in bfloat16 into one library
        # call, and that one reads memory nobody wrote: NaN. The barrier keeps them apart.
        maps = lax.optimization_barrier(maps)
    return maps


def _forward(images: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(images, kernel, window), (images, kernel)


def _backward(
    window: Window, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    images, kernel = residuals
    strides, padding, lhs_dilation, rhs_dilation = window[:4]
    # With a preferred element type the cotangent may be wider than the operands.
    dtype = jnp.result_type(images, kernel, cotangent)
    x, k, g = (array.astype(dtype) for array in (images, kernel, cotangent))

    # Sizes once dilated. Where the stride leaves slack, `o` reaches less far than the window could
    # have: both paddings below follow from the sizes that must come out, whatever the slack.
    n = [span(size, by) for size, by in zip(x.shape[1:3], lhs_dilation, strict=True)]
    m = [span(size, by) for size, by in zip(k.shape[:2], rhs_dilation, strict=True)]
    o = [span(size, by) for size, by in zip(g.shape[1:3], strides, strict=True)]
    low = [pair[0] for pair in padding]

    # dL/dx: the cotangent, spread out by the stride, under the flipped kernel, inputs for outputs.
    towards_images = Window(
        window_strides=lhs_dilation,
        padding=tuple((m[i] - 1 - low[i], n[i] - o[i] + low[i]) for i in (0, 1)),
        lhs_dilation=strides,
        rhs_dilation=rhs_dilation,
        precision=window.precision,
        preferred_element_type=None,
    )
    image_gradient = detours.image_gradient(g, k, towards_images)
    if image_gradient is None:
        flipped = jnp.transpose(k[::-1, ::-1], (0, 1, 3, 2))
        image_gradient = _convolve(g, flipped, towards_images)

    # dL/dk: the images under the cotangent as a kernel [H', W', B, K]; the sum runs over the batch
    # and the channels take the batch's place.
    kernel_gradient = detours.kernel_gradient(x, k, g, window)
    if kernel_gradient is not None:
        return image_gradient.astype(images.dtype), kernel_gradient.astype(kernel.dtype)
    towards_kernel = Window(
        window_strides=rhs_dilation,
        padding=tuple((low[i], o[i] + m[i] - 1 - n[i] - low[i]) for i in (0, 1)),
        lhs_dilation=lhs_dilation,
        rhs_dilation=strides,
        precision=window.precision,
        preferred_element_type=None,
    )
    by_channel, as_kernel = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(g, (1, 2, 0, 3))
    kernel_gradient = jnp.transpose(_convolve(by_channel, as_kernel, towards_kernel), (1, 2, 0, 3))
    return image_gradient.astype(images.dtype), kernel_gradient.astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def _is_canonical(
    lhs: Array, rhs: Array, padding: Any, lhs_dilation: Any, dimension_numbers: Any
) -> bool:
    if lhs.ndim != 4 or rhs.ndim != 4 or dimension_numbers is None:
        return False
    if isinstance(padding, str) and any(by != 1 for by in lhs_dilation or ()):
        return False  # `lax` has no such thing either, and says so
    return lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, dimension_numbers
    ) == lax.conv_dimension_numbers(lhs.shape, rhs.shape, CANONICAL)
