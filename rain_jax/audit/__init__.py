"""Whether a defended model is as robust as it looks: the ladder of adaptive attacks, and checks."""

from rain_jax.audit.ladder import Forms, Ladder, Rung, rungs
from rain_jax.audit.validity import Validity

__all__ = ["Forms", "Ladder", "Rung", "Validity", "rungs"]
