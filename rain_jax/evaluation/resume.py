"""The resume log: what an evaluation has found so far, on disk, so that a killed one goes on.

A column is judged in blocks of images. Each block is one file, written once and whole; a column's
folder is named by everything that its verdicts depend on, so that nothing of another model, attack
or version of this code is ever taken for it.
"""

import functools
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import rain_jax
from rain_jax.data import Source, as_float
from rain_jax.evaluation.verdicts import Judgement
from rain_jax.keys import is_key
from rain_jax.types import PyTree

FOLDER = "evaluation.partial"


class Block(NamedTuple):
    """Judged images: NumPy arrays [n, ...] in the order of the data set."""

    judgement: Judgement
    steps: np.ndarray  # int32, of the attack
    queries: np.ndarray  # int32, -1 for attacks that do not count them
    kept: np.ndarray  # int32 [k], rows of the images that are kept
    image: np.ndarray  # float32 [k, H, W, C]
    digest: (
        np.ndarray
    )  # bytes [n]: hashes of the clean images and labels, where they were looked at
    seconds: float


def digest(*arrays: np.ndarray) -> str:
    """A hash of arrays, their shapes and their types."""
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(array.view(np.uint8).reshape(-1).data)
    return found.hexdigest()[:16]


def digest_of(variables: PyTree) -> str:
    """A hash of a model's variables."""
    leaves = jax.tree.leaves(variables)
    plain = (jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves)
    return digest(*map(np.asarray, plain))


def digest_of_json(value: Any) -> str:
    """A hash of JSON; of other objects in it, by their texts."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def circumstances() -> dict[str, Any]:
    """What every verdict depends on beside model, images and attack: code and kind of device."""
    device = jax.devices()[0]
    return {
        "code": code(),
        "jax": jax.__version__,
        "generator": jax.config.values["jax_default_prng_impl"],
        "device": [device.platform, device.device_kind],
    }


def sample_of(source: Source) -> list[Any]:
    """What tells one data set from another without reading all of it."""
    count = min(16, source.size)
    ends = [*range(count), *range(source.size - count, source.size)]
    images, labels = zip(*(source.read(place) for place in ends), strict=True)
    pixels = digest(as_float(np.stack(images)), np.asarray(labels))
    return [source.name, source.size, list(source.shape), pixels]


# Parts of the library that no result of an evaluation depends on.
_UNRELATED = (
    "audit", "checkpoints", "config", "logs.py", "methods", "optimisers.py", "runs",
    "schedules.py", "training.py",
    "evaluation/audit.py", "evaluation/probe.py", "evaluation/record.py", "evaluation/result.py",
)  # fmt: skip


@functools.cache
def code(*others: Path) -> str:
    """A hash of the code that an evaluation runs, and of `others`, files or folders.

    Results depend on the code too. What only trains, writes or shows is no part of it.
    """
    package = Path(rain_jax.__file__).parent
    own = [path for path in package.rglob("*.py")
           if not path.relative_to(package).as_posix().startswith(_UNRELATED)]  # fmt: skip
    more = [path for other in others for path in (other, *other.rglob("*.py"))
            if path.is_file() and "configs" not in path.parts]  # fmt: skip
    found = hashlib.sha256()
    for path in (*sorted(own), *sorted(set(more))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Journal:
    """The blocks of one evaluation. Without a folder nothing is kept.

    With several processes the folder is one that all of them see; the first one writes.
    """

    def __init__(self, folder: Path | None):
        self.folder = None if folder is None else folder / FOLDER

    def column(self, title: str, turns_on: Mapping[str, Any]) -> "Pages":
        """The blocks of a column, whose verdicts turn on those things, code and machine beside."""
        if self.folder is None:
            return Pages(None)
        known = {**turns_on, **circumstances(), "title": title, "devices": len(jax.devices())}
        plain = "".join(c if c.isalnum() or c in "_-" else "-" for c in title)[:40]
        return Pages(self.folder / f"{plain}.{digest_of_json(known)}")

    def path(self, name: str) -> Path | None:
        """A file beside the blocks."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def finish(self) -> None:
        """Everything that it knew is in the evaluation's record now."""
        if self.folder is not None and jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


class Pages:
    """The blocks of one column, in their order."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._done = 0
        if folder is not None:
            while _sound(folder / _name(self._done)):
                self._done += 1
        if jax.process_count() > 1:
            # One that reads later than another must not find more.
            self._done = int(multihost_utils.broadcast_one_to_all(np.int32(self._done)))

    def __len__(self) -> int:
        return self._done

    def read(self, number: int) -> Block:
        """A block that is there."""
        assert self._folder is not None
        with np.load(self._folder / _name(number)) as found:
            judged = Judgement(*(found[field] for field in Judgement._fields))
            return Block(
                judged, found["steps"], found["queries"], found["kept"], found["image"],
                found["digest"], float(found["seconds"]),
            )  # fmt: skip

    def write(self, number: int, block: Block) -> None:
        """Adds a block: whole or not at all, wherever the process is killed."""
        if self._folder is None or jax.process_index() != 0:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        arrays = {**block._asdict(), **block.judgement._asdict()}
        del arrays["judgement"]
        path = self._folder / _name(number)
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            values: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
            np.savez(file, **values)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _name(number: int) -> str:
    return f"{number:06d}.npz"


def _sound(path: Path) -> bool:
    """Whether a block is there and can be read; a damaged one is measured again."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None
    except (zipfile.BadZipFile, OSError):
        damaged = True
    if damaged:
        print(f"{path} is damaged: its images are attacked again", flush=True)
    return not damaged
