"""RAT: training on universal perturbations towards each class, which are data of the training."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of, within
from rain_jax.losses import cross_entropy
from rain_jax.methods.common import Staged, moved, outer, right, total
from rain_jax.parallel import image_keys
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Image,
    Key,
    Metrics,
    ModelState,
    Network,
    Objective,
    Params,
    Scalar,
    Variables,
)

_NAME = "perturbations"


def with_perturbations(variables: Any, perturbations: Array) -> dict[str, Any]:
    """Variables, or a model state, that carry `perturbations` [K, H, W, C], one for each class."""
    return {**variables, _NAME: perturbations}


def without_perturbations(variables: Any) -> dict[str, Any]:
    """The same of the network itself."""
    return {name: value for name, value in variables.items() if name != _NAME}


def carrying(network: Network) -> Network:
    """The network with perturbations beside its variables, zeros until `with_perturbations`.

    It classifies as before; whoever saves its variables saves them along. Twice is as once.
    """

    def init(key: Key, images: Array) -> Variables:
        zeros = jnp.zeros((network.classes, *images.shape[1:]), jnp.float32)
        return with_perturbations(network.init(key, images), zeros)

    def apply(
        variables: Variables,
        images: Array,
        train: bool = False,
        axis_name: AxisName = None,
        keys: Array | None = None,
    ) -> tuple[Array, ModelState]:
        own = without_perturbations(variables)
        logits, state = network.apply(own, images, train, axis_name, keys)
        return logits, {**state, **{k: v for k, v in variables.items() if k not in own}}

    return network._replace(init=init, apply=apply)


class Misled(NamedTuple):
    """What is learned from."""

    batch: Batch  # as it is
    images: Array  # [B, H, W, C], perturbed
    aims: Array  # [B] int32, the classes that they should be taken for


def perturbed(
    key: Key, image: Image, label: Array, perturbations: Array, *, scale: str = "one"
) -> tuple[Image, Array]:
    """The image with the perturbation of another class than its own added, and that class."""
    class_key, scale_key = jax.random.split(key)
    classes = len(perturbations)
    target = (label + jax.random.randint(class_key, (), 1, classes)) % classes
    size = jax.random.uniform(scale_key) if scale == "uniform" else 1.0
    return jnp.clip(image + size * perturbations[target], 0.0, 1.0), target


def rat(
    network: Network, *, clean_weight: float = 0.5, scale: Literal["one", "uniform"] = "one"
) -> Objective:
    """w CE(f(x), y) + (1 - w) CE(f(x + s v_t), y), t another class (RAT, arXiv:2008.07838).

    Each image draws its class t by its own key; w is `clean_weight`, and s is 1 or, with
    `scale="uniform"`, drawn from [0, 1). The perturbations v [K, H, W, C] are the entry of that
    name in the model state, and so no part of the compiled step; `attacks.universal.tup` makes
    them, and `carrying` gives them a place in a network's variables. Running averages see the
    perturbed images and then x.

    Reconstructed from the abstract and a summary: mixture, scale and classes are our defaults, no
    constant was published. One fixed perturbation per class is a weak adversary: do not expect
    robustness against attacks on single images, nor judge by the old perturbations alone.
    """
    within("clean_weight", clean_weight, 0.0, 1.0)
    one_of("scale", scale, ("one", "uniform"))
    network = carrying(network)

    def find(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName, step: Scalar | int,
    ) -> tuple[Misled, ModelState]:  # fmt: skip
        shape = (network.classes, *batch.image.shape[1:])
        held = model_state.get(_NAME)
        if held is None or held.shape != shape:
            there = "none" if held is None else f"those of shape {list(held.shape)}"
            raise UsageError(
                f"name='rat': expected perturbations {list(shape)} in the model state, there are "
                f"{there}: python -m experiments.rat makes them"
            )

        def change(key: Key, image: Image, label: Array) -> tuple[Image, Array]:
            return perturbed(key, image, label, held, scale=scale)

        keys = image_keys(key, batch.index)
        return Misled(batch, *jax.vmap(change)(keys, batch.image, batch.label)), model_state

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Misled, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch = found.batch
        misled = outer(network, params, model_state, key, batch, found.images, axis_name)
        clean = outer(network, params, misled.model_state, key, batch, batch.image, axis_name)
        natural = jax.vmap(cross_entropy)(clean.logits, batch.label)
        losses = jax.vmap(cross_entropy)(misled.logits, batch.label)
        metrics = {
            "correct": right(batch, clean.logits),
            "standing": right(batch, misled.logits),
            "hit": right(batch._replace(label=found.aims), misled.logits),
            "moved": moved(batch, found.images),
        }
        losses = clean_weight * natural + (1 - clean_weight) * losses
        return total(batch, losses), (clean.model_state, metrics)

    return Staged(find, learn)
