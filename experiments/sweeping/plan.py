"""A sweep over trained runs: its cells checked, which of them go together, and their programs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import sanity
from experiments.sweeping import grid
from experiments.sweeping.grid import RUN, Asked, Cell, Parts
from rain_jax import data, evaluation
from rain_jax.attacks.pgd import Ascent
from rain_jax.checks import UsageError, one_of
from rain_jax.config import build, corrupted, networks, options
from rain_jax.config.schema import call
from rain_jax.evaluation.resume import code, digest, digest_of, sample_of
from rain_jax.evaluation.room import Room
from rain_jax.norms import project
from rain_jax.runs import initial_weights, loading, workdir
from rain_jax.runs.step_programs import keys_of
from rain_jax.types import (
    Attack,
    Image,
    Iteration,
    Key,
    LogitsFn,
    PyTree,
    Target,
    Threat,
    Variables,
)

# Of a random model, where the config does not say how often it is asked: as in an evaluation.
_DRAWS = 20
# The section of what is done to images.
CORRUPTION = "evaluation.corruption"
# Images that are looked at for what is certainly a mistake.
_LOOKED_AT = 16


class Resolved(NamedTuple):
    """A cell, its whole config, and what decides which cells go together."""

    cell: Cell
    spec: dict[str, Any]
    run: Path
    seed: int
    steps: int  # of its attack
    programs: str  # what its programs turn on
    model: str  # what its judge and its variables turn on

    @property
    def corruption(self) -> dict[str, Any] | None:
        """What is done to its images, before any attack."""
        found: dict[str, Any] | None = self.spec["evaluation"]["corruption"]
        return found


class Plan:
    """A sweep over trained runs: all cells checked, nothing compiled yet."""

    def __init__(self, asked: Asked, folder: Path):
        self.asked, self.cells = asked, asked.cells
        runs = [Path(cell.get(RUN, folder)) for cell in self.cells]
        self.configs = {run: workdir.read_config(run) for run in dict.fromkeys(runs)}
        specs = [
            grid.config_of(asked, cell, self.configs[run])
            for cell, run in zip(self.cells, runs, strict=True)
        ]
        self.title = grid.title_of(asked, specs[0])
        for spec in specs:
            one_of("config.sweep.attack", self.title, spec["evaluation"]["attacks"])
            grid.check_axes(asked, self.title, spec["evaluation"]["attacks"][self.title])
        # Images as they are: corruptions are a cell's own.
        self.experiments = {
            run: build.experiment(grid.replaced(specs[runs.index(run)], {CORRUPTION: None}))
            for run in self.configs
        }
        self._corrupted: dict[Any, data.Source] = {}
        first = self.experiments[runs[0]]
        self.shape, self.classes = first.splits.test.shape, first.splits.test.classes
        self.images = first.evaluation.images
        tests = [experiment.splits.test for experiment in self.experiments.values()]
        if len({(test.name, test.size, test.shape, test.classes) for test in tests}) > 1:
            raise UsageError("config.sweep.axes.run: expected runs on the same test images")
        self.devices = first.parallel.placed()
        self.room = Room(first.evaluation.batch_size, self.devices.size)
        self.batch_size = self.room.size  # as asked for
        made = [grid.parts(spec, {}, self.title, self.classes) for spec in specs]
        self.along = grid.radius_axis(asked.sweep.axes, self.title)
        self.data = self._data(specs)
        self.resolved = [
            Resolved(
                cell, spec, run, spec["seed"],
                evaluation.as_iteration(parts.look.attack).steps,
                grid.signature(spec, self.data, self.title, model=False),
                grid.signature(spec, self.data, self.title, model=True),
            )
            for cell, spec, run, parts in zip(self.cells, specs, runs, made, strict=True)
        ]  # fmt: skip
        self.random = {
            one.model for one, parts in zip(self.resolved, made, strict=True)
            if parts.assembly.network.random
        }  # fmt: skip
        for one in self.resolved:
            self.source(one)  # what is wrong with a corruption is met before anything runs
        if asked.sweep.warm and self.along is None:
            raise UsageError("config.sweep.warm: expected an axis threat.radius")
        self._programs: dict[tuple[str, int], Any] = {}
        self._judges: dict[tuple[str, int], Any] = {}
        self._digests: dict[Any, str] = {}
        self._held: tuple[Any, PyTree] = (None, None)

    # --- which axes are data -------------------------------------------------------------------

    def _data(self, specs: Sequence[Mapping[str, Any]]) -> list[str]:
        """The axes whose values programs can take as arguments: found out by tracing."""
        inside = ("threat.", "network.", "defence.", f"evaluation.attacks.{self.title}.")
        numbers = [
            key for key, values in self.asked.sweep.axes.items()
            if key.startswith(inside) and len(values) > 1 and grid.numeric(values)
        ]  # fmt: skip
        # One of each kind: an axis is data where it is for all of them.
        kinds = {grid.signature(spec, numbers, self.title, model=False): spec for spec in specs}
        found: list[str] = []
        for key in numbers:
            try:
                for spec in kinds.values():
                    self._trace(spec, [*found, key])
                found.append(key)
            except (TypeError, ValueError, IndexError):
                continue  # its values decide about shapes, or about Python's own branches
        return found

    def _trace(self, spec: Mapping[str, Any], keys: Sequence[str]) -> None:
        like = grid.parts(spec, {}, self.title, self.classes).network
        image = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        key = jax.eval_shape(jax.random.key, 0)
        images = jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)
        variables = jax.eval_shape(like.init, key, images)
        values = {
            name: jax.ShapeDtypeStruct((), grid.traced_type(self.asked.sweep.axes[name]))
            for name in keys
        }

        def program(
            variables: Variables, key: Key, image: Image, label: Target, values: Any
        ) -> Any:
            made = grid.parts(spec, values, self.title, self.classes)
            attack = evaluation.as_iteration(made.look.attack)
            climbed = self._model(made.climbed, made, variables, keys)
            state = attack.step(climbed, attack.init(key, climbed, image, label))
            found, _ = attack.best(climbed, state)
            judged = self._model(made.network, made, variables, keys)
            return evaluation.judge(judged, evaluation.Rules(made.threat), key, image, found, label)

        jax.eval_shape(program, variables, key, image, jnp.int32(0), values)

    def _model(
        self, network: Any, made: Parts, variables: Variables, keys: Sequence[str]
    ) -> LogitsFn:
        if any(key.startswith("defence.") for key in keys):
            variables = networks.followed(made.assembly.network, variables, self.shape)
        return networks.logits_fn_of(network)(variables)

    # --- programs and their arguments ----------------------------------------------------------

    def draws(self, one: Resolved) -> int:
        """How often the model is asked for each verdict."""
        return one.spec["evaluation"]["draws"] or (_DRAWS if one.model in self.random else 1)

    def _made(self, one: Resolved, values: PyTree) -> Parts:
        numbers = {key: values[key] for key in self.data}
        return grid.parts(one.spec, numbers, self.title, self.classes)

    def drive(self, one: Resolved) -> Any:
        """The program that attacks the cells which have this one's programs."""
        known = one.programs, self.room.size
        if known not in self._programs:
            warm = self.asked.sweep.warm

            def attack_of(values: PyTree) -> Attack | Iteration:
                made = self._made(one, values)
                attack = made.look.attack
                return going_on(attack, made.threat, values) if warm else attack

            def climbed_of(variables: Variables, values: PyTree) -> LogitsFn:
                made = self._made(one, values)
                return self._model(made.climbed, made, variables, self.data)

            through = grid.parts(one.spec, {}, self.title, self.classes).look.through
            # As in an evaluation: of a random model the worst mean is wanted, not the first one
            # that is bad enough; and of another form of the model the judge may think otherwise. Of
            # rounded images he is asked.
            early = self.draws(one) == 1 and through is None
            rounds = one.spec["evaluation"]["eight_bit"]
            self._programs[known] = evaluation.packed_lanes(
                attack_of, climbed_of, self.devices, batch_size=self.room.size,
                early=self.judge(one) if early and rounds else early,
            )  # fmt: skip
        return self._programs[known]

    def judge(self, one: Resolved) -> Any:
        """The program that judges them."""
        known = one.model, self.room.size
        if known not in self._judges:
            bits = one.spec["evaluation"]["eight_bit"]
            rule = evaluation.Rules(
                grid.parts(one.spec, {}, self.title, self.classes).threat, self.draws(one), bits
            )

            def model_of(variables: Variables, values: PyTree) -> LogitsFn:
                made = self._made(one, values)
                return self._model(made.network, made, variables, self.data)

            def rules_of(values: PyTree) -> evaluation.Rules:
                # What else an attack takes has no say here.
                radius = values.get(self.along, rule.threat.radius)
                return rule._replace(threat=rule.threat._replace(radius=radius))

            self._judges[known] = evaluation.judging_lanes(
                model_of, rules_of, self.devices, batch_size=self.room.size
            )
        return self._judges[known]

    def variables(self, one: Resolved) -> PyTree:
        """A cell's weights, on all devices."""
        known = one.run, one.model
        if self._held[0] != known:
            made = grid.parts(one.spec, {}, self.title, self.classes)
            variables = self._loaded(one, made)
            if known not in self._digests:
                loading.check_finite(variables, str(one.run))
                looked_at = data.first(self.source(one), _LOOKED_AT)
                (some,) = data.evaluation_batches(looked_at, looked_at.size)
                local = jax.tree.map(np.asarray, variables)
                sanity.refuse(made.network, local, jnp.asarray(data.as_float(some.image)))
                self._digests[known] = digest_of(variables)
            # One at a time: there may be many runs.
            self._held = known, self.devices.replicate(variables)
        return self._held[1]

    def _loaded(self, one: Resolved, made: Parts) -> PyTree:
        base = self.experiments[one.run]._replace(
            config=one.spec, network=made.network, assembly=made.assembly
        )
        own, defence = self.configs[one.run].get("defence"), one.spec["defence"]
        if own is None and defence is not None:
            # Put in front of a classifier that was trained without.
            begin = replace(base.start, classifier=str(one.run))
            images = jnp.zeros((1, *self.shape), jnp.float32)
            drawn = jax.jit(made.network.init)(keys_of(one.seed).init, images)
            return initial_weights.begun(base._replace(start=begin), drawn, self.devices)
        return loading.restore(base, one.run)[0]

    def weights(self, one: Resolved) -> str:
        """A hash of a cell's weights."""
        if (one.run, one.model) not in self._digests:
            self.variables(one)
        return self._digests[one.run, one.model]

    def source(self, one: Resolved) -> data.Source:
        """The images of a cell, corrupted where it says so."""
        test, asked = self.experiments[one.run].splits.test, one.corruption
        if asked is not None:
            known = one.run, repr(asked)
            if known not in self._corrupted:
                made = call("config.evaluation.corruption", options.Corrupted, asked)
                self._corrupted[known] = corrupted.corrupted(test, made)
            test = self._corrupted[known]
        return data.first(test, self.images)

    @cached_property
    def _sample(self) -> dict[Path, Any]:
        return {run: sample_of(e.splits.test) for run, e in self.experiments.items()}

    def identity(self, number: int) -> str:
        """A hash of all that a cell's verdicts turn on."""
        one = self.resolved[number]
        device = jax.devices()[0]
        told: dict[str, Any] = {
            "title": self.title, "seed": one.seed, "draws": self.draws(one),
            "settings": grid.signature(one.spec, (), self.title, model=False),
            "weights": self.weights(one), "data": self._sample[one.run],
            "corruption": one.corruption, "images": self.source(one).size,
            "batch_size": self.batch_size, "code": code(Path(__file__).parents[1]),
            "jax": jax.__version__, "device": [device.platform, device.device_kind],
            "devices": self.devices.size,
        }  # fmt: skip
        if self.asked.sweep.warm and self.along is not None:
            told["chain"] = sorted(self.asked.sweep.axes[self.along])
        return digest(np.frombuffer(repr(told).encode(), np.uint8))

    def units(self) -> list[list[int]]:
        """Numbers of the cells that cannot be told apart from each other, neighbours alike."""
        whole = grid.chains(self.cells, self.along if self.asked.sweep.warm else None)
        order = list(dict.fromkeys(one.programs for one in self.resolved))

        def place(unit: list[int]) -> Any:
            one = self.resolved[unit[0]]
            return order.index(one.programs), str(one.run), one.seed, unit[0]

        return sorted(whole, key=place)


def going_on(attack: Attack | Iteration, threat: Threat, values: PyTree) -> Iteration:
    """The ascent that begins at `values["start"]`, where `values["warm"]` says so.

    Of several restarts the first one does; the others begin as they are used to. Raises
    `UsageError` for what is no ascent.
    """
    attack = evaluation.as_iteration(attack)
    plain = attack.init

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> PyTree:
        state = plain(key, logits_fn, image, target)
        if not isinstance(state, Ascent):
            raise UsageError("config.sweep.warm: expected an attack like pgd or mi_fgsm")
        several = state.image.ndim > image.ndim
        own = state.image[0] if several else state.image
        begin = jnp.where(values["warm"], project(threat, image, values["start"]), own)
        begin = state.image.at[0].set(begin) if several else begin
        return state._replace(image=begin, found=begin)

    return attack._replace(init=init)
