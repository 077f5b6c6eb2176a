"""Makers that return the same object for equal arguments."""

import functools
from collections.abc import Callable
from typing import TypeVar

Maker = TypeVar("Maker", bound=Callable[..., object])

# So many of each maker's objects are kept.
_KEPT = 64


def remembered(make: Maker) -> Maker:
    """The same maker, whose objects are the same ones where its arguments are equal.

    Programs are compiled for functions, and found again by them: an attack that is made twice is
    compiled once. Arguments that cannot be told from others (arrays, and numbers that are traced)
    get an object of their own. What `make` returns must hold no arrays made inside of a program.
    """
    kept = functools.lru_cache(_KEPT, typed=True)(make)

    @functools.wraps(make)
    def made(*arguments: object, **settings: object) -> object:
        try:
            return kept(*arguments, **settings)
        except TypeError:  # not hashable; or the maker's own error, which it raises again
            return make(*arguments, **settings)

    return made  # type: ignore[return-value]
