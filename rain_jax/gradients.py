"""Gradient estimators (see `types.Estimator`) and straight-through functions (BPDA)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rain_jax.checks import whole, within
from rain_jax.remembered import remembered
from rain_jax.types import Array, Estimator, Image, Key, PyTree, Scalar

__all__ = ["eot", "exact", "nes", "spsa"]


def usable(estimator: Estimator | None) -> Estimator:
    """`estimator`, or `exact()` for None, whose gradients are 0 where they are not finite.

    A model whose gradient is not a number at some pixels is attacked along the others, and one
    without any finite gradient is not moved: that an attack finds nothing then is no evidence that
    the model is robust.
    """
    estimate = exact() if estimator is None else estimator
    if not isinstance(estimate, Estimator):
        estimate = Estimator(estimate)  # a plain function, which declares nothing

    def finite_of(function: Callable[[Key, Image], tuple[Scalar, PyTree]]) -> Any:
        inner = estimate(function)

        def outer(key: Key, image: Image) -> tuple[tuple[Scalar, PyTree], Image]:
            values, gradient = inner(key, image)
            return values, jnp.where(jnp.isfinite(gradient), gradient, 0.0)

        return outer

    return estimate._replace(of=finite_of)


def last_finite(moved: Array, before: Array) -> Array:
    """`moved`, or `before` where any of its entries is not finite: what an attack steps to."""
    return jnp.where(jnp.all(jnp.isfinite(moved)), moved, before)


@remembered
def exact() -> Estimator:
    """One draw of the function and its own gradient: right for models without randomness."""
    return Estimator(lambda function: jax.value_and_grad(function, argnums=1, has_aux=True))


@remembered
def eot(draws: int = 20) -> Estimator:
    """Expectation over transformation (Athalye et al., arXiv:1707.07397): means over `draws` keys.

    Value, gradient and what comes with them are means over the same draws, so what is judged on
    them is the mean and never the last draw. The draws run side by side: memory grows with them.
    """
    whole("draws", draws, 1)

    def estimator(function: Callable[[Key, Image], tuple[Scalar, PyTree]]) -> Any:
        one = jax.value_and_grad(function, argnums=1, has_aux=True)

        def mean(key: Key, image: Image) -> tuple[tuple[Scalar, PyTree], Image]:
            everything = jax.vmap(one, (0, None))(jax.random.split(key, draws), image)
            return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), everything)

        return mean

    return Estimator(estimator, draws=draws)


@remembered
def nes(draws: int = 25, scale: float = 0.001, answers: int = 1) -> Estimator:
    """Slopes along Gaussian directions (NES; Ilyas et al., arXiv:1804.08598): no backward pass.

    Each of `draws` directions is tried both ways, `scale` times its length in pixel values. What
    is told about the image, value and aux, comes from the image itself, as the mean of `answers`:
    more than one for random models, whose every answer is another draw. So 2 x `draws` + `answers`
    queries, side by side; as in the authors' code they may lie a little outside the pixel bounds.
    """
    return _both_ways(jax.random.normal, draws, scale, answers)


@remembered
def spsa(draws: int = 128, scale: float = 0.01, answers: int = 1) -> Estimator:
    """As `nes`, along directions of random signs (SPSA; Uesato et al., arXiv:1802.05666)."""
    return _both_ways(jax.random.rademacher, draws, scale, answers)


def _both_ways(sample: Callable[..., Array], draws: int, scale: float, answers: int) -> Estimator:
    """The mean of direction x slope, whose expectation is the gradient of a linear function."""
    whole("draws", draws, 1)
    within("scale", scale, above=0.0)
    within("answers", answers, 1)

    def estimator(function: Callable[[Key, Image], tuple[Scalar, PyTree]]) -> Any:
        def along(direction_key: Key, query_key: Key, image: Image) -> Image:
            direction = sample(direction_key, image.shape, jnp.float32)
            # A key for each query: nobody outside makes a random model repeat its draws.
            values, _ = jax.vmap(lambda key, side: function(key, image + side * direction))(
                jax.random.split(query_key), jnp.array([scale, -scale])
            )
            return direction * (values[0] - values[1]) / (2 * scale)

        def estimate(key: Key, image: Image) -> tuple[tuple[Scalar, PyTree], Image]:
            direction_key, query_key, answer_key = jax.random.split(key, 3)
            told = jax.vmap(function, (0, None))(jax.random.split(answer_key, answers), image)
            steps = jax.vmap(along, (0, 0, None))(
                jax.random.split(direction_key, draws), jax.random.split(query_key, draws), image
            )
            return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (told, steps))

        return estimate

    return Estimator(estimator, draws=answers, uses="logits")


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
