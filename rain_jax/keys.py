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


def unroll_threefry() -> bool:
    """Has this process compile Threefry, JAX's usual generator, for CPUs without a loop.

    The bits are the same. JAX keeps the rounds in a loop where it compiles for CPUs. Written out,
    as it does for other platforms, they are one kernel in place of about ten: it compiles in a
    third of their time, and runs several times as fast (docs/cpu.md). JAX has no public switch for
    it, so a version that keeps its rules elsewhere is left as it is; then this returns False.
    """
    try:
        from jax._src.interpreters import mlir
        from jax._src.random import threefry2x32 as threefry

        mlir.register_lowering(
            threefry.threefry2x32_p, threefry._threefry2x32_lowering_rule, platform="cpu"
        )
    except (ImportError, AttributeError):
        return False
    return True
