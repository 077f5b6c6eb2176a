"""What an evaluation looks at: attacks, each on some form of the model and within some threat."""

import math
from typing import Any, NamedTuple

from rain_jax import attacks, norms
from rain_jax.attacks import suites
from rain_jax.checks import UsageError, one_of, pixel_distance, within
from rain_jax.config import options
from rain_jax.config.schema import convert, make
from rain_jax.types import Attack, Iteration, Threat


class Column(NamedTuple):
    """A column: an attack, and what it is set against."""

    attack: Attack | Iteration
    # The form of the model that it climbs, where that is not the one that is judged: what
    # `networks.Assembly.through` takes.
    through: str | None = None
    # Another threat than the experiment's. Such a column is a check, and no part of the worst case.
    threat: Threat | None = None


def attack(where: str, spec: Any, threat: Threat) -> Attack:
    """An attack section as an attack on `threat`."""
    return make(where, attacks, spec, threat=threat)


def minimum_norm(where: str, spec: Any, threat: Threat) -> Attack:
    """An attack section as a minimum-norm attack; others are refused: they need a radius."""
    name = spec.get("name") if isinstance(spec, dict) else None
    if name is not None:
        one_of(f"{where}.name", name, attacks.minimum_norm())
    return attack(where, spec, threat)


def radius(where: str, value: float, threat: Threat) -> float:
    """A radius in pixel values of [0, 1], measured in the threat's norm."""
    # In L2 and L1 distances add up over pixels, so larger ones make sense there.
    return (
        pixel_distance(where, value)
        if threat.norm is norms.linf
        else within(where, value, 0.0, 1e4)
    )


def columns(evaluation: options.Evaluation, threat: Threat) -> dict[str, Column]:
    """The attacks of an evaluation's section, and the members of its suite, in their order."""
    found: dict[str, Column] = {}
    for name, column in evaluation.attacks.items():
        where = f"config.evaluation.attacks.{name}"
        if not isinstance(column, dict):
            raise UsageError(f"{where}={column!r}: expected a section, dict(..)")
        own = {key: value for key, value in column.items() if key not in ("through", "radius")}
        through = convert(f"{where}.through", column.get("through"), str | None)
        other = convert(f"{where}.radius", column.get("radius"), float | None)
        on = None
        if other is not None:
            on = threat._replace(radius=radius(f"{where}.radius", other, threat))
        found[name] = Column(attack(where, own, on or threat), through, on)
    # Configs come sorted by name; what costs fewer steps should spare the others work.
    found = dict(sorted(found.items(), key=lambda item: getattr(item[1].attack, "steps", 0)))
    if evaluation.suite is not None:
        members = make("config.evaluation.suite", suites, evaluation.suite, threat=threat)
        for name, member in members.items():
            if name in found:
                raise UsageError(f"config.evaluation.attacks.{name}: expected another name: the "
                                 "suite has a column of this one")  # fmt: skip
            found[name] = Column(member)
    return found


def distances(evaluation: options.Evaluation, threat: Threat) -> dict[str, Attack]:
    """The minimum-norm attacks of an evaluation's section, which know no radius."""
    boundless = threat._replace(radius=math.inf)
    return {
        name: minimum_norm(f"config.evaluation.distances.{name}", column, boundless)
        for name, column in evaluation.distances.items()
    }
