"""EDSR, the super-resolution network that RAIN enlarges with (Lim et al., arXiv:1707.02921)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rain_jax.checks import UsageError, within
from rain_jax.models import layers
from rain_jax.models.layers import Dtype, PerChannel
from rain_jax.models.upscaler import FACTOR, Conv, pixel_shuffle, upscaler
from rain_jax.types import Array, Upscaler

# The mean colour of the DIV2K photographs that the published networks were trained on.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
LEVELS = 255.0  # inside, pixels are in [0, 255], and the weights are of that size


def edsr(
    *,
    blocks: int = 16,
    width: int = 64,
    residual_scale: float = 1.0,
    mean: PerChannel = DIV2K_MEAN,
    dtype: Dtype = "float32",
) -> Upscaler:
    """EDSR for a factor of 2: residual blocks without batch normalisation at the low resolution.

    With its defaults the authors' baseline, 1,369,859 weights for colour images; their large one
    is `blocks=32, width=256, residual_scale=0.1`. The computation is that of their PyTorch code
    (sanghyun-son/EDSR-PyTorch), 255 x - 255 mean inside and back, so that published weights mean
    the same (see `imports.edsr_from_torch`). `mean` is one number or one for each channel, in
    units of pixel values in [0, 1]: with all weights zero, it is the colour of the result. `dtype`
    is what all but the last layer computes in; weights, and what comes out, are float32.
    """
    layers.count("blocks", blocks)
    layers.count("width", width)
    within("residual_scale", residual_scale, above=0.0)
    within("mean", mean, 0.0, 1.0)
    return upscaler(_EDSR(blocks, width, residual_scale, mean, layers.compute_dtype(dtype)))


class _EDSR(nn.Module):
    blocks: int
    width: int
    residual_scale: float
    mean: PerChannel
    dtype: Any

    @nn.compact
    def __call__(self, images: Array) -> Array:
        conv = partial(Conv, kernel_size=(3, 3), dtype=self.dtype)
        channels = images.shape[-1]
        mean = jnp.asarray(self.mean, jnp.float32).reshape(-1)
        if mean.size not in (1, channels):
            raise UsageError(
                f"mean has {mean.size} values: expected one, or one for each of the {channels} "
                "channels of the image"
            )
        mean = LEVELS * mean.reshape(1, 1, 1, -1)
        head = conv(self.width, name="head")(LEVELS * images - mean)
        maps = head
        for number in range(self.blocks):
            maps = _Block(self.width, self.residual_scale, conv, name=f"block_{number}")(maps)
        maps = head + conv(self.width, name="body")(maps)
        maps = pixel_shuffle(conv(FACTOR**2 * self.width, name="enlarge")(maps))
        colours = Conv(channels, (3, 3), name="tail")(maps.astype(jnp.float32))
        return (colours + mean) / LEVELS


class _Block(nn.Module):
    width: int
    residual_scale: float
    conv: Callable[..., nn.Conv]

    @nn.compact
    def __call__(self, maps: Array) -> Array:
        change = jax.nn.relu(self.conv(self.width, name="first")(maps))
        change = self.conv(self.width, name="second")(change)
        return maps + self.residual_scale * change
