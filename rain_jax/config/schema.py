"""Signatures as schemas: a section of a config becomes a checked call.

A section `dict(name="pgd", steps=10)` is `attacks.pgd(threat, steps=10)`: the packages' `__all__`
are the registries, and the functions' own signatures say which keys a section may have, of which
types and with which defaults. Nothing is declared twice, so nothing can disagree.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import (
    attacks,
    defences,
    gradients,
    losses,
    methods,
    models,
    norms,
    optimisers,
    schedules,
)
from rain_jax.checks import UsageError, nearest, one_of
from rain_jax.defences.tables import Statistics
from rain_jax.models import upscalers
from rain_jax.types import Defence, Estimator, Loss, Norm, Upscaler

# The sections that name a maker, and the registry it is looked up in.
REGISTRIES: dict[str, types.ModuleType] = {
    "network": models,
    "defence": defences,
    "method": methods,
    "optimiser": optimisers,
    "schedule": schedules,
}
# The words of the project that a section inside a section describes.
_MAKERS: dict[Any, types.ModuleType] = {
    Estimator: gradients,
    Upscaler: upscalers,
    Defence: defences,
}
# What the program itself passes, and a config must therefore not.
GIVEN = {
    "network", "objective", "attack", "threat", "schedule", "total_steps", "steps_per_epoch",
    "classes",
}  # fmt: skip


def registered(where: str, registry: types.ModuleType, name: Any) -> Callable[..., Any]:
    """The maker called `name` in a package or module with an `__all__`."""
    return getattr(registry, one_of(f"{where}.name", name, registry.__all__))


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters a config may set, annotations resolved; keyword-only or with a default."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(function).parameters.items()
        if inspect.isclass(function) or name not in GIVEN
    }


def convert(where: str, value: Any, annotation: Any) -> Any:
    """`value` as `annotation` wants it, or a `UsageError` that says what was expected.

    Names become objects where the annotation is one of the project's words: a `Loss`, a `Norm`,
    an `Estimator`, an `Upscaler`, a `Defence`, or, from a file's, `Statistics`. Traced numbers pass
    where numbers do, so that what a section describes can be made inside a program.
    """
    if isinstance(value, jax.core.Tracer):
        return _traced(where, value, annotation)
    if annotation == Norm:
        return getattr(norms, one_of(where, value, norms.__all__)) if _is_name(value) else value
    if annotation == Loss:
        return getattr(losses, one_of(where, value, losses.__all__)) if _is_name(value) else value
    if annotation in _MAKERS and isinstance(value, dict | str):
        return make(
            where, _MAKERS[annotation], {"name": value} if isinstance(value, str) else value
        )
    if annotation is Statistics and isinstance(value, str):
        return _statistics(where, value)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        named = [kind for kind in arguments if kind in _MAKERS or kind is Statistics]
        if named and isinstance(value, dict | str):
            return convert(where, value, named[0])
        for kind in arguments:
            try:
                return convert(where, value, kind)
            except UsageError as error:
                # A list of the wrong things is told by its first wrong thing.
                if _is_list(value) and typing.get_origin(kind) is tuple:
                    raise error
        raise UsageError(f"{where}={value!r}: expected {_say(annotation)}")
    if origin is typing.Literal:
        return one_of(where, value, arguments)
    if origin is tuple:
        if not _is_list(value) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise UsageError(f"{where}={value!r}: expected {_say(annotation)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        pairs = zip(value, kinds, strict=True)
        return tuple(convert(f"{where}[{place}]", *pair) for place, pair in enumerate(pairs))
    wanted = type(None) if annotation is None else origin or annotation
    if not inspect.isclass(wanted) or annotation is Any:
        return value
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):  # a bool is an int in Python
        raise UsageError(f"{where}={value!r}: expected {_say(annotation)}")
    try:
        return float(value) if wanted is float else value
    except OverflowError:
        raise UsageError(f"{where}={value!r:.20}..: expected a number") from None


def _traced(where: str, value: jax.core.Tracer, annotation: Any) -> Any:
    kinds = typing.get_args(annotation) or (annotation,)
    if float in kinds:
        return jnp.asarray(value, jnp.float32)
    if annotation is Any or (int in kinds and jnp.issubdtype(value.dtype, jnp.integer)):
        return value
    raise UsageError(f"{where}={value!r}: expected {_say(annotation)}")


def _statistics(where: str, path: str) -> Statistics:
    """What `experiments.analyse` has written."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Statistics(**{name: file[name] for name in Statistics._fields})
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{where}={path!r}: expected a file that python -m experiments.analyse has written "
            f"({' '.join(str(error).split())})"
        ) from None


def _is_name(value: Any) -> bool:
    return not callable(value) and not isinstance(value, Norm)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _say(annotation: Any) -> str:
    """What an annotation asks for, in words."""
    words = {float: "a number", int: "a whole number", bool: "True or False", str: "a text",
             type(None): "None"}  # fmt: skip
    if annotation in words:
        return words[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        # What only a program can pass (a path, a callable) is no help at the keyboard.
        told = [a for a in arguments if a in words or typing.get_origin(a) is tuple]
        return " or ".join(map(_say, told)) or str(annotation)
    if origin is tuple:
        if isinstance(arguments[0], type) and arguments[0].__module__ != "builtins":
            return "sections, (dict(name=..), dict(name=..), ..)"
        inner = _say(arguments[0]).removeprefix("a ") + "s"
        return f"{'' if arguments[-1] is ... else f'{len(arguments)} '}{inner}, (a, b, ..)"
    if origin is dict or annotation is dict:
        return "a section, dict(..)"
    return str(annotation).replace("typing.", "")


def call(where: str, function: Callable[..., Any], spec: dict[str, Any], **given: Any) -> Any:
    """`function(**given, **spec)`, with the keys and types of `spec` checked by its signature."""
    parameters = parameters_of(function)
    known = {name: p for name, p in parameters.items() if name not in given}
    for name in spec:
        if name not in known:
            told = [*_beside(function), *known]
            raise UsageError(
                f"{where}.{name}: no such key: {_named(function)} takes "
                f"{', '.join(told) or 'no settings'}{nearest(name, told)}"
            )
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in spec:
            raise UsageError(f"{where}.{name} is missing: {_named(function)} needs it")
    converted = {
        name: convert(f"{where}.{name}", value, known[name].annotation)
        for name, value in spec.items()
    }
    try:
        return function(**given, **converted)
    except UsageError as error:
        raise located(where, error, parameters) from None


def _beside(function: Callable[..., Any]) -> list[str]:
    """The keys of a function's section that are no plain settings."""
    named = any(
        getattr(registry, name) is function
        for registry in (attacks, *_MAKERS.values(), *REGISTRIES.values())
        for name in registry.__all__
    )
    takes = inspect.signature(function).parameters
    return ["name"] * named + [key for key in ("attack",) if named and key in takes]


def _named(function: Callable[..., Any]) -> str:
    return function.__name__


def located(where: str, error: UsageError, parameters: typing.Container[str] = ()) -> UsageError:
    """Makers name their parameter; the person at the keyboard wants the config's."""
    message = str(error)
    if message.startswith("config."):
        return UsageError(message)
    first = re.match(r"\w*", message)
    return UsageError(f"{where}{'.' if first and first[0] in parameters else ': '}{message}")


def make(where: str, registry: types.ModuleType, spec: Any, **given: Any) -> Any:
    """The object that a section `{"name": ..., **settings}` describes."""
    if not isinstance(spec, dict) or "name" not in spec:
        raise UsageError(f"{where}={spec!r}: expected a section with a name, one of "
                         f"{', '.join(registry.__all__)}")  # fmt: skip
    function = registered(where, registry, spec["name"])
    own = {key: value for key, value in spec.items() if key != "name"}
    takes = inspect.signature(function).parameters
    return call(where, function, own, **{k: v for k, v in given.items() if k in takes})


def filled(function: Callable[..., Any], spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` with the function's defaults, so that every value can be seen and overridden."""
    defaults = {}
    for name, parameter in parameters_of(function).items():
        if name in spec or parameter.default is parameter.empty:
            continue
        defaults[name] = _as_config(parameter.default)
    return {**defaults, **spec}


def _as_config(default: Any) -> Any:
    """A default as a config writes it: names in the place of objects."""
    if isinstance(default, Norm):
        return next(name for name in norms.__all__ if getattr(norms, name) is default)
    return default.__name__ if callable(default) else default


def filled_member(registry: types.ModuleType, spec: Any) -> Any:
    """A section with a name and the defaults of what it names; others are refused later."""
    name = spec.get("name") if isinstance(spec, dict) else None
    if not isinstance(name, str) or name not in registry.__all__:
        return spec
    return filled(getattr(registry, name), spec)
