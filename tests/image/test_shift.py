"""Circular shifts lose nothing, and random ones reach every place equally often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import image as ops
from rain_jax.checks import UsageError

IMAGE = jax.random.uniform(jax.random.key(1), (6, 5, 3))


def test_a_shift_moves_down_and_right_and_comes_round():
    moved = ops.shift(IMAGE, (1, 2))
    np.testing.assert_array_equal(moved[1, 2], IMAGE[0, 0])
    np.testing.assert_array_equal(moved[0, 0], IMAGE[5, 3])
    np.testing.assert_array_equal(ops.shift(IMAGE, (0, 0)), IMAGE)
    np.testing.assert_array_equal(ops.shift(IMAGE, (13, -8)), moved)


def test_traced_shifts_are_undone_by_the_opposite_ones_and_so_are_gradients():
    moves = jnp.array([[0, 0], [2, -1], [-7, 3]])
    there = jax.jit(jax.vmap(ops.shift, (None, 0)))(IMAGE, moves)
    back = jax.vmap(ops.shift)(there, -moves)
    np.testing.assert_array_equal(back, jnp.stack([IMAGE] * 3))
    weight = jax.random.normal(jax.random.key(2), IMAGE.shape)
    slope = jax.grad(lambda image: jnp.sum(weight * ops.shift(image, moves[1])))(IMAGE)
    np.testing.assert_array_equal(slope, ops.shift(weight, -moves[1]))


def test_random_shifts_are_uniform_over_the_square_ends_included():
    # A single pixel says where it went; 25 places, 200 expected in each.
    spot = jnp.zeros((9, 9, 1)).at[4, 4].set(1.0)
    keys = jax.random.split(jax.random.key(3), 5000)
    shifted = jax.jit(
        jax.vmap(lambda key, reach: ops.random_shift(key, spot, reach=reach), (0, None))
    )
    counts = jnp.sum(shifted(keys, 2), axis=0)[:, :, 0]
    assert float(jnp.sum(counts[2:7, 2:7])) == 5000
    chi_square = float(jnp.sum((counts[2:7, 2:7] - 200) ** 2) / 200)
    assert chi_square < 51.2  # 24 degrees of freedom, one in a thousand
    np.testing.assert_array_equal(shifted(keys[:3], 0), jnp.stack([spot] * 3))


def test_a_negative_reach_is_refused(key):
    with pytest.raises(UsageError, match="reach"):
        ops.random_shift(key, IMAGE, reach=-1)
