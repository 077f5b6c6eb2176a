"""Attacks, by the names that configs use. A new one is a file here and a line below.

Each maker takes a `Threat` and plain numbers, and returns an `Attack`: one image at a time, given
`logits_fn(key, image)`. Batches are `jax.vmap`'s business, and success is the judge's. What an
evaluation must know of it (its norms, what it uses of the model) the attack declares itself: see
`rain_jax.types.Iteration`.
"""

import functools

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
from rain_jax.checks import UsageError
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Norm, Threat

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


@functools.cache
def minimum_norm() -> tuple[str, ...]:
    """The names of those that seek the nearest misclassified image, as they declare themselves."""

    def seeks(name: str, norm: Norm) -> bool:
        try:
            return bool(globals()[name](Threat(norm, 1.0)).minimum_norm)
        except (TypeError, UsageError):  # it needs more than a threat, or another norm
            return False

    return tuple(name for name in __all__ if any(seeks(name, norm) for norm in (linf, l2, l1)))
