"""The ladder of adaptive attacks on a defended model, as attacks on forms of the model.

    python -m experiments.evaluate --config=experiments/configs/ladder.py --workdir=RUN
    rain_jax.evaluate_ladder(model, images, labels, threat, surrogates={"smooth": other})

From attacks that do not use the defence to attacks that use all of it. The rungs follow from the
forms of the model: every surrogate is attacked, a random model in expectation, an ensemble member
by member, too. The worst case over all rungs is the number, if the checks (`validity`) say that the
attacks worked at all (Athalye et al., arXiv:1802.00420; Carlini et al., arXiv:1902.06705; Tramer et
al., arXiv:2002.08347).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from rain_jax import attacks, norms
from rain_jax.attacks import suites
from rain_jax.checks import UsageError, one_of, within
from rain_jax.gradients import eot
from rain_jax.losses import cross_entropy, margin
from rain_jax.types import Attack, Iteration, Threat

# The classifier taken out of its defence; the undefended one at the defence's size; and another
# run, by its folder.
UNDEFENDED, GRAY, RUN = "classifier", "gray", "run:"
# What knows nothing of the defence; what sees no gradient; what is no attack.
OBLIVIOUS, BLACK_BOX, CONTROLS = ("transfer", GRAY), ("square", "rays"), ("noise", "far")
# What knows another model of the same kind.
ELSEWHERE = "elsewhere"
# Of a ladder's settings those that a rung turns on; the others choose among rungs.
BUDGET = ("steps", "draws", "restarts", "queries", "answers")
# So many times the threat's radius nothing should stand. In L-inf no less than the first, at which
# photographs can be made what one likes, and no more than the second: all pixels can be grey there.
FAR_TIMES, FAR, GREY = 8.0, 64 / 255, 0.5


class Forms(NamedTuple):
    """The forms of a model that attacks may be run on, by name, beside the model itself."""

    random: bool  # whether the model draws
    # `UNDEFENDED`, `GRAY` and surrogates of the defence, those that there are.
    names: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()  # the ways to attack an ensemble
    fixed: frozenset[str] = frozenset()  # the forms that draw nothing, also of a random model
    # The forms that are known to draw by themselves, also of a model that does not.
    drawing: frozenset[str] = frozenset()


class Rung(NamedTuple):
    """An attack of the ladder."""

    attack: Attack | Iteration
    # The form of the model that it is run on, where that is not the one that is judged: one of
    # `Forms`, or `RUN` and a folder.
    through: str | None = None
    # Another threat than the evaluation's. Such a rung is a check, and no part of the worst case.
    threat: Threat | None = None


@dataclass(frozen=True)
class Ladder:
    """How much each rung may spend.

    Steps are of `radius / 10`, `draws` those of a random model in each step, `restarts` those of
    the attack that does without draws (of twice the steps and half their size). `queries` are
    passes of the model: of a random one Square takes the mean of `answers` for each of its tries,
    and so has fewer of them. `sweep_draws` and
    `sweep_steps` show how accuracy falls with either, empty for none. `surrogates` names the forms
    of the defence that are climbed, all by default. `elsewhere` is the folder of a run of the same
    config with another seed, whose adversarial images are tried. `without` are rungs that are left
    out; what is printed then is the worst case over the others.
    """

    steps: int = 100
    draws: int = 20
    restarts: int = 5
    queries: int = 5000
    answers: int = 10
    sweep_draws: tuple[int, ...] = (1, 5, 20)
    sweep_steps: tuple[int, ...] = (10, 50, 100)
    surrogates: tuple[str, ...] | None = None
    elsewhere: str | None = None
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in BUDGET:
            within(name, getattr(self, name), 1)
        for name in ("sweep_draws", "sweep_steps"):
            within(name, getattr(self, name) or 1, 1)


def rungs(
    ladder: Ladder, threat: Threat, forms: Forms, before: str | None = None
) -> dict[str, Rung]:
    """The attacks of the ladder by name, in the order in which they are run.

    `before` is the folder of the run that the classifier began with, whose model is without the
    defence; where there is none that is the classifier taken out of it. Raises `UsageError` about
    a field of `ladder` that asks for a rung or a surrogate that there is not.
    """
    random = forms.random
    inexact = eot(ladder.draws) if random else None
    size = threat.radius / 10

    def pgd(steps: int, on: Threat = threat, **more: Any) -> Iteration:
        return attacks.pgd(on, steps=steps, step_size=on.radius / 10, **more)

    found = {"noise": Rung(attacks.noise(threat))}
    undefended = UNDEFENDED if before is None else f"{RUN}{before}"
    gray = GRAY if GRAY in forms.names else UNDEFENDED

    def along(name: str) -> Any:
        """How gradients of a form are estimated: along the mean where it draws."""
        return eot(ladder.draws) if name in forms.drawing else None

    if UNDEFENDED in forms.names:  # without a defence there is none that an attack could miss
        found["transfer"] = Rung(pgd(40, estimator=along(undefended)), undefended)
    if gray in forms.names and gray != undefended:
        found[GRAY] = Rung(pgd(40, estimator=along(gray)), gray)
    found |= {
        "fgsm": Rung(attacks.fgsm(threat, estimator=inexact)),
        "pgd": Rung(
            attacks.pgd(
                threat, steps=2 * ladder.steps, step_size=size / 2, restarts=ladder.restarts
            )
        ),
    }
    if random:
        for name, loss in ("eot_ce", cross_entropy), ("eot_margin", margin):
            found[name] = Rung(pgd(ladder.steps, estimator=inexact, loss=loss))
        found |= {
            name: Rung(member)
            for name, member in suites.rand(threat, steps=ladder.steps, draws=ladder.draws).items()
        }
        if threat.norm is norms.linf:
            found |= _official(ladder, threat)
    elif threat.norm is not norms.l1:
        whole = suites.standard(threat, steps=ladder.steps, queries=ladder.queries)
        found |= {name: Rung(member) for name, member in whole.items() if name != "square"}
    for name in _surrogates(ladder, forms):
        taken = (*found, *OBLIVIOUS, *BLACK_BOX, *CONTROLS, ELSEWHERE)
        if name in taken or name.startswith("official"):
            raise UsageError(
                f"surrogates={name!r}: expected another name: a rung of the ladder has this one"
            )
        needed = along(name) or (None if name in forms.fixed else inexact)
        found[name] = Rung(pgd(ladder.steps, estimator=needed, loss=margin), name)
    for name in forms.votes:
        found[name] = Rung(pgd(ladder.steps, estimator=inexact, loss=margin), name)
    if ladder.elsewhere is not None:
        found[ELSEWHERE] = Rung(
            pgd(ladder.steps, estimator=inexact, loss=margin, keep="last"),
            f"{RUN}{ladder.elsewhere}",
        )
    if threat.norm is not norms.l1:
        answers = ladder.answers if random else 1
        found["square"] = Rung(attacks.square(threat, queries=ladder.queries, answers=answers))
    if threat.norm is norms.linf:
        found["rays"] = Rung(attacks.rays(threat, queries=ladder.queries))
    far = FAR_TIMES * threat.radius
    if threat.norm is norms.linf:
        far = min(GREY, max(FAR, far))
    distant = threat._replace(radius=far)
    found["far"] = Rung(pgd(ladder.steps, distant, estimator=inexact, loss=margin), None, distant)
    for name in ladder.without:
        one_of("without", name, [name for name in found if name != "far"])
    white = found.keys() - {*OBLIVIOUS, *BLACK_BOX, *CONTROLS, ELSEWHERE, *ladder.without}
    if not any(not name.startswith("official") for name in white):
        raise UsageError(
            f"without={ladder.without!r}: expected at least one rung to "
            "be left that knows the gradients"
        )
    return {name: look for name, look in found.items() if name not in ladder.without}


def _official(ladder: Ladder, threat: Threat) -> dict[str, Rung]:
    """RAIN's attacks as its authors' code sets them, on logits in the place of probabilities.

    Twice as many draws as elsewhere: 40 where those are 20. They tell what such an evaluation would
    have said. One at another radius than the threat's is no part of the worst case.
    """
    wide, usual = (threat._replace(radius=radius / 255) for radius in (16, 8))
    estimator = eot(2 * ladder.draws)

    def look(on: Threat, size: float, **more: Any) -> Rung:
        attack = attacks.pgd(on, steps=40, step_size=size, start="clean", keep="last", **more)
        return Rung(attack, None, None if math.isclose(on.radius, threat.radius) else on)

    return {
        "official_pgd": look(wide, 1 / 255),
        "official_eot": look(usual, 2 / 255, estimator=estimator),
    }


def _surrogates(ladder: Ladder, forms: Forms) -> tuple[str, ...]:
    known = tuple(name for name in forms.names if name not in (UNDEFENDED, GRAY))
    if ladder.surrogates is None:
        return known
    for name in ladder.surrogates:
        if name not in known:
            raise UsageError(f"surrogates={name!r}: expected some of {', '.join(known)}")
    return ladder.surrogates
