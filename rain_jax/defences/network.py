"""Defended classifiers as networks, so that all that trains, saves and evaluates a network works on
them: a defence in front of one, and several that vote.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of
from rain_jax.defences.compose import BATCH_AXIS, form
from rain_jax.members import over_members, stacked
from rain_jax.types import (
    Array,
    AxisName,
    Defence,
    Key,
    ModelState,
    Network,
    Variables,
)

Part = Literal["classifier", "defence", "both"]
_PARTS = ("classifier", "defence")


def in_front(
    defence: Defence,
    network: Network,
    *,
    trained: Part = "classifier",
    drift: bool = False,
    through: str | None = None,
) -> Network:
    """The network behind the defence; what is `trained` is under "params", the rest beside it.

    Variables are `{"params": {part: ..}, "frozen": {part: ..}}`, the parts being "classifier" and
    "defence"; a defence without parameters leaves none to train. A frozen classifier is in
    evaluation mode while the defence trains; `drift` has its batch statistics move all the same, as
    the code of RAIN's authors does. With `through` the defence is the surrogate of that name.
    """
    one_of("trained", trained, (*_PARTS, "both"))
    apply_defence = form(defence, through)
    learning = _PARTS if trained == "both" else (trained,)

    def init(key: Key, images: Array) -> Variables:
        own, rest = jax.random.split(key)
        shape = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
        image = jnp.zeros(shape.shape, shape.dtype)
        front = defence.init(own, image)
        seen = jax.eval_shape(apply_defence, front, own, image)
        variables = network.init(rest, jnp.zeros((1, *seen.shape), seen.dtype))
        whole = {"classifier": variables, "defence": front}
        if not any(whole[part].get("params") for part in learning):
            raise UsageError(f"trained={trained!r}: expected a part with parameters to train")
        return _arranged(whole, learning)

    def apply(
        variables: Variables,
        images: Array,
        train: bool = False,
        axis_name: AxisName = None,
        keys: Array | None = None,
    ) -> tuple[Array, ModelState]:
        whole = parts_of(variables)
        if keys is None:
            if defence.random:
                raise UsageError("keys=None: expected a key for each image: the defence is random")
            keys = jax.random.split(jax.random.key(0), images.shape[0])
        own, rest = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        seen = jax.vmap(
            lambda key, image: apply_defence(whole["defence"], key, image), axis_name=BATCH_AXIS
        )(own, images)
        moving = train and ("classifier" in learning or drift)
        logits, state = network.apply(whole["classifier"], seen, moving, axis_name, rest)
        frozen = variables["frozen"]
        return logits, {"frozen": {**frozen, "classifier": {**frozen["classifier"], **state}}}

    return Network(init, apply, network.classes, defence.random or network.random)


def parts_of(variables: Variables) -> dict[str, Variables]:
    """The variables of "classifier" and "defence" of a network made by `in_front`."""
    whole = {}
    for part in _PARTS:
        held = variables["frozen"].get(part, {})
        if part in variables["params"]:
            held = {**held, "params": variables["params"][part]}
        whole[part] = held
    return whole


def with_parts(variables: Variables, whole: dict[str, Variables]) -> Variables:
    """The same variables with the parts of `whole` in place of their own."""
    return _arranged(whole, tuple(variables["params"]))


def _arranged(whole: dict[str, Variables], learning: tuple[str, ...]) -> Variables:
    params = {part: whole[part].get("params", {}) for part in learning}
    frozen = {
        part: {k: v for k, v in held.items() if not (k == "params" and part in learning)}
        for part, held in whole.items()
    }
    return {"params": params, "frozen": frozen}


def ensemble(
    networks: Sequence[Network],
    combine: Callable[[Array], Array],
    *,
    how: Literal["unroll", "vmap"] = "unroll",
) -> Network:
    """Several networks of one structure, whose logits [M, K] `combine` makes one [K].

    Their variables are stacked along a new first axis [M]. With `how="vmap"` they run as one, which
    is only right of networks that are the same function of their variables: members that differ in
    a setting are not, unless it is a table among these.
    """
    if not networks:
        raise UsageError("networks=(): expected one at least")

    def init(key: Key, images: Array) -> Variables:
        keys = jax.random.split(key, len(networks))
        each = [n.init(own, images) for own, n in zip(keys, networks, strict=True)]
        return stacked(each)

    def apply(
        variables: Variables,
        images: Array,
        train: bool = False,
        axis_name: AxisName = None,
        keys: Array | None = None,
    ) -> tuple[Array, ModelState]:
        def member(network: Network, own: Variables, number: Any) -> tuple[Array, ModelState]:
            # Members draw apart from each other.
            drawn = None
            if keys is not None:
                drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return network.apply(own, images, train, axis_name, drawn)

        logits, state = over_members(networks, member, variables, how)
        return jax.vmap(combine, in_axes=1)(logits), state

    return Network(init, apply, networks[0].classes, any(n.random for n in networks))
