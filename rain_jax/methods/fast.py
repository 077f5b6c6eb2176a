"""Adversarial training by a single step that does not collapse: N-FGSM and GradAlign.

Fast-AT itself is `adversarial` with FGSM from a uniform start.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import within
from rain_jax.losses import cross_entropy, margin, soft_cross_entropy
from rain_jax.methods.adversarial import adversarial
from rain_jax.methods.common import BatchNorm, Found, Staged, finder, fit, outer, total
from rain_jax.norms import l2
from rain_jax.parallel import image_keys
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Image,
    Iteration,
    Key,
    LogitsFn,
    Metrics,
    ModelState,
    Network,
    Objective,
    Params,
    Scalar,
    Target,
    Threat,
)

# Folded into a step's key. No image has this index, so that the second look of GradAlign shares no
# draw with an attack.
SECOND_LOOK = 2**30 + 1


class Noisy(NamedTuple):
    """Where one image's noisy step stands."""

    key: Key
    image: Image
    target: Target


def noisy_step(threat: Threat, *, noise: Any, step_size: Any = None) -> Iteration:
    """Noise of `noise` radii and one steepest step, kept to the pixel bounds and to no radius.

    Without a `step_size` the step is the threat's radius.
    """

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Noisy:
        noise_key, model_key = jax.random.split(key)
        draw = threat.norm.sample(noise_key, image.shape, noise * threat.radius)
        return Noisy(model_key, jnp.clip(image + draw, threat.low, threat.high), target)

    def step(logits_fn: LogitsFn, state: Noisy) -> Noisy:
        loss = lambda image: cross_entropy(logits_fn(state.key, image), state.target)
        size = threat.radius if step_size is None else step_size
        climb = size * threat.norm.steepest(jax.grad(loss)(state.image))
        return state._replace(image=jnp.clip(state.image + climb, threat.low, threat.high))

    def best(logits_fn: LogitsFn, state: Noisy) -> tuple[Image, Scalar]:
        return state.image, margin(logits_fn(state.key, state.image), state.target)

    return Iteration(init, step, best, 1, once=True)


def n_fgsm(
    network: Network,
    threat: Threat,
    *,
    noise: float = 2.0,
    step_size: float | None = None,
    batch_norm: BatchNorm = "train",
    label_smoothing: float = 0.0,
) -> Objective:
    """N-FGSM (de Jorge et al., arXiv:2202.01181): one step from noise, and no way back to the ball.

    The noise is uniform in the ball of `noise` radii, and `step_size` is the radius itself unless
    it is given: with the defaults training images may be three radii away. A method and no attack,
    since what it finds keeps to no threat. Noise and step are each clipped to the pixel bounds.
    """
    within("noise", noise, 0.0)
    if step_size is not None:
        within("step_size", step_size, above=0.0)
    attack: Any = noisy_step(threat, noise=noise, step_size=step_size)
    return adversarial(network, attack, batch_norm=batch_norm, label_smoothing=label_smoothing)


def grad_align(
    network: Network,
    attack: Attack,
    threat: Threat,
    *,
    weight: float = 0.2,
    batch_norm: BatchNorm = "train",
    label_smoothing: float = 0.0,
) -> Objective:
    """Adversarial training + `weight` (1 - cos(g(x), g(x + n))) (arXiv:2007.02617).

    g is the gradient of the cross-entropy with respect to the image, in training mode, and n a
    uniform draw from the threat's ball. Only the second one is differentiated again. Their attack
    is FGSM from the image itself, `attack=dict(name="fgsm")`, and their weight 0.2 at 8/255. An
    image one of whose gradients is zero pays nothing. The metric `alignment` is the cosine. The
    passes that the penalty needs leave the running averages alone, which theirs do not.
    """
    within("weight", weight, 0.0)
    fitted = fit(network)

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Found, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch = found.batch

        def slope(params: Params, images: Array) -> Array:
            def loss(images: Array) -> Scalar:
                seen = outer(network, params, model_state, key, batch, images, axis_name)
                return total(batch, jax.vmap(soft_cross_entropy)(seen.logits, found.targets))

            return jax.grad(loss)(images)

        def cosine(one: Array, other: Array) -> Array:
            known = jnp.any(one != 0) & jnp.any(other != 0)
            return jnp.where(known, jnp.sum(l2.steepest(one) * l2.steepest(other)), 1.0)

        keys = image_keys(jax.random.fold_in(key, SECOND_LOOK), batch.index)
        noise = jax.vmap(lambda key: threat.norm.sample(key, batch.image.shape[1:], threat.radius))
        here = jax.lax.stop_gradient(slope(jax.lax.stop_gradient(params), batch.image))
        alignment = jax.vmap(cosine)(here, slope(params, batch.image + noise(keys)))
        loss, (model_state_after, metrics) = fitted(params, model_state, key, found, axis_name)
        penalty = weight * total(batch, 1.0 - alignment)
        metrics = {**metrics, "alignment": total(batch, alignment)}
        return loss + penalty, (model_state_after, metrics)

    find = finder(network, attack, batch_norm=batch_norm, label_smoothing=label_smoothing)
    return Staged(find, learn)
