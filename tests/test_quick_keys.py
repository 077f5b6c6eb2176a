"""The tests' own generator draws evenly, and differently for each key."""

import jax
import numpy as np
import quick_keys


def test_splitting_is_folding_in():
    key = quick_keys.key(5)
    split = jax.random.key_data(jax.random.split(key, 7))
    folded = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(7)]
    np.testing.assert_array_equal(split, folded)


def test_draws_are_even_and_unlike_those_of_other_keys():
    """Of neighbouring seeds, split keys and folded ones, 256 x 256 draws in all."""

    @jax.jit
    def draw(seeds):
        def of(seed):
            split = jax.random.split(quick_keys.key(seed), 8)
            both = [*split, *(jax.random.fold_in(key, 1) for key in split)]
            return jax.numpy.stack([jax.random.bits(key, (256,)) for key in both])

        return jax.vmap(of)(seeds)

    bits = np.asarray(draw(np.arange(16))).reshape(256, 256)
    assert len(np.unique(bits)) > bits.size - 10  # as many differ as do by chance
    each = np.unpackbits(bits.view(np.uint8).reshape(256, 256, 4), axis=2) * 2.0 - 1
    # Every bit, and every pair of keys and of places, is as often equal as not.
    assert np.abs(each.mean((0, 1))).max() < 5 / 256
    alike = np.einsum("kpb,lpb->kl", each, each) / each[0].size
    assert np.abs(alike - np.eye(256)).max() < 6 / np.sqrt(each[0].size)
    beside = np.einsum("kpb,kqb->pq", each, each) / each[:, 0].size
    assert np.abs(beside - np.eye(256)).max() < 6 / np.sqrt(each[:, 0].size)
    shares = np.histogram(bits / 2**32, 64, (0, 1))[0] / bits.size * 64
    assert np.abs(shares - 1).max() < 5 / np.sqrt(bits.size / 64)
