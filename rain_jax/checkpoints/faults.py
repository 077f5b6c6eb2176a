"""What goes wrong while checkpoints are read and written, and how little is said of it."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Broken(Exception):
    """A checkpoint that cannot be read or is not what was written."""


@contextmanager
def hushed() -> Iterator[None]:
    """Keeps the reads beside the one that failed from complaining each by itself, later."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logger = logging.getLogger("asyncio")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)
        sys.unraisablehook = hook


def _nothing(record: logging.LogRecord) -> bool:
    return False


def without_orbax(record: logging.LogRecord) -> bool:
    """Orbax tells of every thread; what goes wrong in one it also raises, and we say it once."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def errno_of(error: Exception) -> int | None:
    """The file system's reason, whether Python or TensorStore (a ValueError) ran into it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None
