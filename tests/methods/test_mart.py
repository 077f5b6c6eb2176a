"""MART against its equation, written out in NumPy as the authors' code has it."""

import by_hand
import jax
import numpy as np
import pytest

from rain_jax import methods
from rain_jax.checks import UsageError


def mart(params, beta):
    rows = np.arange(6)[by_hand.VALID]
    total = 0.0
    for row in rows:
        label = by_hand.LABEL[row]
        p = np.exp(by_hand.log_softmax(params["clean"][row]))
        q = np.exp(by_hand.log_softmax(params["attacked"][row]))
        runner_up = max(q[k] for k in range(3) if k != label)
        boosted = -np.log(q[label]) - np.log(1.0001 - runner_up + 1e-12)
        total += boosted + beta * np.sum(p * np.log(p / q)) * (1.0000001 - p[label])
    return total


@pytest.mark.parametrize("beta", [5.0, 0.0])
def test_loss_and_gradient_are_the_equations(beta):
    """The gradient goes through both predictions and through the weight."""
    objective = methods.mart(by_hand.TABLE, by_hand.lighten, beta=beta)
    state, metrics = by_hand.agrees(
        objective, lambda params: mart(params, beta), by_hand.TABLES, by_hand.TRAIL
    )
    assert state["trail"] == 12  # x and then x'
    assert metrics["moved"] == 5


def test_finite_where_the_network_is_certain():
    """Of the wrong class, and of the right one: no logarithm of zero."""
    tables = {name: np.zeros((6, 3)) for name in by_hand.TABLES}
    for table in tables.values():
        table[:3, 0] = 200.0  # label 0 is right, labels 1 and 2 are wrong
    objective = methods.mart(by_hand.TABLE, by_hand.lighten)
    (loss, _), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        by_hand.f32(tables), by_hand.TRAIL, jax.random.key(0), by_hand.ROWS
    )
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient.values())


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match=r"beta=-0\.1"):
        methods.mart(by_hand.TABLE, by_hand.lighten, beta=-0.1)
    with pytest.raises(UsageError, match="did you mean 'train'"):
        methods.mart(by_hand.TABLE, by_hand.lighten, batch_norm="trian")
