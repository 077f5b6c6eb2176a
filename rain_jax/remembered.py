"""Makers that return the same object for equal arguments."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Maker = TypeVar("Maker", bound=Callable[..., object])

# So many of each maker's objects are kept.
_KEPT = 64
_caches: list[Any] = []


def remembered(make: Maker) -> Maker:
    """The same maker, whose objects are the same ones where its arguments are equal.

    Programs are compiled for functions, and found again by them: an attack that is made twice is
    compiled once. Arguments without a hash (arrays, and numbers that are traced) get an object of
    their own. What `make` returns must hold no arrays made inside of a program.
    """
    kept = functools.lru_cache(_KEPT, typed=True)(make)
    _caches.append(kept)

    @functools.wraps(make)
    def made(*arguments: object, **settings: object) -> object:
        try:
            hash((arguments, tuple(settings.values())))
        except TypeError:
            return make(*arguments, **settings)
        return kept(*arguments, **settings)

    return made  # type: ignore[return-value]


def forget() -> None:
    """Drops all that is remembered: compiled programs, and the models that they hold on to."""
    for kept in _caches:
        kept.cache_clear()
