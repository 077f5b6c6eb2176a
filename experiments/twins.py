"""PyTorch twins: the same functions as networks and defences of ours, written a second time.

What other libraries attack (`peers`) and what ours is measured beside (`benchmark`). A twin takes
the weights of ours, is in evaluation mode, and its own are frozen, so that nobody spends time on
their gradients. Images are [B, C, H, W] in [0, 1].
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rain_jax.checks import UsageError, one_of
from rain_jax.models.edsr import DIV2K_MEAN, LEVELS
from rain_jax.types import Variables

Activation = Callable[[], nn.Module]

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus}


def twin(network: Mapping[str, Any], variables: Variables) -> nn.Module:
    """The PyTorch twin of a network of ours: images [B, C, H, W] in [0, 1] to logits [B, K].

    `network` is the config's section, one of `_CNNS` or `_BLOCKS`; `variables` are parameters and
    running averages. The twin normalises inside, is in evaluation mode, and its weights are frozen,
    so that no attack spends time on their gradients.
    """
    name = one_of("network.name", network["name"], (*_CNNS, *_BLOCKS))
    usual = dict(dtype="float32", stem="cifar", variant="paper", padding="VALID")
    for option, known in usual.items():
        if network.get(option, known) != known:
            raise UsageError(f"network.{option}={network[option]!r}: expected {known} for a twin")
    weights = _Weights(variables["params"], variables.get("batch_stats", {}))
    activation = _ACTIVATIONS[network.get("activation", "relu")]
    made = _CNNS.get(name)
    layers = made(weights, activation) if made else _resnet(weights, activation, name)
    whole = _Whole(network.get("mean", 0.0), network.get("std", 1.0), layers)
    return whole.eval().requires_grad_(False)


class _Whole(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Any, std: Any, layers: list[nn.Module]):
        super().__init__()
        for name, value in ("mean", mean), ("std", std):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - self.mean) / self.std)


class _Weights(NamedTuple):
    """Part of our variables, from which layers are made by name."""

    params: Mapping[str, Any]
    stats: Mapping[str, Any]

    def inside(self, name: str) -> "_Weights":
        return _Weights(self.params[name], self.stats.get(name, {}))

    def layer(self, name: str, stride: int = 1, valid: bool = False) -> nn.Module:
        """The batch normalisation, dense layer or convolution that these arrays belong to.

        A `valid` convolution has no padding.
        """
        params, stats = self.inside(name)
        tensors = {k: torch.tensor(np.asarray(v)) for k, v in {**params, **stats}.items()}
        made: nn.Module
        if "scale" in tensors:
            made = nn.BatchNorm2d(len(tensors["scale"]), eps=1e-5)
            named = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
            tensors |= {theirs: tensors.pop(ours) for theirs, ours in named.items()}
        else:
            kernel = tensors.pop("kernel")
            if kernel.ndim == 2:
                made = nn.Linear(*kernel.shape)
                tensors["weight"] = kernel.T
            else:
                # Ours name the pixels around: as many on all sides, one for 3x3 and for 4x4.
                size, _, ins, outs = kernel.shape
                around = 0 if valid else (size - 1) // 2
                made = nn.Conv2d(ins, outs, size, stride, around, bias="bias" in tensors)
                tensors["weight"] = kernel.permute(3, 2, 0, 1)
        made.load_state_dict({**made.state_dict(), **tensors})
        return made


class _Flatten(nn.Module):
    """[B, C, H, W] to [B, H W C], channels last, as our dense layers expect them."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)


def _cnn(weights: _Weights, activation: Activation) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for place in range(1, 1 + sum(name.startswith("conv") for name in weights.params)):
        layers.append(weights.layer(f"conv{place}", stride=2))
        if f"norm{place}" in weights.params:
            layers.append(weights.layer(f"norm{place}"))
        layers.append(activation())
    return layers + _dense(weights, activation, 1)


def _small_cnn(weights: _Weights, activation: Activation) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for place in range(1, 5):
        layers += [weights.layer(f"conv{place}", valid=True), activation()]
        layers += [nn.MaxPool2d(2)] if place in (2, 4) else []
    return layers + _dense(weights, activation, 2)


def _dense(weights: _Weights, activation: Activation, count: int) -> list[nn.Module]:
    hidden = [(weights.layer(f"dense{place + 1}"), activation()) for place in range(count)]
    return [_Flatten(), *(layer for pair in hidden for layer in pair), weights.layer("classifier")]


_CNNS = {"cnn": _cnn, "small_cnn": _small_cnn}


class _Block(nn.Module):
    """Two 3x3 convolutions, around which `_Basic` and `_Preact` differ, and the shortcut."""

    def __init__(self, weights: _Weights, stride: int, activation: Activation):
        super().__init__()
        self.activation = activation()
        self.conv1, self.norm1 = weights.layer("conv1", stride), weights.layer("norm1")
        self.conv2, self.norm2 = weights.layer("conv2"), weights.layer("norm2")
        layers = [weights.layer("shortcut", stride)] if "shortcut" in weights.params else []
        layers += [weights.layer("shortcut_norm")] if "shortcut_norm" in weights.params else []
        self.shortcut = nn.Sequential(*layers)


class _Basic(_Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(self.shortcut(x) + y)


class _Preact(_Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready = self.activation(self.norm1(x))
        y = self.conv2(self.activation(self.norm2(self.conv1(ready))))
        return (self.shortcut(ready) if len(self.shortcut) else x) + y


_BLOCKS = {
    "preact_resnet": _Preact, "preact_resnet18": _Preact, "resnet18": _Basic,
    "wide_resnet": _Preact, "wrn_28_10": _Preact, "wrn_34_10": _Preact,
}  # fmt: skip


def _resnet(weights: _Weights, activation: Activation, name: str) -> list[nn.Module]:
    def normalised(which: str) -> list[nn.Module]:
        return [weights.layer(which), activation()] if which in weights.params else []

    layers = [weights.layer("stem"), *normalised("stem_norm")]
    places = [re.fullmatch(r"group(\d+)_block(\d+)", key) for key in weights.params]
    for group, place in sorted((int(p[1]), int(p[2])) for p in places if p):
        stride = 2 if group > 1 and place == 1 else 1
        block = weights.inside(f"group{group}_block{place}")
        layers.append(_BLOCKS[name](block, stride, activation))
    average = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [*layers, *normalised("last_norm"), *average, weights.layer("classifier")]


SHIFTS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""The moves (rows, columns) of `Shifted`, each as likely as the others."""


class Shifted(nn.Module):
    """A random model: each image is rolled by one of `SHIFTS`, drawn anew for every forward pass.

    Images [B, C, H, W]. The draws come from PyTorch's global generator, which `run` seeds.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(len(SHIFTS), (len(images), 1, 1, 1), device=images.device)
        # All moves under a mask: gathering would cost more in the backward pass.
        rolled = [torch.roll(images, shift, dims=(2, 3)) for shift in SHIFTS]
        return self.model(sum(moved * (drawn == place) for place, moved in enumerate(rolled)))


def edsr(
    variables: Variables, *, residual_scale: float = 1.0, mean: tuple[float, ...] = DIV2K_MEAN
) -> nn.Module:
    """The twin of `upscalers.edsr`, which is the authors' network: [B, C, h, w] to twice the size.

    It calculates as sanghyun-son/EDSR-PyTorch does, and its state dictionary has the names that
    are published.
    """
    weights = _Weights(variables["params"], {})
    return _EDSR(weights, residual_scale, mean).eval().requires_grad_(False)


class _EDSR(nn.Module):
    def __init__(self, weights: _Weights, residual_scale: float, mean: tuple[float, ...]):
        super().__init__()
        blocks = sum(name.startswith("block_") for name in weights.params)
        residual = [
            _Residual(weights.inside(f"block_{number}"), residual_scale) for number in range(blocks)
        ]
        self.sub_mean, self.add_mean = _colour_shift(mean, -LEVELS), _colour_shift(mean, LEVELS)
        self.head = nn.Sequential(weights.layer("head"))
        self.body = nn.Sequential(*residual, weights.layer("body"))
        enlarge = nn.Sequential(weights.layer("enlarge"), nn.PixelShuffle(2))
        self.tail = nn.Sequential(enlarge, weights.layer("tail"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        head = self.head(self.sub_mean(LEVELS * images))
        return self.add_mean(self.tail(self.body(head) + head)) / LEVELS


class _Residual(nn.Module):
    def __init__(self, weights: _Weights, scale: float):
        super().__init__()
        self.scale = scale
        self.body = nn.Sequential(
            weights.layer("first"), nn.ReLU(inplace=True), weights.layer("second")
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.scale * self.body(maps)


def _colour_shift(mean: tuple[float, ...], times: float) -> nn.Conv2d:
    """A 1x1 convolution that adds `times` the mean colour, as the authors have it."""
    colour = torch.tensor(mean, dtype=torch.float32)
    shift = nn.Conv2d(len(mean), len(mean), 1)
    shift.load_state_dict(
        {"weight": torch.eye(len(mean)).reshape(*shift.weight.shape), "bias": times * colour}
    )
    return shift


class Rain(nn.Module):
    """The twin of `defences.rain` around a network that doubles the size.

    As in the authors' code (dydjw9/RAIN), whose draws come from PyTorch's global generator and
    whose shift is one for the whole batch.
    """

    def __init__(self, upscaler: nn.Module, reach: float = 0.05):
        super().__init__()
        self.upscaler, self.reach = upscaler, reach

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        most = int(self.reach * (images.shape[2] // 2))
        move = torch.randint(-most, most + 1, (2,)).tolist()
        return self.drawn(images, torch.randn_like(images), move)

    def drawn(self, images: torch.Tensor, noise: torch.Tensor, move: list[int]) -> torch.Tensor:
        """The same with its draws: noise [B, C, H, W], and the shift (dy, dx) at half the size."""
        small = torch.roll(largest(images, noise), move, dims=(2, 3))
        return torch.clamp(self.upscaler(small), 0, 1)


def largest(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Of each 2x2 window the pixel where the noise is largest, for each channel by itself.

    The authors' way: all others are set to zero, and the largest is taken of what is left. So
    [B, C, H, W] to [B, C, H/2, W/2], of images that are nowhere negative.
    """
    most = functional.interpolate(functional.max_pool2d(noise, 2), scale_factor=2, mode="nearest")
    return functional.max_pool2d(images * (noise == most), 2)
