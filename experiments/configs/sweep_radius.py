"""Accuracy of any run against the radius, by one program.

    python -m experiments.sweep --config=experiments/configs/sweep_radius.py:8/255 --workdir=RUN
    python -m experiments.sweep --config=experiments/configs/sweep_radius.py:0.3 --workdir=OUT \\
        --config.sweep.axes.run=runs/a,runs/b --config.sweep.axes.seed=0,1,2

The text after the colon is the radius of the threat, and the curve goes to twice that. It takes the
place of the run's own evaluation.
"""

from typing import Any

from experiments.cli import value_of

POINTS = 16


def get_config(radius: str = "8/255") -> dict[str, Any]:
    """PGD-40 on the first thousand test images, at 16 radii from an eighth to twice the radius."""
    step = 2 * float(value_of(radius)) / POINTS
    pgd = dict(name="pgd", steps=40)
    return dict(
        sweep=dict(axes={"threat.radius": [step * (place + 1) for place in range(POINTS)]}),
        evaluation=dict(images=1000, batch_size=500, attacks=dict(pgd40=pgd)),
    )
