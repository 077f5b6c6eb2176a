"""The ladder of adaptive attacks on any model, in one call."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from rain_jax.adapters import as_model
from rain_jax.audit import validity
from rain_jax.audit.ladder import GRAY, RUN, UNDEFENDED, Forms, Ladder, Rung, rungs
from rain_jax.checks import UsageError
from rain_jax.evaluation import AttackColumn, record
from rain_jax.evaluation.call import (
    attack_identity,
    classes_of,
    end,
    identity_of,
    of_the_run,
    prepare,
)
from rain_jax.evaluation.result import Result
from rain_jax.evaluation.resume import digest_of
from rain_jax.parallel import Devices
from rain_jax.types import Key, Model, Threat


@dataclass(frozen=True, repr=False)
class LadderResult(Result):
    """What a ladder came to: each attack by itself, their worst case, and whether they worked.

    `sweep` has a short attack's accuracy for several numbers of steps and draws.
    """

    sweep: tuple[dict[str, Any], ...] = ()

    @property
    def valid(self) -> bool:
        """Whether every check passed; otherwise no worst case is given."""
        return all(check.passed for check in self.checks or ())

    @property
    def robust(self) -> dict[str, np.ndarray]:
        """By attack, `clean` first and the "worst case" last: [N] bool, correct after it.

        Of a random model float [N], the share of the draws that are correct.
        """
        found = self.run.robust
        return {title: found[title] for title in found if self.valid or title != "worst case"}

    @property
    def robust_accuracy(self) -> float:
        """The worst case over all attacks; not a number where a check failed."""
        counted = [title for title in self.robust if title not in self.run.checks]
        return self.accuracy[counted[-1]] if self.valid else math.nan

    def _notes(self) -> list[str]:
        return [f"! {line}" for line in self.warnings] + list(
            validity.Validity(list(self.checks or ()), list(self.sweep)).notes()
        )


def evaluate_ladder(
    model: Any,
    images: Any,
    labels: Any,
    threat: Threat,
    ladder: Ladder | None = None,
    *,
    surrogates: Mapping[str, Any] | None = None,
    undefended: Any = None,
    gray: Any = None,
    key: Key | None = None,
    batch_size: int = 256,
    draws: int | None = None,
    eight_bit: bool = False,
    random: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
    replace: bool = False,
    devices: Devices | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> LadderResult:
    """How robust a defended model is to attacks that use more and more of its defence.

        rain_jax.evaluate_ladder(
            defended, images, labels, threat,
            surrogates={"smooth": smooth}, undefended=classifier,
        )

    Images are found by every attack on its own, and judged by `model`. A number is given where the
    attacks worked: more steps or draws do not weaken them, black boxes and transferred images do no
    better than gradients, nothing stays correct at a large radius, images have gradients.

    Args:
      model: what is judged, as `rain_jax.evaluate` takes it.
      images, labels, threat: as `rain_jax.evaluate` takes them.
      ladder: what each attack may spend, and which are left out; by default all, at the budgets of
        `Ladder`. Its `surrogates` are names of those given here, and it has no `elsewhere`.
      surrogates: models by name whose gradients stand in for the judged model's, where those are
        useless: with a smooth step for a step that is not, with a wider bottleneck (BPDA).
      undefended: the classifier without its defence; images that mislead it are tried ("transfer").
      gray: what an attacker could build who has seen no weights of the defence.
      key, batch_size, draws, eight_bit, random, folder, replace, devices, name, progress: as
        `rain_jax.evaluate` has them.

    Returns a result whose `robust_accuracy` is the worst case, or nan where a check failed.

    Raises `UsageError` for arguments of another kind.
    """
    ladder = Ladder() if ladder is None else ladder
    if not isinstance(ladder, Ladder):
        raise UsageError(f"ladder={ladder!r:.60}: expected a rain_jax.audit.Ladder")
    surrogates = {} if surrogates is None else surrogates
    if not isinstance(surrogates, Mapping) or not all(isinstance(n, str) for n in surrogates):
        raise UsageError(f"surrogates={surrogates!r:.60}: expected models by name")
    if ladder.elsewhere is not None:
        raise UsageError(
            f"ladder.elsewhere={ladder.elsewhere!r}: expected None: a run's folder is for "
            "python -m experiments.evaluate; give the other model among the surrogates"
        )
    given: dict[str, Any] = {}
    for title, form in ((UNDEFENDED, undefended), (GRAY, gray)):
        if form is not None:
            given[title] = form
    for title, form in surrogates.items():
        if title in (UNDEFENDED, GRAY, "clean", "worst case") or title.startswith(RUN):
            raise UsageError(f"surrogates: expected another name than {title!r}, which is taken")
        given[title] = form
    prepared = prepare(
        model, images, labels, threat,
        partial(_columns, ladder, given, kept=folder is not None),
        key=key, batch_size=batch_size, draws=draws, eight_bit=eight_bit, cascade=False,
        random=random, recorded=["ladder", asdict(ladder)], slopes=False, folder=folder,
        replace=replace, devices=devices, name=name, progress=progress,
    )  # fmt: skip
    evaluation, found = prepared.evaluation, prepared.warnings
    run = evaluation()
    found += of_the_run(run)
    checked = validity.of_run(evaluation, ladder, run)
    content = record.described(evaluation, run) | {"ladder": checked.record()}
    content["flagged"] = not checked.valid
    if not checked.valid:
        content["worst_case"] = None
    end(evaluation, run, content, found)
    return LadderResult(
        evaluation.name, evaluation.threat, prepared.images, run, tuple(found),
        tuple(checked.checks), tuple(checked.sweep),
    )  # fmt: skip


def _columns(
    ladder: Ladder, given: Mapping[str, Any], threat: Threat, model: Model, images: np.ndarray,
    labels: np.ndarray, classes: int, *, kept: bool,
) -> dict[str, AttackColumn]:  # fmt: skip
    """The rungs of the ladder as columns of an evaluation."""
    shape = images.shape[1:]
    forms = {title: _form(title, one, shape, classes) for title, one in given.items()}
    drawing = frozenset(title for title, one in forms.items() if one.random)
    fixed = frozenset(forms) - drawing
    known = Forms(model.random, tuple(forms), (), fixed, drawing)

    def column(title: str, rung: Rung) -> AttackColumn:
        through = rung.through
        form = None if through is None else forms[through]
        settings = None
        if kept:
            settings = [attack_identity(rung.attack, shape, classes)]
            if form is not None:
                settings += [*identity_of(form, images, labels), digest_of(form.variables)]
        return AttackColumn(
            rung.attack, None if form is None else lambda: form, rung.threat, settings,
            transfer=through in (UNDEFENDED, GRAY),
            through=() if through is None else (through,),
            fixed=through in fixed,
        )  # fmt: skip

    return {title: column(title, rung) for title, rung in rungs(ladder, threat, known).items()}


def _form(title: str, form: Any, shape: tuple[int, ...], classes: int) -> Model:
    try:
        model = as_model(form, shape)
    except UsageError as error:
        raise UsageError(f"{title}: {error}") from None
    if (own := classes_of(model, shape)) != classes:
        raise UsageError(f"{title} gives {own} logits: expected {classes}, as the model gives")
    return model
