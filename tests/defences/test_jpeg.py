"""Compression as a defence: what it does, what levels are, and how it lets itself be attacked."""

import io
from functools import cache, partial

import drawn
import jax
import numpy as np
import pytest
from PIL import Image as Pillow
from scipy import ndimage

from rain_jax.checks import UsageError
from rain_jax.defences.jpeg import feature_distillation, jpeg, nn_jpeg, shield
from rain_jax.defences.tables import Statistics, fd_table
from rain_jax.image import dct, standard_tables
from rain_jax.image import jpeg as coded

KEY = jax.random.key(0)
SMALL = {
    "jpeg": jpeg(),
    "jpeg 4:2:0": jpeg(quality=30, subsampling="420"),
    "nn_jpeg": nn_jpeg(level=45.0),
    "shield": shield(),
    "feature_distillation": feature_distillation(),
}


def smooth(shape: tuple[int, int, int] = (24, 24, 3), seed: int = 1) -> np.ndarray:
    """Something like a photo, away from black and white, in whole 8-bit levels."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(0.3, 0.7, (4, 4, shape[2]))
    image = ndimage.zoom(coarse, (shape[0] / 4, shape[1] / 4, 1), order=3, mode="nearest")
    image += 0.02 * draw.normal(size=shape)
    return (np.round(255 * np.clip(image, 0.2, 0.8)) / 255).astype(np.float32)


def noise(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(3).uniform(size=shape).astype(np.float32)


@cache
def variables_of(name):
    return made(SMALL[name])


def made(defence):
    """Its variables, which hang on no image's size."""
    return jax.device_get(jax.jit(defence.init)(KEY, smooth()))


@partial(jax.jit, static_argnums=0)
def applied(form, variables, key, image):
    return form(variables, key, image)


COTANGENT = np.random.default_rng(5).normal(size=(24, 24, 3)).astype(np.float32)


@cache
def pulled(name):
    """Of every form its value, and what it makes of `COTANGENT`: by one program for two tests."""
    defence = SMALL[name]
    forms = {"own": defence.apply, **defence.surrogates}

    @jax.jit
    def everything(variables, image, cotangent):
        found = {}
        for which, form in forms.items():
            value, pull = jax.vjp(lambda image, f=form: f(variables, KEY, image), image)
            found[which] = value, pull(cotangent)[0]
        return found

    return jax.device_get(everything(variables_of(name), smooth(), COTANGENT))


@partial(jax.jit, static_argnums=2)
def at_quality(image, quality, subsampling):
    return coded(image, *standard_tables(quality), subsampling=subsampling)


def alike(one, other):
    """The same, but for a rounding that falls the other way where a program adds up otherwise."""
    return np.mean(np.abs(np.asarray(one) - np.asarray(other))) < 0.1 / 255


# --- what all of them promise ----------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(24, 24, 3), (13, 21, 3), (9, 8, 1)])
def test_shape_type_and_range_are_kept(name, shape):
    defence = SMALL[name]
    image = noise(shape)
    variables = variables_of(name)
    assert list(variables) == ["tables"]
    like = jax.eval_shape(defence.init, KEY, image)
    assert jax.tree.map(np.shape, like) == jax.tree.map(np.shape, variables)
    found = np.asarray(applied(defence.apply, variables, KEY, image))
    assert found.shape == shape
    assert found.dtype == np.float32
    assert np.min(found) >= 0
    assert np.max(found) <= 1
    assert np.max(np.abs(found - image)) > 0.02


@pytest.mark.parametrize("name", SMALL)
def test_an_image_does_not_feel_its_neighbours(name):
    defence = SMALL[name]
    images = np.stack([smooth(seed=seed) for seed in range(3)])
    keys = jax.random.split(KEY, 3)
    variables = variables_of(name)
    together = jax.jit(jax.vmap(defence.apply, (None, 0, 0)))(variables, keys, images)
    for key, image, found in zip(keys, images, together, strict=True):
        assert alike(applied(defence.apply, variables, key, image), found)


@pytest.mark.parametrize("name", SMALL)
def test_surrogates_have_the_true_value_and_gradients_of_their_own(name):
    found = pulled(name)
    assert set(found) == {"own", *SMALL[name].surrogates}
    slopes = {which: slope for which, (_, slope) in found.items()}
    for which, (value, slope) in found.items():
        assert np.all(np.isfinite(slope))
        assert np.linalg.norm(slope) > 0
        assert alike(value, found["own"][0]) == (which not in ("cubic", "mean"))
    np.testing.assert_array_equal(slopes["identity"], COTANGENT)
    waves = np.fft.fft2(slopes["low_pass"], axes=(0, 1))
    high = np.abs(np.fft.fftfreq(24)) > 0.25
    assert np.max(np.abs(waves[high])) < 1e-3
    assert np.max(np.abs(waves[~high][:, ~high])) > 1
    # Most coefficients are rounded to zero, and pass nothing on.
    assert np.linalg.norm(slopes["survivors"]) < 0.7 * np.linalg.norm(COTANGENT)


@pytest.mark.parametrize("name", SMALL)
def test_its_own_gradient_is_nearly_that_of_cubic_rounding_and_its_value_is_not(name):
    (value, own), (other, cubic) = (pulled(name)[which] for which in ("own", "cubic"))
    assert not alike(value, other)
    least = np.linalg.norm(own - cubic) / np.linalg.norm(COTANGENT)
    assert 0 < least < 0.031
    # Most coefficients are far from where they would be rounded the other way.
    assert 0 < np.linalg.norm(own) < 0.5 * np.linalg.norm(COTANGENT)


def test_only_the_random_one_says_so_and_draws():
    assert [name for name, defence in SMALL.items() if defence.random] == ["shield"]
    for name, defence in SMALL.items():
        one, same, other = (
            np.asarray(applied(defence.apply, variables_of(name), key, smooth()))
            for key in (KEY, KEY, jax.random.key(1))
        )
        np.testing.assert_array_equal(one, same)
        assert np.any(one != other) == (name == "shield")


# --- JPEG ------------------------------------------------------------------------------------


BY_SUBSAMPLING = {subsampling: jpeg(subsampling=subsampling) for subsampling in ("444", "420")}


@pytest.mark.parametrize("quality", [20, 75, 95])
@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_jpeg_is_what_a_file_would_hold(quality, subsampling):
    image = smooth((40, 56, 3))
    file = io.BytesIO()
    pixels = np.round(255 * image).astype(np.uint8)
    Pillow.fromarray(pixels).save(
        file, "JPEG", quality=quality, subsampling={"444": 0, "420": 2}[subsampling]
    )
    expected = np.asarray(Pillow.open(file), np.float32) / 255
    variables = made(jpeg(quality=quality, subsampling=subsampling))
    # The quality is in the variables, so that one program serves all.
    found = np.asarray(applied(BY_SUBSAMPLING[subsampling].apply, variables, KEY, image))
    assert np.mean(np.abs(found - expected)) < 0.8 / 255
    assert np.mean(np.abs(found - expected) < 2.5 / 255) > 0.9


def test_levels_are_data():
    image = smooth()
    compiled = 0

    @jax.jit
    def program(variables):
        nonlocal compiled
        compiled += 1
        return jpeg().apply(variables, KEY, image)

    variables = [made(jpeg(quality=quality)) for quality in (80, 60, 40, 20)]
    variables += [made(nn_jpeg(level=level)) for level in (15.0, 60.0)]
    one_by_one = np.stack([program(each) for each in variables])
    assert compiled == 1
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *variables)
    together = jax.jit(jax.vmap(lambda each: jpeg().apply(each, KEY, image)))(stacked)
    assert alike(together, one_by_one)
    error = np.mean(np.abs(one_by_one - image[None]), axis=(1, 2, 3))
    assert np.all(np.diff(error[:4]) > 0)
    assert error[5] > error[4]


def test_a_traced_quality_is_one_compilation():
    image = smooth()
    found = jax.jit(lambda quality: jpeg(quality=quality).init(KEY, image))(50)
    np.testing.assert_array_equal(found["tables"]["luma"], standard_tables(50)[0])


def test_nn_jpeg_takes_its_tables_from_statistics():
    flat = np.ones((3, 8, 8), np.float32)
    statistics = Statistics(10 * flat, flat, flat)
    for table, steps in (("nn", 40.0), ("deepn", round((255 - 97.5) * 40 / 30))):
        found = made(nn_jpeg(level=40.0, table=table, statistics=statistics))["tables"]
        np.testing.assert_array_equal(found["chroma"], np.full((8, 8), steps))
    found = made(nn_jpeg(level=40.0, statistics=statistics))["tables"]
    np.testing.assert_array_equal(found["luma"], jax.jit(lambda: fd_table(40.0)[0])())


# --- SHIELD ----------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_every_block_comes_from_one_quality(subsampling):
    image = noise((20, 24, 3))
    defence = shield(qualities=(80, 60, 40, 20), subsampling=subsampling)
    found = np.asarray(applied(defence.apply, made(defence), KEY, image))
    each = [np.asarray(at_quality(image, quality, subsampling)) for quality in (80, 60, 40, 20)]
    drawn = set()
    for top in range(0, 20, 8):
        for left in range(0, 24, 8):
            block = np.s_[top : top + 8, left : left + 8]
            off = [np.mean(np.abs(found[block] - one[block])) for one in each]
            assert min(off) < 0.2 / 255
            drawn.add(int(np.argmin(off)))
    assert len(drawn) > 1


def test_blocks_draw_alike_and_apart():
    image = noise((20, 24, 3))  # as above, and four of its blocks
    defence = shield(qualities=(90, 10))
    variables = made(defence)
    keys = drawn.keys(0, 600)
    four = np.s_[..., :16, :16, :]
    draws = np.stack([applied(defence.apply, variables, key, image)[four] for key in keys])
    mean = np.asarray(applied(defence.surrogates["mean"], variables, KEY, image))[four]
    low = np.asarray(at_quality(image, 10, "420"))[four]
    from_low = np.all(np.abs(draws - low) < 0.02, axis=-1)
    blocks = from_low.reshape(600, 2, 8, 2, 8).mean(axis=(2, 4)).reshape(600, 4) > 0.6
    assert np.all(np.abs(blocks.mean(axis=0) - 0.5) < 0.1)
    assert np.max(np.abs(np.corrcoef(blocks.T) - np.eye(4))) < 0.2
    # The closed form of the expectation.
    assert np.mean(np.abs(draws.mean(axis=0) - mean)) < 0.01


def test_one_quality_is_plain_jpeg():
    image = noise((20, 24, 3))
    defence = shield(qualities=(40,))
    found = applied(defence.apply, made(defence), KEY, image)
    assert alike(found, at_quality(image, 40, "420"))


# --- Feature Distillation --------------------------------------------------------------------


def test_feature_distillation_rounds_to_its_steps_and_clips():
    image = smooth()
    defence = SMALL["feature_distillation"]
    variables = variables_of("feature_distillation")
    found = 255 * np.asarray(applied(defence.apply, variables, KEY, image))
    waves = jax.jit(jax.vmap(dct, in_axes=2))
    steps = np.full((8, 8), 30.0)
    steps[:4, :4] = 25.0
    multiples = np.asarray(waves(found)) / steps.reshape(1, 1, 1, 8, 8)
    np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-3)
    # No coefficient moved by more than half a step.
    before = np.asarray(waves(255 * image)) / steps.reshape(1, 1, 1, 8, 8)
    assert np.max(np.abs(before - multiples)) < 0.501
    # Neither level shift nor colour: 8 x 203 = 1624 is nearest to 65 steps of 25, 203.125.
    # Edges are continued: a flat image of any size stays flat.
    flat = np.full((13, 21, 3), 203 / 255, np.float32)
    found = np.asarray(applied(defence.apply, variables, KEY, flat))
    np.testing.assert_allclose(255 * found, 203.125, rtol=1e-5)


def test_feature_distillation_keeps_channels_apart():
    image = smooth()
    defence = SMALL["feature_distillation"]
    variables = variables_of("feature_distillation")
    turned = np.asarray(applied(defence.apply, variables, KEY, image[:, :, ::-1]))
    expected = applied(defence.apply, variables, KEY, image)
    np.testing.assert_array_equal(turned[:, :, ::-1], expected)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: jpeg(quality=0), "quality"),
        (lambda: jpeg(quality=101), "quality"),
        (lambda: jpeg(subsampling="422"), "subsampling"),
        (lambda: nn_jpeg(level=-1.0), "level"),
        (lambda: nn_jpeg(level=120.0, table="std"), "level"),
        (lambda: nn_jpeg(table="nn"), "statistics"),
        (lambda: nn_jpeg(table="dct"), "table"),
        (lambda: nn_jpeg(subsampling="422"), "subsampling"),
        (lambda: shield(qualities=()), "qualities"),
        (lambda: shield(qualities=(50, 0)), "qualities"),
        (lambda: shield(subsampling="422"), "subsampling"),
    ],
)
def test_bad_settings_are_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()
