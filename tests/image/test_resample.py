"""Halving and resizing against other people's code, exact averages and counts."""

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import image as ops
from rain_jax.checks import UsageError
from rain_jax.image.resample import Method

IMAGE = np.random.default_rng(1).uniform(size=(8, 6, 3)).astype(np.float32)
METHODS: list[Method] = ["nearest", "area", "linear", "cubic"]


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


PICK = jax.jit(ops.random_pick, static_argnames="per_channel")
POOL = jax.jit(ops.mean_pool)


def windows(image):
    height, width, channels = image.shape
    parts = np.asarray(image).reshape(height // 2, 2, width // 2, 2, channels)
    return parts.transpose(0, 2, 4, 1, 3).reshape(height // 2, width // 2, channels, 4)


def test_a_pick_is_one_of_its_window_uniformly_and_the_mean_is_its_expectation():
    pick = jax.jit(jax.vmap(lambda key: ops.random_pick(key, IMAGE)))
    picks = np.asarray(pick(drawn.keys(2, 4000)))
    which = picks[..., None] == windows(IMAGE)
    assert np.all(which.sum(-1) == 1)
    # Within 5 standard deviations, of each of 144 shares and of the expectation.
    np.testing.assert_allclose(which.mean(0), 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))
    np.testing.assert_allclose(picks.mean(0), POOL(IMAGE), atol=5 * 0.5 / np.sqrt(4000))
    np.testing.assert_allclose(POOL(IMAGE), windows(IMAGE).mean(-1), atol=1e-6)


def largest_of_each_window(image):
    """Max-pooling by two, in NumPy."""
    return np.maximum(
        np.maximum(image[::2, ::2], image[::2, 1::2]),
        np.maximum(image[1::2, ::2], image[1::2, 1::2]),
    )


@pytest.mark.parametrize("per_channel", [True, False])
def test_picks_are_the_authors_masked_maximum_for_the_same_winners(per_channel, key):
    """Noise is largest at a window's winner; all others go to minus infinity, and are pooled away.

    (The authors multiply by the mask, so that the others are zero and images must not be negative.)
    """
    pick = jax.jit(lambda image: ops.random_pick(key, image, per_channel=per_channel))
    draw = np.random.default_rng(8)
    # What the key picks hangs on no pixel, so an image of places tells it.
    corners = np.tile(np.arange(4.0, dtype=np.float32).reshape(2, 2, 1), (9, 7, 3))
    winners = np.repeat(np.repeat(pick(corners), 2, axis=0), 2, axis=1)
    noise = draw.uniform(size=corners.shape) + 5.0 * (corners == winners)
    most = np.repeat(np.repeat(largest_of_each_window(noise), 2, axis=0), 2, axis=1)
    image = draw.normal(size=corners.shape).astype(np.float32)
    masked = np.where(noise == most, image, -np.inf)
    np.testing.assert_array_equal(pick(image), largest_of_each_window(masked))


def test_channels_are_picked_apart_or_together():
    # Each pixel says in all channels where it is; channels agree by chance one time in four.
    places = np.arange(64 * 64, dtype=np.float32).reshape(64, 64, 1) / 4096
    places = np.broadcast_to(places, (64, 64, 2))
    apart, together = (
        np.asarray(PICK(jax.random.key(3), places, per_channel=own)) for own in (True, False)
    )
    agreeing = np.mean(apart[:, :, 0] == apart[:, :, 1])
    assert abs(agreeing - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 1024)
    np.testing.assert_array_equal(together[:, :, 0], together[:, :, 1])


def test_the_gradient_of_a_pick_goes_to_the_pixel_that_was_kept(key):
    def both_ways(image):
        picked, pull = jax.vjp(lambda image: ops.random_pick(key, image), image)
        return picked, pull(jnp.ones_like(picked))[0]

    picked, slope = run(both_ways, IMAGE)
    kept = np.sum(windows(slope) * windows(IMAGE), axis=-1)
    assert sorted(np.unique(slope)) == [0.0, 1.0]
    np.testing.assert_array_equal(windows(slope).sum(-1), 1.0)
    np.testing.assert_array_equal(kept, picked)


def test_odd_sizes_are_refused_until_made_even(key):
    odd = IMAGE[:7, :5]
    for halve in (ops.mean_pool, lambda image: ops.random_pick(key, image)):
        with pytest.raises(UsageError, match="to_even"):
            halve(odd)
        with pytest.raises(UsageError, match="to_even"):
            halve(odd[:, :4])
    even = run(ops.to_even, odd)
    assert even.shape == (8, 6, 3)
    np.testing.assert_array_equal(even[:7, :5], odd)
    np.testing.assert_array_equal(even[7, :5], odd[6])
    np.testing.assert_array_equal(even[:, 5], even[:, 4])
    np.testing.assert_array_equal(run(ops.to_even, IMAGE), IMAGE)


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic"])
def test_resize_agrees_with_jax_at_every_traced_size_in_one_program(method):
    chex.clear_trace_counter()
    once = lambda size: ops.resize(IMAGE, size, canvas=(11, 13), method=method)
    resize = jax.jit(chex.assert_max_traces(once, n=1))
    sizes = [(8, 6), (4, 3), (11, 13), (5, 13), (9, 1), (1, 7)]
    # Theirs at all sizes as one program, since none is needed twice.
    theirs = run(
        lambda image: [jax.image.resize(image, (*s, 3), method, antialias=False) for s in sizes],
        IMAGE,
    )
    for size, expected in zip(sizes, theirs, strict=True):
        got = resize(np.array(size))
        np.testing.assert_allclose(got[: size[0], : size[1]], expected, atol=2e-6)
        assert not np.any(got[size[0] :])
        assert not np.any(got[:, size[1] :])


def test_area_is_the_exact_mean_of_what_each_pixel_covers():
    # Repeated 5 by 4 times, output pixels are whole numbers of small ones.
    small = np.repeat(np.repeat(IMAGE, 5, axis=0), 4, axis=1)
    expected = small.reshape(5, 8, 4, 6, 3).mean(axis=(1, 3))
    area = lambda size, canvas: ops.resize(IMAGE, size, canvas=canvas, method="area")
    got, half = run(lambda: (area((5, 4), (8, 8)), area((4, 3), (4, 3))))
    np.testing.assert_allclose(got[:5, :4], expected, atol=1e-6)
    np.testing.assert_allclose(half, POOL(IMAGE), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_constants_and_images_of_the_same_size(method):
    def both(image):
        grey = jnp.full((8, 6, 3), 0.3)
        return (
            ops.resize(grey, (5, 9), canvas=(5, 9), method=method),
            ops.resize(image, (8, 6), canvas=(8, 6), method=method),
        )

    grey, same = run(both, IMAGE)
    np.testing.assert_allclose(grey, 0.3, atol=1e-6)
    np.testing.assert_allclose(same, IMAGE, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_image_of_a_batch_has_its_own_size(method):
    images = np.stack([IMAGE, 1 - IMAGE])
    sizes = np.array([[3, 9], [7, 2]])
    one = jax.jit(lambda image, size: ops.resize(image, size, canvas=(9, 9), method=method))
    batch = jax.jit(jax.vmap(one))(images, sizes)
    for i in (0, 1):
        np.testing.assert_allclose(batch[i], one(images[i], sizes[i]), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_resize_is_its_transpose(method):
    draw = np.random.default_rng(4)
    weight, other = (draw.normal(size=shape).astype("f4") for shape in ((7, 7, 3), IMAGE.shape))

    def both(image, other, weight, size):
        resize = lambda image: ops.resize(image, size, canvas=(7, 7), method=method)
        return resize(other), jax.vjp(resize, image)[1](weight)[0]

    resized, pulled = run(both, IMAGE, other, weight, np.array([5, 7]))
    np.testing.assert_allclose(np.sum(weight * resized), np.sum(pulled * other), rtol=1e-4)


def test_bad_sizes_and_methods_are_refused():
    with pytest.raises(UsageError, match="size=9"):
        ops.resize(IMAGE, (9, 4), canvas=(8, 8))
    with pytest.raises(UsageError, match="size=0"):
        ops.resize(IMAGE, (4, 0), canvas=(8, 8))
    with pytest.raises(UsageError, match="did you mean 'linear'"):
        ops.resize(IMAGE, (4, 4), canvas=(8, 8), method="liner")  # type: ignore[arg-type]
