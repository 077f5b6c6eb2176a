"""Published PyTorch weights as variables: state dictionaries of names and arrays, by layer.

Arrays are anything NumPy reads, so a `state_dict()` of CPU tensors or what `np.load` returns.
Kernels change from [out, in, h, w] to [h, w, in, out]. Every array must be there, of the right
shape, and none may be left over: what does not fit is refused by name.
"""

from collections.abc import Mapping
from typing import Any

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


class _Arrays:
    """The arrays of a state dictionary, taken out one by one and checked on the way."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        # What was trained on several devices carries a prefix.
        self._left = {name.removeprefix("module."): state[name] for name in state}
        self._names = list(self._left)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def blocks(self, pattern: str, first: int = 0) -> int:
        """How many names of this pattern there are, counted from `first`."""
        number = first
        while pattern.format(number) in self:
            number += 1
        if number == first:
            self.shape(pattern.format(first))
        return number - first

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a kernel, [out, in, h, w]."""
        if name not in self._left:
            raise UsageError(
                f"state: no array {name!r} in it: expected those of the published network"
                f"{nearest(name, self._names)}"
            )
        shape = np.shape(self._left[name])
        if name.endswith("weight") and len(shape) != 4:
            raise UsageError(f"{name} is {list(shape)}: expected a kernel [out, in, h, w]")
        return shape

    def conv(self, name: str, inputs: int, outputs: int, size: int = 3) -> dict[str, np.ndarray]:
        """The kernel [size, size, inputs, outputs] and the bias [outputs] of one layer."""
        kernel = self._take(f"{name}.weight", (outputs, inputs, size, size))
        bias = self._take(f"{name}.bias", (outputs,))
        return {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), "bias": bias}

    def _take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if self.shape(name) != shape:
            raise UsageError(f"{name} is {list(self.shape(name))}: expected {list(shape)}")
        return np.asarray(self._left.pop(name), np.float32)

    def done(self, params: dict[str, Any]) -> Variables:
        """The variables, once nothing is left."""
        if self._left:
            raise UsageError(
                f"state: {next(iter(self._left))!r} has no place in this network: expected the "
                "names of the published one alone"
            )
        return {"params": params}
