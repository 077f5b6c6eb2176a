"""The one door to Flax: linen modules become `Network`s of pure functions on plain dictionaries."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError

from rain_jax.checks import UsageError, within
from rain_jax.models.layers import PerChannel, count
from rain_jax.models.loop_safe import loop_safe
from rain_jax.types import Array, AxisName, Key, ModelState, Network, Variables


def network(
    module: nn.Module, *, classes: int, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> Network:
    """Wraps a linen module `module(images, train) -> logits [B, K]`.

    The module is given `(images - mean) / std` in float32, `mean` and `std` being one number or one
    per channel, in units of pixel values in [0, 1]. A module with batch normalisation has a field
    `axis_name` and hands it to `nn.BatchNorm`; the module itself is made with the field empty.

    `init(key, images)` looks at the shape of `images` [B, H, W, C] and not at their values, and
    returns plain dictionaries of float32 arrays. `apply(variables, images, train, axis_name)`
    returns float32 logits [B, K] and the variables beside the parameters: `{"batch_stats": ...}`,
    or `{}` for a network that has none. With `train=False` they come back as they were, and no
    image feels its neighbours. With `train=True` batch normalisation uses the statistics of
    `images`, over the mapped axes `axis_name` too (all their members count alike), and the running
    averages move. The axes may be of devices, of `vmap` or both:

        jax.vmap(lambda image: apply(variables, image[None], True, "image")[0][0],
                 axis_name="image")(images)

    equals the batched `apply(variables, images, True)[0]`. A gradient taken inside such a map is
    that of the sum of the losses over the whole axis, since an image moves its neighbours' logits.
    """
    count("classes", classes, 2)
    within("mean", mean)
    within("std", std, above=0.0)
    # NumPy, so that making a network touches no device: it may come before jax.distributed.
    shift, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if shift.ndim > 1 or scale.ndim > 1:
        raise UsageError(f"mean={mean!r}, std={std!r}: expected a number or one per channel")

    def normalise(images: Array) -> Array:
        if images.ndim != 4:
            raise UsageError(f"images are {list(images.shape)}: expected [B, H, W, C]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UsageError(f"images are {images.dtype}: expected floats in [0, 1]")
        for name, value in ("mean", shift), ("std", scale):
            if value.ndim and value.size != images.shape[-1]:
                raise UsageError(
                    f"{name} has {value.size} values: expected one, or one for each of the "
                    f"{images.shape[-1]} channels of images {list(images.shape)}"
                )
        images = images.astype(jnp.float32)
        return (images - shift.reshape(1, 1, 1, -1)) / scale.reshape(1, 1, 1, -1)

    @loop_safe
    def evaluated(variables: Variables, inputs: Array) -> Array:
        logits: Any = module.apply(variables, inputs, train=False)
        return logits.astype(jnp.float32)

    @functools.cache
    def trained(axis_name: AxisName) -> Callable[[Variables, Array], tuple[Array, ModelState]]:
        def forward(variables: Variables, inputs: Array) -> tuple[Array, ModelState]:
            state = [name for name in variables if name != "params"]
            synchronised = _over(axis_name, module, state)
            logits, moved = synchronised.apply(variables, inputs, train=True, mutable=state)
            return logits.astype(jnp.float32), moved

        return loop_safe(forward)

    @jax.jit  # one compiled program, in which the forward pass that names the shapes is dead code
    def init(key: Key, images: Array) -> Variables:
        return dict(module.init(key, normalise(images), train=False))

    def apply(
        variables: Variables,
        images: Array,
        train: bool = False,
        axis_name: AxisName = None,
        keys: Array | None = None,
    ) -> tuple[Array, ModelState]:
        state = {name: value for name, value in variables.items() if name != "params"}
        inputs = normalise(images)
        try:
            if not train:
                return evaluated(variables, inputs), state
            logits, moved = trained(axis_name)(variables, inputs)
        except ScopeParamShapeError as error:
            raise UsageError(
                f"images {list(images.shape)} do not fit these variables, which were made for "
                "images of another size or number of channels"
            ) from error
        return logits, {**state, **moved}

    return Network(init, apply, classes)


def _over(axis_name: AxisName, module: nn.Module, state: Sequence[str]) -> Any:
    """The module with its batch statistics taken over `axis_name`."""
    if axis_name is None:
        return module
    if hasattr(module, "axis_name"):
        return module.clone(axis_name=axis_name)
    if state:
        raise UsageError(
            f"axis_name={axis_name!r}: {type(module).__name__} has no field of that name to take "
            "its batch statistics over"
        )
    return module
