"""Circular shifts lose nothing, and random ones reach every place equally often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import image as ops
from rain_jax.checks import UsageError

IMAGE = np.random.default_rng(1).uniform(size=(6, 5, 3)).astype(np.float32)


def test_a_shift_moves_down_and_right_and_comes_round():
    moves = (1, 2), (0, 0), (13, -8)
    by_each = jax.jit(lambda image: [ops.shift(image, move) for move in moves])
    moved, still, around = jax.device_get(by_each(IMAGE))
    np.testing.assert_array_equal(moved[1, 2], IMAGE[0, 0])
    np.testing.assert_array_equal(moved[0, 0], IMAGE[5, 3])
    np.testing.assert_array_equal(still, IMAGE)
    np.testing.assert_array_equal(around, moved)


def test_traced_shifts_are_undone_by_the_opposite_ones_and_so_are_gradients():
    moves = np.array([[0, 0], [2, -1], [-7, 3]])
    weight = np.random.default_rng(2).normal(size=IMAGE.shape).astype(np.float32)

    @jax.jit
    def there_and_back(image, weight, moves):
        there = jax.vmap(ops.shift, (None, 0))(image, moves)
        slope = jax.grad(lambda image: jnp.sum(weight * ops.shift(image, moves[1])))(image)
        back = jax.vmap(ops.shift)(there, -moves)
        return there, back, slope, ops.shift(weight, -moves[1])

    there, back, slope, expected = there_and_back(IMAGE, weight, moves)
    for image, (dy, dx) in zip(there, moves, strict=True):
        np.testing.assert_array_equal(image, np.roll(IMAGE, (dy, dx), axis=(0, 1)))
    np.testing.assert_array_equal(back, np.stack([IMAGE] * 3))
    np.testing.assert_array_equal(slope, expected)


def test_random_shifts_are_uniform_over_the_square_ends_included():
    # A single pixel says where it went; 25 places, 200 expected in each.
    spot = np.zeros((9, 9, 1), np.float32)
    spot[4, 4] = 1.0
    keys = jax.random.split(jax.random.key(3), 5000)
    shifted = jax.jit(
        jax.vmap(lambda key, reach: ops.random_shift(key, spot, reach=reach), (0, None))
    )
    counts = np.sum(shifted(keys, 2), axis=0)[:, :, 0]
    assert np.sum(counts[2:7, 2:7]) == 5000
    chi_square = np.sum((counts[2:7, 2:7] - 200) ** 2) / 200
    assert chi_square < 51.2  # 24 degrees of freedom, one in a thousand
    np.testing.assert_array_equal(shifted(keys, 0), np.stack([spot] * 5000))


def test_a_negative_reach_is_refused(key):
    with pytest.raises(UsageError, match="reach"):
        ops.random_shift(key, IMAGE, reach=-1)
