"""Attacks, by the names that configs use. A new one is a file here and a line below.

Each maker takes a `Threat` and plain numbers, and returns an `Attack`: one image at a time, given
`logits_fn(key, image)`. Batches are `jax.vmap`'s business, and success is the judge's.
"""

from rain_jax.attacks.apgd import apgd, apgd_t
from rain_jax.attacks.noise import noise
from rain_jax.attacks.pgd import fgsm, mi_fgsm, pgd

__all__ = ["apgd", "apgd_t", "fgsm", "mi_fgsm", "noise", "pgd"]
