"""What a training step sends, multiplies and holds on many devices, counted before there are any.

    python -m experiments.scaling --config=FILE --workdir=DIR
    python -m experiments.scaling --config=FILE --config.machine=tpu_v5p_64 --config.compiler=tpu
    python -m experiments.scaling --config=FILE --config.batches=64,128,256,512

The config is one for `experiments.train`. Its step is compiled for 1, 2, 4 and 8 simulated devices
(`--config.devices`) and never run: once with the config's batch shared by all of them (strong
scaling), once with a batch of that size on each (weak). From the compiled programs come every
collective, matrix FLOPs, bytes of memory traffic and the memory plan; from these and from data
sheets (`--config.machine`) seconds on paper. NOTHING HERE IS MEASURED. `compiler=tpu` asks TPUs'
own compiler, which needs libtpu and no TPU, and plans for them alone; without it programs are the
CPU's, in which sums, FLOPs and shapes are those of an accelerator, and fusions, memory traffic and
temporaries are not. `batches` adds the memory of one device at these batch sizes, by each way of
rematerialisation, and what JAX hands from the forward to the backward pass before any compiler
has seen it. Writes scaling.json.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.cli import run
from experiments.scaling_counts import programs, roofline
from experiments.scaling_counts.programs import Counts
from experiments.scaling_counts.roofline import MACHINES, Machine, Paper
from rain_jax.checks import UsageError, one_of, within
from rain_jax.config import build, tree
from rain_jax.config.schema import call, filled
from rain_jax.logs import provenance, table, write_json
from rain_jax.models.residual import REMATS
from rain_jax.runs import cache, workdir


class Asked(NamedTuple):
    """What is counted, beside the config itself."""

    machine: str
    devices: tuple[int, ...]
    batches: tuple[int, ...]
    compiler: str
    evaluations: bool


def asked(
    *,
    machine: str = "h100x8",
    devices: tuple[int, ...] = (1, 2, 4, 8),
    batches: tuple[int, ...] = (),
    compiler: Literal["cpu", "tpu"] = "cpu",
    evaluations: bool = True,
) -> Asked:
    """`devices` has 1 among them, to compare with; `evaluations` compiles attacks as well."""
    one_of("machine", machine, MACHINES)
    within("devices", devices, 1, 4096)
    within("batches", batches or 1, 1)
    if compiler == "tpu" and MACHINES[machine].tpu is None:
        known = [name for name, other in MACHINES.items() if other.tpu]
        raise UsageError(f"machine={machine!r}: expected a TPU for its compiler: {known}")
    if compiler == "tpu" and max(devices) > MACHINES[machine].devices:
        raise UsageError(f"devices={devices}: {machine} has {MACHINES[machine].devices}")
    return Asked(machine, tuple(sorted({1, *devices})), batches, compiler, evaluations)


def changed(config: Any, changes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What is asked, and the config of the run with the other changes."""
    own = {key: value for key, value in changes if key in Asked._fields}
    for key in ("devices", "batches"):
        if isinstance(own.get(key), int):  # one number, as it is typed
            own[key] = (own[key],)
    rest = [(key, value) for key, value in changes if key not in Asked._fields]
    return {
        "asked": filled(asked, own),
        "run": tree.plain(tree.changed(config, rest)),
    }


def main(spec: dict[str, Any], folder: Path) -> None:
    """Compiles, counts, prints tables and writes scaling.json."""
    cache.enable()
    want: Asked = call("config", asked, tree.plain(spec["asked"]))
    machine = MACHINES[want.machine]
    if want.compiler == "tpu":
        programs.simulated(1)  # for shapes; programs are for the slice
        assert machine.tpu is not None
        devices = programs.described(machine.tpu)
    else:
        devices = programs.simulated(max(want.devices))
    experiment = build.experiment(spec["run"])
    if experiment.config["method"]["name"] == "rat":
        raise UsageError("config.method.name='rat': expected a config of experiments.train")
    folder.mkdir(parents=True, exist_ok=True)
    workdir.check_writable(folder)
    dtype = experiment.config["network"].get("dtype", "float32")
    print(
        f"Counted in programs compiled by {want.compiler.upper()}'s compiler, times reckoned from "
        f"the data sheet of {want.machine}: calculations, no measurements.", flush=True,
    )  # fmt: skip
    found: dict[str, Any] = {
        "measured": False,
        "asked": want._asdict(),
        "machine": machine._asdict(),
        "config": experiment.config,
        "provenance": provenance(),
        "held": held(experiment),
    }

    # --- the step on more and more devices
    size = experiment.training.batch_size
    one = programs.training_step(experiment, devices[:1])
    print("  one device: compiled", flush=True)
    rows = [step_row("alone", one, one, machine, 1, size, size, dtype)]
    for how, count in [(how, n) for how in ("strong", "weak") for n in want.devices if n > 1]:
        total = size if how == "strong" else size * count
        if total % count or total > experiment.splits.train.size:
            print(f"  {how}, {count} devices: not with a batch of {total}", flush=True)
            continue
        counts = programs.training_step(programs.resized(experiment, total), devices[:count])
        rows.append(step_row(how, counts, one, machine, count, total, size, dtype))
        print(f"  {how}, {count} devices: compiled", flush=True)
    found["steps"] = rows
    print(f"\n{told_of_sums(rows, found['held'])}\n\n{table(*step_table(rows))}", flush=True)

    # --- evaluations, which have nothing to say to each other
    if want.evaluations and max(want.devices) > 1:
        judged = programs.evaluations(experiment, devices[:2])
        found["evaluations"] = {
            name: [sum_._asdict() for sum_ in counts.collectives] for name, counts in judged.items()
        }
        kinds = {name: len(sums) for name, sums in found["evaluations"].items()}
        print(f"\nCollectives in programs that evaluate, on two devices: {kinds}", flush=True)

    # --- memory of one device
    if want.batches:
        found["memory"] = memories(experiment, devices[:1], want.batches, one)
        lines = memory_table(found["memory"], machine)
        print(f"\nMemory of one device, as planned for {want.compiler.upper()}:\n{lines}")
    write_json(folder / "scaling.json", found)


def held(experiment: build.Experiment) -> dict[str, int]:
    """Bytes of what a run carries from step to step."""

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = programs.state_of(experiment)
    return {name: size(getattr(state, name)) for name in ("params", "model_state", "optimiser")}


def step_row(
    how: str, counts: Counts, alone: Counts, machine: Machine, count: int, total: int, size: int,
    dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """One line about a step of `total` images on `count` devices, beside one of `size` on one."""
    paper = roofline.seconds(counts, machine, count, dtype)
    base = roofline.seconds(alone, machine, 1, dtype)
    return {
        "how": how,
        "devices": count,
        "batch_size": total,
        "collectives": sorted({one.kind for one in counts.collectives}),
        "groups": sorted({one.groups for one in counts.collectives}),
        "sent": {kind: one._asdict() for kind, one in roofline.sent(counts.collectives).items()},
        "work": counts.work._asdict(),
        "memory": {**counts.memory._asdict(), "total": counts.memory.total},
        "paper": paper._asdict(),
        # The share of the devices' peak speed that is left, in images.
        "efficiency": {
            way: total / size * getattr(base, way) / (count * getattr(paper, way))
            for way in ("alone", "overlapped")
        },
    }


def told_of_sums(rows: list[dict[str, Any]], held: dict[str, int]) -> str:
    """What is sent in a step of the most devices, against the size of what is learnt."""
    several = [row for row in rows if row["devices"] > 1]
    if not several:
        return "One device: nothing is sent."
    last = several[-1]
    sums = [
        f"  {kind}: {one['bytes']:,} bytes in {one['times']} operations"
        + (f", {one['hidden']:,} of them while something is computed" if one["hidden"] else "")
        for kind, one in sorted(last["sent"].items(), key=lambda item: -item[1]["bytes"])
    ]
    same = all(row["sent"] == last["sent"] for row in several)
    others = sorted({kind for row in several for kind in row["collectives"]} - {"all-reduce"})
    return "\n".join(
        [
            f"Sent in a step, on {'any number of' if same else last['devices']} devices:",
            *sums,
            f"Parameters: {held['params']:,} bytes; running batch statistics: "
            f"{held['model_state']:,}.",
            f"Collectives other than all-reduce: {', '.join(others) or 'none'}.",
        ]
    )


def step_table(rows: list[dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Rows and headers; per device, and in milliseconds on paper."""
    lines = []
    for row in rows:
        paper = Paper(**row["paper"])
        lines.append(
            [
                row["how"], str(row["devices"]), str(row["batch_size"]),
                f"{row['work']['flops'] / 1e9:,.4g}", f"{row['work']['bytes'] / 1e9:,.3g}",
                f"{row['memory']['total'] / 2**30:.3g}",
                *(f"{1e3 * part:.3g}" for part in
                  (paper.compute, paper.memory, paper.gradients, paper.others)),
                *(f"{100 * row['efficiency'][way]:.1f}" for way in ("alone", "overlapped")),
            ]
        )  # fmt: skip
    headers = [
        "scaling", "devices", "batch", "GFLOP", "GB moved", "GiB held", "ms products", "ms memory",
        "ms gradients", "ms other sums", "% efficient", "% overlapped",
    ]  # fmt: skip
    return lines, headers


def memories(
    experiment: build.Experiment, devices: Sequence[Any], batches: Sequence[int], one: Counts
) -> list[dict[str, Any]]:
    """The memory of a step on one device at each batch size, by each `remat` where it is known.

    `one` is that of the config itself, which is compiled already.
    """
    network, found = experiment.config["network"], []
    for remat in REMATS if "remat" in network else (None,):
        spec = experiment.config
        if remat is not None:
            spec = {**spec, "network": {**network, "remat": remat}}
        other = build.experiment(spec)
        for size in batches:
            counts = one
            if size != experiment.training.batch_size or remat != network.get("remat"):
                counts = programs.training_step(programs.resized(other, size), devices)
                print(f"  batch {size}, remat {remat}: compiled", flush=True)
            held = {**counts.memory._asdict(), "total": counts.memory.total}
            held["kept"] = programs.kept(programs.resized(other, size))
            found.append({"remat": remat, "batch_size": size, "flops": counts.work.flops, **held})
    return found


def memory_table(rows: list[dict[str, Any]], machine: Machine) -> str:
    """The memory of each, and, by a straight line through them, what a device would hold."""
    headers = [
        "remat", "batch", "GiB kept by JAX", "GiB arguments", "GiB temporaries", "GiB held",
        "TFLOP", "fits",
    ]  # fmt: skip
    lines = [
        [
            str(row["remat"]), str(row["batch_size"]),
            *(f"{row[part] / 2**30:.3f}" for part in ("kept", "arguments", "temporaries", "total")),
            f"{row['flops'] / 1e12:.3f}", "yes" if row["total"] < machine.memory else "no",
        ]
        for row in rows
    ]  # fmt: skip
    said = [table(lines, headers)]
    for remat in dict.fromkeys(row["remat"] for row in rows):
        own = [(row["batch_size"], row["total"]) for row in rows if row["remat"] == remat]
        if len({size for size, _ in own}) > 1:
            sizes, totals = np.array(own, np.float64).T
            slope, base = np.polyfit(sizes, totals, 1)
            off = max(abs(base + slope * size - total) / total for size, total in own)
            said.append(
                f"remat {remat}: {base / 2**30:.2f} GiB and {slope / 2**20:.2f} MiB an image "
                f"(within {100 * off:.1f} %): {int((machine.memory - base) / slope):,} images in "
                f"{machine.memory / 2**30:.1f} GiB"
            )
    return "\n".join(said)


if __name__ == "__main__":
    run(main, changed=changed)
