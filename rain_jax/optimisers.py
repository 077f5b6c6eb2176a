"""Optimisers as the field's recipes mean them, from optax's parts; configs name them."""

from typing import Literal

import jax
import optax

from rain_jax.checks import one_of, within
from rain_jax.types import Params, PyTree

__all__ = ["adam", "sgd"]

Decay = Literal["all", "kernels"]


def _mask(decay: Decay) -> PyTree:
    """Which parameters decay: all of them, or those of rank 2 and more (no biases, no norms)."""
    one_of("decay", decay, ("all", "kernels"))

    def mask(params: Params) -> PyTree:
        return jax.tree.map(lambda leaf: decay == "all" or leaf.ndim > 1, params)

    return mask


def _clipped(clip: float | None) -> list[optax.GradientTransformation]:
    if clip is None:
        return []
    within("clip", clip, above=0.0)
    return [optax.clip_by_global_norm(clip)]


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Decay = "all",
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Momentum SGD with the decay added to the gradient, as PyTorch and all published recipes do.

    `decay="kernels"` spares biases and batch norms; `clip` bounds the gradient's global L2 norm
    before the decay is added.
    """
    within("momentum", momentum, 0.0, below=1.0)
    within("weight_decay", weight_decay, 0.0, 1.0)
    return optax.chain(
        *_clipped(clip),
        optax.add_decayed_weights(weight_decay, _mask(decay)),
        optax.sgd(schedule, momentum or None, nesterov),
    )


def adam(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    decay: Decay = "kernels",
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (AdamW, arXiv:1711.05101)."""
    within("b1", b1, 0.0, below=1.0)
    within("b2", b2, 0.0, below=1.0)
    within("weight_decay", weight_decay, 0.0, 1.0)
    return optax.chain(
        *_clipped(clip),
        optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=_mask(decay)),
    )
