"""Baselines: values by hand, gradients that an attacker can climb, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from rain_jax.checks import UsageError
from rain_jax.defences import baselines

IMAGE = jax.random.uniform(jax.random.key(5), (12, 10, 3))
SLOPE = jax.random.normal(jax.random.key(6), (12, 10, 3))
KEYS = jax.random.split(jax.random.key(8), 64)
SMALL = {
    "bit_depth": baselines.bit_depth(),
    "gaussian_noise": baselines.gaussian_noise(),
    "median": baselines.median(),
    "resize_and_pad": baselines.resize_and_pad(smallest=0.5),
    "total_variation": baselines.total_variation(steps=10),
}


def climbed(apply, key, image=IMAGE, slope=SLOPE):
    return jax.grad(lambda image: jnp.sum(slope * apply({}, key, image)))(image)


@pytest.mark.parametrize("name", SMALL)
def test_what_holds_for_all(name, key):
    defence = SMALL[name]
    assert defence.init(key, IMAGE) == {}
    apply = jax.jit(jax.vmap(defence.apply, (None, 0, 0)))
    images = jnp.stack([IMAGE, IMAGE])
    out = apply({}, KEYS[:2], images)
    assert out.dtype == jnp.float32
    # Random exactly where it says so; the same key the same image; nobody feels a neighbour.
    assert bool(jnp.any(out[0] != out[1])) == defence.random
    np.testing.assert_allclose(defence.apply({}, KEYS[1], IMAGE), out[1], atol=1e-6)
    for climbable in defence.apply, *defence.surrogates.values():
        np.testing.assert_allclose(climbable({}, KEYS[1], IMAGE), out[1], atol=1e-6)
        slope = jnp.linspace(-1.0, 1.0, out[0].size).reshape(out[0].shape)
        gradient = jax.jit(partial(climbed, climbable))(key, IMAGE, slope)
        assert bool(jnp.all(jnp.isfinite(gradient)))
        assert float(jnp.mean(gradient != 0)) > 0.15


@pytest.mark.parametrize(
    "apply",
    [
        SMALL["bit_depth"].surrogates["identity"],
        SMALL["gaussian_noise"].apply,
        SMALL["total_variation"].apply,
        SMALL["median"].surrogates["identity"],
    ],
    ids=["bit_depth", "gaussian_noise", "total_variation", "median"],
)
def test_the_identitys_gradient_where_it_is_promised(apply, key):
    np.testing.assert_array_equal(climbed(apply, key), SLOPE)


def test_bit_depth_by_hand(key):
    image = jnp.array([0.0, 0.07, 0.08, 0.5, 0.99, 1.0]).reshape(1, 6, 1)
    out = baselines.bit_depth(bits=3).apply({}, key, image).ravel()
    np.testing.assert_allclose(out, np.array([0, 0, 1, 4, 7, 7]) / 7, atol=1e-6)
    binary = baselines.bit_depth(bits=1).apply({}, key, IMAGE)
    np.testing.assert_array_equal(binary, (IMAGE > 0.5).astype(jnp.float32))
    # An 8-bit image is one already.
    whole = jnp.arange(256).reshape(16, 16, 1) / 255
    out = baselines.bit_depth(bits=8).apply({}, key, whole)
    np.testing.assert_allclose(out, whole, atol=1e-7)


def test_bit_depth_is_felt_most_where_it_is_about_to_tip_over(key):
    image = jnp.array([0.0, 0.2, 0.49, 0.51, 1.0]).reshape(1, 5, 1)
    apply = partial(baselines.bit_depth(bits=1).apply, {}, key)
    slopes = jax.grad(lambda image: jnp.sum(apply(image)))(image).ravel()
    expected = 0.03 + 3 * np.array([0, 0.2, 0.49, 0.49, 0]) ** 2
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_median_is_scipys(width, key):
    out = baselines.median(width=width).apply({}, key, IMAGE)
    expected = ndimage.median_filter(np.asarray(IMAGE), size=(width, width, 1), mode="reflect")
    np.testing.assert_array_equal(out, expected)


def energy(image, found, kept, weight):
    jumps = sum(jnp.sum(jnp.abs(jnp.diff(found, axis=axis))) for axis in (0, 1))
    return jnp.sum(kept * (found - image) ** 2) + weight * jumps


def test_total_variation_of_a_step_by_hand(key):
    """Two plateaus a < b of n columns each: least at a + w / 2n and b - w / 2n."""
    image = jnp.full((6, 10, 1), 0.2).at[:, 5:].set(0.8)
    defence = baselines.total_variation(weight=0.3, keep=1.0, steps=500)
    out = defence.apply({}, key, image)
    np.testing.assert_allclose(out[:, :5], 0.2 + 0.03, atol=1e-4)
    np.testing.assert_allclose(out[:, 5:], 0.8 - 0.03, atol=1e-4)


def test_total_variation_of_much_weight_is_the_mean(key):
    defence = baselines.total_variation(weight=50.0, keep=1.0, steps=1000)
    out = defence.apply({}, key, IMAGE)
    mean = jnp.mean(IMAGE, axis=(0, 1), keepdims=True)
    np.testing.assert_allclose(out, jnp.broadcast_to(mean, out.shape), atol=1e-3)


def test_dropped_pixels_tell_nothing_and_are_filled_in(key):
    unrolled = baselines.total_variation(steps=60).surrogates["unrolled"]
    jacobian = jax.jacrev(lambda image: unrolled({}, key, image))(IMAGE[:6, :6, :1])
    felt = jnp.any(jacobian.reshape(36, 36) != 0, axis=0)
    kept = jax.random.bernoulli(key, 0.5, (6, 6, 1)).ravel()
    np.testing.assert_array_equal(felt, kept)
    # A smooth ramp with holes comes back about as it was.
    ramp = jnp.broadcast_to(jnp.linspace(0.2, 0.8, 24).reshape(24, 1, 1), (24, 24, 1))
    out = baselines.total_variation().apply({}, key, ramp)
    assert float(jnp.mean(jnp.abs(out - ramp))) < 0.02


def test_the_steps_of_total_variation_come_near_the_least_sum(key, shared_data):
    from PIL import Image

    with Image.open(shared_data / "imagenet_samples" / "in1k_224" / "0000.webp") as file:
        image = jnp.asarray(np.asarray(file.convert("RGB")), jnp.float32)[64:160, 64:160] / 255
    kept = jax.random.bernoulli(key, 0.5, (96, 96, 1))
    sums = {
        steps: energy(
            image, baselines.total_variation(steps=steps).apply({}, key, image), kept, 0.03
        )
        for steps in (100, 2000)
    }
    assert sums[2000] <= sums[100] <= 1.005 * sums[2000]


def test_resize_and_pad_keeps_the_authors_sizes(key):
    """Heights and places on the canvas, seen on a white image: grey is outside."""
    defence = baselines.resize_and_pad()
    white = jnp.ones((96, 96, 1))

    def frame(key):
        out = defence.apply({}, key, white)[..., 0]
        inside = out > 0.75
        rows, columns = jnp.any(inside, axis=1), jnp.any(inside, axis=0)
        exact = jnp.all(jnp.where(inside, out == 1.0, out == 0.5))
        full = jnp.sum(inside) == jnp.sum(rows) * jnp.sum(columns)
        return jnp.sum(rows), jnp.sum(columns), jnp.argmax(rows), jnp.argmax(columns), exact & full

    assert defence.apply({}, key, white).shape == (106, 106, 1)
    tall, wide, top, left, exact = jax.jit(jax.vmap(frame))(jax.random.split(key, 256))
    assert bool(jnp.all(exact))
    assert set(tall.tolist()) == set(range(100, 106))
    np.testing.assert_array_equal(tall, wide)
    # Placed anywhere that it fits, at both ends too, and the axes apart.
    for place in top, left:
        assert int(jnp.min(place)) == 0
        assert bool(jnp.all(place + tall <= 106))
        assert bool(jnp.any(place + tall == 106))
    assert bool(jnp.any(top != left))


@pytest.mark.parametrize(("size", "larger"), [((32, 32), (35, 35)), ((299, 40), (331, 44))])
def test_resize_and_pad_tells_its_size(size, larger, key):
    apply = baselines.resize_and_pad().apply
    assert jax.eval_shape(apply, {}, key, jnp.zeros((*size, 3))).shape == (*larger, 3)


def test_resize_and_pad_of_one_size_is_the_image_or_its_mirror():
    still = baselines.resize_and_pad(smallest=1.0, canvas=1.0, flip=False)
    np.testing.assert_allclose(still.apply({}, KEYS[0], IMAGE), IMAGE, atol=1e-6)
    mirrored = baselines.resize_and_pad(smallest=1.0, canvas=1.0)
    out = jax.vmap(lambda key: mirrored.apply({}, key, IMAGE))(KEYS)
    flips = np.max(np.abs(out - IMAGE[None, :, ::-1]), axis=(1, 2, 3)) < 1e-6
    stays = np.max(np.abs(out - IMAGE[None]), axis=(1, 2, 3)) < 1e-6
    assert np.all(flips ^ stays)
    assert 16 < flips.sum() < 48  # four deviations


def test_the_gradient_of_resize_and_pad_is_the_exact_one(key):
    """A pixel copied n times is felt n times: the sum of all slopes is that of the image's part."""
    apply = baselines.resize_and_pad(smallest=1.5, canvas=2.0).apply
    gradient = climbed(apply, key, IMAGE, jnp.ones((24, 20, 3)))
    np.testing.assert_allclose(gradient, jnp.round(gradient), atol=1e-5)
    assert float(jnp.min(gradient)) >= 1.0
    assert float(jnp.max(gradient)) <= 4.0


def test_gaussian_noise_has_its_scale_and_is_not_clipped(key):
    apply = baselines.gaussian_noise(scale=0.5).apply
    noise = apply({}, key, jnp.zeros((64, 64, 3)))
    np.testing.assert_allclose(jnp.std(noise), 0.5, rtol=0.03)
    np.testing.assert_allclose(jnp.mean(noise), 0.0, atol=0.02)
    still = baselines.gaussian_noise(scale=0.0).apply({}, key, IMAGE)
    np.testing.assert_array_equal(still, IMAGE)


def test_numbers_stay_numbers(key):
    """Sweeps under `vmap`: one compiled program for all settings."""
    scales = jnp.array([0.0, 0.1])
    out = jax.vmap(lambda s: baselines.gaussian_noise(scale=s).apply({}, key, IMAGE))(scales)
    np.testing.assert_array_equal(out[0], IMAGE)
    smoothed = lambda weight: baselines.total_variation(weight=weight).apply({}, key, IMAGE)
    out = jax.vmap(smoothed)(jnp.array([0.03, 0.3]))
    np.testing.assert_allclose(out[1], smoothed(0.3), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("bit_depth", dict(bits=0), r"bits=0: expected a number in \[1, 8\]"),
        ("bit_depth", dict(bits=9), "bits=9"),
        ("gaussian_noise", dict(scale=-0.1), "scale=-0.1"),
        ("median", dict(width=0), "width=0"),
        ("resize_and_pad", dict(smallest=0.0), "smallest=0.0"),
        ("resize_and_pad", dict(smallest=1.1, canvas=1.0), r"canvas=1.0: .* \[1.1, 4\]"),
        ("total_variation", dict(weight=0.0), "weight=0.0"),
        ("total_variation", dict(keep=0.0), r"keep=0.0: expected a number in \(0, 1\]"),
        ("total_variation", dict(steps=0), "steps=0"),
    ],
)
def test_bad_settings_are_refused(name, settings, says):
    with pytest.raises(UsageError, match=says):
        getattr(baselines, name)(**settings)
