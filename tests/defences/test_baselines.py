"""Baselines: values by hand, gradients that an attacker can climb, refusals."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from rain_jax.checks import UsageError
from rain_jax.defences import baselines

IMAGE = np.random.default_rng(5).uniform(size=(12, 10, 3)).astype(np.float32)
SLOPE = np.random.default_rng(6).normal(size=(12, 10, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(8), 64)
SMALL = {
    "bit_depth": baselines.bit_depth(),
    "gaussian_noise": baselines.gaussian_noise(),
    "median": baselines.median(),
    "resize_and_pad": baselines.resize_and_pad(smallest=0.5),
    "total_variation": baselines.total_variation(steps=10),
}


def run(function, *arguments):
    """As one program, into NumPy: by themselves a defence's many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def climbed(apply, key, image, slope):
    return jax.vjp(lambda image: apply({}, key, image), image)[1](slope)[0]


@cache
def found_by(name):
    """All that two tests ask of one defence, by one program.

    What becomes of two images with a key each and, by form, of the second alone: its result, and
    its gradients for slopes that rise evenly and, where the size stays, for `SLOPE`.
    """
    defence = SMALL[name]
    forms = {"own": defence.apply, **defence.surrogates}

    def everything(keys, image, slope):
        together = jax.vmap(defence.apply, (None, 0, 0))({}, keys, jnp.stack([image, image]))
        even = jnp.linspace(-1.0, 1.0, together[0].size).reshape(together[0].shape)
        slopes = jnp.stack([even, slope] if even.shape == slope.shape else [even])
        alone = {}
        for form, apply in forms.items():
            value, pull = jax.vjp(lambda image, a=apply: a({}, keys[1], image), image)
            alone[form] = value, jax.vmap(pull)(slopes)[0]
        return together, alone

    return run(everything, KEYS[:2], IMAGE, SLOPE)


@pytest.mark.parametrize("name", SMALL)
def test_what_holds_for_all(name, key):
    defence = SMALL[name]
    assert defence.init(key, IMAGE) == {}
    out, alone = found_by(name)
    assert out.dtype == np.float32
    # Random exactly where it says so; the same key the same image; nobody feels a neighbour.
    assert np.any(out[0] != out[1]) == defence.random
    assert set(alone) == {"own", *defence.surrogates}
    for value, (gradient, *_) in alone.values():
        np.testing.assert_allclose(value, out[1], atol=1e-6)
        assert np.all(np.isfinite(gradient))
        assert np.mean(gradient != 0) > 0.15


@pytest.mark.parametrize(
    "name, form",
    [
        ("bit_depth", "identity"),
        ("gaussian_noise", "own"),
        ("total_variation", "own"),
        ("median", "identity"),
    ],
    ids=["bit_depth", "gaussian_noise", "total_variation", "median"],
)
def test_the_identitys_gradient_where_it_is_promised(name, form):
    _, gradients = found_by(name)[1][form]
    np.testing.assert_array_equal(gradients[1], SLOPE)


def test_bit_depth_by_hand(key):
    by_hand = np.float32([0.0, 0.07, 0.08, 0.5, 0.99, 1.0]).reshape(1, 6, 1)
    whole = (np.arange(256, dtype=np.float32) / 255).reshape(16, 16, 1)

    def of_three(*images):
        depths = zip((3, 1, 8), images, strict=True)
        return [baselines.bit_depth(bits=bits).apply({}, key, image) for bits, image in depths]

    out, binary, same = run(of_three, by_hand, IMAGE, whole)
    np.testing.assert_allclose(out.ravel(), np.array([0, 0, 1, 4, 7, 7]) / 7, atol=1e-6)
    np.testing.assert_array_equal(binary, (IMAGE > 0.5).astype(np.float32))
    # An 8-bit image is one already.
    np.testing.assert_allclose(same, whole, atol=1e-7)


def test_bit_depth_is_felt_most_where_it_is_about_to_tip_over(key):
    image = np.float32([0.0, 0.2, 0.49, 0.51, 1.0]).reshape(1, 5, 1)
    apply = baselines.bit_depth(bits=1).apply
    slopes = run(partial(climbed, apply), key, image, np.ones_like(image)).ravel()
    expected = 0.03 + 3 * np.array([0, 0.2, 0.49, 0.49, 0]) ** 2
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_median_is_scipys(width, key):
    out = run(partial(baselines.median(width=width).apply, {}), key, IMAGE)
    expected = ndimage.median_filter(IMAGE, size=(width, width, 1), mode="reflect")
    np.testing.assert_array_equal(out, expected)


def energy(image, found, kept, weight):
    jumps = sum(np.sum(np.abs(np.diff(found, axis=axis))) for axis in (0, 1))
    return np.sum(kept * (found - image) ** 2) + weight * jumps


@jax.jit
def smoothed_of_all(image, weight):
    """Every pixel kept, and many steps."""
    defence = baselines.total_variation(weight=weight, keep=1.0, steps=1000)
    return defence.apply({}, KEYS[0], image)


def test_total_variation_of_a_step_by_hand():
    """Two plateaus a < b of n columns each: least at a + w / 2n and b - w / 2n."""
    image = np.full(IMAGE.shape, 0.2, np.float32)
    image[:, 5:] = 0.8
    out = np.asarray(smoothed_of_all(image, 0.3))
    np.testing.assert_allclose(out[:, :5], 0.2 + 0.03, atol=1e-4)
    np.testing.assert_allclose(out[:, 5:], 0.8 - 0.03, atol=1e-4)


def test_total_variation_of_much_weight_is_the_mean():
    out = np.asarray(smoothed_of_all(IMAGE, 50.0))
    mean = np.mean(IMAGE, axis=(0, 1), keepdims=True)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-3)


def test_dropped_pixels_tell_nothing_and_are_filled_in(key):
    unrolled = baselines.total_variation(steps=60).surrogates["unrolled"]
    each = jax.jacrev(lambda image, key: unrolled({}, key, image))
    jacobian = run(each, IMAGE[:6, :6, :1], key)
    felt = np.any(jacobian.reshape(36, 36) != 0, axis=0)
    kept = np.asarray(jax.random.bernoulli(key, 0.5, (6, 6, 1))).ravel()
    np.testing.assert_array_equal(felt, kept)
    # A smooth ramp with holes comes back about as it was.
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 24, dtype=np.float32)[:, None, None], (24, 24, 1))
    out = run(partial(baselines.total_variation().apply, {}), key, ramp)
    assert np.mean(np.abs(out - ramp)) < 0.02


def test_the_steps_of_total_variation_come_near_the_least_sum(key, shared_data):
    from PIL import Image

    with Image.open(shared_data / "imagenet_samples" / "in1k_224" / "0000.webp") as file:
        image = np.asarray(file.convert("RGB"), np.float32)[64:160, 64:160] / 255
    kept = np.asarray(jax.random.bernoulli(key, 0.5, (96, 96, 1)))
    sums = {
        steps: energy(
            image, run(partial(baselines.total_variation(steps=steps).apply, {}), key, image),
            kept, 0.03,
        )
        for steps in (100, 2000)
    }  # fmt: skip
    assert sums[2000] <= sums[100] <= 1.005 * sums[2000]


def test_resize_and_pad_keeps_the_authors_sizes(key):
    """Heights and places on the canvas, seen on a white image: grey is outside."""
    defence = baselines.resize_and_pad()
    white = np.ones((96, 96, 1), np.float32)

    def frame(key, white):
        out = defence.apply({}, key, white)[..., 0]
        inside = out > 0.75
        rows, columns = jnp.any(inside, axis=1), jnp.any(inside, axis=0)
        exact = jnp.all(jnp.where(inside, out == 1.0, out == 0.5))
        full = jnp.sum(inside) == jnp.sum(rows) * jnp.sum(columns)
        return jnp.sum(rows), jnp.sum(columns), jnp.argmax(rows), jnp.argmax(columns), exact & full

    assert jax.eval_shape(defence.apply, {}, key, white).shape == (106, 106, 1)
    frames = jax.vmap(frame, (0, None))
    tall, wide, top, left, exact = run(frames, jax.random.split(key, 256), white)
    assert np.all(exact)
    assert set(tall.tolist()) == set(range(100, 106))
    np.testing.assert_array_equal(tall, wide)
    # Placed anywhere that it fits, at both ends too, and the axes apart.
    for place in top, left:
        assert np.min(place) == 0
        assert np.all(place + tall <= 106)
        assert np.any(place + tall == 106)
    assert np.any(top != left)


@pytest.mark.parametrize(("size", "larger"), [((32, 32), (35, 35)), ((299, 40), (331, 44))])
def test_resize_and_pad_tells_its_size(size, larger, key):
    apply = baselines.resize_and_pad().apply
    assert jax.eval_shape(apply, {}, key, jnp.zeros((*size, 3))).shape == (*larger, 3)


def test_resize_and_pad_of_one_size_is_the_image_or_its_mirror():
    still = baselines.resize_and_pad(smallest=1.0, canvas=1.0, flip=False)
    mirrored = baselines.resize_and_pad(smallest=1.0, canvas=1.0)
    same, out = run(
        lambda keys, image: (
            still.apply({}, keys[0], image),
            jax.vmap(lambda key: mirrored.apply({}, key, image))(keys),
        ),
        KEYS, IMAGE,
    )  # fmt: skip
    np.testing.assert_allclose(same, IMAGE, atol=1e-6)
    flips = np.max(np.abs(out - IMAGE[None, :, ::-1]), axis=(1, 2, 3)) < 1e-6
    stays = np.max(np.abs(out - IMAGE[None]), axis=(1, 2, 3)) < 1e-6
    assert np.all(flips ^ stays)
    assert 16 < flips.sum() < 48  # four deviations


def test_the_gradient_of_resize_and_pad_is_the_exact_one(key):
    """A pixel copied n times is felt n times: the sum of all slopes is that of the image's part."""
    apply = baselines.resize_and_pad(smallest=1.5, canvas=2.0).apply
    gradient = run(partial(climbed, apply), key, IMAGE, np.ones((24, 20, 3), np.float32))
    np.testing.assert_allclose(gradient, np.round(gradient), atol=1e-5)
    assert np.min(gradient) >= 1.0
    assert np.max(gradient) <= 4.0


def test_gaussian_noise_has_its_scale_and_is_not_clipped(key):
    at = lambda scale: lambda image: baselines.gaussian_noise(scale=scale).apply({}, key, image)
    noise = run(at(0.5), np.zeros((64, 64, 3), np.float32))
    still = run(at(0.0), IMAGE)
    np.testing.assert_allclose(np.std(noise), 0.5, rtol=0.03)
    np.testing.assert_allclose(np.mean(noise), 0.0, atol=0.02)
    np.testing.assert_array_equal(still, IMAGE)


def test_numbers_stay_numbers(key):
    """Sweeps under `vmap`: one compiled program for all settings."""

    def noisy(scale, image):
        return baselines.gaussian_noise(scale=scale).apply({}, key, image)

    def smoothed(weight, image):
        return baselines.total_variation(weight=weight).apply({}, key, image)

    swept = lambda apply: jax.vmap(apply, (0, None))
    out = run(swept(noisy), np.float32([0.0, 0.1]), IMAGE)
    np.testing.assert_array_equal(out[0], IMAGE)
    out, alone = run(
        lambda weights, image: (swept(smoothed)(weights, image), smoothed(0.3, image)),
        np.float32([0.03, 0.3]), IMAGE,
    )  # fmt: skip
    np.testing.assert_allclose(out[1], alone, atol=1e-5)


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
