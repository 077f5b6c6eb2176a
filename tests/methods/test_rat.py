"""RAT's objective: what it adds to an image, what it weighs, where perturbations are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rain_jax import methods, models, training
from rain_jax.checks import UsageError
from rain_jax.methods.rat import carrying, perturbed, with_perturbations, without_perturbations
from rain_jax.types import Batch

CLASSES = 4
NETWORK = models.cnn(CLASSES, widths=(4, 4), hidden=8)
NORMED = models.cnn(CLASSES, widths=(4, 4), hidden=8, batch_norm=True)
DRAW = np.random.default_rng(1)
IMAGES = jnp.asarray(DRAW.random((12, 8, 8, 1), np.float32))
BATCH = Batch(
    IMAGES, jnp.arange(12) % CLASSES, 50 + jnp.arange(12, dtype=jnp.int32), jnp.arange(12) < 10
)
PATTERNS = jnp.asarray(0.2 * DRAW.normal(size=(CLASSES, 8, 8, 1)), jnp.float32)
PARAMS = jax.jit(NETWORK.init)(jax.random.key(0), IMAGES)["params"]
STATE = {"perturbations": PATTERNS}


@jax.jit
def moved_by(key, image, label):
    return perturbed(key, image, label, PATTERNS)


@jax.jit
def log_p(image):
    return jax.nn.log_softmax(NETWORK.apply({"params": PARAMS}, image[None])[0][0])


def outcome(network, key, state=STATE, batch=BATCH, **options):
    """Loss, and state and metrics, in one program."""
    return jax.jit(methods.rat(network, **options))(PARAMS, state, key, batch)


def test_every_other_class_is_as_likely_and_the_own_one_never_comes(key):
    keys = jax.random.split(key, 3000)
    one = lambda k, label: perturbed(k, IMAGES[0], label, PATTERNS)[1]
    draw = jax.jit(jax.vmap(one, (0, None)))
    for label in range(CLASSES):
        counts = np.bincount(draw(keys, label), minlength=CLASSES)
        assert counts[label] == 0
        others = np.delete(counts, label)
        np.testing.assert_allclose(others, 1000, atol=110)  # four standard deviations


def test_the_image_is_moved_by_the_pattern_of_its_class_and_clipped(key):
    image, target = map(np.asarray, moved_by(key, IMAGES[0], 1))
    expected = np.clip(np.asarray(IMAGES)[0] + np.asarray(PATTERNS)[target], 0.0, 1.0)
    np.testing.assert_array_equal(image, expected)
    assert np.any((image == 0) | (image == 1))


def test_with_a_uniform_scale_it_is_moved_part_of_the_way(key):
    middle = jnp.full((8, 8, 1), 0.5)
    flat = jnp.broadcast_to(jnp.float32(0.25), (CLASSES, 8, 8, 1))
    keys = jax.random.split(key, 2000)
    move = lambda k: perturbed(k, middle, jnp.int32(0), flat, scale="uniform")[0][0, 0, 0]
    share = (np.asarray(jax.jit(jax.vmap(move))(keys)) - 0.5) / 0.25
    assert np.min(share) >= 0
    assert np.max(share) < 1
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_the_loss_is_the_weighted_sum_over_valid_images(weight, key):
    loss, (_, metrics) = outcome(NETWORK, key, clean_weight=weight)
    expected, standing, hit, moved = 0.0, 0, 0, 0.0
    for row in range(10):
        label = int(BATCH.label[row])
        own = jax.random.fold_in(key, BATCH.index[row])
        image, target = moved_by(own, IMAGES[row], label)
        clean, misled = (np.asarray(log_p(x)) for x in (IMAGES[row], image))
        expected += -weight * clean[label] - (1 - weight) * misled[label]
        standing += np.argmax(misled) == label
        hit += np.argmax(misled) == target
        moved += np.max(np.abs(np.asarray(image) - IMAGES[row]))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (metrics["standing"], metrics["hit"]) == (standing, hit)
    np.testing.assert_allclose(metrics["moved"], moved, rtol=1e-5)


def test_without_a_perturbation_or_a_weight_for_it_it_is_natural_training(key):
    natural, _ = jax.jit(methods.natural(NETWORK))(PARAMS, {}, key, BATCH)
    none = {"perturbations": jnp.zeros_like(PATTERNS)}
    np.testing.assert_allclose(outcome(NETWORK, key, none)[0], natural, rtol=1e-6)
    np.testing.assert_allclose(outcome(NETWORK, key, clean_weight=1.0)[0], natural, rtol=1e-6)


def test_a_network_that_carries_them_classifies_as_before():
    network = carrying(NORMED)
    variables = jax.jit(network.init)(jax.random.key(0), IMAGES)
    own = jax.jit(NORMED.init)(jax.random.key(0), IMAGES)
    assert variables["perturbations"].shape == (CLASSES, 8, 8, 1)
    assert not np.any(variables["perturbations"])
    assert jax.tree.structure(without_perturbations(variables)) == jax.tree.structure(own)
    for carries in (network, carrying(network)):
        given = with_perturbations(own, PATTERNS)
        for train in (False, True):
            # In one program, which rounds alike.
            (logits, state), (expected, rest) = jax.jit(
                lambda given, own, c=carries, t=train: (
                    c.apply(given, IMAGES, t), NORMED.apply(own, IMAGES, t)
                )
            )(given, own)  # fmt: skip
            np.testing.assert_array_equal(logits, expected)
            np.testing.assert_array_equal(state["perturbations"], PATTERNS)
            assert set(state) == {*rest, "perturbations"}


def test_training_keeps_them_and_new_ones_need_no_new_program(key):
    """A step is compiled once: a round replaces what is in the state."""
    traced = 0

    def objective(*arguments):
        nonlocal traced
        traced += 1
        return methods.rat(NORMED)(*arguments)

    method = training.minimise(objective, optax.sgd(0.1))
    variables = jax.jit(carrying(NORMED).init)(jax.random.key(0), IMAGES)
    step = jax.jit(method.step)
    losses = []
    for patterns in (PATTERNS, 2 * PATTERNS):
        state = method.init(with_perturbations(variables, patterns))
        after, metrics = step(key, state, BATCH)
        losses.append(float(metrics["loss"]))
        np.testing.assert_array_equal(after.model_state["perturbations"], patterns)
    assert traced == 1
    assert losses[0] != losses[1]


def test_an_image_is_perturbed_alike_in_any_batch(key):
    find = jax.jit(lambda batch: methods.rat(NETWORK).find(PARAMS, STATE, key, batch, None, 0)[0])
    found = find(BATCH)
    turned = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[::-1]), BATCH)
    np.testing.assert_array_equal(np.asarray(find(turned).images)[::-1], found.images)


def test_bad_settings_are_refused(key):
    with pytest.raises(UsageError, match=r"clean_weight=1.5: expected a number in \[0, 1\]"):
        methods.rat(NETWORK, clean_weight=1.5)
    with pytest.raises(UsageError, match=r"scale='uniforn'.*did you mean 'uniform'"):
        methods.rat(NETWORK, scale="uniforn")
    with pytest.raises(UsageError, match=r"perturbations \[4, 8, 8, 1\] in the model state.*none"):
        methods.rat(NETWORK)(PARAMS, {}, key, BATCH)
    with pytest.raises(UsageError, match=r"shape \[3, 8, 8, 1\]"):
        methods.rat(NETWORK)(PARAMS, {"perturbations": PATTERNS[:3]}, key, BATCH)
