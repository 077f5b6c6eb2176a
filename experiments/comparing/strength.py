"""Robust accuracy under each attack, ours and the peers'."""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.comparing.sides import judged, our_attacks, ours, theirs, timed
from experiments.comparing.subject import Subject
from rain_jax import evaluation, norms
from rain_jax.attacks import suites


def strength(
    what: Subject, settings: argparse.Namespace, before: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Robust accuracy under each attack, ours and the peers'; what is known `before` stays."""
    from experiments import peers

    norm = norms.name_of(what.experiment.threat.norm)
    clean = judged(what, what.images, jax.random.key(1))
    stands: dict[str, dict[str, np.ndarray]] = {}  # attack -> who ran it -> verdicts
    outside: dict[str, dict[str, int]] = {}
    seconds: dict[str, dict[str, float]] = {}

    def told(name: str) -> dict[str, Any]:
        found = stands[name]
        line = {"attack": name, "images": len(clean.right), "clean": float(np.mean(clean.right))}
        for who, standing in found.items():
            line[who] = float(np.mean(standing))
            if who != "ours":
                line[f"{who}_alone_breaks"] = int(np.sum(found["ours"] & ~standing))
                line[f"ours_alone_breaks_of_{who}"] = int(np.sum(standing & ~found["ours"]))
        packed = {who: np.packbits(standing).tobytes().hex() for who, standing in found.items()}
        return {
            **line, "outside_the_threat": outside.get(name, {}),
            "cpu_seconds": seconds.get(name, {}), "standing": packed,
        }  # fmt: skip

    for line in before:
        name, count = line["attack"], line["images"]
        stands[name] = {
            who: np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=count) > 0
            for who, bits in line["standing"].items()
        }
        outside[name], seconds[name] = line["outside_the_threat"], line["cpu_seconds"]
        yield line
    for name, members in our_attacks(what, settings).items():
        if name not in settings.attacks or name == "standard" or name in stands:
            continue
        took = seconds[name] = {}
        with timed(took, "ours"):
            standing = ours(what, members)(what, jax.random.key(2))
        stands[name] = {"ours": standing & clean.right}
        outside[name] = {}
        for peer in settings.peers:
            if norm in peers.OFFERS[peer].get(name, ()):
                with timed(took, peer):
                    images = theirs(what, peer, name, settings)
                verdict = judged(what, images, jax.random.key(3))
                stands[name][peer] = evaluation.worst_case(clean, [verdict])
                outside[name][peer] = int(np.sum(~verdict.allowed))
        yield told(name)
    four = list(suites.standard(what.experiment.threat))
    if "standard" in settings.attacks and all(name in stands for name in four):
        # By definition: the worst case over its members. Only its time needs a run of its own.
        whole = set.intersection(*(set(stands[name]) for name in four))
        stands["standard"] = {
            who: np.all([stands[name][who] for name in four], axis=0)
            for who in stands[four[0]] if who in whole
        }  # fmt: skip
        # What no attack of any peer broke: few have all four.
        theirs_of = [found for name in four for who, found in stands[name].items() if who != "ours"]
        if theirs_of:
            stands["standard"]["peers_together"] = np.all(theirs_of, axis=0)
        yield told("standard")
