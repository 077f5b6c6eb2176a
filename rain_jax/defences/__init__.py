"""The defences, by name. A new one is one file and one line here.

Each is a maker, `maker(...) -> Defence`, whose arguments are plain values that a config can hold:
`dict(name="rain", upscaler=dict(name="edsr"))`. `compose.defend` puts one in front of any
`logits_fn`, `network.in_front` in front of a network that trains with it.
"""

from rain_jax.defences.baselines import (
    bit_depth,
    gaussian_noise,
    median,
    resize_and_pad,
    total_variation,
)
from rain_jax.defences.compose import chain, choose
from rain_jax.defences.jpeg import feature_distillation, jpeg, nn_jpeg, shield
from rain_jax.defences.rain import rain

__all__ = [
    "bit_depth",
    "chain",
    "choose",
    "feature_distillation",
    "gaussian_noise",
    "jpeg",
    "median",
    "nn_jpeg",
    "rain",
    "resize_and_pad",
    "shield",
    "total_variation",
]
