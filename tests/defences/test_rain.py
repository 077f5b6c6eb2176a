"""RAIN: what is drawn, what it does to one image, and what an attacker may climb."""

from functools import cache, partial

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.checks import UsageError
from rain_jax.defences.rain import rain
from rain_jax.image import random_pick
from rain_jax.models.upscalers import edsr
from rain_jax.types import Upscaler


def enlarge(image):
    """Every pixel four times."""
    return jnp.repeat(jnp.repeat(image, 2, axis=0), 2, axis=1)


COPY = Upscaler(lambda key, image: {}, lambda variables, image: enlarge(image), 2)
# One number as a network: brightness.
BRIGHT = Upscaler(
    lambda key, image: {"params": jnp.float32(1.0)},
    lambda variables, image: variables["params"] * enlarge(image),
    2,
)
EDSR = drawn.instead(edsr(blocks=1, width=4))
IMAGE = np.random.default_rng(7).uniform(size=(48, 44, 3)).astype(np.float32)
KEYS = drawn.keys(3, 256)


@cache
def program(form=None, **settings):
    """What a defence without a network makes of a key and an image, compiled once."""
    defence = rain(COPY, **settings)
    apply = defence.surrogates[form] if form else defence.apply
    return jax.jit(partial(apply, {}))


def run(function, *arguments):
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def small(image):
    """What `COPY` was given."""
    return np.asarray(image)[::2, ::2]


def doubled(image):
    return np.repeat(np.repeat(image, 2, axis=0), 2, axis=1)


def means(image):
    """Of its 2x2 windows."""
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))


def shifts_of(image, keys):
    """The shifts (dy, dx) of the half-sized image at a reach of 0.1, found by trying all."""
    outputs = [small(program(reach=0.1)(key, image)) for key in keys]
    reach = 3
    moves = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    tried = np.stack([np.roll(means(image), move, axis=(0, 1)) for move in moves])
    distance = np.stack([np.sum(np.abs(one[None] - tried), axis=(1, 2, 3)) for one in outputs])
    assert np.max(np.min(distance, axis=1)) < 1e-3
    return [moves[i] for i in np.argmin(distance, axis=1)]


def test_the_identity_in_place_of_an_upscaler_leaves_picks_of_each_window(key):
    out = small(program(reach=0.0)(key, IMAGE))
    windows = IMAGE.reshape(24, 2, 22, 2, 3).transpose(0, 2, 4, 1, 3).reshape(24, 22, 3, 4)
    assert np.all(np.any(windows == out[..., None], axis=-1))


def test_channels_stay_together_when_asked(key):
    grey = np.broadcast_to(IMAGE[..., :1], IMAGE.shape)
    spread = lambda out: np.max(np.ptp(np.asarray(out), axis=-1))
    assert spread(program(per_channel=False)(key, grey)) == 0.0
    assert spread(program(reach=0.1)(key, grey)) > 0.1


def test_all_shifts_within_reach_occur_and_no_others():
    # Windows of one colour each: picks change nothing. 24 pixels high, so 2 at 0.1.
    image = doubled(small(IMAGE))
    found = shifts_of(image, KEYS)
    assert set(found) == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.parametrize(("height", "most"), [(38, 0), (96, 2), (224, 5)])
def test_the_published_reach_in_pixels(height, most):
    """w = int(0.05 x half the height), on both axes, known or traced."""
    image = np.zeros((height, 16, 1), np.float32)
    image[height // 2] = 1.0  # one row, far from the edges

    @jax.jit
    def rows(key, image, traced):
        place = lambda reach: jnp.argmax(
            rain(COPY, reach=reach, down="bicubic").apply({}, key, image)[::2, 0, 0]
        )
        return jnp.stack([place(0.05), place(traced)]) - height // 4

    found, traced = np.stack([rows(key, image, 0.05) for key in KEYS[:128]], axis=1)
    assert (found.min(), found.max()) == (-most, most)
    np.testing.assert_array_equal(traced, found)


def test_the_same_key_the_same_image_and_each_key_its_own():
    one = program(reach=0.1)
    together = jax.jit(jax.vmap(one))(KEYS[:2], np.stack([IMAGE, IMAGE]))
    out = np.asarray(together)
    assert np.any(out[0] != out[1])
    np.testing.assert_array_equal(one(KEYS[1], IMAGE), out[1])
    np.testing.assert_array_equal(one(KEYS[1], IMAGE), one(KEYS[1], IMAGE))


def test_picks_are_uniform():
    tile = np.arange(4, dtype=np.float32).reshape(2, 2, 1) / 4
    windows = np.tile(tile, (24, 22, 3))  # all alike
    first = np.array([program(reach=0.1)(key, windows)[0, 0, 0] for key in KEYS])
    counts = np.bincount((first * 4).astype(int), minlength=4)
    assert counts.sum() == 256
    assert np.sum((counts - 64) ** 2 / 64) < 16.3  # chi-squared of 3 degrees, 0.1 %


@pytest.mark.parametrize("size", [(9, 12), (12, 9), (9, 9), (1, 2)])
@pytest.mark.parametrize("down", ["random", "bicubic"])
def test_odd_sizes_keep_their_size(size, down, key):
    defence = rain(COPY, down=down)
    # A plain image is a fixed point, at its edges too.
    flat = np.full((*size, 1), 0.25, np.float32)
    for apply in defence.apply, *defence.surrogates.values():
        assert jax.eval_shape(apply, {}, key, flat).shape == flat.shape
    np.testing.assert_allclose(run(partial(defence.apply, {}), key, flat), flat, atol=1e-6)


def test_bicubic_halving_is_cubic_convolution_without_a_filter(key):
    """Keys' kernel with a = -0.75 at distances 1/2 and 3/2, edge pixels repeated."""

    def kernel(x, a=-0.75):
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    matrices = []
    for size in IMAGE.shape[:2]:
        matrix = np.zeros((size // 2, size))
        for i in range(size // 2):
            for j in range(2 * i - 1, 2 * i + 3):
                matrix[i, min(max(j, 0), size - 1)] += kernel(2 * i + 0.5 - j)
        matrices.append(matrix)
    expected = np.einsum("yh,xw,hwc->yxc", *matrices, IMAGE)
    out = small(program(down="bicubic", reach=0)(key, IMAGE))
    np.testing.assert_allclose(out, np.clip(expected, 0, 1), atol=1e-6)


def test_only_what_draws_is_random():
    assert rain(COPY).random
    assert rain(COPY, down="bicubic").random
    assert rain(COPY, reach=0).random
    assert not rain(COPY, down="bicubic", reach=0).random


def test_a_network_in_place(key):
    # As it is drawn, of the smallest there is: generators take long to compile.
    tiny = edsr(blocks=1, width=1)
    variables, expected = rain(tiny).init(key, IMAGE), tiny.init(key, IMAGE[:24, :22])
    jax.tree.map(np.testing.assert_array_equal, variables, expected)

    defence = rain(EDSR)
    variables = defence.init(key, IMAGE)

    @jax.jit
    def both_ways(variables, key, image):
        out, pull = jax.vjp(lambda image: defence.apply(variables, key, image), image)
        return out, pull(2 * out)[0]  # of the sum of squares

    loud = jax.tree.map(lambda leaf: 20 * leaf, variables)
    out, _ = both_ways(loud, key, IMAGE)
    assert out.shape == IMAGE.shape
    assert out.dtype == jnp.float32
    assert float(out.min()) == 0.0
    assert float(out.max()) == 1.0
    _, gradient = both_ways(variables, key, IMAGE)
    assert np.all(np.isfinite(gradient))
    # One pixel of each window and channel is felt.
    np.testing.assert_allclose(np.mean(np.asarray(gradient) != 0), 0.25, atol=0.01)


def test_the_clip_lets_the_images_gradient_pass_and_stops_the_variables(key):
    defence = rain(BRIGHT, reach=0)
    total = lambda variables, image: jnp.sum(defence.apply(variables, key, image))
    slopes = jax.jit(jax.grad(total, (0, 1)))
    for brightness in (0.5, 5.0):
        variables, image = {"params": np.float32(brightness)}, np.full((8, 8, 3), 0.9, np.float32)
        ours, theirs = jax.device_get(slopes(variables, image))
        # Each pick is copied to four pixels; 4 x 4 windows of 3 channels.
        np.testing.assert_allclose(np.sum(theirs), 48 * 4 * brightness, rtol=1e-5)
        expected = 192 * 0.9 if brightness < 1 else 0.0
        np.testing.assert_allclose(ours["params"], expected, rtol=1e-5)


def test_two_backward_rules_cost_one_network(key):
    defence = rain(EDSR)
    variables = defence.init(key, IMAGE)
    square = lambda function: lambda *arguments: jnp.sum(function(*arguments) ** 2)

    def work(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    alone = work(jax.grad(square(EDSR.apply), 1), variables, IMAGE[:24, :22])
    whole = work(jax.grad(square(defence.apply), 2), variables, key, IMAGE)
    assert whole < 1.1 * alone


def test_average_one_shift_is_the_expectation_over_picks_with_the_shift_of_the_key():
    key = KEYS[0]
    expected = small(program("average_one_shift", reach=0.1)(key, IMAGE))
    # The shift hangs on the key, so the same one: it is found, and the means are moved by it.
    (move,) = shifts_of(doubled(small(IMAGE)), [key])
    moved = lambda image: np.roll(image, move, axis=(0, 1))
    np.testing.assert_allclose(expected, moved(means(IMAGE)), atol=1e-6)
    pick = jax.jit(random_pick)
    picks = [np.asarray(pick(key, IMAGE)) for key in KEYS]
    error = moved(np.mean(picks, axis=0)) - expected
    assert np.max(np.abs(error)) < 0.17  # five deviations of a mean of 256


def test_average_is_the_mean_over_all_shifts_and_draws_nothing():
    average = rain(COPY, reach=0.1).surrogates["average"]
    moves = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    expected = np.mean([np.roll(means(IMAGE), move, axis=(0, 1)) for move in moves], axis=0)

    @jax.jit
    def both_ways(key, image):
        out, pull = jax.vjp(lambda image: average({}, key, image), image)
        return out, pull(jnp.ones_like(out))[0]

    for key in KEYS[:2]:
        out, gradient = both_ways(key, IMAGE)
        np.testing.assert_allclose(small(out), expected, atol=1e-6)
        # Linear here, so the gradient is the transpose: every pixel counts alike.
        np.testing.assert_allclose(gradient, np.ones_like(IMAGE), rtol=1e-5)


def test_average_and_draws_agree_in_the_mean_through_a_network(key):
    """The shift's expectation by draws comes to the exact one as draws grow."""
    defence = rain(EDSR, reach=0.1)
    image = IMAGE[:24, :24]  # 12 high: one pixel
    variables = defence.init(key, image)
    one = jax.jit(defence.surrogates["average_one_shift"])
    draws = np.stack([one(variables, key, image) for key in KEYS])
    exact = run(defence.surrogates["average"], variables, key, image)
    deviation = np.std(draws, axis=0) / np.sqrt(len(KEYS))
    assert np.mean(np.abs(np.mean(draws, 0) - exact) < 3 * deviation + 1e-6) > 0.95


def test_identity_is_the_function_with_the_gradient_of_the_shift():
    defence = rain(EDSR, reach=0.1)
    variables = defence.init(KEYS[0], IMAGE)
    identity = defence.surrogates["identity"]
    moves = shifts_of(doubled(small(IMAGE)), KEYS[:8])
    key, move = next((key, move) for key, move in zip(KEYS, moves, strict=False) if all(move))
    slope = np.random.default_rng(1).normal(size=IMAGE.shape).astype(np.float32)

    def both(variables, key, image, slope):
        value, pull = jax.vjp(lambda image: identity(variables, key, image), image)
        return value, pull(slope)[0], defence.apply(variables, key, image)

    value, gradient, expected = run(both, variables, key, IMAGE, slope)
    np.testing.assert_allclose(np.sum(slope * value), np.sum(slope * expected), rtol=1e-5)
    np.testing.assert_array_equal(gradient, np.roll(slope, (-2 * move[0], -2 * move[1]), (0, 1)))


def test_one_compile_for_every_reach(key):
    traced = []
    image = IMAGE[:20, :4, :1]  # shifted by 0, 1 and 3 pixels at most

    @jax.jit
    def curve(reach):
        traced.append(reach)
        defence = rain(COPY, reach=reach)
        assert "average" not in defence.surrogates
        return defence.apply({}, key, image)

    for reach in (0.0, 0.1, 0.3):
        np.testing.assert_array_equal(curve(reach), program(reach=reach)(key, image))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(reach=-0.1), r"reach=-0.1: expected a number in \[0, 0.5\]"),
        (dict(reach=5), "reach=5"),
        (dict(down="bicubicc"), "down='bicubicc': expected one of random, bicubic; did you mean"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        rain(COPY, **settings)


def test_an_upscaler_of_another_factor_is_refused():
    with pytest.raises(UsageError, match=r"upscaler\.factor=4: expected 2"):
        rain(COPY._replace(factor=4))
