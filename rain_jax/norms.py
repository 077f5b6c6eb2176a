"""L-inf, L2 and L1 as `Norm` values, and what a `Threat` made of one allows.

A perturbation is [H, W, C]. Projections take the pixel bounds along, as bounds on the perturbation
(`low - image`, `high - image`): projecting onto the ball and clipping afterwards gives the nearest
point for L-inf alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rain_jax.types import Array, Image, Key, Norm, Scalar, Threat

__all__ = ["l1", "l2", "linf"]

# Halvings of the interval that holds the multiplier: float32 has 24 bits, the rest is margin.
_BISECTIONS = 32


def _smallest(shrink: Any, measure: Any, radius: Scalar, reach: Scalar) -> Array:
    """The least `shrink(multiplier)` in [0, reach] that measures at most `radius`, by bisection."""

    def halve(_: int, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        low, high = ends
        middle = (low + high) / 2
        fits = measure(shrink(middle)) <= radius
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    # The upper end always fits, so rounding can only land inside the ball.
    _, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(reach), reach))
    inside = measure(shrink(jnp.zeros_like(reach))) <= radius
    return jnp.where(inside, shrink(jnp.zeros_like(reach)), shrink(high))


def _linf_measure(perturbation: Array) -> Scalar:
    return jnp.max(jnp.abs(perturbation))


def _linf_project(
    perturbation: Array, radius: Any, low: Any = -jnp.inf, high: Any = jnp.inf
) -> Array:
    return jnp.clip(jnp.clip(perturbation, -radius, radius), low, high)


def _linf_sample(key: Key, shape: tuple[int, ...], radius: Any) -> Array:
    return radius * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


linf = Norm(_linf_measure, _linf_project, _linf_sample, jnp.sign)


def _l2_measure(perturbation: Array) -> Scalar:
    return optax.safe_norm(perturbation, 0.0)


def _l2_project(
    perturbation: Array, radius: Any, low: Any = -jnp.inf, high: Any = jnp.inf
) -> Array:
    """Clips `perturbation / (1 + m)` for the least m >= 0 within the radius.

    Those are the optimality conditions of the nearest point in ball and box, where the box holds
    zero. Without bounds it is the usual rescaling, done directly.
    """
    size = _l2_measure(perturbation)
    scaled = perturbation * jnp.minimum(1.0, radius / jnp.maximum(size, 1e-12))
    if isinstance(low, float) and isinstance(high, float) and low == -jnp.inf and high == jnp.inf:
        return scaled
    # The scaling factor itself is what is bisected: in (0, 1], larger is nearer. The rescaled
    # point, clipped, is inside, so the answer's factor lies between its factor and 1.
    floor = jnp.minimum(1.0, radius / jnp.maximum(size, 1e-12))
    return _smallest(
        lambda shrunk: jnp.clip(perturbation * (1.0 - shrunk), low, high),
        _l2_measure,
        radius,
        1.0 - floor,
    )


def _l2_sample(key: Key, shape: tuple[int, ...], radius: Any) -> Array:
    direction_key, length_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, shape)
    # The volume within r grows as r^d: the d-th root of a uniform draw spreads points evenly.
    length = jax.random.uniform(length_key) ** (1.0 / direction.size)
    return radius * length * _l2_steepest(direction)


def _l2_steepest(gradient: Array) -> Array:
    # Scaled by the largest entry first: squares of tiny gradients would underflow to zero.
    largest = jnp.max(jnp.abs(gradient))
    scaled = gradient / jnp.where(largest > 0, largest, 1.0)
    square = jnp.sum(scaled**2)
    return scaled * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


l2 = Norm(_l2_measure, _l2_project, _l2_sample, _l2_steepest)


def _l1_measure(perturbation: Array) -> Scalar:
    return jnp.sum(jnp.abs(perturbation))


def _l1_project(
    perturbation: Array, radius: Any, low: Any = -jnp.inf, high: Any = jnp.inf
) -> Array:
    """Soft-thresholds, then clips, with the least threshold within the radius.

    The nearest point in L1 ball and box together (Croce & Hein, arXiv:2103.01208); projecting onto
    one after the other lands elsewhere and costs L1 attacks much of their strength.
    """
    size = jnp.abs(perturbation)
    return _smallest(
        lambda cut: jnp.clip(jnp.sign(perturbation) * jnp.maximum(size - cut, 0.0), low, high),
        _l1_measure,
        radius,
        jnp.max(size),
    )


def _l1_sample(key: Key, shape: tuple[int, ...], radius: Any) -> Array:
    sign_key, length_key = jax.random.split(key)
    sign = jax.random.rademacher(sign_key, shape, jnp.float32)
    # d exponentials over the sum of d + 1 are uniform in the simplex and its inside.
    lengths = jax.random.exponential(length_key, (sign.size + 1,))
    return radius * sign * (lengths[:-1] / jnp.sum(lengths)).reshape(shape)


def _l1_steepest(gradient: Array) -> Array:
    flat = gradient.ravel()
    place = jnp.argmax(jnp.abs(flat))
    return jnp.zeros_like(flat).at[place].set(jnp.sign(flat[place])).reshape(gradient.shape)


l1 = Norm(_l1_measure, _l1_project, _l1_sample, _l1_steepest)


def steepest(norm: Norm) -> optax.GradientTransformation:
    """Turns a gradient into the step of size 1 in `norm` that climbs fastest, for `optax.chain`."""
    return optax.stateless(lambda updates, _: jax.tree.map(norm.steepest, updates))


def project(threat: Threat, image: Image, candidate: Image) -> Image:
    """The allowed image nearest to `candidate`; `image` is the clean one, within the bounds.

    Exactly within the pixel bounds; within the radius up to float32's rounding of the sum.
    """
    change = threat.norm.project(
        candidate - image, threat.radius, threat.low - image, threat.high - image
    )
    return jnp.clip(image + change, threat.low, threat.high)


def random_start(threat: Threat, key: Key, image: Image) -> Image:
    """An allowed image drawn around `image`: uniform in the ball, then within the pixel bounds."""
    return project(threat, image, image + threat.norm.sample(key, image.shape, threat.radius))


def allowed(threat: Threat, image: Image, candidate: Image, tolerance: float = 1e-5) -> Array:
    """Whether `candidate` keeps to the threat, bool []; not-a-number is never allowed.

    `tolerance` is in pixel values for each pixel that the norm adds up: float32 images cannot
    keep a radius exactly.
    """
    size = threat.norm.measure(candidate - image)
    slack = tolerance * threat.norm.measure(jnp.ones_like(image))
    bounded = jnp.all(
        (candidate >= threat.low - tolerance) & (candidate <= threat.high + tolerance)
    )
    return bounded & (size <= threat.radius + jnp.minimum(slack, 1e-3 * threat.radius + 1e-6))
