"""The 15 corruptions against what can be derived, and against a public implementation of them."""

import colorsys
import importlib.util
import io
import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as pillow
from scipy import ndimage

from rain_jax.checks import UsageError
from rain_jax.image import band_energy
from rain_jax.image.corruptions import FAMILIES, SEVERITIES, frost, frosted
from rain_jax.image.corruptions.blur import disks, scattered
from rain_jax.image.corruptions.common import gaussians, moved
from rain_jax.image.corruptions.digital import displaced, tilted
from rain_jax.image.corruptions.weather import plasma
from rain_jax.parallel import round_up

SETS = ("imagenet", "cifar")
DRAWS_NOTHING = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
)  # fmt: skip
PHOTOGRAPH = np.random.default_rng(9).integers(0, 256, (300, 330, 3), np.uint8)
# Draws at once: always as many, since every other number would be compiled anew.
TOGETHER = 4
_programs: dict = {}


def corruption(name, constants="imagenet", photographs=None):
    """What a family does to one image: (key, image, severity)."""
    function = partial(FAMILIES[name], constants=constants)
    if name != "frost":
        return function
    ice = frosted([PHOTOGRAPH], constants=constants) if photographs is None else photographs
    return partial(function, photographs=ice)


def family(name, constants="imagenet", photographs=None):
    """One compiled program for a batch of keys, of images, and of severities."""
    key = (name, constants, id(photographs))
    if key not in _programs:
        _programs[key] = jax.jit(jax.vmap(corruption(name, constants, photographs)))
    return _programs[key]


def corrupted(name, image, severity, constants="imagenet", draws=1, seed=0, photographs=None):
    """[draws, H, W, C] in levels of 255."""
    keys = jax.random.split(jax.random.key(seed), round_up(draws, TOGETHER))
    program = family(name, constants, photographs)
    images = np.stack([np.asarray(image, np.float32)] * TOGETHER)
    severities = np.full(TOGETHER, severity, np.int32)
    parts = [program(part, images, severities) for part in keys.reshape(-1, TOGETHER)]
    return 255 * np.concatenate(parts)[:draws]


def soft(side=32, channels=3):
    """Slow colours with a sharp edge and a little noise, in whole levels of 255."""
    y, x = np.mgrid[:side, :side]
    waves = [np.sin(x / 5 + c) + np.cos(y / 4 - c) + (x > y) for c in range(channels)]
    image = 110 + 45 * np.stack(waves, axis=-1)
    noise = np.random.default_rng(1).normal(0, 4, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def unit(image):
    return np.asarray(image, np.float32) / 255


def near(ours, theirs, *, share=0.002):
    """The same levels, but for a few that float32 put on the other side of a whole number."""
    assert np.max(np.abs(ours - theirs)) <= 1.01
    assert np.mean(np.abs(ours - theirs) > 0.5) <= share


# Laws of all of them


@pytest.mark.parametrize("name", FAMILIES)
def test_files_could_hold_the_result_and_worse_ones_are_farther(name):
    image = soft()
    distance = []
    for severity in SEVERITIES:
        found = corrupted(name, unit(image), severity, "cifar", draws=4)
        assert found.shape == (4, 32, 32, 3)
        assert found.min() >= 0
        assert found.max() <= 255
        np.testing.assert_allclose(found, np.round(found), atol=1e-4)
        distance.append(np.mean(np.abs(found - image)))
        assert np.array_equal(found[0], found[1]) == (name in DRAWS_NOTHING)
    assert distance[0] > 0
    if name != "elastic_transform":  # whose published constants do not grow
        assert distance[4] > distance[0]
    assert family(name, "cifar")._cache_size() == 1  # one program for all severities


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_a_batch_have_severities_of_their_own_and_no_neighbours(name):
    keys = jax.random.split(jax.random.key(0), 4)
    images = unit(np.stack([soft(), soft()[::-1], 255 - soft(), soft()[:, ::-1]]))
    severities = np.array([2, 5, 3, 1], np.int32)
    batch = 255 * np.asarray(family(name, "cifar")(keys, images, severities))
    for place in range(4):
        severity = int(severities[place])
        among_its_like = corrupted(name, images[place], severity, "cifar", draws=4)[place]
        near(batch[place], among_its_like, share=0.001)
    alone = jax.jit(corruption(name, "cifar"))(keys[0], images[0], severities[0])
    near(batch[0], 255 * np.asarray(alone), share=0.001)


@pytest.mark.parametrize("name", FAMILIES)
def test_grey_and_oblong_images_are_corrupted_too(name):
    grey = soft(34, 1)[:28]
    # One draw is enough: generators for many take twice as long to compile.
    program = jax.jit(corruption(name))
    made = lambda image: 255 * np.asarray(program(jax.random.key(0), unit(image), 3))
    found = made(grey)
    assert found.shape == (28, 34, 1)
    assert np.any(found != grey)
    if name in ("snow", "brightness", "contrast", "pixelate", "jpeg_compression"):
        # Grey colours stay grey.
        same = made(np.repeat(grey, 3, axis=2))
        np.testing.assert_allclose(same[:, :, :1], found, atol=1.01)
        np.testing.assert_allclose(same, np.repeat(same[:, :, :1], 3, axis=2), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_bad_settings_are_refused(name):
    function = FAMILIES[name]
    if name == "frost":
        function = partial(function, photographs=frosted([PHOTOGRAPH]))
    key, image = jax.random.key(0), unit(soft())
    with pytest.raises(UsageError, match="severity=0"):
        function(key, image, 0)
    with pytest.raises(UsageError, match=r"severity=1\.5"):
        function(key, image, 1.5)
    with pytest.raises(UsageError, match=r"constants='cifar10'.*did you mean 'cifar'"):
        function(key, image, 1, constants="cifar10")
    with pytest.raises(UsageError, match="3 channels"):
        function(key, image[:, :, :2], 1)
    with pytest.raises(UsageError, match="uint8"):
        function(key, jnp.zeros((32, 32, 3), jnp.uint8), 1)


def test_gradients_pass_the_last_rounding():
    def total(image, name):
        return jnp.sum(FAMILIES[name](jax.random.key(0), image, 1))

    image = unit(soft())
    image[0, 0] = 0.0
    slope = jax.jit(jax.grad(total), static_argnums=1)
    # Contrast keeps the sum, and nothing is clipped.
    np.testing.assert_allclose(slope(image, "contrast"), 1, atol=1e-4)
    assert np.all(np.isfinite(slope(image, "brightness")))  # black is where its value has none


# Noise


def test_gaussian_noise_has_the_published_deviations():
    image = np.full((32, 32, 3), 0.5)
    for constants, deviations in (("imagenet", (0.08, 0.12)), ("cifar", (0.04, 0.06))):
        for severity, deviation in zip((1, 2), deviations, strict=True):
            found = corrupted("gaussian_noise", image, severity, constants, draws=32) / 255
            assert np.std(found) == pytest.approx(deviation, rel=0.02)
            assert np.mean(found) == pytest.approx(0.5 - 0.5 / 255, abs=0.002)  # cut, not rounded


@pytest.mark.parametrize("constants, photons", [("imagenet", 60), ("cifar", 500)])
def test_shot_noise_counts_photons(constants, photons):
    level = 51 / 255
    found = corrupted("shot_noise", np.full((32, 32, 3), level), 1, constants, draws=64)
    counts = np.ceil(found / 255 * photons - 1e-3)  # cut down to levels, so nearly whole
    rate = photons * level
    assert np.mean(counts) == pytest.approx(rate, rel=0.01)
    assert np.var(counts) == pytest.approx(rate, rel=0.02)
    third = np.mean((counts - np.mean(counts)) ** 3) / np.std(counts) ** 3
    assert third == pytest.approx(rate**-0.5, abs=0.05)
    black = corrupted("shot_noise", np.zeros((32, 32, 3)), 5, constants)
    assert np.all(black == 0)


def test_impulses_are_black_and_white_in_equal_parts_and_channels_apart():
    found = corrupted("impulse_noise", np.full((32, 32, 3), 102 / 255), 5, draws=32)
    assert set(np.unique(np.round(found))) == {0, 102, 255}
    assert np.mean(found < 1) == pytest.approx(0.135, abs=0.005)
    assert np.mean(found > 254) == pytest.approx(0.135, abs=0.005)
    broken = np.abs(found - 102) > 1
    assert np.mean(broken[..., 0] & broken[..., 1]) == pytest.approx(0.27**2, abs=0.01)


# Blur


def test_disks_are_means_over_disks():
    kernels = disks("imagenet")
    assert kernels.shape == (5, 21, 21)
    sums = kernels.sum(axis=(1, 2))
    np.testing.assert_allclose(sums[:3], 1, atol=1e-6)
    # The largest touch the ends of their grids, whose mirror adds a little, as published.
    np.testing.assert_allclose(sums[3:], 1.012, atol=2e-3)
    inside = np.hypot(*np.mgrid[-10:11, -10:11]) <= 3
    np.testing.assert_allclose(kernels[0], inside / inside.sum(), atol=1e-6)
    assert disks("cifar").shape[1] < 9


@pytest.mark.parametrize("constants", SETS)
def test_defocus_is_a_convolution_mirrored_at_the_edges(constants):
    image = soft()
    for severity in (1, 5):
        kernel = disks(constants)[severity - 1]
        theirs = np.stack(
            [ndimage.correlate(image[..., c] / 255, kernel, mode="mirror") for c in range(3)], -1
        )
        ours = corrupted("defocus_blur", unit(image), severity, constants)[0]
        near(ours, np.floor(255 * np.clip(theirs, 0, 1) + 1e-3))


def test_motion_leaves_half_a_gaussian_behind():
    point = np.zeros((21, 21, 1), np.float32)
    point[10, 10, 0] = 1.0
    angles = np.float32([0.0, 180.0, 90.0, 45.0, 30.0])
    turned = jax.jit(jax.vmap(partial(moved, reach=10), (None, 0, None, None)))
    right, left, down, across, _ = np.asarray(turned(point, angles, 3, 2.0))[..., 0]
    weights = np.exp(-0.5 * (np.arange(7) / 2.0) ** 2)
    weights /= weights.sum()
    # What lies to the right of a pixel comes to it.
    np.testing.assert_allclose(right[10, 4:11], weights[::-1], atol=1e-6)
    assert np.sum(right) == pytest.approx(1.0)
    np.testing.assert_allclose(left[:, ::-1], right, atol=1e-6)
    np.testing.assert_allclose(down.T, right, atol=1e-6)
    # Steps of a diagonal fall on whole pixels: 0, 1, 1, 2, 3, 4, 4.
    diagonal = np.zeros(11)
    np.add.at(diagonal, [0, 1, 1, 2, 3, 4, 4], weights)
    np.testing.assert_allclose(np.diag(across)[10::-1], diagonal, atol=1e-6)
    # Edges go on: nothing gets darker.
    everywhere = turned(np.ones_like(point), angles, 10, 3.0)
    np.testing.assert_allclose(everywhere, 1, atol=1e-6)


def test_scattering_is_the_loop_of_the_authors():
    draw = np.random.default_rng(5)
    for reach in (1, 2, 4):
        image = draw.integers(0, 256, (19, 23, 3), np.uint8)
        moves = draw.integers(-reach, reach, (19, 23, 2))
        looped = image.copy()
        for h in range(19 - reach, reach, -1):
            for w in range(23 - reach, reach, -1):
                dy, dx = moves[h, w]
                there = h + dy, w + dx
                looped[h, w], looped[there] = looped[there], looped[h, w]  # views: a copy
        ours = jax.jit(scattered)(unit(image), moves.astype(np.int32), reach)
        np.testing.assert_array_equal(np.round(255 * np.asarray(ours)), looped)


def test_zoom_is_the_mean_of_enlargements():
    image = soft() / 255
    for constants, factors in (
        ("imagenet", np.arange(1, 1.31, 0.03)),
        ("cifar", np.arange(1, 1.26, 0.01)),
    ):
        total = image.copy()
        for factor in factors:
            kept = int(np.ceil(32 / factor))
            top = (32 - kept) // 2
            part = image[top : top + kept, top : top + kept]
            whole = ndimage.zoom(part, (factor, factor, 1), order=1)
            cut = (len(whole) - 32) // 2
            total += whole[cut : cut + 32, cut : cut + 32]
        ours = corrupted("zoom_blur", image, 5, constants)[0]
        near(ours, np.floor(255 * total / (len(factors) + 1) + 1e-3), share=0.01)


# Weather


def test_plasma_is_diamond_square():
    draw = np.random.default_rng(0)
    draws = [draw.uniform(-1, 1, (3, 2**k, 2**k)) for k in range(4)]
    field = np.zeros((16, 16))
    for k, (middle, top, left) in enumerate(draws):
        step = 16 >> k
        half, reach = step // 2, (100 / 1.7**k) ** 2
        for noise, oy, ox in ((middle, half, half), (top, 0, half), (left, half, 0)):
            for i in range(2**k):
                for j in range(2**k):
                    y, x = i * step + oy, j * step + ox
                    if oy and ox:
                        around = [(y - half, x - half), (y - half, x + half),
                                  (y + half, x - half), (y + half, x + half)]  # fmt: skip
                    else:
                        around = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                    mean = np.mean([field[a % 16, b % 16] for a, b in around])
                    field[y, x] = mean + reach * noise[i, j]
    field = (field - field.min()) / (field.max() - field.min())
    ours = jax.jit(plasma)([one.astype(np.float32) for one in draws], 1.7)
    np.testing.assert_allclose(ours, field, atol=1e-5)


def test_fog_brightens_black_and_keeps_the_brightest_in_range():
    image = np.zeros((32, 32, 3))
    image[:16] = 1.0
    found = corrupted("fog", image, 5, draws=20) / 255
    # (x + 3 clouds) / 4: clouds reach 0 and 1 somewhere.
    assert found[:, :16].min() >= 0.25 - 1 / 255
    assert found[:, 16:].max() <= 0.75 + 1e-6
    assert np.mean(found[:, 16:]) == pytest.approx(0.375, abs=0.06)


def test_light_keeps_hue_and_saturation():
    image = soft()
    for severity, light in ((1, 0.1), (5, 0.5)):
        theirs = np.zeros(image.shape)
        for place in np.ndindex(32, 32):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[place] / 255)
            theirs[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + light, 1.0))
        near(corrupted("brightness", unit(image), severity)[0], np.floor(255 * theirs + 1e-3))
    black = corrupted("brightness", np.zeros((32, 32, 3)), 1)
    np.testing.assert_allclose(black, 25, atol=1e-3)


def test_frost_is_a_part_of_one_of_the_photographs():
    draw = np.random.default_rng(2)
    photographs = [draw.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((12, 20), (9, 30))]
    image = draw.integers(0, 256, (8, 8, 3), np.uint8)
    found = corrupted("frost", unit(image), 2, draws=60, photographs=frosted(photographs))
    own, other = 0.8, 0.6
    parts = {
        (which, y, x): np.floor(
            np.clip(own * image + other * one[y : y + 8, x : x + 8], 0, 255) + 1e-3
        )
        for which, one in enumerate(photographs)
        for y in range(one.shape[0] - 8)
        for x in range(one.shape[1] - 8)
    }
    seen = set()
    for ours in found:
        (match,) = [key for key, part in parts.items() if np.max(np.abs(part - ours)) < 1.01]
        seen.add(match)
    assert {which for which, _, _ in seen} == {0, 1}
    assert len(seen) > 25


def test_photographs_are_made_smaller_as_by_opencv_and_must_be_larger_than_the_image():
    small = frosted([PHOTOGRAPH], constants="cifar")
    np.testing.assert_allclose(small.pixels[0], PHOTOGRAPH[2::5, 2::5] / 255, atol=1e-6)
    assert small.sizes.tolist() == [[60, 66]]
    with pytest.raises(UsageError, match="60 x 66 pixels: expected larger"):
        frost(jax.random.key(0), jnp.zeros((60, 60, 3)), 1, photographs=small, constants="cifar")
    with pytest.raises(UsageError, match="one of frost at least"):
        frosted([])
    with pytest.raises(UsageError, match=r"\[h, w, 3\]"):
        frosted([PHOTOGRAPH[:, :, 0]])


def test_snow_bleaches_and_adds_flakes_twice():
    image = np.full((32, 32, 3), [0.2, 0.4, 0.6])
    found = corrupted("snow", image, 1, "cifar", draws=10) / 255
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    bleached = 0.95 * image + 0.05 * np.maximum(image, 1.5 * grey + 0.5)
    flakes = found - np.floor(255 * bleached + 1e-3) / 255
    assert flakes.min() >= -1e-6
    assert np.median(flakes) <= 1 / 255 + 1e-6  # few flakes: a normal number beyond 2.5 deviations
    assert flakes.max() > 0.05
    # Both layers together look the same upside down, to a level, where nothing was clipped.
    turned = flakes[:, ::-1, ::-1]
    assert np.max(np.abs(flakes - turned)) < 0.01


# Digital


def test_contrast_keeps_the_means_and_scales_the_rest():
    image = soft()
    for severity, share in ((1, 0.4), (5, 0.05)):
        found = corrupted("contrast", unit(image), severity)[0]
        means = image.mean(axis=(0, 1))
        near(found, np.floor(means + share * (image - means) + 1e-3))


def test_smoothing_is_that_of_scipy_wherever_it_reaches():
    values = np.random.default_rng(0).normal(size=(13, 13))
    for sigma, truncate in ((0.05, 4.0), (0.7, 4.0), (2.3, 3.0), (20.0, 3.0)):
        for ours, theirs in (("edge", "nearest"), ("symmetric", "reflect")):
            (matrix,) = gaussians(13, [sigma], truncate=truncate, mode=ours)
            expected = ndimage.gaussian_filter(values, sigma, truncate=truncate, mode=theirs)
            np.testing.assert_allclose(matrix @ values @ matrix.T, expected, atol=1e-5)


def test_the_affine_map_takes_corners_where_it_should():
    y, x = np.mgrid[:30, :30].astype(np.float32)
    ramps = np.stack([x, y], axis=-1)
    corners = np.float32([[2.0, -1.0], [0.0, 3.0], [-2.0, 1.0]])
    tilt = jax.jit(tilted)
    found = np.asarray(tilt(ramps, corners))
    middle, half = 15, 10
    for (sx, sy), (dx, dy) in zip(((1, 1), (1, -1), (-1, -1)), corners.tolist(), strict=True):
        was = middle + half * sx, middle + half * sy
        np.testing.assert_allclose(found[int(was[1] + dy), int(was[0] + dx)], was, atol=1e-4)
    np.testing.assert_allclose(tilt(ramps, np.zeros((3, 2), np.float32)), ramps, atol=1e-4)


def test_displacements_are_those_of_scipy():
    draw = np.random.default_rng(3)
    image, moves = draw.uniform(size=(17, 15, 3)), draw.normal(0, 6, (2, 17, 15))
    y, x = np.mgrid[:17, :15]
    theirs = [
        ndimage.map_coordinates(
            image[..., c], [y + moves[0], x + moves[1]], order=1, mode="reflect"
        )
        for c in range(3)
    ]
    ours = jax.jit(displaced)(image.astype(np.float32), moves.astype(np.float32))
    np.testing.assert_allclose(ours, np.stack(theirs, axis=-1), atol=1e-5)


@pytest.mark.parametrize("constants", SETS)
def test_pixels_are_those_of_pillow(constants):
    shares = {"imagenet": (0.6, 0.5, 0.4, 0.3, 0.25), "cifar": (0.95, 0.9, 0.85, 0.75, 0.65)}
    image = soft(37)[:32]
    for severity, share in zip(SEVERITIES, shares[constants], strict=True):
        small = pillow.fromarray(image).resize((int(37 * share), int(32 * share)), pillow.BOX)
        theirs = np.asarray(small.resize((37, 32), pillow.BOX)).astype(int)
        near(corrupted("pixelate", unit(image), severity, constants)[0], theirs, share=0.01)


@pytest.mark.parametrize("constants", SETS)
def test_jpeg_is_that_of_pillow(constants):
    image = soft()
    qualities = {"imagenet": (25, 18, 15, 10, 7), "cifar": (80, 65, 58, 50, 40)}
    for severity, quality in zip(SEVERITIES, qualities[constants], strict=True):
        file = io.BytesIO()
        pillow.fromarray(image).save(file, "JPEG", quality=quality)
        theirs = np.asarray(pillow.open(file)).astype(int)
        ours = corrupted("jpeg_compression", unit(image), severity, constants)[0]
        near(ours, theirs, share=0.002)


# The public implementation: imagecorruptions 1.1.2, which has the constants of ImageNet-C.


@pytest.fixture(scope="module")
def public():
    """Its module, made to run beside today's NumPy, SciPy and scikit-image."""
    spec = importlib.util.find_spec("imagecorruptions")
    needed = ("cv2", "skimage")
    if spec is None or any(importlib.util.find_spec(name) is None for name in needed):
        pytest.skip("imagecorruptions, OpenCV and scikit-image are not installed")
    import skimage.filters

    folder = Path(spec.submodule_search_locations[0])
    packages = types.ModuleType("pkg_resources")
    packages.resource_filename = lambda _, name: str(folder / name)
    interpolation = types.ModuleType("scipy.ndimage.interpolation")
    interpolation.map_coordinates = ndimage.map_coordinates

    def gaussian(image, sigma, multichannel=False, **more):
        axis = -1 if multichannel else None
        return skimage.filters.gaussian(image, sigma, channel_axis=axis, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pkg_resources", packages)
        patch.setitem(sys.modules, "scipy.ndimage.interpolation", interpolation)
        patch.setattr(np, "float_", np.float64, raising=False)
        module = importlib.import_module("imagecorruptions.corruptions")
        patch.setattr(module, "gaussian", gaussian)
        np.random.seed(0)  # noqa: NPY002 (the package draws from it)
        yield module


@pytest.fixture(scope="module")
def photographs(shared_data):
    files = sorted((shared_data / "imagenet_samples" / "in1k_224").glob("*.webp"))[::97][:3]
    if not files:
        pytest.skip("no imagenet_samples beside this checkout")
    return [np.asarray(pillow.open(file).convert("RGB"))[64:160, 64:160] for file in files]


def theirs_of(public, name, image, severity):
    return np.uint8(getattr(public, name)(pillow.fromarray(image), severity)).astype(float)


# Never more than a level apart, and rarely that: the package cuts values that its arithmetic left a
# hair below a whole level.
@pytest.mark.parametrize("name", DRAWS_NOTHING)
def test_what_draws_nothing_is_what_the_public_one_makes(public, photographs, name):
    for image in photographs:
        for severity in SEVERITIES:
            ours = corrupted(name, unit(image), severity)[0]
            distance = np.abs(ours - theirs_of(public, name, image, severity))
            if name == "zoom_blur":  # which is not centred there, so up to a pixel beside
                distance = distance[2:-2, 2:-2]
            assert np.mean(distance) <= 0.05
            assert np.max(distance) <= 1.01


def test_motion_at_one_angle_is_what_the_public_one_makes(public, photographs, monkeypatch):
    for image in photographs:
        reaches = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
        for severity, (radius, sigma) in zip(SEVERITIES, reaches, strict=True):
            for angle in (-33.0, 0.0, 17.0):
                monkeypatch.setattr(np.random, "uniform", lambda low, high, a=angle: a)
                theirs = theirs_of(public, "motion_blur", image, severity)
                ours = moved(255 * unit(image), angle, radius, sigma, reach=40)
                # Cut there, and rounded by ImageMagick: here neither.
                assert np.min(ours - theirs) > -1e-3
                assert np.max(ours - theirs) < 1 + 1e-3


# Statistics of an image: its mean, its deviation, its distance from what it was, and the logarithm
# of the energy of its high frequencies. At most four and a half standard errors apart, which chance
# passes once in 900 runs of all 160 comparisons, and what is known to differ: a level where
# ImageMagick rounds and NumPy cuts, and photographs of frost, which the package enlarges.
@pytest.mark.parametrize(
    "name, draws", [("gaussian_noise", 40), ("shot_noise", 40), ("impulse_noise", 40),
                    ("glass_blur", 12), ("motion_blur", 150), ("snow", 100), ("frost", 150),
                    ("fog", 150)]
)  # fmt: skip
def test_what_is_drawn_is_distributed_as_the_public_one(public, photographs, name, draws):
    image = photographs[1][16:80, 16:80]
    ice = None
    if name == "frost":
        files = sorted(Path(public.__file__).parent.glob("frost/*"))[:5]
        ice = frosted([np.asarray(pillow.open(file).convert("RGB")) for file in files])

    def statistics(found):
        found = np.asarray(found, np.float32)
        energy = jax.vmap(partial(band_energy, above=0.25))(found / 255)
        axes = (1, 2, 3)
        parts = [np.mean(found, axis=axes), np.std(found, axis=axes),
                 np.mean(np.abs(found - image), axis=axes), 10 * np.log10(energy)]  # fmt: skip
        return np.stack(parts, axis=1)

    known = np.array([1.0, 0.5, 0.5, 0.05])
    known[3] = 1.0 if name == "frost" else known[3]
    for severity in SEVERITIES:
        ours = statistics(corrupted(name, unit(image), severity, draws=draws, photographs=ice))
        theirs = statistics(
            np.stack([theirs_of(public, name, image, severity) for _ in range(draws)])
        )
        error = np.sqrt((np.var(ours, axis=0) + np.var(theirs, axis=0)) / draws)
        apart = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
        assert np.all(apart <= 4.5 * error + known), (apart, error)


def test_elastic_transform_is_what_opencv_and_scipy_make_of_the_same_draws(public, photographs):
    # The package leaves out the affine map and has constants of its own, so by its libraries alone.
    import cv2

    draw = np.random.default_rng(0)
    image = photographs[0].astype(np.float32) / 255
    side = len(image)
    centre, half = side // 2, side // 3
    before = np.float32([[centre + half] * 2, [centre + half, centre - half], [centre - half] * 2])
    for reach in (2.0, 15.0):
        corners = draw.uniform(-reach, reach, (3, 2)).astype(np.float32)
        matrix = cv2.getAffineTransform(before, before + corners)
        theirs = cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
        ours = jax.jit(tilted)(jnp.asarray(image), jnp.asarray(corners))
        distance = np.abs(np.asarray(ours) - theirs)
        # OpenCV interpolates at 32nds of a pixel.
        assert np.mean(distance) < 0.002
        assert np.max(distance) < 0.05
