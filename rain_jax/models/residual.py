"""Blocks of residual networks and the network that they make up; `resnet` has the named ones."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rain_jax.models import layers
from rain_jax.models.conditional import modulated
from rain_jax.types import Array, AxisName

Remat = Literal["none", "convolutions", "blocks"]

_CONVOLUTION = "convolution"

REMATS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "convolutions": jax.checkpoint_policies.save_only_these_names(_CONVOLUTION),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
"""What a block keeps for its backward pass, beside what enters it; None: all that it needs."""


class Block(nn.Module):
    """What every residual block is given: `conv`, `norm` and `activation` make its layers."""

    width: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    activation: Callable[[Array], Array]
    variant: str = "paper"

    def conv3x3(self, x: Array, stride: int, name: str) -> Array:
        pad = ((0, 1), (0, 1)) if self.variant == "deepmind" and stride == 2 else ((1, 1), (1, 1))
        conv = self.conv(self.width, (3, 3), strides=stride, padding=pad, name=name)
        return checkpoint_name(conv(x), _CONVOLUTION)

    def conv1x1(self, x: Array, width: int, stride: int, name: str) -> Array:
        conv = self.conv(width, (1, 1), strides=stride, padding="VALID", name=name)
        return checkpoint_name(conv(x), _CONVOLUTION)


class BasicBlock(Block):
    """Two 3x3 convolutions, each normalised, and the activation after the sum."""

    expansion = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.norm(name="norm1")(self.conv3x3(x, self.stride, "conv1"))
        y = self.norm(name="norm2")(self.conv3x3(self.activation(y), 1, "conv2"))
        if y.shape != x.shape:
            x = self.conv1x1(x, self.width, self.stride, "shortcut")
            x = self.norm(name="shortcut_norm")(x)
        return self.activation(x + y)


class Bottleneck(Block):
    """1x1 down to `width`, 3x3, 1x1 up to four times `width`; the activation after the sum."""

    expansion = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = self.expansion * self.width
        y = self.norm(name="norm1")(self.conv1x1(x, self.width, 1, "conv1"))
        y = self.norm(name="norm2")(self.conv3x3(self.activation(y), self.stride, "conv2"))
        y = self.norm(name="norm3")(self.conv1x1(self.activation(y), wide, 1, "conv3"))
        if y.shape != x.shape:
            x = self.conv1x1(x, wide, self.stride, "shortcut")
            x = self.norm(name="shortcut_norm")(x)
        return self.activation(x + y)


class PreActBlock(Block):
    """Normalise, activate, convolve, twice.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, or of the
    input itself in the variant "fast".
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ready = self.activation(self.norm(name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            seen = x if self.variant == "fast" else ready
            x = self.conv1x1(seen, self.width, self.stride, "shortcut")
        y = self.norm(name="norm2")(self.conv3x3(ready, self.stride, "conv1"))
        return x + self.conv3x3(self.activation(y), 1, "conv2")


class ResNet(nn.Module):
    """A stem, groups of blocks, their average over the image, and the classifier.

    `widths` and `depths` are the channels and numbers of the blocks in each group. With `preact`
    normalisation and activation come before the average instead of after the stem.
    """

    classes: int
    block: Any
    stem_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    activation: Callable[[Array], Array]
    dtype: Any
    stem: str = "cifar"
    preact: bool = False
    variant: str = "paper"
    remat: str = "none"
    modulation: str = "none"
    axis_name: AxisName = None

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        norm, conv = modulated(
            self,
            self.modulation,
            layers.batch_norm(train, self.axis_name, self.dtype),
            partial(layers.Conv, dtype=self.dtype),
        )
        again = REMATS[self.remat]
        block = self.block if again is None else nn.remat(self.block, policy=again)

        size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        pad = 2 * ((size // 2, size // 2),)
        x = conv(self.stem_width, (size, size), strides=stride, padding=pad, name="stem")(images)
        if not self.preact:
            x = self.activation(norm(name="stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for group, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True), 1):
            for place in range(1, depth + 1):
                stride = 2 if group > 1 and place == 1 else 1
                # Named here, since `nn.remat` would otherwise name its blocks differently.
                name = f"group{group}_block{place}"
                x = block(width, stride, conv, norm, self.activation, self.variant, name=name)(x)
        if self.preact and self.variant in ("paper", "deepmind"):
            x = self.activation(norm(name="last_norm")(x))
        return layers.classify(layers.global_average(x), self.classes)
