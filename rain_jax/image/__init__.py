"""Operations on one image [H, W, C] that defences and studies are made of; batch with `vmap`.

Images are floats: bytes, planes and batches raise `UsageError`. What is computed from a pixel that
is not a number is none either.
"""

from rain_jax.image import corruptions
from rain_jax.image.dct import dct, idct
from rain_jax.image.jpeg import jpeg, standard_tables
from rain_jax.image.resample import mean_pool, random_pick, resize, to_even
from rain_jax.image.shift import random_shift, shift
from rain_jax.image.spectrum import band_energy, low_pass, radial_spectrum

__all__ = [
    "band_energy",
    "corruptions",
    "dct",
    "idct",
    "jpeg",
    "low_pass",
    "mean_pool",
    "radial_spectrum",
    "random_pick",
    "random_shift",
    "resize",
    "shift",
    "standard_tables",
    "to_even",
]
