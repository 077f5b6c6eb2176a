"""Variables of a network by NumPy.

A generator of JAX takes a second or more to compile for every shape of every kernel. Where a test
does not ask what `init` draws, any weights of the right scale will do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def variables(init: Callable[..., Any], *arguments: Any, seed: int = 0) -> Any:
    """What `init(*arguments)` gives but for the draws: kernels are normal, of variance 1 / inputs.

    Biases and means are 0, scales and variances 1, as they are at first.
    """
    draw = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        if len(like.shape) > 1:
            deviation = 1 / math.sqrt(math.prod(like.shape[:-1]))
            return (deviation * draw.normal(size=like.shape)).astype(like.dtype)
        return np.full(like.shape, path[-1].key in ("scale", "var"), like.dtype)

    return jax.tree.map_with_path(leaf, jax.eval_shape(init, *arguments))


def instead(made: Any, seed: int = 0) -> Any:
    """A network or an upscaler whose `init` draws like that; the key does not matter to it."""
    return made._replace(init=lambda *arguments: variables(made.init, *arguments, seed=seed))
