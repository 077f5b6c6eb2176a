"""What RobustBench's leaderboard asks of an entry, as far as an evaluation knows it."""

from typing import Any

import numpy as np

from rain_jax.config import build
from rain_jax.config.schema import filled_member
from rain_jax.attacks import suites
from rain_jax.evaluation import EvaluationRun


def model_info(experiment: build.Experiment, measured: EvaluationRun) -> dict[str, Any]:
    """The fields of RobustBench's `ModelInfo`, accuracies in per cent; None where only people know.

    `autoattack_acc` is there where all of AutoAttack ran, at its own budgets, and nothing beside
    it: on how many images says the record. Common corruptions are another command's.
    """
    spec = experiment.config
    evaluated = experiment.evaluation
    suite = "rand" if experiment.network.random else "standard"
    whole = evaluated.suite == filled_member(suites, {"name": suite}) and not evaluated.attacks
    accuracy = {title: 100 * float(np.mean(share)) for title, share in measured.robust.items()}
    return {
        **dict.fromkeys(("link", "name", "authors", "venue", "reported", "footnote")),
        "additional_data": spec["data"]["extra"] is not None,
        # Of one answer: a member of an ensemble is a pass of its own.
        "number_forward_passes": max(1, len(experiment.assembly.members)),
        "dataset": experiment.splits.test.name.removeprefix("tfds:"),
        "architecture": spec["network"]["name"],
        "eps": float(experiment.threat.radius),
        "clean_acc": accuracy["clean"],
        "corruptions_acc": None,
        "autoattack_acc": list(accuracy.values())[-1] if whole else None,
    }
