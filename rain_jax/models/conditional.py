"""Networks that a number modulates: a condition s in their variables, told by whoever calls them.

Such a network has `{"condition": {"s": []}}` beside its parameters, a constant in evaluation: what
is saved with a model is what attackers differentiate through, the same for every image. Training
sets it for each pass by `with_condition`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from rain_jax.models.conv import conv_general_dilated
from rain_jax.types import Array, PyTree, Scalar

Modulation = Literal["none", "film", "float"]
MODULATIONS = ("none", "film", "float")
_COLLECTION = "condition"
# How strong the noise begins, in standard deviations of the kernel: as in public code of FLOAT,
# which has it from parametric noise injection (He et al., CVPR 2019).
_NOISE = 0.25


class FiLM(nn.Module):
    """x (1 + g(s)) + b(s), channel by channel, for maps x [B, H, W, C] and a condition s [].

    Once-for-all adversarial training (arXiv:2010.11828) puts it after each batch normalisation: a
    dense layer of 2C, leaky ReLU, and another one for g and b. Ours takes s itself for its input
    and not a random code of it; and the last layer begins at zero, so that a fresh one changes
    nothing, whatever s is.
    """

    @nn.compact
    def __call__(self, x: Array, s: Scalar) -> Array:
        wide = 2 * x.shape[-1]
        hidden = nn.leaky_relu(nn.Dense(wide, name="hidden")(s.reshape(1)))
        zeros = nn.initializers.zeros
        scale, shift = jnp.split(nn.Dense(wide, kernel_init=zeros, name="last")(hidden), 2)
        shape = (1, 1, 1, -1)
        return x * (1 + scale).astype(x.dtype).reshape(shape) + shift.astype(x.dtype).reshape(shape)


class KernelNoise(nn.Module):
    """A kernel plus s times its learned share of noise, of the kernel's own standard deviation.

    After FLOAT (Kundu et al., arXiv:2204.00426), which redraws the noise in each pass and so has
    a random network. Here one draw, in the collection "noise", stays with the network.
    """

    @nn.compact
    def __call__(self, kernel: Array, s: Scalar) -> Array:
        share = self.param("share", nn.initializers.constant(_NOISE), ())
        noise = self.variable(
            "noise", "draw", lambda: jax.random.normal(self.make_rng("params"), kernel.shape)
        ).value
        spread = jax.lax.stop_gradient(jnp.std(kernel.astype(jnp.float32)))
        return kernel + (s * share * spread * noise).astype(kernel.dtype)


def modulated(
    module: nn.Module, kind: str, norm: Callable[..., Any], conv: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The makers of a module's layers, with a condition where `kind` asks for one.

    Called within the module, which holds the condition. "film" follows each of what `norm` makes,
    and "float" is in the kernel of each of what `conv` makes.
    """
    if kind == "none":
        return norm, conv
    s = module.variable(_COLLECTION, "s", lambda: jnp.float32(1.0)).value

    def conditional_norm(name: str) -> Callable[[Array], Array]:
        layer, film = norm(name=name), FiLM(name=f"{name}_film")
        return lambda x: film(layer(x), s)

    def conditional_conv(*arguments: Any, name: str, **options: Any) -> Callable[[Array], Array]:
        noise = KernelNoise(name=f"{name}_noise")

        def noisy(images: Array, kernel: Array, *others: Any, **more: Any) -> Array:
            return conv_general_dilated(images, noise(kernel, s), *others, **more)

        return conv(*arguments, name=name, conv_general_dilated=noisy, **options)

    return (conditional_norm, conv) if kind == "film" else (norm, conditional_conv)


def with_condition(variables: PyTree, s: Any) -> PyTree:
    """The same variables, or model state, with the condition at `s`, behind a defence as well.

    Those of an ensemble have one for each member, all of which are told `s`. Those of a network
    without a condition come back as they are.
    """

    def value(path: Any, leaf: Any) -> Any:
        own = jax.tree_util.DictKey(_COLLECTION) in path
        return jnp.full(leaf.shape, s, jnp.float32) if own else leaf

    return jax.tree_util.tree_map_with_path(value, variables)
