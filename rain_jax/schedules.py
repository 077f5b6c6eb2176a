"""Learning-rate schedules, by the names that configs use: step -> rate, from optax's parts.

Every maker is given the whole run's `total_steps` and the `steps_per_epoch`; lengths and
milestones are in epochs (fractions welcome) or, with `unit="steps"`, in steps.
"""

from typing import Literal

import optax

from rain_jax.checks import UsageError, one_of, within

__all__ = ["constant", "cosine", "one_cycle", "piecewise"]

Unit = Literal["epochs", "steps"]


def _steps(where: str, length: float, unit: Unit, steps_per_epoch: int) -> int:
    one_of("unit", unit, ("epochs", "steps"))
    within(where, length, 0.0)
    return round(length * steps_per_epoch) if unit == "epochs" else round(length)


def _rise(warmup: float, unit: Unit, total_steps: int, steps_per_epoch: int) -> int:
    """The steps of a warm-up, which must leave some of the run."""
    rise = _steps("warmup", warmup, unit, steps_per_epoch)
    if rise >= total_steps:
        raise UsageError(
            f"warmup={warmup:g} {unit}: expected less than the run's {total_steps} steps"
        )
    return rise


def _warmed(rest: optax.Schedule, peak: float, steps: int) -> optax.Schedule:
    """A linear rise from zero to `peak` over `steps`, then `rest` from its own beginning."""
    if not steps:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), rest], [steps])


def constant(
    total_steps: int, steps_per_epoch: int, *, peak: float, warmup: float = 0.0,
    unit: Unit = "epochs",
) -> optax.Schedule:  # fmt: skip
    """`peak` throughout, after a linear rise over `warmup`."""
    within("peak", peak, above=0.0)
    rise = _rise(warmup, unit, total_steps, steps_per_epoch)
    return _warmed(optax.constant_schedule(peak), peak, rise)


def cosine(
    total_steps: int, steps_per_epoch: int, *, peak: float, warmup: float = 0.0,
    final: float = 0.0, unit: Unit = "epochs",
) -> optax.Schedule:  # fmt: skip
    """Half a cosine from `peak` down to `final` (Loshchilov & Hutter), after a linear `warmup`."""
    within("peak", peak, above=0.0)
    within("final", final, 0.0, peak)
    rise = _rise(warmup, unit, total_steps, steps_per_epoch)
    fall = optax.cosine_decay_schedule(peak, total_steps - rise, alpha=final / peak)
    return _warmed(fall, peak, rise)


def piecewise(
    total_steps: int, steps_per_epoch: int, *, peak: float, at: tuple[float, ...],
    factor: float = 0.1, warmup: float = 0.0, unit: Unit = "epochs",
) -> optax.Schedule:  # fmt: skip
    """`peak`, times `factor` at every milestone in `at`, which are counted from the run's start."""
    within("peak", peak, above=0.0)
    within("factor", factor, above=0.0)
    rise = _rise(warmup, unit, total_steps, steps_per_epoch)
    marks = [_steps("at", mark, unit, steps_per_epoch) for mark in at]
    if marks != sorted(set(marks)) or (marks and marks[0] <= rise):
        raise UsageError(f"at={tuple(at)}: expected rising milestones after the warm-up")
    fall = optax.piecewise_constant_schedule(peak, {mark - rise: factor for mark in marks})
    return _warmed(fall, peak, rise)


def one_cycle(
    total_steps: int, steps_per_epoch: int, *, peak: float, rise: float = 0.4,
    final: float = 0.0,
) -> optax.Schedule:  # fmt: skip
    """Linear from zero to `peak` at the fraction `rise` of the run, linear down to `final`.

    The "cyclic" schedule of fast adversarial training (Wong et al., arXiv:2001.03994).
    """
    within("peak", peak, above=0.0)
    within("rise", rise, above=0.0, below=1.0)
    within("final", final, 0.0, peak)
    top = max(1, round(rise * total_steps))
    fall = optax.linear_schedule(peak, final, max(1, total_steps - top))
    return _warmed(fall, peak, top)
