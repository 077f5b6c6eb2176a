"""Training a super-resolution network: what is halved, what is compared, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.checks import UsageError
from rain_jax.methods.upscaling import DOWN, psnr, random_crop, random_turn, upscaling
from rain_jax.models import upscalers
from rain_jax.types import Batch, Upscaler


def batch_of(image, valid=None):
    size = len(image)
    index = jnp.arange(size, dtype=jnp.int32)
    valid = jnp.ones(size, bool) if valid is None else valid
    return Batch(image, jnp.zeros(size, jnp.int32), 100 + index, valid)


NEAREST = Upscaler(
    lambda key, image: {"params": {}},
    lambda variables, image: jnp.repeat(jnp.repeat(image, 2, 0), 2, 1),
    2,
)


def test_the_loss_is_the_mean_absolute_difference_of_valid_images(key):
    """Columns 0 and 1 in turn: whatever is picked, half of the pixels are off by one."""
    stripes = np.broadcast_to(np.float32(np.arange(8) % 2).reshape(1, 8, 1), (6, 8, 3))
    flat = np.full((6, 8, 3), 0.3, np.float32)
    batch = batch_of(
        jnp.asarray(np.stack([stripes, flat, stripes])), jnp.array([True, True, False])
    )
    loss, (state, metrics) = jax.jit(upscaling(NEAREST))({}, {"kept": 1}, key, batch)
    np.testing.assert_allclose(loss, 0.5, atol=1e-6)
    assert state == {"kept": 1}
    assert metrics == {}


def test_odd_images_are_made_even_and_keys_come_from_the_place(key):
    image = jnp.asarray(np.random.default_rng(0).random((2, 7, 5, 3), np.float32))
    objective = jax.jit(upscaling(NEAREST))
    whole = objective({}, {}, key, batch_of(image))[0]
    alone = objective({}, {}, key, batch_of(image)._replace(valid=jnp.array([True, False])))[0]
    one = batch_of(image[1:])._replace(index=jnp.array([101], jnp.int32))
    np.testing.assert_allclose(whole - alone, objective({}, {}, key, one)[0], atol=1e-6)


@pytest.mark.parametrize("down", DOWN)
def test_halves_are_half_as_large_and_within_range(down, key):
    checks = np.float32(np.random.default_rng(0).random((8, 6, 3)) > 0.5)
    halve = jax.jit(DOWN[down])
    small = np.asarray(halve(key, checks))
    assert small.shape == (4, 3, 3)
    assert np.min(small) >= 0.0
    assert np.max(small) <= 1.0
    grey = np.full((8, 6, 3), 0.3, np.float32)
    np.testing.assert_allclose(halve(key, grey), np.full((4, 3, 3), 0.3), atol=1e-6)


def test_every_crop_occurs_and_is_a_part_of_the_image():
    image = np.arange(5 * 4, dtype=np.float32).reshape(5, 4, 1)
    keys = jax.random.split(jax.random.key(0), 300)
    crop = jax.jit(jax.vmap(lambda key: random_crop(key, jnp.asarray(image), size=3)))
    crops = np.asarray(crop(keys))
    corners = crops[:, 0, 0, 0].astype(int)
    assert set(corners) == {4 * top + left for top in range(3) for left in range(2)}
    for crop, corner in zip(crops, corners, strict=True):
        top, left = divmod(corner, 4)
        np.testing.assert_array_equal(crop, image[top : top + 3, left : left + 3])


def test_every_quarter_turn_occurs_and_nothing_else():
    image = np.arange(3 * 3 * 2, dtype=np.float32).reshape(3, 3, 2)
    keys = jax.random.split(jax.random.key(0), 200)
    turned = np.asarray(jax.jit(jax.vmap(lambda key: random_turn(key, jnp.asarray(image))))(keys))
    expected = [np.rot90(image, times) for times in range(4)]
    found = [[i for i, one in enumerate(expected) if np.array_equal(one, t)] for t in turned]
    assert all(len(which) == 1 for which in found)
    assert np.bincount([which[0] for which in found], minlength=4).min() > 25


def test_a_quarter_of_the_turned_images_stand_as_they_were():
    corner = np.zeros((8, 8, 3), np.float32)
    corner[0, 0] = 1.0
    batch = batch_of(jnp.asarray(corner)[None])
    fixed = Upscaler(lambda key, image: {"params": {}}, lambda variables, half: corner, 2)

    def stood(**settings):
        objective = upscaling(fixed, flip=False, **settings)
        keys = jax.random.split(jax.random.key(0), 200)
        losses = jax.jit(jax.vmap(lambda key: objective({}, {}, key, batch)[0]))(keys)
        return np.mean(np.asarray(losses) < 1e-6)

    assert stood() == 1.0
    assert 0.15 < stood(turn=True) < 0.35


def test_every_turn_occurs_mirrored_and_not():
    """Draws of their own: the eight ways to lay a square, each as often."""
    image, aim = np.random.default_rng(1).random((2, 4, 4, 1), np.float32)
    batch = batch_of(jnp.asarray(image)[None])
    fixed = Upscaler(lambda key, image: {"params": {}}, lambda variables, half: aim, 2)
    objective = upscaling(fixed, turn=True)
    keys = jax.random.split(jax.random.key(0), 400)
    losses = jax.jit(jax.vmap(lambda key: objective({}, {}, key, batch)[0]))(keys)
    lain = [np.rot90(side, times) for side in (image, image[:, ::-1]) for times in range(4)]
    expected = np.array([np.mean(np.abs(one - aim)) for one in lain])
    found = np.argmin(np.abs(np.asarray(losses)[:, None] - expected), axis=1)
    np.testing.assert_allclose(losses, expected[found], atol=1e-6)
    assert np.bincount(found, minlength=8).min() > 25


def test_psnr_by_hand():
    image, decibels = np.full((4, 4, 3), 0.5, np.float32), jax.jit(psnr)
    np.testing.assert_allclose(decibels(image + np.float32(0.1), image), 20.0, atol=1e-3)
    clipped = decibels(image + np.float32(7.0), image)
    np.testing.assert_allclose(clipped, 10 * np.log10(4), atol=1e-4)
    np.testing.assert_allclose(decibels(image, image), 100.0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(down="bilinear"), "down='bilinear'"),
        (dict(crop=7), "crop=7: expected an even number"),
        (dict(crop=0), "crop=0"),
        (dict(crop=8), r"crop=8: .* \(images are 6x8\)"),
        (dict(turn=True), "turn=True: expected a square, got 6x8: set crop"),
    ],
)
def test_bad_settings_are_refused(settings, message, key):
    with pytest.raises(UsageError, match=message):
        upscaling(NEAREST, **settings)({}, {}, key, batch_of(jnp.zeros((1, 6, 8, 3))))


def test_an_upscaler_of_another_factor_is_refused():
    with pytest.raises(UsageError, match="an upscaler by 3"):
        upscaling(upscalers.bicubic(factor=3))
