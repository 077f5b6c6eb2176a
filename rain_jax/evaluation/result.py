"""What an evaluation came to, for a notebook and for a terminal."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rain_jax import norms
from rain_jax.evaluation.audit import Check
from rain_jax.evaluation.columns import ColumnResult, EvaluationRun
from rain_jax.evaluation.cost import Passes
from rain_jax.evaluation.counts import Proportion, proportion, standing
from rain_jax.logs import table
from rain_jax.types import Threat


@dataclass(frozen=True)
class Result:
    """How robust a model is, by the attacks of one evaluation, in their order.

    `clean` [N, H, W, C] are the images as floats, `warnings` what speaks against the numbers, `run`
    all that was measured, and `checks` what must be so before a number is believed, with whether it
    is; None if none were made.
    """

    name: str
    threat: Threat
    clean: np.ndarray
    run: EvaluationRun
    warnings: tuple[str, ...] = ()
    checks: tuple[Check, ...] | None = None

    @property
    def robust(self) -> dict[str, np.ndarray]:
        """bool [N] by attack, `clean` first: correct after this attack and those before it.

        Of a random model float [N]: the share of the draws that are correct after this attack,
        whatever those before it found; "worst case" is judged anew, on each image's worst.
        """
        counted = [title for title in self.run.columns if title not in self.run.checks]
        robust = self.run.robust
        if "worst case" not in robust or self.run.random:
            return robust
        found, left = {}, None
        for title in counted:
            left = robust[title] if left is None else left & robust[title]
            found[title] = left
        return found

    @property
    def misclassified(self) -> dict[str, np.ndarray]:
        """bool [N] by attack: the images that it was given and that it got misclassified."""
        found = {}
        for title, column in self.run.columns.items():
            found[title] = np.zeros(len(self.clean), bool)
            found[title][column.judgement.index] = ~standing(column.judgement)
        return found

    @property
    def accuracy(self) -> dict[str, float]:
        """By attack: the mean of `robust`, the share of all images that are correct."""
        return {title: share.value for title, share in self._shares().items()}

    @property
    def clean_accuracy(self) -> float:
        """The share of the images that are classified correctly as they are."""
        return self.accuracy["clean"]

    @property
    def robust_accuracy(self) -> float:
        """The share of the images that are classified correctly after every attack."""
        return list(self.accuracy.values())[-1]

    @property
    def adversarial_images(self) -> np.ndarray:
        """float32 [N, H, W, C]: of each image the one that misled the model most, or itself."""
        found = self.run.found
        there = found.taken & ((found.share < 1) | self.run.random)
        return np.where(there[:, None, None, None], found.image, self.clean)

    @property
    def distances(self) -> np.ndarray:
        """float64 [N]: of `adversarial_images` from the clean ones, in the threat's norm."""
        change = np.float64(self.adversarial_images) - self.clean
        return np.linalg.norm(
            change.reshape(len(change), -1), ord=self.threat.norm.order, axis=1
        )  # fmt: skip

    @property
    def passes(self) -> Passes | None:
        """Forward and backward passes of all attacks and the judge; None if one is not counted."""
        columns = self._columns()
        counted = [column.passes for column in columns if column.passes is not None]
        return sum(counted, start=Passes(0.0, 0.0)) if len(counted) == len(columns) else None

    @property
    def seconds(self) -> float:
        """That attacks and judge took, compiling among them."""
        return sum(column.seconds for column in self._columns())

    def _columns(self) -> list[ColumnResult]:
        return [*self.run.columns.values(), *([self.run.worst] if self.run.worst else [])]

    def __str__(self) -> str:
        return "\n".join([self._head(), "", table(self._rows(), _HEADERS), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks."""
        cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row)
        rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in self._rows())
        notes = "".join(f"<br>{html.escape(note)}" for note in self._notes())
        return (
            f"<div><p>{html.escape(self._head())}</p><table><thead><tr>{cells('th', _HEADERS)}"
            f"</tr></thead><tbody>{rows}</tbody></table><p>{notes.removeprefix('<br>')}</p></div>"
        )

    def _shares(self) -> Mapping[str, Proportion]:
        return {title: proportion(robust) for title, robust in self.robust.items()}

    def _head(self) -> str:
        radius = float(self.threat.radius)
        return (
            f"{self.name}: per cent correct of {len(self.clean):,} images, 95 % intervals; "
            f"{norms.name_of(self.threat.norm)} radius {radius:.4g}"
        )

    def _rows(self) -> list[list[str]]:
        columns: dict[str, ColumnResult | None] = dict(self.run.columns)
        return [
            [title, _percent(share), *_cost_of(columns.get(title, self.run.worst))]
            for title, share in self._shares().items()
        ]

    def _notes(self) -> list[str]:
        failed = [check.flag() for check in self.checks or () if not check.passed]
        found = [f"! {line}" for line in (*self.warnings, *failed)]
        return found if self.checks is not None else [*found, "no checks were made (checks=False)"]


_HEADERS = ("after", "correct", "images", "misclassified", "forward", "backward", "seconds")


def _percent(share: Proportion) -> str:
    low, high = share.interval
    return f"{100 * share.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _cost_of(column: ColumnResult | None) -> list[str]:
    if column is None:
        return [""] * 5
    passes: Any = column.passes or ("", "")
    return [
        f"{len(column.judgement.index):,}", f"{np.sum(~standing(column.judgement)):,}",
        *(count if isinstance(count, str) else f"{count:,.0f}" for count in passes),
        f"{column.seconds:.1f}",
    ]  # fmt: skip
