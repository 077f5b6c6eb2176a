"""A model that draws: our `rand` suite against EOT-PGD of torchattacks."""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.comparing.sides import judged
from experiments.comparing.subject import Subject
from rain_jax import evaluation, norms
from rain_jax.attacks import suites


def random_model(what: Subject, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Our `rand` suite on a model that draws, against EOT-PGD-20 of torchattacks."""
    from experiments import peers

    threat, draws = what.experiment.threat, 20
    clean = judged(what, what.images, jax.random.key(1), 50)
    (attack,) = suites.rand(threat, steps=settings.steps, draws=draws).values()
    drive = evaluation.packed(
        attack, what.logits_fn_of, what.devices, batch_size=what.batch_size, early=False
    )
    images = what.images.copy()
    for found in drive(what.variables, jax.random.key(2), what.batches()):
        images[found.batch.index] = found.image
    size = norms.name_of(threat.norm)
    there = peers.run(
        "torchattacks", "eot_pgd", what.twin, what.images, what.labels, norm=size,
        radius=threat.radius, steps=20, draws=draws, batch_size=what.batch_size,
        threads=settings.threads,
    )  # fmt: skip
    for name, candidates, number in (
        ("clean", what.images, 50), ("ours: rand, its own figure (20 draws)", images, draws),
        ("ours: rand, 50 fresh draws", images, 50),
        ("torchattacks: EOT-PGD-20, 50 fresh draws", there, 50),
    ):  # fmt: skip
        verdict = judged(what, candidates, jax.random.key(100 + number), number)
        share = np.where(verdict.allowed, verdict.share, clean.share)
        error = np.sqrt(np.sum(share * (1 - share)) / (number - 1)) / len(share)
        yield {
            "attack": name, "images": len(share), "draws": number,
            "accuracy_of_one_draw": float(np.mean(share)), "standard_error": float(error),
            "accuracy_of_the_mean": float(np.mean(evaluation.worst_case(clean, [verdict]))),
        }  # fmt: skip
