"""Modules of Flax, Equinox and PyTorch, as functions of their variables."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.errors import FlaxError

from rain_jax.checks import UsageError
from rain_jax.keys import is_key
from rain_jax.remembered import remembered
from rain_jax.types import Array, Key, Model, Network, PyTree, Variables

# Arguments that put a module's call into evaluation mode.
_EVALUATION = {
    "train": False, "training": False, "is_training": False, "deterministic": True,
    "use_running_average": True, "inference": True,
}  # fmt: skip


class Forward(NamedTuple):
    """A model's forward pass: `logits(variables, key, images)`, of batches or of one image.

    The same function comes back for the same module, so that nothing is compiled twice.
    """

    logits: Callable[[PyTree, Key, Array], Any]
    variables: PyTree
    random: bool
    name: str
    batched: bool | None  # None where it has to be found out
    function: Any = None  # a plain function, which may close over other weights next time


def known_module(model: Any, random: bool | None) -> Forward | None:
    """The forward pass of a module that is known, or None."""
    if isinstance(model, tuple) and len(model) == 2:
        module, variables = model
        if isinstance(module, linen.Module):
            return Forward(
                _linen_logits(module, bool(random)), _variables(module, variables),
                bool(random), type(module).__name__, True,
            )  # fmt: skip
        raise UsageError(
            f"model=({type(module).__name__}, {type(variables).__name__}): expected a Flax linen "
            "module and its variables"
        )
    if isinstance(model, linen.Module):
        raise UsageError(
            f"model={type(model).__name__}: expected its variables beside it: "
            '(module, {"params": params})'
        )
    if isinstance(model, nnx.Module):
        return _of_nnx(model, random)
    if _is_a("equinox", "Module", model):
        return _of_equinox(model, random)
    if _is_a("torch.nn", "Module", model):
        return _of_torch(model, bool(random))
    return None


def _is_a(library: str, kind: str, model: Any) -> bool:
    """Whether the model is of a library, which is imported if it is."""
    known = getattr(sys.modules.get(library), kind, None)
    return known is not None and isinstance(model, known)


def of_network(network: Network, variables: Variables) -> Model:
    """A network of this project with its variables, in evaluation mode, one image at a time."""
    return Model(_network_logits(network), variables, network.random, "network")


@remembered
def _network_logits(network: Network) -> Callable[..., Any]:
    def logits(variables: Variables, key: Key, image: Array) -> Array:
        keys = key[None] if network.random else None
        return network.apply(variables, image[None], train=False, keys=keys)[0][0]

    return logits


def _variables(module: linen.Module, variables: Any) -> Any:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise UsageError(
            f"the variables of {type(module).__name__} are {type(variables).__name__}: expected "
            '{"params": ...} as module.init gives it, batch_stats beside it where there are any'
        )
    return variables


def _in_evaluation(function: Callable[..., Any]) -> dict[str, bool]:
    """The arguments that say so, of those that a call takes."""
    try:
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in _EVALUATION.items() if name in takes}


@remembered
def _linen_logits(module: linen.Module, random: bool) -> Callable[..., Any]:
    flags: dict[str, Any] = _in_evaluation(type(module).__call__)

    def logits(variables: PyTree, key: Key, images: Array) -> Any:
        # Streams that are not named here draw from that of the parameters.
        streams: Any = {"rngs": {"params": key}} if random else {}
        try:
            return module.apply(variables, images, **streams, **flags)
        except FlaxError as error:
            raise _said(type(module).__name__, error) from error

    return logits


def _said(name: str, error: FlaxError) -> UsageError:
    """What is wrong with a module of Flax, in a line."""
    kind, first = type(error).__name__, str(error).split("(http")[0]
    remedy = {
        "ModifyScopeVariableError": "it updates its batch statistics, and the other images of a "
        "batch would matter: expected use_running_average=True",
        "InvalidRngError": "it draws at random: expected deterministic=True",
    }.get(kind, " ".join(first.split())[:200])
    return UsageError(f"{name} is not in evaluation mode: {remedy}" if kind in (
        "ModifyScopeVariableError", "InvalidRngError") else f"{name}: {remedy}")  # fmt: skip


def _of_nnx(model: nnx.Module, random: bool | None) -> Forward:
    name = type(model).__name__
    # As `nnx.Module.train` leaves them.
    for path, part in nnx.iter_modules(model):
        for flag, value in ("deterministic", False), ("use_running_average", False):
            if getattr(part, flag, None) is value:
                where = ".".join(map(str, path)) or name
                raise UsageError(
                    f"{name} is in training mode ({where}.{flag} is {value}): expected model.eval()"
                )
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf, state)  # what it is now, whatever becomes of the model
    return Forward(_nnx_logits(graph, bool(random)), state, bool(random), name, True)


@remembered
def _nnx_logits(graph: Any, random: bool) -> Callable[..., Any]:
    def logits(variables: PyTree, key: Key, images: Array) -> Any:
        if random:  # a stream of its own for each of the module's keys
            leaves, structure = jax.tree.flatten(variables)
            leaves = [
                jax.random.fold_in(key, place) if is_key(leaf) else leaf
                for place, leaf in enumerate(leaves)
            ]
            variables = jax.tree.unflatten(structure, leaves)
        module = nnx.merge(graph, variables)
        before = jax.tree.leaves(nnx.state(module, nnx.RngCount))
        found = module(images)
        after = jax.tree.leaves(nnx.state(module, nnx.RngCount))
        if not random and any(one is not other for one, other in zip(before, after, strict=True)):
            raise UsageError(
                f"{type(module).__name__} draws at random from its own Rngs: expected "
                "model.eval(), or random=True"
            )
        return found

    return logits


def _of_equinox(model: Any, random: bool | None) -> Forward:
    import equinox

    name = type(model).__name__
    in_training = lambda node: getattr(node, "inference", None) is False
    for part in jax.tree.leaves(model, is_leaf=in_training):
        if in_training(part):
            raise UsageError(
                f"{name} is in training mode ({type(part).__name__}.inference is False): expected "
                "equinox.nn.inference_mode(model)"
            )
    arrays, static = equinox.partition(model, equinox.is_array)
    leaves, structure = jax.tree.flatten(static)
    convolutions = equinox.nn.Conv, equinox.nn.ConvTranspose
    is_convolution = lambda node: isinstance(node, convolutions)
    channels_first = any(map(is_convolution, jax.tree.leaves(model, is_leaf=is_convolution)))
    takes_key = "key" in inspect.signature(type(model).__call__).parameters
    of = _equinox_logits(tuple(leaves), structure, channels_first, takes_key)
    return Forward(of, arrays, bool(random), name, False)


@remembered
def _equinox_logits(
    leaves: tuple[Any, ...], structure: Any, channels_first: bool, takes_key: bool
) -> Callable[..., Any]:
    import equinox

    static = jax.tree.unflatten(structure, leaves)

    def logits(variables: PyTree, key: Key, image: Array) -> Any:
        whole: Any = equinox.combine(variables, static)
        given = jnp.moveaxis(image, -1, 0) if channels_first else image
        return whole(given, key=key) if takes_key else whole(given)

    return logits


def _of_torch(module: Any, random: bool) -> Forward:
    module.eval()  # each time, for it may have been trained since the last one
    # What else a module may have become since then: on another device, of other types or layers.
    parts = tuple(
        (name, tuple(part.shape), str(part.dtype), str(part.device))
        for name, part in module.named_parameters()
    )
    logits = _torch_logits(module, parts, random)
    return Forward(logits, (), random, type(module).__name__, False)


@remembered
def _torch_logits(module: Any, parts: Any, random: bool) -> Callable[..., Any]:
    from rain_jax.bridges import from_torch

    logits_fn = from_torch(module, random=random)
    return lambda variables, key, image: logits_fn(key, image)
