"""Laws of every training method, and natural and adversarial training themselves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.methods.common import attack_batch
from rain_jax.norms import linf
from rain_jax.types import Batch, Threat

NETWORK = models.cnn(3, widths=(4, 4), hidden=8, batch_norm=True)
THREAT = Threat(linf, 0.1)
PGD = attacks.pgd(THREAT, steps=3, keep="last")
SMALL = {
    "adversarial": lambda network=NETWORK: methods.adversarial(network, PGD),
    "natural": lambda network=NETWORK: methods.natural(network),
}
ALL = pytest.mark.parametrize("name", methods.__all__)


@pytest.fixture(scope="module")
def batch() -> Batch:
    key = jax.random.key(7)
    image = jax.random.uniform(key, (16, 8, 8, 1))
    return Batch(image, jnp.arange(16) % 3, 100 + jnp.arange(16), jnp.ones(16, bool))


@pytest.fixture(scope="module")
def parts(batch):
    variables = NETWORK.init(jax.random.key(0), batch.image)
    # Running averages away from their start, so that evaluation mode differs from training mode.
    _, state = NETWORK.apply(variables, batch.image, train=True)
    return variables["params"], state


def test_every_method_is_listed():
    assert sorted(SMALL) == sorted(methods.__all__)


@ALL
def test_padding_weighs_nothing(name, batch, parts, key):
    """Images that are not valid add nothing to the sums, whatever they hold.

    Without batch normalisation, whose statistics are the batch's: training batches are full.
    """
    network = models.cnn(3, widths=(4, 4), hidden=8)
    parts = network.init(jax.random.key(0), batch.image)["params"], {}
    objective = SMALL[name](network)
    half = batch._replace(valid=jnp.arange(16) < 8)
    other = half._replace(label=jnp.where(half.valid, half.label, (half.label + 1) % 3))
    a, (_, metrics_a) = objective(*parts, key, half)
    b, (_, metrics_b) = objective(*parts, key, other)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert metrics_a["correct"] == metrics_b["correct"]


@ALL
def test_same_key_same_bits_and_jit_agrees(name, batch, parts, key):
    objective = SMALL[name]()
    a, _ = jax.jit(objective)(*parts, key, batch)
    np.testing.assert_array_equal(a, jax.jit(objective)(*parts, key, batch)[0])
    np.testing.assert_allclose(a, objective(*parts, key, batch)[0], rtol=1e-4)


@ALL
def test_gradient_is_finite_and_reaches_every_parameter(name, batch, parts, key):
    params, state = parts
    gradient, _ = jax.grad(SMALL[name](), has_aux=True)(params, state, key, batch)
    for leaf in jax.tree.leaves(gradient):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(gradient))


def test_natural_is_the_sum_of_cross_entropies(batch, parts, key):
    params, state = parts
    loss, (after, metrics) = methods.natural(NETWORK)(params, state, key, batch)
    logits, expected = NETWORK.apply({"params": params, **state}, batch.image, train=True)
    log_p = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(loss, -jnp.sum(log_p[jnp.arange(16), batch.label]), rtol=1e-5)
    assert metrics["correct"] == jnp.sum(jnp.argmax(logits, -1) == batch.label)
    chex.assert_trees_all_equal(after, expected)


def test_label_smoothing_mixes_in_the_uniform(batch, parts, key):
    params, state = parts
    loss, _ = methods.natural(NETWORK, label_smoothing=0.3)(params, state, key, batch)
    logits, _ = NETWORK.apply({"params": params, **state}, batch.image, train=True)
    log_p = jax.nn.log_softmax(logits)
    target = 0.7 * jax.nn.one_hot(batch.label, 3) + 0.1
    np.testing.assert_allclose(loss, -jnp.sum(target * log_p), rtol=1e-5)


def test_adversarial_with_radius_zero_is_natural(batch, parts, key):
    attack = attacks.pgd(Threat(linf, 0.0), steps=2, keep="last")
    a, _ = methods.adversarial(NETWORK, attack)(*parts, key, batch)
    b, _ = methods.natural(NETWORK)(*parts, key, batch)
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_adversarial_images_are_those_of_the_attack_alone(batch, parts, key):
    """What training sees of an image is what the attack finds for it with the same key."""
    params, state = parts
    images, _ = attack_batch(NETWORK, PGD, params, state, key, batch)

    def logits_fn(key, image):
        return NETWORK.apply({"params": params, **state}, image[None])[0][0]

    for place in (0, 5):
        alone = PGD(
            jax.random.fold_in(key, batch.index[place]), logits_fn,
            batch.image[place], batch.label[place],
        )  # fmt: skip
        np.testing.assert_allclose(images[place], alone, atol=1e-6)


def test_eval_mode_leaves_images_independent_and_batch_mode_does_not(batch, parts, key):
    params, state = parts
    changed = batch._replace(image=batch.image.at[1:].set(1 - batch.image[1:]))
    for mode, same in (("eval", True), ("batch", False), ("train", False)):
        first, second = (
            attack_batch(NETWORK, PGD, params, state, key, b, batch_norm=mode)[0][0]
            for b in (batch, changed)
        )
        assert bool(jnp.allclose(first, second, atol=1e-6)) == same, mode


def test_only_train_mode_moves_the_running_averages(batch, parts, key):
    params, state = parts
    for mode in ("eval", "batch"):
        _, after = attack_batch(NETWORK, PGD, params, state, key, batch, batch_norm=mode)
        chex.assert_trees_all_equal(after, state)
    _, after = attack_batch(NETWORK, PGD, params, state, key, batch, batch_norm="train")
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), after, state)
    assert max(jax.tree.leaves(moved)) > 0


def test_train_mode_averages_follow_the_images_visited(batch, parts, key):
    """The running averages after the attack, computed again from its images one by one."""
    params, state = parts
    _, after = attack_batch(NETWORK, PGD, params, state, key, batch, batch_norm="train")

    def logits(images):
        return NETWORK.apply({"params": params, **state}, images, train=True)[0]

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
    never = lambda key, image: jnp.zeros(3)
    images = jax.vmap(lambda k, x, y: PGD.init(k, never, x, y))(
        keys, batch.image, batch.label
    ).image
    expected = state
    for _ in range(3):
        _, expected = NETWORK.apply({"params": params, **expected}, images, train=True)

        def loss(images):
            log_p = jax.nn.log_softmax(logits(images))
            return -jnp.sum(log_p[jnp.arange(16), batch.label])

        step = 2.5 * 0.1 / 3 * jnp.sign(jax.grad(loss)(images))
        images = jnp.clip(batch.image + jnp.clip(images + step - batch.image, -0.1, 0.1), 0, 1)
    chex.assert_trees_all_close(after, expected, rtol=1e-4, atol=1e-5)


def test_bad_settings_are_refused(batch, parts, key):
    with pytest.raises(UsageError, match="did you mean 'batch'"):
        methods.adversarial(NETWORK, PGD, batch_norm="bach")(*parts, key, batch)
    with pytest.raises(UsageError, match="restarts=1"):
        attack = attacks.pgd(THREAT, steps=2, restarts=2)
        methods.adversarial(NETWORK, attack, batch_norm="train")(*parts, key, batch)
    with pytest.raises(UsageError, match="made of steps"):
        methods.adversarial(NETWORK, attacks.noise(THREAT), batch_norm="train")(*parts, key, batch)
    with pytest.raises(UsageError, match=r"label_smoothing=1.0: expected a number in \[0, 1\)"):
        methods.natural(NETWORK, label_smoothing=1.0)
