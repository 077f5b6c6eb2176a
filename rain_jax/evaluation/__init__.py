"""How robust a model is, counted: attacks over many images, the judge, and sums of its verdicts.

`packing` drives an attack over a data set, `verdicts` decides about what it found, `counts` adds
up, `cost` says what that took; `attacked` is all of it in one call, for any model.
An attack knows nothing of either: it gets `logits_fn(key, image)` and returns an image. `smoothing`
proves radii within which there is none.
"""

from rain_jax.evaluation import smoothing
from rain_jax.evaluation.attacked import attacked, cascade
from rain_jax.evaluation.cost import Cost, Passes, cost
from rain_jax.evaluation.counts import (
    Proportion,
    curve,
    in_some_draw,
    join,
    nobody,
    proportion,
    shares,
    standing,
    worst_case,
)
from rain_jax.evaluation.packing import as_iteration, packed, packed_lanes, passes
from rain_jax.evaluation.verdicts import (
    Evaluator,
    Found,
    Judgement,
    Lanes,
    LogitsFnOf,
    ModelOf,
    Rules,
    Verdicts,
    as_they_are,
    evaluator,
    judge,
    judging,
    judging_lanes,
    run,
)

__all__ = [
    "Cost",
    "Evaluator",
    "Found",
    "Judgement",
    "Lanes",
    "LogitsFnOf",
    "ModelOf",
    "Passes",
    "Proportion",
    "Rules",
    "Verdicts",
    "as_iteration",
    "as_they_are",
    "attacked",
    "cascade",
    "cost",
    "curve",
    "evaluator",
    "in_some_draw",
    "join",
    "judge",
    "judging",
    "judging_lanes",
    "nobody",
    "packed",
    "packed_lanes",
    "passes",
    "proportion",
    "run",
    "shares",
    "smoothing",
    "standing",
    "worst_case",
]
