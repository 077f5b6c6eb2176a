"""Who attacks: our attacks and the peers' at the same budgets, before the same judge."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from experiments.comparing.subject import Subject
from rain_jax import attacks, evaluation, norms
from rain_jax.attacks import suites
from rain_jax.types import Iteration, Key


class Side(NamedTuple):
    """An attack of ours, or a suite: each member on what the ones before it left standing."""

    drives: dict[str, Callable[..., Iterator[evaluation.Found]]]
    judge: Callable[..., Iterator[evaluation.Verdicts]]

    def __call__(self, what: Subject, key: Key) -> np.ndarray:
        """Who stands, bool [N]."""
        stood = evaluation.cascade(
            self.drives, self.judge, what.variables, key, what.batches, len(what.labels)
        )
        return list(stood.values())[-1]


def ours(what: Subject, members: dict[str, Iteration]) -> Side:
    """Compiled at its first call, once for all."""
    rules = evaluation.Rules(what.experiment.threat)
    on, size = what.devices, what.batch_size
    return Side(
        {
            name: evaluation.packed(attack, what.logits_fn_of, on, batch_size=size)
            for name, attack in members.items()
        },
        evaluation.judging(what.logits_fn_of, rules, on, batch_size=size),
    )


def our_attacks(what: Subject, settings: argparse.Namespace) -> dict[str, dict[str, Iteration]]:
    """Our side of every comparison, at the budgets that the peers get."""
    threat, steps = what.experiment.threat, settings.steps
    standard = suites.standard(threat, steps=steps, queries=settings.queries)
    pgd = attacks.pgd(threat, steps=40, step_size=threat.radius / 10)
    return {**{name: {name: a} for name, a in standard.items()}, "pgd": {"pgd": pgd},
            "standard": standard}  # fmt: skip


def theirs(
    what: Subject, peer: str, attack: str, settings: argparse.Namespace, seed: int = 0
) -> np.ndarray:  # fmt: skip
    """A peer's images."""
    from experiments import peers

    return peers.run(
        peer, attack, what.twin, what.images, what.labels,
        norm=norms.name_of(what.experiment.threat.norm), radius=what.experiment.threat.radius,
        seed=seed, batch_size=what.batch_size, threads=settings.threads,
        steps=40 if attack == "pgd" else settings.steps, queries=settings.queries,
    )  # fmt: skip


def judged(what: Subject, images: np.ndarray, key: Key, draws: int = 1) -> evaluation.Judgement:
    """Any images, before our judge."""
    rules = evaluation.Rules(what.experiment.threat, draws)
    judge = evaluation.judging(what.logits_fn_of, rules, what.devices, batch_size=what.batch_size)
    zeros = np.zeros(len(images), np.int32)
    (batch,) = what._replace(batch_size=len(images)).batches()
    found = evaluation.Found(batch, images, zeros.astype(np.float32), zeros, zeros)
    return evaluation.join([v.judgement for v in judge(what.variables, key, [found])])


@contextlib.contextmanager
def timed(into: dict[str, float], who: str) -> Iterator[None]:
    """CPU seconds of what runs inside: one run each, compiling included, so a hint and no ratio."""
    began = time.process_time()
    yield
    into[who] = round(time.process_time() - began, 1)
