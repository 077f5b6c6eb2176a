"""SENSE: an adversary that stops where the network would no longer be right by a margin."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import one_of, whole, within
from rain_jax.losses import cross_entropy, kl, soft_cross_entropy
from rain_jax.methods.common import Staged, attack_batch, moved, outer, right, targets, total
from rain_jax.norms import project, random_start
from rain_jax.types import (
    Array,
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
    Threat,
)

Form = Literal["at", "trade"]
_HALVINGS = 20  # of a last step, down to a millionth of it


class Sensible(NamedTuple):
    """What the adversary found for one image."""

    image: Image
    ignored: Array  # bool: lost, or past the threshold, at the random start already
    reverted: Array  # bool: a step crossed the threshold and was taken back


def sensible(
    threat: Threat,
    key: Key,
    logits_fn: LogitsFn,
    image: Image,
    label: Target,
    *,
    steps: int,
    step_size: Any,
    threshold: Any,
    form: Form = "at",
    adaptive: Any = True,
    bisect: bool = False,
) -> Sensible:
    """PGD from a random start that undoes the step after which the loss is above -log `threshold`.

    As the authors' code (JungeumKim/SENSE) has it: an image that is misclassified, or above the
    threshold, at its random start is left there; a step that crosses is undone whole, and the image
    stays where it was; without `adaptive` steps are not undone. "trade" climbs, and compares with
    the threshold, KL from the clean prediction in the place of cross-entropy, from the first step
    on (theirs begins with one step of cross-entropy). `bisect` goes on to the threshold itself
    along the last step, which is how the paper defines the adversary. At `threshold` 1 the clean
    image comes back.
    """
    cut = -jnp.log(jnp.asarray(threshold, jnp.float32))
    # As `attacks.pgd` splits it, whose images these are where nothing is undone.
    start_key, model_key, clean_key = jax.random.split(key, 3)
    clean = logits_fn(clean_key, image) if form == "trade" else None

    def losses(image: Image, number: Any) -> tuple[Scalar, Array]:
        logits = logits_fn(jax.random.fold_in(model_key, number), image)
        loss = cross_entropy(logits, label) if clean is None else kl(logits, clean)
        return loss, logits

    slope = jax.value_and_grad(losses, has_aux=True)
    start = random_start(threat, start_key, image)
    (_, logits), gradient = slope(start, 0)
    ignored = (jnp.argmax(logits) != label) | (cross_entropy(logits, label) > cut)

    def step(carry: Any, number: Any) -> tuple[Any, None]:
        here, gradient, done, reverted = carry
        there = project(threat, image, here + step_size * threat.norm.steepest(gradient))
        (loss, _), gradient_there = slope(there, number)
        crossed = ~done & adaptive & (loss > cut)
        if bisect:
            last = _last_below(lambda x: losses(x, number)[0], here, there, cut)
            there = jnp.where(crossed, last, there)
        stays = done if bisect else done | crossed
        here, gradient = jax.tree.map(
            lambda old, new: jnp.where(stays, old, new), (here, gradient), (there, gradient_there)
        )
        return (here, gradient, done | crossed, reverted | crossed), None

    carry = (start, gradient, ignored, jnp.bool_(False))
    (found, _, _, reverted), _ = jax.lax.scan(step, carry, jnp.arange(1, steps + 1))
    return Sensible(jnp.where(cut > 0, found, image), ignored, reverted)


def _last_below(loss: Any, here: Image, there: Image, cut: Scalar) -> Image:
    """The point between the two up to which the loss is at most `cut`, by halving."""

    def halve(reach: Any, _: None) -> tuple[Any, None]:
        low, high = reach
        middle = (low + high) / 2
        below = loss(here + middle * (there - here)) <= cut
        return (jnp.where(below, middle, low), jnp.where(below, high, middle)), None

    (low, _), _ = jax.lax.scan(halve, (jnp.float32(0.0), jnp.float32(1.0)), length=_HALVINGS)
    return here + low * (there - here)


def sense(
    network: Network,
    threat: Threat,
    *,
    threshold: float = 0.5,
    steps: int = 10,
    step_size: float = 1.5 / 255,
    form: Form = "at",
    clean_weight: float = 0.0,
    warmup: float = 10.0,
    bisect: bool = False,
    steps_per_epoch: int = 1,
) -> Objective:
    """Sensible adversarial training (Kim & Wang, arXiv:2205.10457), after the authors' code.

    The loss on the images of `sensible`, in evaluation mode: cross-entropy, or with `form="trade"`
    KL from the clean prediction. `clean_weight` adds the clean cross-entropy. `threshold` is their
    c, the probability of the label below which the adversary does not go: 1 is natural training,
    and 0 PGD training of those images that are right at their random start. In the first `warmup`
    epochs no step is undone. Metrics tell how many images were ignored and reverted.

    Under AutoAttack the authors' own WRN-34-10 keeps 34 % where they report 57 % (RobustBench):
    a trade of robustness for clean accuracy, and no free gain.
    """
    within("threshold", threshold, above=0.0, high=1.0)
    whole("steps", steps, 1)
    within("step_size", step_size, above=0.0)
    within("clean_weight", clean_weight, 0.0)
    within("warmup", warmup, 0.0)
    one_of("form", form, ("at", "trade"))
    begins = math.ceil(warmup * steps_per_epoch)

    def find(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName, step: Scalar | int,
    ) -> tuple[tuple[Batch, Sensible], ModelState]:  # fmt: skip
        if isinstance(threshold, float | int) and threshold >= 1:
            none = jnp.zeros(len(batch.label), bool)
            return (batch, Sensible(batch.image, none, none)), model_state

        def attack(key: Key, logits_fn: LogitsFn, image: Image, label: Target) -> Any:
            return sensible(
                threat, key, logits_fn, image, label, steps=steps, step_size=step_size,
                threshold=threshold, form=form, adaptive=jnp.asarray(step) >= begins, bisect=bisect,
            )  # fmt: skip

        found: Any
        found, model_state = attack_batch(
            network, attack, params, model_state, key, batch, axis_name=axis_name
        )
        return (batch, found), model_state

    def learn(
        params: Params, model_state: ModelState, key: Key, pair: Any, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch, found = pair
        # As in `natural`, so that a threshold of 1 is natural training to the last bit.
        losses = jax.vmap(soft_cross_entropy)
        labels = targets(network, batch, 0.0)
        extra: Any = 0.0
        if form == "trade" or clean_weight > 0:
            clean = outer(network, params, model_state, key, batch, batch.image, axis_name)
            model_state = clean.model_state
            extra = clean_weight * losses(clean.logits, labels)
        seen = outer(network, params, model_state, key, batch, found.image, axis_name)
        if form == "trade":
            lost = jax.vmap(kl)(seen.logits, clean.logits)
        else:
            lost = losses(seen.logits, labels)
        metrics = {
            "correct": right(batch, seen.logits),
            "moved": moved(batch, found.image),
            "ignored": total(batch, found.ignored * 1.0),
            "reverted": total(batch, found.reverted * 1.0),
        }
        return total(batch, lost + extra), (seen.model_state, metrics)

    return Staged(find, learn)
