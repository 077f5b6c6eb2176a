"""Augmentation: on the device for images of one size, on the host for what comes in any size."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, one_of, within
from rain_jax.types import Image, Key

PAD_MODES = ("constant", "reflect")
ATTEMPTS = 10  # draws of a crop that may fall outside a long image before the middle is taken


def shifted_crop(image: Image, dy: Any, dx: Any, *, padding: int, pad_mode: str) -> Image:
    """The [H, W, C] window at (dy, dx) of the image padded by `padding` on all four sides.

    `dy` and `dx` are in [0, 2 * padding]; `padding` in the middle is the image itself.
    """
    around = ((padding, padding), (padding, padding), (0, 0))
    return jax.lax.dynamic_slice(jnp.pad(image, around, mode=pad_mode), (dy, dx, 0), image.shape)


def augment(
    key: Key,
    image: Image,
    *,
    crop_padding: int = 0,
    flip: bool = False,
    pad_mode: str = "constant",
) -> Image:
    """Pads, crops at random back to the same size, and mirrors left to right half of the time.

    `image` is one [H, W, C] (batch with `vmap` over keys and images); so is the result, of the
    same type and within the same range. All (2 * crop_padding + 1)^2 crops are equally likely.
    `pad_mode` is "constant" (black, as He et al., arXiv:1512.03385, section 4.2) or "reflect",
    where `crop_padding` must be less than H and W. With neither crop nor flip, the image itself.
    Raises `UsageError` for a negative or fractional padding and for an unknown mode.
    """
    one_of("pad_mode", pad_mode, PAD_MODES)
    if isinstance(crop_padding, bool) or not isinstance(crop_padding, int):
        raise UsageError(f"crop_padding={crop_padding!r}: expected a whole number of pixels")
    within("crop_padding", crop_padding, 0, min(image.shape[:2]) - (pad_mode == "reflect"))
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        dy, dx = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
        image = shifted_crop(image, dy, dx, padding=crop_padding, pad_mode=pad_mode)
    if flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return image


def resize(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Antialiased bicubic resampling of one [H, W, C] image to `size` = (height, width).

    `box` = (left, top, right, bottom), in pixels, restricts it to a part of the image. uint8 stays
    uint8; float32 in [0, 1] stays so, clipped where the bicubic kernel overshoots.
    """
    from PIL import Image as pillow

    height, width = size

    def plane(values: np.ndarray) -> np.ndarray:
        picture = pillow.fromarray(values)
        return np.asarray(picture.resize((width, height), pillow.Resampling.BICUBIC, box))

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return plane(image)
    planes = np.stack([plane(np.ascontiguousarray(p)) for p in np.moveaxis(image, -1, 0)], axis=-1)
    return planes if image.dtype == np.uint8 else np.clip(planes, 0.0, 1.0)


def resize_and_centre(image: np.ndarray, size: int, shorter: int) -> np.ndarray:
    """Scales the shorter side to `shorter` pixels, then keeps the middle [size, size, C]."""
    height, width = image.shape[:2]
    scale = shorter / min(height, width)
    height, width = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    if image.shape[:2] != (height, width):
        image = resize(image, (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def crop_box(
    draw: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part of an image, as Inception's training draws it.

    Its area is uniform in `scale` times the image's, its aspect ratio log-uniform in [3/4, 4/3]
    (Szegedy et al., arXiv:1409.4842, section 6).
    """
    for _ in range(ATTEMPTS):
        area = height * width * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(draw.integers(0, height - h + 1))
            left = int(draw.integers(0, width - w + 1))
            return left, top, left + w, top + h
    # A very long image: its middle, in the nearest shape that is allowed.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    draw: np.random.Generator, image: np.ndarray, size: tuple[int, int], scale: tuple[float, float]
) -> np.ndarray:
    """A random part of one [H, W, C] image, resampled to `size` = (height, width)."""
    return resize(image, size, crop_box(draw, image.shape[0], image.shape[1], scale))
