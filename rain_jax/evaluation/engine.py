"""The evaluation of one model: attacks one after the other, judged, resumable, with progress.

The commands and `rain_jax.evaluate` run an `Evaluation`. Images are attacked in blocks. A block
that is done is kept in a folder: an evaluation that was killed reads it when it is started again,
attacks the images that are left, and ends with the same results.
"""

import functools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rain_jax import norms
from rain_jax.data import Source, evaluation_batches
from rain_jax.evaluation.columns import AttackColumn, ColumnResult, EvaluationRun, WorstImages
from rain_jax.evaluation.cost import Passes, cost
from rain_jax.evaluation.counts import in_some_draw, join, nobody, standing
from rain_jax.evaluation.packing import Drive, packed, passes
from rain_jax.evaluation.resume import (
    Block,
    Journal,
    circumstances,
    digest,
    digest_of,
    digest_of_json,
    sample_of,
)
from rain_jax.evaluation.room import Room
from rain_jax.evaluation.verdicts import (
    Found,
    Judging,
    LogitsFnOf,
    Rules,
    Verdicts,
    as_they_are,
    judging,
)
from rain_jax.logs import Progress
from rain_jax.models.conv import left_to_lax
from rain_jax.parallel import Devices
from rain_jax.remembered import remembered
from rain_jax.types import Attack, Iteration, Key, LogitsFn, Model, Threat, Variables

# Images in the figure.
SHOWN = 10
# Blocks are so many batches, unless it is said how many images.
_BATCHES = 4


def attack_and_judge(
    drive: Drive, judge: Judging, variables: tuple[Variables, Variables], key: Key, batches: Any
) -> Iterator[Verdicts]:
    """Verdicts on what an attack finds: the one place where images are attacked and judged.

    `variables` are those that are attacked, and those that are judged.
    """
    attacked, judged = variables
    return judge(judged, key, drive(attacked, key, batches))


def cascade(
    drives: Mapping[str, Drive],
    judge: Judging,
    variables: Variables,
    key: Key,
    batches: Callable[[np.ndarray], Iterable[Any]],
    count: int,
) -> dict[str, np.ndarray]:
    """Which of `count` images are correct after each of some attacks, without a record.

    bool [N] by name. Each gets those that were correct before it: `batches(wanted)` are the images,
    valid where `wanted` [N] is true. Benchmarks ask this, and training of its held-out images.
    """
    left = np.ones(count, bool)
    found: dict[str, np.ndarray] = {}
    for number, (name, drive) in enumerate(drives.items()):
        own = jax.random.fold_in(key, number)
        for some in attack_and_judge(drive, judge, (variables, variables), own, batches(left)):
            left[some.judgement.index] = standing(some.judgement)
        found[name] = left.copy()
    return found


def logits_fn_of(model: Model) -> LogitsFnOf:
    """The model as a function of its variables; the same object for the same model."""
    return _logits_fn_of(model.logits)


@remembered
def _logits_fn_of(logits: Callable[..., Any]) -> LogitsFnOf:
    def of(variables: Variables) -> LogitsFn:
        return lambda key, image: logits(variables, key, image)

    return of


@remembered
def _judging(of: LogitsFnOf, rules: Rules, devices: Devices, size: int) -> Judging:
    """Columns of the same rules are judged by the same program, and so is the next evaluation."""
    return judging(of, rules, devices, batch_size=size)


@remembered
def _driving(
    attack: Attack | Iteration, of: LogitsFnOf, devices: Devices, size: int,
    early: bool | Judging, like: Any,
) -> Drive:  # fmt: skip
    """The programs of an attack, made for images, variables and keys that are `like` these."""
    return packed(attack, of, devices, batch_size=size, early=early)


@dataclass
class Evaluation:
    """One evaluation of one model on the images of `source`. Call it to run it.

    Attributes:
      model: what is judged, and attacked unless a column says otherwise.
      columns: the attacks, by title, in the order in which they run.
      distances: minimum-norm attacks, by title, which are run without a radius on the images that
        are classified correctly.
      key: the root of all draws.
      cascade: whether an attack is spared the images that were misclassified before it.
      draws: of a random model, for each verdict.
      eight_bit: whether images are rounded to 256 levels before they are judged.
      batch_size: images that are shown to the model at once, over all devices.
      block: images after which results are kept, by default four batches.
      folder: where they are kept; nothing is without.
      name: what progress calls this.
      identity: JSON that tells this model's structure from others in the resume log. Its weights
        are hashed beside it.
      recorded: JSON of what else its record is to hold, such as checks: it tells records apart, and
        nothing in the resume log.
      surrogates: smooth stand-ins for parts of the model that some attack should go through.
      shown: whether progress is shown; None asks the environment.
    """

    model: Model
    source: Source
    threat: Threat
    columns: Mapping[str, AttackColumn]
    key: Key
    devices: Devices
    distances: Mapping[str, AttackColumn] = field(default_factory=dict)
    cascade: bool = True
    draws: int = 1
    eight_bit: bool = False
    batch_size: int = 256
    block: int | None = None
    folder: Path | None = None
    name: str = "model"
    identity: Any = None
    recorded: Any = None
    surrogates: tuple[str, ...] = ()
    shown: bool | None = None

    def __post_init__(self) -> None:
        source = self.source
        self._room = Room(self.batch_size, self.devices.size)
        self._size = self._room.size  # as asked for
        self._block = _BATCHES * self._size if self.block is None else self.block
        self._rules = Rules(self.threat, self.draws, self.eight_bit)
        self._weights = digest_of(self.model.variables)
        self._variables = self.devices.replicate(self.model.variables)
        count = min(SHOWN, source.size)
        self._images = np.zeros((count, *source.shape), np.float32)
        self._predicted = np.zeros(count, np.int32)
        self._done: dict[str, ColumnResult] = {}
        # A hash of each clean image and its label.
        self._known = np.zeros(source.size, "S16")

    def __call__(self) -> EvaluationRun:
        # Every process has its own, or they would write over each other.
        path = self._journal.path(f"worst.{jax.process_index()}.npy")
        self._worst = WorstImages(self.source.size, self.source.shape, path)
        everyone = np.arange(self.source.size)
        counted = [title for title, column in self.columns.items() if column.threat is None]
        clean = self._done["clean"] = self._unattacked("clean", everyone)
        shown = self._images.copy()
        correct = np.asarray(clean.judgement.right)
        left = in_some_draw(clean.judgement)
        for title, column in self.columns.items():
            counts = title in counted
            given = np.flatnonzero(left) if self.cascade and counts else everyone
            self._done[title] = self._under(title, column, self._rules, given, early=True)
            if counts:
                seen = self._done[title].judgement
                left[seen.index] &= in_some_draw(seen)
        last = None
        if self.draws > 1 and len(counted) > 1:
            last = self._unattacked("worst case", everyone)
        adversarial, prediction = self._images.copy(), self._predicted.copy()
        boundless = self._rules._replace(threat=self.threat._replace(radius=math.inf))
        distances = {
            title: self._under(title, column, boundless, np.flatnonzero(correct), early=False)
            for title, column in self.distances.items()
        }
        checks = tuple(title for title in self.columns if title not in counted)
        return EvaluationRun(
            self._done, self.draws > 1, checks, last, self.cascade, distances, digest(self._known),
            self._worst, shown, adversarial, prediction,
        )  # fmt: skip

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what is evaluated, how, by which code and on what kind of device.

        Two evaluations of one fingerprint have the same verdicts but for rounding, and records of
        the same parts: batch sizes and the number of devices do not enter.
        """
        columns = [
            [title, column.settings, _plain(column.threat)]
            for columns in (self.columns, self.distances)
            for title, column in columns.items()
        ]
        return digest_of_json({
            **circumstances(), "columns": columns, "threat": _plain(self.threat),
            "model": self.identity, "weights": self._weights, "data": sample_of(self.source),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(), "cascade": self.cascade,
            "draws": self.draws, "eight_bit": self.eight_bit, "recorded": self.recorded,
        })  # fmt: skip

    @property
    def _journal(self) -> Journal:
        return Journal(self.folder)

    def finish(self) -> None:
        """Forgets what was kept for a restart."""
        self._journal.finish()

    def key_of(self, title: str) -> Key:
        """The root of a column's draws, which do not depend on the other columns."""
        return key_of(self.key, title)

    def _judge(self, rules: Rules, size: int) -> Judging:
        return _judging(logits_fn_of(self.model), rules, self.devices, size)

    def _unattacked(self, title: str, given: np.ndarray) -> ColumnResult:
        """Images as they are, or as the attacks before left the worst of each."""

        def drive(variables: Variables, key: Key, batches: Iterable[Any]) -> Iterator[Found]:
            if title == "clean":
                return self._hashed(as_they_are(batches))
            return self._worst.candidates(batches)

        worst = self._worst
        turns_on = {"candidates": digest(worst.share, worst.margin, worst.column)}
        result = self._judged(
            title, self._rules, lambda size: drive, self._variables, given, turns_on,
            offered=title == "clean",
        )  # fmt: skip
        return result._replace(passes=Passes(float(self.draws * len(given)), 0.0))

    def _hashed(self, found: Iterator[Found]) -> Iterator[Found]:
        """The same, remembered by their hashes: image by image, so that no batch shows in them."""
        for some in found:
            for image, label, index in zip(*some.batch[:3], strict=True):
                self._known[index] = digest(image, label).encode()
            yield some

    def _under(
        self, title: str, column: AttackColumn, rules: Rules, given: np.ndarray, early: bool
    ) -> ColumnResult:
        """The result of one attack."""
        model, weights, known = self.model, self._variables, ""
        if column.model is not None:
            model = column.model()
            if model.variables is not self.model.variables:
                weights = self.devices.replicate(model.variables)
                known = digest_of(model.variables)
        # Of a random model the worst mean is wanted, not the first one that is bad enough; and of
        # another form of the model the judge may think otherwise. Where images are rounded, the
        # judge says which may leave.
        early = early and self.draws == 1 and column.model is None
        if column.threat is not None:
            rules = rules._replace(threat=column.threat)
        of = logits_fn_of(model)
        like = (
            self.source.shape, self.source.classes, str(jax.random.key_impl(self.key)),
            left_to_lax(), jax.tree.structure(weights),
            tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(weights)),
        )  # fmt: skip

        def drive(size: int) -> Drive:
            leaves = self._judge(rules, size) if early and rules.eight_bit else early
            return _driving(column.attack, of, self.devices, size, leaves, like)

        turns_on = {"settings": column.settings, "attacked": known, "early": early}
        offered = column.threat is None and title in self.columns
        result = self._judged(title, rules, drive, weights, given, turns_on, offered=offered)
        return result._replace(passes=self._passes(column.attack, result))

    def _passes(self, attack: Attack | Iteration, result: ColumnResult) -> Passes | None:
        """Forward and backward passes of an attack, and of the judge."""
        if not isinstance(attack, Iteration):
            return None
        costs = cost(attack, self.source.shape, self.source.classes)
        judged = Passes(float(self.draws * len(result.steps)), 0.0)
        return passes(attack, costs, result.steps) + judged

    def _judged(
        self, title: str, rules: Rules, drive: Callable[[int], Drive], attacked: Variables,
        given: np.ndarray, turns_on: Mapping[str, Any], *, offered: bool,
    ) -> ColumnResult:  # fmt: skip
        """The verdicts on the images at the places `given`, in blocks, each known or made now.

        `offered` says whether they are candidates for the worst of each image.
        """

        # The same ones for every block, also where nothing is kept between evaluations.
        driving = functools.cache(drive)
        judging_ = functools.cache(partial(self._judge, rules))

        def verdicts_on(places: np.ndarray) -> Iterator[Verdicts]:
            size = self._room.size
            batches = evaluation_batches(self.source, size, places)
            variables = attacked, self._variables
            return attack_and_judge(driving(size), judging_(size), variables, key, batches)

        key, threat = self.key_of(title), rules.threat
        pages = self._journal.column(title, {
            **turns_on,
            "model": self.identity, "weights": self._weights, "data": sample_of(self.source),
            "given": digest(given), "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "batch_size": self._size, "block": self._block, "devices_used": self.devices.size,
            "threat": _plain(threat),
            "draws": rules.draws, "eight_bit": rules.eight_bit,
        })  # fmt: skip
        number = len(self._done)
        blocks: list[Block] = []
        shown = offered or title == "worst case"
        name = f"{self.name}: {title}"
        with Progress(name, len(given), unit="img", shown=self.shown) as bar:
            for start in range(0, len(given), self._block):
                places = given[start : start + self._block]
                if len(blocks) < len(pages):
                    block = pages.read(len(blocks))
                else:
                    began = time.monotonic()
                    verdicts = self._room.collect(
                        partial(verdicts_on, places),
                        lambda some, sign: bar.advance(sign * len(some.steps)),
                    )
                    block = self._joined(verdicts, began, offered=offered, shown=shown)
                    pages.write(len(blocks), block)
                if title == "clean":
                    self._known[block.judgement.index] = block.digest
                if offered:
                    self._worst.offer(number, block)
                if shown:
                    self._show(block)
                # Its images are seen to; what stays in memory does not grow with them.
                blocks.append(block._replace(image=block.image[:0]))
        if not blocks:  # no image was left to attack
            none = np.zeros(0, np.int32)
            return ColumnResult(nobody(), none, none, 0.0)
        return ColumnResult(
            join([block.judgement for block in blocks]),
            np.concatenate([block.steps for block in blocks]),
            np.concatenate([block.queries for block in blocks]),
            sum(block.seconds for block in blocks),
        )

    def _joined(
        self, verdicts: list[Verdicts], began: float, *, offered: bool, shown: bool
    ) -> Block:
        """What came of a block, in the order of the data set, with the images that matter later."""
        order = np.argsort(np.concatenate([some.judgement.index for some in verdicts]))
        seen = join([some.judgement for some in verdicts])
        image, steps, queries = (
            np.concatenate([getattr(some, field) for some in verdicts])[order]
            for field in ("image", "steps", "queries")
        )
        # Of a fixed model those that are still correct prove nothing.
        wanted = offered & (~standing(seen) | (self.draws > 1))
        kept = np.flatnonzero(wanted | (shown & (seen.index < SHOWN)))
        known = self._known[seen.index if not self._done else []]
        return Block(
            seen, steps, queries, kept.astype(np.int32), image[kept], known,
            time.monotonic() - began,
        )  # fmt: skip

    def _show(self, block: Block) -> None:
        for row, image in zip(block.kept, block.image, strict=True):
            index = block.judgement.index[row]
            if index < SHOWN:
                self._images[index] = image
                self._predicted[index] = block.judgement.prediction[row]


def _plain(threat: Threat | None) -> list[Any] | None:
    """A threat in JSON."""
    if threat is None:
        return None
    return [norms.name_of(threat.norm), *map(float, (threat.radius, threat.low, threat.high))]


def key_of(root: Key, title: str) -> Key:
    """The root of a column's draws, which do not depend on the other columns."""
    return jax.random.fold_in(root, zlib.crc32(title.encode()))
