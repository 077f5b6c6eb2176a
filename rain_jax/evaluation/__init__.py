"""How robust a model is, counted: attacks over many images, the judge, and sums of its verdicts.

`packing` drives an attack over a data set, `verdicts` decides about what it found, `counts` adds
up, `cost` says what that took; `engine` runs a whole evaluation, and `call` that of any model, in
one call: `rain_jax.evaluate`.
An attack knows nothing of either: it gets `logits_fn(key, image)` and returns an image. `smoothing`
proves radii within which there is none.
"""

from rain_jax.evaluation import smoothing
from rain_jax.evaluation.columns import AttackColumn, ColumnResult, EvaluationRun
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
from rain_jax.evaluation.engine import (
    SHOWN,
    Evaluation,
    attack_and_judge,
    cascade,
    key_of,
    logits_fn_of,
)
from rain_jax.evaluation.packing import Drive, as_iteration, packed, packed_lanes, passes
from rain_jax.evaluation.verdicts import (
    Found,
    Judgement,
    Lanes,
    LogitsFnOf,
    ModelOf,
    Rules,
    Verdicts,
    as_they_are,
    judge,
    judging,
    judging_lanes,
    split_for_judge,
)
from rain_jax.remembered import forget

__all__ = [
    "SHOWN",
    "AttackColumn",
    "ColumnResult",
    "Cost",
    "Drive",
    "Evaluation",
    "EvaluationRun",
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
    "attack_and_judge",
    "cascade",
    "cost",
    "curve",
    "forget",
    "in_some_draw",
    "join",
    "judge",
    "judging",
    "judging_lanes",
    "key_of",
    "logits_fn_of",
    "nobody",
    "packed",
    "packed_lanes",
    "passes",
    "proportion",
    "shares",
    "smoothing",
    "split_for_judge",
    "standing",
    "worst_case",
]
