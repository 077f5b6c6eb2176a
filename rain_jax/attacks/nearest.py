"""What attacks share that look for the nearest image of another class, whatever the radius.

They take a `Threat` as all do. At a finite radius the answer keeps to it; with `radius=inf` it is
the nearest misclassified image in the pixel bounds, so that its distance, measured by the judge,
says from which radius on this image is lost: one run gives the whole curve of accuracy against
radius.
"""

from typing import NamedTuple

import jax.numpy as jnp

from rain_jax.norms import project
from rain_jax.types import Array, Image, Scalar, Threat


class Nearest(NamedTuple):
    """The nearest misclassified image so far; at distance infinity while there is none."""

    image: Image
    distance: Scalar


def none_yet(image: Image) -> Nearest:
    """Where a search begins."""
    return Nearest(image, jnp.float32(jnp.inf))


def nearer(
    threat: Threat, clean: Image, nearest: Nearest, candidate: Image, broken: Array
) -> Nearest:
    """`nearest`, or `candidate` where it is `broken` (misclassified) and nearer to `clean`."""
    distance = threat.norm.measure(candidate - clean)
    better = broken & (distance < nearest.distance)
    return Nearest(
        jnp.where(better, candidate, nearest.image),
        jnp.where(better, distance, nearest.distance),
    )


def within_threat(threat: Threat, clean: Image, nearest: Nearest, last: Image) -> Image:
    """What a search returns: its nearest image, or the allowed one closest to what it has.

    Where nothing was found that is `last`, pulled into the threat.
    """
    found = jnp.isfinite(nearest.distance)
    pulled = project(threat, clean, jnp.where(found, nearest.image, last))
    # An image on the decision boundary must not be moved by the rounding of a projection.
    return jnp.where(_inside(threat, nearest), nearest.image, pulled)


def score(threat: Threat, nearest: Nearest, margin: Scalar) -> Scalar:
    """The score of what `within_threat` returns, given its margin: 1 / distance where broken.

    So of several runs the nearest is kept, and an image is broken where the score is positive.
    """
    # One that was pulled in and is broken all the same lies at the radius.
    near = 1.0 / jnp.maximum(jnp.minimum(nearest.distance, threat.radius), 1e-12)
    return jnp.where(_inside(threat, nearest) | (margin > 0), near, margin)


def known(threat: Threat, nearest: Nearest) -> tuple[Image, Scalar]:
    """What a search has found within the radius so far, and its score: negative for nothing."""
    return nearest.image, score(threat, nearest, jnp.float32(-1.0))


def _inside(threat: Threat, nearest: Nearest) -> Array:
    """Whether something was found within the radius, which may be infinite."""
    return jnp.isfinite(nearest.distance) & (nearest.distance <= threat.radius)
