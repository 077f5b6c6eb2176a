"""Verdicts added up: over all images, over attacks, and as a curve over the radius."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from rain_jax.checks import UsageError
from rain_jax.evaluation.verdicts import Judgement


def join(judgements: Iterable[Judgement]) -> Judgement:
    """Judgements of several batches as one, in the order of the data set."""
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *judgements)
    order = np.argsort(whole.index, kind="stable")
    return jax.tree.map(lambda leaf: leaf[order], whole)


def nobody() -> Judgement:
    """The judgement of no images."""
    empty = np.zeros(0)
    whole, flag = empty.astype(np.int32), empty.astype(bool)
    return Judgement(whole, whole, flag, empty, empty, whole, flag, empty, empty, flag)


def standing(judgement: Judgement) -> np.ndarray:
    """Images [N] bool that the classifier still gets right, or that broke the rules to be wrong."""
    return np.asarray(judgement.right | ~judgement.allowed)


def in_some_draw(judgement: Judgement) -> np.ndarray:
    """Images [N] bool that some draw of the classifier still gets right: what is left to attack.

    Of a random model whose mean is wrong, an attack can still lower the share of the draws that are
    right. Of a fixed one it is `standing`.
    """
    return np.asarray((judgement.share > 0) | ~judgement.allowed)


def worst_case(clean: Judgement, attacked: Iterable[Judgement]) -> np.ndarray:
    """Images [N] bool that are right as they are and stand after every attack.

    An attack may have been spared images that had fallen before: it then has no say about them.
    """
    stands = np.asarray(clean.right).copy()
    for judgement in attacked:
        stands[_rows(clean, judgement)] &= standing(judgement)
    return stands


def shares(clean: Judgement, attacked: Iterable[Judgement]) -> np.ndarray:
    """How often [N] a random model is right about each image after the last attack on it.

    The smaller one of two such shares would be no estimate of either, since the unluckier draws
    would win: to compare attacks, judge the worst image of each again. An image that was not
    attacked, or that broke the rules, counts as it was.
    """
    found = np.asarray(clean.share, np.float32).copy()
    for judgement in attacked:
        rows = _rows(clean, judgement)
        found[rows] = np.where(judgement.allowed, judgement.share, found[rows])
    return found


class Proportion(NamedTuple):
    """`hits` of `total`, with Wilson's 95 % interval for the sampling of the images.

    An image that is right in some draws only is a part of a hit; the interval takes it for chance,
    and so is a little wide.
    """

    hits: float
    total: int

    @property
    def value(self) -> float:
        """The fraction; not a number when nothing was counted."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of Wilson's score interval at 95 %."""
        n, z = self.total, 1.959964
        if not n:
            return math.nan, math.nan
        centre = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        spread = math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n))
        half = z * spread / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def proportion(right: np.ndarray) -> Proportion:
    """How many of the flags [N] are set, or the sum of shares [N] in [0, 1]."""
    hits = float(np.sum(right, dtype=np.float64))
    return Proportion(int(hits) if hits.is_integer() else hits, int(np.size(right)))


def curve(clean: Judgement, nearest: Judgement, radii: np.ndarray) -> np.ndarray:
    """Accuracy [R] at each of the `radii` [R], from one run of a minimum-norm attack.

    `nearest` judges what the attack found at radius infinity, on the images that are right as they
    are: one is lost from the distance of its nearest misclassified neighbour on.
    """
    lost = np.zeros(len(clean.index))
    lost[_rows(clean, nearest)] = np.where(standing(nearest), np.inf, nearest.distance)
    lost[~clean.right] = 0.0
    return np.mean(lost[None, :] > np.asarray(radii)[:, None], axis=1)


def _rows(whole: Judgement, part: Judgement) -> list[int]:
    """Where the images of `part` stand in `whole`."""
    place = {int(index): row for row, index in enumerate(whole.index)}
    try:
        return [place[int(index)] for index in part.index]
    except KeyError:
        raise UsageError("judgements of different images cannot be combined") from None
