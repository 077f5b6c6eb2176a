"""What a sweep has found so far: a line for each cell, from any number of processes."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.sweeping.lanes import Measured
from rain_jax.checks import UsageError
from rain_jax.evaluation import Passes


def path_of(folder: Path, shard: tuple[int, int]) -> Path:
    """The file of a share; all of them lie in one folder."""
    number, count = shard
    return folder / ("sweep.jsonl" if count == 1 else f"sweep.{number}of{count}.jsonl")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The cells that are done, by what they turn on; half a line, of a kill, is let go."""
    found = {}
    for path in sorted(folder.glob("sweep*.jsonl")):
        for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
            try:
                held = json.loads(line)
                found[held["of"]] = held
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{path}:{number}: expected a cell of a sweep; remove the file"
                ) from None
    return found


def packed(measured: Measured) -> dict[str, Any]:
    """A cell as JSON; what is known of single images in as many bytes as it takes."""
    told = measured._asdict()
    for name in ("clean", "stands"):
        told[name] = _shut(told[name], measured.draws)
    return {**told, "of_images": len(measured.stands)}


def unpacked(line: Mapping[str, Any]) -> Measured:
    """And back."""
    told = {name: line[name] for name in Measured._fields}
    for name in ("clean", "stands"):
        told[name] = _open(told[name], line["draws"], line["of_images"])
    if told["passes"] is not None:
        told["passes"] = Passes(*told["passes"])
    return Measured(**told)


def _shut(share: np.ndarray, draws: int) -> str:
    counts = np.round(share * draws)
    raw = np.packbits(counts.astype(bool)) if draws == 1 else counts.astype("<u2")
    return base64.b64encode(raw.tobytes()).decode()


def _open(text: str, draws: int, count: int) -> np.ndarray:
    raw = base64.b64decode(text)
    if draws == 1:
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(np.float32)
    return np.frombuffer(raw, "<u2").astype(np.float32) / np.float32(draws)
