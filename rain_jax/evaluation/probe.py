"""A look at the model before it is evaluated: its answers to a few images, and a short attack."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import data
from rain_jax.attacks import pgd
from rain_jax.checks import UsageError
from rain_jax.evaluation.engine import Evaluation, logits_fn_of
from rain_jax.evaluation.verdicts import Judgement, LogitsFnOf, Rules, judge
from rain_jax.gradients import eot, exact
from rain_jax.losses import margin
from rain_jax.parallel import image_keys
from rain_jax.remembered import remembered
from rain_jax.types import Array, Batch, Estimator, Key, LogitsFn, Model, PyTree, Threat

# Images that are looked at, and the attack on them: steps of a tenth of the radius. Of a random
# model they are fewer, since each step takes several draws.
_LOOKED_AT, _LOOKED_AT_RANDOM, STEPS, _DRAWS = 128, 64, 40, 5
# Changes of the logits with the key, relative to the largest: more than the order of sums makes.
_DRAWN = 1e-3
# How far from 1 probabilities may add up to in low precision.
_SUM = 0.01


class Slopes(NamedTuple):
    """Of each image [N]: the gradient's length, and the cosine of two of independent draws."""

    length: Any
    cosine: Any


class Probe(NamedTuple):
    """A short attack on the first few images, at several radii, and their gradients."""

    slopes: Slopes
    radii: tuple[float, ...]  # the threat's, twice that, and one at which nothing should stand
    share: list[np.ndarray]  # at each, the share of the draws [n] that are right about each image


def refuse(model: Model, keys: Key, images: Any) -> np.ndarray:
    """Raises a `UsageError` where the model, or how it is asked, is certainly not what was meant.

    `images` are a few, float32 [N, H, W, C] in [0, 1], asked about with `keys` [2, N]. Returns the
    logits [N, K] by the first ones.
    """
    one = _answers(model.logits)
    alone, again = (np.asarray(one(model.variables, some, images)) for some in keys)
    if not np.all(np.isfinite(alone)):
        raise UsageError("the model's logits of clean test images are not finite numbers")
    apart = np.max(np.abs(alone - again), axis=1)
    if not model.random and apart.max() > _DRAWN * np.max(np.abs(alone)):
        raise UsageError(
            "the model draws at random and does not say so: its logits change with the key; "
            "expected random=True in its Network or Defence"
        )
    if np.all(alone >= 0) and np.all(np.abs(np.sum(alone, axis=1) - 1) < _SUM):
        raise UsageError(
            "the model's outputs are probabilities, in [0, 1] and of sum 1: expected logits; "
            "attacks on probabilities stall where a model is confident"
        )
    return alone


@remembered
def _answers(logits: Callable[..., Any]) -> Callable[..., Any]:
    """A program of the logits [N, K] of images, each by itself."""
    return jax.jit(jax.vmap(logits, (None, 0, 0)))


def looked_at(evaluation: Evaluation) -> tuple[data.Source, int]:
    """The images that are looked at, and how many of them at once.

    One device does it, and is shown as many as its share of a batch has.
    """
    most = _LOOKED_AT_RANDOM if evaluation.model.random else _LOOKED_AT
    source = data.first(evaluation.source, most)
    return source, max(1, evaluation.batch_size // evaluation.devices.size)


def few_of(evaluation: Evaluation) -> np.ndarray:
    """The first images, as many as are looked at at once, or two."""
    source, room = looked_at(evaluation)
    few = data.first(source, max(2, room))
    (batch,) = data.evaluation_batches(few, few.size)
    return np.asarray(data.as_float(batch.image))


def look(evaluation: Evaluation) -> Probe:
    """Attacks the first few images of an evaluation, briefly."""
    model = evaluation.model
    source, room = looked_at(evaluation)
    variables = jax.device_put(jax.tree.map(np.asarray, model.variables))
    draws = _DRAWS if model.random else 1
    batches = list(data.evaluation_batches(source, min(source.size, max(1, room // draws))))
    radii = _radii(evaluation.threat, source.shape)
    # An attack and its judge must not share their draws.
    keys = jax.random.split(evaluation.key_of("sanity"))
    sloping, surviving = _programs(
        logits_fn_of(model), eot(draws) if model.random else exact(), STEPS,
        Rules(evaluation.threat, evaluation.draws, evaluation.eight_bit),
    )  # fmt: skip

    def over(program: Any, *arguments: Any) -> Any:
        """The program's results on the images of all batches."""
        parts = [
            jax.tree.map(lambda leaf, b=batch: np.asarray(leaf)[b.valid],
                         program(variables, keys, *arguments, batch))
            for batch in batches
        ]  # fmt: skip
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    share = [over(surviving, jnp.float32(radius)) for radius in radii]
    return Probe(over(sloping), radii, share)


@remembered
def _programs(
    of: LogitsFnOf, estimator: Estimator, steps: int, rules: Rules
) -> tuple[Callable[..., Slopes], Callable[..., Array]]:
    """Programs of a batch: its gradients, and which images stay correct within any radius."""

    @jax.jit
    def sloping(variables: PyTree, keys: Key, batch: Batch) -> Slopes:
        return slopes(estimator, of(variables), keys[0], batch)

    @jax.jit
    def surviving(variables: PyTree, keys: Key, radius: Any, batch: Batch) -> Array:
        # The radius is data here: one program serves them all.
        on = rules.threat._replace(radius=radius)
        attack = pgd(on, steps=steps, step_size=radius / 10, loss=margin, estimator=estimator)

        def one(index: Array, image: Array, label: Array) -> Array:
            mine, judges = (jax.random.fold_in(key, index) for key in keys)
            found = attack(mine, of(variables), image, label)
            within = rules._replace(threat=on)
            seen, _ = judge(of(variables), within, judges, image, found, label)
            judgement = Judgement(index, label, *seen)
            return jnp.where(judgement.allowed, judgement.share, 1.0)

        return jax.vmap(one)(batch.index, data.as_float(batch.image), batch.label)

    return sloping, surviving


def slopes(estimator: Estimator, logits_fn: LogitsFn, key: Key, batch: Batch) -> Slopes:
    """The margin's gradient as attacks see it, twice; for one batch, inside a program."""

    def one(key: Key, image: Array, label: Array) -> tuple[Array, Array]:
        estimate = estimator(lambda k, x: (margin(logits_fn(k, x), label), None))
        first, second = (estimate(k, image)[1].ravel() for k in jax.random.split(key))
        product = jnp.linalg.norm(first) * jnp.linalg.norm(second)
        cosine = jnp.dot(first, second) / jnp.where(product > 0, product, 1.0)
        return jnp.linalg.norm(first), cosine

    image = data.as_float(batch.image)
    return Slopes(*jax.vmap(one)(image_keys(key, batch.index), image, batch.label))


def _radii(threat: Threat, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The threat's own, twice that, and the one within which every image can be made grey."""
    radius, far = float(threat.radius), far_radius(threat, shape)
    nearer = tuple(dict.fromkeys(r for r in (radius, 2 * radius) if r < far))
    return (*nearer, far) if nearer else (radius,)


def far_radius(threat: Threat, shape: tuple[int, ...]) -> float:
    """The distance within which every image of that shape can be made grey."""
    return (threat.high - threat.low) / 2 * math.prod(shape) ** (1 / threat.norm.order)
