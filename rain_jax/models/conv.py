"""A convolution whose gradients stay fast inside compiled loops on CPU.

XLA:CPU hands a convolution to its fast library routine only in the canonical layout (images NHWC,
kernel HWIO, `b01f_01io` in HLO). The transposes that `lax` writes for its gradients are in other
layouts. At the top level of a program XLA rewrites them; inside `scan`, `fori_loop`, `while_loop`,
`cond` and `switch` it does not, and emits naive loops, slower by an order of magnitude. An attack
is such a loop. Here both gradients are written as canonical convolutions to begin with.

There is a second way out of the layout, in a loop or not: where a kernel has more pixels than its
image, as on 8x8 digits after two halvings, XLA swaps the two and is slow again. Such images are
padded first.

In the canonical layout, too, XLA's routines are of unlike speed. Four detours lead around slow
ones (`_by_a_fast_routine`): several pixels at once where there are few channels, a row of zeros for
images without padding, for strides backwards a convolution for each phase, and where there are many
channels fewer multiplications (`models.winograd`). They add up the same products in another order,
and the last one sums of them, which costs a bit of precision.

The gradients are convolutions by the same function, so gradients of gradients stay canonical as
well. What it costs is forward mode: a `custom_vjp` has no `jvp`, so take Jacobians with `jacrev`.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rain_jax.models import winograd
from rain_jax.types import Array

CANONICAL = ("NHWC", "HWIO", "NHWC")
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
    convolutions, and anything but NHWC images [B, H, W, C] with an HWIO kernel [h, w, C, K].
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
    """Convolves images [B, H, W, C] with a kernel [h, w, C, K], on any backend.

    `padding` is "SAME", "VALID" or pairs (low, high), which may be negative. The gradients are
    canonical convolutions again.
    """
    window = _window(
        images, kernel, strides, padding, lhs_dilation, rhs_dilation,
        precision, preferred_element_type,
    )  # fmt: skip
    return _convolve(images, kernel, window)


class _Window(NamedTuple):
    """All that is static about a convolution, by the names `lax.conv_general_dilated` knows."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    precision: Any
    preferred_element_type: Any


def _window(
    images: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    precision: Any,
    preferred_element_type: Any,
) -> _Window:
    """What `lax` was asked for, with all that may be left out filled in."""
    lhs_dilation = tuple(lhs_dilation or (1, 1))
    rhs_dilation = tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        reach = [_span(size, by) for size, by in zip(kernel.shape[:2], rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(images.shape[1:3], reach, strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    dtype = None if preferred_element_type is None else jnp.dtype(preferred_element_type)
    return _Window(tuple(strides), pairs, lhs_dilation, rhs_dilation, precision, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: Array, kernel: Array, window: _Window) -> Array:
    return _values(images, kernel, window)


def _values(images: Array, kernel: Array, window: _Window) -> Array:
    if math.prod(kernel.shape[:2]) > math.prod(images.shape[1:3]):
        # XLA would swap such operands, which leaves the canonical layout. With its padding written
        # out an image is as large as the kernel; the barrier keeps XLA from folding it back in.
        sides = zip(window.padding, window.lhs_dilation, strict=True)
        config = [(0, 0, 0), *((low, high, by - 1) for (low, high), by in sides), (0, 0, 0)]
        images = lax.optimization_barrier(lax.pad(images, jnp.zeros((), images.dtype), config))
        window = window._replace(padding=((0, 0), (0, 0)), lhs_dilation=(1, 1))
    maps = _by_a_fast_routine(images, kernel, window)
    if maps.dtype == jnp.bfloat16:
        # XLA:CPU of jax 0.12.0 fuses conv, relu, conv, relu, max-pool in bfloat16 into one library
        # call, and that one reads memory nobody wrote: NaN. The barrier keeps them apart.
        maps = lax.optimization_barrier(maps)
    return maps


def _by_a_fast_routine(images: Array, kernel: Array, window: _Window) -> Array:
    """The convolution, in a form for which XLA:CPU has a fast routine where the plain one is slow.

    Which form wins where was found by timing them against each other (jaxlib 0.10, x86, float32);
    `experiments.benchmark --config.suite=convolutions` times what came of it.
    """
    # In exported programs a size may be a symbol, of which nobody knows how large it is.
    known = all(isinstance(size, int) for size in (*images.shape[1:], *kernel.shape))
    if images.dtype != jnp.float32 or not known:
        return _plain(images, kernel, window)
    if _fewer_products_are_faster(images, kernel, window):
        return _by_winograd(images, kernel, window)
    if window.lhs_dilation != (1, 1):
        if _phases_are_faster(kernel, window):
            return _by_phases(images, kernel, window)
        return _plain(images, kernel, window)
    several = _neighbours_at_once(images, kernel, window)
    if several > 1:
        return _wide(images, kernel, window, several)
    area = math.prod(images.shape[1:3])
    unpadded = all(pair == (0, 0) for pair in window.padding) and kernel.shape[0] > 1
    if unpadded and window.window_strides == (1, 1) and images.shape[3] >= 24 and area >= 14 * 14:
        # Without any padding, images of many channels take a route several times slower. One row
        # of zeros below leads off it; what it adds is cut away.
        padded = _plain(images, kernel, window._replace(padding=((0, 1), (0, 0))))
        return padded[:, :-1]
    return _plain(images, kernel, window)


def _plain(images: Array, kernel: Array, window: _Window) -> Array:
    return lax.conv_general_dilated(images, kernel, **window._asdict(), dimension_numbers=CANONICAL)


def _fewer_products_are_faster(images: Array, kernel: Array, window: _Window) -> bool:
    """Where there are channels enough to pay for Winograd's sums, and tiles for the kernel's.

    How many tiles there are nobody can tell who is given one image: under the `vmap` of an attack
    it is one of many, and the kernel's sums stand before the loop.
    """
    *size, channels, features = kernel.shape
    usual = window.window_strides == window.lhs_dilation == window.rhs_dilation == (1, 1)
    usual = usual and size == [3, 3] and all(side >= 0 for pair in window.padding for side in pair)
    many = min(channels, features) >= 32 and channels + features >= 96
    area = math.prod(images.shape[1:3])
    batch = images.shape[0] if isinstance(images.shape[0], int) else 1
    return usual and many and area >= 4 * 4 and (batch == 1 or batch * area // 4 >= 64)


def _fewer_products_are_faster_for_kernels(images: Array, kernel: Array, window: _Window) -> bool:
    known = all(isinstance(size, int) for size in images.shape[1:])
    return (
        known
        and images.dtype == jnp.float32
        and _fewer_products_are_faster(images, kernel, window)
        and min(kernel.shape[2:]) >= 64
        and math.prod(images.shape[1:3]) <= 16 * 16
    )


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _by_winograd(images: Array, kernel: Array, window: _Window) -> Array:
    return winograd.convolve(images, kernel, window.padding)


@_by_winograd.defjvp
def _(
    window: _Window, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Whoever differentiates this and not `_convolve` asked for the gradients of `lax`."""
    (images, kernel), (images_moved, kernel_moved) = primals, tangents
    moved = _plain(images_moved, kernel, window) + _plain(images, kernel_moved, window)
    return _by_winograd(images, kernel, window), moved


def _phases_are_faster(kernel: Array, window: _Window) -> bool:
    usual = window.window_strides == window.rhs_dilation == (1, 1)
    return usual and 16 <= kernel.shape[3] <= 64


def _by_phases(images: Array, kernel: Array, window: _Window) -> Array:
    """A convolution of spread-out images, without the zeros between their pixels.

    Pixels of the result that leave the same remainder by the dilation see the same part of the
    kernel: each such phase is a convolution of the images as they were, and then they are shuffled
    together.
    """
    spread, (batch, *size, _) = window.lhs_dilation, images.shape
    span = [_span(size[i], spread[i]) + sum(window.padding[i]) for i in (0, 1)]
    out = [span[i] - kernel.shape[i] + 1 for i in (0, 1)]
    m = [-(-out[i] // spread[i]) for i in (0, 1)]  # pixels of each phase

    def along(i: int, phase: int) -> tuple[int, tuple[int, int]]:
        """The first tap that meets pixels of the images, and the padding under the taps met."""
        tap = (window.padding[i][0] - phase) % spread[i]
        low = (window.padding[i][0] - phase - tap) // spread[i]
        met = len(range(tap, kernel.shape[i], spread[i]))
        return tap, (low, m[i] + met - 1 - size[i] - low)

    rows = []
    for y, above in (along(0, phase) for phase in range(spread[0])):
        columns = []
        for x, left in (along(1, phase) for phase in range(spread[1])):
            part = kernel[y :: spread[0], x :: spread[1]]
            if part.size:
                of_phase = window._replace(padding=(above, left), lhs_dilation=(1, 1))
                columns.append(_by_a_fast_routine(images, part, of_phase))
            else:  # a kernel smaller than the dilation: these pixels see zeros alone
                columns.append(jnp.zeros((batch, *m, kernel.shape[3]), images.dtype))
        rows.append(jnp.stack(columns, 3))
    maps = jnp.stack(rows, 2)  # [B, m, phases, m, phases, K]
    maps = maps.reshape(batch, m[0] * spread[0], m[1] * spread[1], kernel.shape[3])
    return maps[:, : out[0], : out[1]]


def _neighbours_at_once(images: Array, kernel: Array, window: _Window) -> int:
    """How many pixels of a row to compute as channels of one: the routines like them many."""
    height, width, channels, features = kernel.shape
    # Unpadded images have a route of their own, good enough from some ten channels on.
    unpadded = all(pair == (0, 0) for pair in window.padding) and channels > 4
    if window.rhs_dilation != (1, 1) or height * width == 1 or unpadded:
        return 1
    if channels >= 24 or not 3 <= features <= 32:
        return 1
    # For colours no route is fast before 64 channels leave at once.
    several = min(4, 64 // features) if channels == 3 else min(8, 32 // features)
    reach = width + (several - 1) * window.window_strides[1]
    # Not where the wide kernel has more pixels than its image: see `_convolve`.
    return several if height * reach <= math.prod(images.shape[1:3]) else 1


def _wide(images: Array, kernel: Array, window: _Window, several: int) -> Array:
    """The convolution by a kernel whose channels are those of `several` pixels side by side.

    The same sums, with zeros among them: the kernel reaches over all that these pixels see.
    """
    stride = window.window_strides[1]
    low, high = window.padding[1]
    height, reach, channels, features = kernel.shape
    width = (images.shape[2] + low + high - reach) // stride + 1
    strips = -(-width // several)
    shifted = [
        jnp.pad(kernel, ((0, 0), (stride * i, stride * (several - 1 - i)), (0, 0), (0, 0)))
        for i in range(several)
    ]
    kernel = jnp.stack(shifted, 3).reshape(height, -1, channels, several * features)
    seen = (strips - 1) * several * stride + kernel.shape[1]
    window = window._replace(
        window_strides=(window.window_strides[0], several * stride),
        padding=(window.padding[0], (low, seen - images.shape[2] - low)),
    )
    maps = _plain(images, kernel, window)
    return maps.reshape(*maps.shape[:2], strips * several, features)[:, :, :width]


def _forward(images: Array, kernel: Array, window: _Window) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(images, kernel, window), (images, kernel)


def _backward(
    window: _Window, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    images, kernel = residuals
    strides, padding, lhs_dilation, rhs_dilation = window[:4]
    # With a preferred element type the cotangent may be wider than the operands.
    dtype = jnp.result_type(images, kernel, cotangent)
    x, k, g = (array.astype(dtype) for array in (images, kernel, cotangent))

    # Sizes once dilated. Where the stride leaves slack, `o` reaches less far than the window could
    # have: both paddings below follow from the sizes that must come out, whatever the slack.
    n = [_span(size, by) for size, by in zip(x.shape[1:3], lhs_dilation, strict=True)]
    m = [_span(size, by) for size, by in zip(k.shape[:2], rhs_dilation, strict=True)]
    o = [_span(size, by) for size, by in zip(g.shape[1:3], strides, strict=True)]
    low = [pair[0] for pair in padding]

    # dL/dx: the cotangent, spread out by the stride, under the flipped kernel, inputs for outputs.
    towards_images = _Window(
        window_strides=lhs_dilation,
        padding=tuple((m[i] - 1 - low[i], n[i] - o[i] + low[i]) for i in (0, 1)),
        lhs_dilation=strides,
        rhs_dilation=rhs_dilation,
        precision=window.precision,
        preferred_element_type=None,
    )
    flipped = jnp.transpose(k[::-1, ::-1], (0, 1, 3, 2))
    image_gradient = _convolve(g, flipped, towards_images)

    # dL/dk, where small maps of many channels make it worth Winograd's sums; else the images under
    # the cotangent as a kernel [H', W', B, K]; the sum runs over the batch and the channels take
    # the batch's place.
    if _fewer_products_are_faster_for_kernels(x, k, window):
        kernel_gradient = winograd.kernel_gradient(x, g, padding)
        return image_gradient.astype(images.dtype), kernel_gradient.astype(kernel.dtype)
    towards_kernel = _Window(
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


def _span(size: int, dilation: int) -> int:
    """How far `size` points reach with `dilation - 1` gaps between neighbours."""
    return dilation * (size - 1) + 1


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
