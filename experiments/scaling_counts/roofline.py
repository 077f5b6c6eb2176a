"""Seconds on paper: what counted programs would take on machines that reach their data sheets.

No machine does, and nothing here is measured. Computing at the matrix peak is the hardest case for
what is sent: the slower the products, the less it matters.
"""

from typing import Any, NamedTuple

from experiments.scaling_counts.programs import Counts
from experiments.scaling_counts.sending import Collective
from rain_jax.parallel import TOTALS

# A backward pass to weights and maps costs twice the forward pass. While it runs the gradients of
# the last layers are ready already.
_BACKWARD = 2 / 3


class Machine(NamedTuple):
    """Devices that are all alike; bytes, and numbers a second, of each."""

    devices: int
    matrix: dict[str, float]  # additions and multiplications, by the dtype of the network
    memory: float
    bandwidth: float  # of the memory
    link: float  # to other devices, in one direction, of all links together
    start: float  # seconds until a sum over devices begins
    hop: float  # and from one device to the next
    axes: int  # of the torus that devices are in; 1 is a ring
    tpu: str | None = None  # kind and shape, as libtpu knows them

    def hops(self, count: int) -> float:
        """From the first to the last of `count` devices and back, for there and back again."""
        return 2 * self.axes * (count ** (1 / self.axes) - 1)


# NVIDIA's data sheets of A100, H100 and H200, SXM: matrix peaks without sparsity, where float32 is
# TF32, which is what XLA takes for convolutions; NVLink is told in both directions together.
# Latencies: NCCL, src/graph/tuning.cc, rings of its LL protocol over NVLink.
_NCCL = dict(start=3.6e-6, hop=0.47e-6, axes=1)
_A100 = dict(matrix={"bfloat16": 312e12, "float32": 156e12}, memory=80e9, bandwidth=2.039e12,
             link=300e9, **_NCCL)  # fmt: skip
_H100 = dict(matrix={"bfloat16": 989e12, "float32": 494e12}, memory=80e9, bandwidth=3.35e12,
             link=450e9, **_NCCL)  # fmt: skip
# Google's documentation, cloud.google.com/tpu/docs/v5p and v5e: chips, interconnect in both
# directions together. float32 products are bfloat16 ones unless a precision is asked for. A hop is
# reckoned with 1 us in How to Scale Your Model, jax-ml.github.io/scaling-book.
_V5P = dict(matrix={"bfloat16": 459e12, "float32": 459e12}, memory=95 * 2**30, bandwidth=2.765e12,
            link=600e9, start=0.0, hop=1e-6, axes=3)  # fmt: skip
_V5E = dict(matrix={"bfloat16": 197e12, "float32": 197e12}, memory=16e9, bandwidth=0.819e12,
            link=200e9, start=0.0, hop=1e-6, axes=2)  # fmt: skip


def _machine(devices: int, parts: dict[str, Any], tpu: str | None = None, **other: Any) -> Machine:
    return Machine(devices, **{**parts, **other}, tpu=tpu)


# TPUs by their number of chips: 64 chips of v5p are what Google calls v5p-128.
MACHINES = {
    "a100x8": _machine(8, _A100),
    "h100x8": _machine(8, _H100),
    "h200x8": _machine(8, _H100, memory=141e9, bandwidth=4.8e12),
    "tpu_v5e_8": _machine(8, _V5E, "v5e:2x4"),
    "tpu_v5e_64": _machine(64, _V5E, "v5e:8x8"),
    "tpu_v5p_8": _machine(8, _V5P, "v5p:2x2x2"),
    "tpu_v5p_64": _machine(64, _V5P, "v5p:4x4x4"),
}


class Sent(NamedTuple):
    """One use of the links in a step."""

    bytes: int  # in one call of the program
    times: int  # how many operations that is
    hidden: int = 0  # bytes of those that are under way while something else is computed


def sent(collectives: list[Collective]) -> dict[str, Sent]:
    """All-reduced bytes by what they are: gradients, metrics, and batch statistics by their place.

    What a network sums itself are the statistics of its batch normalisation: forward, in the
    backward pass ("cotangents"), and inside the loop of an attack. An operation that carries
    several kinds is counted as one of the largest.
    """
    found: dict[str, list[int]] = {}
    for one in collectives:
        kinds: dict[str, int] = {}
        for part in one.parts:
            kind = _kind(one, part.op_name, part.scalar)
            kinds[kind] = kinds.get(kind, 0) + part.bytes
        largest = max(kinds, key=lambda kind: kinds[kind])
        for kind, size in kinds.items():
            own = found.setdefault(kind, [0, 0, 0])
            own[0] += one.times * size
            own[1] += one.times * (kind == largest)
            own[2] += one.times * size * one.hidden
    return {kind: Sent(*all_) for kind, all_ in found.items()}


def _kind(one: Collective, op_name: str, scalar: bool) -> str:
    if one.kind != "all-reduce":
        return one.kind
    if TOTALS in op_name:
        return "metrics" if scalar else "gradients"
    if one.looped:
        return "statistics in attacks"
    return "statistics' cotangents" if "transpose(" in op_name else "statistics"


class Paper(NamedTuple):
    """Seconds of one step, calculated."""

    compute: float
    memory: float
    gradients: float  # sending them
    others: float  # sending the rest, which nothing can overlap with: the next layer waits for it
    room: float  # of the backward pass, while gradients could be sent

    @property
    def alone(self) -> float:
        """With every sum waited for."""
        return self.compute + self.others + self.gradients

    @property
    def overlapped(self) -> float:
        """With gradients sent during the backward pass, as far as there is room.

        A bound: where XLA combines all gradients into one sum, it begins when the last is there;
        `parallel.overlap` asks for several.
        """
        return self.compute + self.others + max(0.0, self.gradients - self.room)


def seconds(counts: Counts, machine: Machine, count: int, dtype: str) -> Paper:
    """On `count` devices of `machine`; sums go round in rings, 2 (n - 1) / n of their bytes."""
    work = counts.work
    compute = work.flops / machine.matrix[dtype]
    room = _BACKWARD * (work.flops - work.looped_flops) / machine.matrix[dtype]
    took = {"gradients": 0.0, "others": 0.0}
    for kind, one in sent(counts.collectives).items() if count > 1 else ():
        wire = 2 * (count - 1) / count * one.bytes / machine.link
        wait = one.times * (machine.start + machine.hops(count) * machine.hop)
        took["gradients" if kind == "gradients" else "others"] += wire + wait
    return Paper(
        compute, work.bytes / machine.bandwidth, took["gradients"], took["others"], room
    )  # fmt: skip
