"""RayS: the nearest image along rays of signs, from decisions alone (arXiv:2006.12792)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.attacks.nearest import Nearest, nearer, none_yet, score, within_threat
from rain_jax.checks import whole
from rain_jax.norms import expect, linf
from rain_jax.remembered import remembered
from rain_jax.types import Array, Image, Iteration, Key, LogitsFn, Scalar, Target, Threat

# The authors end a bisection here, at a length along the ray measured in L2.
_TOLERANCE = 1e-3


class Ray(NamedTuple):
    """Where one image's search stands."""

    key: Key  # for the model's randomness, one fold for each query
    clean: Image
    target: Target
    image: Image  # what the next step asks about
    signs: Image  # of the shortest ray known
    reach: Scalar  # its length up to the boundary, in L-inf; infinite while no ray has met one
    level: Scalar  # int32, how often the image was halved for the block whose signs are flipped,
    start: Scalar  # int32, and where that begins
    near: Scalar  # the flipped ray meets the boundary between these lengths;
    far: Scalar  # infinite while it is not known to break the model within `reach`
    done: Scalar  # int32, queries
    asked: Scalar  # int32, those until an image was within the radius
    nearest: Nearest


@remembered
def rays(threat: Threat, *, queries: int = 10000) -> Iteration:
    """RayS, in L-inf: a direction for each value, up or down, in which a boundary is near.

    The signs of ever smaller blocks are flipped; where the flipped ray breaks the model at the best
    length so far, its own length is found by bisection. Each step is one query, of which the
    predicted class alone is used. Nothing is drawn at random, and the radius, which may be
    infinite, does not change the search: it ends the count of queries.

    Raises `UsageError` for another norm.
    """
    whole("queries", queries, 1)
    expect(threat, "RayS", linf)

    def block_sizes(image: Image) -> list[int]:
        """At each level, down to single values."""
        return [-(-image.size >> level) for level in range(1 + (image.size - 1).bit_length())]

    def flipped(signs: Image, level: Scalar, start: Scalar) -> Image:
        height, width, channels = signs.shape
        # The authors cut their blocks from images whose channels come first.
        place = jnp.arange(signs.size).reshape(channels, height, width).transpose(1, 2, 0)
        size = jnp.array(block_sizes(signs))[level]
        return jnp.where((place >= start) & (place < start + size), -signs, signs)

    def at(clean: Image, ray: Image, length: Array) -> Image:
        return jnp.clip(clean + length * ray, threat.low, threat.high)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Ray:
        signs, zero, infinite = jnp.ones_like(image), jnp.int32(0), jnp.float32(jnp.inf)
        return Ray(
            key, image, target, at(image, -signs, infinite), signs, reach=infinite,
            level=zero, start=zero, near=jnp.float32(0.0), far=infinite,
            done=zero, asked=zero, nearest=none_yet(image),
        )  # fmt: skip

    def step(logits_fn: LogitsFn, state: Ray) -> Ray:
        key = jax.random.fold_in(state.key, state.done)
        broken = jnp.argmax(logits_fn(key, state.image)) != state.target
        nearest = nearer(threat, state.clean, state.nearest, state.image, broken)

        # --- the answer: the first about a ray is at the best length so far, others bisect
        bisecting = jnp.isfinite(state.far)
        length = jnp.where(bisecting, (state.near + state.far) / 2, state.reach)
        near = jnp.where(bisecting & ~broken, length, state.near)
        # Beyond the width of the pixel bounds every length is the same.
        far = jnp.where(broken, jnp.minimum(length, threat.high - threat.low), state.far)
        tolerance = _TOLERANCE / math.sqrt(state.image.size)
        on = jnp.isfinite(far) & (far - near > tolerance)

        # --- a ray that is done with is kept where it is shorter, and the next block's turn comes
        ray = flipped(state.signs, state.level, state.start)
        shorter = ~on & (far < state.reach)
        signs = jnp.where(shorter, ray, state.signs)
        reach = jnp.where(shorter, far, state.reach)
        sizes = jnp.array(block_sizes(state.image))
        end = state.start + sizes[state.level]
        last = end >= state.image.size
        finer = jnp.minimum(state.level + last, len(sizes) - 1)
        level = jnp.where(on, state.level, finer)
        start = jnp.where(on, state.start, jnp.where(last, 0, end))

        # --- the next question
        next_length = jnp.where(on, (near + far) / 2, reach)
        found = jnp.isfinite(state.nearest.distance) & (state.nearest.distance <= threat.radius)
        return state._replace(
            image=at(state.clean, flipped(signs, level, start), next_length),
            signs=signs,
            reach=reach,
            level=level,
            start=start,
            near=jnp.where(on, near, 0.0),
            far=jnp.where(on, far, jnp.inf),
            done=state.done + 1,
            asked=state.asked + ~found,
            nearest=nearest,
        )

    def best(logits_fn: LogitsFn, state: Ray) -> tuple[Image, Scalar]:
        image = within_threat(threat, state.clean, state.nearest, state.image)
        # What the search knows and nothing else: margins are for those who see more than decisions,
        # and a look at the pulled image would be a query that nobody counts.
        return image, score(threat, state.nearest, -state.nearest.distance)

    return Iteration(
        init, step, best, queries, lambda state: state.asked,
        uses="label", norms=(linf,), minimum_norm=True,
    )  # fmt: skip
