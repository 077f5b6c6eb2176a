"""What an evaluation runs and what comes of it, column by column."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rain_jax.evaluation.cost import Passes
from rain_jax.evaluation.counts import shares, worst_case
from rain_jax.evaluation.resume import Block
from rain_jax.evaluation.verdicts import Found, Judgement, as_they_are
from rain_jax.types import Attack, Iteration, Model, Threat


class AttackColumn(NamedTuple):
    """An attack, and what it is run on."""

    attack: Attack | Iteration
    # The form of the model that it is run on, where that is not the one that is judged: made when
    # its turn comes, which may be after hours.
    model: Callable[[], Model] | None = None
    # Another threat than the evaluation's. Such a column is a check, and no part of the worst case.
    threat: Threat | None = None
    # The attack's settings, JSON: part of its name in the resume log.
    settings: Any = None
    # What the checks (`evaluation.audit`) must know: whether the gradients are those of another
    # model than the one that is judged; by which surrogates of its parts they go; whether that form
    # of a random model draws nothing; and settings but for the number of steps, which tell attacks
    # that differ in it alone.
    transfer: bool = False
    through: tuple[str, ...] = ()
    fixed: bool = False
    kind: Any = None


class ColumnResult(NamedTuple):
    """What one attack did: verdicts on the images that it was given."""

    judgement: Judgement
    steps: np.ndarray  # int32 [N]
    queries: np.ndarray  # int32 [N], -1 for attacks that do not count them
    seconds: float
    passes: Passes | None = None  # of the model, over all images; None where they are not counted


class EvaluationRun(NamedTuple):
    """All that was measured of one model, by column: `clean`, then the attacks."""

    columns: dict[str, ColumnResult]
    random: bool  # whether verdicts are over several draws
    checks: tuple[str, ...]  # columns of another threat, that are no part of the worst case
    # Of a random model under several attacks: each image's worst one, judged again. Chosen and
    # judged by the same draws, the unluckiest of many would look like the strongest.
    worst: ColumnResult | None
    cascade: bool
    distances: dict[str, ColumnResult]  # of minimum-norm attacks, without a radius
    digest: str  # of the clean images and their labels
    found: "WorstImages"
    # The first few images with what came last to each of them, for the figure.
    clean: np.ndarray
    adversarial: np.ndarray
    adversarial_prediction: np.ndarray

    @property
    def robust(self) -> dict[str, np.ndarray]:
        """How correct the model is about each image [N] in each column, and in the worst case.

        Of a fixed model True or False, in a cascade after this column and all before it. Of a
        random one the share of the draws that are correct after this column's attack; an image that
        it was not given has the share from before. The worst case of several is judged anew.
        """
        clean = self.columns["clean"].judgement
        counted = shares if self.random else worst_case
        found = {"clean": counted(clean, [])}
        before: list[Judgement] = []
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
        """The first column that misclassifies each image [N], by number in `columns`; -1 for none.

        Images that are misclassified as they are have 0, `clean`. Of a random model it is the
        column whose image is correct least often.
        """
        if self.random:
            return np.where(self.found.share < 1, self.found.column, -1).astype(np.int32)
        clean = self.columns["clean"].judgement
        first = np.full(len(clean.index), -1, np.int32)
        for number, (name, column) in enumerate(self.columns.items()):
            if name in self.checks:
                continue
            judged = [] if name == "clean" else [column.judgement]
            first[(first < 0) & ~worst_case(clean, judged)] = number
        return first


class WorstImages:
    """Of every image [N] the candidate that the model is least often correct about.

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
        seen: Judgement = jax.tree.map(lambda leaf: leaf[block.kept], block.judgement)
        place = seen.index
        # Of candidates that are correct as often, the one of the larger margin.
        nearer = (seen.share == self.share[place]) & (seen.margin > self.margin[place])
        taken = seen.allowed & ((seen.share < self.share[place]) | nearer)
        rows = place[taken]
        self.image[rows] = block.image[taken]
        self.share[rows] = seen.share[taken]
        self.margin[rows] = seen.margin[taken]
        self.column[rows] = number
        self.taken[rows] = True

    def candidates(self, batches: Iterable[Any]) -> Iterator[Found]:
        """The worst image of each, for the judge; clean ones where there is no other."""
        for given in as_they_are(batches):
            index = given.batch.index
            there = self.taken[index][:, None, None, None]
            yield given._replace(image=np.where(there, self.image[index], given.image))
