"""Checkpoints that outlive a kill, a full disk, a flipped byte and a change of devices.

Orbax writes and reads; nothing else in rain_jax knows it. A step is one folder with two items:
`model`, all that evaluation needs, and `train`, what training needs besides. A third, `about`,
lists every leaf's shape, dtype and checksum: OCDBT, the format below, guards its index by checksums
but not all of the values, and a flipped byte can come back as a slightly different weight.

A tree is stored flat, by the names of its leaves (`params.Dense_0.kernel`). So NamedTuples, empty
states and None cost nothing, a file does not care which class an optimiser's state was, and a
misfit can be named.
"""

import errno
import gc
import logging as std_logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath  # type: ignore[import-untyped]
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from rain_jax.checkpoints import leaves
from rain_jax.checkpoints.faults import Broken, errno_of, hushed, without_orbax
from rain_jax.checks import UsageError, one_of, within
from rain_jax.types import PyTree

_ITEMS = {"model": "network", "train": "kind of training"}


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager that ends by `close`.

    `save` and `restore` belong to the one run that owns the folder; `latest`, `best` and
    `restore_model` only read, so that evaluating beside a running training disturbs nothing. On
    several hosts all processes of a job save and restore together.

    Trees may be any pytrees of JAX arrays (typed keys and bfloat16 included; on several hosts
    they must be global arrays), NumPy arrays and Python numbers; the last two come back as NumPy
    arrays.

    Args:
      folder: where the steps are, a local path or one that `etils.epath` knows (`gs://...`).
      keep: how many of the newest steps to keep, at least 1.
      keep_best: whether to keep the step with the best score besides.

    Attributes:
      skipped: one line for each checkpoint that `restore` found broken and passed over.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, keep_best: bool = True
    ) -> None:
        within("keep", keep, 1)
        std_logging.getLogger("absl").addFilter(without_orbax)  # adding it twice is adding it once
        self.folder = epath.Path(folder).resolve()
        self.skipped: list[str] = []
        self._keep, self._keep_best = keep, keep_best
        self._scores: dict[int, float] = {}
        self._opened: ocp.CheckpointManager | None = None

    def save(self, step: int, model: PyTree, train: PyTree, *, score: float | None = None) -> None:
        """Starts to save and returns once everything is copied off the devices.

        The files are written in the background and appear all at once, by a rename: a kill at any
        moment leaves this step whole or not at all. Older steps go after that. Buffers may be
        donated as soon as this returns. A step that is already there is left as it is.

        Args:
          step: the number of steps taken so far.
          model: what evaluation needs, such as parameters, model state and averaged parameters.
          train: what training needs besides, such as the optimiser's state and the key.
          score: held-out robust accuracy, larger is better. None or NaN: no claim to be the best.

        Raises:
          UsageError: this save or the one before it could not be written (disk full, read-only).
        """
        self.wait()
        manager = self._manager()
        if step in manager.all_steps():
            return
        trees = {"model": leaves.named(model), "train": leaves.named(train)}
        for leaf in (leaf for named in trees.values() for leaf in named.values()):
            if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
                leaf.copy_to_host_async()  # all under way before the first is waited for
        about: dict[str, Any] = {
            item: {
                name: [leaves.described(leaf), leaves.checksum(leaf)]
                for name, leaf in named.items()
            }
            for item, named in trees.items()
        }
        self._scores.pop(step, None)
        if score is not None and not math.isnan(score):
            about["score"] = self._scores[step] = float(score)
        items = {
            item: ocp.args.StandardSave({name: leaves.plain(leaf) for name, leaf in named.items()})
            for item, named in trees.items()
            if named  # Orbax refuses an empty tree
        }
        with self._writing():
            manager.save(
                step,
                # Whoever calls has decided to save: Orbax is not asked for an opinion.
                force=True,
                args=ocp.args.Composite(about=ocp.args.JsonSave(leaves.sealed(about)), **items),
            )

    def wait(self) -> None:
        """Returns when everything saved so far is on disk. Raises as `save` does."""
        if self._opened is not None:
            with self._writing():
                self._opened.wait_until_finished()

    def latest(self) -> int | None:
        """The newest step on disk; a save under way counts from its end on."""
        return max(self._steps(), default=None)

    def best(self) -> int | None:
        """The step with the best score, the newest of equals; None where none has a score."""
        return self._best_of({step: self._score(step) for step in self._steps()})

    def restore(self, model_like: PyTree, train_like: PyTree) -> tuple[int, PyTree, PyTree] | None:
        """Reads the newest checkpoint that is whole, onto the devices that the arguments name.

        Leaves of `model_like` and `train_like` are arrays or `jax.ShapeDtypeStruct`s with a
        sharding (without: the first device); on which and how many devices they were saved does
        not matter. A broken checkpoint is logged, noted in `skipped` and, once an older one has
        proved whole, renamed to `<step>.unreadable`: it is never deleted, and its step is free.

        Returns:
          The step, `model` and `train`, or None where there is no checkpoint.

        Raises:
          UsageError: there are checkpoints and none is whole; the trees do not fit what was
            saved; or the folder cannot be written to, which a run should know at its start.
        """
        self.wait()
        self._claim()
        broken = []
        for step in sorted(self._steps(), reverse=True):
            try:
                model, train = self._read(step, {"model": model_like, "train": train_like})
            except Broken as error:
                logging.warning("%s", error)
                self.skipped.append(str(error))
                broken.append(step)
                continue
            self._set_aside(broken)
            return step, model, train
        if broken:
            raise UsageError(f"{self.skipped[-1]}; no other checkpoint there is whole")
        return None

    def restore_model(
        self, model_like: PyTree, which: Literal["best", "latest"] | int = "best"
    ) -> tuple[int, PyTree]:
        """Reads `model` alone, and never another step than the one asked for.

        Args:
          model_like: as in `restore`.
          which: a step, `"latest"`, or `"best"`: the step with the best score, or the newest one
            where no step was saved with a score.

        Returns:
          The step and `model`.

        Raises:
          UsageError: there is no such checkpoint, it is not whole, or the tree does not fit.
        """
        steps = self._steps()
        there = f"there are {', '.join(map(str, steps))}"
        if not steps:
            raise UsageError(f"{self.folder}: no checkpoint here")
        if isinstance(which, str):
            one_of("which", which, ("best", "latest"))
            best = self.best() if which == "best" else None
            step = max(steps) if best is None else best
        else:
            step = which
        if step not in steps:
            raise UsageError(f"{self.folder}: no checkpoint of step {step}; {there}")
        try:
            (model,) = self._read(step, {"model": model_like})
        except Broken as error:
            raise UsageError(f"{error}; {there}") from error
        return step, model

    def close(self) -> None:
        """Waits for the last save and lets go of the folder. Raises as `save` does."""
        self.wait()
        if self._opened is not None:
            manager, self._opened = self._opened, None
            manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _steps(self) -> list[int]:
        with self._refusing("read"):
            entries = list(self.folder.iterdir()) if self.folder.exists() else []
        return sorted(int(e.name) for e in entries if e.name.isdecimal() and e.is_dir())

    def _score(self, step: int) -> float | None:
        try:
            return self._about(step).get("score")
        except Broken:
            return None

    @staticmethod
    def _best_of(scores: dict[int, float | None]) -> int | None:
        claims = [(score, step) for step, score in scores.items() if score is not None]
        return max(claims)[1] if claims else None

    def _claim(self) -> None:
        """Makes the folder, and refuses at once where no save could succeed later."""
        with self._refusing("write"):
            # On every process, so that all refuse alike and none waits for another.
            self.folder.mkdir(parents=True, exist_ok=True)
            if "://" not in str(self.folder) and not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _manager(self) -> ocp.CheckpointManager:
        """Opened by the first save, since opening it sweeps away what a killed run left half done.

        An evaluation beside a training would sweep away the save under way.
        """
        if self._opened is None:
            self._claim()
            scores = {step: self._score(step) for step in self._steps()}
            self._scores = {step: score for step, score in scores.items() if score is not None}
            policies: list[Any] = [checkpoint_managers.LatestN(self._keep)]
            if self._keep_best:
                # Not Orbax's BestN: it reads the metrics item of every step at opening and a
                # broken one would end the run. Scores are in `about`, which we check.
                scored = lambda steps: {step: self._scores.get(step) for step in steps}
                policies.append(_Only(lambda steps: self._best_of(scored(steps))))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
            )
            with self._refusing("write"):
                self._opened = ocp.CheckpointManager(self.folder, options=options)
        return self._opened

    def _about(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "about"
        return self._attempt(
            step, lambda: leaves.unsealed(ocp.JsonCheckpointHandler().restore(path))
        )

    def _read(self, step: int, likes: dict[str, PyTree]) -> list[PyTree]:
        """The items named, in their order; raises `Broken`, the same on all processes."""
        found, problem = [], None
        try:
            about = self._about(step)
            for item, like in likes.items():
                self._fit(step, item, about[item], like)
            for item, like in likes.items():
                target = {name: leaves.target(leaf) for name, leaf in leaves.named(like).items()}
                path = self.folder / str(step) / item
                found.append(self._attempt(step, lambda: _read_item(path, about[item], target)))
        except Broken as error:
            problem = error
        if not _everywhere(problem is None):
            raise problem or Broken(f"{self.folder}: another process cannot read step {step}")
        return [leaves.shaped(like, item) for like, item in zip(likes.values(), found, strict=True)]

    def _fit(self, step: int, item: str, saved: dict[str, Any], like: PyTree) -> None:
        expected = {name: leaves.described(leaf) for name, leaf in leaves.named(like).items()}
        for name in [*expected, *saved]:
            here, want = saved.get(name, ["missing"])[0], expected.get(name, "none")
            if here != want:
                raise UsageError(
                    f"{self.folder}: this checkpoint is of another {_ITEMS[item]}: in step {step}, "
                    f"{item} leaf {name} is {here}, expected {want}"
                )

    def _set_aside(self, steps: list[int]) -> None:
        if steps and jax.process_index() == 0:
            for step in steps:
                aside = f"{step}.unreadable"
                while (self.folder / aside).exists():
                    aside += "-again"
                with self._refusing("write"):
                    (self.folder / str(step)).rename(self.folder / aside)
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("rain_jax: unreadable checkpoints are aside")
        if steps and self._opened is not None:
            self._opened.reload()

    @contextmanager
    def _refusing(self, verb: str) -> Iterator[None]:
        """What the file system refuses is the user's to mend: one line. The rest is ours."""
        try:
            yield
        except Exception as error:
            if (number := errno_of(error)) is None:
                raise
            why = os.strerror(number)
            raise UsageError(f"{self.folder}: cannot {verb} checkpoints here: {why}") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._refusing("write"):
                yield
        except UsageError:
            # Orbax would raise what is left of this error at the next save, and has given up the
            # steps which this one was to replace: the next save begins afresh.
            manager, self._opened = self._opened, None
            with suppress(Exception):
                if manager is not None:
                    manager.close()
            raise

    def _attempt(self, step: int, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`read()`, where whatever a broken file makes Orbax raise becomes `Broken`."""
        with hushed():
            try:
                return read()
            except (UsageError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # of the caller, this host or its devices: the files are not to blame
            except Exception as error:
                if errno_of(error) in (errno.EACCES, errno.EPERM):
                    raise UsageError(
                        f"{self.folder}: no right to read checkpoint {step}"
                    ) from error
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            # The error is gone by now, and what it alone kept alive must go while it is quiet.
            gc.collect()
            time.sleep(0.1)
        raise Broken(f"{self.folder}: checkpoint {step} is broken ({why})")


class _Only:
    """An Orbax preservation policy: of all steps, `choose(steps)` alone."""

    def __init__(self, choose: Any) -> None:
        self._choose = choose

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        chosen = self._choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == chosen for checkpoint in checkpoints]


def _everywhere(fine: bool) -> bool:
    """Whether all processes agree: each must go on with the same checkpoint."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _read_item(path: Any, saved: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    if not target:
        return {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        found = reader.restore(path, args=ocp.args.StandardRestore(target))
    for name, (_, checksum) in saved.items():
        if checksum is not None and checksum != leaves.checksum(found[name]):
            raise ValueError(f"leaf {name} is not as it was written")
    return found
