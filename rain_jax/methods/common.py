"""What training methods share: their two stages, the outer forward pass, attacks inside a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, one_of, within
from rain_jax.losses import smooth, soft_cross_entropy
from rain_jax.methods.mixing import Mix, mixed
from rain_jax.parallel import image_keys
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Batch,
    Image,
    Iteration,
    Key,
    LogitsFn,
    Metrics,
    ModelState,
    Network,
    Params,
    PyTree,
    Scalar,
)

BatchNorm = Literal["eval", "batch", "train"]
_IMAGE_AXIS = "image"
# Folded into a step's key where a network draws outside the attack. No image has this index, so
# the attack, whose keys come from the indices, never shares a draw with it.
_OUTSIDE = 2**31 - 1


Find = Callable[[Params, ModelState, Key, Batch, AxisName, Scalar | int], tuple[PyTree, ModelState]]
Learn = Callable[
    [Params, ModelState, Key, PyTree, AxisName], tuple[Scalar, tuple[ModelState, Metrics]]
]


# Not a NamedTuple: `jit` keeps a weak reference to what it compiles, and a tuple has none.
@dataclass(frozen=True, eq=False)
class Staged:
    """An `Objective` in its two stages, so that others may step in between (see `awp`).

    `find(params, model_state, key, batch, axis_name, step) -> (found, model_state)` gets what is
    learned from, by attacks for example, and no gradient goes through it.
    `learn(params, model_state, key, found, axis_name) -> (loss, (model_state, metrics))` is the
    loss on that, as a sum over this device's valid images.
    """

    find: Find
    learn: Learn

    def __call__(
        self, params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName = None, step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:  # fmt: skip
        found, model_state = self.find(params, model_state, key, batch, axis_name, step)
        return self.learn(params, model_state, key, found, axis_name)


class Found(NamedTuple):
    """What most methods learn from."""

    batch: Batch  # the images before the attack: mixed, where the method mixes
    images: Array  # [B, H, W, C], after it
    targets: Array  # [B, K], probabilities


class Outer(NamedTuple):
    """The forward pass that training learns from."""

    logits: Array  # [B, K]
    model_state: ModelState


def outer(
    network: Network,
    params: Params,
    model_state: ModelState,
    key: Key,
    batch: Batch,
    images: Array,
    axis_name: AxisName,
) -> Outer:
    """Logits of `images` in training mode, and the new state.

    `key` is that of the step: a random network draws from it, image by image.
    """
    logits, model_state = network.apply(
        {"params": params, **model_state},
        images,
        train=True,
        axis_name=axis_name,
        keys=_draws(network, key, batch),
    )
    return Outer(logits, model_state)


def targets(network: Network, batch: Batch, label_smoothing: float) -> Array:
    """The labels as probabilities [B, K]."""
    return jax.vmap(lambda label: smooth(label, network.classes, label_smoothing))(batch.label)


def total(batch: Batch, values: Array) -> Scalar:
    """The sum of `values` [B] over the valid images."""
    return jnp.sum(jnp.where(batch.valid, values, 0.0))


def right(batch: Batch, logits: Array) -> Scalar:
    """How many of the valid images `logits` [B, K] get right."""
    return jnp.sum((batch.valid & (jnp.argmax(logits, -1) == batch.label)) * 1.0)


def moved(batch: Batch, images: Array) -> Scalar:
    """The sum over the valid images of their largest change in a pixel value."""
    return total(batch, jnp.max(jnp.abs(images - batch.image), axis=(1, 2, 3)))


def _draws(network: Network, key: Key, batch: Batch) -> Array | None:
    """Keys [B] for a random network's own draws on a batch."""
    if not network.random:
        return None
    return image_keys(jax.random.fold_in(key, _OUTSIDE), batch.index)


def finder(
    network: Network,
    attack: Attack | None,
    *,
    batch_norm: BatchNorm = "eval",
    label_smoothing: float = 0.0,
    mix: Mix = "none",
    mix_alpha: float = 1.0,
) -> Find:
    """The first stage of most methods: mixes, then attacks, where asked to; finds a `Found`.

    The attack is given one label, that of the larger share of a mixture.
    """
    one_of("batch_norm", batch_norm, ("eval", "batch", "train"))
    within("label_smoothing", label_smoothing, 0.0, below=1.0)
    one_of("mix", mix, ("none", "mixup", "cutmix"))
    within("mix_alpha", mix_alpha, above=0.0)

    def find(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName, step: Scalar | int,
    ) -> tuple[Found, ModelState]:  # fmt: skip
        probabilities = targets(network, batch, label_smoothing)
        if mix != "none":
            batch, probabilities = mixed(key, batch, probabilities, kind=mix, alpha=mix_alpha)
        if attack is None:
            return Found(batch, batch.image, probabilities), model_state
        images, model_state = attack_batch(
            network, attack, params, model_state, key, batch,
            batch_norm=batch_norm, axis_name=axis_name,
        )  # fmt: skip
        return Found(batch, images, probabilities), model_state

    return find


def fit(network: Network) -> Learn:
    """The second stage of adversarial training: cross-entropy on the images found."""

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Found, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch = found.batch
        seen = outer(network, params, model_state, key, batch, found.images, axis_name)
        losses = jax.vmap(soft_cross_entropy)(seen.logits, found.targets)
        metrics = {"correct": right(batch, seen.logits), "moved": moved(batch, found.images)}
        return total(batch, losses), (seen.model_state, metrics)

    return learn


@jax.custom_vjp
def _given(image: Image, logits: Array, pull: PyTree) -> Array:
    """The logits [K] of an image, with the gradient that `pull` makes of theirs."""
    return logits


def _give(image: Image, logits: Array, pull: PyTree) -> tuple[Array, PyTree]:
    return logits, pull


def _pull(pull: PyTree, cotangent: Array) -> tuple[Image, None, None]:
    return *pull(cotangent), None, None


_given.defvjp(_give, _pull)


def attack_batch(
    network: Network,
    attack: Attack,
    params: Params,
    model_state: ModelState,
    key: Key,
    batch: Batch,
    *,
    batch_norm: BatchNorm = "eval",
    axis_name: AxisName = None,
) -> tuple[Array, ModelState]:
    """Adversarial images [B, H, W, C] against the current weights, and the model state after.

    Where `attack` returns more than an image, so does this, for each image.
    `batch_norm` says what batch normalisation does inside the attack. Published recipes differ
    in this, and it matters for the numbers:
    - "eval": running averages (TRADES, MART, AWP, SENSE, Pang et al.). Images stay independent.
    - "batch": statistics of the attacked batch over all devices, running averages untouched
      (Gowal et al., Rebuffi et al., Wang et al.).
    - "train": the same, and the running averages follow the images that the attack visits
      (Madry et al., Rice et al., Wong et al.). One forward pass more in each step, but for attacks
      that ask `once` in one, on networks that do not draw.
    """
    one_of("batch_norm", batch_norm, ("eval", "batch", "train"))
    # No gradient reaches the weights through the attack, nor is one computed.
    params, model_state = jax.lax.stop_gradient((params, model_state))
    keys = image_keys(key, batch.index)
    train = batch_norm != "eval"
    across = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name

    def passed(state: ModelState, key: Key, image: Array) -> tuple[Array, ModelState]:
        # One image at a time, yet normalised over all of them: the batch is a named axis.
        axis = (_IMAGE_AXIS, *across) if train else None
        variables = {"params": params, **state}
        return network.apply(variables, image[None], train=train, axis_name=axis, keys=key[None])

    def logits_fn_with(state: ModelState) -> LogitsFn:
        return lambda key, image: passed(state, key, image)[0][0]

    if batch_norm != "train":
        logits_fn = logits_fn_with(model_state)
        run = jax.vmap(lambda k, i, y: attack(k, logits_fn, i, y), axis_name=_IMAGE_AXIS)
        return jax.lax.stop_gradient(run(keys, batch.image, batch.label)), model_state

    if not (isinstance(attack, Iteration) and attack.steps):
        raise UsageError("batch_norm='train': expected an attack made of steps (an Iteration)")

    def per_image(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return jax.vmap(function, axis_name=_IMAGE_AXIS)

    def step(carry: tuple[PyTree, PyTree], number: Array) -> tuple[tuple[PyTree, PyTree], None]:
        states, model_state = carry
        if states.image.shape != batch.image.shape:
            raise UsageError("batch_norm='train': expected an attack with restarts=1")
        # A random network's draw in the attack is the attack's own, so it cannot be given.
        if attack.once and not network.random:
            return with_one_pass(states, model_state), None
        draws = _draws(network, jax.random.fold_in(key, _OUTSIDE - 1 - number), batch)
        _, after = network.apply(
            {"params": params, **model_state}, states.image,
            train=True, axis_name=axis_name, keys=draws,
        )  # fmt: skip
        logits_fn = logits_fn_with(model_state)
        return (per_image(lambda state: attack.step(logits_fn, state))(states), after), None

    def with_one_pass(states: PyTree, model_state: ModelState) -> tuple[PyTree, ModelState]:
        """A step, and the averages that the forward pass of its gradient left."""

        def one(state: PyTree, key: Key) -> tuple[PyTree, ModelState]:
            def alone(image: Image) -> tuple[Array, ModelState]:
                logits, after = passed(model_state, key, image)
                return logits[0], after

            logits, pull, after = jax.vjp(alone, state.image, has_aux=True)
            return attack.step(lambda key, image: _given(image, logits, pull), state), after

        return jax.vmap(one, axis_name=_IMAGE_AXIS, out_axes=(0, None))(states, keys)

    logits_fn = logits_fn_with(model_state)
    start = per_image(lambda k, i, y: attack.init(k, logits_fn, i, y))
    states: PyTree = start(keys, batch.image, batch.label)
    numbers = jnp.arange(attack.steps)
    (states, model_state), _ = jax.lax.scan(step, (states, model_state), numbers)
    logits_fn = logits_fn_with(model_state)
    found = per_image(lambda state: attack.best(logits_fn, state)[0])(states)
    return jax.lax.stop_gradient(found), model_state
