"""A run while it learns: how it begins or goes on, what its folder gets, and where it is saved."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.config.options import Plan
from rain_jax.runs.step_programs import Task, keys_of
from rain_jax import training
from rain_jax.checkpoints import Checkpoints
from rain_jax.logs import MetricsLog
from rain_jax.parallel import Devices
from rain_jax.types import Batch, Key, Method, PyTree, Variables

# Behind the names of checkpoints that are newer than those of another member, until all are done.
_AHEAD = ".ahead"

# A look at the held-out images: state, key, log, step -> score, larger is better.
Validator = Callable[[training.TrainState, Key, MetricsLog, int], float]


class Member(NamedTuple):
    """A run that learns, alone or beside others. Its parts are the arguments of `train`."""

    experiment: Task
    folder: Path
    name: str
    validator_on: Callable[[Devices], Validator | None]
    begun: Callable[[Variables, Devices], Variables] | None = None


class Running:
    """A member while it learns: how it begins, and what its metrics, looks and saves go to."""

    def __init__(
        self,
        member: Member,
        plan: Plan,
        devices: Devices,
        validator: Validator | None,
        checkpoints: Checkpoints,
    ):
        self.member, self.devices, self.checkpoints = member, devices, checkpoints
        self.validator = validator
        self.keys = keys_of(member.experiment.seed)
        self.method = member.experiment.method(plan)
        self.sums: dict[str, float] = {}  # of the metrics since the last line of the log
        self.log: MetricsLog

    def begins(self) -> tuple[Variables, training.TrainState]:
        """The variables that were drawn, and the state that they make."""
        experiment = self.member.experiment
        images = jnp.zeros((1, *experiment.splits.train.shape), jnp.float32)
        variables = jax.jit(experiment.network.init)(self.keys.init, images)
        return variables, self.state_of(variables)

    def state_of(self, variables: Variables) -> training.TrainState:
        """The state before the first step."""
        return self.devices.replicate(jax.jit(self.method.init)(variables))

    def restored(self, state: training.TrainState) -> training.TrainState:
        """The newest state that was saved, in the place of one of its shapes."""
        sums = no_sums(self.member.experiment, self.method, state)
        found = restored(self.checkpoints, state, sums, self.devices)
        state, self.sums = found or (state, sums)
        return state

    def add(self, metrics: dict[str, float]) -> None:
        """Notes the metrics of a step."""
        for name, value in {**metrics, "steps": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def tell(self, number: int) -> dict[str, float]:
        """Writes a line of the log."""
        line = means(self.sums)
        self.log.write(number, "train", **line)
        self.sums = dict.fromkeys(self.sums, 0.0)
        return line

    def save(self, done: int, state: training.TrainState, *, look: bool) -> None:
        """Looks at the held-out images first, where it should."""
        score = None
        if look and self.validator is not None:
            score = self.validator(state, self.keys.validate, self.log, done)
        model, rest = items_of(self.devices.to_global(state), self.sums)
        self.checkpoints.save(done, model, rest, score=score)


def begun_or_restored(running: Sequence[Running]) -> list[training.TrainState]:
    """The states that members go on from: of the newest step that all have, or their beginnings."""
    begins = [one.begins() for one in running]
    states = [state for _, state in begins]
    while True:
        leave_ahead([one.member.folder / "checkpoints" for one in running])
        if any(one.checkpoints.latest() is None for one in running):
            break
        found = [one.restored(state) for one, state in zip(running, states, strict=True)]
        # A broken checkpoint is passed over, and then the others are ahead.
        if len({int(jax.device_get(state.step)) for state in found}) == 1:
            return found
    for number, (one, (variables, _)) in enumerate(zip(running, begins, strict=True)):
        if one.member.begun is not None:
            states[number] = one.state_of(one.member.begun(variables, one.devices))
    return states


def leave_ahead(folders: Sequence[Path]) -> None:
    """Renames the checkpoints that are newer than the newest step which all folders have."""
    steps = [
        {int(path.name) for path in folder.glob("*") if path.name.isdecimal()} for folder in folders
    ]
    common = max(set.intersection(*steps), default=-1)
    for folder, own in zip(folders, steps, strict=True):
        for step in (step for step in own if step > common):
            shutil.rmtree(folder / f"{step}{_AHEAD}", ignore_errors=True)
            (folder / str(step)).rename(folder / f"{step}{_AHEAD}")


def forget_ahead(folders: Sequence[Path]) -> None:
    """Removes what `leave_ahead` has renamed: all are done, and it has been made again."""
    for folder in folders:
        for path in folder.glob(f"*{_AHEAD}"):
            shutil.rmtree(path)


def restored(
    checkpoints: Checkpoints, state: training.TrainState, sums: dict[str, float], devices: Devices
) -> tuple[training.TrainState, dict[str, float]] | None:
    """State and sums of the newest readable checkpoint, or None where there is none."""
    found = checkpoints.restore(*items_of(devices.to_global(state), sums))
    if found is None:
        return None
    for line in checkpoints.skipped:
        print(f"warning: {line}", flush=True)
    _, model, rest = found
    state = training.TrainState(
        rest["step"], model["params"], model["model_state"], rest["optimiser"],
        model.get("average"),
    )  # fmt: skip
    return devices.to_local(state), {name: float(sum_) for name, sum_ in rest["sums"].items()}


def items_of(state: training.TrainState, sums: dict[str, float]) -> tuple[PyTree, PyTree]:
    """The two items of a checkpoint: the model, and what only training needs.

    `sums` are those of the metrics since the last line of the log: without them the first line
    after a restart would be a mean over fewer steps.
    """
    rest = {"step": state.step, "optimiser": state.optimiser, "sums": sums}
    return training.model_of(state), rest


def no_sums(experiment: Task, method: Method, state: PyTree) -> dict[str, float]:
    """Zeros by the names of the metrics that a step gives, and of the number of `steps`.

    It traces a step to know them, which is for those who have a checkpoint to read.
    """
    size = experiment.training.batch_size
    shape = (size, *experiment.splits.train.shape)
    batch = jax.eval_shape(
        lambda: Batch(
            jnp.zeros(shape), jnp.zeros(size, int), jnp.zeros(size, int), jnp.ones(size, bool)
        )
    )
    _, metrics = jax.eval_shape(method.step, jax.random.key(0), state, batch)
    return dict.fromkeys([*metrics, "steps"], 0.0)


def means(sums: dict[str, float]) -> dict[str, float]:
    """Sums over several steps as means: over images, but for the gradient norm's, over steps."""
    sums = dict(sums)
    images = max(sums.pop("images"), 1.0)
    line = {"gradient_norm": sums.pop("gradient_norm") / sums.pop("steps")}
    if "correct" in sums:
        line["accuracy"] = sums.pop("correct") / images
    return {**{name: value / images for name, value in sums.items()}, **line}
