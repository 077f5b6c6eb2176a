"""What a profile says: the time of a GPU's kernels, or of a CPU's operations, by what they do.

    python -m experiments.benching.kernels FILE.trace.json.gz

Of the trace that `experiments.benchmark --config.profile=true` writes for each line.
"""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rain_jax.checks import UsageError
from rain_jax.logs import table

# What a kernel's name holds, the first that fits; cuDNN's come before XLA's own.
_ON_GPU = {
    "fprop": "convolution",
    "dgrad": "convolution, towards images",
    "wgrad": "convolution, towards kernels",
    "reduce": "sums",
    "mem": "filling and copying",
    "loop": "elementwise",
}
# And an operation's on CPU: matrix products and convolutions that YNNPACK does are called after it.
_ON_CPU = {
    "ynn": "products and convolutions, by YNNPACK",
    "conv_general": "convolutions, by Eigen",
    "dot": "products",
    "all-reduce": "waiting for another device, and its sums",
    "psum": "waiting for another device, and its sums",
    "copy": "filling and copying",
    "concatenate": "filling and copying",
    "pad": "filling and copying",
    "reduce": "sums",
    "fusion": "elementwise",
    "wrapped": "elementwise",
}
# Operations that are made of others, which the profile has as well.
_AROUND = ("while", "call", "conditional")

Event = dict[str, Any]


def kinds(events: list[Event]) -> tuple[Counter[str], Counter[str], float]:
    """Milliseconds and numbers of the kernels by kind, and how long all of them took together.

    That is from the first's start to the last's end. `events` are those of Chrome's trace format,
    where a GPU's kernels lie in the threads called streams. Where there are none, they are the
    operations of CPU devices, which take their time side by side.
    """
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and "Stream" in event["args"]["name"]
    }
    done = [event for event in events if event.get("ph") == "X"]
    ran, names = [e for e in done if (e["pid"], e["tid"]) in streams], _ON_GPU
    if not ran:
        ran, names = [e for e in done if _is_operation(e)], _ON_CPU
    took: Counter[str] = Counter()
    many: Counter[str] = Counter()
    for event in ran:
        name = event["name"].lower()
        kind = next((told for part, told in names.items() if part in name), "others")
        took[kind] += event["dur"] / 1e3
        many[kind] += 1
    ends = [event["ts"] + event["dur"] for event in ran]
    return took, many, (max(ends) - min(event["ts"] for event in ran)) / 1e3 if ran else 0.0


def _is_operation(event: Event) -> bool:
    """Of a compiled program on CPU, and not made of others."""
    around = event["name"].partition(".")[0] in _AROUND
    return "hlo_op" in event.get("args", {}) and not around


def main(file: str) -> None:
    """Prints a line for each kind."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{file}: no such file: expected a FILE.trace.json.gz")
    with gzip.open(path) as opened:
        took, many, span = kinds(json.load(opened)["traceEvents"])
    if not took:
        raise UsageError(f"{file}: no kernels of a GPU in it, and no operations")
    whole = sum(took.values())
    rows = [
        [kind, f"{many[kind]:,}", f"{ms:.2f}", f"{100 * ms / whole:.1f}"]
        for kind, ms in took.most_common()
    ]
    print(table(rows, ["kernels", "number", "ms", "%"]))
    print(f"{sum(many.values()):,} kernels, {whole:.1f} ms of {span:.1f} ms from first to last")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2] or [""])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
