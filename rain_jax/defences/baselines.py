"""Published input transformations that others are compared with.

All of them fell to attacks that take them into account (Athalye et al., arXiv:1802.00420). None
has variables.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rain_jax.checks import within
from rain_jax.gradients import straight_through
from rain_jax.image import resize, shift
from rain_jax.image.given import floats, whole
from rain_jax.image.quantise import quantisers
from rain_jax.types import Array, Defence, Image, Key, Variables

# Both step sizes of the primal-dual solver. Differences along two axes at most triple lengths
# (square root of 8), and the product of the step sizes times 8 must not exceed 1.
_STEP = 1 / math.sqrt(8.0)
# What Xie et al. pad with: zero for networks whose inputs are in [-1, 1].
_GREY = 0.5


def _without_variables(key: Key, image: Image) -> Variables:
    return {}


def bit_depth(*, bits: int = 3) -> Defence:
    """Rounds to 2^bits evenly spaced values, 0 and 1 among them, `bits` in [1, 8].

    Feature squeezing as its authors round (Xu et al., arXiv:1704.01155), at the depth of Guo et al.
    (arXiv:1711.00117), who leave one more value. The gradient is that of rounding with slopes
    ("sloped" of `image.quantise`): steps along signs do not feel it, others do. The surrogate
    "identity" is BPDA.
    """
    whole("bits", bits, 1, 8)
    most = 2**bits - 1

    sloped = quantisers(jnp.round)["sloped"]

    def rounded(variables: Variables, key: Key, image: Image) -> Image:
        return sloped(floats(image) * most) / most

    identity = straight_through(rounded)
    return Defence(_without_variables, rounded, surrogates={"identity": identity})


def median(*, width: int = 2) -> Defence:
    """The median of the `width` x `width` pixels around each, channel by channel.

    Feature squeezing's local smoothing (Xu et al., arXiv:1704.01155), whose windows of even width
    reach further up and left, and take the larger of the two middle values; the image is mirrored
    at its edges. The gradient goes to the pixels that were picked, which are few; the surrogate
    "identity" is BPDA.
    """
    whole("width", width, 1, 15)
    before = width // 2
    around = (before, width - 1 - before)

    def filtered(variables: Variables, key: Key, image: Image) -> Image:
        height, broad, _ = floats(image).shape
        padded = jnp.pad(image, (around, around, (0, 0)), mode="symmetric")
        windows = jnp.stack(
            [padded[i : i + height, j : j + broad] for i in range(width) for j in range(width)]
        )
        return jnp.sort(windows, axis=0)[width * width // 2]

    identity = straight_through(filtered)
    return Defence(_without_variables, filtered, surrogates={"identity": identity})


def total_variation(*, weight: float = 0.03, keep: float = 0.5, steps: int = 100) -> Defence:
    """The smoothest image near a random half of the pixels (Guo et al., arXiv:1711.00117).

    Keeps each pixel with chance `keep`, all its channels together, and looks for the image u of
    least sum of (u - image)^2 over the kept ones plus `weight` x total variation, the sum of
    |differences| along both axes of each channel. That is the problem that the code of Athalye et
    al. solves (anishathalye/obfuscated-gradients), whose numbers are the defaults; theirs sweeps
    over the pixels one by one (split Bregman), while here all move at once, in `steps` steps of
    Chambolle and Pock's primal-dual method (2011). 100 steps are within about 0.2 % of the least
    sum on photographs. Results stay in [0, 1]. `weight` and `keep` may be traced.

    The gradient is the identity's (BPDA), as those who broke it had it, over many draws; that of
    the solver itself is the surrogate "unrolled", whose memory grows with `steps`.
    """
    within("weight", weight, above=0.0)
    within("keep", keep, above=0.0, high=1.0)
    whole("steps", steps, 1)

    def solved(variables: Variables, key: Key, image: Image) -> Image:
        kept = jax.random.bernoulli(key, keep, (*floats(image).shape[:2], 1)).astype(image.dtype)
        pull = 2 * _STEP * kept

        def step(_: Any, state: tuple[Array, Array, Array, Array]) -> Any:
            u, ahead, rows, columns = state
            down, right = _differences(ahead)
            rows = jnp.clip(rows + _STEP * down, -weight, weight)
            columns = jnp.clip(columns + _STEP * right, -weight, weight)
            smoother = u + _STEP * (rows - jnp.roll(rows, 1, 0) + columns - jnp.roll(columns, 1, 1))
            following = (smoother + pull * image) / (1 + pull)
            return following, 2 * following - u, rows, columns

        # Dropped pixels begin at the mean of the kept ones, and so tell nothing about themselves.
        count = jnp.maximum(jnp.sum(kept), 1.0)
        mean = jnp.sum(kept * image, axis=(0, 1), keepdims=True) / count
        start = kept * image + (1 - kept) * mean
        zero = jnp.zeros_like(image)
        found = jax.lax.fori_loop(0, steps, step, (start, start, zero, zero))[0]
        return jnp.clip(found, 0.0, 1.0)

    return Defence(
        _without_variables, straight_through(solved), True, surrogates={"unrolled": solved}
    )


def _differences(image: Image) -> tuple[Image, Image]:
    """To the pixel below and to the one on the right; 0 on the last row and the last column."""
    down = jnp.diff(image, axis=0, append=image[-1:])
    return down, jnp.diff(image, axis=1, append=image[:, -1:])


def resize_and_pad(
    *, smallest: float = 310 / 299, canvas: float = 331 / 299, flip: bool = True
) -> Defence:
    """Random resizing and padding (Xie et al., arXiv:1711.01991): the result is larger.

    The image [H, W, C] is enlarged to a random height from `smallest` x H up to one less than
    `canvas` x H, both rounded, and to the width that goes with it, put at a random place on a grey
    (0.5) canvas of `canvas` x H by `canvas` x W, and with `flip` mirrored in half of the cases. The
    defaults are the authors' competition entry (cihangxie/NIPS2017_adv_challenge_defense), heights
    310 to 330 on 331 for 299, in proportion: 100 to 105 on 106 for 96, 33 and 34 on 35 for 32.
    They vote over 30 draws.

    Pixels are the nearest ones, here by their centres. A draw is linear in the image: attack it by
    its own gradient, over draws (`eot`).
    """
    within("smallest", smallest, above=0.0)
    within("canvas", canvas, smallest, 4.0)

    def apply(variables: Variables, key: Key, image: Image) -> Image:
        height, width, _ = floats(image).shape
        tall, wide = round(canvas * height), round(canvas * width)
        size_key, place_key, flip_key = jax.random.split(key, 3)
        least = max(round(smallest * height), 1)
        high = jax.random.randint(size_key, (), least, max(tall, least + 1))
        size = jnp.stack([high, jnp.clip((2 * high * width + height) // (2 * height), 1, wide)])
        place = jax.random.randint(place_key, (2,), 0, jnp.array([tall, wide]) - size + 1)
        # Beyond `size` there is zero, so grey is made zero and back.
        put = shift(resize(image - _GREY, size, canvas=(tall, wide), method="nearest"), place)
        if flip:
            put = jnp.where(jax.random.bernoulli(flip_key), put[:, ::-1], put)
        return put + _GREY

    return Defence(_without_variables, apply, True)


def gaussian_noise(*, scale: float = 0.25) -> Defence:
    """Adds normal noise of that standard deviation in pixel values of [0, 1], and does not clip.

    What randomised smoothing (Cohen et al., arXiv:1902.02918) puts in front of a network trained
    for it; `scale` may be traced. The gradient is the identity's and exact: attack it over draws
    (`eot`).
    """
    within("scale", scale, 0.0)

    def apply(variables: Variables, key: Key, image: Image) -> Image:
        return floats(image) + scale * jax.random.normal(key, image.shape, image.dtype)

    return Defence(_without_variables, apply, True)
