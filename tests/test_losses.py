"""Losses against values worked out by hand; all grow as the classifier gets more wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import losses
from rain_jax.checks import UsageError

LOGITS = jnp.array([2.0, 1.0, 0.0, -1.0])
OF_LABELS = pytest.mark.parametrize("name", ["cross_entropy", "dlr", "margin"])


def test_values_by_hand():
    weights = np.exp([2.0, 1.0, 0.0, -1.0])
    np.testing.assert_allclose(
        losses.cross_entropy(LOGITS, 1), -np.log(weights[1] / weights.sum()), rtol=1e-6
    )
    assert float(losses.margin(LOGITS, 0)) == -1.0
    assert float(losses.margin(LOGITS, 3)) == 3.0
    np.testing.assert_allclose(losses.dlr(LOGITS, 0), -1.0 / 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses.dlr(LOGITS, 2), 2.0 / 2.0, rtol=1e-6)
    # towards class 1 from label 0: (1 - 2) / (2 - (0 - 1) / 2)
    np.testing.assert_allclose(losses.dlr_targeted(LOGITS, 0, 1), -1.0 / 2.5, rtol=1e-6)


def test_configs_know_those_of_labels_and_kl():
    assert losses.__all__ == ["cross_entropy", "dlr", "kl", "margin"]


@OF_LABELS
def test_grows_as_the_label_loses(name):
    loss = getattr(losses, name)
    values = [float(loss(LOGITS.at[0].set(lead), 0)) for lead in (5.0, 3.0, 1.5, 0.0, -3.0)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.filterwarnings("ignore:dlr")
@OF_LABELS
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_any_number_of_classes(name, classes, key):
    logits = jax.random.normal(key, (classes,))
    value, gradient = jax.value_and_grad(getattr(losses, name))(logits, 1)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.filterwarnings("ignore:dlr")
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_targeted_dlr_with_any_number_of_classes(classes, key):
    logits = jax.random.normal(key, (classes,))
    before = losses.dlr_targeted(logits, 0, 1)
    assert losses.dlr_targeted(logits.at[1].add(0.5).at[0].add(-0.5), 0, 1) > before


@pytest.mark.parametrize(
    "loss", [losses.dlr, lambda logits, label: losses.dlr_targeted(logits, label, 1 - label)]
)
def test_dlr_of_two_classes_is_the_margin_and_says_so_once(loss):
    losses._say_once_that_dlr_is_the_margin.cache_clear()
    with pytest.warns(UserWarning, match="dlr: below three classes .* margin") as told:
        assert float(jax.jit(loss)(LOGITS[:2], 0)) == -1.0
    assert len(told) == 1
    # Not again, whatever it is traced for: a warning would be an error here.
    assert float(jax.grad(loss)(LOGITS[:2], 0)[1]) == 1.0
    assert float(loss(LOGITS[:2], 1)) == 1.0


def test_lead_by_hand():
    assert float(losses.lead(LOGITS, 0, 2)) == -2.0
    assert float(losses.lead(LOGITS.astype(jnp.bfloat16), 3, 1)) == 2.0


def test_dlr_ignores_scale_and_shift():
    np.testing.assert_allclose(losses.dlr(3 * LOGITS + 7, 1), losses.dlr(LOGITS, 1), rtol=1e-5)


@OF_LABELS
def test_low_precision_logits_give_float32(name):
    assert getattr(losses, name)(LOGITS.astype(jnp.bfloat16), 0).dtype == jnp.float32


def test_large_logits_do_not_overflow():
    big = jnp.array([1e4, -1e4, 0.0])
    value, gradient = jax.value_and_grad(losses.cross_entropy)(big, 1)
    np.testing.assert_allclose(value, 2e4)
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_not_finite_are_as_wrong_as_can_be(bad, place):
    """As the judge has them, so that an attack keeps their image."""
    assert losses.margin(jnp.zeros(3).at[place].set(bad), 1) == jnp.inf


def test_kl_is_zero_at_equality_and_by_hand_elsewhere():
    assert abs(float(losses.kl(LOGITS, LOGITS + 3))) < 1e-6
    p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    np.testing.assert_allclose(
        losses.kl(jnp.log(q), jnp.log(p)), np.sum(p * np.log(p / q)), rtol=1e-5
    )
    through_reference = jax.grad(losses.kl, argnums=1)(jnp.log(q), jnp.log(p))
    assert float(jnp.max(jnp.abs(through_reference))) > 0.01


def test_kl_with_a_label_is_refused():
    with pytest.raises(UsageError, match=r"loss='kl': expected logits \(4,\)"):
        losses.kl(LOGITS, 1)


def test_smoothed_labels():
    target = losses.smooth(1, 4, 0.2)
    np.testing.assert_allclose(target, [0.05, 0.85, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(
        losses.soft_cross_entropy(LOGITS, losses.smooth(1, 4, 0.0)),
        losses.cross_entropy(LOGITS, 1),
        rtol=1e-6,
    )


def test_targeted_turns_the_sign():
    assert losses.targeted(losses.cross_entropy)(LOGITS, 2) == -losses.cross_entropy(LOGITS, 2)
