"""Quantisation tables for networks in the place of eyes, and the statistics that they come from.

Coefficients, and the steps of tables, are in 8-bit units: those of pixel values in [0, 255].
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, one_of, within
from rain_jax.data.feeds import as_float
from rain_jax.image import dct, idct, standard_tables
from rain_jax.image.given import floats
from rain_jax.losses import cross_entropy
from rain_jax.parallel import image_keys, psum
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Batch,
    Image,
    Iteration,
    Key,
    LogitsFn,
    Scalar,
    Target,
)

Table = Literal["nn", "fd", "deepn", "std"]
Tables = tuple[Array, Array]  # luma and chroma, [8, 8], vertical frequency first

# JFIF: luminance, and the distances of blue and red from it scaled to [-1/2, 1/2].
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_COLOURS = np.stack(
    [
        _LUMINANCE,
        (np.array([0.0, 0.0, 1.0]) - _LUMINANCE) / (2 * (1 - _LUMINANCE[2])),
        (np.array([1.0, 0.0, 0.0]) - _LUMINANCE) / (2 * (1 - _LUMINANCE[0])),
    ]
)
# Luminance is coded as its distance from the middle; chroma lies around zero already.
_GREY = np.array([128.0, 0.0, 0.0], np.float32).reshape(3, 1, 1)
# The level at which a table is as published.
_PUBLISHED = 30.0
# Keeps quotients finite where nothing was perturbed, or nothing felt.
_TINY = 1e-12


class Moments(NamedTuple):
    """Sums over the 8x8 blocks of images, to be added over images, batches and devices.

    Arrays are [C, 8, 8]: Y, Cb and Cr, or the one channel of grey images.
    """

    blocks: Scalar
    clean: Array  # of the coefficients, and of their squares
    clean_square: Array
    noise: Array  # of what an attack added to them, and of its squares
    noise_square: Array
    slope: Array  # of |d cross-entropy / d coefficient|


class Statistics(NamedTuple):
    """What the tables are made of, [C, 8, 8] float32 each, in 8-bit units."""

    clean: Any  # standard deviation of the clean coefficients
    noise: Any  # that of what an attack adds to them
    slope: Any  # mean |d cross-entropy / d coefficient|


def coefficients(image: Image) -> Array:
    """[H, W, C] in [0, 1] to what JPEG would quantise, [C, H/8, W/8, 8, 8], without any rounding.

    C is 3, which becomes Y, Cb and Cr, or 1. Edges are continued up to whole blocks.
    """
    height, width, channels = floats(image).shape
    planes = jnp.moveaxis(255 * image, -1, 0)
    planes = _mixed(_colours(channels), planes) - _GREY[:channels]
    padding = ((0, 0), (0, -height % 8), (0, -width % 8))
    return jax.vmap(dct)(jnp.pad(planes, padding, mode="edge"))


def pixels(coefficients: Array, height: int, width: int) -> Image:
    """The inverse of `coefficients`, for an image of that size; not clipped."""
    channels = coefficients.shape[0]
    planes = jax.vmap(idct)(coefficients)[:, :height, :width] + _GREY[:channels]
    return jnp.moveaxis(_mixed(np.linalg.inv(_colours(channels)), planes), 0, -1) / 255


def _colours(channels: int) -> np.ndarray:
    if channels not in (1, 3):
        raise UsageError(f"image with {channels} channels: expected 3, or 1")
    return _COLOURS if channels == 3 else np.eye(1)


def _mixed(matrix: np.ndarray, planes: Array) -> Array:
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("dc,chw->dhw", matrix.astype(np.float32), planes, precision=highest)


def analyse(
    key: Key, logits_fn: LogitsFn, image: Image, adversarial: Image, label: Target
) -> Moments:
    """One image's share: its coefficients, what `adversarial` adds, and what the model feels."""
    height, width, _ = image.shape
    clean = coefficients(image)
    noise = coefficients(adversarial) - clean

    def loss(values: Array) -> Scalar:
        return cross_entropy(logits_fn(key, pixels(values, height, width)), label)

    def total(values: Array) -> Array:
        return jnp.sum(values, axis=(1, 2))

    blocks = jnp.float32(clean.shape[1] * clean.shape[2])
    return Moments(
        blocks, total(clean), total(clean**2), total(noise), total(noise**2),
        total(jnp.abs(jax.grad(loss)(clean))),
    )  # fmt: skip


def moments(
    key: Key,
    logits_fn: LogitsFn,
    attack: Attack | Iteration,
    batch: Batch,
    axis_name: AxisName = None,
) -> Moments:
    """Sums over the valid images of a batch, attacked by `attack`, and over `axis_name`.

    `logits_fn` is the undefended model, and the images are training images: tables that have seen
    the test set flatter the defence.
    """

    def one(key: Key, image: Image, label: Target) -> Moments:
        attack_key, own = jax.random.split(key)
        return analyse(own, logits_fn, image, attack(attack_key, logits_fn, image, label), label)

    each = jax.vmap(one)(image_keys(key, batch.index), as_float(batch.image), batch.label)

    def total(leaf: Array) -> Array:
        valid = batch.valid.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.sum(jnp.where(valid, leaf, 0.0), axis=0)

    return psum(jax.tree.map(total, each), axis_name)


def statistics(parts: Iterable[Moments]) -> Statistics:
    """What moments of any number of batches say together; a generator keeps one at a time.

        statistics(program(batch) for batch in batches)

    Sums are in float64, on the host. Raises `UsageError` where there was no valid image.
    """
    sums: list[Any] = [np.float64(0.0)] * len(Moments._fields)
    for part in parts:
        sums = [one + np.asarray(leaf, np.float64) for one, leaf in zip(sums, part, strict=True)]
    total = Moments(*sums)
    if not total.blocks > 0:
        raise UsageError("parts: expected moments of one valid image at least")

    def deviation(values: Any, squares: Any) -> np.ndarray:
        variance = squares / total.blocks - (values / total.blocks) ** 2
        return np.sqrt(np.maximum(variance, 0.0)).astype(np.float32)

    return Statistics(
        deviation(total.clean, total.clean_square),
        deviation(total.noise, total.noise_square),
        (total.slope / total.blocks).astype(np.float32),
    )


def _chroma_of(values: Array) -> Array:
    """The channels that share the second table; a grey image's one channel has both."""
    return values[1:] if values.shape[0] == 3 else values


def _deviations(values: Any) -> Tables:
    """[C, 8, 8] to luma and chroma, the latter the root mean square of Cb's and Cr's."""
    values = jnp.asarray(values)
    return values[0], jnp.sqrt(jnp.mean(_chroma_of(values) ** 2, axis=0))


def _means(values: Any) -> Tables:
    values = jnp.asarray(values)
    return values[0], jnp.mean(_chroma_of(values), axis=0)


def _steps(table: Array) -> Array:
    """What a file can hold: whole steps of one byte, none of them zero."""
    return jnp.clip(jnp.round(table), 1.0, 255.0)


def nn_table(statistics: Statistics, level: Any) -> Tables:
    """Large steps where only an attack lives, small ones where the model is sensitive.

    `level` x t x w: t is the noise's deviation over its mean, w the inverse root of the slope over
    its geometric mean, within [1/2, 2]; each table has its own means. `level` may be traced. Our
    own reconstruction of the idea in arXiv:2106.13394, whose table is not public.
    """

    def one(noise: Array, slope: Array) -> Array:
        logs = jnp.log(jnp.maximum(slope, _TINY))
        spared = jnp.clip(jnp.exp((jnp.mean(logs) - logs) / 2), 0.5, 2.0)
        return _steps(level * noise / jnp.maximum(jnp.mean(noise), _TINY) * spared)

    noises, slopes = _deviations(statistics.noise), _means(statistics.slope)
    return one(noises[0], slopes[0]), one(noises[1], slopes[1])


def fd_steps() -> Array:
    """Feature Distillation's table: 30, and 25 for the lowest 4x4 frequencies (authors' code)."""
    return jnp.full((8, 8), _PUBLISHED, jnp.float32).at[:4, :4].set(25.0)


def fd_table(level: Any) -> Tables:
    """`fd_steps`, published for RGB, for luma and chroma alike; as it is at `level` 30.

    Other levels, which may be traced, scale it (our own).
    """
    table = _steps(level / _PUBLISHED * fd_steps())
    return table, table


def deepn_table(statistics: Statistics, level: Any) -> Tables:
    """DeepN-JPEG's piecewise linear rule (Liu et al., DAC 2018): wide range, small step.

    As published at `level` 30, with the constants of a public re-implementation; the jump at a
    deviation of 60 is theirs. Other levels, which may be traced, scale it (our own).
    """

    def one(deviation: Array) -> Array:
        steps = jnp.where(deviation <= 60, 80 - deviation, 240 - 3 * deviation)
        steps = jnp.where(deviation <= 20, 255 - 9.75 * deviation, steps)
        return _steps(level / _PUBLISHED * jnp.maximum(steps, 5.0))

    luma, chroma = _deviations(statistics.clean)
    return one(luma), one(chroma)


def check(table: Table, level: Any, statistics: Statistics | None) -> None:
    """Raises the `UsageError` of `tables`, and touches no device."""
    one_of("table", table, ("nn", "fd", "deepn", "std"))
    if table == "std":
        within("level", level, 1, 100)
    else:
        within("level", level, None, 255, above=0.0)
    if table in ("nn", "deepn") and statistics is None:
        raise UsageError(f"statistics=None: expected some: table={table!r} is made of them")
    for name, values in () if statistics is None else statistics._asdict().items():
        shape = np.shape(values)
        known = not isinstance(values, jax.core.Tracer)
        if shape not in ((1, 8, 8), (3, 8, 8)) or (known and not np.all(np.isfinite(values))):
            raise UsageError(
                f"statistics.{name} {list(shape)}: expected finite numbers, [1, 8, 8] or [3, 8, 8]"
            )


def tables(table: Table, level: Any, statistics: Statistics | None = None) -> Tables:
    """The tables of a kind at a level, which may be traced; for "std" it is JPEG's quality.

    "nn" and "deepn" are made of `statistics`, which the others leave alone. Qualities lose their
    fractions. Raises `UsageError` for other names, levels outside of (0, 255], or
    [1, 100] for "std", and for missing or unfit statistics.
    """
    check(table, level, statistics)
    if table == "std":
        return standard_tables(level)
    if table == "fd" or statistics is None:
        return fd_table(level)
    return (nn_table if table == "nn" else deepn_table)(statistics, level)
