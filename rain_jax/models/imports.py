"""Published PyTorch weights as variables: state dictionaries of names and arrays, by layer.

Arrays are anything NumPy reads, so a `state_dict()` of CPU tensors or what `np.load` returns.
Kernels change from [out, in, h, w] to [h, w, in, out]. Every array must be there, of the right
shape, and none may be left over: what does not fit is refused by name.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rain_jax.checks import UsageError, nearest
from rain_jax.models.edsr import DIV2K_MEAN, LEVELS
from rain_jax.models.imdn import REDUCTION, SHARE
from rain_jax.models.upscaler import FACTOR
from rain_jax.types import Variables


def edsr_from_torch(state: Mapping[str, Any]) -> Variables:
    """Variables of `edsr(blocks=, width=)` from those of sanghyun-son/EDSR-PyTorch.

    Names as in its `edsr_baseline_x2`: `head.0`, `body.N.body.0` and `.2`, `body.BLOCKS`,
    `tail.0.0`, `tail.1`, each with `.weight` and `.bias`. How many blocks and channels there are
    is read off; the residual scale is not in the file, so make `edsr` with the one trained with.
    The constants `sub_mean` and `add_mean`, where given, must be those of `edsr`'s own mean.

    Raises `UsageError` for arrays that are missing, left over or of another shape, and for other
    means.
    """
    arrays = _Arrays(state)
    blocks = arrays.blocks("body.{}.body.0.weight")
    width, channels = arrays.shape("head.0.weight")[:2]
    mean = LEVELS * np.asarray(DIV2K_MEAN)
    for name, bias in ("sub_mean", -mean), ("add_mean", mean):
        if f"{name}.weight" in arrays:
            found = arrays.conv(name, 3, 3, 1)
            identity = np.allclose(found["kernel"][0, 0], np.eye(3), atol=1e-6)
            if not identity or not np.allclose(found["bias"], bias, atol=1e-2):
                raise UsageError(
                    f"{name}: expected a shift by {LEVELS:g} times {DIV2K_MEAN}, as in published "
                    f"networks for pixels in [0, {LEVELS:g}]"
                )
    params: dict[str, Any] = {"head": arrays.conv("head.0", channels, width)}
    for number in range(blocks):
        params[f"block_{number}"] = {
            "first": arrays.conv(f"body.{number}.body.0", width, width),
            "second": arrays.conv(f"body.{number}.body.2", width, width),
        }
    params["body"] = arrays.conv(f"body.{blocks}", width, width)
    params["enlarge"] = arrays.conv("tail.0.0", width, FACTOR**2 * width)
    params["tail"] = arrays.conv("tail.1", width, channels)
    return arrays.done(params)


def imdn_from_torch(state: Mapping[str, Any]) -> Variables:
    """Variables of `imdn(blocks=, width=)` from those of Zheng222/IMDN's `IMDN_x2`.

    Names as there: `fea_conv`, `IMDB1` .. `IMDB6` with `c1` .. `c5` and `cca.conv_du.0` and `.2`,
    `c.0`, `LR_conv`, `upsampler.0`. Raises `UsageError` for arrays that are missing, left over or
    of another shape.
    """
    arrays = _Arrays(state)
    blocks = arrays.blocks("IMDB{}.c1.weight", first=1)
    width, channels = arrays.shape("fea_conv.weight")[:2]
    aside, hidden = width // SHARE, width // REDUCTION
    params: dict[str, Any] = {"head": arrays.conv("fea_conv", channels, width)}
    for number in range(blocks):
        block = f"IMDB{number + 1}"
        params[f"block_{number}"] = {
            "step_1": arrays.conv(f"{block}.c1", width, width),
            "step_2": arrays.conv(f"{block}.c2", width - aside, width),
            "step_3": arrays.conv(f"{block}.c3", width - aside, width),
            "step_4": arrays.conv(f"{block}.c4", width - aside, aside),
            "squeeze": arrays.conv(f"{block}.cca.conv_du.0", width, hidden, 1),
            "excite": arrays.conv(f"{block}.cca.conv_du.2", hidden, width, 1),
            "gather": arrays.conv(f"{block}.c5", width, width, 1),
        }
    params["gather"] = arrays.conv("c.0", blocks * width, width, 1)
    params["body"] = arrays.conv("LR_conv", width, width)
    params["enlarge"] = arrays.conv("upsampler.0", width, FACTOR**2 * channels)
    return arrays.done(params)


class Published(NamedTuple):
    """A classifier from a file: the config section that makes its network, and its variables.

    The section says what the arrays tell: the name, how deep and wide it is, `mean` and `std` where
    they are among the arrays, and the `variant` where the names are its own. Its activation, and
    constants that are in the code alone, only the authors can tell.
    """

    network: dict[str, Any]
    classes: int
    variables: Variables


def resnet_from_torch(state: Mapping[str, Any]) -> Published:
    """ResNets, pre-activation ResNets and Wide ResNets in the layouts that are widespread.

    By their names: torchvision's (`layer1.0.downsample.0`, `fc`), kuangliu/pytorch-cifar's ResNet
    and PreActResNet (`layer1.0.shortcut.0`, `linear`; RobustBench's with `bn`), RobustBench's
    WideResNet, which is that of TRADES (`block1.layer.0.convShortcut`, `fc`), and its DMWideResNet
    (`layer.0.block.0.conv_0`, `logits`). Prefixes of wrappers are dropped: `module.`, `model.`,
    `net.`, `_orig_mod.`, `normalize.` and numbers, of a `Sequential` whose first part normalises.
    So are counters of batches, and the `sub_block1` that TRADES made and never used; `mu` and
    `sigma` are `mean` and `std`. All these have the epsilon of ours, 1e-5.

    Raises `UsageError` for arrays that are missing, left over or of another shape, and for ResNets
    that are neither ResNet-18 nor ResNet-50.
    """
    arrays = _Arrays(_unwrapped(state))
    pixels = arrays.pixels()
    layout = _layout(arrays)
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}

    def norm(place: tuple[str, ...], name: str, channels: int) -> None:
        affine, averages = arrays.norm(name, channels)
        _put(params, place, affine)
        _put(stats, place, averages)

    def kernel(place: tuple[str, ...], name: str, ins: int, outs: int, size: int) -> None:
        _put(params, place, {"kernel": arrays.kernel(f"{name}.weight", ins, outs, size)})

    width, channels, size, _ = arrays.shape(f"{layout.stem}.weight")
    kernel(("stem",), layout.stem, channels, width, size)
    if layout.stem_norm:
        norm(("stem_norm",), layout.stem_norm, width)
    depths: list[int] = []
    widths: list[int] = []
    ins, wide = width, False
    arrays.shape(layout.conv(0, 0, 0))
    while layout.conv(len(depths), 0, 0) in arrays:
        group, place = len(depths), 0
        while (first := layout.conv(group, place, 0)) in arrays:
            inner = arrays.shape(first)[0]
            wide = layout.conv(group, place, 2) in arrays
            passed = [ins, inner, inner, 4 * inner] if wide else [ins, inner, inner]
            block = f"group{group + 1}_block{place + 1}"
            for number, (into, outof) in enumerate(pairwise(passed)):
                name = layout.conv(group, place, number).removesuffix(".weight")
                pixel = wide and number != 1
                kernel((block, f"conv{number + 1}"), name, into, outof, 1 if pixel else 3)
                name = layout.norm(group, place, number)
                norm((block, f"norm{number + 1}"), name, outof if layout.stem_norm else into)
            if (group and not place) or ins != passed[-1]:
                names = layout.shortcut(group, place)
                kernel((block, "shortcut"), names[0], ins, passed[-1], 1)
                if layout.stem_norm:
                    norm((block, "shortcut_norm"), names[1], passed[-1])
            ins, place = passed[-1], place + 1
        depths.append(place)
        widths.append(inner)
    if f"{layout.last_norm}.weight" in arrays:
        norm(("last_norm",), layout.last_norm, ins)
    params["classifier"] = arrays.dense(layout.classifier, ins)
    classes = params["classifier"]["kernel"].shape[1]
    section = {**layout.section(tuple(depths), widths, wide, "last_norm" in params), **pixels}
    return Published(section, classes, {**arrays.done(params), "batch_stats": stats})


class _Layout(NamedTuple):
    """The names of one family; patterns are of a group, a block in it and a layer in that."""

    stem: str
    block: str
    convs: str
    norms: str
    shortcuts: tuple[str, ...]
    classifier: str
    first: int  # the number of the first group, and of a block's first layer
    inner: int
    stem_norm: str = ""  # what is not pre-activation has one
    last_norm: str = ""

    def conv(self, group: int, place: int, number: int) -> str:
        """The name of a kernel."""
        return f"{self._inside(group, place)}.{self.convs.format(number + self.inner)}.weight"

    def norm(self, group: int, place: int, number: int) -> str:
        return f"{self._inside(group, place)}.{self.norms.format(number + self.inner)}"

    def shortcut(self, group: int, place: int) -> list[str]:
        return [f"{self._inside(group, place)}.{name}" for name in self.shortcuts]

    def _inside(self, group: int, place: int) -> str:
        return self.block.format(group + self.first, place)

    def section(
        self, depths: tuple[int, ...], widths: list[int], wide: bool, last_norm: bool
    ) -> dict[str, Any]:
        """The config's section of a network so deep and wide."""
        kind = "bottleneck" if wide else "basic"
        if self.stem_norm:
            known: dict[tuple[int, ...], str] = {
                (2, 2, 2, 2, False): "resnet18", (3, 4, 6, 3, True): "resnet50"
            }  # fmt: skip
            if (*depths, wide) not in known:
                raise UsageError(
                    f"state: {depths} {kind} blocks: expected those of ResNet-18 or ResNet-50"
                )
            return {"name": known[(*depths, wide)]}
        even = "layer{}" in self.block or (len(set(depths)) == 1 and widths[0] % 16 == 0)
        if wide or not even:
            raise UsageError(
                f"state: {depths} {kind} blocks of {widths} channels: expected a pre-activation "
                "network of basic blocks, as many in each group of a Wide ResNet"
            )
        if "layer{}" in self.block:
            told = {"variant": "paper"} if last_norm else {}
            return {"name": "preact_resnet", "depths": depths, "width": widths[0], **told}
        variant = "paper" if self is _WIDE else "deepmind"
        shape = {"depth": 6 * depths[0] + 4, "width": widths[0] // 16}
        return {"name": "wide_resnet", **shape, "variant": variant}


_PLAIN = _Layout("conv1", "layer{}.{}", "conv{}", "bn{}", ("shortcut.0", "shortcut.1"), "linear",
                 1, 1, stem_norm="bn1")  # fmt: skip
_TORCHVISION = _PLAIN._replace(shortcuts=("downsample.0", "downsample.1"), classifier="fc")
_PREACT = _PLAIN._replace(shortcuts=("shortcut.0",), stem_norm="", last_norm="bn")
_WIDE = _PREACT._replace(
    block="block{}.layer.{}", shortcuts=("convShortcut",), classifier="fc", last_norm="bn1"
)
_DEEPMIND = _Layout("init_conv", "layer.{}.block.{}", "conv_{}", "batchnorm_{}", ("shortcut",),
                    "logits", 0, 0, last_norm="batchnorm")  # fmt: skip

_WRAPPERS = re.compile(r"^((module|model|net|_orig_mod|normalize|normalizer|\d+)\.)+")
_UNUSED = re.compile(r"(^|\.)(num_batches_tracked$|sub_block1\.)")
_PIXELS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in state:
        bare = _WRAPPERS.sub("", name)
        if _UNUSED.search(bare):
            continue
        if bare in found:
            raise UsageError(f"state: {name!r} and another are both {bare!r} inside their wrappers")
        found[bare] = state[name]
    return found


def _layout(arrays: "_Arrays") -> _Layout:
    """The family whose names these are; of others the first that is missed will be told."""
    if arrays.some("init_conv."):
        return _DEEPMIND
    if arrays.some("block1."):
        return _WIDE
    if not arrays.some("bn1."):
        return _PREACT
    return _TORCHVISION if arrays.some("fc.") else _PLAIN


def _put(tree: dict[str, Any], place: tuple[str, ...], leaves: dict[str, Any]) -> None:
    for name in place[:-1]:
        tree = tree.setdefault(name, {})
    tree[place[-1]] = leaves


class _Arrays:
    """The arrays of a state dictionary, taken out one by one and checked on the way."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        # What was trained on several devices carries a prefix.
        self._left = {name.removeprefix("module."): state[name] for name in state}
        self._names = list(self._left)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def some(self, beginning: str) -> bool:
        """Whether there are names that begin so."""
        return any(name.startswith(beginning) for name in self._names)

    def blocks(self, pattern: str, first: int = 0) -> int:
        """How many names of this pattern there are, counted from `first`."""
        number = first
        while pattern.format(number) in self:
            number += 1
        if number == first:
            self.shape(pattern.format(first))
        return number - first

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._left:
            raise UsageError(
                f"state: no array {name!r} in it: expected those of the published network"
                f"{nearest(name, self._names)}"
            )
        return np.shape(self._left[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a kernel, [out, in, h, w]."""
        shape = self._shape(name)
        if len(shape) != 4:
            raise UsageError(f"{name} is {list(shape)}: expected a kernel [out, in, h, w]")
        return shape

    def conv(self, name: str, inputs: int, outputs: int, size: int = 3) -> dict[str, np.ndarray]:
        """The kernel [size, size, inputs, outputs] and the bias [outputs] of one layer."""
        kernel = self.kernel(f"{name}.weight", inputs, outputs, size)
        return {"kernel": kernel, "bias": self._take(f"{name}.bias", (outputs,))}

    def kernel(self, name: str, inputs: int, outputs: int, size: int) -> np.ndarray:
        """A kernel alone."""
        self.shape(name)
        kernel = self._take(name, (outputs, inputs, size, size))
        return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))

    def norm(self, name: str, channels: int) -> tuple[dict[str, np.ndarray], ...]:
        """Scale and bias, and the running mean and variance, of batch normalisation."""
        named = (
            {"scale": "weight", "bias": "bias"},
            {"mean": "running_mean", "var": "running_var"},
        )
        parts = [
            {ours: self._take(f"{name}.{theirs}", (channels,)) for ours, theirs in part.items()}
            for part in named
        ]
        return parts[0], parts[1]

    def dense(self, name: str, inputs: int) -> dict[str, np.ndarray]:
        """A dense layer, [inputs, outputs]; one without a bias gets one of zeros."""
        outputs = (*self._shape(f"{name}.weight"), 0)[0]
        kernel = self._take(f"{name}.weight", (outputs, inputs))
        has_bias = f"{name}.bias" in self
        bias = self._take(f"{name}.bias", (outputs,)) if has_bias else np.zeros(outputs, np.float32)
        return {"kernel": np.ascontiguousarray(kernel.T), "bias": bias}

    def pixels(self) -> dict[str, tuple[float, ...]]:
        """The mean and the deviation of pixels, for each channel, where they are there."""
        found = {}
        for theirs, ours in _PIXELS.items():
            if theirs in self:
                values = np.asarray(self._left.pop(theirs), np.float64).ravel()
                found[ours] = tuple(round(float(value), 6) for value in values)
        return found

    def _take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if self._shape(name) != shape:
            raise UsageError(f"{name} is {list(self._shape(name))}: expected {list(shape)}")
        return np.asarray(self._left.pop(name), np.float32)

    def done(self, params: dict[str, Any]) -> Variables:
        """The variables, once nothing is left."""
        if self._left:
            raise UsageError(
                f"state: {next(iter(self._left))!r} has no place in this network: expected the "
                "names of the published one alone"
            )
        return {"params": params}
