"""What a run writes stays readable, whatever happens to the run."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import logs
from rain_jax.checks import UsageError
from rain_jax.logs import MetricsLog, Progress, provenance, table, write_json


def lines(folder: Path) -> list[dict]:
    def never(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=never) for line in text.splitlines()]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=2.5)
        assert lines(tmp_path) == [{"step": 1, "kind": "train", "loss": 2.5}]
        log.write(jnp.int32(2), "validation", clean=jnp.float32(0.5), counts=np.arange(2), name="x")
    second = {"step": 2, "kind": "validation", "clean": 0.5, "counts": [0, 1], "name": "x"}
    assert lines(tmp_path)[1] == second


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_still_json_and_still_a_float(tmp_path, value):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", a=value, b=jnp.float32(value), c=np.asarray([value, 1.0]))
    (line,) = lines(tmp_path)
    for found in (line["a"], line["b"], line["c"][0]):
        np.testing.assert_equal(float(found), value)


def test_a_run_that_goes_on_cuts_off_what_came_after(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, "train", loss=step)
    with MetricsLog(tmp_path, resume_step=3) as log:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
        log.write(4, "train", loss=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    with MetricsLog(tmp_path):  # from the beginning
        pass
    assert lines(tmp_path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "end", ['{"step": 3, "ki', "{", "\0\0\0", '{"step": 3, "kind": "train"}', "\xff"]
)
def test_half_a_line_is_dropped(tmp_path, end):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(end.encode("latin-1"))
    with MetricsLog(tmp_path, resume_step=9) as log:
        log.write(2, "train", loss=2.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_nothing_is_rewritten_without_need(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=1.0)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    with MetricsLog(tmp_path, resume_step=1):
        assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write(1, "train", loss=1.0)
    stream = io.StringIO()
    with Progress("train", 3, stream=stream) as bar:
        bar.advance()
    assert os.listdir(tmp_path) == []
    assert stream.getvalue() == ""


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none/metrics.jsonl: cannot be written \(No such file"):
        MetricsLog(tmp_path / "none")
    with pytest.raises(UsageError, match=r"none/x.json: cannot be written \(No such file"):
        write_json(tmp_path / "none" / "x.json", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_in_one_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UsageError, match=r"metrics.jsonl: cannot be written \(No space left"):
        log.write(1, "train", loss=1.0)
    with pytest.raises(OSError, match="No space left"):  # what is in its buffer
        log._file.close()


def test_tensorboard_gets_the_scalars_and_forgets_what_is_done_again(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write(1, "train", loss=0.5, name="x", counts=[1, 2])
    with MetricsLog(tmp_path, resume_step=1, tensorboard=True) as log:
        log.write(2, "train", loss=math.nan)
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    scalars = [(e.step, v.tag) for e in events for v in e.summary.value]
    assert scalars == [(1, "train/loss"), (2, "train/loss")]
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [1, 2]


def test_without_tensorboardx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"pip install 'rain_jax\[tensorboard\]'"):
        MetricsLog(tmp_path, tensorboard=True)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_come_first_now_and_then_and_last():
    stream, clock = io.StringIO(), Clock()
    with Progress("train", 100, unit="img", stream=stream, clock=clock, shown=True) as bar:
        assert stream.getvalue() == ""
        for _ in range(25):
            clock.now += 1
            bar.advance(4, loss=jnp.float32(0.25))
        bar.note(robust=0.5)
    told = stream.getvalue().splitlines()
    assert told == [
        "train: 4/100 img (4 %), 4 img/s, 0:01, loss 0.25",
        "train: 44/100 img (44 %), 4 img/s, 0:11, 0:14 to go, loss 0.25",
        "train: 84/100 img (84 %), 4 img/s, 0:21, 0:04 to go, loss 0.25",
        "train: 100/100 img (100 %), 4 img/s, 0:25, loss 0.25, robust 0.5",
    ]


def test_the_rate_forgets_the_compilation():
    stream, clock = io.StringIO(), Clock()
    with Progress("train", None, unit="img", stream=stream, clock=clock, shown=True) as bar:
        clock.now += 600
        bar.advance(50)
        for _ in range(40):
            clock.now += 1
            bar.advance(1000)
        assert bar.text() == "1,000 img/s, 10:40"
        clock.now += 3600
        assert bar.text() == "1,000 img/s, 1:10:40"
    assert stream.getvalue().splitlines()[0] == "train: 50 img, 0.0833 img/s, 10:00"


def test_the_last_line_tells_where_it_stopped():
    stream, clock = io.StringIO(), Clock()
    with suppress(KeyError), Progress("judge", 10, stream=stream, clock=clock, shown=True) as bar:
        bar.advance(1)
        bar.advance(2)
        raise KeyError
    assert stream.getvalue().splitlines()[-1].startswith("judge: 3/10 step (30 %)")


def test_work_that_never_began_and_work_of_no_size_show_too():
    stream = io.StringIO()
    with Progress("empty", 0, stream=stream, shown=True):
        pass
    assert stream.getvalue() == "empty: 0 step, 0 step/s, 0:00\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_it_can_be_turned_off(monkeypatch, terminal):
    stream = Terminal() if terminal else io.StringIO()
    with Progress("train", 3, stream=stream, shown=False) as bar:
        bar.advance(3)
    monkeypatch.setenv("RAIN_JAX_PROGRESS", "0")
    with Progress("train", 3, stream=stream) as bar:
        bar.advance(3)
    assert stream.getvalue() == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with Progress("train [a]", 8, unit="img", stream=stream, clock=clock, shown=True) as bar:
        clock.now += 2
        bar.advance(4, loss=1.5)
        bar._bar.refresh()
        clock.now += 2
        bar.advance(4)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "train [a]" in plain
    assert "4/8" in plain
    assert "2 img/s, 0:02, loss 1.5" in plain  # the first stretch says nothing of others
    assert "8/8" in plain.split("4/8")[-1]


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("train", 1, stream=stream, shown=True) as bar:
        bar.advance()
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("train: 1/1 step (100 %)")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    value = {
        "a": jnp.arange(2),
        "b": np.float32(0.5),
        "c": (math.nan, -math.inf),
        "d": None,
        "e": tmp_path,
        3: np.bool_(True),
        "long": 2**60,
    }
    write_json(path, value)
    assert json.loads(path.read_text()) == {
        "a": [0, 1],
        "b": 0.5,
        "c": ["NaN", "-Infinity"],
        "d": None,
        "e": str(tmp_path),
        "3": True,
        "long": 2**60,
    }
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == [0, 1]
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, 1)

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"x.json: cannot be written \(No space left"):
        write_json(path, 2)
    assert path.read_text() == "1\n"
    assert os.listdir(tmp_path) == ["x.json"]


def test_tables_are_aligned():
    assert table(
        [["natural", "95.1", 0], ["trades", "7.25", "48.0"]], ["model", "clean", "pgd"]
    ) == ("model    clean   pgd\n-------  -----  ----\nnatural   95.1     0\ntrades    7.25  48.0")
    assert table([], ["a", "b"]) == "a  b\n-  -"
    with pytest.raises(ValueError, match="zip"):
        table([["only one"]], ["a", "b"])


def test_provenance_is_complete_and_plain(tmp_path):
    told = provenance()
    assert told["versions"]["jax"] == jax.__version__
    assert told["versions"].keys() == {"python", *logs._PACKAGES}
    assert (told["platform"], told["devices"], told["processes"]) == ("cpu", 8, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["time"])
    assert told["command"].split()[0].startswith("python")  # its name, not where it lies
    write_json(tmp_path / "provenance.json", told)
    assert json.loads((tmp_path / "provenance.json").read_text()) == told


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_our_own_checkout_or_none(tmp_path, monkeypatch):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *command], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert logs._git(tmp_path) is None
    git("init")
    assert logs._git(tmp_path) is None  # no commit yet
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "x.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    assert logs._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert logs._git(tmp_path / "code") is None  # inside, as a copy in someone's folder is
    (tmp_path / "code" / "x.py").write_text("2")
    assert logs._git(tmp_path)["dirty"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert logs._git(tmp_path) is None  # no git
