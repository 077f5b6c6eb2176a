"""Variables of a network, and keys, by NumPy.

A generator of JAX is compiled for every shape of every kernel. Where a test does not ask what
`init` draws, any weights of the right scale will do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.types import Network, Variables

# What networks begin with, but for kernels, as far as it is the same for all of a name.
_CONSTANT = {"bias": 0, "mean": 0, "scale": 1, "var": 1}


def variables(init: Callable[..., Any], *arguments: Any, seed: int = 0) -> Any:
    """What `init(*arguments)` gives but for the kernels: these are normal, of variance 2 / inputs.

    Biases and means are 0, scales and variances 1. Where there is more, such as tables, `init`
    makes it.
    """
    draw = np.random.default_rng(seed)
    name = lambda path: getattr(path[-1], "key", None)

    @jax.jit  # in which the draws of kernels are dead code
    def rest(*arguments: Any) -> Any:
        left = lambda path, leaf: None if name(path) in (*_CONSTANT, "kernel") else leaf
        return jax.tree.map_with_path(left, init(*arguments))

    def leaf(path: Any, like: Any) -> Any:
        if name(path) == "kernel":
            deviation = math.sqrt(2 / math.prod(like.shape[:-1]))
            return jnp.asarray((deviation * draw.standard_normal(like.shape)).astype(like.dtype))
        constant = _CONSTANT.get(name(path))
        return None if constant is None else jnp.asarray(np.full(like.shape, constant, like.dtype))

    found = jax.tree.map_with_path(leaf, jax.eval_shape(init, *arguments))
    is_none = lambda one: one is None
    if not any(map(is_none, jax.tree.leaves(found, is_leaf=is_none))):
        return found
    either = lambda one, other: other if one is None else one
    return jax.tree.map(either, found, rest(*arguments), is_leaf=is_none)


def of(network: Network, shape: tuple[int, ...], seed: int = 0) -> Variables:
    """Variables of a network for images of a shape [H, W, C], kernels drawn by NumPy."""
    return variables(network.init, jax.random.key(0), np.zeros((1, *shape), np.float32), seed=seed)


def instead(made: Any, seed: int = 0) -> Any:
    """A network or an upscaler whose `init` is `variables`; the key does not matter to it."""
    return made._replace(init=lambda *arguments: variables(made.init, *arguments, seed=seed))


def keys(seed: int, *shape: int) -> jax.Array:
    """Many independent keys of Threefry, for which nothing is compiled."""
    numbers = np.random.default_rng(seed).integers(2**32, size=(*shape, 2), dtype=np.uint32)
    return jax.random.wrap_key_data(numbers)
