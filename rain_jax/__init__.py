"""Adversarially robust image classification in JAX: train, defend and measure honestly.

`rain_jax.evaluate` measures how robust a model is, `rain_jax.evaluate_ladder` that of a defended
model by adaptive attacks, `rain_jax.load` reads what a run has trained. Start at `types`, the words
that everything here uses. `attacks`, `methods` and `models` are registries: what their `__all__`
names can be named in a config.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads what is behind a name when it is asked for, so that importing parts stays quick."""
    if name == "evaluate":
        from rain_jax.evaluation.call import evaluate

        return evaluate
    if name == "evaluate_ladder":
        from rain_jax.audit.call import evaluate_ladder

        return evaluate_ladder
    if name == "load":
        from rain_jax.runs.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
