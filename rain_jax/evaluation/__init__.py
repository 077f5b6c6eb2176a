"""How robust a model is, counted: attacks over many images, the judge, and sums of its verdicts.

`packing` drives an attack over a data set, `verdicts` decides about what it found, `counts` adds
up.
An attack knows nothing of either: it gets `logits_fn(key, image)` and returns an image.
"""

from rain_jax.evaluation.counts import (
    Proportion,
    curve,
    join,
    nobody,
    proportion,
    shares,
    standing,
    worst_case,
)
from rain_jax.evaluation.packing import packed
from rain_jax.evaluation.verdicts import (
    Evaluator,
    Found,
    Judgement,
    LogitsFnOf,
    Rules,
    Verdicts,
    as_they_are,
    evaluator,
    judge,
    judging,
    run,
)

__all__ = [
    "Evaluator",
    "Found",
    "Judgement",
    "LogitsFnOf",
    "Proportion",
    "Rules",
    "Verdicts",
    "as_they_are",
    "curve",
    "evaluator",
    "join",
    "judge",
    "judging",
    "nobody",
    "packed",
    "proportion",
    "run",
    "shares",
    "standing",
    "worst_case",
]
