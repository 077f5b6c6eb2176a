"""Attacks as an evaluation runs them: beside torchattacks, and many settings at once."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benching.clock import Row, Side
from experiments.benching.counted import gflop_of
from experiments.benching.images import cores, pictures
from experiments.benching.training import Workload, known, twin
from rain_jax import attacks, evaluation, norms
from rain_jax.attacks import suites
from rain_jax.checks import within
from rain_jax.config.networks import logits_fn_of
from rain_jax.evaluation import Lanes
from rain_jax.parallel import Devices
from rain_jax.types import Batch, Iteration, Key, LogitsFn, Threat, Variables

Cell = tuple[float, int]  # a radius, and which draw
_MOST = 512  # lanes at a time


def against(
    *,
    model: str = "small_cnn",
    images: int = 32,
    size: int = 32,
    radius: float = 8 / 255,
    pgd_steps: int = 40,
    apgd_steps: int = 100,
    standard_radius: float = 1 / 2550,
    standard_steps: int = 10,
    standard_queries: int = 200,
) -> list[Row]:
    """PGD, APGD-CE and `standard` in L-inf on `images` that an untrained network is right about.

    PGD and APGD go all the way with every image, ours as the peer's: what leaving out images that
    are broken saves on a trained network `experiments.compare --speed` tells. In the suite each
    member gets what those before it left standing. So small a radius leaves nearly all, which then
    cost most. Both draw their starts.
    """
    within("images", images, 1)
    within("radius", radius, above=0.0)
    within("standard_radius", standard_radius, above=0.0)
    subject = _Subject(Workload(known(model, "model"), images, size, "float32"))
    threat = Threat(norms.linf, radius)
    made = {
        "pgd": attacks.pgd(threat, steps=pgd_steps, step_size=radius / 10),
        "apgd_ce": attacks.apgd(threat, steps=apgd_steps),
    }
    small = Threat(norms.linf, standard_radius)
    suite = suites.standard(small, steps=standard_steps, queries=standard_queries)
    budget = dict(steps=standard_steps, queries=standard_queries)
    row = partial(Row, alike=False, images=images)
    return [
        *(
            row(
                f"{name}-{attack.steps}, {subject.workload}",
                partial(subject.attacked, attack),
                {"torchattacks": partial(subject.torchattacks, name, radius, steps=attack.steps)},
            )
            for name, attack in made.items()
        ),
        row(
            f"standard, {standard_steps} steps, {standard_queries} queries, {subject.workload}",
            partial(subject.suite, suite, small),
            {"torchattacks": partial(subject.torchattacks, "standard", standard_radius, **budget)},
        ),
    ]


def sweep(
    *,
    model: str = "small_cnn",
    images: int = 16,
    size: int = 32,
    radii: tuple[float, ...] = (2 / 255, 4 / 255, 8 / 255, 16 / 255),
    draws: int = 2,
    steps: int = 20,
) -> list[Row]:
    """PGD at all `radii`, from so many random starts each, as one stream of one program.

    Beside it one cell after the other, each by a program of its own, as a script does it in which
    the radius is a constant; and by one program for all of them. First calls compile.
    """
    within("images", images, 1)
    within("radii", radii, above=0.0)
    within("draws", draws, 1)
    within("steps", steps, 1)
    subject = _Subject(Workload(known(model, "model"), images, size, "float32"))
    cells = [(radius, draw) for radius in radii for draw in range(draws)]
    made = [_attack(*cell, steps) for cell in cells]
    lanes = partial(subject.lanes, cells, steps)
    return [
        Row(
            f"sweep, {len(radii)} radii x {draws} draws, pgd-{steps}, {subject.workload}",
            partial(lanes, together=True),
            {
                "one by one": partial(lanes, together=False),
                "a program each": partial(subject.programs, made),
            },
            images=images * len(cells),
        )
    ]


def _attack(radius: Any, draw: Any, steps: int) -> Iteration:
    """PGD whose draws are those of the number `draw`."""
    attack = attacks.pgd(Threat(norms.linf, radius), steps=steps)

    def init(key: Key, *arguments: Any) -> Any:
        return attack.init(jax.random.fold_in(key, draw), *arguments)

    return attack._replace(init=init)


class _Subject:
    """An untrained network and images that it is right about."""

    def __init__(self, workload: Workload):
        self.workload, self.network = workload, workload.made
        self.pixels = pictures(workload.batch_size, workload.size)

    @cached_property
    def variables(self) -> Variables:
        return self.workload.variables

    @cached_property
    def labels(self) -> np.ndarray:
        logits, _ = jax.jit(self.network.apply)(self.variables, jnp.asarray(self.pixels))
        return np.argmax(np.asarray(logits), axis=1).astype(np.int32)

    @property
    def devices(self) -> Devices:
        return cores(self.workload.batch_size)

    @property
    def batch(self) -> Batch:
        count = len(self.labels)
        index: Any = np.arange(count, dtype=np.int32)
        valid: Any = np.ones(count, bool)
        images: Any = self.pixels
        labels: Any = self.labels
        return Batch(images, labels, index, valid)

    def of(self, variables: Variables) -> LogitsFn:
        return logits_fn_of(self.network)(variables)

    def gflop(self, attack: Iteration) -> float:
        """The work of attacking all images once, were it one program."""

        def run(variables: Variables, keys: Key, images: Any, labels: Any) -> Any:
            logits_fn = self.of(variables)
            return jax.vmap(lambda k, i, y: attack(k, logits_fn, i, y))(keys, images, labels)

        keys = jax.random.split(jax.random.key(0), len(self.labels))
        return gflop_of(run, self.variables, keys, self.pixels, self.labels) or 0.0

    def attacked(self, attack: Iteration) -> Side:
        return self.programs([attack])

    def programs(self, made: Sequence[Iteration]) -> Side:
        """A program for each of these attacks."""
        size = len(self.labels)
        drives = [
            evaluation.packed(one, self.of, self.devices, batch_size=size, early=False)
            for one in made
        ]

        def found(key: Key, variables: Variables) -> Iterator[tuple[Any, evaluation.Found]]:
            for number, drive in enumerate(drives):
                for some in drive(variables, key, [self.batch]):
                    yield number, some

        return self._side(found, len(drives), self.gflop(made[0]))

    def lanes(self, cells: Sequence[Cell], steps: int, *, together: bool) -> Side:
        """One program for all cells, in one stream or one after the other."""
        count = len(self.labels)

        def attack_of(values: Any) -> Iteration:
            return _attack(values["radius"], values["draw"], steps)

        drive = evaluation.packed_lanes(
            attack_of,
            lambda variables, values: self.of(variables),
            self.devices,
            batch_size=min(_MOST, count * (len(cells) if together else 1)),
            early=False,
        )

        def lane(number: int) -> Lanes:
            radius, draw = cells[number]
            values = {
                "cell": np.full(count, number, np.int32),
                "radius": np.full(count, radius, np.float32),
                "draw": np.full(count, draw, np.int32),
            }
            return Lanes(*self.batch, values, np.full(count, steps, np.int32))

        numbers = range(len(cells))
        groups = [list(numbers)] if together else [[number] for number in numbers]

        def found(key: Key, variables: Variables) -> Iterator[tuple[Any, evaluation.Found]]:
            for group in groups:
                for some in drive(variables, key, map(lane, group)):
                    held: Any = some.batch
                    yield held.values["cell"], some

        attack = _attack(*cells[0], steps)
        return self._side(found, len(cells), self.gflop(attack))

    def _side(
        self,
        found: Callable[[Key, Variables], Iterator[tuple[Any, evaluation.Found]]],
        cells: int,
        gflop: float,
    ) -> Side:
        """All images that are found, [cells, N, H, W, C]; `gflop` is the work of a cell."""
        variables, key = self.devices.replicate(self.variables), jax.random.key(1)

        def call() -> np.ndarray:
            images = np.zeros((cells, *self.pixels.shape), np.float32)
            for cell, some in found(key, variables):
                images[cell, some.batch.index] = some.image
            return images

        return Side(call, gflop=cells * gflop)

    def suite(self, members: Mapping[str, Iteration], threat: Threat) -> Side:
        """Attacks one after the other, each on the images that stand by then."""
        size, rules = len(self.labels), evaluation.Rules(threat)
        drives = {
            name: evaluation.packed(one, self.of, self.devices, batch_size=size)
            for name, one in members.items()
        }
        judge = evaluation.judging(self.of, rules, self.devices, batch_size=size)
        variables, key = self.devices.replicate(self.variables), jax.random.key(1)

        def those(stands: Any) -> list[Batch]:
            return [self.batch._replace(valid=stands)]

        def call() -> np.ndarray:
            stood = evaluation.cascade(drives, judge, variables, key, those, size)
            return list(stood.values())[-1]

        return Side(call, gflop=sum(map(self.gflop, members.values())))

    def torchattacks(self, name: str, radius: float, **budget: int) -> Side:
        """The same attack of theirs, on the twin."""
        peers = importlib.import_module("experiments.benching.peers")
        return peers.torchattacks(
            name, twin(self.workload), self.pixels, self.labels,
            radius=radius, batch_size=len(self.labels), **budget,
        )  # fmt: skip
