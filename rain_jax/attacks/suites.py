"""Suites: several attacks, one after the other, each on the images that the others left standing.

As AutoAttack defines them (Croce & Hein, arXiv:2003.01690; L1: arXiv:2103.01208). What a suite says
is the worst case over its members; the evaluation packs what still stands into full batches.
"""

from rain_jax.attacks.apgd import apgd, apgd_t
from rain_jax.attacks.fab import fab, fab_t
from rain_jax.attacks.restarts import together
from rain_jax.attacks.square import square
from rain_jax.checks import whole
from rain_jax.gradients import eot
from rain_jax.losses import dlr
from rain_jax.norms import l1
from rain_jax.types import Iteration, Threat

__all__ = ["plus", "rand", "standard"]


def standard(
    threat: Threat, *, steps: int = 100, targets: int = 9, queries: int = 5000
) -> dict[str, Iteration]:
    """APGD-CE, targeted APGD on DLR, targeted FAB, Square. For models without randomness.

    Raises `UsageError` in a norm that Square is not defined for.
    """
    # In L1 the published suite restarts APGD-CE and tries fewer targets.
    sparse = threat.norm is l1
    return {
        "apgd_ce": apgd(threat, steps=steps, restarts=5 if sparse else 1),
        "apgd_t": apgd_t(threat, steps=steps, targets=min(5, targets) if sparse else targets),
        "fab_t": fab_t(threat, steps=steps, targets=targets),
        "square": square(threat, queries=queries),
    }


def plus(
    threat: Threat, *, steps: int = 100, targets: int = 9, queries: int = 5000, restarts: int = 5
) -> dict[str, Iteration]:
    """`standard` with restarts, APGD-DLR and untargeted FAB: slower, and rarely stronger."""
    return {
        "apgd_ce": apgd(threat, steps=steps, restarts=restarts),
        "apgd_dlr": apgd(threat, steps=steps, restarts=restarts, loss=dlr),
        "fab": fab(threat, steps=steps, restarts=restarts),
        "square": square(threat, queries=queries),
        "apgd_t": apgd_t(threat, steps=steps, targets=targets),
        "fab_t": fab_t(threat, steps=steps, targets=targets),
    }


def rand(threat: Threat, *, steps: int = 100, draws: int = 20) -> dict[str, Iteration]:
    """APGD-CE and APGD-DLR for random models, their gradients and scores means over `draws`.

    One attack, not two in a row: an image keeps the worst mean margin that either met. Who falls
    is for the judge's own draws to say; stopped at the first lucky mean over its own, an attack
    would report what it selected for.
    """
    whole("draws", draws, 1)
    return {
        "apgd": together(
            apgd(threat, steps=steps, estimator=eot(draws)),
            apgd(threat, steps=steps, estimator=eot(draws), loss=dlr),
        )
    }
