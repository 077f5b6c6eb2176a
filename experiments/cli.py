"""The command line: `--config=FILE`, `--workdir=FOLDER`, and one line for every mistake."""

import argparse
import ast
import importlib.util
import inspect
import itertools
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags, logging
from jax.experimental import multihost_utils

from experiments import memory
from rain_jax.checks import UsageError, nearest
from rain_jax.config import tree
from rain_jax.evaluation.room import exhausted
from rain_jax.keys import unroll_threefry
from rain_jax.training import Diverged

_FRACTION = re.compile(r"(-?\d+\.?\d*)/(\d+\.?\d*)")


class Option(NamedTuple):
    """A flag beside the config: `--name=VALUE`, or with `plain` `--name` alone."""

    name: str
    help: str
    plain: bool = False


_OPTIONS = (
    Option("config", "a file with a get_config(); FILE.py:TEXT calls get_config('TEXT')"),
    Option("workdir", "the folder that holds everything this run writes"),
)
# Which evaluation of a run is written, or read.
NAME = Option("name", "the evaluation's name, by default its attacks and number of images")
REPLACE = Option("replace", "write over an earlier evaluation of this name", plain=True)


class Interrupt:
    """Notes SIGTERM and Ctrl-C, so that the loop can save before it leaves.

    With several processes JAX's preemption service says at which step all of them stop.
    """

    # Of questions, the same in all processes. The service looks for one number, and must be asked
    # about each: steps, several of which one dispatch may take, leave numbers out.
    _asked = itertools.count()

    def __init__(self) -> None:
        self.signal: int | None = None
        self._answer = (-1, False)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        # With several processes SIGTERM is JAX's to catch: a handler of ours would take its place.
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: leave now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`: one answer for each step, the same in all processes."""
        if self._answer[0] != step:
            if jax.process_count() > 1:
                stop = bool(multihost_utils.reached_preemption_sync_point(next(self._asked)))
            else:
                stop = self.signal is not None
            self._answer = (step, stop)
        return self._answer[1]


class Stopped(Exception):
    """The run was asked to stop, and has saved its state at `step`."""

    def __init__(self, step: int, number: int):
        super().__init__(
            f"stopped at step {step}, state saved: the same command goes on from there"
        )
        self.code = 128 + number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def value_of(text: str) -> Any:
    """What a text on the command line means: a Python value, `8/255`, true, or itself.

    The field writes a radius as 8/255, so it may be typed.
    """
    if (fraction := _FRACTION.fullmatch(text)) and float(fraction[2]):
        return float(fraction[1]) / float(fraction[2])
    if text in ("true", "false"):
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, str | int | float | list | tuple | dict | None) else text


def changes_of(arguments: Sequence[str], options: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """`--config.KEY=VALUE`, `--config.KEY VALUE`, `--config.KEY` and `--noconfig.KEY`, as pairs.

    Keys are not looked up here: what a section may hold its maker says, with the nearest name.
    `options` are flags that may be meant beside the usual ones.
    """
    rest, found = list(arguments), []
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        head, dot, key = name.lstrip("-").partition(".")
        if not name.startswith("-"):
            raise UsageError(f"{argument!r}: expected flags, --name=value")
        if head not in ("config", "noconfig") or not key:
            flags_ = [*(option.name for option in _OPTIONS), *options]
            known = [f"--{flag}{dot}{key}" for flag in flags_]
            raise UsageError(
                f"{name}: no such flag: expected --config=FILE, --workdir=FOLDER or "
                f"--config.SECTION.KEY=VALUE{nearest(name, known)}"
            )
        if not equals:
            bare = head == "noconfig" or not rest or rest[0].startswith("--")
            text = str(head == "config") if bare else rest.pop(0)
        found.append((key, value_of(text)))
    return found


def _near_files(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("experiments/configs")
    return nearest(path.name, [found.name for found in folder.glob("*.py")])


def load_config(given: str) -> dict[str, Any]:
    """What the `get_config` of a file returns, `given` as `FILE.py` or `FILE.py:TEXT`."""
    file, _, text = given.partition(".py:")
    path = Path(given if file == given or Path(given).is_file() else f"{file}.py")
    if not path.is_file():
        raise UsageError(f"--config={given}: no such file{_near_files(path)}")
    if path.suffix != ".py":
        raise UsageError(f"--config={given}: expected a Python file, NAME.py")
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None  # both are there for any .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UsageError(f"{path}: no get_config in it: expected a function of that name")
        arguments = [text] if path != Path(given) else []
        if arguments and not inspect.signature(module.get_config).parameters:
            raise UsageError(f"--config={given}: {path} takes no text behind a colon")
        config = module.get_config(*arguments)
    except UsageError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        # The file is the user's, so its mistakes are told as such: by the deepest line in it.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise UsageError(f"{place}: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(config, dict | ml_collections.ConfigDict):
        raise UsageError(
            f"{path}: get_config() returned {config!r:.60}: expected what "
            "rain_jax.config.config(...) returns"
        )
    return tree.plain(config)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error.args[0] if error.args else error).split())
    return text or type(error).__name__


def run(
    main: Callable[[ml_collections.ConfigDict, Path], Any],
    config_of: Callable[[Path], dict[str, Any]] | None = None,
    argv: Sequence[str] | None = None,
    *,
    options: Sequence[Option] = (),
    changed: Callable[[Any, Sequence[tuple[str, Any]]], Any] = tree.changed,
) -> None:
    """Parses the command line, calls `main(config, workdir)` and exits with its status.

    Of `options` that are given, `main` gets the values by name.

    2 for a mistake, told in one line; 3 for a run that diverged; 128 + signal for one that was
    stopped and has saved its state. `config_of(workdir)` gives the sections that the file
    leaves out, or all of them without one. `argv` begins with the program's name, as `sys.argv`
    does. `changed(config, changes)` applies what was typed and completes the config, whose sections
    it knows.
    """
    argv = list(sys.argv if argv is None else argv)
    loud = "--traceback" in argv
    logging.set_verbosity(logging.ERROR)  # libraries' advice; what matters a run says itself
    unroll_threefry()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl's own are left at their defaults; Orbax asks for some
    try:
        parser = _Parser(
            description=sys.modules[main.__module__].__doc__,
            epilog="--config.SECTION.KEY=VALUE changes any value of the config.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for name, text, plain in (*_OPTIONS, *options):
            how: Any = {"action": "store_true"} if plain else {}
            parser.add_argument(f"--{name}", help=text, **how)
        parser.add_argument("--traceback", action="store_true", help="where a mistake was met")
        found, rest = parser.parse_known_args(argv[1:])
        changes = changes_of(rest, [option.name for option in options])
        if found.config:
            config = load_config(found.config)
            if config_of is not None and found.workdir:
                # The file says what is looked at; what was trained, the run.
                config = {**config_of(Path(found.workdir)), **config}
        elif config_of is None:
            raise UsageError(
                "--config is missing: expected a file, such as experiments/configs/quickstart.py"
            )
        elif found.workdir:
            config = config_of(Path(found.workdir))
        else:
            raise UsageError("--workdir is missing: expected the folder of a run")
        default = Path("runs") / Path((found.config or "").split(".py:")[0]).stem
        workdir = Path(found.workdir or default)
        given = {option.name: getattr(found, option.name) for option in options}
        main(changed(config, changes), workdir, **{k: v for k, v in given.items() if v})
    except UsageError as error:
        _leave(f"error: {_one_line(error)}", 2, loud)
    except Diverged as error:
        _leave(f"error: {error}; checkpoints from before it are kept", 3, loud)
    except Stopped as stopped:
        _leave(str(stopped), stopped.code, loud)
    except OSError as error:
        # A full disk or a lost mount is no bug of ours: say which file, not where in the code.
        _leave(f"error: {error.filename or 'input/output'}: {error.strerror or error}", 2, loud)
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        _leave(f"error: {memory.told(error)}", 2, loud)
    except KeyboardInterrupt:
        _leave("interrupted", 130, loud)


def _leave(message: str, code: int, loud: bool) -> None:
    if loud:
        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
