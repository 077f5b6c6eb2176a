"""Attacks, by the names that configs use. A new one is a file here and a line below.

Each maker takes a `Threat` and plain numbers, and returns an `Attack`: one image at a time, given
`logits_fn(key, image)`. Batches are `jax.vmap`'s business, and success is the judge's.
"""

from rain_jax.attacks.apgd import apgd, apgd_t
from rain_jax.attacks.carlini_wagner import carlini_wagner
from rain_jax.attacks.deepfool import deepfool
from rain_jax.attacks.fab import fab, fab_t
from rain_jax.attacks.fmn import ddn, fmn
from rain_jax.attacks.noise import noise
from rain_jax.attacks.pgd import fgsm, mi_fgsm, multi_targeted, pgd
from rain_jax.attacks.rays import rays
from rain_jax.attacks.spsa import nes, spsa
from rain_jax.attacks.square import square

__all__ = [
    "apgd",
    "apgd_t",
    "carlini_wagner",
    "ddn",
    "deepfool",
    "fab",
    "fab_t",
    "fgsm",
    "fmn",
    "mi_fgsm",
    "multi_targeted",
    "nes",
    "noise",
    "pgd",
    "rays",
    "spsa",
    "square",
]

# Those that look for the nearest misclassified image, so that a radius of infinity makes sense.
MINIMUM_NORM = ("carlini_wagner", "ddn", "deepfool", "fab", "fab_t", "fmn", "rays")
