"""RAIN: what is drawn, what it does to one image, and what an attacker may climb."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.checks import UsageError
from rain_jax.defences.rain import rain
from rain_jax.image import mean_pool, random_pick, shift
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
EDSR = edsr(blocks=1, width=4)
IMAGE = jax.random.uniform(jax.random.key(7), (48, 44, 3))
KEYS = jax.random.split(jax.random.key(3), 256)


def small(image):
    """What `COPY` was given."""
    return image[::2, ::2]


def shifts_of(defence, image, keys):
    """The shifts (dy, dx) of the half-sized image, found by trying all."""
    outputs = jax.jit(jax.vmap(lambda key: small(defence.apply({}, key, image))))(keys)
    reach = 3
    moves = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    tried = jax.vmap(lambda move: shift(mean_pool(image), move))(jnp.array(moves))
    distance = jax.lax.map(lambda one: jnp.sum(jnp.abs(one[None] - tried), axis=(1, 2, 3)), outputs)
    assert np.max(np.min(distance, axis=1)) < 1e-4
    return [moves[i] for i in np.argmin(distance, axis=1)]


def test_the_identity_in_place_of_an_upscaler_leaves_picks_of_each_window(key):
    out = small(rain(COPY, reach=0.0).apply({}, key, IMAGE))
    windows = IMAGE.reshape(24, 2, 22, 2, 3).transpose(0, 2, 4, 1, 3).reshape(24, 22, 3, 4)
    assert bool(jnp.all(jnp.any(windows == out[..., None], axis=-1)))


def test_channels_stay_together_when_asked(key):
    grey = jnp.broadcast_to(IMAGE[..., :1], IMAGE.shape)
    spread = lambda out: float(jnp.max(jnp.ptp(out, axis=-1)))
    assert spread(rain(COPY, per_channel=False).apply({}, key, grey)) == 0.0
    assert spread(rain(COPY).apply({}, key, grey)) > 0.1


def test_all_shifts_within_reach_occur_and_no_others():
    # Windows of one colour each: picks change nothing. 24 pixels high, so 2 at 0.1.
    image = enlarge(small(IMAGE))
    found = shifts_of(rain(COPY, reach=0.1), image, KEYS)
    assert set(found) == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.parametrize(("height", "most"), [(38, 0), (96, 2), (224, 5)])
def test_the_published_reach_in_pixels(height, most):
    """w = int(0.05 x half the height), on both axes, known or traced."""
    image = jnp.zeros((height, 16, 1)).at[height // 2].set(1.0)  # one row, far from the edges
    keys = KEYS[:128]

    def rows(reach):
        defence = rain(COPY, reach=reach, down="bicubic")
        out = jax.vmap(lambda key: defence.apply({}, key, image)[::2, 0, 0])(keys)
        return jnp.argmax(out, axis=1) - height // 4

    found = rows(0.05)
    assert (int(found.min()), int(found.max())) == (-most, most)
    np.testing.assert_array_equal(jax.jit(rows)(0.05), found)


def test_the_same_key_the_same_image_and_each_key_its_own(key):
    defence = rain(COPY)
    batch = jnp.stack([IMAGE, IMAGE])
    apply = jax.vmap(defence.apply, (None, 0, 0))
    out = apply({}, KEYS[:2], batch)
    assert not bool(jnp.all(out[0] == out[1]))
    np.testing.assert_array_equal(jax.jit(apply)({}, KEYS[:2], batch), out)
    np.testing.assert_array_equal(defence.apply({}, KEYS[1], IMAGE), out[1])


def test_picks_are_uniform():
    windows = jnp.tile(jnp.arange(4.0).reshape(2, 2, 1) / 4, (24, 24, 1))  # all alike
    defence = rain(COPY, reach=0.1)
    first = jax.vmap(lambda key: defence.apply({}, key, windows)[0, 0, 0])(KEYS)
    counts = np.bincount(np.asarray(first * 4).astype(int), minlength=4)
    assert counts.sum() == 256
    assert np.sum((counts - 64) ** 2 / 64) < 16.3  # chi-squared of 3 degrees, 0.1 %


@pytest.mark.parametrize("size", [(9, 12), (12, 9), (9, 9), (1, 2)])
@pytest.mark.parametrize("down", ["random", "bicubic"])
def test_odd_sizes_keep_their_size(size, down, key):
    image = IMAGE[: size[0], : size[1]]
    defence = rain(COPY, down=down)
    for apply in defence.apply, *defence.surrogates.values():
        assert apply({}, key, image).shape == image.shape
    # A plain image is a fixed point, at its edges too.
    flat = jnp.full_like(image, 0.25)
    np.testing.assert_allclose(defence.apply({}, key, flat), flat, atol=1e-6)


def test_bicubic_halving_is_cubic_convolution_without_a_filter(key):
    """Keys' kernel with a = -0.75 at distances 1/2 and 3/2, edge pixels repeated."""

    def kernel(x, a=-0.75):
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    image = np.asarray(IMAGE)
    matrices = []
    for size in image.shape[:2]:
        matrix = np.zeros((size // 2, size))
        for i in range(size // 2):
            for j in range(2 * i - 1, 2 * i + 3):
                matrix[i, min(max(j, 0), size - 1)] += kernel(2 * i + 0.5 - j)
        matrices.append(matrix)
    expected = np.einsum("yh,xw,hwc->yxc", *matrices, image)
    out = small(rain(COPY, down="bicubic", reach=0).apply({}, key, IMAGE))
    np.testing.assert_allclose(out, np.clip(expected, 0, 1), atol=1e-6)


def test_only_what_draws_is_random():
    assert rain(COPY).random
    assert rain(COPY, down="bicubic").random
    assert rain(COPY, reach=0).random
    assert not rain(COPY, down="bicubic", reach=0).random


def test_a_network_in_place(key):
    defence = rain(EDSR)
    variables = defence.init(key, IMAGE)
    jax.tree.map(np.testing.assert_array_equal, variables, EDSR.init(key, IMAGE[:24, :22]))
    loud = jax.tree.map(lambda leaf: 20 * leaf, variables)
    out = jax.jit(defence.apply)(loud, key, IMAGE)
    assert out.shape == IMAGE.shape
    assert out.dtype == jnp.float32
    assert float(out.min()) == 0.0
    assert float(out.max()) == 1.0
    total = lambda image: jnp.sum(defence.apply(variables, key, image) ** 2)
    gradient = jax.jit(jax.grad(total))(IMAGE)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    # One pixel of each window and channel is felt.
    np.testing.assert_allclose(np.mean(gradient != 0), 0.25, atol=0.01)


def test_the_clip_lets_the_images_gradient_pass_and_stops_the_variables(key):
    defence = rain(BRIGHT, reach=0)
    total = lambda variables, image: jnp.sum(defence.apply(variables, key, image))
    for brightness in (0.5, 5.0):
        variables, image = {"params": jnp.float32(brightness)}, jnp.full((8, 8, 3), 0.9)
        ours, theirs = jax.grad(total, (0, 1))(variables, image)
        # Each pick is copied to four pixels; 4 x 4 windows of 3 channels.
        np.testing.assert_allclose(jnp.sum(theirs), 48 * 4 * brightness, rtol=1e-5)
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


def test_average_one_shift_is_the_expectation_over_picks_with_the_shift_of_the_key(key):
    defence = rain(COPY, reach=0.1)
    expected = defence.surrogates["average_one_shift"]({}, key, IMAGE)
    # The shift hangs on the key, so the same one: it is found, and the means are moved by it.
    (move,) = shifts_of(defence, enlarge(small(IMAGE)), key[None])
    np.testing.assert_allclose(small(expected), shift(mean_pool(IMAGE), move), atol=1e-6)
    picks = jax.jit(jax.vmap(lambda key: random_pick(key, IMAGE)))(jax.random.split(key, 500))
    error = shift(jnp.mean(picks, axis=0), move) - small(expected)
    assert float(jnp.max(jnp.abs(error))) < 0.12  # five deviations of a mean of 500


def test_average_is_the_mean_over_all_shifts_and_draws_nothing():
    defence = rain(COPY, reach=0.1)
    average = defence.surrogates["average"]
    moves = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    tried = jax.vmap(lambda move: shift(mean_pool(IMAGE), move))(jnp.array(moves))
    expected = jnp.mean(tried, axis=0)
    for key in KEYS[:2]:
        np.testing.assert_allclose(small(average({}, key, IMAGE)), expected, atol=1e-6)
    # Linear here, so the gradient is the transpose: every pixel counts alike.
    gradient = jax.grad(lambda image: jnp.sum(average({}, KEYS[0], image)))(IMAGE)
    np.testing.assert_allclose(gradient, jnp.ones_like(IMAGE), rtol=1e-5)


def test_average_and_draws_agree_in_the_mean_through_a_network(key):
    """The shift's expectation by draws comes to the exact one as draws grow."""
    defence = rain(EDSR, reach=0.1)
    image = IMAGE[:24, :24]  # 12 high: one pixel
    variables = defence.init(key, image)
    one = defence.surrogates["average_one_shift"]
    draws = jax.vmap(lambda key: one(variables, key, image))(KEYS)
    exact = defence.surrogates["average"](variables, key, image)
    deviation = jnp.std(draws, axis=0) / np.sqrt(len(KEYS))
    assert float(jnp.mean(jnp.abs(jnp.mean(draws, 0) - exact) < 3 * deviation + 1e-6)) > 0.95


def test_identity_is_the_function_with_the_gradient_of_the_shift():
    defence = rain(EDSR, reach=0.1)
    variables = defence.init(KEYS[0], IMAGE)
    identity = defence.surrogates["identity"]
    moves = shifts_of(rain(COPY, reach=0.1), enlarge(small(IMAGE)), KEYS[:8])
    key, move = next((key, move) for key, move in zip(KEYS, moves, strict=False) if all(move))
    slope = jax.random.normal(key, IMAGE.shape)

    @jax.value_and_grad
    def total(image):
        return jnp.sum(slope * identity(variables, key, image))

    value, gradient = total(IMAGE)
    np.testing.assert_allclose(
        value, jnp.sum(slope * defence.apply(variables, key, IMAGE)), rtol=1e-5
    )
    np.testing.assert_array_equal(gradient, shift(slope, (-2 * move[0], -2 * move[1])))


def test_one_compile_for_every_reach(key):
    traced = []

    @jax.jit
    def curve(reach):
        traced.append(reach)
        defence = rain(COPY, reach=reach)
        assert "average" not in defence.surrogates
        return defence.apply({}, key, IMAGE)

    for reach in (0.0, 0.1, 0.3):
        np.testing.assert_array_equal(curve(reach), rain(COPY, reach=reach).apply({}, key, IMAGE))
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
