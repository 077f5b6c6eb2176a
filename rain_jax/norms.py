"""L-inf, L2 and L1 as `Norm` values, and what a `Threat` made of one allows.

A perturbation is [H, W, C]. Projections take the pixel bounds along, as bounds on the perturbation
(`low - image`, `high - image`): projecting onto the ball and clipping afterwards gives the nearest
point for L-inf alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rain_jax.checks import UsageError
from rain_jax.types import Array, Image, Key, Norm, Scalar, Threat

__all__ = ["l1", "l2", "linf"]

# Halvings of the interval that holds the multiplier: float32 has 24 bits, the rest is margin.
_BISECTIONS = 32
# A multiplier that brings every entry to its bound; an infinite one would make NaN of 0 * inf.
_FARTHEST = float(jnp.finfo(jnp.float32).max)


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


def _rise(slope: Array, level: Any, low: Any, high: Any) -> tuple[Array, Scalar, Array]:
    """`slope` and `level` turned so that the level lies above, and each entry's room that way.

    Both are divided by the largest slope: products of tiny slopes would underflow to zero.
    """
    largest = jnp.max(jnp.abs(slope))
    scale = jnp.where(level < 0, -1.0, 1.0) * jnp.where(largest > 0, largest, 1.0)
    rise = slope / scale
    room = jnp.where(rise > 0, high, jnp.where(rise < 0, -low, 0.0))
    return rise, level / scale, room


def _along(rise: Array, level: Scalar, room: Array, rate: Array) -> Array:
    """`sign(rise) min(multiplier rate, room)` with the multiplier that brings it to `level`.

    What that reaches is concave and piecewise linear in the multiplier: Newton's method from zero
    never passes the root, and ends when a step brings no further entry to its bound. Residual times
    slope falls at least fourfold a step, so that takes a handful of steps and not one per entry.
    """
    steep = jnp.abs(rise)

    def newton(state: tuple[Scalar, Scalar, Scalar]) -> tuple[Scalar, Scalar, Scalar]:
        multiplier, before, _ = state
        free = multiplier * rate < room
        missing = level - jnp.sum(jnp.where(free, 0.0, steep * room))
        pace = jnp.sum(jnp.where(free, steep * rate, 0.0))
        ahead = jnp.where(pace > 0, missing / jnp.where(pace > 0, pace, 1.0), _FARTHEST)
        count = jnp.sum(free)
        # Free entries only ever become fewer: as many as before means the same ones.
        return jnp.maximum(multiplier, ahead), count, count != before

    start = (jnp.zeros_like(level), jnp.int32(-1), jnp.bool_(True))
    multiplier, _, _ = jax.lax.while_loop(lambda state: state[2], newton, start)
    return jnp.where(steep > 0, jnp.sign(rise) * jnp.minimum(multiplier * rate, room), 0.0)


def _linf_measure(perturbation: Array) -> Scalar:
    return jnp.max(jnp.abs(perturbation))


def _linf_project(
    perturbation: Array, radius: Any, low: Any = -jnp.inf, high: Any = jnp.inf
) -> Array:
    return jnp.clip(jnp.clip(perturbation, -radius, radius), low, high)


def _linf_sample(key: Key, shape: tuple[int, ...], radius: Any) -> Array:
    return radius * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _linf_cross(slope: Array, level: Any, low: Any = -jnp.inf, high: Any = jnp.inf) -> Array:
    """The smallest change in [low, high], which holds zero, with <slope, change> = `level`.

    Every norm has one. A negative level lies the other way. Where the bounds do not let it be
    reached, or the slope is zero, it is the change that comes nearest: a corner, or none.
    """
    rise, level, room = _rise(slope, level, low, high)
    return _along(rise, level, room, jnp.ones_like(rise))


linf = Norm(math.inf, _linf_measure, _linf_project, _linf_sample, jnp.sign, _linf_cross)


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


def _l2_cross(slope: Array, level: Any, low: Any = -jnp.inf, high: Any = jnp.inf) -> Array:
    rise, level, room = _rise(slope, level, low, high)
    return _along(rise, level, room, jnp.abs(rise))


l2 = Norm(2.0, _l2_measure, _l2_project, _l2_sample, _l2_steepest, _l2_cross)


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


def _l1_cross(slope: Array, level: Any, low: Any = -jnp.inf, high: Any = jnp.inf) -> Array:
    """A knapsack: the steepest entries go all their way, the last one as far as still needed."""
    rise, level, room = (jnp.ravel(part) for part in _rise(slope, level, low, high))
    steep = jnp.abs(rise)
    order = jnp.argsort(-steep)
    steep, gains = steep[order], (steep * room)[order]
    before = jnp.concatenate([jnp.zeros(1), jnp.cumsum(gains)[:-1]])
    moves = jnp.clip((level - before) / jnp.where(steep > 0, steep, 1.0), 0.0, room[order])
    change = jnp.sign(rise) * jnp.zeros_like(rise).at[order].set(moves)
    return change.reshape(slope.shape)


l1 = Norm(1.0, _l1_measure, _l1_project, _l1_sample, _l1_steepest, _l1_cross)


def steepest(norm: Norm) -> optax.GradientTransformation:
    """Turns a gradient into the step of size 1 in `norm` that climbs fastest, for `optax.chain`."""
    return optax.stateless(lambda updates, _: jax.tree.map(norm.steepest, updates))


def expect(threat: Threat, who: str, *known: Norm) -> None:
    """Raises a `UsageError` unless the threat's norm is one of those that `who` is defined for."""
    if not any(threat.norm is norm for norm in known):
        told = " or ".join(name_of(norm) for norm in known)
        raise UsageError(f"norm={name_of(threat.norm)}: {who} expects {told}")


def name_of(norm: Norm) -> str:
    """`linf`, `l2`, `l1`, or by its order for another one."""
    own = next((name for name in __all__ if globals()[name] is norm), None)
    return f"l{norm.order:g}" if own is None else own


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
