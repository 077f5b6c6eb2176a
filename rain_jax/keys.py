"""Typed keys among other leaves, and what they are made of."""

import inspect
from functools import partial
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
    """Makes this process compile Threefry for CPUs without JAX's loop over rounds; same bits.

    JAX keeps the rounds of its usual generator in a loop of five turns there. Written out in a loop
    of one turn they compile sooner and run faster, and so do attacks (docs/cpu.md has the numbers).
    With no loop at all they would be computed again wherever their bits are used. JAX has no public
    switch for this: a version whose inner parts are others is left as it is, and this returns
    False.
    """
    try:
        from jax._src.interpreters import mlir
        from jax._src.random import threefry2x32 as threefry

        rounds = partial(threefry._threefry2x32_lowering, use_rolled_loops=False)
        inspect.signature(threefry._threefry2x32_lowering).bind(0, 0, 0, 0, use_rolled_loops=False)

        def lowering(key1: jax.Array, key2: jax.Array, x1: jax.Array, x2: jax.Array) -> Any:
            shape = jnp.broadcast_shapes(key1.shape, x1.shape)

            def turn(_: jax.Array, words: Any) -> Any:
                return [jnp.broadcast_to(word, shape) for word in rounds(key1, key2, x1, x2)]

            # XLA would do without a loop of which it knows that it has one turn.
            once = jax.lax.optimization_barrier(jnp.int32(1))
            return jax.lax.fori_loop(0, once, turn, [jnp.zeros(shape, jnp.uint32)] * 2)

        rule = mlir.lower_fun(lowering, multiple_results=True)
        mlir.register_lowering(threefry.threefry2x32_p, rule, platform="cpu")
    except (ImportError, AttributeError, TypeError):
        return False
    return True
