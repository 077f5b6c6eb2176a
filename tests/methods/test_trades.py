"""TRADES against its equation, written out in NumPy, and against natural training."""

import by_hand
import jax
import numpy as np
import pytest

from rain_jax import methods
from rain_jax.checks import UsageError


def trades(params, beta, smoothing=0.0):
    """CE(f(x), y) + beta sum_k p_k (log p_k - log q_k) over the valid rows."""
    log_p = by_hand.log_softmax(params["clean"])
    log_q = by_hand.log_softmax(params["attacked"])
    target = (1 - smoothing) * np.eye(3)[by_hand.LABEL] + smoothing / 3
    losses = -np.sum(target * log_p, -1) + beta * np.sum(np.exp(log_p) * (log_p - log_q), -1)
    return np.sum(losses[by_hand.VALID])


@pytest.mark.parametrize(("beta", "smoothing"), [(6.0, 0.0), (1.5, 0.2)])
def test_loss_and_gradient_are_the_equations(beta, smoothing):
    """The gradient reaches both tables: it goes through both predictions."""
    objective = methods.trades(by_hand.TABLE, by_hand.lighten, beta=beta, label_smoothing=smoothing)
    state, metrics = by_hand.agrees(
        objective, lambda params: trades(params, beta, smoothing), by_hand.TABLES, by_hand.TRAIL
    )
    assert state["trail"] == 21  # x' and then x
    valid = by_hand.VALID
    for name, table in (("correct", "clean"), ("standing", "attacked")):
        right = np.argmax(by_hand.TABLES[table], -1) == by_hand.LABEL
        assert metrics[name] == np.sum(right[valid])
    change = trades(by_hand.TABLES, 1.0) - trades(by_hand.TABLES, 0.0)
    np.testing.assert_allclose(metrics["kl"], change, rtol=1e-5)
    assert metrics["moved"] == 5


def test_beta_zero_is_natural_training():
    params = by_hand.f32(by_hand.TABLES)
    found = [
        jax.jit(jax.value_and_grad(objective, has_aux=True))(
            params, by_hand.TRAIL, jax.random.key(0), by_hand.ROWS
        )
        for objective in (
            methods.trades(by_hand.TABLE, by_hand.lighten, beta=0.0),
            methods.natural(by_hand.TABLE),
        )
    ]
    np.testing.assert_array_equal(found[0][0][0], found[1][0][0])
    np.testing.assert_array_equal(found[0][1]["clean"], found[1][1]["clean"])
    np.testing.assert_array_equal(found[0][1]["attacked"], 0.0)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="beta=-1"):
        methods.trades(by_hand.TABLE, by_hand.lighten, beta=-1)
    with pytest.raises(UsageError, match=r"label_smoothing=1\.0"):
        methods.trades(by_hand.TABLE, by_hand.lighten, label_smoothing=1.0)
    with pytest.raises(UsageError, match="did you mean 'eval'"):
        methods.trades(by_hand.TABLE, by_hand.lighten, batch_norm="evil")
