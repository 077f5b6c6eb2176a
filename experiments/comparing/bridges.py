"""Through the bridges: our attacks on a PyTorch module, PyTorch's attacks on a model of ours.

Every line is one attacker under several seeds, before the judge of our own model. `as_ours` is the
share of images, over the seeds, with the verdict that our attack leaves without a bridge: a bridge
that costs nothing leaves it at one, for our attacks, up to what roundings decide.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.comparing.sides import judged, our_attacks, ours, theirs, timed
from experiments.comparing.subject import Subject
from rain_jax import evaluation, norms
from rain_jax.types import Iteration

# What peers are asked for; "autoattack" is a library's own class of that name, which has budgets of
# its own and is held against our `standard`.
ATTACKS = {"pgd": "pgd", "standard": "standard", "autoattack": "standard"}
# Of one seed: who stands, bool [N], and how many images are outside the threat.
Attacker = Callable[[int], tuple[np.ndarray, int]]


def bridges(what: Subject, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """PGD-40 and the standard suite: ours, ours through `from_torch`, peers' through `to_torch`."""
    from experiments import peers

    norm = norms.name_of(what.experiment.threat.norm)
    clean = judged(what, what.images, jax.random.key(1))
    own = our_attacks(what, settings)
    reference: dict[str, list[np.ndarray]] = {}

    def told(attack: str, who: str, attacker: Attacker) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        with timed(seconds, who):
            found = [attacker(seed) for seed in range(settings.seeds)]
        stands = [standing & clean.right for standing, _ in found]
        mine = reference.setdefault(ATTACKS[attack], stands)
        accuracy = [float(np.mean(standing)) for standing in stands]
        return {
            "attack": attack, "who": who, "images": len(clean.right),
            "clean": float(np.mean(clean.right)), "accuracy": float(np.mean(accuracy)),
            "least": min(accuracy), "most": max(accuracy), "of_seeds": accuracy,
            "as_ours": float(np.mean(np.equal(stands, mine))),
            "outside_the_threat": sum(outside for _, outside in found),
            "cpu_seconds": seconds[who],
            "standing": [np.packbits(standing).tobytes().hex() for standing in stands],
        }  # fmt: skip

    for name in ("pgd", "standard"):
        if name not in settings.attacks:
            continue
        yield told(name, "ours", our_attacker(what, what, own[name]))
        yield told(name, "ours, from_torch", our_attacker(crossed(what), what, own[name]))
        for attack in (attack for attack, like in ATTACKS.items() if like == name):
            for peer in settings.peers:
                if norm in peers.OFFERS[peer].get(attack, ()):
                    yield told(attack, f"{peer}, to_torch", their_attacker(
                        what, peer, attack, settings
                    ))  # fmt: skip


def crossed(what: Subject) -> Subject:
    """The same model, asked in PyTorch: our attacks meet the twin behind `from_torch`."""
    from rain_jax.bridges import from_torch

    module = from_torch(what.twin)
    return what._replace(logits_fn_of=lambda variables: module)


def handed(what: Subject) -> Subject:
    """The same model as a PyTorch module: peers meet our network behind `to_torch`."""
    from rain_jax.bridges import to_torch

    # On the host: those of all devices would not go with images on one.
    return what._replace(twin=to_torch(what.experiment.network, jax.device_get(what.variables)))


def our_attacker(climbed: Subject, judge: Subject, members: dict[str, Iteration]) -> Attacker:
    """Our attack on one form of the model, judged by another; compiled once for all seeds."""
    side = ours(climbed, members)._replace(judge=ours(judge, members).judge)
    key = jax.random.key(2)
    return lambda seed: (side(climbed, jax.random.fold_in(key, seed)), 0)


def their_attacker(
    what: Subject, peer: str, attack: str, settings: argparse.Namespace
) -> Attacker:  # fmt: skip
    """A peer's attack on our model, which comes to it as a module."""
    module = handed(what)

    def run(seed: int) -> tuple[np.ndarray, int]:
        images = theirs(module, peer, attack, settings, seed=seed)
        verdict = judged(what, images, jax.random.key(3))
        return evaluation.standing(verdict), int(np.sum(~verdict.allowed))

    return run
