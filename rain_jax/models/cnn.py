"""Small convolutional networks for 28x28 digits, and for images near that size."""

from collections.abc import Callable
from itertools import count
from typing import Any, Literal, NamedTuple

from flax import linen as nn

from rain_jax.checks import UsageError, one_of
from rain_jax.models import layers
from rain_jax.models.conditional import MODULATIONS, Modulation, modulated
from rain_jax.models.layers import Activation, Dtype, PerChannel
from rain_jax.models.network import network
from rain_jax.types import Array, AxisName, Network


def cnn(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    widths: tuple[int, ...] = (16, 32),
    hidden: int = 100,
    batch_norm: bool = False,
    modulation: Modulation = "none",
) -> Network:
    """4x4 convolutions of stride 2, one for each of `widths`, and a dense layer of `hidden`.

    With its defaults the network of Fast is better than free (Wong et al., arXiv:2001.03994) for
    MNIST, 166,406 parameters at 28x28x1, known as CNN-A or `conv_small` in verification. Images
    are at least 2^len(widths) pixels a side.

    `modulation` is by a condition, see `models.conditional`: "film" after each batch normalisation,
    which must be there then, "float" in the kernel of each convolution.
    """
    if one_of("modulation", modulation, MODULATIONS) == "film" and not batch_norm:
        raise UsageError("modulation='film': expected batch_norm=True, which it comes after")
    widths = layers.counts("widths", widths)
    layers.count("hidden", hidden)
    one_pixel = ((1, 1), (1, 1))
    return _cnn(
        classes,
        [_Stage(width, 4, stride=2, padding=one_pixel) for width in widths],
        (hidden,),
        activation,
        dtype,
        mean,
        std,
        batch_norm=batch_norm,
        modulation=modulation,
    )


def small_cnn(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    padding: Literal["VALID", "SAME"] = "VALID",
) -> Network:
    """Twice two 3x3 convolutions (32, then 64) and a 2x2 maximum; dense layers of 200 and 200.

    The SmallCNN of TRADES (Zhang et al., arXiv:1901.08573), 312,202 parameters at 28x28x1, without
    its dropout (here a network is a function of its image) and its last layer begun at zero (whose
    first gradients towards the image vanish, and with them the first attacks). Images are at least
    16 pixels a side, or 4 with `padding="SAME"`.
    """
    one_of("padding", padding, ("VALID", "SAME"))
    stages = [
        _Stage(32, 3, padding=padding),
        _Stage(32, 3, padding=padding, pool=True),
        _Stage(64, 3, padding=padding),
        _Stage(64, 3, padding=padding, pool=True),
    ]
    return _cnn(classes, stages, (200, 200), activation, dtype, mean, std)


def madry_cnn(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
) -> Network:
    """Twice a 5x5 convolution (32, then 64) and a 2x2 maximum; a dense layer of 1024.

    The MNIST network of Madry et al. (arXiv:1706.06083), 3,274,634 parameters at 28x28x1. Images
    are at least 4 pixels a side.
    """
    stages = [_Stage(32, 5, pool=True), _Stage(64, 5, pool=True)]
    return _cnn(classes, stages, (1024,), activation, dtype, mean, std)


class _Stage(NamedTuple):
    """A convolution, and whether a 2x2 maximum follows it."""

    features: int
    size: int
    stride: int = 1
    padding: Literal["SAME", "VALID"] | tuple[tuple[int, int], ...] = "SAME"
    pool: bool = False

    def pixels_out(self, pixels: int) -> int:
        """How many pixels a side are left of `pixels`."""
        if self.padding == "SAME":
            pixels = -(-pixels // self.stride)
        else:
            around = 0 if self.padding == "VALID" else sum(self.padding[0])
            pixels = (pixels + around - self.size) // self.stride + 1
        return max(pixels // 2 if self.pool else pixels, 0)


class _CNN(nn.Module):
    """Convolutions, dense layers of the widths `hidden`, and the classifier."""

    classes: int
    stages: tuple[_Stage, ...]
    hidden: tuple[int, ...]
    activation: Callable[[Array], Array]
    dtype: Any
    batch_norm: bool = False
    modulation: str = "none"
    axis_name: AxisName = None

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        _check_size(self.stages, images.shape[1:3])
        norm, conv = modulated(
            self,
            self.modulation,
            layers.batch_norm(train, self.axis_name, self.dtype),
            layers.Conv,
        )
        he_normal = nn.initializers.he_normal()
        x = images
        for place, stage in enumerate(self.stages, 1):
            x = conv(
                stage.features,
                (stage.size, stage.size),
                strides=stage.stride,
                padding=stage.padding,
                use_bias=not self.batch_norm,  # batch normalisation would take it away again
                kernel_init=he_normal,
                dtype=self.dtype,
                name=f"conv{place}",
            )(x)
            if self.batch_norm:
                x = norm(name=f"norm{place}")(x)
            x = self.activation(x)
            if stage.pool:
                x = layers.max_pool_2x2(x)
        x = x.reshape(x.shape[0], -1)
        for place, width in enumerate(self.hidden, 1):
            dense = nn.Dense(width, kernel_init=he_normal, dtype=self.dtype, name=f"dense{place}")
            x = self.activation(dense(x))
        return layers.classify(x, self.classes)


def _check_size(stages: tuple[_Stage, ...], size: tuple[int, ...]) -> None:
    def left(pixels: int) -> int:
        for stage in stages:
            pixels = stage.pixels_out(pixels)
        return pixels

    if min(map(left, size)) < 1:
        smallest = next(pixels for pixels in count(1) if left(pixels) >= 1)
        hint = " (or padding='SAME')" if any(s.padding == "VALID" for s in stages) else ""
        raise UsageError(
            f"images are {size[0]}x{size[1]}: this network needs at least "
            f"{smallest}x{smallest}{hint}"
        )


def _cnn(
    classes: int,
    stages: list[_Stage],
    hidden: tuple[int, ...],
    activation: str,
    dtype: str,
    mean: PerChannel,
    std: PerChannel,
    *,
    batch_norm: bool = False,
    modulation: str = "none",
) -> Network:
    module = _CNN(
        classes,
        tuple(stages),
        hidden,
        layers.activation_function(activation),
        layers.compute_dtype(dtype),
        batch_norm,
        modulation,
    )
    return network(module, classes=classes, mean=mean, std=std)
