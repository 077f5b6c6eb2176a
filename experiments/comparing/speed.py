"""How long ours and the peers' take, as ratios."""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.comparing.sides import our_attacks, ours, theirs
from experiments.comparing.subject import Subject
from rain_jax import norms


def speed(what: Subject, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of ours and the peers', interleaved; ours compiled before, and that told apart."""
    from experiments import peers

    norm = norms.name_of(what.experiment.threat.norm)
    for name, members in our_attacks(what, settings).items():
        if name not in settings.attacks:
            continue
        side = ours(what, members)
        began = time.perf_counter()
        side(what, jax.random.key(2))
        first = time.perf_counter() - began
        known = [p for p in settings.peers if norm in peers.OFFERS[p].get(name, ())]
        rounds: dict[str, list[tuple[float, float]]] = {who: [] for who in ("ours", *known)}
        for _ in range(settings.rounds):
            for who in rounds:
                wall, cpu = time.perf_counter(), time.process_time()
                if who == "ours":
                    side(what, jax.random.key(2))
                else:
                    theirs(what, who, name, settings)
                rounds[who].append((time.perf_counter() - wall, time.process_time() - cpu))
        mine = np.array(rounds["ours"])
        line: dict[str, Any] = {
            "attack": name, "images": len(what.labels), "ours_wall": np.median(mine[:, 0]),
            "ours_first_run_more": first - np.median(mine[:, 0]),
        }  # fmt: skip
        for who in known:
            ratio = np.array(rounds[who]) / mine
            line[who] = {
                kind: [float(f(ratio[:, i])) for f in (np.median, np.min, np.max)]
                for i, kind in enumerate(("wall", "cpu"))
            }
        yield line
