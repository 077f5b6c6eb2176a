"""Training methods, by the names that configs use. A new one is a file here and a line below.

Each maker takes the `Network`, whatever else it needs (an attack, a threat) and plain numbers,
and returns an `Objective`, which `training.minimise` turns into a `Method`.
"""

from rain_jax.methods.adversarial import adversarial
from rain_jax.methods.natural import natural

__all__ = ["adversarial", "natural"]
