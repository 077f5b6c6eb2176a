"""Several runs, or several attacks, side by side; the one that got furthest is the answer."""

import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, whole
from rain_jax.types import Access, Image, Iteration, Key, LogitsFn, PyTree, Scalar, Target


def side_by_side(
    run: Callable[[Any], Iteration], count: int | Callable[[int], int], steps: int
) -> Iteration:
    """The runs 0 to `count` - 1 as one vmapped axis, each from a key of its own.

    `run(number)` is given a traced number. `count` may depend on the number of classes, as the
    number of targets does. The answer has the largest score that `best` gives.
    """

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> PyTree:
        classes = jax.eval_shape(logits_fn, key, image).shape[-1]
        number = count(classes) if callable(count) else count
        return jax.vmap(lambda run_, key: run(run_).init(key, logits_fn, image, target))(
            jnp.arange(number), jax.random.split(key, number)
        )

    def over(states: PyTree, function: Callable[[Iteration, PyTree], PyTree]) -> PyTree:
        number = len(jax.tree.leaves(states)[0])
        return jax.vmap(lambda run_, state: function(run(run_), state))(jnp.arange(number), states)

    def step(logits_fn: LogitsFn, states: PyTree) -> PyTree:
        return over(states, lambda attack, state: attack.step(logits_fn, state))

    def furthest(found: tuple[Image, Scalar]) -> tuple[Image, Scalar]:
        images, scores = found
        place = jnp.argmax(scores)
        return images[place], scores[place]

    def best(logits_fn: LogitsFn, states: PyTree) -> tuple[Image, Scalar]:
        return furthest(over(states, lambda attack, state: attack.best(logits_fn, state)))

    def seen(states: PyTree) -> tuple[Image, Scalar]:
        return furthest(over(states, lambda attack, state: attack.seen(state)))  # type: ignore[misc]

    def queries(states: PyTree) -> Scalar:
        return jnp.sum(over(states, lambda attack, state: attack.queries(state)))  # type: ignore[misc]

    one = run(0)
    return one._replace(
        init=init, step=step, best=best, steps=steps, once=False,
        queries=None if one.queries is None else queries, seen=None if one.seen is None else seen,
    )  # fmt: skip


def restarted(attack: Iteration, restarts: int) -> Iteration:
    """`restarts` runs of one attack; a single one is left as it is."""
    whole("restarts", restarts, 1)
    if restarts == 1:
        return attack
    return side_by_side(lambda number: attack, restarts, attack.steps)


class Together(NamedTuple):
    """The states of several attacks on one image."""

    image: Image
    parts: tuple[PyTree, ...]


def together(*attacks: Iteration) -> Iteration:
    """Different attacks in step, each from a key of its own. Raises `UsageError` for unequal steps.

    The answer has the largest score: for random models the worst mean over draws that any of them
    has met.
    """
    if len({attack.steps for attack in attacks}) != 1:
        raise UsageError(f"steps={[a.steps for a in attacks]}: expected as many for each attack")

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Together:
        keys = jax.random.split(key, len(attacks))
        return Together(
            image,
            tuple(a.init(keys[i], logits_fn, image, target) for i, a in enumerate(attacks)),
        )

    def step(logits_fn: LogitsFn, state: Together) -> Together:
        pairs = zip(attacks, state.parts, strict=True)
        return state._replace(parts=tuple(a.step(logits_fn, part) for a, part in pairs))

    def best(logits_fn: LogitsFn, state: Together) -> tuple[Image, Scalar]:
        pairs = zip(attacks, state.parts, strict=True)
        images, scores = zip(*(a.best(logits_fn, part) for a, part in pairs), strict=True)
        place = jnp.argmax(jnp.stack(scores))
        return jnp.stack(images)[place], jnp.stack(scores)[place]

    order: tuple[Access, ...] = typing.get_args(Access)  # the most first
    return Iteration(
        init, step, best, attacks[0].steps,
        uses=min((attack.uses for attack in attacks), key=order.index),
        draws=min(attack.draws for attack in attacks),
        norms=tuple(n for n in attacks[0].norms if all(n in attack.norms for attack in attacks)),
        minimum_norm=all(attack.minimum_norm for attack in attacks),
    )  # fmt: skip
