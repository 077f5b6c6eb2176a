"""Attacks and judges the test images of an experiment, column by column, block by block."""

import functools
import math
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import build, defended, ladder, loading, looks, memory, workdir
from experiments.defended import logits_fn_of
from experiments.journal import Block, Journal, digest, digest_of, sample_of
from experiments.logs import Progress
from rain_jax import data, evaluation, norms
from rain_jax.evaluation import Passes
from rain_jax.types import Iteration, Key, Network, PyTree

# Images in the figure.
SHOWN = 10
# Blocks are so many batches, unless the config says how many images.
_BATCHES = 4


def evaluation_key(seed: int) -> Key:
    """The root of all draws in an evaluation; training draws nothing from it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def key_of(seed: int, title: str) -> Key:
    """A column's draws are its own, whichever others stand beside it in the config."""
    return jax.random.fold_in(evaluation_key(seed), zlib.crc32(title.encode()))


class Column(NamedTuple):
    """What one attack did: verdicts on the images that it was given."""

    judgement: evaluation.Judgement
    steps: np.ndarray  # int32 [N]
    queries: np.ndarray  # int32 [N], -1 for attacks that do not count them
    seconds: float
    passes: Passes | None = None  # of the model, over all images; None where nobody can count them


class Measured(NamedTuple):
    """What was seen of one model, by column: `clean`, then the attacks."""

    columns: dict[str, Column]
    random: bool  # whether verdicts are over several draws
    checks: tuple[str, ...]  # columns of another threat, that are no part of the worst case
    # Of a random model under several attacks: each image's worst one, judged again. Chosen and
    # judged by the same draws, the unluckiest of many would look like the strongest.
    worst: Column | None
    cascade: bool
    distances: dict[str, Column]  # of minimum-norm attacks, without a radius
    digest: str  # of the clean images and their labels
    found: "Worst"
    # The first few images with what came last to each of them, for the figure.
    clean: np.ndarray
    adversarial: np.ndarray
    adversarial_prediction: np.ndarray

    @property
    def stands(self) -> dict[str, np.ndarray]:
        """How right the model is about each image [N] in each column, and in the worst case.

        That is whether it is, and of a random model the share of the draws. In a cascade it is
        under this column and all before it.
        """
        clean = self.columns["clean"].judgement
        counted = evaluation.shares if self.random else evaluation.worst_case
        found = {"clean": counted(clean, [])}
        before: list[evaluation.Judgement] = []
        for name, column in self.columns.items():
            if name in self.checks:
                found[name] = counted(clean, [column.judgement])
            elif name != "clean":
                before.append(column.judgement)
                found[name] = counted(clean, before if self.cascade else before[-1:])
        if self.worst is not None:
            found["worst case"] = counted(clean, [self.worst.judgement])
        elif len(before) > 1 and not self.cascade:
            found["worst case"] = counted(clean, before)
        return found

    @property
    def broken_by(self) -> np.ndarray:
        """The first column that each image [N] fell to, by number in `columns`; -1 for none.

        Images that are wrong as they are fell to 0, `clean`. Of a random model: to whose image it
        is right about least often.
        """
        if self.random:
            return np.where(self.found.share < 1, self.found.column, -1).astype(np.int32)
        clean = self.columns["clean"].judgement
        first = np.full(len(clean.index), -1, np.int32)
        for number, (name, column) in enumerate(self.columns.items()):
            if name in self.checks:
                continue
            judged = [] if name == "clean" else [column.judgement]
            first[(first < 0) & ~evaluation.worst_case(clean, judged)] = number
        return first


class Worst:
    """Of every image [N] the candidate that the model is least often right about.

    Images lie in a file where there is one: as many as a data set has need not fit into memory.
    """

    def __init__(self, size: int, shape: tuple[int, ...], path: Path | None):
        whole = (size, *shape)
        self.image: np.ndarray = (
            np.zeros(whole, np.float32)
            if path is None
            else np.lib.format.open_memmap(path, "w+", np.float32, whole)
        )
        self.taken = np.zeros(size, bool)  # whether a candidate's image is there
        self.share = np.full(size, np.inf, np.float32)
        self.margin = np.full(size, -np.inf, np.float32)
        self.column = np.full(size, -1, np.int32)

    def offer(self, number: int, block: Block) -> None:
        """The judged images of column `number`."""
        seen: evaluation.Judgement = jax.tree.map(lambda leaf: leaf[block.kept], block.judgement)
        place = seen.index
        # Of candidates that are wrong as often, the one by the larger margin.
        nearer = (seen.share == self.share[place]) & (seen.margin > self.margin[place])
        taken = seen.allowed & ((seen.share < self.share[place]) | nearer)
        rows = place[taken]
        self.image[rows] = block.image[taken]
        self.share[rows] = seen.share[taken]
        self.margin[rows] = seen.margin[taken]
        self.column[rows] = number
        self.taken[rows] = True

    def candidates(self, batches: Iterator[Any]) -> Iterator[evaluation.Found]:
        """The worst image of each, for the judge; clean ones where there is no other."""
        for given in evaluation.as_they_are(batches):
            index = given.batch.index
            there = self.taken[index][:, None, None, None]
            yield given._replace(image=np.where(there, self.image[index], given.image))


def measure(
    experiment: build.Experiment, variables: PyTree, name: str, folder: Path | None = None
) -> Measured:
    """Attacks and judges the test images, column by column.

    What is done is kept in `folder`, and found there when a killed evaluation is started again.
    """
    return _Measuring(experiment, variables, name, folder)()


class _Measuring:
    """One evaluation of one model."""

    def __init__(
        self, experiment: build.Experiment, variables: PyTree, name: str, folder: Path | None
    ):
        settings = experiment.evaluation
        self.experiment, self.name = experiment, name
        self.devices = experiment.parallel.placed()
        self.room = memory.Room(settings.batch_size, self.devices.size)
        self.batch_size = self.room.size  # as asked for
        self.block = _BATCHES * self.batch_size if settings.block is None else settings.block
        self.source = data.first(experiment.splits.test, settings.images)
        self.draws = settings.draws or 1
        self.rules = evaluation.Rules(experiment.threat, self.draws, settings.eight_bit)
        self.model = logits_fn_of(experiment.network)
        self.weights = digest_of(variables)
        self.variables = self.devices.replicate(variables)
        self.journal = Journal(folder)
        # Every process has its own, or they would write over each other.
        path = self.journal.path(f"worst.{jax.process_index()}.npy")
        self.worst = Worst(self.source.size, self.source.shape, path)
        count = min(SHOWN, self.source.size)
        self.shown = np.zeros((count, *self.source.shape), np.float32)
        self.predicted = np.zeros(count, np.int32)
        self.columns: dict[str, Column] = {}
        # Columns of the same rules are judged by the same program.
        self.judge = functools.cache(
            lambda rules, size: evaluation.judging(self.model, rules, self.devices, batch_size=size)
        )
        # A hash of each clean image and its label.
        self.known = np.zeros(self.source.size, "S16")

    def __call__(self) -> Measured:
        settings, everyone = self.experiment.evaluation, np.arange(self.source.size)
        cascade = settings.suite is not None if settings.cascade is None else settings.cascade
        looks_ = self.experiment.looks
        counted = [title for title, look in looks_.items() if look.threat is None]
        clean = self.columns["clean"] = self.unharmed("clean", everyone)
        shown = self.shown.copy()
        right = np.asarray(clean.judgement.right)
        standing = evaluation.in_some_draw(clean.judgement)
        for title, look in looks_.items():
            counts = title in counted
            given = np.flatnonzero(standing) if cascade and counts else everyone
            self.columns[title] = self.under(title, look, self.rules, given, early=True)
            if counts:
                seen = self.columns[title].judgement
                standing[seen.index] &= evaluation.in_some_draw(seen)
        last = None
        if self.draws > 1 and len(counted) > 1:
            last = self.unharmed("worst case", everyone)
        adversarial, prediction = self.shown.copy(), self.predicted.copy()
        boundless = self.rules._replace(threat=self.experiment.threat._replace(radius=math.inf))
        distances = {
            title: self.under(title, looks.Look(attack), boundless, np.flatnonzero(right), False)
            for title, attack in self.experiment.distances.items()
        }
        checks = tuple(title for title in looks_ if title not in counted)
        return Measured(
            self.columns, self.draws > 1, checks, last, cascade, distances, digest(self.known),
            self.worst, shown, adversarial, prediction,
        )  # fmt: skip

    def unharmed(self, title: str, given: np.ndarray) -> Column:
        """Images as they are, or as the attacks before left the worst of each."""

        def found(places: np.ndarray) -> Iterator[evaluation.Found]:
            batches = data.evaluation_batches(self.source, self.room.size, places)
            return (
                self.hashed(evaluation.as_they_are(batches))
                if title == "clean"
                else self.worst.candidates(batches)
            )

        turns_on = {"candidates": digest(self.worst.share, self.worst.margin, self.worst.column)}
        column = self.judged(title, self.rules, found, given, turns_on, offered=title == "clean")
        return column._replace(passes=Passes(float(self.draws * len(given)), 0.0))

    def hashed(self, found: Iterator[evaluation.Found]) -> Iterator[evaluation.Found]:
        """The same, remembered by their hashes: image by image, so that no batch shows in them."""
        for some in found:
            for image, label, index in zip(*some.batch[:3], strict=True):
                self.known[index] = digest(image, label).encode()
            yield some

    def under(
        self, title: str, look: looks.Look, rules: evaluation.Rules, given: np.ndarray, early: bool
    ) -> Column:
        """A column's images after its attack."""
        network, weights, known = self.climbed(look.through)
        # Of a random model the worst mean is wanted, not the first one that is bad enough; and of
        # another form of the model the judge may think otherwise. Of rounded images he is asked.
        early = early and self.draws == 1 and look.through is None
        if look.threat is not None:
            rules = rules._replace(threat=look.threat)

        @functools.cache
        def drive(size: int) -> Any:
            return evaluation.packed(
                look.attack, logits_fn_of(network), self.devices, batch_size=size,
                early=self.judge(rules, size) if early and rules.eight_bit else early,
            )  # fmt: skip

        key = key_of(self.experiment.seed, title)

        def found(places: np.ndarray) -> Iterator[evaluation.Found]:
            batches = data.evaluation_batches(self.source, self.room.size, places)
            return drive(self.room.size)(weights, key, batches)

        settings = self.experiment.evaluation
        # A rung that is left out, or another sweep, makes no other of what is climbed already.
        budget = settings.ladder and {name: settings.ladder[name] for name in ladder.BUDGET}
        turns_on = {
            "settings": settings.attacks.get(title, settings.distances.get(title)),
            "suite": settings.suite, "ladder": budget,
            "through": look.through, "climbed": known, "early": early,
        }  # fmt: skip
        offered = look.threat is None and title in self.experiment.looks
        column = self.judged(title, rules, found, given, turns_on, offered=offered)
        return column._replace(passes=self.passes(look, column))

    def climbed(self, through: str | None) -> tuple[Network, PyTree, str]:
        """The form of the model that an attack climbs, its weights, and what tells them apart."""
        if through is None:
            return self.experiment.network, self.variables, ""
        if not through.startswith(defended.RUN):
            return self.experiment.assembly.through(through), self.variables, ""
        folder = Path(through.removeprefix(defended.RUN))
        other = build.experiment(workdir.read_config(folder))
        variables = loading.load(other, folder)[0]
        return other.network, self.devices.replicate(variables), digest_of(variables)

    def passes(self, look: looks.Look, column: Column) -> Passes | None:
        """Forward and backward passes of an attack, and of the judge."""
        if not isinstance(look.attack, Iteration):
            return None
        classes = self.experiment.splits.test.classes
        cost = evaluation.cost(look.attack, self.source.shape, classes)
        judged = Passes(float(self.draws * len(column.steps)), 0.0)
        return evaluation.passes(look.attack, cost, column.steps) + judged

    def judged(
        self, title: str, rules: evaluation.Rules, found: Any, given: np.ndarray,
        turns_on: dict[str, Any], *, offered: bool,
    ) -> Column:  # fmt: skip
        """The verdicts on the images at the places `given`, in blocks, each known or made now.

        `offered` says whether they are candidates for the worst of each image.
        """

        def verdicts_on(places: np.ndarray) -> Iterator[evaluation.Verdicts]:
            return self.judge(rules, self.room.size)(self.variables, key, found(places))

        key = key_of(self.experiment.seed, title)
        threat = rules.threat
        pages = self.journal.column(title, {
            **turns_on,
            "model": [self.experiment.config[s] for s in ("network", "defence", "ensemble")],
            "weights": self.weights, "data": sample_of(self.source), "given": digest(given),
            "seed": self.experiment.seed, "batch_size": self.batch_size, "block": self.block,
            "mapping": self.experiment.parallel.mapping, "devices_used": self.devices.size,
            "threat": [norms.name_of(threat.norm), float(threat.radius), threat.low, threat.high],
            "draws": rules.draws, "eight_bit": rules.eight_bit,
        })  # fmt: skip
        number = len(self.columns)
        blocks: list[Block] = []
        shown = offered or title == "worst case"
        with Progress(f"{self.name}: {title}", len(given), unit="img") as bar:
            for start in range(0, len(given), self.block):
                places = given[start : start + self.block]
                if len(blocks) < len(pages):
                    block = pages.read(len(blocks))
                else:
                    began = time.monotonic()
                    verdicts = self.room.collect(
                        partial(verdicts_on, places),
                        lambda some, sign: bar.advance(sign * len(some.steps)),
                    )
                    block = self.joined(verdicts, began, offered=offered, shown=shown)
                    pages.write(len(blocks), block)
                if title == "clean":
                    self.known[block.judgement.index] = block.digest
                if offered:
                    self.worst.offer(number, block)
                if shown:
                    self.show(block)
                # Its images are seen to; what stays in memory does not grow with them.
                blocks.append(block._replace(image=block.image[:0]))
        if not blocks:  # nobody was left to attack
            none = np.zeros(0, np.int32)
            return Column(evaluation.nobody(), none, none, 0.0)
        return Column(
            evaluation.join([block.judgement for block in blocks]),
            np.concatenate([block.steps for block in blocks]),
            np.concatenate([block.queries for block in blocks]),
            sum(block.seconds for block in blocks),
        )

    def joined(
        self, verdicts: list[evaluation.Verdicts], began: float, *, offered: bool, shown: bool
    ) -> Block:
        """What came of a block, in the order of the data set, with the images that matter later."""
        order = np.argsort(np.concatenate([some.judgement.index for some in verdicts]))
        seen = evaluation.join([some.judgement for some in verdicts])
        image, steps, queries = (
            np.concatenate([getattr(some, field) for some in verdicts])[order]
            for field in ("image", "steps", "queries")
        )
        # Of a fixed model those that stand prove nothing.
        told = offered & (~evaluation.standing(seen) | (self.draws > 1))
        kept = np.flatnonzero(told | (shown & (seen.index < SHOWN)))
        known = self.known[seen.index if not self.columns else []]
        return Block(
            seen, steps, queries, kept.astype(np.int32), image[kept], known,
            time.monotonic() - began,
        )  # fmt: skip

    def show(self, block: Block) -> None:
        for row, image in zip(block.kept, block.image, strict=True):
            index = block.judgement.index[row]
            if index < SHOWN:
                self.shown[index] = image
                self.predicted[index] = block.judgement.prediction[row]
