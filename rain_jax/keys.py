"""Typed keys among other leaves, and what they are made of."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Whether that is a typed key, an array of them, or what stands for one in a trace."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_like(like: Any, numbers: jax.Array) -> jax.Array:
    """The key of these numbers [..., n] (`jax.random.key_data`), of the implementation of `like`.

    That may be a `ShapeDtypeStruct`, to which JAX does not tell the implementation itself.
    """
    known: list[Any] = []
    jax.eval_shape(lambda key: known.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(numbers, impl=known[0])
