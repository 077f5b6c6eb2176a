"""Mixing two images and their labels: mixup and CutMix."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from rain_jax.parallel import image_keys
from rain_jax.types import Array, Batch, Key, Scalar

Mix = Literal["none", "mixup", "cutmix"]

# Folded into a step's key. No image has this index, so that mixing shares no draw with an attack.
_MIXING = 2**30


def mixed(
    key: Key, batch: Batch, targets: Array, *, kind: Literal["mixup", "cutmix"], alpha: Any
) -> tuple[Batch, Array]:
    """Every valid image with another one of this device, and their `targets` [B, K] alike.

    One share lambda ~ Beta(alpha, alpha) for the whole batch, on all devices. "mixup" is
    lambda x + (1 - lambda) x' (Zhang et al., arXiv:1710.09412). "cutmix" puts a rectangle of x' in
    its place on x (Yun et al., arXiv:1905.04899): sides of sqrt(1 - lambda) of the image's around a
    uniform centre, cut off at its border; lambda is then the area that is left of x. The partners
    are a permutation of the valid images, by which one may meet itself. `label` becomes that of the
    larger share.
    """
    share_key, order_key, box_key = jax.random.split(jax.random.fold_in(key, _MIXING), 3)
    share = jax.random.beta(share_key, alpha, alpha)
    draws = jax.vmap(jax.random.uniform)(image_keys(order_key, batch.index))
    # The valid ones come first in the order, and each takes the place of its rank among them.
    order = jnp.argsort(jnp.where(batch.valid, draws, jnp.inf))
    partner = jnp.where(
        batch.valid, order[jnp.cumsum(batch.valid) - 1], jnp.arange(len(batch.valid))
    )
    if kind == "mixup":
        image = share * batch.image + (1 - share) * batch.image[partner]
    else:
        inside = _box(box_key, batch.image.shape[1:3], share)
        image = jnp.where(inside[None, :, :, None], batch.image[partner], batch.image)
        share = 1 - jnp.mean(inside)
    label = jnp.where(share >= 0.5, batch.label, batch.label[partner])
    return (
        batch._replace(image=image, label=label),
        share * targets + (1 - share) * targets[partner],
    )


def _box(key: Key, shape: tuple[int, ...], share: Scalar) -> Array:
    """A rectangle of the area 1 - `share` before its cut, bool [H, W]."""
    size = jnp.array(shape)
    half = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (2,), 0, size)
    low, high = centre - half, centre + half
    rows, columns = (
        (jnp.arange(n) >= low[i]) & (jnp.arange(n) < high[i]) for i, n in enumerate(shape)
    )
    return rows[:, None] & columns[None, :]
