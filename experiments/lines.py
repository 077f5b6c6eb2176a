"""A file that grows by a line of JSON for each part of a long command, which goes on behind it."""

import json
import os
from pathlib import Path
from typing import Any

import jax

from rain_jax.checks import UsageError


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there; half a line, which a kill left behind, is cut off.

    Raises `UsageError` where the file holds anything else.
    """
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if jax.process_index() == 0 and len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        return [dict(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise UsageError(f"{path}: expected what this command writes; remove the file") from None


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to the file, on disk when this returns; by process 0 alone."""
    if jax.process_index() == 0:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
