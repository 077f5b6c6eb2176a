"""Keys of a small generator. Threefry's rounds are most of what compiling an attack takes.

`key(seed)` takes the place of `jax.random.key(seed)` where a test does not ask which numbers are
drawn: compilers write out all of Threefry wherever a key is split, for every shape by itself.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl


def _mix(bits: jax.Array) -> jax.Array:
    """A permutation of 32 bits in which each bit moves half of the others (`lowbias32`)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def _words(key: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words for each number."""
    once = _mix(numbers + key[0])
    return _mix(once + key[1]), _mix((once ^ jnp.uint32(0x9E3779B9)) + key[1])


def _count(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _seed(seed: jax.Array) -> jax.Array:
    return jnp.stack([_mix(jnp.uint32(seed)), jnp.uint32(seed)])


def _fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    return jnp.stack(_words(key, jnp.uint32(number)))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # As Threefry does it: split(key, n)[i] is fold_in(key, i).
    return jnp.stack(_words(key, _count(shape)), axis=-1)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    assert width <= 32, "no test draws 64 bits"
    return _words(key, _count(shape))[0].astype(f"uint{width}")


QUICK = define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_bits, fold_in=_fold_in,
    name="quick", tag="quick",
)  # fmt: skip


def key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl=QUICK)


def keys(seed: int, *shape: int) -> jax.Array:
    """Many independent ones, for which nothing is compiled."""
    numbers = np.random.default_rng(seed).integers(2**32, size=(*shape, 2), dtype=np.uint32)
    return jax.random.wrap_key_data(numbers, impl=QUICK)
