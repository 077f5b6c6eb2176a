"""Whether the attacks of a ladder worked: a number whose checks fail measures nothing."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import attacks, data, evaluation
from rain_jax.audit.ladder import BLACK_BOX, CONTROLS, ELSEWHERE, OBLIVIOUS, Ladder
from rain_jax.evaluation import Evaluation, EvaluationRun
from rain_jax.evaluation.audit import LEFT, SILENT, Check, above
from rain_jax.evaluation.probe import Slopes, slopes
from rain_jax.gradients import eot, exact
from rain_jax.logs import Progress
from rain_jax.losses import margin
from rain_jax.parallel import image_keys, round_up
from rain_jax.types import Array, Batch, Iteration, Key, PyTree

# Images whose gradients are looked at, and with which the sweep is made.
LOOKED_AT = 256


class Validity(NamedTuple):
    """The checks of a ladder, and the sweep over draws and steps."""

    checks: list[Check]
    sweep: list[dict[str, Any]]

    @property
    def valid(self) -> bool:
        """Whether the number may be printed."""
        return all(check.passed for check in self.checks)

    def record(self) -> dict[str, Any]:
        """What evaluation.json has of it."""
        return {
            "valid": self.valid,
            "checks": [check._asdict() for check in self.checks],
            "sweep": self.sweep,
        }

    def notes(self) -> tuple[str, ...]:
        """For people: the checks, and in which way the number is void if it is."""
        lines = [f"{'ok  ' if c.passed else 'FAILS'} {c.name}: {c.told}" for c in self.checks]
        if not self.valid:
            lines.append("no worst case is given: the attacks did not work as they should")
        return tuple(lines)


def of_run(planned: Evaluation, budget: Ladder, measured: EvaluationRun) -> Validity:
    """Whether the attacks of a ladder worked, by what they came to and by a sweep made now."""
    with Progress(f"{planned.name}: checks", 1, unit="set", shown=planned.shown) as bar:
        seen, lines = looked_into(planned, budget, planned.key_of("proof"))
        bar.advance(1)
    accuracy = {title: float(np.mean(share)) for title, share in measured.robust.items()}
    margins = {
        title: float(np.mean(column.judgement.margin)) for title, column in measured.columns.items()
    }
    images = len(measured.columns["clean"].judgement.index)
    return Validity(checks(accuracy, margins, images, seen, lines), lines)


def sweep(
    attack_of: Callable[[int], Iteration],
    logits_fn_of: evaluation.LogitsFnOf,
    judge: Callable[..., Iterable[evaluation.Verdicts]],
    variables: PyTree,
    key: Key,
    batches: list[Batch],
    draws: tuple[int, ...],
    steps: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Accuracy for each number of draws and of steps, by one program for each number of draws.

    The run of so many steps is the first part of the longest, so `attack_of(draws)` must not turn
    on how many steps it will have.
    """
    lines = []
    for number in draws:
        begin, advance, best = stages(attack_of(number), logits_fn_of)
        found: dict[int, list[evaluation.Found]] = {stop: [] for stop in sorted(steps)}
        for batch in batches:
            (clean,) = evaluation.as_they_are([batch])
            image = jnp.asarray(clean.image)
            keys = image_keys(jax.random.fold_in(key, number), jnp.asarray(clean.batch.index))
            states = begin(variables, keys, image, jnp.asarray(clean.batch.label))
            done = 0
            for stop in found:
                states = advance(variables, states, stop - done)
                done = stop
                found[stop].append(clean._replace(image=np.asarray(best(variables, states))))
        for stop, some in found.items():
            verdicts = evaluation.join([v.judgement for v in judge(variables, key, some)])
            share = np.where(verdicts.allowed, verdicts.share, 1.0)
            lines.append({"draws": number, "steps": stop, "accuracy": float(np.mean(share))})
    return lines


def stages(attack: Iteration, logits_fn_of: evaluation.LogitsFnOf) -> tuple[Any, Any, Any]:
    """An attack that stops along the way: `(begin, advance, best)`, each a program for a batch.

    `advance(variables, states, steps)` takes a traced number of steps, so that every stop is the
    same program.
    """

    @jax.jit
    def begin(variables: PyTree, keys: Key, images: Array, labels: Array) -> PyTree:
        logits_fn = logits_fn_of(variables)
        return jax.vmap(lambda k, x, y: attack.init(k, logits_fn, x, y))(keys, images, labels)

    @partial(jax.jit, donate_argnums=1)
    def advance(variables: PyTree, states: PyTree, steps: Array) -> PyTree:
        step = jax.vmap(lambda state: attack.step(logits_fn_of(variables), state))
        return jax.lax.fori_loop(0, steps, lambda _, states: step(states), states)

    @jax.jit
    def best(variables: PyTree, states: PyTree) -> Array:
        return jax.vmap(lambda state: attack.best(logits_fn_of(variables), state)[0])(states)

    return begin, advance, best


def checks(
    accuracy: Mapping[str, float],
    margins: Mapping[str, float],
    images: int,
    seen: Slopes,
    lines: Iterable[Mapping[str, Any]] = (),
) -> list[Check]:
    """What must be so before a number is printed.

    `accuracy` is by rung, "clean" among them, and so are the mean `margins`; `lines` are a sweep's.
    That black boxes find more than images made without the model is not among them: with a small
    budget they need not, and then the black box is weak and not the gradient.
    """
    others = (*OBLIVIOUS, *BLACK_BOX, *CONTROLS, ELSEWHERE, "clean", "worst case")
    white = [n for n in accuracy if n not in others and not n.startswith("official")]
    strongest = min(white, key=accuracy.__getitem__)
    lowest = accuracy[strongest]
    found = [
        Check(
            f"{other} is no better than white-box",
            not above(lowest, accuracy[other], images),
            f"{strongest} {100 * lowest:.1f} %, {other} {100 * accuracy[other]:.1f} %",
        )
        for other in (*BLACK_BOX, *OBLIVIOUS, ELSEWHERE, "noise")
        if other in accuracy
    ]
    left = accuracy["far"]
    found.append(Check("nothing stands far away", left <= LEFT, f"{100 * left:.1f} % left"))
    rise = margins[strongest] - margins["clean"]
    found.append(Check("the margin rises", rise > 0, f"by {rise:.3g} on average, by {strongest}"))
    lengths = np.asarray(seen.length)
    silent = float(np.mean(~(np.isfinite(lengths) & (lengths > 0))))
    cosine = float(np.mean(seen.cosine))
    found.append(
        Check(
            "images have gradients",
            silent <= SILENT,
            f"{100 * silent:.1f} % without a finite one; "
            f"cosine of two independent estimates {cosine:.2f}",
        )
    )
    lines = list(lines)
    weaker = [
        (less, more)
        for less in lines
        for more in lines
        if more["draws"] >= less["draws"]
        and more["steps"] >= less["steps"]
        and above(more["accuracy"], less["accuracy"], min(images, LOOKED_AT))
    ]
    if lines:
        told = [
            f"{less['draws']} x {less['steps']} leaves {100 * less['accuracy']:.1f} %, "
            f"{more['draws']} x {more['steps']} {100 * more['accuracy']:.1f} %"
            for less, more in weaker
        ]
        found.append(
            Check(
                "more draws or steps do not weaken the attack",
                not weaker,
                told[0] if told else f"in {len(lines)} cells",
            )
        )
    return found


def looked_into(
    planned: Evaluation, budget: Ladder, key: Key
) -> tuple[Slopes, list[dict[str, Any]]]:
    """The gradients of some of an evaluation's images, and the sweep on the same ones."""
    model, threat, devices = planned.model, planned.threat, planned.devices
    of, random = evaluation.logits_fn_of(model), model.random
    size = round_up(min(planned.batch_size, LOOKED_AT), devices.size)
    batches = list(data.evaluation_batches(data.first(planned.source, LOOKED_AT), size))
    variables = devices.replicate(model.variables)
    estimator = eot(budget.draws) if random else exact()
    program = jax.jit(lambda v, batch: slopes(estimator, of(v), key, batch))
    parts = []
    for batch in batches:
        seen = program(variables, batch)
        parts.append(
            jax.tree.map(lambda leaf, v=batch.valid: np.asarray(leaf)[np.asarray(v)], seen)
        )
    seen = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    if not (budget.sweep_draws and budget.sweep_steps):
        return seen, []

    rules = evaluation.Rules(threat, planned.draws, planned.eight_bit)

    def attack_of(number: int) -> Iteration:
        return attacks.pgd(
            threat, steps=max(budget.sweep_steps), step_size=threat.radius / 10, loss=margin,
            estimator=eot(number) if random else None,
        )  # fmt: skip

    lines = sweep(
        attack_of, of, evaluation.judging(of, rules, devices, batch_size=size), variables, key,
        batches, budget.sweep_draws if random else (1,), budget.sweep_steps,
    )  # fmt: skip
    return seen, lines
