"""AFD: signs to start from, mixed examples, and a network that is told which loss counts."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of, within
from rain_jax.losses import soft_cross_entropy
from rain_jax.methods.common import Staged, attack_batch, moved, outer, right, targets, total
from rain_jax.methods.mixing import mixed
from rain_jax.models.conditional import with_condition
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Batch,
    Image,
    Key,
    LogitsFn,
    Metrics,
    ModelState,
    Network,
    Objective,
    Params,
    Scalar,
    Target,
)

# Folded into a step's key. No image has this index, so that the condition is a draw of its own.
_CONDITION = 2**30 + 1
# The part of its own class from which on an image counts as not mixed with another: one, rounded.
_WHOLE = 1 - 1e-6
# A loss below it has no logarithm worth having; its gradient is kept all the same.
_LEAST = 1e-6


class Pairs(NamedTuple):
    """What is learned from."""

    batch: Batch  # the clean images, or their mixtures; the label is that of the larger share
    images: Array  # [B, H, W, C], the attacked ones, or their mixtures
    targets: Array  # [B, K], probabilities, of both
    clean: Scalar  # the condition for the clean ones
    attacked: Scalar  # and for the attacked ones
    weight: Scalar  # of the attacked ones, in [0, 1]


def against(attack: Attack) -> Attack:
    """The attack on soft labels: its target is probabilities [K].

    It is shown two logits (0, g) whose cross-entropy with label 0 is the soft cross-entropy L, so
    g = log(e^L - 1), and the gradient is that of L. Attacks that climb margins climb a
    function that grows with L; the KL divergence from a clean image's two grows both ways.
    """

    def run(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Image:
        def two(key: Key, image: Image) -> Array:
            loss = soft_cross_entropy(logits_fn(key, image), target)
            level = jnp.maximum(jax.lax.stop_gradient(loss), _LEAST)
            rise = -jnp.expm1(-level)
            # The slope of g, written out: the guard above must not take the gradient away.
            slope = (loss - jax.lax.stop_gradient(loss)) / rise
            return jnp.stack([jnp.zeros_like(loss), level + jnp.log(rise) + slope])

        return attack(key, two, image, jnp.int32(0))

    return run


def afd(
    network: Network,
    attack: Attack,
    *,
    mix_stage: Literal["post", "pre", "none"] = "post",
    mix_kind: Literal["mixup", "cutmix"] = "mixup",
    mix_alpha: float = 1.0,
    cross_class_only: bool = False,
    cond: Literal["oat", "source"] = "oat",
    conditions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0),
    deployed: float = 1.0,
) -> Objective:
    """(1 - w) CE(f(m(x); s_c), m(y)) + w CE(f(m(x'); s_a), m(y)), after AFD (Xue et al., 2024).

    Reconstructed from an abstract (10.1109/JMASS.2024.3462548), which names three ingredients and
    gives no equation and no number. All of this is our reading, by their nearest published
    relatives:

    - Signs of random perturbations to start from: `dict(name="pgd", start="sign", ..)`. They are
      said to find the direction faster; where the loss is linear it is the uniform start that does.
    - Mixed examples m, by `mixing.mixed`: "post" mixes x and what the attack made of it alike
      (after Lamb et al., arXiv:1906.06784), "pre" attacks mixed images, against mixed labels. With
      `cross_class_only` an image that meets its own class is left as it is.
    - A condition s that a network with `modulation` is told. "oat" (arXiv:2010.11828) draws one of
      `conditions` and has s_c = s_a = w = s; one draw for a batch, where there each image has its
      own. "source" tells clean images from attacked ones: s_c = 0, s_a = 1, w = 1/2. A network
      without modulation has the same losses and is told nothing.

    The attack is against f(.; s_a), with batch normalisation in evaluation mode. Running averages
    see the attacked images and then the clean ones. The state that comes back has s at `deployed`:
    in evaluation it is one constant for all images, and attackers see it.
    """
    one_of("mix_stage", mix_stage, ("post", "pre", "none"))
    one_of("mix_kind", mix_kind, ("mixup", "cutmix"))
    within("mix_alpha", mix_alpha, above=0.0)
    one_of("cond", cond, ("oat", "source"))
    within("conditions", conditions, 0.0, 1.0)
    if not conditions:
        raise UsageError("conditions=(): expected one at least")
    within("deployed", deployed, 0.0, 1.0)

    def mix(key: Key, batch: Batch, probabilities: Array) -> tuple[Batch, Array]:
        found, soft = mixed(key, batch, probabilities, kind=mix_kind, alpha=mix_alpha)
        if cross_class_only:
            own = jnp.take_along_axis(soft, batch.label[:, None], axis=1) > _WHOLE
            found = found._replace(image=jnp.where(own[..., None, None], batch.image, found.image))
        return found, soft

    def find(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName, step: Scalar | int,
    ) -> tuple[Pairs, ModelState]:  # fmt: skip
        clean: Any = 0.0
        attacked: Any = 1.0
        weight: Any = 0.5
        if cond == "oat":
            drawn = jax.random.choice(jax.random.fold_in(key, _CONDITION), jnp.array(conditions))
            clean = attacked = weight = drawn
        told = with_condition(model_state, attacked)
        probabilities = targets(network, batch, 0.0)
        if mix_stage == "pre":
            batch, probabilities = mix(key, batch, probabilities)
            soft = batch._replace(label=probabilities)
            images, _ = attack_batch(network, against(attack), params, told, key, soft)
        else:
            images, _ = attack_batch(network, attack, params, told, key, batch)
        if mix_stage == "post":
            # As images of twice the channels: the same partners, and the same shares of them.
            both = jnp.concatenate([batch.image, images], axis=-1)
            batch, probabilities = mix(key, batch._replace(image=both), probabilities)
            natural, images = jnp.split(batch.image, 2, axis=-1)
            batch = batch._replace(image=natural)
        return Pairs(batch, images, probabilities, clean, attacked, weight), model_state

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Pairs, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch = found.batch
        told = with_condition(model_state, found.attacked)
        attacked = outer(network, params, told, key, batch, found.images, axis_name)
        told = with_condition(attacked.model_state, found.clean)
        clean = outer(network, params, told, key, batch, batch.image, axis_name)
        natural = jax.vmap(soft_cross_entropy)(clean.logits, found.targets)
        robust = jax.vmap(soft_cross_entropy)(attacked.logits, found.targets)
        metrics = {
            "correct": right(batch, clean.logits),
            "standing": right(batch, attacked.logits),
            "moved": moved(batch, found.images),
            "weight": total(batch, jnp.full(len(natural), found.weight)),
        }
        losses = (1 - found.weight) * natural + found.weight * robust
        return total(batch, losses), (with_condition(clean.model_state, deployed), metrics)

    return Staged(find, learn)
