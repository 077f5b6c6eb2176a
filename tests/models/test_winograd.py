"""Winograd's convolutions are convolutions: values, gradients, loops, and where they are taken."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rain_jax.models import conv, winograd
from rain_jax.models.conv import gradients_by_lax, loop_safe_conv
from rain_jax.models.detours import CANONICAL

ONE = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))
# Sizes even and odd, padding none, even and uneven: pixels of the last tiles may be cut away.
GEOMETRIES = [
    ((8, 8), ONE), ((7, 9), ONE), ((6, 5), NONE), ((3, 3), NONE), ((5, 8), ((2, 1), (0, 2))),
    ((4, 4), ((2, 2), (2, 2))),
]  # fmt: skip


def operands(size: Any, channels: int, features: int, batch: int = 2) -> Any:
    draw = np.random.default_rng(3)
    shapes = (batch, *size, channels), (3, 3, channels, features)
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


def waves(*shape: int) -> np.ndarray:
    """A cotangent."""
    return np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def by_lax(images: Any, kernel: Any, padding: Any = ONE) -> Any:
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=CANONICAL)


def assert_close(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(np.max(np.abs(theirs)))
        np.testing.assert_allclose(ours, theirs, 0, tolerance * scale)


@pytest.mark.parametrize(("size", "padding"), GEOMETRIES)
def test_values_and_gradients_are_those_of_a_convolution(size: Any, padding: Any) -> None:
    images, kernel = operands(size, 5, 7)
    shape = jax.eval_shape(lambda x, k: by_lax(x, k, padding), images, kernel).shape

    @jax.jit
    def both(images: Any, kernel: Any, cotangent: Any) -> Any:
        expected, pull = jax.vjp(lambda x, k: by_lax(x, k, padding), images, kernel)
        found, own = jax.vjp(lambda x, k: winograd.convolve(x, k, padding), images, kernel)
        by_hand = winograd.kernel_gradient(images, cotangent, padding)
        return (found, own(cotangent), by_hand), (expected, pull(cotangent))

    found, (maps, (to_images, to_kernel)) = both(images, kernel, waves(*shape))
    for ours, theirs in zip(found, (maps, (to_images, to_kernel), to_kernel), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("size", "padding", "batch"),
    [((8, 8), ONE, 1), ((8, 8), ONE, 11), ((7, 10), NONE, 10), ((7, 10), NONE, 15)],
)
def test_many_images_go_in_parts(
    size: Any, padding: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five images at most, and two parts at once: of 11, the last begins in the one before."""
    rows, columns = (-(-(n + sum(pad) - 2) // 2) for n, pad in zip(size, padding, strict=True))
    each = 16 * rows * columns * (6 + 11) * 4
    monkeypatch.setattr(winograd, "_AT_ONCE", 0)
    monkeypatch.setattr(winograd, "_OF_A_PART", 5 * each)
    monkeypatch.setattr(winograd, "_of_kernel", lambda channels, features: 0)
    images, kernel = operands(size, 6, 11, batch)
    parts = {1: 1, 10: 1, 11: 3, 15: 3}[batch]
    assert winograd._parts(images, 11, padding) == parts

    def ours(x: Any, k: Any) -> Any:
        return winograd.convolve(x, k, padding)

    # One by one under a `vmap`, or two: the parts are those of all.
    one_by_one = jax.vmap(lambda image, k: ours(image[None], k)[0], (0, None))

    @jax.jit
    def everything(images: Any, kernel: Any, cotangent: Any) -> Any:
        expected, pull = jax.vjp(lambda x, k: by_lax(x, k, padding), images, kernel)
        members = jnp.stack([kernel, 2 * kernel])
        return dict(
            expected=expected, to_kernel=pull(cotangent)[1],
            ours=ours(images, kernel),
            kernel_gradient=winograd.kernel_gradient(images, cotangent, padding),
            one_by_one=one_by_one(images, kernel),
            members=jax.vmap(ours, (None, 0))(images, members),
            both=jax.vmap(ours)(jnp.stack([images, images]), members),
        )  # fmt: skip

    height, width = (n + sum(pad) - 2 for n, pad in zip(size, padding, strict=True))
    changed = winograd.convolve, winograd.kernel_gradient
    for function in changed:
        function.clear_cache()  # what was traced for images of this size that go at once
    found = jax.device_get(everything(images, kernel, waves(batch, height, width, 11)))
    for convolved in (ours, one_by_one):
        loops = str(jax.make_jaxpr(convolved)(images, kernel)).count("scan[")
        assert loops == (parts > 1)
    for function in changed:
        function.clear_cache()
    expected = found["expected"]
    assert_close(found["ours"], expected)
    assert_close(found["kernel_gradient"], found["to_kernel"])
    assert_close(found["one_by_one"], expected)
    assert_close(found["members"], np.stack([expected, 2 * expected]))
    assert_close(found["both"], np.stack([expected, 2 * expected]))


def test_what_float64_says_is_as_near_as_to_a_direct_convolution() -> None:
    """Sums of tiles before the products cost precision, but a bit of it."""
    images, kernel = operands((16, 16), 64, 64)
    x, k = (np.asarray(array, np.float64) for array in (images, kernel))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = sum(
        padded[:, row : row + 16, column : column + 16] @ k[row, column]
        for row in range(3) for column in range(3)
    )  # fmt: skip
    size = np.sqrt(np.mean(exact**2))
    by = {"direct": by_lax, "winograd": winograd.convolve}
    found = jax.jit(lambda x, k: {name: by[name](x, k, ONE) for name in by})(images, kernel)
    error = {name: np.sqrt(np.mean((f - exact) ** 2)) / size for name, f in found.items()}
    assert error["winograd"] < 1e-6
    assert error["winograd"] < 4 * error["direct"]


def multiplications(function: Any, *arguments: Any) -> int:
    """How many matrix products and convolutions are in a function, loops and calls counted once."""

    def count(jaxpr: Any) -> dict[str, int]:
        found = {"dot_general": 0, "conv_general_dilated": 0}
        for equation in jaxpr.eqns:
            if equation.primitive.name in found:
                found[equation.primitive.name] += 1
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    for name, number in count(inner).items():
                        found[name] += number
        return found

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    ("size", "channels", "features", "batch", "taken", "for_kernels"),
    [
        ((8, 8), 64, 64, 4, True, True),
        ((8, 8), 32, 64, 4, True, False),  # forwards alone
        ((32, 32), 64, 64, 2, True, False),  # the kernel's gradient would take too many pixels
        ((8, 8), 32, 32, 4, False, False),  # too few channels
        ((16, 16), 16, 80, 1, False, False),
        ((4, 4), 64, 64, 4, False, False),  # too few tiles
        ((4, 4), 64, 64, 1, True, True),  # of one of many images
        ((3, 3), 64, 64, 1, False, False),
    ],
)
def test_it_is_taken_where_it_is_faster(
    size: Any, channels: int, features: int, batch: int, taken: bool, for_kernels: bool
) -> None:
    images, kernel = operands(size, channels, features, batch)

    def ours(x: Any, k: Any) -> Any:
        return loop_safe_conv(x, k, (1, 1), ONE)

    forwards = multiplications(ours, images, kernel)
    assert forwards == {"dot_general": 16 * taken, "conv_general_dilated": 1 - taken}
    loss = lambda x, k: jnp.sum(jnp.sin(0.05 * ours(x, k)))
    to_kernel = multiplications(jax.grad(loss, 1), images, kernel)
    # Forwards, and back to both: nothing here leaves out what nobody asked for.
    products = 16 * (2 * taken + for_kernels)
    assert to_kernel == {
        "dot_general": products, "conv_general_dilated": 3 - products // 16,
    }  # fmt: skip
    for other in ((2, 2), (1, 1)), ((1, 1), (2, 2)):
        strides, dilation = other
        apart = lambda x, k, s=strides, d=dilation: loop_safe_conv(x, k, s, ONE, rhs_dilation=d)
        assert multiplications(apart, images, kernel)["dot_general"] == 0
    halved = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (images, kernel)]
    narrow = multiplications(ours, *halved)
    assert narrow["dot_general"] == 0
    by = [loss, lambda x, k: jnp.sum(jnp.sin(0.05 * by_lax(x, k)))]
    both = jax.jit(lambda x, k: [jax.value_and_grad(each, (0, 1))(x, k) for each in by])
    assert_close(*both(images, kernel), 1e-5)


def test_a_large_kernel_is_not_transposed_for_a_few_pixels() -> None:
    """On the way back to images: a product for each tap, of the kernel as it is."""
    images, kernel = operands((4, 4), 128, 160, 4)
    cotangent = waves(4, 4, 4, 160)

    def back(convolve: Any) -> Any:
        return lambda x, k, g: jax.vjp(lambda x: convolve(x, k), x)[1](g)[0]

    ours = back(lambda x, k: loop_safe_conv(x, k, (1, 1), ONE))
    both = jax.jit(lambda *arguments: (ours(*arguments), back(by_lax)(*arguments)))
    assert_close(*both(images, kernel, cotangent))
    counted = multiplications(ours, images, kernel, cotangent)
    assert counted["dot_general"] == 9
    transposed = [
        line for line in str(jax.make_jaxpr(ours)(images, kernel, cotangent)).splitlines()
        if "= transpose" in line and "f32[3,3,160,128]" in line
    ]  # fmt: skip
    assert not transposed
    several = np.concatenate([images] * 3), kernel, np.concatenate([cotangent] * 3)
    assert_close(*both(*several))
    assert multiplications(ours, *several)["dot_general"] == 0  # two convolutions, or three


def test_under_vmap_and_in_a_loop_and_twice() -> None:
    images, kernel = operands((8, 8), 64, 64, 3)

    def climbed(convolve: Any) -> Any:
        def loss(image: Any, kernel: Any) -> Any:
            return jnp.sum(jnp.sin(0.1 * convolve(image[None], kernel)))

        def steps(image: Any, kernel: Any) -> Any:
            body = lambda _, x: x + 0.1 * jax.grad(loss)(x, kernel)
            return lax.fori_loop(0, 3, body, image)

        total = lambda kernel: jnp.sum(jax.vmap(loss, (0, None))(images, kernel))
        along = lambda kernel: jnp.sum(jax.grad(total)(kernel) ** 2)
        return jax.vmap(steps, (0, None))(images, kernel), jax.grad(along)(kernel)

    ours = lambda x, k: loop_safe_conv(x, k, (1, 1), ONE)
    assert_close(*jax.jit(lambda: (climbed(ours), climbed(by_lax)))(), 2e-5)


def test_gradients_left_to_lax_are_its_convolutions() -> None:
    """Of the same values: weights that learn under a `vmap` over images, as upscalers' do."""
    images, kernel = operands((8, 8), 64, 64, 3)

    def loss(kernel: Any, convolve: Any) -> Any:
        each = jax.vmap(lambda image: convolve(image[None], kernel))(images)
        return jnp.sum(jnp.sin(0.1 * each))

    def ours(x: Any, k: Any) -> Any:
        with gradients_by_lax():
            return conv.conv_general_dilated(x, k, (1, 1), ONE, dimension_numbers=CANONICAL)

    counted = multiplications(lambda k: jax.grad(loss)(k, ours), kernel)
    assert counted["dot_general"] == 16
    assert counted["conv_general_dilated"] >= 1
    both = jax.jit(lambda k: [jax.value_and_grad(loss)(k, each) for each in (ours, by_lax)])
    assert_close(*both(kernel), 1e-5)
