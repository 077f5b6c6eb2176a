"""Training a super-resolution network: halve a photograph, enlarge it, compare."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of, within
from rain_jax.data import augment
from rain_jax.image import random_pick, to_even
from rain_jax.parallel import image_keys
from rain_jax.types import (
    AxisName,
    Batch,
    Image,
    Key,
    Metrics,
    ModelState,
    Objective,
    Params,
    Scalar,
    Upscaler,
)

Down = Literal["random_pick", "bicubic"]


def _bicubic(key: Key, image: Image) -> Image:
    height, width, channels = image.shape
    # With a filter against aliasing, as Pillow does and benchmarks of super-resolution mean it.
    small = jax.image.resize(image, (height // 2, width // 2, channels), "cubic", antialias=True)
    return jnp.clip(small, 0.0, 1.0)


DOWN: dict[str, Callable[[Key, Image], Image]] = {"random_pick": random_pick, "bicubic": _bicubic}
"""How an image [H, W, C] of even sides becomes [H/2, W/2, C] within [0, 1]."""


def upscaling(
    upscaler: Upscaler,
    *,
    down: Down = "random_pick",
    crop: int | None = None,
    flip: bool = True,
    turn: bool = False,
) -> Objective:
    """The mean absolute difference between an image and its enlarged half (Lim et al., 1707.02921).

    `down="random_pick"` is RAIN's own halving (arXiv:2004.14798), another draw in every step, so
    that the network learns to undo what it will be given there; "bicubic" is what published
    networks were trained on. Each image is cut to a random square of `crop` pixels, an even number
    (None: taken whole, its sides made even), and mirrored left to right half of the time by `flip`.
    With `turn` it is turned by a random multiple of 90 degrees as well, as EDSR's authors do, which
    takes squares. There are no labels in it. Raises `UsageError` for a crop that is odd or larger
    than the images, and for an upscaler of another factor than 2.
    """
    one_of("down", down, DOWN)
    if upscaler.factor != 2:
        raise UsageError(f"an upscaler by {upscaler.factor}: expected one by 2, to undo {down}")
    if crop is not None and within("crop", crop, 2) % 2:
        raise UsageError(f"crop={crop}: expected an even number of pixels")

    def loss(params: Params, model_state: ModelState, key: Key, image: Image) -> Scalar:
        crop_key, flip_key, down_key, turn_key = jax.random.split(key, 4)
        image = to_even(image) if crop is None else random_crop(crop_key, image, size=crop)
        image = augment(flip_key, image, flip=flip)
        if turn:
            image = random_turn(turn_key, image)
        found = upscaler.apply({"params": params, **model_state}, DOWN[down](down_key, image))
        return jnp.mean(jnp.abs(found - image))

    def objective(
        params: Params,
        model_state: ModelState,
        key: Key,
        batch: Batch,
        axis_name: AxisName = None,
        step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        keys = image_keys(key, batch.index)
        losses = jax.vmap(loss, (None, None, 0, 0))(params, model_state, keys, batch.image)
        return jnp.sum(jnp.where(batch.valid, losses, 0.0)), (model_state, {})

    return objective


def random_crop(key: Key, image: Image, *, size: int) -> Image:
    """One of the [size, size, C] squares in [H, W, C], each as likely as the others."""
    height, width, channels = image.shape
    within("crop", size, 1, min(height, width), hint=f" (images are {height}x{width})")
    top, left = jax.random.randint(key, (2,), 0, jnp.array([height - size, width - size]) + 1)
    return jax.lax.dynamic_slice(image, (top, left, 0), (size, size, channels))


def random_turn(key: Key, image: Image) -> Image:
    """A square image [S, S, C] turned by 0, 90, 180 or 270 degrees, each as likely."""
    height, width, _ = image.shape
    if height != width:
        raise UsageError(f"turn=True: expected a square, got {height}x{width}: set crop")
    upside_down, lying = jax.random.bernoulli(key, shape=(2,))
    image = jnp.where(upside_down, image[::-1, ::-1], image)
    return jnp.where(lying, jnp.swapaxes(image, 0, 1)[::-1], image)


def psnr(found: Image, image: Image) -> Scalar:
    """The peak signal-to-noise ratio in dB, for a peak of 1 and over all pixels and channels.

    `found` is clipped to [0, 1] first and not rounded. Where nothing differs it would be infinite,
    which no mean survives: 100 dB is the most that is given.
    """
    square = jnp.mean((jnp.clip(found, 0.0, 1.0) - image) ** 2)
    return -10.0 * jnp.log10(jnp.maximum(square, 1e-10))
