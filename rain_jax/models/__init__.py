"""The networks, by name. A new one is one file and one line here.

Each is a maker, `maker(classes, *, mean, std, activation, dtype, ...) -> Network`, whose arguments
are plain values that a config can hold: `dict(name="wrn_28_10", activation="silu")`. A linen module
of your own becomes a `Network` by `rain_jax.models.network.network`.
"""

from rain_jax.models.cnn import cnn, madry_cnn, small_cnn
from rain_jax.models.resnet import (
    preact_resnet,
    preact_resnet18,
    resnet18,
    resnet50,
    wide_resnet,
    wrn_28_10,
    wrn_34_10,
)

__all__ = [
    "cnn",
    "madry_cnn",
    "preact_resnet",
    "preact_resnet18",
    "resnet18",
    "resnet50",
    "small_cnn",
    "wide_resnet",
    "wrn_28_10",
    "wrn_34_10",
]
