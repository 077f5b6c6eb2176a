"""The evaluations of a run: a folder for each, `RUN/evaluations/NAME`, none in another's place.

A name says which attacks and how many images, unless it is given. The same evaluation again finds
its folder; another one of the same name gets the next number.
"""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rain_jax.config.options import Evaluation as Settings
from rain_jax.checks import UsageError
from rain_jax.evaluation import Evaluation, record

FOLDER = "evaluations"
_PLAIN = re.compile(r"[\w.+-]*\w[\w.+-]*", re.ASCII)


def name_of(settings: Settings, images: int) -> str:
    """By attack set and number of images: `standard-1000`, `pgd+square-500`."""
    suite: Any = settings.suite
    parts = [suite["name"]] if suite else []
    parts += ["ladder"] if settings.ladder else []
    parts += [*settings.attacks, *settings.distances]
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "-", "+".join(parts))
    return f"{plain[:60]}-{images}"


def place(
    run: Path, evaluation: Evaluation, default: str, name: str | None = None, replace: bool = False
) -> Path:
    """The folder for an evaluation of a run: `name`, or `default` with the first number that fits.

    One that holds the record of another evaluation is taken only with `replace`; of a given `name`
    that is refused. All processes get the same.
    """
    if name is not None:
        if not _PLAIN.fullmatch(name):
            raise UsageError(f"--name={name}: expected letters, digits and any of _.+-")
        if not replace:
            remedy = "another --name, or --replace"
            record.refuse_another(run / FOLDER / name, evaluation, remedy)
        return run / FOLDER / name
    number = 1
    while not replace and record.identity_in(_numbered(run, default, number)) not in (
        None, evaluation.fingerprint,
    ):  # fmt: skip
        number += 1
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return _numbered(run, default, number)


def _numbered(run: Path, name: str, number: int) -> Path:
    return run / FOLDER / (name if number == 1 else f"{name}.{number}")


def all_of(run: Path) -> list[Path]:
    """The folders of a run's evaluations that are complete, by when each was written."""
    found = [path.parent for path in (run / FOLDER).glob(f"*/{record.INDEX}")]
    return sorted(found, key=lambda path: ((path / record.INDEX).stat().st_mtime, path.name))


def latest(run: Path, name: str | None = None) -> Path | None:
    """The folder of a run's evaluation `name`, or of the latest; None where there is none.

    A folder may be that of an evaluation itself. Raises `UsageError` for a name that is not there.
    """
    found = all_of(run)
    if name is not None:
        known = {path.name: path for path in found}
        if name not in known:
            raise UsageError(
                f"--name={name}: {run} has no such evaluation: expected one of "
                f"{', '.join(known) or 'none'}"
            )
        return known[name]
    if (run / record.INDEX).exists():
        return run
    return found[-1] if found else None
