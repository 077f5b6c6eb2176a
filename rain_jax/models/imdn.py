"""IMDN, a small super-resolution network (Hui et al., arXiv:1909.11856)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rain_jax.checks import UsageError
from rain_jax.models import layers
from rain_jax.models.upscaler import FACTOR, Conv, pixel_shuffle, upscaler
from rain_jax.types import Array, Upscaler

SLOPE = 0.05  # of the leaky ReLU below zero
SHARE = 4  # each step of a block keeps one channel of four and refines the others
REDUCTION = 16  # of the attention's hidden layer


def imdn(*, blocks: int = 6, width: int = 64) -> Upscaler:
    """IMDN for a factor of 2: blocks that set channels aside step by step, then weigh them.

    With its defaults the authors' network, 694,404 weights for colour images, which come and go in
    [0, 1]; published weights are read by `imports.imdn_from_torch`. Its attention averages over
    the image, so what it does to one pixel depends on all. `width` is a multiple of 16.
    """
    layers.count("blocks", blocks)
    layers.count("width", width)
    if width % REDUCTION:
        raise UsageError(f"width={width}: expected a multiple of {REDUCTION}")
    return upscaler(_IMDN(blocks, width))


class _IMDN(nn.Module):
    blocks: int
    width: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        head = Conv(self.width, (3, 3), name="head")(images)
        found = [head]
        for number in range(self.blocks):
            found.append(_Block(self.width, name=f"block_{number}")(found[-1]))
        maps = _leaky(Conv(self.width, (1, 1), name="gather")(jnp.concatenate(found[1:], -1)))
        maps = head + Conv(self.width, (3, 3), name="body")(maps)
        return pixel_shuffle(Conv(FACTOR**2 * images.shape[-1], (3, 3), name="enlarge")(maps))


class _Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, maps: Array) -> Array:
        kept, rest = [], maps
        aside = self.width // SHARE
        for step in ("step_1", "step_2", "step_3"):
            rest = _leaky(Conv(self.width, (3, 3), name=step)(rest))
            kept.append(rest[..., :aside])
            rest = rest[..., aside:]
        kept.append(Conv(aside, (3, 3), name="step_4")(rest))
        found = jnp.concatenate(kept, -1)
        weight = jax.nn.relu(Conv(self.width // REDUCTION, (1, 1), name="squeeze")(_look(found)))
        weight = jax.nn.sigmoid(Conv(self.width, (1, 1), name="excite")(weight))
        return maps + Conv(self.width, (1, 1), name="gather")(found * weight)


def _leaky(maps: Array) -> Array:
    return jax.nn.leaky_relu(maps, SLOPE)


def _look(maps: Array) -> Array:
    """Standard deviation + mean of each channel over the image, [B, 1, 1, C]."""
    variance = jnp.var(maps, axis=(1, 2), keepdims=True)
    varies = variance > 0  # the root's slope at 0 is infinite
    deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)
    return deviation + jnp.mean(maps, axis=(1, 2), keepdims=True)
