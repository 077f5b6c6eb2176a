"""The ladder of adaptive attacks, for any defended run.

    python -m experiments.evaluate --config=experiments/configs/ladder.py --workdir=RUN
    python -m experiments.evaluate --config=experiments/configs/ladder.py:small --workdir=RUN

It takes the place of the run's own evaluation; everything else is as it was trained. "small" is
for two CPU cores: a hundred images and a part of the budget.
"""

from typing import Any

SMALL = dict(
    steps=30,
    draws=8,
    restarts=2,
    queries=500,
    answers=4,
    sweep_draws=(1, 4, 8),
    sweep_steps=(10, 30),
)


def get_config(size: str = "full") -> dict[str, Any]:
    """The evaluation section, over a thousand images or a hundred."""
    small = size == "small"
    return dict(
        evaluation=dict(
            images=100 if small else 1000,
            batch_size=50 if small else 250,
            eight_bit=True,
            ladder=SMALL if small else {},
        )
    )
