"""The super-resolution networks, by name. A new one is one file and one line here.

Each is a maker, `maker(*, ...) -> Upscaler`, whose arguments are plain values that a config can
hold. They are no classifiers, so they have a registry of their own beside that of the package.
"""

import jax

from rain_jax.models.edsr import edsr
from rain_jax.models.imdn import imdn
from rain_jax.models.layers import count
from rain_jax.models.upscaler import batch_of_one
from rain_jax.types import Image, Key, Upscaler, Variables

__all__ = ["bicubic", "edsr", "imdn"]


def bicubic(*, factor: int = 2) -> Upscaler:
    """Interpolation by Keys' cubic (a = -0.5) in place of a network: what one has to beat.

    It has no variables. Beyond the edge the weights of the pixels that are there are scaled up,
    as in Pillow.
    """
    count("factor", factor)

    def init(key: Key, image: Image) -> Variables:
        return {}

    def apply(variables: Variables, image: Image) -> Image:
        image = batch_of_one(image)[0]
        height, width, channels = image.shape
        return jax.image.resize(image, (factor * height, factor * width, channels), "cubic")

    return Upscaler(init, apply, factor)
