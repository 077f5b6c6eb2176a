"""Kills the evaluation of a run in every attack, and compares with one that nobody touched.

    PYTHONPATH=. python tests/long_kill.py RUN --out=FILE [--config.evaluation.KEY=VALUE ..]

The long form of test_evaluation_resume.py, for as many images as the run has. Writes whether the
two records agree, bit for bit, and how much memory the untouched one held while its images went
by. Works on copies of the run.
"""

import argparse
import itertools
import json
import shutil
import signal
import tempfile
import time
from pathlib import Path

import commands
import numpy as np

from rain_jax.evaluation import resume

OWN_SECONDS = 24 * 3600.0  # nobody waits for this one at a keyboard


def blocks(run: Path, title: str = "*") -> list[Path]:
    """The blocks that are written, of one column or of all."""
    return sorted(run.glob(f"evaluations/*/{resume.FOLDER}/{title}.*/*.npz"))


def mebibytes(pid: int) -> float | None:
    """What a process holds now, or None where the system does not say or the process is over."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(found[0]) / 1024 if found else None


def untouched(run: Path, options: list[str], folder: Path) -> list[dict[str, float]]:
    """Evaluates in one go: the most that was held after each tenth of its blocks."""
    process = commands.start("evaluate", f"--workdir={run}", *options, devices=2, folder=folder)
    samples = []
    while process.poll() is None:
        held = mebibytes(process.pid)
        if held is not None:
            samples.append((len(blocks(run)), held))
        time.sleep(0.2)
    assert process.returncode == 0, (folder / "stderr").read_text()[-2000:]
    last = max(done for done, _ in samples)
    edges = [round(last * tenth / 10) for tenth in range(11)]
    return [
        {"blocks": high, "most_mebibytes": round(max(held), 1)}
        for low, high in itertools.pairwise(edges)
        if (held := [one for done, one in samples if low <= done <= high])
    ]


def killed(run: Path, options: list[str], folder: Path, columns: list[str]) -> list[dict]:
    """Evaluates with one SIGKILL in every column, at its first block or behind a later one."""
    told = []
    for number, title in enumerate(columns):
        process = commands.start("evaluate", f"--workdir={run}", *options, devices=2, folder=folder)
        behind = 1 + number % 2
        was = commands.kill_when(
            process, lambda t=title, n=behind: len(blocks(run, t)) >= n, signal.SIGKILL
        )
        told.append({"in": title, "killed": was, "blocks_then": len(blocks(run, title))})
    process = commands.start("evaluate", f"--workdir={run}", *options, devices=2, folder=folder)
    commands.finish(process, folder)
    return told


def same(run: Path, expected: Path) -> dict[str, bool]:
    """Which of the record, every array of verdicts.npz and the saved images are equal."""
    run_, expected_ = map(commands.evaluated, (run, expected))
    with np.load(run_ / "verdicts.npz") as one, np.load(expected_ / "verdicts.npz") as other:
        arrays = one.files == other.files and all(
            np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f")
            for name in one.files
        )
    images = (np.load(folder / "adversarial.npy") for folder in (run_, expected_))
    return {
        "record": commands.results(run) == commands.results(expected),
        "verdicts": bool(arrays),
        "images": bool(np.array_equal(*images)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    settings, options = parser.parse_known_args()
    commands.LIMIT = OWN_SECONDS
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        one, other = (shutil.copytree(settings.run, folder / n) for n in ("one", "other"))
        began = time.monotonic()
        memory = untouched(one, options, folder / "said_one")
        seconds = time.monotonic() - began
        record = json.loads((commands.evaluated(one) / "evaluation.json").read_text())
        columns = ["clean", *record["attacks"]]
        kills = killed(other, options, folder / "said_other", columns)
        found = {
            "options": options, "images": record["images"], "seconds_untouched": round(seconds),
            "kills": kills, "same": same(other, one), "memory": memory, "record": record,
        }  # fmt: skip
    settings.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "record"}, indent=2))


if __name__ == "__main__":
    main()
