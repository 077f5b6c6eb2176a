"""Cells of a sweep, measured in one stream: an image under a cell's settings is a lane.

Numbers that programs can take as data are arguments of every lane, so that all cells which differ
in such numbers alone are attacked by one program, in full batches, and broken images make room for
others whatever cell they are of. Draws are folded from the seed, the column's title and the image's
place in the data set, as `experiments.evaluate` folds them: cells share their noise, so that they
differ by their settings, and a cell's verdicts are those of its own evaluation.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.sweeping import grid
from experiments.sweeping.plan import Plan, Resolved
from rain_jax import data, evaluation
from rain_jax.evaluation import Judgement, Lanes, Passes
from rain_jax.runs.evaluating import key_of
from rain_jax.types import Iteration


class Measured(NamedTuple):
    """What came of a cell, over all images [N]: how right the model is before and after."""

    clean: np.ndarray  # float32, 0 or 1, or of a random model the share of the draws
    stands: np.ndarray
    draws: int
    margin: float  # mean, of the images that were attacked
    attacked: int
    outside: int  # images that broke the rules and count as unbroken
    steps: float  # mean
    passes: Passes | None


class Measurer:
    """Measures cells of a plan; what several of them need is kept."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._clean: dict[Any, Judgement] = {}
        self._costs: dict[Any, Any] = {}

    def measure(self, units: Sequence[list[int]]) -> Iterator[tuple[int, Measured]]:
        """The cells of these units, as they are done."""
        together: dict[Any, list[list[int]]] = {}
        for unit in units:
            one = self.plan.resolved[unit[0]]
            together.setdefault((one.programs, one.run, one.seed), []).append(unit)
        for some in together.values():
            if self.plan.asked.sweep.warm:
                for unit in some:
                    yield from self._chained(unit)
            else:
                yield from self._streamed([number for unit in some for number in unit])

    def _lanes(
        self, numbers: Sequence[int], places: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[Lanes]:
        axes = self.plan.asked.sweep.axes
        for number in numbers:
            one = self.plan.resolved[number]
            source, at_once = self.plan.source(one), self.plan.room.size
            for batch in data.evaluation_batches(source, at_once, places):
                rows = len(batch.index)
                values: dict[str, Any] = {
                    key: np.full(rows, one.cell[key], grid.traced_type(axes[key]))
                    for key in self.plan.data
                }
                values["cell"] = np.full(rows, number, np.int32)
                if self.plan.asked.sweep.warm:
                    blank = np.zeros((rows, *self.plan.shape), np.float32)
                    if starts is not None:
                        blank[batch.valid] = starts[batch.index[batch.valid]]
                    values |= {"start": blank, "warm": np.full(rows, starts is not None)}
                yield Lanes(*batch, values, np.full(rows, one.steps, np.int32))

    def _found(
        self, numbers: Sequence[int], places: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[int, list[evaluation.Verdicts]]]:
        """Every cell's verdicts on the images at `places`, when they are complete."""
        left = list(numbers)
        while left:
            try:
                for number, parts in self._together(tuple(left), places, starts):
                    left.remove(number)
                    yield number, parts
            except jax.errors.JaxRuntimeError as error:
                self.plan.room.halve(error)

    def _together(
        self, numbers: Sequence[int], places: np.ndarray, starts: np.ndarray | None
    ) -> Iterator[tuple[int, list[evaluation.Verdicts]]]:
        """The same, as far as the device's memory allows."""
        one = self.plan.resolved[numbers[0]]
        variables = self.plan.variables(one)
        key = key_of(one.seed, self.plan.title)
        drive, judge = self.plan.drive(one), self.plan.judge(one)
        lanes = self._lanes(numbers, places, starts)
        held: dict[int, list[evaluation.Verdicts]] = {}
        both = variables, variables
        for some in evaluation.attack_and_judge(drive, judge, both, key, lanes):
            for number in np.unique(some.values["cell"]).tolist():
                rows = some.values["cell"] == number
                mine = jax.tree.map(lambda leaf, r=rows: leaf[r], some)
                if not self.plan.asked.sweep.warm:
                    mine = mine._replace(image=mine.image[:0])
                held.setdefault(number, []).append(mine)
                if sum(len(part.steps) for part in held[number]) == len(places):
                    yield number, held.pop(number)

    def _streamed(self, numbers: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        everyone = np.arange(self.plan.source(self.plan.resolved[numbers[0]]).size)
        for number, parts in self._found(numbers, everyone):
            yield number, self._counted(number, parts)

    def _chained(self, numbers: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        """Radii ascending, each from where the one before has ended."""
        fixed = self.plan.draws(self.plan.resolved[numbers[0]]) == 1
        clean = self.clean(numbers[0])
        places = np.flatnonzero(clean.right) if fixed else np.arange(len(clean.index))
        standing = np.asarray(clean.right, np.float32)
        starts = None
        for number in numbers:
            if not len(places):
                nobody = np.zeros(len(standing), np.float32)
                yield number, Measured(nobody + clean.right, standing, 1, 0.0, 0, 0, 0.0,
                                       Passes(0.0, 0.0))  # fmt: skip
                continue
            ((_, parts),) = self._found([number], places, starts)
            told = self._counted(number, parts)
            if starts is None:
                starts = np.zeros((len(standing), *self.plan.shape), np.float32)
            for part in parts:
                starts[part.judgement.index] = part.image
            if fixed:
                standing = told.stands * standing
                told = told._replace(stands=standing)
                places = np.flatnonzero(standing)
            yield number, told

    def clean(self, number: int) -> Judgement:
        """What the judge says of a cell's images as they are; attacks have no say in it."""
        one = self.plan.resolved[number]
        own = {k: v for k, v in one.cell.items() if k.startswith(("network.", "defence."))}
        known = one.run, one.seed, one.model, repr(own), repr(one.corruption)
        if known not in self._clean:
            everyone = np.arange(self.plan.source(one).size)
            variables = self.plan.variables(one)

            def verdicts() -> Iterator[evaluation.Verdicts]:
                found = evaluation.as_they_are(self._lanes([number], everyone))
                return self.plan.judge(one)(variables, key_of(one.seed, "clean"), found)

            judged = self.plan.room.collect(verdicts)
            self._clean[known] = evaluation.join([some.judgement for some in judged])
        return self._clean[known]

    def _counted(self, number: int, parts: Sequence[evaluation.Verdicts]) -> Measured:
        one, clean = self.plan.resolved[number], self.clean(number)
        judged = evaluation.join([part.judgement for part in parts])
        steps = np.concatenate([part.steps for part in parts])
        draws = self.plan.draws(one)
        counted = evaluation.shares if draws > 1 else evaluation.worst_case
        passes = self._passes(one, steps)
        return Measured(
            np.asarray(counted(clean, []), np.float32),
            np.asarray(counted(clean, [judged]), np.float32),
            draws, float(np.mean(judged.margin)), len(steps), int(np.sum(~judged.allowed)),
            float(np.mean(steps)), passes,
        )  # fmt: skip

    def _passes(self, one: Resolved, steps: np.ndarray) -> Passes | None:
        """Of the attack and of the judge; None where nobody can count them."""
        attack = grid.parts(one.spec, {}, self.plan.title, self.plan.classes).look.attack
        if not isinstance(attack, Iteration):
            return None
        if one.programs not in self._costs:
            self._costs[one.programs] = evaluation.cost(attack, self.plan.shape, self.plan.classes)
        cost = self._costs[one.programs]
        judged = Passes(float(self.plan.draws(one) * len(steps)), 0.0)
        return evaluation.passes(attack, cost, steps) + judged
