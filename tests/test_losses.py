"""Losses against values worked out by hand; all grow as the classifier gets more wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import losses
from rain_jax.checks import UsageError

LOGITS = np.float32([2.0, 1.0, 0.0, -1.0])
OF_LABELS = pytest.mark.parametrize("name", ["cross_entropy", "dlr", "margin"])


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def changed(logits, at, value):
    logits = np.array(logits)
    logits[at] = value
    return logits


def test_values_by_hand():
    def values(z):
        margins, ratios = ((losses.margin, (0, 3)), (losses.dlr, (0, 2)))
        each = [loss(z, label) for loss, labels in (margins, ratios) for label in labels]
        return losses.cross_entropy(z, 1), *each, losses.dlr_targeted(z, 0, 1)

    entropy, behind, ahead, first, third, targeted = run(values, LOGITS)
    weights = np.exp([2.0, 1.0, 0.0, -1.0])
    np.testing.assert_allclose(entropy, -np.log(weights[1] / weights.sum()), rtol=1e-6)
    assert behind == -1.0
    assert ahead == 3.0
    np.testing.assert_allclose(first, -1.0 / 2.0, rtol=1e-6)
    np.testing.assert_allclose(third, 2.0 / 2.0, rtol=1e-6)
    # towards class 1 from label 0: (1 - 2) / (2 - (0 - 1) / 2)
    np.testing.assert_allclose(targeted, -1.0 / 2.5, rtol=1e-6)


def test_configs_know_those_of_labels_and_kl():
    assert losses.__all__ == ["cross_entropy", "dlr", "kl", "margin"]


@OF_LABELS
def test_grows_as_the_label_loses(name):
    loss = jax.jit(getattr(losses, name))
    values = [float(loss(changed(LOGITS, 0, lead), 0)) for lead in (5.0, 3.0, 1.5, 0.0, -3.0)]
    assert values == sorted(values)
    assert values[0] < values[-1]


def some(classes):
    return np.random.default_rng(0).normal(size=classes).astype(np.float32)


@pytest.mark.filterwarnings("ignore:dlr")
@OF_LABELS
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_any_number_of_classes(name, classes):
    value, gradient = run(jax.value_and_grad(getattr(losses, name)), some(classes), 1)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.filterwarnings("ignore:dlr")
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_targeted_dlr_with_any_number_of_classes(classes):
    logits = some(classes)
    nearer = changed(logits, slice(2), [logits[0] - 0.5, logits[1] + 0.5])
    loss = jax.jit(losses.dlr_targeted)
    assert loss(nearer, 0, 1) > loss(logits, 0, 1)


def primitives(jaxpr):
    """The equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("name", ["dlr", "margin"])
def test_the_gradient_compares_no_numbers_that_may_be_rounded_otherwise(name):
    """Logits that are computed twice may differ by a rounding, so which one is equal is no guide.

    The case below is one where `jnp.max` left gradients that were no numbers, on one CPU and with
    few optimisations. So it is asked of the program, too: its gradient asks for no equality of
    floats, nor divides by how many are equal; `dlr` divides twice, by the spread.
    """
    loss = getattr(losses, name)
    program = list(primitives(jax.make_jaxpr(jax.grad(loss))(LOGITS, 2).jaxpr))
    compared = [e for e in program if e.primitive.name in ("eq", "ne")]
    assert compared  # of the label with the classes
    for equation in compared:
        assert all(np.issubdtype(v.aval.dtype, np.integer) for v in equation.invars)
    divided = sum(e.primitive.name == "div" for e in program)
    assert divided == {"dlr": 2, "margin": 0}[name]

    draw = np.random.default_rng(3)
    weight = draw.normal(size=(72, 5)).astype(np.float32)
    images = (0.5 + 0.02 * draw.normal(size=(64, 6, 6, 2))).astype(np.float32)
    label = 2

    def logits(image):
        flat = image.ravel()
        return jnp.sin(flat @ weight) * 3 + jnp.cos(9 * flat) @ weight

    def by_index(z, order):
        """The loss with the order of the classes known."""
        lead = z[jnp.where(order[0] == label, order[1], order[0])] - z[label]
        return lead if name == "margin" else lead / (z[order[0]] - z[order[2]] + 1e-12)

    @jax.jit
    @jax.vmap
    def both(image):
        order = jnp.argsort(-logits(image))
        ways = loss, lambda z, _: by_index(z, order)
        return [jax.value_and_grad(lambda x, f=f: f(logits(x), label))(image) for f in ways]

    (found, gradients), (expected, slopes) = jax.device_get(both(images))
    assert np.all(np.isfinite(gradients))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients, slopes, rtol=1e-3, atol=1e-3)
    # `dlr` is flat where the label is third: its margin is the spread.
    steep = np.max(np.abs(gradients), axis=(1, 2, 3)) > 0.1
    assert np.mean(steep) > (0.5 if name == "dlr" else 0.99)


@pytest.mark.parametrize(
    "loss", [losses.dlr, lambda logits, label: losses.dlr_targeted(logits, label, 1 - label)]
)
def test_dlr_of_two_classes_is_the_margin_and_says_so_once(loss):
    losses._say_once_that_dlr_is_the_margin.cache_clear()
    with pytest.warns(UserWarning, match="dlr: below three classes .* margin") as told:
        assert float(jax.jit(loss)(LOGITS[:2], 0)) == -1.0
    assert len(told) == 1
    # Not again, whatever it is traced for: a warning would be an error here.
    assert float(jax.jit(jax.grad(loss))(LOGITS[:2], 0)[1]) == 1.0
    assert float(jax.jit(loss)(LOGITS[:2], 1)) == 1.0


def test_lead_by_hand():
    lead = jax.jit(losses.lead)
    assert float(lead(LOGITS, 0, 2)) == -2.0
    assert float(lead(LOGITS.astype(jnp.bfloat16), 3, 1)) == 2.0


def test_dlr_ignores_scale_and_shift():
    dlr = jax.jit(losses.dlr)
    np.testing.assert_allclose(dlr(3 * LOGITS + 7, 1), dlr(LOGITS, 1), rtol=1e-5)


@OF_LABELS
def test_low_precision_logits_give_float32(name):
    low = LOGITS.astype(jnp.bfloat16)
    assert jax.eval_shape(getattr(losses, name), low, 0).dtype == jnp.float32


def test_large_logits_do_not_overflow():
    big = np.float32([1e4, -1e4, 0.0])
    value, gradient = run(jax.value_and_grad(losses.cross_entropy), big, 1)
    np.testing.assert_allclose(value, 2e4)
    assert np.all(np.isfinite(gradient))


JITTED_MARGIN = jax.jit(losses.margin)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_not_finite_are_as_wrong_as_can_be(bad, place):
    """As the judge has them, so that an attack keeps their image."""
    assert JITTED_MARGIN(changed(np.zeros(3, np.float32), place, bad), 1) == np.inf


def test_kl_is_zero_at_equality_and_by_hand_elsewhere():
    kl = jax.jit(jax.value_and_grad(losses.kl, argnums=1))
    assert abs(float(kl(LOGITS, LOGITS + 3)[0])) < 1e-6
    p, q = np.float32([0.7, 0.3]), np.float32([0.4, 0.6])
    value, through_reference = jax.device_get(kl(np.log(q), np.log(p)))
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q)), rtol=1e-5)
    assert np.max(np.abs(through_reference)) > 0.01


def test_kl_with_a_label_is_refused():
    with pytest.raises(UsageError, match=r"loss='kl': expected logits \(4,\)"):
        losses.kl(LOGITS, 1)


def test_smoothed_labels():
    def smoothed(z):
        hard = losses.soft_cross_entropy(z, losses.smooth(1, 4, 0.0))
        return losses.smooth(1, 4, 0.2), hard, losses.cross_entropy(z, 1)

    target, hard, expected = run(smoothed, LOGITS)
    np.testing.assert_allclose(target, [0.05, 0.85, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(hard, expected, rtol=1e-6)


def test_targeted_turns_the_sign():
    turned = losses.targeted(losses.cross_entropy)
    found, expected = run(lambda z: (turned(z, 2), losses.cross_entropy(z, 2)), LOGITS)
    assert found == -expected
