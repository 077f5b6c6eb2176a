"""Models that people bring, as evaluations take them: one image at a time, weights beside.

`as_model` takes a Flax linen module with its variables, an NNX module, an Equinox module, a
`torch.nn.Module`, a `Network` of this project with its variables, or a plain function.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rain_jax.adapters.modules import Forward, known_module, of_network
from rain_jax.checks import UsageError
from rain_jax.models.loop_safe import constants_apart, loop_safe
from rain_jax.remembered import remembered
from rain_jax.types import Array, Key, Model, Network, PyTree

__all__ = ["as_model", "of_network"]

# Numbers of images on which a function of batches is recognised.
_BATCHES = (1, 3)


def as_model(model: Any, shape: tuple[int, ...], *, random: bool | None = None) -> Model:
    """Any classifier of images of `shape` [H, W, C] in [0, 1] as a `Model`, loop-safe on CPU.

    `model` is one of

    - `(module, variables)`: a Flax linen module and `{"params": ...}`; or a `Network` and its
      variables. A module is asked in evaluation mode: arguments called `train` or `training` are
      False, `deterministic` and `use_running_average` True;
    - a Flax NNX module or an Equinox module, in evaluation mode;
    - a `torch.nn.Module` of images [N, C, H, W], which is put into evaluation mode (`.eval()`);
    - a function of a batch [B, H, W, C] or of an image, `f(images)`, or `f(key, images)` of a
      random model;
    - a `Model`, which is returned as it is.

    An Equinox module that convolves is given images [C, H, W], as its layers want them, and another
    one [H, W, C].

    Its output is logits [K] for each image, or has them in its attribute `logits`. `random` says
    whether it draws from the key; by default a function that takes a key does.

    Raises `UsageError` for anything else, and for a model that cannot be asked about such images,
    which gives something else than logits of two classes or more, or which wants to change its
    batch statistics.
    """
    if isinstance(model, Model):
        return model if random is None else model._replace(random=random)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], Network):
        if random is not None and random != model[0].random:
            raise UsageError(f"random={random}: expected {model[0].random}, as its Network says")
        return of_network(*model)
    forward = known_module(model, random)
    if forward is None:
        if not callable(model):
            raise UsageError(
                f"model={model!r:.60}: expected a function of images, a module of Flax NNX, "
                "Equinox or PyTorch, or a pair (module, variables)"
            )
        forward = _of_function(model, random)
    return _asked(forward, tuple(shape))


def _of_function(function: Callable[..., Any], random: bool | None) -> Forward:
    takes_key = _required(function) == 2

    def logits(variables: PyTree, key: Key, images: Array) -> Any:
        return function(key, images) if takes_key else function(images)

    name = getattr(function, "__name__", type(function).__name__)
    return Forward(
        logits, (), takes_key if random is None else random, name, batched=None, function=function
    )


def _required(function: Callable[..., Any]) -> int:
    """How many arguments a function wants; one where Python cannot say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if len(wanted) not in (0, 1, 2):
        raise UsageError(
            f"the model takes {', '.join(wanted)}: expected a function of images, or of a key and "
            "images, that holds its weights"
        )
    return max(1, len(wanted))


@remembered
def _loop_safe(logits: Callable[..., Any], batched: bool) -> Callable[..., Any]:
    """The same function for the same module, for which programs are then compiled once."""
    return loop_safe(_of_one(logits, batched))


def _of_one(logits: Callable[..., Any], batched: bool) -> Callable[..., Any]:
    def one(variables: PyTree, key: Key, image: Array) -> Array:
        given = logits(variables, key, image[None] if batched else image)
        found = getattr(given, "logits", given)
        return (found[0] if batched else found).astype(jnp.float32)

    return one


# By function: what it was traced as, for which programs are then compiled once. Held weakly, so
# that a function which is gone takes them along.
_replays: "weakref.WeakKeyDictionary[Any, dict[str, Callable[..., Any]]]" = (
    weakref.WeakKeyDictionary()
)


def _replayed(forward: Forward, batched: bool, shape: tuple[int, ...]) -> Model:
    """A function's model, with what it closes over as its variables.

    It is traced anew for every model, since it may close over other weights by then.
    """
    one = _of_one(forward.logits, batched)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    replay = constants_apart(lambda key, image: one((), key, image), key, image)
    if any(isinstance(getattr(c, "sharding", None), NamedSharding) for c in replay.constants):
        raise UsageError(
            "the model closes over arrays that are placed on a mesh: expected arrays on one "
            "device, jax.device_put(arrays, jax.devices()[0])"
        )
    try:
        known = _replays.setdefault(forward.function, {})
    except TypeError:  # not hashable, or never to be referred to weakly
        known = {}
    logits = known.setdefault(replay.text, replay.run)
    return Model(logits, replay.constants, forward.random, forward.name)


def _asked(forward: Forward, shape: tuple[int, ...]) -> Model:
    """The model, once its answers have the shape of logits."""
    key = jax.eval_shape(jax.random.key, 0)

    def output(*size: int) -> Any:
        images = jax.ShapeDtypeStruct((*size, *shape), jnp.float32)
        given = jax.eval_shape(forward.logits, forward.variables, key, images)
        return getattr(given, "logits", given)

    outputs: list[Any] = []
    errors: list[Exception] = []
    for batched in (True, False) if forward.batched is None else (forward.batched,):
        try:
            found = [output(size) for size in _BATCHES] if batched else [output()]
        except Exception as error:
            errors.append(error)
            continue
        outputs.append(found[0])
        if batched and all(
            getattr(one, "ndim", None) == 2 and one.shape[0] == size
            for one, size in zip(found, _BATCHES, strict=True)
        ):
            return _checked(forward, True, found[0], shape)
        if not batched and getattr(found[0], "ndim", None) == 1:
            return _checked(forward, False, found[0], shape)
    if not outputs:
        for one in errors:
            if isinstance(one, UsageError):
                raise one
        first = " ".join(str(errors[0]).split())
        raise UsageError(
            f"the model cannot be asked about images {list(shape)}: "
            f"{type(errors[0]).__name__}: {first:.200}"
        ) from errors[0]
    given = getattr(outputs[0], "shape", None)
    said = type(outputs[0]).__name__ if given is None else list(given)
    of = "an image" if forward.batched is False else "a batch of one image"
    raise UsageError(
        f"the model gives {said} for {of} {list(shape)}: expected logits, [B, K] or [K]"
    )


def _checked(forward: Forward, batched: bool, output: Any, shape: tuple[int, ...]) -> Model:
    classes = output.shape[-1]
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise UsageError(f"the model gives {output.dtype}: expected logits, which are floats")
    if classes < 2:
        raise UsageError(
            "the model gives one number for an image: expected a logit for each class; where there "
            "are two, jnp.concatenate([jnp.zeros_like(z), z], axis=-1) of its logit z"
        )
    if forward.function is not None:
        return _replayed(forward, batched, shape)
    return Model(
        _loop_safe(forward.logits, batched), forward.variables, forward.random, forward.name
    )
