"""Defences that compress the image: what JPEG, or a relative, throws away, an attack may need.

What an attacker must know is which coefficients are about to be rounded the other way, and so they
differentiate themselves by a quantiser with slopes ("sloped" of `image.quantise`). To pass straight
through (BPDA, Athalye et al., arXiv:1802.00420) tells nothing of that, and is weak at small radii:
30 steps at 2/255 left 28 of 100 images of a small network behind JPEG at quality 75, and 30 along
the slopes of cubic rounding one (docs/defences.md, "At smaller radii"). Each brings as surrogates,
with the true function forwards, but for "cubic":

- "identity": the gradient is the identity's, whatever becomes of chroma (BPDA);
- "cubic": the quantiser has slopes forwards too (Shin & Song 2017);
- "survivors": only coefficients that are not quantised to zero pass;
- "low_pass": only the lower half of the frequencies passes, on both axes (our own).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of
from rain_jax.defences.tables import Statistics, Table, Tables, check, fd_steps, tables
from rain_jax.gradients import straight_through
from rain_jax.image import dct, idct, low_pass, standard_tables
from rain_jax.image import jpeg as coded
from rain_jax.image.given import floats, whole
from rain_jax.image.jpeg import step_table
from rain_jax.image.quantise import Rounding, quantisers
from rain_jax.types import (
    Array,
    Defence,
    DefenceApply,
    Image,
    Key,
    Variables,
)

Subsampling = Literal["444", "420"]

# What "low_pass" lets through: half the band. Tables begin to be coarse about there.
_LOWER_HALF = 0.5
_BLOCK = 8


def _defence(
    init: Callable[[], Variables], through: Callable[[Rounding], DefenceApply], random: bool = False
) -> Defence:
    """A defence and its surrogates, given what it is with each way of rounding."""
    apply = through("sloped")

    def smooth(variables: Variables, key: Key, image: Image) -> Image:
        return low_pass(image, _LOWER_HALF)

    surrogates = {
        "identity": straight_through(apply),
        "cubic": through("cubic"),
        "survivors": through("survivors"),
        "low_pass": straight_through(apply, smooth),
    }
    return Defence(lambda key, image: init(), apply, random, surrogates)


def _variables(made: Tables) -> Variables:
    """The tables as variables that nothing trains."""
    luma, chroma = made
    return {"tables": {"luma": luma, "chroma": chroma}}


def _codec(made: Callable[[], Tables], subsampling: Subsampling) -> Defence:
    one_of("subsampling", subsampling, ("444", "420"))

    def through(rounding: Rounding) -> DefenceApply:
        def apply(variables: Variables, key: Key, image: Image) -> Image:
            steps = variables["tables"]
            return coded(
                image, steps["luma"], steps["chroma"], subsampling=subsampling, rounding=rounding
            )

        return apply

    return _defence(lambda: _variables(made()), through)


def jpeg(*, quality: int = 75, subsampling: Subsampling = "444") -> Defence:
    """JPEG at one quality, 1 to 100: the baseline of Guo et al. (arXiv:1711.00117), who took 75.

    [H, W, 3] or [H, W, 1] in [0, 1] to the same. Its tables are variables, {"tables": {"luma",
    "chroma"}}, [8, 8] each, so that qualities are data: variables of several can be stacked.
    Most encoders halve chroma, "420"; networks see colours as well as brightness, so "444" is ours.
    """
    whole("quality", quality, 1, 100)
    return _codec(lambda: standard_tables(quality), subsampling)


def nn_jpeg(
    *,
    level: float = 30.0,
    table: Table = "fd",
    statistics: Statistics | None = None,
    subsampling: Subsampling = "444",
) -> Defence:
    """JPEG with tables made for networks: one member of the ensemble of arXiv:2106.13394.

    Reconstructed from its abstract: table, levels and subsampling are our own. An ensemble has a
    classifier for each of several levels, (15, 30, 45, 60) say, and their majority. `table` and
    `level` are those of `tables.tables`, "nn" and "deepn" being made of `statistics`; "fd" needs
    none. Shapes and variables are as in `jpeg`.
    """
    check(table, level, statistics)
    return _codec(lambda: tables(table, level, statistics), subsampling)


def shield(
    *, qualities: tuple[int, ...] = (80, 60, 40, 20), subsampling: Subsampling = "420"
) -> Defence:
    """SHIELD's stochastic local quantisation (Das et al., arXiv:1802.06816), as in their code.

    The image is compressed as a whole at each quality, and every 8x8 block of the result comes from
    one of these, drawn alike for all blocks and by each for itself. Random, with one more
    surrogate: "mean", over the qualities, which is exactly the expectation over draws. Shapes are
    as in `jpeg`; the tables are stacked, [Q, 8, 8].
    """
    if not qualities:
        raise UsageError("qualities=(): expected one at least")
    for quality in qualities:
        whole("qualities", quality, 1, 100)
    one_of("subsampling", subsampling, ("444", "420"))

    def each(rounding: Rounding, variables: Variables, image: Image) -> Array:
        def one(luma: Array, chroma: Array) -> Image:
            return coded(image, luma, chroma, subsampling=subsampling, rounding=rounding)

        steps = variables["tables"]
        return jax.vmap(one)(steps["luma"], steps["chroma"])

    def through(rounding: Rounding) -> DefenceApply:
        def apply(variables: Variables, key: Key, image: Image) -> Image:
            compressed = each(rounding, variables, image)
            count, height, width, _ = compressed.shape
            blocks = (-(-height // _BLOCK), -(-width // _BLOCK))
            drawn = jax.random.randint(key, blocks, 0, count)
            drawn = jnp.repeat(jnp.repeat(drawn, _BLOCK, axis=0), _BLOCK, axis=1)
            drawn = drawn[None, :height, :width, None]
            return jnp.take_along_axis(compressed, drawn, axis=0)[0]

        return apply

    def mean(variables: Variables, key: Key, image: Image) -> Image:
        return jnp.mean(each("sloped", variables, image), axis=0)

    def init() -> Variables:
        return _variables(jax.vmap(standard_tables)(jnp.array(qualities, jnp.int32)))

    defence = _defence(init, through, random=True)
    surrogates = {**defence.surrogates, "mean": mean}
    return defence._replace(surrogates=surrogates, fixed=frozenset({"mean"}))


_QUANTISERS = quantisers(jnp.round)
_clipped = straight_through(lambda image: jnp.clip(image, 0.0, 1.0))


def feature_distillation() -> Defence:
    """Feature Distillation (Liu et al., arXiv:1803.05787), by its authors' code and constants.

    Every channel by itself, whatever it is: a DCT of 8x8 blocks of values in [0, 255], rounded to
    multiples of 30, 25 for the lowest 4x4 frequencies, and back, clipped. Neither level shift nor
    rounding to 8 bits. Any size: edges are continued up to whole blocks. The steps are variables,
    {"tables": {"steps": [8, 8]}}.
    """

    def through(rounding: Rounding) -> DefenceApply:
        quantise = _QUANTISERS[rounding]

        def apply(variables: Variables, key: Key, image: Image) -> Image:
            height, width, _ = floats(image).shape
            steps = step_table("steps", variables["tables"]["steps"])
            padding = ((0, -height % _BLOCK), (0, -width % _BLOCK))

            def channel(plane: Array) -> Array:
                waves = dct(jnp.pad(255 * plane, padding, mode="edge"))
                scaled = steps.reshape(1, 1, _BLOCK, _BLOCK)
                return idct(scaled * quantise(waves / scaled))[:height, :width] / 255

            return _clipped(jax.vmap(channel, in_axes=2, out_axes=2)(image))

        return apply

    return _defence(lambda: {"tables": {"steps": fd_steps()}}, through)
