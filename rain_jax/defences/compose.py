"""Defences put together: one after another, one of several, with another backward rule, in front of
a model.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, one_of, whole, within
from rain_jax.gradients import straight_through
from rain_jax.types import (
    Array,
    Defence,
    DefenceApply,
    Image,
    Key,
    Logits,
    LogitsFn,
    Variables,
)

BATCH_AXIS = "defended batch"
"""The name of the axis over which `network.in_front` maps a defence, where a batch is a batch."""


def defend(
    logits_fn: LogitsFn, defence: Defence, variables: Variables, *, through: str | None = None
) -> LogitsFn:
    """The model behind the defence, as a function of the image and a key.

    With `through` it is the form that an attacker climbs: one of `defence.surrogates`, in the
    place of what is deployed. The defence and a random model draw from keys of their own.
    """
    apply = form(defence, through)

    def defended(key: Key, image: Image) -> Logits:
        own, rest = jax.random.split(key)
        return logits_fn(rest, apply(variables, own, image))

    return defended


def form(defence: Defence, through: str | None) -> DefenceApply:
    """What is deployed, or the surrogate called `through`; raises a `UsageError` for others."""
    if through is None:
        return defence.apply
    if not defence.surrogates:
        raise UsageError(f"through={through!r}: expected None: the defence has no surrogates")
    return defence.surrogates[one_of("through", through, defence.surrogates)]


def bpda(defence: Defence, surrogate: DefenceApply | None = None) -> Defence:
    """The same function with the backward pass of `surrogate`, by default the identity's.

    Backward pass differentiable approximation (Athalye et al., arXiv:1802.00420), for a defence
    whose own gradient is of no use; for the identity, image and result have one shape. The rule
    of the defence before stays among the surrogates, as "own".
    """
    return defence._replace(
        apply=straight_through(defence.apply, surrogate),
        surrogates={**defence.surrogates, "own": defence.apply},
    )


def chain(defences: tuple[Defence, ...]) -> Defence:
    """One defence after another, the first one first; gradients go through all of them.

    A surrogate of the chain is one of any member's, with the others that know one of that name
    using theirs, too, and the rest as deployed. Variables are those of the members by their places,
    "0", "1", .., inside each collection.
    """
    defences = _some(defences)

    def init(key: Key, image: Image) -> Variables:
        parts = []
        for own, defence in zip(jax.random.split(key, len(defences)), defences, strict=True):
            parts.append(defence.init(own, image))
            # Only its shape matters to the next one.
            shape = jax.eval_shape(defence.apply, parts[-1], own, image)
            image = jnp.zeros(shape.shape, shape.dtype)
        return _joined(parts)

    def through(name: str | None) -> DefenceApply:
        forms = _forms(defences, name)

        def apply(variables: Variables, key: Key, image: Image) -> Image:
            for place, (own, one) in enumerate(
                zip(jax.random.split(key, len(forms)), forms, strict=True)
            ):
                image = one(_part(variables, place), own, image)
            return image

        return apply

    whole = _combined(defences, init, through, any(defence.random for defence in defences))
    # One look is enough where no member draws under that name.
    sure = [d.fixed if d.random else frozenset(whole.surrogates) for d in defences]
    return whole._replace(fixed=frozenset.intersection(*sure))


def choose(defences: tuple[Defence, ...], *, weights: tuple[float, ...] | None = None) -> Defence:
    """One of several defences for each image, drawn with the given `weights`, or alike.

    All give results of one shape. Every member is computed for every image, since under `vmap`
    there is no other way; surrogates and variables are as in `chain`.
    """
    defences = _some(defences)
    share = (1.0,) * len(defences) if weights is None else within("weights", weights, 0.0)
    if np.shape(share) != (len(defences),) or sum(share) <= 0:
        raise UsageError(f"weights={weights!r}: expected {len(defences)} numbers, not all zero")

    def init(key: Key, image: Image) -> Variables:
        keys = jax.random.split(key, len(defences))
        return _joined([d.init(own, image) for own, d in zip(keys, defences, strict=True)])

    def through(name: str | None) -> DefenceApply:
        forms = _forms(defences, name)

        def apply(variables: Variables, key: Key, image: Image) -> Image:
            drawing, rest = jax.random.split(key)
            drawn = jax.random.categorical(drawing, jnp.log(jnp.array(share)))
            each = [
                one(_part(variables, place), own, image)
                for place, (own, one) in enumerate(
                    zip(jax.random.split(rest, len(forms)), forms, strict=True)
                )
            ]
            return jnp.stack(each)[drawn]

        return apply

    return _combined(defences, init, through, True)


def _some(defences: Sequence[Defence]) -> tuple[Defence, ...]:
    if not defences:
        raise UsageError("defences=(): expected one at least")
    return tuple(defences)


def _forms(defences: Sequence[Defence], name: str | None) -> list[DefenceApply]:
    return [form(d, name if name in d.surrogates else None) for d in defences]


def _combined(
    defences: Sequence[Defence],
    init: Callable[[Key, Image], Variables],
    through: Callable[[str | None], DefenceApply],
    random: bool,
) -> Defence:
    names = dict.fromkeys(name for defence in defences for name in defence.surrogates)
    return Defence(init, through(None), random, {name: through(name) for name in names})


def _joined(parts: Sequence[Variables]) -> Variables:
    """The members' variables by collection and place, so that "params" stays on top."""
    collections = dict.fromkeys(name for part in parts for name in part)
    return {
        name: {str(place): part[name] for place, part in enumerate(parts) if name in part}
        for name in collections
    }


def _part(variables: Variables, place: int) -> Variables:
    """One member's own."""
    here = str(place)
    return {name: held[here] for name, held in variables.items() if here in held}


def mean_of_draws(logits_fn: LogitsFn, draws: int) -> LogitsFn:
    """The mean logits over `draws` passes of a random model, as it may be deployed."""
    whole("draws", draws, 1)

    def mean(key: Key, image: Image) -> Array:
        logits = jax.vmap(logits_fn, (0, None))(jax.random.split(key, draws), image)
        return jnp.mean(logits, axis=0)

    return mean
