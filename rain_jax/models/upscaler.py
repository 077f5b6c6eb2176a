"""Linen modules become `Upscaler`s, and the layers that super-resolution networks share."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from rain_jax.checks import UsageError
from rain_jax.models import layers
from rain_jax.models.conv import gradients_by_lax
from rain_jax.types import Array, Image, Key, Upscaler, Variables

FACTOR = 2  # of all trained networks here: RAIN halves images before it enlarges them

Conv: Callable[..., nn.Conv] = partial(
    layers.Conv,
    padding="SAME",
    use_bias=True,
    # The range that PyTorch begins with and the published networks were trained from, uniform in
    # 1 / sqrt(fan-in). Its biases are drawn, too; here they begin at zero.
    kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
)
"""A loop-safe convolution with bias that keeps the size: `Conv(features, (3, 3))`."""


def upscaler(module: nn.Module) -> Upscaler:
    """Wraps a linen module `module(images [B, h, w, C]) -> [B, 2 h, 2 w, C]`.

    `init(key, image)` looks at the shape of `image` alone and returns `{"params": ...}`;
    `apply(variables, image)` takes one float image [h, w, C] and returns float32. Raises
    `UsageError` for other images, and for variables of another network.
    """

    @jax.jit  # so that the forward pass, which names the shapes, is dead code
    def init(key: Key, image: Image) -> Variables:
        return dict(module.init(key, batch_of_one(image)))

    def images_of(variables: Variables, image: Image) -> Array:
        try:
            return module.apply(variables, batch_of_one(image))  # type: ignore[return-value]
        except (ScopeParamNotFoundError, ScopeParamShapeError) as error:
            raise UsageError(
                f"these variables do not fit {module!r} on an image {list(image.shape)}: expected "
                "those of a network of the same settings and number of channels"
            ) from error

    def apply(variables: Variables, image: Image) -> Image:
        fixed = jax.lax.stop_gradient
        # One pass when compiled, and two ways back: weights learn at the top level of a step, under
        # the `vmap` over its images, and images are climbed in loops.
        with gradients_by_lax():
            learning = images_of(variables, fixed(image))[0]
        climbing = images_of(fixed(variables), image)[0]
        return learning + (climbing - fixed(climbing))

    return Upscaler(init, apply, FACTOR)


def batch_of_one(image: Image) -> Array:
    """[h, w, C] as [1, h, w, C] in float32."""
    if image.ndim != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise UsageError(
            f"the image is {image.dtype} {list(image.shape)}: expected floats in [0, 1], [h, w, C]"
        )
    return image.astype(jnp.float32)[None]


def pixel_shuffle(maps: Array) -> Array:
    """[B, h, w, 4 C] to [B, 2 h, 2 w, C]: channels become the pixels of 2x2 windows.

    Channel 4 c + 2 i + j becomes channel c at row i and column j of its window, as PyTorch lays
    them out, so that its weights mean the same (sub-pixel convolution, arXiv:1609.05158).
    """
    batch, height, width, channels = maps.shape
    maps = maps.reshape(batch, height, width, channels // FACTOR**2, FACTOR, FACTOR)
    maps = jnp.transpose(maps, (0, 1, 4, 2, 5, 3))
    return maps.reshape(batch, FACTOR * height, FACTOR * width, -1)
