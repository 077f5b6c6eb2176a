"""The super-resolution networks: published sizes and weights, pixel layout, and refusals."""

import inspect
import math
import re

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as pillow

from experiments.benching.counted import gflop_of
from rain_jax.checks import UsageError
from rain_jax.methods.upscaling import psnr
from rain_jax.models import imports, upscalers
from rain_jax.models.edsr import DIV2K_MEAN
from rain_jax.models.upscaler import pixel_shuffle

SMALL = {
    "bicubic": {},
    "edsr": dict(blocks=2, width=4, residual_scale=0.5),
    "imdn": dict(blocks=2, width=16),
}
ALL = pytest.mark.parametrize("name", upscalers.__all__)


def make(name, **more):
    """With an `init` that compiles no generators."""
    return drawn.instead(getattr(upscalers, name)(**SMALL[name], **more))


def picture(height=6, width=5, channels=3, seed=0):
    shape = height, width, channels
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def weights(upscaler, *shape):
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(upscaler.init, jax.random.key(0), image)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))


# Laws of every upscaler


@ALL
def test_arguments_are_plain_annotated_values_with_defaults(name):
    assert name in SMALL
    maker = getattr(upscalers, name)
    assert maker.__doc__
    for argument in inspect.signature(maker).parameters.values():
        assert argument.kind is argument.KEYWORD_ONLY
        assert argument.annotation is not argument.empty
        assert isinstance(argument.default, int | float | tuple | str)


@ALL
@pytest.mark.parametrize("channels", [1, 3])
def test_twice_the_size_in_float32_and_no_image_feels_another(name, channels):
    upscaler = make(name, **(dict(mean=0.4) if name == "edsr" and channels == 1 else {}))
    images = np.stack([picture(channels=channels, seed=seed) for seed in range(3)])
    variables = upscaler.init(jax.random.key(1), images[0])
    found = jax.jit(jax.vmap(upscaler.apply, (None, 0)))(variables, images)
    assert upscaler.factor == 2
    assert found.shape == (3, 12, 10, channels)
    assert found.dtype == jnp.float32
    alone = jax.jit(upscaler.apply)
    for image, enlarged in zip(images, found, strict=True):
        np.testing.assert_allclose(alone(variables, image), enlarged, atol=1e-5)


def test_bfloat16_is_inside_alone_and_moves_no_pixel_by_a_level():
    dtypes = "bfloat16", "float32"
    image = picture()
    # What is drawn, on the smallest there is: generators take long to compile.
    tiny = [upscalers.edsr(blocks=1, width=1, dtype=dtype) for dtype in dtypes]
    narrow, wide = (each.init(jax.random.key(1), image) for each in tiny)
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype("float32")}

    def both(variables, image):
        return [make("edsr", dtype=dtype).apply(variables, image) for dtype in dtypes]

    variables = make("edsr").init(jax.random.key(1), image)
    # What rounding does hangs on the size of weights: `init` draws a third of the variance.
    variables = jax.tree.map(lambda leaf: leaf / np.float32(np.sqrt(3)), variables)
    found, expected = map(np.asarray, jax.jit(both)(variables, image))
    assert found.dtype == np.float32
    difference = np.max(np.abs(found - expected))
    assert 0.0 < difference < 0.5 / 255


def test_weights_and_images_share_one_forward_pass():
    # Five convolutions, two of a block, and as many backwards: what is written for weights and
    # for images is computed once. Colours take a detour on CPU, see `models.conv`.
    upscaler = drawn.instead(upscalers.edsr(blocks=1, width=8))
    images = np.stack([picture(seed=seed) for seed in range(3)])
    variables = upscaler.init(jax.random.key(1), images[0])

    def enlarged(images, variables):
        return jax.vmap(upscaler.apply, (None, 0))(variables, images)

    def loss(images, variables):
        return jnp.sum(enlarged(images, variables) ** 2)

    def convolutions(function):
        program = jax.jit(function).lower(images, variables).compile().as_text()
        return len(re.findall(r" convolution\(", program))

    assert convolutions(enlarged) == 6
    assert convolutions(jax.grad(loss)) == 12
    assert convolutions(jax.grad(loss, 1)) == 17  # nobody asks for a gradient of the images
    assert gflop_of(jax.grad(loss, (0, 1)), images, variables) == pytest.approx(
        3 * gflop_of(enlarged, images, variables)
    )


@ALL
def test_an_attacker_gets_a_gradient(name):
    upscaler, image = make(name), picture()
    variables = upscaler.init(jax.random.key(1), image)
    gradient = jax.jit(jax.grad(lambda image: jnp.sum(upscaler.apply(variables, image) ** 2)))(
        image
    )
    assert np.all(np.isfinite(gradient))
    assert np.count_nonzero(gradient) == gradient.size


@ALL
def test_what_is_no_image_is_refused(name):
    upscaler = make(name)
    variables = upscaler.init(jax.random.key(1), picture())
    with pytest.raises(UsageError, match=r"expected floats in \[0, 1\], \[h, w, C\]"):
        upscaler.apply(variables, picture()[None])
    with pytest.raises(UsageError, match="the image is uint8"):
        upscaler.apply(variables, jnp.zeros((4, 4, 3), jnp.uint8))


# Each of them


def test_published_sizes():
    assert weights(upscalers.edsr(), 8, 8, 3) == 1_369_859
    assert weights(upscalers.edsr(blocks=32, width=256), 8, 8, 3) == 40_729_603
    assert weights(upscalers.imdn(), 8, 8, 3) == 694_404
    assert weights(upscalers.bicubic(), 8, 8, 3) == 0


def test_pixel_shuffle_lays_out_as_torch():
    maps = np.arange(2 * 3 * 4 * 8, dtype=np.float32).reshape(2, 3, 4, 8)
    found = np.asarray(jax.jit(pixel_shuffle)(maps))
    assert found.shape == (2, 6, 8, 2)
    for b, y, x, c in np.ndindex(*found.shape):
        assert found[b, y, x, c] == maps[b, y // 2, x // 2, 4 * c + 2 * (y % 2) + x % 2]


@pytest.mark.parametrize("name", ["edsr", "imdn"])
def test_without_weights_there_is_one_colour_and_the_gradient_is_a_number(name):
    upscaler, image = make(name), picture()
    shapes = jax.eval_shape(upscaler.init, jax.random.key(0), image)
    zero = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    colour = np.array(DIV2K_MEAN if name == "edsr" else (0, 0, 0))
    # The attention of IMDN takes the root of a variance that is zero here.

    @jax.jit
    def both_ways(variables, image):
        found, pull = jax.vjp(upscaler.apply, variables, image)
        return found, pull(jnp.ones_like(found))

    found, gradients = both_ways(zero, image)
    np.testing.assert_allclose(found, np.broadcast_to(colour, found.shape), atol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_bicubic_keeps_constants_and_straight_lines():
    enlarge = jax.jit(lambda image: upscalers.bicubic().apply({}, image))
    flat = enlarge(np.full((5, 6, 2), 0.3, np.float32))
    np.testing.assert_allclose(flat, np.full((10, 12, 2), 0.3), atol=1e-6)
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32).reshape(1, 8, 1), (8, 8, 1))
    found = np.asarray(enlarge(ramp))[:, :, 0]
    inner = np.arange(4, 12)  # away from the edges, where weights are missing
    np.testing.assert_allclose(found[5, inner], (inner + 0.5) / 2 - 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: upscalers.edsr(blocks=0), "blocks=0"),
        (lambda: upscalers.edsr(width=0), "width=0"),
        (lambda: upscalers.edsr(residual_scale=0.0), "residual_scale=0.0"),
        (lambda: upscalers.edsr(mean=114.4), "mean=114.4"),
        (lambda: upscalers.imdn(width=24), "width=24: expected a multiple of 16"),
        (lambda: upscalers.bicubic(factor=0), "factor=0"),
        (
            lambda: upscalers.edsr(blocks=1, width=4).init(jax.random.key(0), jnp.zeros((4, 4, 1))),
            "mean has 3 values",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("other", [dict(blocks=3, width=4), dict(blocks=2, width=8)])
def test_variables_of_another_network_are_refused(other):
    variables = make("edsr").init(jax.random.key(0), picture())
    with pytest.raises(UsageError, match="these variables do not fit"):
        jax.eval_shape(upscalers.edsr(**other).apply, variables, picture())


# Published weights: state dictionaries with the names and shapes of the PyTorch code


def layer(draw, name, inputs, outputs, size=3):
    scale = 1 / math.sqrt(inputs * size**2)
    return {
        f"{name}.weight": draw.normal(0, scale, (outputs, inputs, size, size)).astype(np.float32),
        f"{name}.bias": draw.normal(0, scale, outputs).astype(np.float32),
    }


def edsr_state(blocks=2, width=4):
    draw = np.random.default_rng(0)
    state = layer(draw, "head.0", 3, width)
    for number in range(blocks):
        state |= layer(draw, f"body.{number}.body.0", width, width)
        state |= layer(draw, f"body.{number}.body.2", width, width)
    state |= layer(draw, f"body.{blocks}", width, width)
    state |= layer(draw, "tail.0.0", width, 4 * width)
    state |= layer(draw, "tail.1", width, 3)
    for name, sign in ("sub_mean", -1), ("add_mean", 1):
        state[f"{name}.weight"] = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
        state[f"{name}.bias"] = (sign * 255 * np.array(DIV2K_MEAN)).astype(np.float32)
    return state


def imdn_state(blocks=2, width=16):
    draw = np.random.default_rng(0)
    rest, aside = width * 3 // 4, width // 4
    state = layer(draw, "fea_conv", 3, width)
    for block in (f"IMDB{number + 1}" for number in range(blocks)):
        state |= layer(draw, f"{block}.c1", width, width)
        state |= layer(draw, f"{block}.c2", rest, width) | layer(draw, f"{block}.c3", rest, width)
        state |= layer(draw, f"{block}.c4", rest, aside) | layer(
            draw, f"{block}.c5", width, width, 1
        )
        state |= layer(draw, f"{block}.cca.conv_du.0", width, width // 16, 1)
        state |= layer(draw, f"{block}.cca.conv_du.2", width // 16, width, 1)
    state |= layer(draw, "c.0", blocks * width, width, 1) | layer(draw, "LR_conv", width, width)
    return state | layer(draw, "upsampler.0", width, 12)


def torch_conv(state, name, maps):
    """A layer of PyTorch's: channels first, zeros around, maps [C, h, w]."""
    kernel = state[f"{name}.weight"]
    pad = kernel.shape[-1] // 2
    around = np.pad(maps, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(around, kernel.shape[2:], (1, 2))
    found = np.einsum("ihwyx,oiyx->ohw", windows, kernel)
    return found.astype(np.float32) + state[f"{name}.bias"][:, None, None]


def torch_shuffle(maps):
    channels, height, width = maps.shape
    maps = maps.reshape(channels // 4, 2, 2, height, width).transpose(0, 3, 1, 4, 2)
    return maps.reshape(channels // 4, 2 * height, 2 * width)


def test_edsr_computes_what_the_published_network_does():
    """Written anew from the layers' names, in levels of 0 to 255 and with channels first."""
    state, image = edsr_state(), picture()
    relu = lambda maps: np.maximum(maps, 0)
    levels = np.asarray(image).transpose(2, 0, 1) * 255
    head = maps = torch_conv(state, "head.0", torch_conv(state, "sub_mean", levels))
    for number in range(2):
        change = relu(torch_conv(state, f"body.{number}.body.0", maps))
        maps = maps + 0.1 * torch_conv(state, f"body.{number}.body.2", change)
    maps = torch_conv(state, "body.2", maps) + head
    maps = torch_conv(state, "tail.1", torch_shuffle(torch_conv(state, "tail.0.0", maps)))
    expected = torch_conv(state, "add_mean", maps).transpose(1, 2, 0) / 255
    upscaler = upscalers.edsr(blocks=2, width=4, residual_scale=0.1)
    found = jax.jit(upscaler.apply)(imports.edsr_from_torch(state), image)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(expected - np.array(DIV2K_MEAN)) > 0.01


def test_imdn_computes_what_the_published_network_does():
    state, image = imdn_state(), picture()
    leaky = lambda maps: np.where(maps > 0, maps, 0.05 * maps)
    head = maps = torch_conv(state, "fea_conv", np.asarray(image).transpose(2, 0, 1))
    found = []
    for block in ("IMDB1", "IMDB2"):
        rest, kept = maps, []
        for step in ("c1", "c2", "c3"):
            rest = leaky(torch_conv(state, f"{block}.{step}", rest))
            kept, rest = [*kept, rest[:4]], rest[4:]
        joined = np.concatenate([*kept, torch_conv(state, f"{block}.c4", rest)])
        look = joined.std((1, 2), keepdims=True) + joined.mean((1, 2), keepdims=True)
        look = np.maximum(torch_conv(state, f"{block}.cca.conv_du.0", look), 0)
        look = 1 / (1 + np.exp(-torch_conv(state, f"{block}.cca.conv_du.2", look)))
        maps = torch_conv(state, f"{block}.c5", joined * look) + maps
        found.append(maps)
    maps = leaky(torch_conv(state, "c.0", np.concatenate(found)))
    maps = torch_conv(state, "upsampler.0", torch_conv(state, "LR_conv", maps) + head)
    upscaler = upscalers.imdn(blocks=2, width=16)
    # The prefix is what training on several devices leaves.
    variables = imports.imdn_from_torch({f"module.{name}": a for name, a in state.items()})
    expected = torch_shuffle(maps).transpose(1, 2, 0)
    np.testing.assert_allclose(jax.jit(upscaler.apply)(variables, image), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["edsr", "imdn"])
def test_imported_variables_are_those_of_the_network(name):
    state = {"edsr": edsr_state, "imdn": imdn_state}[name]()
    found = getattr(imports, f"{name}_from_torch")(state)
    expected = jax.eval_shape(make(name).init, jax.random.key(0), picture())
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.0.weight"), "no array 'head.0.weight' in it"),
        (lambda s: s.pop("tail.1.bias"), "no array 'tail.1.bias' in it"),
        (lambda s: s.pop("body.1.body.2.weight"), "no array 'body.1.body.2.weight'"),
        (lambda s: s.pop("body.0.body.0.weight"), "no array 'body.0.body.0.weight'"),
        (lambda s: s.update({"tail.2.bias": np.zeros(3)}), "'tail.2.bias' has no place"),
        (
            lambda s: s.update({"tail.0.0.weight": np.zeros((36, 4, 3, 3))}),
            r"tail.0.0.weight is \[36, 4, 3, 3\]: expected \[16, 4, 3, 3\]",
        ),
        (lambda s: s.update({"head.0.weight": np.zeros(4)}), "expected a kernel"),
        (lambda s: s.update({"sub_mean.bias": np.zeros(3)}), "sub_mean: expected a shift"),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(change, message):
    state = edsr_state()
    change(state)
    with pytest.raises(UsageError, match=message):
        imports.edsr_from_torch(state)


def test_published_imdn_beats_bicubic_on_photographs(shared_data):
    """About 29.6 dB against 26.2 is known of these weights on STL-10, 48 to 96 pixels."""
    mosaic = np.asarray(pillow.open(shared_data / "stl10" / "train_0.webp"))
    photographs = mosaic[:960].reshape(10, 96, 10, 96, 3).swapaxes(1, 2).reshape(-1, 96, 96, 3)[:50]
    halves = [pillow.fromarray(p).resize((48, 48), pillow.Resampling.BICUBIC) for p in photographs]
    small = np.stack([np.asarray(half) for half in halves]).astype(np.float32) / 255
    with np.load(shared_data / "weights" / "sr_imdn_x2.npz") as state:
        variables = imports.imdn_from_torch(state)

    def quality(upscaler, variables):
        def each(variables, image, whole):
            return psnr(upscaler.apply(variables, image), whole)

        whole = photographs.astype(np.float32) / 255
        return np.mean(jax.jit(jax.vmap(each, (None, 0, 0)))(variables, small, whole))

    assert abs(quality(upscalers.imdn(), variables) - 29.6) < 0.5
    assert abs(quality(upscalers.bicubic(), {}) - 26.2) < 0.5


def test_weights_learn_by_one_convolution_for_all_images():
    """Under `vmap` a rule of our own would make a gradient for every image and add them up."""
    up = drawn.instead(upscalers.edsr(blocks=1, width=4))
    images = np.random.default_rng(1).uniform(size=(5, 6, 6, 3)).astype(np.float32)
    variables = up.init(jax.random.key(0), images[0])

    def total(variables, images):
        return jnp.sum(jax.vmap(lambda image: up.apply(variables, image) ** 2)(images))

    slope = jax.jit(jax.grad(total)).lower(variables, images).compile()
    text = slope.as_text()
    assert "convolution(" in text
    assert "feature_group_count" not in text
    # And both ways back are the true gradients.
    one = lambda variables, image: jnp.sum(up.apply(variables, image) ** 2)
    both_ways = jax.jit(jax.value_and_grad(one, (0, 1)))
    each = jax.device_get([both_ways(variables, image) for image in images])
    summed = jax.tree.map(lambda *leaves: sum(leaves), *[slopes[0] for _, slopes in each])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        slope(variables, images), summed,
    )  # fmt: skip
    direction = np.random.default_rng(2).normal(size=images[0].shape).astype(np.float32)
    step = 2e-3
    above, below = (both_ways(variables, images[0] + s * step * direction)[0] for s in (1, -1))
    _, (_, slope_there) = each[0]
    rise = (above - below) / (2 * step)
    np.testing.assert_allclose(np.sum(slope_there * direction), rise, rtol=1e-2)
