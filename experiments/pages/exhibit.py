"""One thing that a report shows, and what its makers share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from experiments.pages.figures import Drawing
from experiments.pages.load import Record, Run
from experiments.pages.tables import Table
from experiments.prepare import CLASSES
from rain_jax.checks import UsageError


class Exhibit(NamedTuple):
    """A table, and a figure of it where there is one to draw."""

    slug: str  # of its files
    title: str
    caption: str
    table: Table
    draw: Drawing | None = None
    size: tuple[float, float] = (7.0, 3.6)  # inches
    leading: bool = False  # whether the table is to be read first, and not only behind the figure


class Section(NamedTuple):
    """Exhibits that answer one question."""

    slug: str
    title: str
    intro: str
    exhibits: list[Exhibit]


def numbered(name: str, place: int) -> str:
    return name if place == 0 else f"{name}-{place + 1}"


def safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def of_model(kind: str, run: Run, model: str) -> tuple[str, str]:
    """The slug and the title of what is shown of one model: a run may hold its twin's too."""
    if len(run.samples) == 1:
        return f"{kind}-{safe(run.name)}", run.name
    return f"{kind}-{safe(run.name)}-{safe(model)}", f"{run.name}: {model}"


def limit(threat: Record) -> float:
    """The distance beyond which an attack had another threat: float32 may pass a radius a little.

    Twice as much slack as the judge allows.
    """
    return float(threat["radius"]) * 1.002 + 2e-6


def is_check(row: Record, furthest: float) -> bool:
    """Whether an attack had a larger threat than `furthest`, and not only images that broke it."""
    return row.get("largest_distance", 0) > furthest and not row.get("outside_the_threat")


def class_names(run: Run, count: int) -> list[str]:
    """What the classes are called where that is known, else their numbers."""
    data = str((run.evaluation or {}).get("data", "")).removeprefix("tfds:")
    known = CLASSES.get(data, [])
    return list(known) if len(known) >= count else [str(number) for number in range(count)]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is not as its command writes it is met by the name of its file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: damaged, or of another version ({type(error).__name__}: {error})"
        ) from error
