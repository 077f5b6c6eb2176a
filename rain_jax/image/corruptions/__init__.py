"""The 15 common corruptions of Hendrycks & Dietterich (arXiv:1903.12261), for one image.

`FAMILIES[name](key, image, severity, constants=...)` takes [H, W, C] in [0, 1] of 3 channels, or 1,
to the same, in whole multiples of 1/255 as the published files hold them; `severity` is a whole
number from 1 to 5 and may be traced, so that one program serves all of them. `constants` are those
of ImageNet-C, made for 224 x 224 pixels, or those of CIFAR-10-C, for 32 x 32
(hendrycks/robustness, make_imagenet_c.py and make_cifar_c.py); they are pixels and not shares, so
other sizes feel them otherwise. `frost` needs photographs as well.

Reproduced from the authors' scripts, slips included, but for other random numbers. What differs:
ImageNet-C was saved as JPEG of quality 85, which is left to the caller; OpenCV's affine map
interpolates at 32nds of a pixel, ours where it should; sums are float32. `UsageError` is raised for
other severities, constants and shapes. Gradients go straight through the last rounding.
"""

from collections.abc import Callable

from rain_jax.image.corruptions.blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from rain_jax.image.corruptions.common import SEVERITIES, Constants
from rain_jax.image.corruptions.digital import (
    contrast,
    elastic_transform,
    jpeg_compression,
    pixelate,
)
from rain_jax.image.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from rain_jax.image.corruptions.weather import Frost, brightness, fog, frost, frosted, snow
from rain_jax.types import Image

Corruption = Callable[..., Image]

# In the order of the paper's tables.
FAMILIES: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}

__all__ = [
    "FAMILIES",
    "SEVERITIES",
    "Constants",
    "Corruption",
    "Frost",
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "frosted",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "shot_noise",
    "snow",
    "zoom_blur",
]
