"""Any JAX function with its convolutions in the form that stays fast inside loops on CPU.

A network of this project convolves by `models.conv` to begin with. One that others wrote calls
`lax.conv_general_dilated`, whose gradients XLA:CPU runs an order of magnitude too slowly inside a
loop, and an attack is a loop. `loop_safe` reads the function's jaxpr and evaluates it with these
convolutions replaced. Values and gradients stay those of `lax` up to rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from rain_jax.models import conv
from rain_jax.models.detours import CANONICAL

F = TypeVar("F", bound=Callable[..., Any])

_CONVOLUTION = "conv_general_dilated"
# What is entered, by name, since JAX exports few of its primitives: one that is called otherwise in
# some version is left as it is.
_ENTERED = (
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "cond", "while",
    "scan",
)  # fmt: skip
# Parameters of the primitive beside those that every convolution here is given.
_PLAIN = {"feature_group_count": 1, "batch_group_count": 1, "out_sharding": None}
_GIVEN = (
    "window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision",
    "preferred_element_type",
)  # fmt: skip


def loop_safe(function: F) -> F:
    """The same function of arrays, loop-safe on CPU; on other backends it is the function itself.

    1-D and 2-D convolutions in any layout are replaced, also inside `jax.jit`, `lax.scan`,
    `while_loop`, `cond`, `switch` and `jax.checkpoint`. Left as they are: grouped and 3-D
    convolutions, and whatever has a derivative rule of its own (`custom_jvp`, `custom_vjp`), which
    is kept with its rule. As for `models.conv`, a replaced convolution has no forward-mode
    derivative.

    Arguments and results are pytrees of arrays. JAX traces the function once for all calls with the
    same shapes and types, so it must not read anything that changes in between.
    """

    def traced(choice: str) -> Callable[..., Any]:
        """The function for each choice of convolutions, which JAX's cache does not know of."""

        def of_this_choice(*arguments: Any) -> Any:
            return function(*arguments)

        return jax.make_jaxpr(of_this_choice, return_shape=True)

    programs: dict[str, Callable[..., Any]] = {}

    @functools.wraps(function)
    def replaced(*arguments: Any) -> Any:
        if not conv.needs_loop_safety():
            return function(*arguments)
        choice = conv.left_to_lax()
        if choice not in programs:
            programs[choice] = traced(choice)
        closed, shape = programs[choice](*arguments)
        leaves = _evaluate(closed, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return replaced  # type: ignore[return-value]


class Replay(NamedTuple):
    """A function as JAX traced it, and the arrays that it closed over."""

    run: Callable[..., Any]  # of these arrays and of the function's arguments
    constants: list[Any]
    text: str  # the program, and how it convolves: what tells it from others of one function


def constants_apart(function: Callable[..., Any], *arguments: Any) -> Replay:
    """The function with what it closes over as an argument, loop-safe on CPU.

    It is traced now, for arguments of these shapes (arrays or `ShapeDtypeStruct`s).
    """
    # A function of its own, since JAX remembers what it traced, with what was closed over then.
    closed, shape = jax.make_jaxpr(lambda *given: function(*given), return_shape=True)(*arguments)
    structure = jax.tree.structure(shape)
    constants = list(getattr(closed, "consts", ()))
    program = getattr(closed, "jaxpr", closed)

    def run(constants: list[Any], *given: Any) -> Any:
        leaves = _evaluate(program, jax.tree.leaves(given), constants)
        return jax.tree.unflatten(structure, leaves)

    return Replay(run, constants, f"{conv.left_to_lax()} {closed}")


def _evaluate(
    program: Any, arguments: Sequence[Any], constants: Sequence[Any] | None = None
) -> list[Any]:
    """What a jaxpr computes of flat arguments, its convolutions replaced on CPU."""
    jaxpr = getattr(program, "jaxpr", program)
    known = getattr(program, "consts", ()) if constants is None else constants
    values = dict(zip(jaxpr.constvars, known, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        # Profilers show these names: a module's, in Flax.
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            results = _rule(equation)(equation, inputs)
        values.update(zip(equation.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _rule(equation: Any) -> Callable[[Any, list[Any]], Sequence[Any]]:
    name = equation.primitive.name
    if not conv.needs_loop_safety():
        return _as_it_is
    if name == _CONVOLUTION:
        return _convolved
    if any(map(_has_convolution, _inner(equation))):
        return _entered
    return _as_it_is


def _as_it_is(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    return _bound(equation.primitive, inputs, equation.params)


def _entered(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """A call or a loop, with the convolutions in its inner programs replaced."""
    params = jax.tree.map(
        lambda value: _rewritten(value) if _is_program(value) else value,
        dict(equation.params), is_leaf=lambda value: _is_program(value) or value is None,
    )  # fmt: skip
    return _bound(equation.primitive, inputs, params)


def _bound(primitive: Any, inputs: list[Any], params: dict[str, Any]) -> Sequence[Any]:
    given = primitive.get_bind_params(params)
    # Older versions of JAX return the functions of derivative rules apart.
    functions, params = given if isinstance(given, tuple) else ((), given)
    results = primitive.bind(*functions, *inputs, **params)
    return results if primitive.multiple_results else [results]


def _rewritten(program: Any) -> Any:
    """A jaxpr with its convolutions replaced, closed where it was."""
    variables = getattr(program, "jaxpr", program).invars
    like = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in variables
    ]
    closed = jax.make_jaxpr(lambda *arguments: _evaluate(program, arguments))(*like)
    if type(program) is type(closed):
        return closed
    return program if closed.consts else closed.jaxpr


def _convolved(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """A convolution brought into the canonical layout, by our rule, and back again."""
    images, kernel = inputs
    numbers = equation.params["dimension_numbers"]
    others = {k: v for k, v in equation.params.items() if k not in (*_GIVEN, "dimension_numbers")}
    if others != _PLAIN or images.ndim not in (3, 4):
        return _as_it_is(equation, inputs)
    batch, channels, *space = numbers.lhs_spec
    images = jnp.transpose(images, (batch, *space, channels))
    leaving, entering, *space = numbers.rhs_spec
    kernel = jnp.transpose(kernel, (*space, entering, leaving))
    given = {name: equation.params[name] for name in _GIVEN}
    if images.ndim == 3:  # [B, W, C]: of a row
        images, kernel = images[:, None], kernel[None]
        for name in ("window_strides", "lhs_dilation", "rhs_dilation"):
            given[name] = (1, *given[name])
        given["padding"] = ((0, 0), *given["padding"])
    maps = conv.conv_general_dilated(images, kernel, **given, dimension_numbers=CANONICAL)
    maps = maps[:, 0] if len(numbers.lhs_spec) == 3 else maps
    batch, channels, *space = numbers.out_spec
    return [jnp.moveaxis(maps, range(maps.ndim), (batch, *space, channels))]


def _is_program(value: Any) -> bool:
    """Whether that is a jaxpr, closed or not."""
    return hasattr(value, "eqns")


def _inner(equation: Any) -> list[Any]:
    """The jaxprs among an equation's parameters, if it is of those that are entered."""
    if equation.primitive.name not in _ENTERED:
        return []
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
    return [leaf for leaf in leaves if _is_program(leaf)]


def _has_convolution(program: Any) -> bool:
    return any(
        equation.primitive.name == _CONVOLUTION or any(map(_has_convolution, _inner(equation)))
        for equation in program.eqns
    )
