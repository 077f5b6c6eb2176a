"""Residual networks: ResNet, and its pre-activation form, of which Wide ResNets are one shape.

Convolutions have no bias and explicit padding (a pixel all round for 3x3, also at stride 2), as in
the original code, so that parameter counts are the standard ones. `remat` is what the backward pass
computes again instead of keeping it: "convolutions" keeps what they put out and computes
normalisation and activation again, for next to nothing; "blocks" keeps only what enters each
block, for one more forward pass; "none" keeps all. `modulation` is by a condition, see
`models.conditional`: "film" after each batch normalisation, "float" in the kernel of each
convolution.

`variant` is for published weights of the pre-activation form: the same arrays mean other functions.
"paper" normalises and activates before the average. "kuangliu" does not, as in
kuangliu/pytorch-cifar; "fast" does not either, and takes the shortcut's convolution of the block's
input as it is, as RobustBench has the networks of Fast is better than free (arXiv:2001.03994).
"deepmind" is "paper" with halving convolutions padded at the bottom and on the right alone, as in
DeepMind's networks (arXiv:2010.03593) and all that began with them.
"""

from typing import Literal

from rain_jax.checks import UsageError, one_of
from rain_jax.models import layers
from rain_jax.models.conditional import MODULATIONS, Modulation
from rain_jax.models.layers import Activation, Dtype, PerChannel
from rain_jax.models.network import network
from rain_jax.models.residual import (
    REMATS,
    BasicBlock,
    Block,
    Bottleneck,
    PreActBlock,
    Remat,
    ResNet,
)
from rain_jax.types import Network

Stem = Literal["cifar", "imagenet"]
Variant = Literal["paper", "kuangliu", "fast", "deepmind"]

_VARIANTS = ("paper", "kuangliu", "fast", "deepmind")


def resnet18(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    stem: Stem = "cifar",
    modulation: Modulation = "none",
) -> Network:
    """ResNet-18 (He et al., arXiv:1512.03385): 11,173,962 parameters for 10 classes.

    `stem` is a 3x3 convolution of stride 1, "cifar", or "imagenet": 7x7 of stride 2 and a 3x3
    maximum of stride 2.
    """
    return _resnet(
        classes,
        (2, 2, 2, 2),
        BasicBlock,
        stem,
        activation,
        dtype,
        remat,
        modulation,
        mean=mean,
        std=std,
    )


def resnet50(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    stem: Stem = "cifar",
    modulation: Modulation = "none",
) -> Network:
    """ResNet-50 (He et al., arXiv:1512.03385): 25,557,032 parameters for ImageNet.

    The stride is in the 3x3 convolution of a block, as is usual since ("version 1.5"). `stem` is as
    in `resnet18`: with 1000 classes you will want "imagenet".
    """
    return _resnet(
        classes,
        (3, 4, 6, 3),
        Bottleneck,
        stem,
        activation,
        dtype,
        remat,
        modulation,
        mean=mean,
        std=std,
    )


def preact_resnet(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    depths: tuple[int, ...] = (1, 1, 1),
    width: int = 16,
    modulation: Modulation = "none",
    variant: Variant = "paper",
) -> Network:
    """Pre-activation ResNet (He et al., arXiv:1603.05027) of any depth and width.

    `depths` are the numbers of blocks in each group; groups have `width`, 2 `width`, 4 `width` ...
    channels and all but the first halve the image. The default has 8 layers and is for CPUs.
    """
    depths = layers.counts("depths", depths)
    layers.count("width", width)
    widths = tuple(width * 2**group for group in range(len(depths)))
    return _preact_resnet(
        classes,
        width,
        widths,
        depths,
        activation,
        dtype,
        remat,
        modulation,
        variant,
        mean=mean,
        std=std,
    )


def preact_resnet18(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    modulation: Modulation = "none",
    variant: Variant = "paper",
) -> Network:
    """PreAct ResNet-18 (He et al., arXiv:1603.05027): 11,172,170 parameters for 10 classes.

    With the batch normalisation and activation before the average that the paper has, and robust
    training since Wong et al. (arXiv:2001.03994) and Rice et al. (arXiv:2002.11569); a widespread
    version without them has 11,171,146.
    """
    return preact_resnet(
        classes,
        mean=mean,
        std=std,
        activation=activation,
        dtype=dtype,
        remat=remat,
        depths=(2, 2, 2, 2),
        width=64,
        modulation=modulation,
        variant=variant,
    )


def wide_resnet(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    depth: int = 28,
    width: int = 10,
    modulation: Modulation = "none",
    variant: Variant = "paper",
) -> Network:
    """WRN-`depth`-`width` (Zagoruyko & Komodakis, arXiv:1605.07146), without dropout.

    A stem of 16 channels and three groups of 16, 32 and 64 times `width`; `depth` is 6n + 4 for n
    blocks in each.
    """
    layers.count("depth", depth)
    layers.count("width", width)
    if depth < 10 or depth % 6 != 4:
        lower = max(10, depth - (depth - 4) % 6)
        raise UsageError(
            f"depth={depth}: expected 6n + 4 for n blocks in each of three groups; did you mean "
            f"{lower} or {lower + 6}?"
        )
    return _preact_resnet(
        classes,
        16,
        (16 * width, 32 * width, 64 * width),
        3 * ((depth - 4) // 6,),
        activation,
        dtype,
        remat,
        modulation,
        variant,
        mean=mean,
        std=std,
    )


def wrn_28_10(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    modulation: Modulation = "none",
) -> Network:
    """WRN-28-10, see `wide_resnet`: 36,479,194 parameters for 10 classes."""
    return wide_resnet(
        classes,
        mean=mean,
        std=std,
        activation=activation,
        dtype=dtype,
        remat=remat,
        depth=28,
        width=10,
        modulation=modulation,
    )


def wrn_34_10(
    classes: int,
    *,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    activation: Activation = "relu",
    dtype: Dtype = "float32",
    remat: Remat = "none",
    modulation: Modulation = "none",
) -> Network:
    """WRN-34-10, see `wide_resnet`: 46,160,474 parameters for 10 classes."""
    return wide_resnet(
        classes,
        mean=mean,
        std=std,
        activation=activation,
        dtype=dtype,
        remat=remat,
        depth=34,
        width=10,
        modulation=modulation,
    )


def _resnet(
    classes: int,
    depths: tuple[int, ...],
    block: type[Block],
    stem: str,
    activation: str,
    dtype: str,
    remat: str,
    modulation: str,
    *,
    mean: PerChannel,
    std: PerChannel,
) -> Network:
    module = ResNet(
        classes,
        block,
        64,
        (64, 128, 256, 512),
        depths,
        layers.activation_function(activation),
        layers.compute_dtype(dtype),
        stem=one_of("stem", stem, ("cifar", "imagenet")),
        remat=one_of("remat", remat, REMATS),
        modulation=one_of("modulation", modulation, MODULATIONS),
    )
    return network(module, classes=classes, mean=mean, std=std)


def _preact_resnet(
    classes: int,
    stem_width: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    activation: str,
    dtype: str,
    remat: str,
    modulation: str,
    variant: str,
    *,
    mean: PerChannel,
    std: PerChannel,
) -> Network:
    module = ResNet(
        classes,
        PreActBlock,
        stem_width,
        widths,
        depths,
        layers.activation_function(activation),
        layers.compute_dtype(dtype),
        preact=True,
        variant=one_of("variant", variant, _VARIANTS),
        remat=one_of("remat", remat, REMATS),
        modulation=one_of("modulation", modulation, MODULATIONS),
    )
    return network(module, classes=classes, mean=mean, std=std)
