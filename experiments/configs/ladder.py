"""The ladder of adaptive attacks, for any defended run.

    python -m experiments.evaluate --config=experiments/configs/ladder.py --workdir=RUN
    python -m experiments.evaluate --config=experiments/configs/ladder.py:small --workdir=RUN
    python -m experiments.evaluate --config=experiments/configs/ladder.py:least --workdir=RUN

It takes the place of the run's own evaluation; everything else is as it was trained. "small" is
for two CPU cores: a hundred images and a part of the budget. "least" is for them and photographs of
96 pixels: forty images, and what it cannot break has not been shown to stand.
"""

from typing import Any

from rain_jax.checks import one_of

SMALL = dict(
    steps=30,
    draws=8,
    restarts=2,
    queries=500,
    answers=4,
    sweep_draws=(1, 4, 8),
    sweep_steps=(10, 30),
)
LEAST = dict(
    steps=20,
    draws=4,
    restarts=1,
    queries=200,
    answers=2,
    sweep_draws=(1, 4),
    sweep_steps=(10, 20),
)
# Images, how many at once, and the budget.
SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "full": (1000, 250, {}),
    "small": (100, 50, SMALL),
    "least": (40, 20, LEAST),
}


def get_config(size: str = "full") -> dict[str, Any]:
    """The evaluation section, over a thousand images, a hundred or forty."""
    images, batch_size, budget = SIZES[one_of("size", size, list(SIZES))]
    return dict(
        evaluation=dict(images=images, batch_size=batch_size, eight_bit=True, ladder=budget)
    )
