"""The layers that all networks here share, and the plain values that choose them.

Parameters and batch statistics are float32; `dtype` is what convolutions and hidden layers compute
in. Batch normalisation works in float32 inside, and the last layer altogether, so that logits do
not lose what a bfloat16 network still knows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from rain_jax.checks import UsageError, one_of
from rain_jax.models.conv import conv_general_dilated
from rain_jax.types import Array, AxisName

Activation = Literal["relu", "silu", "gelu", "softplus"]
Dtype = Literal["float32", "bfloat16"]
PerChannel = float | tuple[float, ...]  # one number for all channels, or one for each

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "softplus": jax.nn.softplus,
}
_DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Conv = partial(
    nn.Conv,
    use_bias=False,
    conv_general_dilated=conv_general_dilated,
    # Kaiming normal over the fan-out, as residual networks are trained from (He et al.,
    # arXiv:1502.01852; Zagoruyko & Komodakis, arXiv:1605.07146).
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)
"""A loop-safe convolution without bias: `Conv(features, (h, w), strides=..., padding=...)`."""


def batch_norm(train: bool, axis_name: AxisName, dtype: Any) -> Callable[..., nn.BatchNorm]:
    """Makes batch normalisation layers: momentum 0.9, epsilon 1e-5, float32 inside.

    With `train` it normalises by the images at hand, over `axis_name` too, and moves the running
    averages towards them by a tenth (the variance as it is, without the n / (n - 1)).
    """
    names: Any = axis_name  # Flax says `str`, and hands what it gets to `lax.pmean`
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=names,
        dtype=dtype,
    )


def activation_function(name: str) -> Callable[[Array], Array]:
    """The elementwise function of that name; `gelu` is the exact one, with erf."""
    return _ACTIVATIONS[one_of("activation", name, _ACTIVATIONS)]


def compute_dtype(name: str) -> Any:
    """The dtype of that name, for convolutions and hidden layers."""
    return _DTYPES[one_of("dtype", name, _DTYPES)]


def counts(where: str, values: Any, *, length: int | None = None) -> tuple[int, ...]:
    """Returns `values` as a tuple of whole numbers >= 1, or says what was wrong."""
    whole = isinstance(values, tuple | list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values
    )
    if not whole or not values or (length is not None and len(values) != length):
        many = "" if length is None else f"{length} "
        raise UsageError(f"{where}={values!r}: expected a tuple of {many}whole numbers >= 1")
    return tuple(values)


def count(where: str, value: Any, low: int = 1) -> int:
    """Returns `value` if it is a whole number >= `low`, or says what was wrong."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f"{where}={value!r}: expected a whole number >= {low}")
    return value


def classify(features: Array, classes: int) -> Array:
    """The last layer: features [B, F] to logits [B, K], in float32 (see the module's docstring)."""
    return nn.Dense(classes, dtype=jnp.float32, name="classifier")(features)


def global_average(maps: Array) -> Array:
    """Feature maps [B, H, W, C] to their means [B, C] in float32."""
    return jnp.mean(maps, axis=(1, 2), dtype=jnp.float32)


def max_pool_2x2(maps: Array) -> Array:
    """The maximum of each 2x2 window: [B, H, W, C] -> [B, H // 2, W // 2, C], odd edges left out.

    The values and gradients of `flax.linen.max_pool(maps, (2, 2), strides=(2, 2))`, bit for bit: of
    equal pixels the first, row by row, is the maximum. The gradient there is a select-and-scatter,
    which is slow on XLA:CPU.
    """
    batch, height, width, channels = maps.shape
    rows, columns = height // 2, width // 2
    windows = maps[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)

    def first(one: Array, other: Array) -> Array:
        return jnp.where(one >= other, one, other)

    upper, lower = (first(windows[:, :, i, :, 0], windows[:, :, i, :, 1]) for i in (0, 1))
    return first(upper, lower)
