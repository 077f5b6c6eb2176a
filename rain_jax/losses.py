"""Losses of one image's logits [K]; all grow as the classifier gets more wrong.

Attacks climb them, training descends them. Logits are cast to float32 first.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax

from rain_jax.checks import UsageError
from rain_jax.types import Array, Logits, Loss, Scalar

__all__ = ["cross_entropy", "dlr", "kl", "margin"]


def _f32(logits: Logits) -> Logits:
    return jnp.asarray(logits, jnp.float32)


def cross_entropy(logits: Logits, label: Array) -> Scalar:
    """-log p(label); `label` is an integer []."""
    return optax.softmax_cross_entropy_with_integer_labels(_f32(logits), label)


def soft_cross_entropy(logits: Logits, probabilities: Array) -> Scalar:
    """Cross-entropy with target `probabilities` [K], which sum to one."""
    return optax.softmax_cross_entropy(_f32(logits), probabilities)


def smooth(label: Array, classes: int, smoothing: float) -> Array:
    """Label smoothing: [K], `1 - smoothing` on the label and the rest spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(label, classes), smoothing)


def largest(values: Array) -> Scalar:
    """The largest of `values` [K], with the gradient all on the first of equals.

    `jnp.max` finds its gradient by comparing every value with the result and divides by how many
    are equal. XLA may compute the values again for that, and round them otherwise: then none is
    equal, and the gradient is not a number (seen on a CPU, where a product and a sum were one
    rounding here and two there). An index cannot be rounded.
    """
    return values[jnp.argmax(values)]


def margin(logits: Logits, label: Array) -> Scalar:
    """How far the best wrong class leads: positive when misclassified (Carlini & Wagner's loss).

    Infinite for logits that are not finite, which are wrong, so that an attack keeps their image.
    """
    logits = _f32(logits)
    wrong = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return jnp.where(jnp.all(jnp.isfinite(logits)), largest(wrong) - logits[label], jnp.inf)


def lead(logits: Logits, label: Array, target: Array) -> Scalar:
    """How far class `target` leads `label`: what MultiTargeted climbs (arXiv:1910.09338)."""
    logits = _f32(logits)
    return logits[target] - logits[label]


@functools.cache
def _say_once_that_dlr_is_the_margin() -> None:
    warnings.warn(
        "dlr: below three classes there is no third logit to divide by: it is the plain margin",
        UserWarning,
        stacklevel=2,
    )


def dlr(logits: Logits, label: Array) -> Scalar:
    """Difference of logits ratio (Croce & Hein, arXiv:2003.01690): blind to the logits' scale.

    The margin over the spread from the first to the third logit. With two classes there is no
    third: it is the margin itself, as AutoAttack's authors advise to use there, and a `UserWarning`
    says so once.
    """
    if logits.shape[-1] < 3:
        _say_once_that_dlr_is_the_margin()
        return margin(logits, label)
    ranked = -jnp.sort(-_f32(logits))
    return margin(logits, label) / (ranked[0] - ranked[2] + 1e-12)


def dlr_targeted(logits: Logits, label: Array, target: Array) -> Scalar:
    """Targeted DLR (same source): grows as class `target` overtakes `label`.

    The spread is from the first logit to the mean of the third and fourth; to the third alone
    with three classes, and with two it is the plain difference, as `dlr` warns.
    """
    if logits.shape[-1] < 3:
        _say_once_that_dlr_is_the_margin()
        return lead(logits, label, target)
    ranked = -jnp.sort(-_f32(logits))
    third = ranked[2] if logits.shape[-1] == 3 else (ranked[2] + ranked[3]) / 2
    return lead(logits, label, target) / (ranked[0] - third + 1e-12)


def kl(logits: Logits, reference: Logits) -> Scalar:
    """KL(reference || this) between the softmax of two logit vectors, gradient through both.

    Raises `UsageError` for a label in the place of logits.
    """
    if jnp.shape(reference) != jnp.shape(logits):
        raise UsageError(
            f"loss='kl': expected logits {jnp.shape(logits)} to compare with, "
            f"not a label {jnp.shape(reference)}"
        )
    q, p = jax.nn.log_softmax(_f32(logits)), jax.nn.log_softmax(_f32(reference))
    return jnp.sum(jnp.exp(p) * (p - q))


def targeted(loss: Loss) -> Loss:
    """Climbing the result moves the logits *towards* the target that `loss` is given."""
    return lambda logits, target: -loss(logits, target)
