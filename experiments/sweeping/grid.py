"""What a sweep varies: axes, the cells that they span, and the config of each cell."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.cli import value_of
from rain_jax.audit import ladder
from rain_jax.checks import UsageError, nearest, one_of, within
from rain_jax.config import attack_columns, networks, options, tree
from rain_jax.config.schema import call, filled
from rain_jax.methods.rat import carrying
from rain_jax.types import Network, Threat

Cell = dict[str, Any]  # dotted key -> value, in the order of the axes
# Axes that are no key of a config: the folder of a run.
RUN = "run"
_MOST = 1_000_000  # cells; more is a slip


@dataclass(frozen=True)
class Sweep:
    """What varies, as the section `sweep`.

    `axes` maps dotted keys of the config, "threat.radius" or "evaluation.attacks.pgd.steps", to
    values; "run" stands for folders of trained runs. Cells are all combinations, or with `together`
    those of the first values, of the second, and so on. Each is one column of an evaluation: that
    of `attack`, a name in `evaluation.attacks`, which may be left out where there is one.

    With `warm` an ascent at a radius begins where the one at the radius before has ended, and the
    images that broke a fixed model there are broken here: fewer passes, and a curve that only goes
    down. With `train` each cell is a run of its own, trained and evaluated in `cells/`, and axes
    may be any keys. With `side_by_side` cells that differ only in numbers which a step can take as
    data, such as seeds, are trained by one program. `shard` = (i, n) does the i-th of n shares, 1
    to n.
    """

    axes: dict[str, Any]
    attack: str | None = None
    together: bool = False
    warm: bool = False
    train: bool = False
    side_by_side: bool = False
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        within("config.sweep.shard", self.shard[1], 1)
        within("config.sweep.shard", self.shard[0], 1, self.shard[1])
        if self.side_by_side and not self.train:
            raise UsageError("config.sweep.side_by_side: expected config.sweep.train beside it")
        if not self.axes:
            raise UsageError(
                "config.sweep.axes is missing: expected what varies, such as "
                "--config.sweep.axes.threat.radius='(0.1, 0.2)'"
            )


class Asked(NamedTuple):
    """The command line and the file: what varies, sections in place of a run's, and changes."""

    sweep: Sweep
    sections: dict[str, Any]
    changes: tuple[tuple[str, Any], ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells, the last axis fastest."""
        axes = self.sweep.axes
        if self.sweep.together:
            lengths = {len(values) for values in axes.values()}
            if len(lengths) > 1:
                raise UsageError("config.sweep.together: expected axes of one length")
            combined: Any = zip(*axes.values(), strict=True)
        else:
            if math.prod(map(len, axes.values())) > _MOST:
                raise UsageError(f"config.sweep.axes: expected {_MOST:,} cells at most")
            combined = itertools.product(*axes.values())
        return [dict(zip(axes, values, strict=True)) for values in combined]

    @property
    def names(self) -> dict[str, str]:
        """Short names of the axes: the ends of their keys, as long as it takes to differ."""
        found = {}
        for key in self.sweep.axes:
            parts = key.split(".")
            tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
            others = [other for other in self.sweep.axes if other != key]
            found[key] = next(
                t for t in tails if not any(o == t or o.endswith(f".{t}") for o in others)
            )
        return found


def changed(config: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> Asked:
    """Splits a file's config and what was typed into the sweep and the rest."""
    run = tree.plain(config)
    spec = dict(run.pop("sweep", None) or {})
    axes = dict(spec.get("axes") or {})
    rest = []
    for key, value in changes:
        head, _, tail = key.partition(".")
        if head != "sweep":
            rest.append((key, value))
        elif tail.startswith("axes."):
            axes[tail.removeprefix("axes.")] = value
        else:
            spec[tail] = value
    spec["axes"] = {k: _values(k, v) for k, v in axes.items() if v is not None}
    return Asked(call("config.sweep", Sweep, filled(Sweep, spec)), run, tuple(rest))


def _values(key: str, given: Any) -> list[Any]:
    """An axis's values; texts may be lists, with commas, and fractions, such as 8/255."""
    if isinstance(given, str):
        given = [part for part in given.strip("()[] ").split(",") if part.strip()]
    elif not isinstance(given, list | tuple):
        given = [given]
    values = [value_of(v.strip()) if isinstance(v, str) else v for v in given]
    if key == RUN:
        values = [str(value).rstrip("/") for value in values]
    where = f"config.sweep.axes.{key}"
    if not values or len({repr(value) for value in values}) < len(values):
        raise UsageError(f"{where}={given!r}: expected one value at least, and none twice")
    return values


def config_of(asked: Asked, cell: Cell, base: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a cell, whose run's own is `base`."""
    own = [(key, value) for key, value in cell.items() if key != RUN]
    changed_ = tree.changed({**base, **asked.sections}, [*asked.changes, *own])
    return tree.plain(changed_)


def title_of(asked: Asked, spec: Mapping[str, Any]) -> str:
    """The column that cells are."""
    columns = spec["evaluation"]["attacks"]
    if asked.sweep.attack is not None:
        return one_of("config.sweep.attack", asked.sweep.attack, columns)
    if len(columns) != 1:
        raise UsageError(
            f"config.sweep.attack is missing: expected one of {', '.join(columns) or 'none'}, the "
            "names in config.evaluation.attacks"
        )
    return next(iter(columns))


def check_axes(asked: Asked, title: str, column: Mapping[str, Any]) -> None:
    """Refuses axes that only training feels, or none."""
    if "threat.radius" in asked.sweep.axes and column.get("radius") is not None:
        raise UsageError(
            f"config.evaluation.attacks.{title}.radius={column['radius']!r}: expected None beside "
            "an axis threat.radius"
        )
    heads = (
        "threat.", "network.", "defence.", "ensemble.", f"evaluation.attacks.{title}.",
        "evaluation.corruption.",
    )  # fmt: skip
    known = (RUN, "seed", "evaluation.draws", "evaluation.eight_bit")
    for key in asked.sweep.axes:
        if key not in known and not key.startswith(heads):
            near = nearest(key, ("threat.radius", f"evaluation.attacks.{title}.steps", *known))
            raise UsageError(
                f"config.sweep.axes.{key}: expected {', '.join(known)}, or a key of "
                f"{', '.join(head[:-1] for head in heads)}; others are for training, with "
                f"config.sweep.train{near}"
            )


class Parts(NamedTuple):
    """What a cell's config describes, as far as a cell turns on it."""

    look: attack_columns.Column
    threat: Threat  # of the column
    network: Network  # that is judged
    climbed: Network
    assembly: networks.Assembly


def parts(spec: Mapping[str, Any], values: Mapping[str, Any], title: str, classes: int) -> Parts:
    """The same, with `values`, which may be traced, in place of those at their dotted keys."""
    whole = replaced(spec, values)
    threat: Threat = call("config.threat", tree.threat, whole["threat"])
    column = {title: whole["evaluation"]["attacks"][title]}
    look = attack_columns.columns(options.Evaluation(attacks=column, distances={}), threat)[title]
    if (look.through or "").startswith(ladder.RUN):
        raise UsageError(
            f"config.evaluation.attacks.{title}.through={look.through!r}: expected a form of the "
            "model itself"
        )
    group = whole["ensemble"]
    assembly = networks.assembly(
        {
            "network": whole["network"],
            "defence": whole["defence"],
            "start": call("config.start", options.Start, whole["start"]),
            "ensemble": group and call("config.ensemble", options.Ensemble, group),
        },
        classes,
    )
    network = assembly.network
    if whole["method"].get("name") == "rat":
        # Its checkpoints keep the perturbations beside the weights.
        network = carrying(network)
    climbed = network if look.through is None else assembly.through(look.through)
    return Parts(look, look.threat or threat, network, climbed, assembly)


def replaced(spec: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`spec` with `values` at their dotted keys."""
    whole = dict(spec)
    for key, value in values.items():
        *path, last = key.split(".")
        section = whole
        for name in path:
            section[name] = dict(section[name])
            section = section[name]
        section[last] = value
    return whole


def numeric(values: Sequence[Any]) -> bool:
    """Whether values are numbers, and so perhaps data."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def signature(spec: Mapping[str, Any], data: Sequence[str], title: str, *, model: bool) -> str:
    """What programs turn on beside their arguments: all of a cell's config but what is data.

    With `model` what only its attack turns on is left out.
    """
    names = ("threat", "network", "defence", "ensemble", "start")
    masked = replaced(spec, dict.fromkeys(data))
    evaluation = masked["evaluation"]
    told = {name: masked[name] for name in names}
    told["method"] = masked["method"].get("name")
    told |= {name: evaluation[name] for name in ("draws", "eight_bit")}
    if not model:
        told["attack"] = evaluation["attacks"][title]
    return json.dumps(told, sort_keys=True, default=str)


def radius_axis(axes: Iterable[str], title: str) -> str | None:
    """The axis along which the threat grows, if there is one."""
    keys = ("threat.radius", f"evaluation.attacks.{title}.radius")
    return next((key for key in axes if key in keys), None)


def chains(cells: Sequence[Cell], along: str | None) -> list[list[int]]:
    """Numbers of the cells that differ in `along` alone, ascending; without it each by itself."""
    if along is None:
        return [[number] for number in range(len(cells))]
    found: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        rest = repr([(key, value) for key, value in cell.items() if key != along])
        found.setdefault(rest, []).append(number)
    return [sorted(chain, key=lambda number: cells[number][along]) for chain in found.values()]


def share(units: Sequence[Any], shard: tuple[int, int]) -> list[Any]:
    """The i-th of n contiguous shares: neighbours have programs in common."""
    number, count = shard
    size = len(units)
    return list(units[(number - 1) * size // count : number * size // count])


def traced_type(values: Sequence[Any]) -> np.dtype:
    """Whole numbers stay whole, so that what asks for them is content."""
    return np.dtype(np.int32 if all(isinstance(v, int) for v in values) else np.float32)
