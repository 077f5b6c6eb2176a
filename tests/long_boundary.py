"""Judges images on the decision boundary in every batch size, on devices and on kinds of CPU.

    PYTHONPATH=.:tests:tests/evaluation python tests/long_boundary.py [--out=FILE.json]

The long form of evaluation/test_boundary.py: a thousand images within 4 ulp of the boundary, batch
sizes 1, 7, 16, 32 and 256 on 1, 2 and 8 simulated devices, compiled for three instruction sets.
Prints for each set how many verdicts differ between shapes (none may), and for each pair of sets
how many differ, and how many of those are not among the images that the record counts (none).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import boundary_images
import numpy as np

COUNT = 1000
SIZES, DEVICES = (1, 7, 16, 32, 256), (1, 2, 8)
SETS = ("SSE4_2", "AVX", "AVX2")


def main() -> None:
    """Makes the images once, judges them in a process for each set, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    images, label = boundary_images.on_the_boundary(COUNT)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "images.npz"
        np.savez(source, images=images, label=label, sizes=SIZES, devices=DEVICES)
        for isa in SETS:
            out = Path(folder) / f"{isa}.npz"
            flags = f"--xla_force_host_platform_device_count=8 --xla_cpu_max_isa={isa}"
            command = [sys.executable, boundary_images.__file__, source, out]
            subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": flags})
            with np.load(out) as seen:
                found[isa] = dict(seen)
    shapes = [f"{size}/{count}" for size in SIZES for count in DEVICES]
    rows = []
    for isa, seen in found.items():
        first = seen[f"right/{shapes[0]}"]
        apart = sum(int(np.sum(seen[f"right/{shape}"] != first)) for shape in shapes)
        near = [int(np.sum(seen[f"near_boundary/{shape}"])) for shape in shapes]
        rows.append(dict(set=isa, right=int(np.sum(first)), shapes=len(shapes),
                         counted=[min(near), max(near)], differ=apart))  # fmt: skip
        print(f"{isa}: {rows[-1]['right']} of {COUNT} right, {min(near)} to {max(near)} counted; "
              f"verdicts that differ between {len(shapes)} shapes: {apart}")  # fmt: skip
    pairs = []
    for one, other in itertools.combinations(SETS, 2):
        differ = found[one][f"right/{shapes[0]}"] != found[other][f"right/{shapes[0]}"]
        counted = (
            found[one][f"near_boundary/{shapes[0]}"] & found[other][f"near_boundary/{shapes[0]}"]
        )
        missed = int(np.sum(differ & ~counted))
        pairs.append(dict(sets=[one, other], differ=int(np.sum(differ)), not_counted=missed))
        print(f"{one}, {other}: {np.sum(differ)} verdicts differ, {missed} of them not counted")
    if asked.out:
        asked.out.write_text(json.dumps(dict(images=COUNT, within=rows, between=pairs), indent=1))
    if any(row["differ"] for row in rows) or any(pair["not_counted"] for pair in pairs):
        sys.exit("a verdict hangs on more than the record says")


if __name__ == "__main__":
    main()
