"""JPEG (ITU-T T.81) from pixels to pixels: all that loses information, and none of the coding.

The arithmetic is that of libjpeg's default path, rounding by rounding, so that the result is what a
file holds that was written and read with it (measured against libjpeg-turbo 3.2: the same but for
one value in 10^5). Its integers are kept in float32, where nearly all of its sums are exact.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, one_of, within
from rain_jax.gradients import straight_through
from rain_jax.image.dct import BLOCK
from rain_jax.image.given import floats
from rain_jax.image.quantise import Quantiser, Rounding, quantisers
from rain_jax.types import Array, Image

Subsampling = Literal["444", "420"]

# T.81, tables K.1 and K.2: rows are vertical frequencies.
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.int32,
)
_CHROMA = np.full((BLOCK, BLOCK), 99, np.int32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# JFIF's colours (BT.601, full range): weights of red, green and blue, and of blue and red chroma.
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
# The same in libjpeg's 16-bit fixed point. Sums of 8-bit values are then exact in float32, and
# halves go where libjpeg's go.
_BITS = 2.0**16
_TO_LUMA = np.array([19595, 38470, 7471]) / _BITS
_TO_BLUE = np.array([-11059, -21709, 32768]) / _BITS
_TO_RED = np.array([32768, -27439, -5329]) / _BITS
_RED_TO_RED, _RED_TO_GREEN = 91881 / _BITS, -46802 / _BITS
_BLUE_TO_GREEN, _BLUE_TO_BLUE = -22554 / _BITS, 116130 / _BITS
# Of 8-bit values; chroma is kept around it, and what is transformed is the distance from it.
_GREY = 128.0
# libjpeg's accurate integer transform of one axis, its butterflies multiplied out: root 8 times the
# orthonormal one in 13-bit fixed point, off by a unit where constants were rounded one by one. The
# left half; the right one is its mirror image, with the other sign in odd rows.
_HALF_WAVES = np.array(
    [
        [8192, 8192, 8192, 8192],
        [11363, 9633, 6437, 2260],
        [10703, 4433, -4433, -10703],
        [9633, -2259, -11362, -6436],
        [8192, -8192, -8192, 8192],
        [6437, -11362, 2261, 9633],
        [4433, -10704, 10704, -4433],
        [2260, -6436, 9633, -11363],
    ]
)
_MIRROR = (-1) ** np.arange(BLOCK).reshape(-1, 1)
_WAVES = np.hstack([_HALF_WAVES, _MIRROR * _HALF_WAVES[:, ::-1]]).astype(np.float32) / 2**13
# What two axes are too large by, and the 2 bits more that libjpeg keeps between them.
_SCALE = 8.0
_BETWEEN = 4.0
# Coefficients are whole eighths, so that halves are common among the quotients. Not every device
# divides with the last bit right: this keeps a half a half, and is less than the distance to the
# next quotient at the largest step, 1 / (8 * 255).
_TIE = 2.0**-12


def standard_tables(quality: Any) -> tuple[Array, Array]:
    """The steps for luma and chroma at a quality from 1 to 100: two [8, 8], whole, in [1, 255].

    T.81's Annex K scaled by libjpeg's rule; `quality` is a whole number and may be traced. Higher
    quality never has the larger step, and 100 has only ones. Raises `UsageError` outside [1, 100].
    """
    quality = jnp.asarray(within("quality", quality, 1, 100), jnp.int32)
    percent = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)

    def scaled(table: np.ndarray) -> Array:
        return jnp.clip((table * percent + 50) // 100, 1, 255).astype(jnp.float32)

    return scaled(_LUMA), scaled(_CHROMA)


def _in_colour(image: Image) -> bool:
    if floats(image).shape[-1] not in (1, 3):
        raise UsageError(f"image {list(image.shape)}: expected 3 channels, or 1")
    return image.shape[-1] == 3


def luminance(image: Image) -> Array:
    """JFIF's Y of [H, W, 3], or the one channel of [H, W, 1]: [H, W] in the image's range."""
    if not _in_colour(image):
        return image[:, :, 0]
    return _RED * image[:, :, 0] + _GREEN * image[:, :, 1] + _BLUE * image[:, :, 2]


def _parts(array: Array, axis: int) -> list[Array]:
    """The three channels along an axis."""
    # Three slices would each pad their gradient to all channels, to be added up.
    return [jnp.squeeze(part, axis) for part in jax.lax.split(array, (1, 1, 1), axis % array.ndim)]


def _to_planes(levels: Array) -> Array:
    """8-bit colours [H, W, 3] to 8-bit luma, blue and red chroma [3, H, W]."""
    red, green, blue = _parts(levels, -1)

    def weighted(weights: np.ndarray) -> Array:
        r, g, b = weights.tolist()
        return r * red + g * green + b * blue

    # Halves of chroma go down, those of luma up.
    middle = _GREY - 1 / _BITS
    planes = [weighted(_TO_LUMA), weighted(_TO_BLUE) + middle, weighted(_TO_RED) + middle]
    return _byte(jnp.stack(planes))


def _to_colours(planes: Array) -> Array:
    """The way back: [3, H, W] to [H, W, 3]."""
    y, cb, cr = _parts(planes, 0)
    cb, cr = cb - _GREY, cr - _GREY
    red = y + _RED_TO_RED * cr
    green = y + (_BLUE_TO_GREEN * cb + _RED_TO_GREEN * cr)
    blue = y + _BLUE_TO_BLUE * cb
    return _byte(jnp.stack([red, green, blue], axis=-1))


def _half_up(values: Array) -> Array:
    """Integer arithmetic's rounding: add a half, drop the fraction."""
    return jnp.floor(values + 0.5)


def _half_away(values: Array) -> Array:
    """The quantiser's rounding, the same on both sides of zero."""
    return jnp.sign(values) * jnp.floor(jnp.abs(values) + 0.5 + _TIE)


_QUANTISERS = quantisers(_half_away)

_whole = straight_through(_half_up)
_byte = straight_through(lambda values: jnp.clip(_half_up(values), 0.0, 255.0))
_floor = straight_through(jnp.floor)


def _pad(planes: Array, rows: int, columns: int) -> Array:
    """[P, H, W] continued by its edges to multiples of `rows` and `columns`."""
    _, height, width = planes.shape
    if height % rows == width % columns == 0:
        return planes  # the gradient through no edges at all would still be padded and added up
    return jnp.pad(planes, ((0, 0), (0, -height % rows), (0, -width % columns)), mode="edge")


def _down(matrix: np.ndarray, blocks: Array) -> Array:
    """The matrix times every block [rows of blocks, 8, W]."""
    return jnp.einsum("uy,ryx->rux", matrix, blocks, precision=jax.lax.Precision.HIGHEST)


def _across(matrix: np.ndarray, blocks: Array) -> Array:
    """Every block [rows of blocks, 8, W] times the matrix from the right."""
    parts = blocks.reshape(-1, BLOCK)
    return jnp.matmul(parts, matrix, precision=jax.lax.Precision.HIGHEST).reshape(blocks.shape)


def _quantised(planes: Array, tables: Array, quantise: Quantiser) -> Array:
    """Planes [P, H, W] of 8-bit values through the transform and back, by tables [P, 8, 8]."""
    _, height, width = planes.shape
    padded = _pad(planes, BLOCK, BLOCK) - _GREY
    _, tall, wide = padded.shape
    # Three axes and no more: vectorised over images, draws and tables, they are six, and XLA's sums
    # over seven end the process (jaxlib 0.10.2 and 0.11 on CPU, jax-ml/jax issue 39257).
    blocks = padded.reshape(-1, BLOCK, wide)
    rows = _whole(_BETWEEN * _across(_WAVES.T, blocks))
    waves = _whole(_down(_WAVES, rows) / _BETWEEN)
    steps = jnp.repeat(jnp.tile(tables, (1, 1, wide // BLOCK)), tall // BLOCK, axis=0)
    kept = steps * quantise(waves / (_SCALE * steps))
    columns = _whole(_BETWEEN * _down(_WAVES.T, kept))
    values = _across(_WAVES, columns) / (_BETWEEN * _SCALE)
    return _byte(values.reshape(padded.shape)[:, :height, :width] + _GREY)


def _halved(planes: Array) -> Array:
    """2x2 means [P, H, W] to [P, ceil(H/2), W' / 2], W' being W up to whole pairs of blocks."""
    padded = _pad(planes, 2, 2 * BLOCK)
    count, height, width = padded.shape
    sums = padded.reshape(count, height // 2, 2, width // 2, 2).sum(axis=(2, 4))
    # Halves go up and down in turn, so that the mean keeps its place.
    bias = jnp.tile(jnp.array([0.25, 0.5], jnp.float32), width // 4).reshape(1, 1, -1)
    return _floor(sums / 4 + bias)


def _doubled(planes: Array) -> Array:
    """Each pixel to four: 9/16 of itself and 3/16, 3/16, 1/16 of the neighbours nearest to each.

    (Planes that are no more than 2 wide libjpeg repeats instead.)
    """
    count, height, width = planes.shape
    around = jnp.pad(planes, ((0, 0), (1, 1), (0, 0)), mode="edge")
    rows = jnp.stack([3 * planes + around[:, :-2], 3 * planes + around[:, 2:]], axis=2)
    rows = rows.reshape(count, 2 * height, width)
    around = jnp.pad(rows, ((0, 0), (0, 0), (1, 1)), mode="edge")
    # Halves go up on the left and down on the right.
    left = _floor((3 * rows + around[:, :, :-2] + 8) / 16)
    right = _floor((3 * rows + around[:, :, 2:] + 7) / 16)
    return jnp.stack([left, right], axis=3).reshape(count, 2 * height, 2 * width)


def jpeg(
    image: Image,
    luma: Any,
    chroma: Any,
    *,
    subsampling: Subsampling = "444",
    rounding: Rounding = "hard",
) -> Image:
    """What is left of an image after JPEG with these tables: [H, W, C] in [0, 1] to the same.

    C is 3, or 1, which needs no `chroma`. The tables are [8, 8], vertical frequency first, steps of
    at least 1 in 8-bit units, and may be traced (`standard_tables` has the usual ones). Any size
    will do. As in a file, the input is rounded to 8 bits first, and the result is a whole multiple
    of 1/255. With "420", the default of most encoders, chroma is halved by box means and doubled
    by a triangle filter, as libjpeg does; "444" keeps it whole.

    `rounding` says how the quantiser is differentiated, one of `quantise.quantisers`. "hard": as
    it is, zero everywhere. The others pass all other roundings and clips straight through (BPDA,
    arXiv:1802.00420); by "straight_through" the whole gradient for "444" is the identity, to the
    three digits of libjpeg's fixed-point constants. All but "cubic" have the same value. Raises
    `UsageError` for other options, shapes and steps.
    """
    one_of("subsampling", subsampling, ("444", "420"))
    quantise = _QUANTISERS[one_of("rounding", rounding, _QUANTISERS)]
    coloured = _in_colour(image)
    luma = step_table("luma", luma)
    chroma = step_table("chroma", chroma) if coloured else luma
    height, width, _ = image.shape
    levels = _byte(255 * image)
    if not coloured:
        grey = _quantised(levels.reshape(1, height, width), luma[None], quantise)
        return grey.reshape(image.shape) / 255

    planes = _to_planes(levels)
    if subsampling == "444":
        planes = _quantised(planes, jnp.stack([luma, chroma, chroma]), quantise)
        return _to_colours(planes) / 255
    full = _quantised(planes[:1], luma[None], quantise)
    small = _quantised(_halved(planes[1:]), jnp.stack([chroma, chroma]), quantise)
    # A decoder knows the true width, and fills up from the last column inside it.
    doubled = _doubled(small[:, :, : -(-width // 2)])[:, :height, :width]
    return _to_colours(jnp.concatenate([full, doubled])) / 255


def step_table(where: str, table: Any) -> Array:
    """Steps [8, 8] in float32; raises `UsageError` for other shapes, and steps below 1.

    Traced tables are taken at their word: by a step of zero nothing comes out that is a number.
    """
    if np.shape(table) != (BLOCK, BLOCK):
        raise UsageError(f"{where} {list(np.shape(table))}: expected [{BLOCK}, {BLOCK}]")
    if not isinstance(table, jax.core.Tracer):
        known = np.asarray(table, np.float32)
        if not np.all((known >= 1) & (known < np.inf)):
            ends = f"{np.min(known):g} to {np.max(known):g}"
            raise UsageError(f"{where} of {ends}: expected finite steps of at least 1")
    return jnp.asarray(table, jnp.float32)
