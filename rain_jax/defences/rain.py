"""RAIN: an image of half the size by random picks, shifted at random, then super-resolved."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of, within
from rain_jax.defences.compose import BATCH_AXIS
from rain_jax.gradients import straight_through
from rain_jax.image import mean_pool, random_pick, shift, to_even
from rain_jax.types import Array, Defence, Image, Key, Upscaler, Variables

Down = Literal["random", "bicubic"]

# Cubic convolution with a = -0.75, half way between two pixels.
_CUBIC = (-3 / 32, 19 / 32, 19 / 32, -3 / 32)
# A reach that is a whole number of pixels stays one in float32, whose products may fall just short.
_ROUNDING = 1e-4


def rain(
    upscaler: Upscaler,
    *,
    down: Down = "random",
    reach: float = 0.05,
    per_channel: bool = True,
    shared_shift: bool = False,
) -> Defence:
    """RAIN (Du et al., arXiv:2004.14798), after the authors' code (dydjw9/RAIN).

    Of each 2x2 window of the image [H, W, C] one pixel is kept, for each channel by itself unless
    `per_channel` is false; the half-sized image is shifted around its edges by a whole number of
    pixels in either direction, up to the fraction `reach` of its height, rounded down, on both
    axes (2 pixels at 96, 5 at 224); and `upscaler`, of factor 2, enlarges what is left. The result
    is [H, W, C], clipped to [0, 1], and stays shifted. Odd sizes get their last row or column
    twice, and lose it again. Variables are the upscaler's. `reach` is in [0, 0.5] and may be
    traced.

    `reach=0` leaves the shift out, and `down="bicubic"` takes a fixed cubic interpolation
    (a = -0.75, no filter against aliasing) in place of the picks; the authors' code can do both.
    It draws one shift for a whole batch. Here each image draws its own: the law for one image is
    the same, and depends on no batch. With `shared_shift` the images of one device share one.

    How to attack it: everything is differentiable, so by expectation over draws (`eot`). To the
    image, the gradient passes the clip as if it were not there, so that no pixel at a bound is out
    of an attacker's reach; to the variables it is the clip's own, as the authors train. The
    surrogates give both ways the same, and, but for "gray", draw the shift that `apply` draws with
    that key:

    - "average_one_shift": window means in place of picks, which is what picks are in expectation,
      so that only the shift is left to draw.
    - "average": of these, the mean image over all shifts, without randomness. It is blurred by
      them, and costs the upscaler (2 w + 1)^2 passes for shifts of up to w, one after the other
      (25 at 96 pixels, 121 at 224), and for a gradient all of them again with their backward
      passes; there only for a known `reach`.
    - "gray": the cubic interpolation in place of picks and no shift, for one who knows the networks
      and not what is drawn.
    - "identity": the deployed function, with the gradient of the shift alone (BPDA).
    """
    if upscaler.factor != 2:
        raise UsageError(f"upscaler.factor={upscaler.factor}: expected 2, since RAIN halves images")
    one_of("down", down, ("random", "bicubic"))
    within("reach", reach, 0.0, 0.5)
    known = not isinstance(reach, jax.core.Tracer)

    def furthest(height: int) -> Any:
        """The longest shift in pixels, of an image of half the size and so high."""
        if known:
            return math.floor(reach * height + _ROUNDING)
        return jnp.floor(reach * height + _ROUNDING).astype(jnp.int32)

    def drawn(key: Key, image: Image) -> Array:
        """(dy, dx) in pixels of the half size; `key` is the one that `apply` gets."""
        most = furthest(-(-image.shape[0] // 2))
        own = jax.random.fold_in(key, 1)
        return jax.random.randint(_first(own) if shared_shift else own, (2,), -most, most + 1)

    def picked(key: Key, image: Image) -> Image:
        if down == "bicubic":
            return _halved(to_even(image))
        return random_pick(jax.random.fold_in(key, 0), to_even(image), per_channel=per_channel)

    def expected(image: Image) -> Image:
        return _halved(to_even(image)) if down == "bicubic" else mean_pool(to_even(image))

    def enlarged(variables: Variables, small: Image, like: Image) -> Image:
        fixed, (height, width, _) = jax.lax.stop_gradient, like.shape
        clipped = jnp.clip(upscaler.apply(variables, fixed(small)), 0.0, 1.0)
        # Both passes are the same computation, and compiled into one.
        free = upscaler.apply(fixed(variables), small)
        return (clipped + (free - fixed(free)))[:height, :width]

    def init(key: Key, image: Image) -> Variables:
        return upscaler.init(key, mean_pool(to_even(image)))

    def apply(variables: Variables, key: Key, image: Image) -> Image:
        return enlarged(variables, shift(picked(key, image), drawn(key, image)), image)

    def average_one_shift(variables: Variables, key: Key, image: Image) -> Image:
        return enlarged(variables, shift(expected(image), drawn(key, image)), image)

    def average(variables: Variables, key: Key, image: Image) -> Image:
        small = expected(image)
        most = furthest(small.shape[0])
        steps = jnp.arange(-most, most + 1)
        moves = jnp.stack(jnp.meshgrid(steps, steps), axis=-1).reshape(-1, 2)

        # Recomputed backwards, or all shifts' inner values would be kept at once.
        @jax.checkpoint
        def one(total: Image, move: Any) -> tuple[Image, None]:
            return total + enlarged(variables, shift(small, move), image), None

        return jax.lax.scan(one, jnp.zeros_like(image), moves)[0] / len(moves)

    def moved(variables: Variables, key: Key, image: Image) -> Image:
        whole = shift(to_even(image), 2 * drawn(key, image))
        return whole[: image.shape[0], : image.shape[1]]

    def gray(variables: Variables, key: Key, image: Image) -> Image:
        return enlarged(variables, _halved(to_even(image)), image)

    surrogates = {
        "average_one_shift": average_one_shift,
        "gray": gray,
        "identity": straight_through(apply, moved),
    }
    if known:
        surrogates["average"] = average
    random = down == "random" or not known or reach > 0
    return Defence(
        init, apply, random, surrogates, frozenset({"average", "gray"} & set(surrogates))
    )


def _first(key: Key) -> Key:
    """The key of the first image of the batch, where there is a batch."""
    try:
        place = jax.lax.axis_index(BATCH_AXIS)
    except NameError:  # no such axis: one image by itself
        return key
    data = jax.random.key_data(key)
    first = jax.lax.psum(jnp.where(place == 0, data, jnp.zeros_like(data)), BATCH_AXIS)
    return jax.random.wrap_key_data(first, impl=jax.random.key_impl(key))


def _halved(image: Image) -> Image:
    """[H, W, C], even, at half the size by cubic interpolation; edge pixels go on outside."""
    for axis in (0, 1):
        size = image.shape[axis]
        around = [(1, 1) if axis == i else (0, 0) for i in range(3)]
        padded = jnp.pad(image, around, mode="edge")
        image = sum(  # type: ignore[assignment]
            weight * jax.lax.slice_in_dim(padded, start, start + size - 1, 2, axis)
            for start, weight in enumerate(_CUBIC)
        )
    return image
