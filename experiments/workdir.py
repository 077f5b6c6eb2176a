"""The folder of a run: whose it is, and whether it can be written."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from experiments.logs import provenance, write_json
from rain_jax.checks import UsageError

# What may change between two starts of one run: it does not change what is learnt.
_FREE = (
    "config.evaluation",
    "config.parallel",
    "config.data.data_dir",
    "config.training.log_every",
    "config.training.tensorboard",
    "config.training.workers",
)


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
    ends. Of a run on several hosts the first holds it; where a file system knows no locks there is
    none.
    """
    place = folder.resolve()
    if place in _held or jax.process_index() != 0:
        yield
        return
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    path = folder / ".lock"
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
                f"workdir {folder}: another process writes into it ({owner}); wait for it, or name "
                "another --workdir"
            ) from None
        except OSError:  # a file system without locks
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)
            path.unlink(missing_ok=True)


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Makes `folder` this config's, or refuses: it is another run's, or cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"workdir {folder}: cannot be written ({error.strerror})") from None
    check_writable(folder)
    if (folder / "config.json").exists():
        old = read_config(folder)
        new = json.loads(json.dumps(config))
        for line in differences(old, new):
            raise UsageError(f"workdir {folder} holds another run: {line}; name another --workdir")
    write_json(folder / "config.json", config)
    write_json(folder / "provenance.json", provenance())
