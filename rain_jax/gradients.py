"""Gradient estimators (see `types.Estimator`) and straight-through functions (BPDA)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rain_jax.checks import within
from rain_jax.types import Estimator, Image, Key, PyTree, Scalar

__all__ = ["eot", "exact"]


def exact() -> Estimator:
    """One draw of the function and its own gradient: right for models without randomness."""
    return lambda function: jax.value_and_grad(function, argnums=1, has_aux=True)


def eot(draws: int = 20) -> Estimator:
    """Expectation over transformation (Athalye et al., arXiv:1707.07397): means over `draws` keys.

    Value, gradient and what comes with them are means over the same draws, so what is judged on
    them is the mean and never the last draw. The draws run side by side: memory grows with them.
    """
    within("draws", draws, 1)

    def estimator(function: Callable[[Key, Image], tuple[Scalar, PyTree]]) -> Any:
        one = jax.value_and_grad(function, argnums=1, has_aux=True)

        def mean(key: Key, image: Image) -> tuple[tuple[Scalar, PyTree], Image]:
            everything = jax.vmap(one, (0, None))(jax.random.split(key, draws), image)
            return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), everything)

        return mean

    return estimator


def straight_through(
    function: Callable[..., Any], surrogate: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """`function` forwards, the gradient of `surrogate` backwards (BPDA, arXiv:1802.00420).

    Both take the same arguments and return one array of the same shape; without `surrogate` the
    gradient is the identity's on the last argument, which then has the result's shape.
    """

    def apply(*arguments: Any) -> Any:
        smooth = arguments[-1] if surrogate is None else surrogate(*arguments)
        hard = jax.lax.stop_gradient(function(*arguments))
        # Added as an exact zero, so that the value is the function's own to the last bit.
        return hard + (smooth - jax.lax.stop_gradient(smooth))

    return apply
