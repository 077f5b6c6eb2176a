"""Training methods, by the names that configs use. A new one is a file here and a line below.

Each maker takes the `Network`, whatever else it needs (an attack, a threat) and plain numbers,
and returns an `Objective`, which `training.minimise` turns into a `Method`. Around these go what
serves several: `mixing` is an option of theirs, `awp.awp` and `members.side_by_side` make an
objective of objectives, and `free.free` makes a `Method` of one.
"""

from rain_jax.methods.adversarial import adversarial
from rain_jax.methods.afd import afd
from rain_jax.methods.fast import grad_align, n_fgsm
from rain_jax.methods.fat import fat
from rain_jax.methods.mart import mart
from rain_jax.methods.natural import natural
from rain_jax.methods.rat import rat
from rain_jax.methods.sense import sense
from rain_jax.methods.trades import trades

__all__ = [
    "adversarial",
    "afd",
    "fat",
    "grad_align",
    "mart",
    "n_fgsm",
    "natural",
    "rat",
    "sense",
    "trades",
]
