"""What an attack costs: forward and backward passes of the model, counted in its program."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from rain_jax.keys import is_key
from rain_jax.types import Array, Image, Iteration, Key, Logits, PyTree

# The stand-in's name, by which its calls are found in a program.
_NAME = "passes_of_the_model"


class Passes(NamedTuple):
    """Forward and backward passes through the model for one image."""

    forward: float
    backward: float

    def __add__(self, other: Any) -> "Passes":
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> "Passes":
        return Passes(*(times * count for count in self))

    def __rmul__(self, times: Any) -> "Passes":
        return self * times


class Cost(NamedTuple):
    """Of an attack: passes to begin, of each step, and to tell its best image and score.

    `width` is how many images the model is shown at once for each one that is attacked.
    """

    init: Passes
    step: Passes
    best: Passes
    width: int


def cost(attack: Iteration, shape: tuple[int, ...], classes: int) -> Cost:
    """The cost of an attack on images [H, W, C] of a model with so many classes.

    Restarts, targets and draws count each for itself; what no result depends on does not count. The
    passes of a loop whose length only the data tell are counted once, those of all branches of a
    `cond` together.
    """

    # Neither linear nor constant, so that nothing is simplified away; and it draws, so that every
    # key of a mean over draws is a pass of its own.
    def passes_of_the_model(key: Key, image: Image) -> Logits:
        seen = jnp.sum(jnp.square(image)) + jax.random.uniform(key)
        return jnp.sin(seen * jnp.arange(1.0, classes + 1))

    model = jax.jit(passes_of_the_model)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    key, label = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), jnp.int32)

    def init(key: Key, image: Image, label: Array) -> PyTree:
        return attack.init(key, model, image, label)

    state = jax.eval_shape(init, key, image, label)
    count = partial(_counted, image_rank=len(shape))
    (begin, one), (step, two), (best, three) = (
        count(init, key, image, label),
        count(partial(attack.step, model), state),
        count(partial(attack.best, model), state),
    )
    return Cost(begin, step, best, max(one, two, three))


def _counted(function: Any, *arguments: Any, image_rank: int) -> tuple[Passes, int]:
    """All passes, and the most that go side by side."""
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    found, width = Passes(0.0, 0.0), 1
    for call in _calls(program, needed=[True] * len(program.outvars)):
        keys = [v.aval.shape for v in call.invars if is_key(v.aval)]
        images = [v.aval.shape[:-image_rank] for v in (call.invars if keys else call.outvars)]
        # Whatever was not batched is the same for all: the longest says how many there are.
        passes = float(max(np.prod(lead, initial=1.0) for lead in keys + images))
        found += Passes(passes, 0.0) if keys else Passes(0.0, passes)
        width = max(width, int(passes))
    return found, width


def _calls(program: Any, needed: list[bool]) -> Iterator[Any]:
    """Every call of the model that something depends on.

    Forward it takes a key, backward it takes none and gives an image's gradient.
    """
    from jax.interpreters import partial_eval

    program, _ = partial_eval.dce_jaxpr(program, needed)
    for line in program.eqns:
        if line.params.get("name") == _NAME:
            yield line
            continue
        times = line.params["length"] if line.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(line.params):
            inner = getattr(inner, "jaxpr", inner)
            yield from list(_calls(inner, [True] * len(inner.outvars))) * times
