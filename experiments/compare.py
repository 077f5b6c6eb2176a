"""Our attacks beside those of other libraries, on the same weights and images.

    python -m experiments.compare runs/mnist --images=1000 --peers=torchattacks,adv_lib
    python -m experiments.compare runs/mnist --random=weights       an untrained network instead
    python -m experiments.compare runs/mnist --random=shift         a model that draws
    python -m experiments.compare runs/mnist --speed --images=200   interleaved, as ratios
    python -m experiments.compare runs/mnist --bridges --images=200 each through the other's library

Every image, theirs and ours, goes before the same judge: fresh keys, the threat in float64. Prints
a table and writes `compare.json` into the run's folder (`--out=FILE`: elsewhere); started again, a
comparison that was stopped goes on behind its last attack. PyTorch and the peers come with the
extra `peers`.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from experiments.comparing.bridges import bridges
from experiments.comparing.draws import random_model
from experiments.comparing.speed import speed
from experiments.comparing.strength import strength
from experiments.comparing.subject import subject
from rain_jax.checks import UsageError, one_of, within
from rain_jax.evaluation.resume import digest_of
from rain_jax.logs import provenance, table, write_json
from rain_jax.parallel import initialise
from rain_jax.runs import cache


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, compares, prints a table and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("pgd", "apgd_ce", "apgd_t", "fab_t", "square", "standard")
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--peers", type=lambda text: text.split(","))
    parser.add_argument("--attacks", type=lambda text: text.split(","), default=list(names))
    parser.add_argument("--random", choices=("weights", "shift"))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--bridges", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--radius", type=float)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        raise UsageError("PyTorch is not installed: expected pip install 'rain_jax[peers]'")
    from experiments import peers

    within("--seeds", settings.seeds, 1)
    if settings.peers is None:
        settings.peers = ["torchattacks", "foolbox" if settings.bridges else "adv_lib"]
    for peer in settings.peers:
        one_of("--peers", peer, peers.OFFERS)
    for attack in settings.attacks:
        one_of("--attacks", attack, names)
    cache.enable()
    initialise()
    what = subject(settings.run, settings.images, settings.random, settings.batch_size)
    if settings.radius is not None:
        threat = what.experiment.threat._replace(radius=settings.radius)
        what = what._replace(experiment=what.experiment._replace(threat=threat))
    out = settings.out or settings.run / "compare.json"
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}
    lines: list[dict[str, Any]] = []
    if settings.speed:
        compared = speed(what, settings)
    elif settings.bridges:
        compared = bridges(what, settings)
    elif settings.random == "shift":
        compared = random_model(what, settings)
    else:
        asked["weights"] = digest_of(what.variables)
        compared = strength(what, settings, known(out, asked))
    for line in compared:
        # Through JSON, for plain numbers; written at once, since the next one may take an hour.
        lines.append(json.loads(json.dumps(line, default=float)))
        told = {key: value for key, value in lines[-1].items() if key != "standing"}
        print(json.dumps(told), flush=True)
        write_json(out, {"asked": asked, "lines": lines, "provenance": provenance()})
    untold = ("standing", "of_seeds")
    columns = list(
        dict.fromkeys(
            key for line in lines for key in line if "alone" not in key and key not in untold
        )
    )
    print("\n" + table([[_cell(line.get(c)) for c in columns] for line in lines], columns))


def known(out: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a comparison of the same things that was stopped, but for the suite's."""
    if not out.is_file():
        return []
    found = json.loads(out.read_text())
    if found["asked"].get("weights") != asked["weights"]:
        raise UsageError(f"--out={out}: it compares other weights: expected another file")
    for key in asked.keys() - {"attacks", "out", "threads", "seeds"}:
        # An older file does not know of a mode that was not asked for.
        if (found["asked"].get(key) or None) != (asked[key] or None):
            raise UsageError(
                f"--out={out}: it compares with --{key}={found['asked'].get(key)!r}, and not "
                f"{asked[key]!r}: expected another file"
            )
    return [line for line in found["lines"] if line["attack"] != "standard"]


def _cell(value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(v, int) for v in value.values()):
        return " ".join(f"{k} {v}" for k, v in value.items() if v) or "none"
    if isinstance(value, dict) and all(isinstance(v, float) for v in value.values()):
        return " ".join(f"{k} {v:.0f}" for k, v in value.items())
    if isinstance(value, dict):
        return " ".join(f"{k} {v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]" for k, v in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
