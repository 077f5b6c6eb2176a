"""Networks whose losses can be written out by hand, and the numbers to do it with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.types import Batch, Network

ROWS = Batch(
    jnp.zeros((6, 2, 2, 1)), jnp.arange(6) % 3, jnp.arange(6), jnp.array([True] * 5 + [False])
)
"""Six black images of three classes, the last of which is padding."""
VALID = np.asarray(ROWS.valid)
LABEL = np.asarray(ROWS.label)


def _look_up(variables, images, train=False, axis_name=None, keys=None):
    light = jnp.mean(images) > 0.5
    params, trail = variables["params"], variables["trail"]
    logits = jnp.where(light, params["attacked"], params["clean"])
    return logits[: len(images)], {"trail": trail * 10 + 1 + light if train else trail}


TABLE = Network(lambda key, images: {}, _look_up, 3)
"""Its parameters are its logits: `clean` of dark images, `attacked` of light ones, [B, K].

`trail` in its state writes down what it was shown in training mode: 1 for dark, 2 for light.
"""
_DRAW = np.random.default_rng(0)
TABLES = {name: 2 * _DRAW.standard_normal((6, 3)) for name in ("attacked", "clean")}
TRAIL = {"trail": jnp.int32(0)}


def _multiply(variables, images, train=False, axis_name=None, keys=None):
    flat = images.reshape(len(images), -1)
    product = jnp.matmul(flat, variables["params"]["weight"], precision="highest")
    return product, {name: value for name, value in variables.items() if name != "params"}


LINEAR = Network(lambda key, images: {}, _multiply, 3)
"""Logits are pixels times `weight` [H W C, K]."""


def lighten(key: Any, logits_fn: Any, image: jax.Array, label: Any) -> jax.Array:
    """An attack that `TABLE` can see."""
    return jnp.ones_like(image)


def f32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def slopes(function: Callable[[Any], Any], at: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradient of `function` by central differences, in double precision."""
    found = {}
    for name, array in at.items():
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            sides = []
            for side in (1e-5, -1e-5):
                moved = {**at, name: array.copy()}
                moved[name][place] += side
                sides.append(function(moved))
            gradient[place] = (sides[0] - sides[1]) / 2e-5
        found[name] = gradient
    return found


def agrees(objective: Any, by_hand: Callable[[Any], Any], params: Any, state: Any) -> Any:
    """Checks loss and gradient against the equations; returns the state and the metrics."""
    value_and_gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, aux), gradient = value_and_gradient(f32(params), state, jax.random.key(0), ROWS)
    np.testing.assert_allclose(loss, by_hand(params), rtol=1e-5)
    for name, expected in slopes(by_hand, params).items():
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-5, atol=1e-5)
    return aux
