"""What a run tells while it runs, and what it leaves behind to be repeated and read."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np

from rain_jax.checks import UsageError, within

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "rain_jax")
_WINDOW = 30.0  # seconds that a rate looks back, so that compiling is soon forgotten


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, `{"step": 3, "kind": "train", "loss": 2.1}`.

    Written by process 0 alone, and on disk line by line. A context manager. A run that goes on
    from step s cuts off what was written after s, so that the file reads as if nothing had
    happened; so does a run that begins anew, with s = 0. Values that are no finite numbers are
    the strings "NaN", "Infinity" and "-Infinity", which JSON allows and `float` understands.

    Args:
      folder: the run's folder, which exists.
      resume_step: the step s that the run goes on from.
      tensorboard: whether to write event files into `folder/tensorboard` as well, as `kind/name`.

    Raises:
      UsageError: a file cannot be written, or tensorboardX is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, resume_step: int = 0, tensorboard: bool = False
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._board: Any = None
        if jax.process_index() != 0:
            return
        if tensorboard:
            self._board = _summary_writer(self.path.parent / "tensorboard", resume_step + 1)
        with _refusing(self.path):
            _cut(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Adds a line. Values are numbers, strings, or arrays and lists of them.

        Raises:
          UsageError: the line cannot be written (disk full).
        """
        if self._file is None:
            return
        line = {"step": int(step), "kind": kind, **_plain(values)}
        with _refusing(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if np.ndim(value) == 0 and not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", float(value), int(step))

    def close(self) -> None:
        """Closes the files."""
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()
        self._board = self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Progress:
    """How far a long work has come: a bar on a terminal, elsewhere a line now and then.

    Both show the count, the rate over the last half minute, the time taken, the time to go and
    the latest metrics. Lines come at the first step (by then it has compiled), every `every`
    seconds and at the end. A context manager; only process 0 shows anything.

    Args:
      name: what is being done, in a word or two.
      total: how many units there are; None where nobody knows.
      unit: what is counted.
      shown: False turns it off; None asks the environment, where `RAIN_JAX_PROGRESS=0` does.
      every: seconds between lines.
      stream: where to, `sys.stdout` unless given.
      clock: seconds that never run backwards.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        *,
        unit: str = "step",
        shown: bool | None = None,
        every: float = 10.0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        within("every", every, 0.0)
        self._name, self._total, self._unit = name, total, unit
        self._every, self._clock = every, clock
        self._stream = sys.stdout if stream is None else stream
        if shown is None:
            shown = os.environ.get("RAIN_JAX_PROGRESS", "1") != "0"
        self._shown = shown and jax.process_index() == 0
        self._count = 0
        self._latest: dict[str, Any] = {}
        self._began = clock()
        self._marks = deque([(self._began, 0)])  # when, and how many by then
        self._told: tuple[float, int] | None = None  # when and at which count the last line came
        self._bar: Any = None

    def advance(self, n: int = 1, **latest: Any) -> None:
        """Counts `n` more units done; `latest` as in `note`."""
        self._count += n
        self._latest |= latest
        if not self._shown:
            return
        now = self._clock()
        self._marks.append((now, self._count))
        while len(self._marks) > 2 and self._marks[1][0] < now - _WINDOW:
            self._marks.popleft()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._count)
        elif self._told is None or now - self._told[0] >= self._every:
            self._tell(now)

    def note(self, **latest: Any) -> None:
        """Shows these scalars from now on. They are read when shown: an unfinished one waits."""
        self._latest |= latest

    def text(self) -> str:
        """The rate, the times and the latest metrics: `250 img/s, 0:04, 0:12 to go, loss 1.234`."""
        now = self._clock()
        (then, before), (_, count) = self._marks[0], self._marks[-1]
        # By the last mark and not by now: between two steps the rate does not sink.
        rate = (count - before) / max(self._marks[-1][0] - then, 1e-9) if count > before else 0.0
        parts = [f"{rate:.3g} {self._unit}/s" if rate < 100 else f"{rate:,.0f} {self._unit}/s"]
        parts.append(_duration(now - self._began))
        # The first stretch compiles, and says nothing of those after it.
        known = rate > 0 and len(self._marks) > 2
        if self._total is not None and known and self._count < self._total:
            left = (self._total - self._count) / rate - (now - self._marks[-1][0])
            parts.append(f"{_duration(max(left, 0.0))} to go")
        parts += [f"{name} {_number(value)}" for name, value in self._latest.items()]
        return ", ".join(parts)

    def __enter__(self) -> Self:
        if self._shown and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _bar(self._name, self._total, self._unit, self._stream, self.text)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._shown and (self._told is None or self._told[1] != self._count):
            self._tell(self._clock())

    def _tell(self, now: float) -> None:
        self._told = (now, self._count)
        done = f"{self._count:,}"
        if self._total:
            done += f"/{self._total:,} {self._unit} ({100 * self._count / self._total:.0f} %)"
        else:
            done += f" {self._unit}"
        print(f"{self._name}: {done}, {self.text()}", file=self._stream, flush=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, all at once: readers find the old file or the new one.

    Arrays become lists, paths strings, and NaN and infinities the strings that `MetricsLog` writes.

    Raises:
      UsageError: the file cannot be written.
    """
    with _refusing(Path(path)):
        _replace(Path(path), json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Rows as aligned text under `headers`: the first column to the left, the others to the right.

    Raises:
      ValueError: a row is not as long as `headers`.
    """
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def provenance() -> dict[str, Any]:
    """What it takes to run this again: versions, devices, commit, command and time; plain values.

    `git` is None unless the code runs from a checkout of its own, and `rain_jax` has no version
    unless it is installed. Nothing here fails for want of git or of a package.
    """
    device = jax.devices()[0]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        # The interpreter by its name: where it lies on this machine repeats nothing.
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "git": _git(Path(__file__).resolve().parents[1]),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path) -> dict[str, Any] | None:
    # Hooks set GIT_DIR and the like for a repository that need not be ours.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def ask(*command: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *command],
            env=env, check=True, capture_output=True, text=True, timeout=20,
        ).stdout.strip()  # fmt: skip

    try:
        # A copy installed inside someone else's checkout is not at their commit.
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _cut(path: Path, step: int) -> None:
    """Leaves the whole lines up to `step`, and the file alone where that is all of them."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line for line in text.splitlines(keepends=True) if _stays(line, step))
    if kept != text:
        _replace(path, kept)


def _stays(line: str, step: int) -> bool:
    """Half a line is not JSON; a whole line without its end may be, but the next would join it."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _replace(path: Path, text: str) -> None:
    """The new text in the place of the old, in one move, whenever the process may be killed."""
    # A name of its own for each writer: several processes may write the same file.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error


def _plain(value: Any) -> Any:
    """`value` in the types that JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _summary_writer(folder: Path, purge_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UsageError(
            "TensorBoard files need tensorboardX: pip install 'rain_jax[tensorboard]'"
        ) from error
    with _refusing(folder):
        # Files are named by the second, and one begun in the same second would be overwritten.
        suffix = f".from_step_{purge_step}"
        return SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)


def _bar(name: str, total: int | None, unit: str, stream: IO[str], text: Callable[[], str]) -> Any:
    from rich import progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class Told(progress.ProgressColumn):
        max_refresh = 0.5  # and so the times go on while a step is on its way

        def render(self, task: progress.Task) -> Text:
            return Text(text())

    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        Told(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=Console(file=stream),
    )
    bar.add_task(name, total=total)
    return bar


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.4g}"
