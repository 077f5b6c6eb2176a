"""PyTorch on either side: our models for its attack libraries, its models for our attacks.

`to_torch` makes a `torch.nn.Module` of a model of ours, for foolbox, ART, torchattacks or the
official AutoAttack; `from_torch` makes a `LogitsFn` of any module, for everything here. Both are
differentiable towards the image, once. This is the one part of the library that needs PyTorch.
"""

import threading
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from rain_jax.checks import UsageError, one_of, within
from rain_jax.parallel import image_keys
from rain_jax.types import Array, Image, Key, Logits, LogitsFn, Network, PyTree, Variables

try:
    import torch
except ModuleNotFoundError:
    raise UsageError(
        "rain_jax.bridges: expected PyTorch to be installed: pip install 'rain_jax[torch]'"
    ) from None

Draws = Literal["fresh", "fixed"]
_LogitsOf = Callable[[PyTree, Key, Array], Array]  # variables, key, [N, C, H, W] -> [N, K]


def to_torch(
    model: LogitsFn | Network,
    variables: Variables | None = None,
    *,
    seed: int = 0,
    draws: Draws = "fresh",
) -> torch.nn.Module:
    """A module of images [N, C, H, W] in [0, 1] to logits [N, K], in evaluation mode for good.

    `model` is a function of one image, or a network beside its `variables`, which then are an
    argument of the compiled programs and no constants in them. Batches are padded to the next
    power of two: attacks that drop the images they are done with cost a handful of compilations.
    Memory is shared and not copied where both sides can (on CPU, and on one GPU). Programs run on
    JAX's first device, and logits are back on the device of the images.

    A random model draws by `seed`, the number of the call and each image's place in its batch, so
    that attacks which average over calls (EOT) meet new draws; the backward pass keeps to those of
    its forward pass. With `draws="fixed"` all calls draw alike. The module's attribute `calls`
    counts them; set to zero, it begins anew.

    Gradients towards the images are JAX's own, once: gradients of gradients are refused. The one
    parameter only tells on which device the module is, for libraries that ask for it. Raises
    `UsageError` for settings, and for images of another rank.
    """
    within("seed", seed, 0, 2**31 - 1)
    one_of("draws", draws, ("fresh", "fixed"))
    if isinstance(model, Network) is (variables is None):
        raise UsageError("variables: expected those of a network, and none beside a function")

    def logits(variables: PyTree, key: Key, images: Array) -> Array:
        images = jnp.moveaxis(images, 1, -1)
        keys = image_keys(key, jnp.arange(images.shape[0]))
        if isinstance(model, Network):
            return model.apply(variables, images, keys=keys if model.random else None)[0]
        return jax.vmap(model)(keys, images)

    return _Module(logits, variables, seed, draws == "fresh")


class _Module(torch.nn.Module):
    def __init__(self, logits: _LogitsOf, variables: PyTree, seed: int, fresh: bool):
        super().__init__()
        self.calls = 0
        self.where = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self._seed, self._fresh, self._variables = seed, fresh, variables
        self._logits = jax.jit(logits)
        self._linearised = jax.jit(lambda v, key, x: jax.vjp(partial(logits, v, key), x))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4:
            raise UsageError(f"images are {list(images.shape)}: expected [N, C, H, W]")
        key = jax.random.fold_in(jax.random.key(self._seed), self.calls)
        self.calls += self._fresh
        return _Crossing.apply(images.to(torch.float32), self, key)

    def run(self, key: Key, images: Array, gradient: bool) -> tuple[Array, Any]:
        """The logits and, where it is wanted, what takes cotangents back to the images."""
        if gradient:
            return self._linearised(self._variables, key, images)
        return self._logits(self._variables, key, images), None


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, module: _Module, key: Key) -> torch.Tensor:
        found = module.run(key, _taken(images), ctx.needs_input_grad[0])
        # The images are the caller's memory, who may write to it next.
        logits, ctx.pullback = jax.block_until_ready(found)
        return _handed(logits, images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = jax.block_until_ready(_pulled(ctx.pullback, _taken(cotangent)))
        return _handed(gradient, cotangent), None, None


@jax.jit
def _pulled(pullback: Any, cotangent: Array) -> Array:
    return pullback(cotangent)[0]


def _taken(rows: torch.Tensor) -> Array:
    """The rows and as many of zeros as make them a power of two, on JAX's device."""
    rows = rows.detach()
    if not (rows.is_cuda and jax.default_backend() == "gpu"):
        rows = rows.cpu()
    missing = (1 << (len(rows) - 1).bit_length()) - len(rows) if len(rows) else 1
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return jax.device_put(jnp.from_dlpack(rows.contiguous()), jax.local_devices()[0])


def _handed(rows: Array, like: torch.Tensor) -> torch.Tensor:
    """The first rows, as many as `like` has, on the device of `like`."""
    if not like.is_cuda:
        rows = jax.device_put(rows, jax.local_devices(backend="cpu")[0])
    return torch.utils.dlpack.from_dlpack(rows)[: len(like)].to(like.device)


def from_torch(module: torch.nn.Module, *, random: bool = False) -> LogitsFn:
    """A module of images [N, C, H, W] in [0, 1] to logits [N, K], as a function of one image.

    Its output may also have them as `logits`, as that of a classifier of Hugging Face has.

    However often `jax.vmap` maps it (restarts, draws, a batch), PyTorch gets all images in one
    call; `jit`, `scan` and `shard_map` work too, the devices then taking turns at the one module.
    The module is put into evaluation mode and stays on the device of its first parameter, outside
    of JAX's programs: images go there and back, on the way as float32, in the module as what its
    first parameter is. On the CPU backend they do so without JAX's
    `pure_callback`, whose conversions can wait for the thread that waits for them.

    A forward pass under differentiation keeps PyTorch's graph until the backward pass, which asks
    for the same images, or until the next one: a step of an attack is one pass forward and one
    back. Gradients are towards the image, once; a module that cuts its graph raises an error.

    A module that draws is `random`: PyTorch's generator is then seeded by the keys of all images
    in the call, so that the same keys give the same draws and other keys others. They are drawn
    together, so that here an image does feel its neighbours; without `random`, a module that draws
    nevertheless answers all keys alike where they come with one image, which EOT must not have.
    """
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"module={module!r:.60}: expected a torch.nn.Module")
    module.eval()
    theirs = _Theirs(module, random)

    @jax.custom_vjp
    def logits(bits: Array, image: Image) -> Logits:
        return _asked(theirs.logits, (theirs.classes(image.shape),), bits, image)

    def forward(bits: Array, image: Image) -> tuple[Logits, tuple[Array, Image]]:
        kept = _asked(theirs.kept, (theirs.classes(image.shape),), bits, image)
        return kept, (bits, image)

    def backward(inputs: tuple[Array, Image], cotangent: Logits) -> tuple[None, Image]:
        return None, _asked(theirs.gradient, inputs[1].shape, *inputs, cotangent)

    logits.defvjp(forward, backward)

    def logits_fn(key: Key, image: Image) -> Logits:
        bits = jax.random.key_data(key) if random else jnp.zeros(1, jnp.uint32)
        return logits(bits, image.astype(jnp.float32))

    return logits_fn


def _asked(function: Callable[..., np.ndarray], shape: tuple[int, ...], *inputs: Array) -> Array:
    """What `function` of NumPy arrays says; mapped axes come first, in front of all arrays."""
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    if jax.default_backend() != "cpu":
        called = lambda *arrays: function(*map(np.asarray, arrays))
        return jax.pure_callback(called, result, *inputs, vmap_method="broadcast_all")

    def filled(_: Any, out: Any, *buffers: Any) -> None:
        np.asarray(out)[...] = function(*map(np.asarray, buffers))

    return buffer_callback(filled, result, vmap_method="broadcast_all")(*inputs)


class _Kept(NamedTuple):
    """A forward pass with its graph."""

    bits: bytes
    images: torch.Tensor
    logits: torch.Tensor


def _logits_of(output: Any) -> Any:
    """A module's logits, which those of Hugging Face have in an attribute."""
    return getattr(output, "logits", output)


class _Theirs:
    """The module as functions of NumPy arrays with any number of leading axes."""

    def __init__(self, module: torch.nn.Module, random: bool):
        self._module, self._random = module, random
        first = next(module.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._dtype = torch.float32 if first is None else first.dtype
        self._kept: _Kept | None = None
        # The generator and the graph are one each, and several devices may ask at once.
        self._lock = threading.Lock()
        self.classes = cache(self._classes)

    def _classes(self, shape: tuple[int, ...]) -> int:
        with self._lock, torch.no_grad(), torch.random.fork_rng():
            seen = self._images(np.zeros(shape, np.float32))
            logits = _logits_of(self._module(seen.to(self._dtype)))
        one = isinstance(logits, torch.Tensor)
        if not one or logits.ndim != 2:
            given = list(logits.shape) if one else type(logits).__name__
            raise UsageError(f"the module gives {given}: expected logits [N, K]")
        return logits.shape[1]

    def _images(self, images: np.ndarray) -> torch.Tensor:
        batch = images.reshape(-1, *images.shape[-3:])
        return torch.tensor(np.moveaxis(batch, -1, 1), device=self._device)

    def _passed(self, bits: bytes, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self._dtype)
        if not self._random:
            return _logits_of(self._module(images)).float()
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(bits))
            return _logits_of(self._module(images)).float()

    def _with_graph(self, bits: bytes, images: torch.Tensor) -> _Kept:
        with torch.enable_grad():
            images.requires_grad_()
            return _Kept(bits, images, self._passed(bits, images))

    def logits(self, bits: np.ndarray, images: np.ndarray) -> np.ndarray:
        with self._lock, torch.no_grad():
            found = self._passed(bits.tobytes(), self._images(images))
        return found.cpu().numpy().reshape(*images.shape[:-3], -1)

    def kept(self, bits: np.ndarray, images: np.ndarray) -> np.ndarray:
        with self._lock:
            self._kept = self._with_graph(bits.tobytes(), self._images(images))
            found = self._kept.logits.detach()
        return found.cpu().numpy().reshape(*images.shape[:-3], -1)

    def gradient(self, bits: np.ndarray, images: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        with self._lock:
            seen, kept, self._kept = self._images(images), self._kept, None
            # Any other call may have come between, and the compiler may drop one of the two.
            if kept is None or kept.bits != bits.tobytes() or not torch.equal(kept.images, seen):
                kept = self._with_graph(bits.tobytes(), seen)
            along = torch.tensor(cotangent, device=self._device).reshape(kept.logits.shape)
            (gradient,) = torch.autograd.grad(kept.logits, kept.images, along)
        return np.moveaxis(gradient.cpu().numpy(), 1, -1).reshape(images.shape)
