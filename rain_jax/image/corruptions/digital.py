"""Digital: contrast, elastic distortion, coarse pixels, JPEG."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.image.corruptions.common import (
    Constants,
    Table,
    along_both,
    at,
    between,
    colours,
    gaussians,
    mirrored,
    mirrored_once,
    rounded,
    row,
    stored,
)
from rain_jax.image.jpeg import jpeg, standard_tables
from rain_jax.types import Array, Image, Key

_CONTRAST: Table = {
    "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
    "cifar": (0.75, 0.5, 0.4, 0.3, 0.15),
}
# Strength of the displacement, deviation of its smoothing, reach of the affine map's corners, all
# in pixels: shares of 244 (the authors meant 224, and say so) and of 32.
_ELASTIC: Table = {
    "imagenet": tuple(
        (244 * strength, 244 * smooth, 244 * corner)
        for strength, smooth, corner in (
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        )
    ),
    "cifar": tuple(
        (32 * strength, 32 * smooth, 32 * corner)
        for strength, smooth, corner in (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        )
    ),
}  # fmt: skip
_ELASTIC_TRUNCATE = 3.0
_COARSE: Table = {
    "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
    "cifar": (0.95, 0.9, 0.85, 0.75, 0.65),
}
_QUALITY: Table = {"imagenet": (25, 18, 15, 10, 7), "cifar": (80, 65, 58, 50, 40)}


def contrast(key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet") -> Image:
    """Draws the values of each channel towards their mean. Draws no number."""
    colours(image)
    means = jnp.mean(image, axis=(0, 1), keepdims=True)
    return stored(means + at(_CONTRAST, severity, constants) * (image - means))


def tilted(image: Image, corners: Array) -> Image:
    """The affine map that moves three corners of a square around the middle by `corners` [3, 2].

    Each row is (dx, dy); linear interpolation, mirrored at the last pixels.
    """
    height, width, _ = image.shape
    half = float(min(height, width) // 3)
    centre = jnp.array([width // 2, height // 2], jnp.float32)
    before = jnp.array([[half, half], [half, -half], [-half, -half]])
    after = before + corners
    # From places of the result back to those of the image.
    (a, b), (c, d) = after[1] - after[0], after[2] - after[1]
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    edges = jnp.stack([before[1] - before[0], before[2] - before[1]])
    (xx, yx), (xy, yy) = jnp.matmul(inverse, edges, precision=jax.lax.Precision.HIGHEST)
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    x, y = x - (centre[0] + after[1, 0]), y - (centre[1] + after[1, 1])
    from_x = xx * x + xy * y + (centre[0] + before[1, 0])
    from_y = yx * x + yy * y + (centre[1] + before[1, 1])
    return between(image, from_y, from_x, mirrored_once)


def displaced(image: Image, moves: Array) -> Image:
    """Each pixel from (dy, dx) = `moves` [2, H, W] further on: linear interpolation, mirrored."""
    y, x = jnp.mgrid[: image.shape[0], : image.shape[1]].astype(jnp.float32)
    return between(image, y + moves[0], x + moves[1], mirrored)


def elastic_transform(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """A random affine map, then smooth random displacements."""
    colours(image)
    strength, _, corner = at(_ELASTIC, severity, constants)
    height, width, _ = image.shape
    # All numbers in one call, which compiles faster than two.
    draws = jax.random.uniform(key, (2 * height * width + 6,), minval=-1.0)
    corners = corner * draws[:6].reshape(3, 2)
    noise = draws[6:].reshape(height, width, 2)
    smooths = [smooth for _, smooth, _ in _ELASTIC[constants]]
    rows, columns = (
        row(gaussians(side, smooths, truncate=_ELASTIC_TRUNCATE, mode="symmetric"), severity)
        for side in (height, width)
    )
    moves = jnp.moveaxis(strength * along_both(rows, columns, noise), -1, 0)
    return stored(displaced(tilted(image, corners), moves))


def _boxes(before: int, after: int) -> np.ndarray:
    """Pillow's BOX filter from `before` to `after` pixels, [after, before]: whole pixels only."""
    # In Pillow's order, since it decides ties by the last bit.
    scale = before / after
    width = max(scale, 1.0)
    centre = (np.arange(after)[:, None] + 0.5) * scale
    index = np.arange(before)[None]
    first, last = np.floor(centre - 0.5 * width + 0.5), np.floor(centre + 0.5 * width + 0.5)
    distance = (index - centre + 0.5) * (1.0 / width)
    covered = (index >= first) & (index < last) & (distance > -0.5) & (distance <= 0.5)
    return covered / covered.sum(axis=1, keepdims=True)


def _coarse(side: int, constants: Constants) -> np.ndarray:
    """To fewer pixels and back, [5, side, side]."""
    fewer = [max(int(side * share), 1) for share in _COARSE[constants]]
    return np.stack([_boxes(few, side) @ _boxes(side, few) for few in fewer]).astype(np.float32)


def pixelate(key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet") -> Image:
    """Pillow's BOX filter to fewer pixels and back. Draws nothing."""
    colours(image)
    at(_COARSE, severity, constants)
    rows, columns = (row(_coarse(side, constants), severity) for side in image.shape[:2])
    # Pillow keeps bytes between the two axes. To enlarge is to repeat, which no rounding minds.
    across = rounded(along_both(jnp.eye(image.shape[0]), columns, image))
    return rounded(along_both(rows, jnp.eye(image.shape[1]), across))


def jpeg_compression(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """JPEG as Pillow writes it, chroma halved. Draws nothing; the gradient is none."""
    colours(image)
    tables = standard_tables(at(_QUALITY, severity, constants).astype(jnp.int32))
    return jpeg(image, *tables, subsampling="420")
