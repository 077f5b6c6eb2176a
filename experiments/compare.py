"""Our attacks beside those of other libraries, on the same weights and images.

    python -m experiments.compare runs/mnist --images=1000 --peers=torchattacks,adv_lib
    python -m experiments.compare runs/mnist --random=weights       an untrained network instead
    python -m experiments.compare runs/mnist --random=shift         a model that draws
    python -m experiments.compare runs/mnist --speed --images=200   interleaved, as ratios

Every image, theirs and ours, goes before the same judge: fresh keys, the threat in float64. Prints
a table and writes `compare.json` into the run's folder (`--out=FILE`: elsewhere); started again, a
comparison that was stopped goes on behind its last attack. PyTorch and the peers come with the
extra `peers`.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, cache, loading, workdir
from experiments.defended import logits_fn_of
from experiments.logs import provenance, table, write_json
from rain_jax import attacks, data, evaluation, norms
from rain_jax.attacks import suites
from rain_jax.checks import UsageError, one_of
from rain_jax.parallel import Devices, choose_devices, initialise, place
from rain_jax.types import Array, Batch, Iteration, Key, LogitsFn, Variables

SHIFTS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # as `twins.SHIFTS`


class Subject(NamedTuple):
    """What is attacked: a model of ours and its PyTorch twin, with images and labels."""

    logits_fn_of: evaluation.LogitsFnOf
    variables: Variables
    twin: Any
    images: Any  # NumPy float32 [N, H, W, C]
    labels: Any
    experiment: build.Experiment
    devices: Devices
    batch_size: int

    def batches(self, given: np.ndarray | None = None) -> Iterator[Batch]:
        """The images, or those `given` (bool [N]), in order."""
        wanted = np.ones(len(self.labels), bool) if given is None else given
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            index: Any = np.arange(len(self.labels), dtype=np.int32)[part]
            valid: Any = wanted[part]
            yield Batch(self.images[part], self.labels[part], index, valid)


def subject(folder: Path, images: int, random: str | None, batch_size: int) -> Subject:
    """The model of a run, or one with random weights, or one that shifts its images at random."""
    from experiments import twins

    experiment = build.experiment(workdir.read_config(folder))
    devices = place("shard_map", choose_devices())
    source = data.first(experiment.splits.test, images)
    pixels, labels = data.resident(source)
    pixels = np.asarray(data.as_float(pixels))
    if random == "weights":
        variables = experiment.network.init(jax.random.key(0), jnp.zeros((1, *source.shape)))
    else:
        variables, _ = loading.load(experiment, folder)
    network = experiment.config["network"]
    twin = twins.twin(network, jax.tree.map(np.asarray, variables))
    of = logits_fn_of(experiment.network)
    if random == "weights":
        # It is right about everything that way, and its attacks have something to do.
        labels = np.argmax(np.asarray(_logits(of, variables, pixels)), axis=1).astype(np.int32)
    _check_twin(_logits(of, variables, pixels[:64]), twin, pixels[:64])
    if random == "shift":
        of, twin = shifted(of), twins.Shifted(twin)
    return Subject(
        of, devices.replicate(variables), twin, pixels, labels, experiment, devices, batch_size
    )


def shifted(logits_fn_of: evaluation.LogitsFnOf) -> evaluation.LogitsFnOf:
    """The model that rolls its image by one pixel, in a direction that its key draws."""

    def of(variables: Variables) -> LogitsFn:
        fixed = logits_fn_of(variables)

        def logits_fn(key: Key, image: Array) -> Array:
            move = jnp.asarray(SHIFTS)[jax.random.randint(key, (), 0, len(SHIFTS))]
            return fixed(key, jnp.roll(image, move, axis=(0, 1)))

        return logits_fn

    return of


def _logits(of: evaluation.LogitsFnOf, variables: Variables, pixels: np.ndarray) -> np.ndarray:
    model = jax.jit(lambda v, x: jax.vmap(lambda one: of(v)(jax.random.key(0), one))(x))
    parts = [model(variables, pixels[i : i + 250]) for i in range(0, len(pixels), 250)]
    return np.concatenate([np.asarray(part) for part in parts])


def _check_twin(ours: np.ndarray, twin: Any, pixels: np.ndarray) -> None:
    import torch

    with torch.no_grad():
        images = torch.tensor(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))
        theirs = twin(images).numpy()
    worst = float(np.max(np.abs(theirs - ours)))
    if worst > 1e-3 * max(1.0, float(np.max(np.abs(ours)))):
        raise UsageError(f"the PyTorch twin is another function: its logits differ by {worst:g}")


# --- Ours -------------------------------------------------------------------------------------


class Side(NamedTuple):
    """An attack of ours, or a suite: each member on what the ones before it left standing."""

    drives: list[Callable[..., Iterator[evaluation.Found]]]
    judge: Callable[..., Iterator[evaluation.Verdicts]]

    def __call__(self, what: Subject, key: Key) -> np.ndarray:
        """Who stands, bool [N]."""
        stands = np.ones(len(what.labels), bool)
        for number, drive in enumerate(self.drives):
            own = jax.random.fold_in(key, number)
            found = drive(what.variables, own, what.batches(stands))
            for some in self.judge(what.variables, own, found):
                stands[some.judgement.index] = evaluation.standing(some.judgement)
        return stands


def ours(what: Subject, members: dict[str, Iteration]) -> Side:
    """Compiled at its first call, once for all."""
    rules = evaluation.Rules(what.experiment.threat)
    on, size = what.devices, what.batch_size
    return Side(
        [evaluation.packed(a, what.logits_fn_of, on, batch_size=size) for a in members.values()],
        evaluation.judging(what.logits_fn_of, rules, on, batch_size=size),
    )


def our_attacks(what: Subject, settings: argparse.Namespace) -> dict[str, dict[str, Iteration]]:
    """Our side of every comparison, at the budgets that the peers get."""
    threat, steps = what.experiment.threat, settings.steps
    standard = suites.standard(threat, steps=steps, queries=settings.queries)
    pgd = attacks.pgd(threat, steps=40, step_size=threat.radius / 10)
    return {**{name: {name: a} for name, a in standard.items()}, "pgd": {"pgd": pgd},
            "standard": standard}  # fmt: skip


def theirs(what: Subject, peer: str, attack: str, settings: argparse.Namespace) -> np.ndarray:
    """A peer's images."""
    from experiments import peers

    return peers.run(
        peer, attack, what.twin, what.images, what.labels,
        norm=norms.name_of(what.experiment.threat.norm), radius=what.experiment.threat.radius,
        batch_size=what.batch_size, threads=settings.threads,
        steps=40 if attack == "pgd" else settings.steps, queries=settings.queries,
    )  # fmt: skip


def judged(what: Subject, images: np.ndarray, key: Key, draws: int = 1) -> evaluation.Judgement:
    """Any images, before our judge."""
    rules = evaluation.Rules(what.experiment.threat, draws)
    judge = evaluation.judging(what.logits_fn_of, rules, what.devices, batch_size=what.batch_size)
    zeros = np.zeros(len(images), np.int32)
    (batch,) = what._replace(batch_size=len(images)).batches()
    found = evaluation.Found(batch, images, zeros.astype(np.float32), zeros, zeros)
    return evaluation.join([v.judgement for v in judge(what.variables, key, [found])])


@contextlib.contextmanager
def timed(into: dict[str, float], who: str) -> Iterator[None]:
    """CPU seconds of what runs inside: one run each, compiling included, so a hint and no ratio."""
    began = time.process_time()
    yield
    into[who] = round(time.process_time() - began, 1)


# --- The three comparisons --------------------------------------------------------------------


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
        stands["standard"]["peers_together"] = np.all(
            [found for name in four for who, found in stands[name].items() if who != "ours"], axis=0
        )
        yield told("standard")


def random_model(what: Subject, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Our `rand` suite on a model that draws, against EOT-PGD-20 of torchattacks."""
    from experiments import peers

    threat, draws = what.experiment.threat, 20
    clean = judged(what, what.images, jax.random.key(1), 50)
    (attack,) = suites.rand(threat, steps=settings.steps, draws=draws).values()
    drive = evaluation.packed(
        attack, what.logits_fn_of, what.devices, batch_size=what.batch_size, early=False
    )
    images = what.images.copy()
    for found in drive(what.variables, jax.random.key(2), what.batches()):
        images[found.batch.index] = found.image
    size = norms.name_of(threat.norm)
    there = peers.run(
        "torchattacks", "eot_pgd", what.twin, what.images, what.labels, norm=size,
        radius=threat.radius, steps=20, draws=draws, batch_size=what.batch_size,
        threads=settings.threads,
    )  # fmt: skip
    for name, candidates, number in (
        ("clean", what.images, 50), ("ours: rand, its own figure (20 draws)", images, draws),
        ("ours: rand, 50 fresh draws", images, 50),
        ("torchattacks: EOT-PGD-20, 50 fresh draws", there, 50),
    ):  # fmt: skip
        verdict = judged(what, candidates, jax.random.key(100 + number), number)
        share = np.where(verdict.allowed, verdict.share, clean.share)
        error = np.sqrt(np.sum(share * (1 - share)) / (number - 1)) / len(share)
        yield {
            "attack": name, "images": len(share), "draws": number,
            "accuracy_of_one_draw": float(np.mean(share)), "standard_error": float(error),
            "accuracy_of_the_mean": float(np.mean(evaluation.worst_case(clean, [verdict]))),
        }  # fmt: skip


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


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, compares, prints a table and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("pgd", "apgd_ce", "apgd_t", "fab_t", "square", "standard")
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), default=["torchattacks", "adv_lib"]
    )
    parser.add_argument("--attacks", type=lambda text: text.split(","), default=list(names))
    parser.add_argument("--random", choices=("weights", "shift"))
    parser.add_argument("--speed", action="store_true")
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
    elif settings.random == "shift":
        compared = random_model(what, settings)
    else:
        compared = strength(what, settings, known(out, asked))
    for line in compared:
        # Through JSON, for plain numbers; written at once, since the next one may take an hour.
        lines.append(json.loads(json.dumps(line, default=float)))
        told = {key: value for key, value in lines[-1].items() if key != "standing"}
        print(json.dumps(told), flush=True)
        write_json(out, {"asked": asked, "lines": lines, "provenance": provenance()})
    columns = list(
        dict.fromkeys(
            key for line in lines for key in line if "alone" not in key and key != "standing"
        )
    )
    print("\n" + table([[_cell(line.get(c)) for c in columns] for line in lines], columns))


def known(out: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a comparison of the same things that was stopped, but for the suite's."""
    if not out.is_file():
        return []
    found = json.loads(out.read_text())
    for key in asked.keys() - {"attacks", "out", "threads"}:
        if found["asked"].get(key) != asked[key]:
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
