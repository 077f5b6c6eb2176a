"""An experiment traced on the shapes of its data, so that what does not fit is met before a run."""

from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError
from rain_jax.config.schema import located
from rain_jax.types import (
    Attack,
    Batch,
    Image,
    Iteration,
    Key,
    Logits,
    LogitsFn,
    Network,
    Objective,
    Target,
)


class Attacked(NamedTuple):
    """An attack, where its config describes it, and the keys that it has there."""

    where: str
    keys: Container[str]
    attack: Attack | Iteration


def trace(
    spec: Mapping[str, Any],
    network: Network,
    shape: tuple[int, ...],
    *,
    change: Callable[[Key, Image], Image],
    objective: Objective,
    attacks: Iterable[Attacked],
) -> None:
    """Traces all that sees images [H, W, C] of `shape`; raises `UsageError` about what does not.

    `spec` is the whole config, whose sections say which keys a mistake is told by; `change` is the
    augmentation. Nothing is compiled.
    """
    key = jax.eval_shape(jax.random.key, 0)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    label = jax.ShapeDtypeStruct((), jnp.int32)

    def traced(
        where: str, keys: Container[str], function: Callable[..., Any], *arguments: Any
    ) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except UsageError as error:
            raise located(where, error, keys) from None

    one: Any = (image, label, label, jax.ShapeDtypeStruct((), bool))
    two = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), Batch(*one))
    variables = dict(traced("config.network", spec["network"], network.init, key, two.image))
    params = variables.pop("params")
    traced("config.augment", spec["augment"], change, key, image)
    traced("config.method", spec["method"], objective, params, variables, key, two)

    # Attacks never see the network, so a cheap one of as many classes stands in for it.
    def logits_fn(key: Key, image: Image) -> Logits:
        return jnp.sum(image) * jnp.ones(network.classes)

    for where, keys, attack in attacks:
        traced(where, keys, partial(_attacked, attack, logits_fn), key, image, label)


def _attacked(
    attack: Attack | Iteration, logits_fn: LogitsFn, key: Key, image: Image, label: Target
) -> Image:
    return attack(key, logits_fn, image, label)
