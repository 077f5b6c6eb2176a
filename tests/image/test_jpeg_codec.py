"""JPEG against a real encoder and decoder, and the promises about its gradients."""

import io
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as pillow

from rain_jax import image as ops
from rain_jax.checks import UsageError
from rain_jax.image.jpeg import Rounding

QUALITIES = np.array([1, 5, 10, 25, 50, 75, 90, 100])
SHAPE = (43, 37, 3)  # odd, and its last blocks are cut on both sides
# Steps far from symmetric, for luma and chroma.
OWN = np.sort(np.random.default_rng(2).integers(1, 90, (2, 8, 8)), axis=1)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def soft(shape=SHAPE):
    """Slow colours with a sharp edge and a little noise, as photographs have them."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [np.sin(x / 9 + c) + np.cos(y / 7 - c) + (x > y) for c in range(shape[2])]
    image = 110 + 45 * np.stack(waves, axis=-1)
    return np.clip(image + np.random.default_rng(1).normal(0, 4, shape), 0, 255).astype(np.uint8)


def filed(image, **options):
    """Through a file in memory, written and read by Pillow."""
    file = io.BytesIO()
    grey = image.shape[-1] == 1
    pillow.fromarray(image[:, :, 0] if grey else image).save(file, "jpeg", **options)
    return np.asarray(pillow.open(file)).reshape(image.shape).astype(int)


def as_levels(image):
    return np.round(np.asarray(image) * 255).astype(int)


def floats(image):
    return np.asarray(image, np.float32) / 255


def drawn(*shape):
    return np.random.default_rng(4).normal(size=shape).astype(np.float32)


@partial(jax.jit, static_argnames=("subsampling", "rounding"))
def at_quality(image, quality, subsampling="444", rounding="hard"):
    return ops.jpeg(
        image, *ops.standard_tables(quality), subsampling=subsampling, rounding=rounding
    )


@pytest.fixture(scope="module")
def photographs(shared_data):
    files = sorted((shared_data / "imagenet_samples" / "in1k_224").glob("*.webp"))[:2]
    if not files:
        pytest.skip("no imagenet_samples beside this checkout")
    return [np.asarray(pillow.open(file).convert("RGB"))[50:146, 60:156] for file in files]


def agree(ours, theirs):
    """The same values, but for a few that float32 rounded to the other side of a tie."""
    distance = np.abs(ours - theirs)
    assert np.mean(distance) <= 0.01
    assert np.mean(distance > 0) <= 0.002


STANDARD = jax.jit(jax.vmap(ops.standard_tables))


def test_the_tables_are_those_of_pillow_at_every_quality():
    tables = jax.device_get(STANDARD(np.arange(1, 101)))
    for quality in range(1, 101):
        file = io.BytesIO()
        pillow.new("RGB", (8, 8)).save(file, "jpeg", quality=quality)
        for ours, theirs in zip(tables, pillow.open(file).quantization.values(), strict=True):
            np.testing.assert_array_equal(ours[quality - 1].ravel(), theirs)
    for table in tables:
        assert table.dtype == np.float32
        assert np.all(np.diff(table, axis=0) <= 0)
        np.testing.assert_array_equal(table[-1], 1)
        assert float(table.max()) == 255


@pytest.mark.parametrize("image", [noise(), soft()], ids=["noise", "soft"])
@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_the_result_is_what_a_file_holds(image, subsampling):
    coded = jax.vmap(at_quality, (None, 0, None))(floats(image), QUALITIES, subsampling)
    for ours, quality in zip(coded, QUALITIES.tolist(), strict=True):
        theirs = filed(image, quality=quality, subsampling=f"4:{subsampling[1]}:{subsampling[2]}")
        agree(as_levels(ours), theirs)


@partial(jax.jit, static_argnames="subsampling")
def twice_by_each(image, lumas, chromas, subsampling):
    """The image through each pair of tables, and what comes of that by the same pair once more."""
    codec = jax.vmap(partial(ops.jpeg, subsampling=subsampling), (None, 0, 0))
    once = codec(image, lumas, chromas)
    again = jax.vmap(partial(ops.jpeg, subsampling=subsampling))(once, lumas, chromas)
    return once, again


@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_photographs_come_back_as_from_a_file_at_every_quality_and_by_any_table(
    photographs, subsampling
):
    standard = np.stack(STANDARD(np.arange(1, 101)), axis=1)
    steps = np.concatenate([standard, OWN[None], np.swapaxes(OWN, 1, 2)[None]])
    written = [{"quality": quality} for quality in range(1, 101)]
    # No quality beside them: Pillow would scale the tables by it.
    written += [{"qtables": pair.reshape(2, 64).astype(int).tolist()} for pair in steps[100:]]
    for image in photographs:
        found = twice_by_each(floats(image), steps[:, 0], steps[:, 1], subsampling)
        once, again = map(as_levels, found)
        theirs = [
            filed(image, **options, subsampling=f"4:{subsampling[1]}:{subsampling[2]}")
            for options in written
        ]
        # At the lowest qualities of halved chroma too, where other arithmetic shows most.
        for pair in zip(once, theirs, strict=True):
            agree(*pair)
        assert np.all(np.mean(np.abs(again - once), axis=(1, 2, 3)) <= 1)
        # Steps on their side are others, so which way they lie is seen.
        assert np.mean(np.abs(theirs[-1] - once[-2])) > 0.5


def test_grey_images_come_back_as_from_a_file_and_need_no_chroma_table():
    image = noise((43, 37, 1))
    codec = jax.jit(lambda image, q: ops.jpeg(image, ops.standard_tables(q)[0], None))
    for quality in (10, 75):
        agree(as_levels(codec(floats(image), quality)), filed(image, quality=quality))


def test_tables_of_ones_own_are_applied_vertical_frequency_first():
    luma, chroma = OWN
    image = soft((43, 43, 3))  # square, so that on its side it is the same program's
    theirs = filed(
        image, qtables=[luma.ravel().tolist(), chroma.ravel().tolist()], subsampling="4:4:4"
    )
    codec = jax.jit(ops.jpeg)
    coded = codec(floats(image), np.float32(luma), np.float32(chroma))
    agree(as_levels(coded), theirs)
    # An image on its side needs its tables on their side.
    turned = np.swapaxes(floats(image), 0, 1)
    with_turned = codec(turned, np.float32(luma.T), np.float32(chroma.T))
    # (libjpeg's two axes are rounded in turn, so this is not exact.)
    apart = np.abs(np.swapaxes(as_levels(with_turned), 0, 1) - as_levels(coded))
    assert np.mean(apart) < 0.2
    upright = as_levels(codec(turned, np.float32(luma), np.float32(chroma)))
    assert np.mean(np.abs(np.swapaxes(upright, 0, 1) - as_levels(coded))) > 1


def test_blocks_are_transformed_orthonormally_and_back():
    image = drawn(16, 24)
    dct = jax.jit(ops.dct)
    waves = np.asarray(dct(image))
    assert waves.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(jax.jit(ops.idct)(waves), image, atol=1e-5)
    np.testing.assert_allclose(np.sum(waves**2), np.sum(image**2), rtol=1e-5)
    np.testing.assert_allclose(waves[1, 2, 0, 0], 8 * image[8:, 16:].mean(), atol=1e-5)
    # Down the image lies the first frequency.
    wave = np.cos(np.pi * 3 * (2 * np.arange(8).reshape(-1, 1) + 1) / 16) * np.ones((1, 8))
    only = np.array(dct(np.float32(wave))[0, 0])
    np.testing.assert_allclose(only[3, 0], np.sqrt(32), atol=1e-5)
    only[3, 0] = 0.0
    np.testing.assert_allclose(only, 0, atol=1e-5)
    with pytest.raises(UsageError, match="multiples of 8"):
        ops.dct(jnp.zeros((8, 12)))


def test_even_grey_moves_by_a_sixteenth_of_its_step_and_full_quality_by_little():
    for level in (0, 77, 200, 255):
        coded = at_quality(np.full((8, 8, 3), level / 255, np.float32), 10)
        assert np.max(np.abs(as_levels(coded) - level)) <= 80 / 16 + 1
    assert np.max(np.abs(as_levels(at_quality(floats(noise()), 100)) - noise())) <= 5


@pytest.mark.parametrize("subsampling", ["444", "420"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_values_are_8_bit_and_the_same_whatever_the_gradient(subsampling, rounding):
    image = np.random.default_rng(3).uniform(-0.1, 1.1, SHAPE).astype(np.float32)
    coded = np.asarray(at_quality(image, 30, subsampling, rounding))
    assert coded.shape == SHAPE
    assert coded.dtype == np.float32
    assert coded.min() >= 0
    assert coded.max() <= 1
    np.testing.assert_allclose(255 * coded, as_levels(coded), atol=1e-4)
    if rounding != "cubic":
        hard = at_quality(floats(as_levels(np.clip(image, 0, 1))), 30, subsampling)
        np.testing.assert_array_equal(coded, hard)


@partial(jax.jit, static_argnums=(2, 3))
def pull(image, direction, rounding, subsampling):
    codec = lambda image: at_quality(image, 30, subsampling, rounding)
    return jax.vjp(codec, image)[1](direction)[0]


def pulled(image, rounding, subsampling="444"):
    """A random direction, and what comes of it on its way back through the codec."""
    direction = drawn(*image.shape)
    return direction, np.asarray(pull(floats(image), direction, rounding, subsampling))


def test_straight_through_is_the_identity_backwards():
    # Bytes at both ends of their range too: no clip may stop the gradient.
    image = np.where(noise() > 128, 255, noise())
    direction, gradient = pulled(image, "straight_through")
    np.testing.assert_allclose(gradient, direction, atol=3e-3)
    # Halved chroma keeps all of the luma and what is slow in chroma.
    direction, gradient = pulled(image, "straight_through", "420")
    assert 0.5 < np.linalg.norm(gradient) / np.linalg.norm(direction) < 0.9


def test_hard_has_no_gradient_and_slopes_are_weak():
    assert not np.any(pulled(soft(), "hard")[1])
    for subsampling in ("444", "420"):
        for rounding in ("cubic", "sloped"):
            direction, gradient = pulled(soft(), rounding, subsampling)
            assert np.all(np.isfinite(gradient))
            assert 0 < np.linalg.norm(gradient) < 0.5 * np.linalg.norm(direction)


@pytest.mark.parametrize(("rounding", "least"), [("cubic", 0.0), ("sloped", 0.03)])
def test_the_slope_is_three_squares_of_the_distance_to_a_whole_number(rounding, least):
    # At even grey only the mean's coefficient is not 0: 8 * (level - 128) in steps of 64.
    luma = np.full((8, 8), 64.0, np.float32)
    image = np.full((8, 8, 1), 139 / 255, np.float32)
    total = lambda image: jnp.sum(ops.jpeg(image, luma, None, rounding=rounding))
    gradient = jax.jit(jax.grad(total))(image)
    np.testing.assert_allclose(gradient, least + 3 * (8 * 11 / 64 - 1) ** 2, rtol=1e-3)


def test_even_blocks_have_a_gradient_although_all_their_coefficients_are_whole():
    luma = np.full((8, 8), 64.0, np.float32)
    direction = drawn(8, 8, 1)
    codec = lambda image: ops.jpeg(image, luma, None, rounding="sloped")
    gradient = jax.jit(lambda image: jax.vjp(codec, image)[1](direction)[0])
    for level in (0, 128, 248):  # 0, -1024 and 960: whole steps
        found = gradient(np.full((8, 8, 1), level / 255, np.float32))
        np.testing.assert_allclose(found, 0.03 * direction, atol=1e-4)


def test_survivors_let_through_only_coefficients_that_are_not_lost():
    luma = np.full((8, 8), 40.0, np.float32)
    # Coefficients in the middle of their steps, so that 8-bit pixels leave no doubt which survive.
    draw = np.random.default_rng(5)
    waves = 40.0 * draw.integers(-2, 3, (2, 2, 8, 8)) * (draw.random((2, 2, 8, 8)) < 0.15)
    inverse = jax.jit(ops.idct)
    image = (np.asarray(inverse(np.float32(waves))) + 128).reshape(16, 16, 1) / 255
    assert 0 < image.min() < image.max() < 1
    codec = lambda image: ops.jpeg(image, luma, None, rounding="survivors")
    direction = drawn(*image.shape)
    gradient = jax.jit(lambda image, direction: jax.vjp(codec, image)[1](direction)[0])
    kept = np.where(waves != 0, jax.jit(ops.dct)(direction[:, :, 0]), 0.0)
    expected = inverse(kept.astype(np.float32))
    np.testing.assert_allclose(gradient(image, direction)[:, :, 0], expected, atol=3e-3)


@pytest.mark.parametrize("subsampling, step", [("444", 8), ("420", 16)])
def test_whole_blocks_further_on_the_same_comes_out(subsampling, step):
    image = noise((64, 64, 3), seed=7)
    moved = np.roll(image, (step, step), axis=(0, 1))
    here, there = (as_levels(at_quality(floats(x), 30, subsampling)) for x in (image, moved))
    inner = slice(step + 8, 64 - step)  # 8 away from where the image was cut
    np.testing.assert_array_equal(
        there[inner, inner], np.roll(here, (step, step), axis=(0, 1))[inner, inner]
    )


def test_batches_of_images_and_tables_are_loops_and_jit_changes_nothing():
    images = np.stack([floats(noise()), floats(soft())])
    lumas, chromas = jax.device_get(STANDARD(np.array([20, 80])))
    grid = jax.vmap(jax.vmap(ops.jpeg, (None, 0, 0)), (0, None, None))
    batch = jax.jit(grid)(images, lumas, chromas)
    for i in (0, 1):
        for q in (0, 1):
            alone = ops.jpeg(images[i], lumas[q], chromas[q])  # op by op
            agree(as_levels(batch[i, q]), as_levels(alone))


def test_bad_settings_are_refused():
    image, tables = floats(noise((8, 8, 3))), ops.standard_tables(50)
    with pytest.raises(UsageError, match="quality=0"):
        ops.standard_tables(0)
    with pytest.raises(UsageError, match="subsampling"):
        ops.jpeg(image, *tables, subsampling="422")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did you mean 'hard'"):
        ops.jpeg(image, *tables, rounding="hart")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="channels"):
        ops.jpeg(image[:, :, :2], *tables)
    with pytest.raises(UsageError, match="luma"):
        ops.jpeg(image, jnp.zeros((8, 8)), tables[1])
    with pytest.raises(UsageError, match="chroma"):
        ops.jpeg(image, tables[0], jnp.ones((4, 4)))
