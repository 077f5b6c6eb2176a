"""The folder of a run: whose it is, and whether it can be written."""

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rain_jax.checks import UsageError
from rain_jax.logs import provenance, write_json

# What may change between two starts of one run: it does not change what is learnt.
_FREE = (
    "config.evaluation",
    "config.parallel.devices",
    "config.parallel.mapping",
    "config.parallel.overlap",
    "config.data.data_dir",
    "config.training.log_every",
    "config.training.tensorboard",
    "config.training.workers",
)
# Where a config may name a file that a model is made of, and the run's own copy of it, so that the
# run can be moved, and stays what it is when the file is made anew. A twin's run is in `twin`.
_STATISTICS = "defence_statistics.npz"
_COPIES = {
    ("defence", "statistics"): _STATISTICS,
    ("twin", "defence", "statistics"): f"twin/{_STATISTICS}",
}


def differences(old: Any, new: Any, where: str = "config") -> list[str]:
    """The keys at which two plain configs differ in what is learnt, dotted, with both values."""
    if where in _FREE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{where}.{key}")
        return found
    return [] if old == new else [f"{where}={old!r} there and {new!r} here"]


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config, files that a model is made of being the run's own copies.

    Raises `UsageError` where there is none, saying what is wrong with it.
    """
    config = as_written(folder)
    for path, copy in _COPIES.items():
        section = _section(config, path)
        if section.get(path[-1]) is not None and (folder / copy).is_file():
            section[path[-1]] = str(folder / copy)
    return config


def _section(config: Any, path: Sequence[str]) -> dict[str, Any]:
    """The one that holds the last key of `path`, or an empty one."""
    for name in path[:-1]:
        config = config.get(name) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def as_written(folder: Path) -> dict[str, Any]:
    """The config that a run has written, or a `UsageError` that says what is wrong with it."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder}: expected the folder of a run, with a config.json") from None
    except (ValueError, OSError) as error:
        raise UsageError(
            f"{path}: expected a run's config, but no JSON is in it ({error})"
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a run's config, but it holds {found!r:.60}")
    return found


def check_writable(folder: Path) -> None:
    """Refuses a folder that results could not be written to, before they cost anything."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b" " * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UsageError(f"workdir {folder}: cannot be written ({error.strerror})") from None


# Folders that this process holds already: a command may hold one again in its parts.
_held: set[Path] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else writes into the folder of a run in here; who tries is refused in a line.

    Two processes that train or evaluate in one folder would write their lines through each other.
    The lock is the operating system's, on the file `.lock`, and goes with its process, however that
    ends. Of a run on several hosts the first holds it, and all are refused with it; where a file
    system knows no locks there is none.
    """
    place = folder.resolve()
    if place in _held:
        yield
        return
    with ExitStack() as kept:
        refusal: UsageError | None = None
        if jax.process_index() == 0:
            try:
                kept.enter_context(_locked(folder))
            except UsageError as error:
                refusal = error
        if jax.process_count() > 1:
            found = multihost_utils.broadcast_one_to_all(np.bool_(refusal is not None))
            if found and refusal is None:
                refusal = UsageError(f"workdir {folder}: the first process may not write into it")
        if refusal is not None:
            raise refusal
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(path, "a+")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise UsageError(f"workdir {folder}: cannot be written ({error.strerror})") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise UsageError(
                    f"workdir {folder}: another process writes into it ({owner}); wait for it, or "
                    "name another --workdir"
                ) from None
            except OSError:  # a file system without locks
                pass
            if not _same(lock.fileno(), path):
                continue  # whoever had it has taken the file away in between
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _same(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), path.stat())
    except FileNotFoundError:
        return False


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Makes `folder` this config's, or refuses: it is another run's, or cannot be written.

    What a defence's statistics are in a file, the run gets a copy of.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"workdir {folder}: cannot be written ({error.strerror})") from None
    check_writable(folder)
    claimed = (folder / "config.json").exists()
    if claimed:
        old = as_written(folder)
        new = json.loads(json.dumps(config))
        for line in differences(old, new):
            raise UsageError(f"workdir {folder} holds another run: {line}; name another --workdir")
    given = _section(config, ("defence", "statistics")).get("statistics")
    if isinstance(given, str):
        copy = folder / _STATISTICS
        if not copy.exists() or not (claimed or copy.samefile(given)):
            shutil.copyfile(given, copy)
        elif not filecmp.cmp(given, copy, shallow=False):
            raise UsageError(
                f"workdir {folder} holds another run: {given} is not what it was when that run "
                f"began, of which {copy} is a copy; name another --workdir"
            )
    write_json(folder / "config.json", config)
    write_json(folder / "provenance.json", provenance())
