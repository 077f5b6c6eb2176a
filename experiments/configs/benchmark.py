"""Ours beside Pillow, kornia and PyTorch, at sizes for a few CPU cores.

python -m experiments.benchmark --config=experiments/configs/benchmark.py --workdir=DIR
python -m experiments.benchmark --config=experiments/configs/benchmark.py --config.suite=jpeg
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """All suites; the published EDSR is (16, 64), that of our CPU runs (4, 32)."""
    return dict(
        suite="all",
        rounds=7,
        seconds=0.2,
        edsr=dict(networks=((4, 32), (16, 64)), images=(4, 48)),
        jpeg=dict(images=((256, 32), (16, 224)), quality=75),
        rain=dict(blocks=4, width=32, images=(8, 96)),
    )
