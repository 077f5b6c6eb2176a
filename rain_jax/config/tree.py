"""A config as its sections: completed by defaults, changed by the command line, made plain.

`config` is what every config file's `get_config` returns. What the sections build is `build`'s
business, and how one becomes a call is `schema`'s.
"""

import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from rain_jax import attacks, data, norms, training
from rain_jax.attacks import suites
from rain_jax.audit import ladder
from rain_jax.checks import UsageError, nearest, one_of
from rain_jax.config import attack_columns, options
from rain_jax.config.schema import REGISTRIES, filled, filled_member
from rain_jax.models import upscalers
from rain_jax.types import Norm, Threat


def threat(*, norm: Norm = norms.linf, radius: float) -> Threat:
    """The threat of an experiment; `radius` is in pixel values of [0, 1], measured in `norm`."""
    boundless = Threat(norm, math.inf)
    return Threat(norm, attack_columns.radius("config.threat.radius", radius, boundless))


# Sections that are the arguments of one function.
CALLS: dict[str, Callable[..., Any]] = {
    "data": data.load,
    "threat": threat,
    "augment": options.Augment,
    "average": training.averaging,
    "training": options.Training,
    "validation": options.Validation,
    "start": options.Start,
    "ensemble": options.Ensemble,
    "evaluation": options.Evaluation,
    "checkpoints": options.Checkpointing,
    "parallel": options.Parallel,
}
# What may be None in a config: the thing is left out.
_OPTIONAL = ("average", "defence", "ensemble", "validation", "twin")
# Sections inside sections, and the registries of their names. The attacks of an evaluation have
# names of their own.
_NESTED: dict[tuple[str, str], types.ModuleType] = {
    ("method", "attack"): attacks,
    ("validation", "attack"): attacks,
    ("defence", "upscaler"): upscalers,
}
_ATTACKS_BY_NAME = ("attacks", "distances")


def as_section(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}={value!r}: expected a section, dict(..)")
    return dict(value)


def config(**sections: Any) -> ml_collections.ConfigDict:
    """A complete config from the sections that matter: all defaults are filled in.

    What every config file's `get_config` returns. Unknown sections are refused here, unknown keys
    inside them when the experiment is built.
    """
    sections = plain(sections)
    known = ["seed", "twin", *REGISTRIES, *CALLS]
    for name in sections:
        if name not in known:
            raise UsageError(
                f"config.{name}: no such section: expected one of {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    whole: dict[str, Any] = {"seed": 0, "twin": None, **sections}
    for name in [*REGISTRIES, *CALLS]:
        if whole.get(name) is None and name in _OPTIONAL:
            whole[name] = None
            continue
        spec = as_section(f"config.{name}", {} if whole.get(name) is None else whole[name])
        if name == "evaluation":
            spec = {**{section: {} for section in _ATTACKS_BY_NAME}, **spec}
        function = CALLS.get(name)
        whole[name] = filled(function, spec) if function else filled_member(REGISTRIES[name], spec)
    for (section, key), registry in _NESTED.items():
        if (whole[section] or {}).get(key) is not None:
            whole[section][key] = filled_member(registry, whole[section][key])
    evaluation = whole["evaluation"]
    for section in _ATTACKS_BY_NAME:
        if isinstance(evaluation.get(section), dict):
            # A column set to None on the command line is a column less.
            columns = {k: v for k, v in evaluation[section].items() if v is not None}
            evaluation[section] = {k: filled_member(attacks, v) for k, v in columns.items()}
    if isinstance(evaluation.get("suite"), str):
        evaluation["suite"] = {"name": evaluation["suite"]}
    evaluation["suite"] = filled_member(suites, evaluation.get("suite"))
    if isinstance(evaluation.get("ladder"), dict):
        evaluation["ladder"] = filled(ladder.Ladder, evaluation["ladder"])
    if isinstance(evaluation.get("corruption"), dict):
        evaluation["corruption"] = filled(options.Corrupted, evaluation["corruption"])
    # Not type-safe in ml_collections' sense, which knows the types of values (60 epochs, so never
    # half of one); the signatures know better, and `experiment` asks them.
    return ml_collections.ConfigDict(whole, type_safe=False)


def _registry_at(path: Sequence[str]) -> types.ModuleType | None:
    """The registry that the `name` in the section at `path` is looked up in, if in any."""
    path = tuple(path[1:] if path[:1] == ["twin"] else path)
    named = len(path) == 3 and path[0] == "evaluation" and path[1] in _ATTACKS_BY_NAME
    if path in _NESTED:
        return _NESTED[path]
    if named:
        return attacks
    if path == ("evaluation", "suite"):
        return suites
    return REGISTRIES.get(path[0]) if len(path) == 1 else None


def _renamed(spec: dict[str, Any], registry: types.ModuleType, name: Any) -> dict[str, Any]:
    """The section of another member: what was set for the old one and the new one knows, too.

    The old one's defaults go, so that the new one's own may come.
    """
    members = registry.__all__
    if name not in members or spec.get("name") not in members:
        return {**spec, "name": name}
    old = filled(getattr(registry, spec["name"]), {})
    new = inspect.signature(getattr(registry, name)).parameters
    kept = {k: v for k, v in spec.items() if k in new and (k not in old or plain(old[k]) != v)}
    return {**kept, "name": name}


def changed(config_: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A config with some values replaced: pairs of a dotted key and its value.

    Names come first, whatever the order: with `("method.name", "natural")` the settings that only
    the old method knew are gone, and the new one's may be given beside it.
    """
    whole = plain(config_)
    for key, value in sorted(changes, key=lambda change: change[0].split(".")[-1] != "name"):
        *path, last = key.split(".")
        section = whole
        for place, name in enumerate(path):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                where = ".".join(["config", *path[: place + 1]])
                raise UsageError(f"config.{key}: {where}={section!r} is a value, not a section")
        registry = _registry_at(path) if last == "name" else None
        if registry is not None and section.get("name") != value:
            renamed = _renamed(section, registry, value)
            section.clear()
            section.update(renamed)
        section[last] = plain(value)
    return config(**whole)


def plain(config: Any) -> Any:
    """A config as plain dictionaries, lists and numbers, as it is saved and compared."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def twin(whole: Any) -> dict[str, Any] | None:
    """The config of the twin: this one with the sections of `twin` in place of its own."""
    spec = plain(whole)
    changes = spec.pop("twin", None)
    if changes is None or changes == {}:
        return None
    for section in as_section("config.twin", changes):
        one_of("config.twin section", section, [name for name in spec if name != "seed"])
    return plain(config(**{**spec, **changes, "twin": None}))
