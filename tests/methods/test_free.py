"""Free adversarial training against its loop written out, and over devices."""

import by_hand
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rain_jax import attacks, methods, models, optimisers, training
from rain_jax.checks import UsageError
from rain_jax.methods.free import free
from rain_jax.norms import l2, linf
from rain_jax.parallel import choose_devices, place
from rain_jax.types import Batch, Threat

THREAT = Threat(linf, 0.1)
SHAPE = (6, 2, 2, 1)
NATURAL = methods.natural(by_hand.LINEAR)
WEIGHT = np.random.default_rng(1).standard_normal((4, 3))
RATE = 0.05


def batches(count, shape=SHAPE):
    for number in range(count):
        image = jnp.asarray(np.random.default_rng(number).random(shape, np.float32))
        label = (jnp.arange(shape[0]) + number) % 3
        yield Batch(image, label, jnp.arange(shape[0]), jnp.ones(shape[0], bool))


def run(method, params, count):
    state, metrics = method.init({"params": params}), []
    step = jax.jit(method.step)
    for batch in batches(count):
        state, sums = step(jax.random.key(0), state, batch)
        metrics.append(sums)
    return state, metrics


@pytest.mark.parametrize("replays", [1, 3])
def test_it_is_the_authors_loop(replays):
    """One backward pass a replay, at the weights and the perturbation of the replay before."""
    method = free(NATURAL, THREAT, optax.sgd(RATE), batch_shape=SHAPE, replays=replays)
    state, metrics = run(method, by_hand.f32({"weight": WEIGHT}), 4)
    weight, change = WEIGHT.copy(), np.zeros((6, 4))
    for number, batch in enumerate(batches(4)):
        pixels = np.asarray(batch.image, np.float64).reshape(6, 4)
        one_hot, lost = np.eye(3)[np.asarray(batch.label)], 0.0
        for _ in range(replays):
            seen = np.clip(pixels + change, 0, 1)
            log_p = by_hand.log_softmax(seen @ weight)
            lost += -np.sum(one_hot * log_p)
            wrong = np.exp(log_p) - one_hot
            inside = (pixels + change >= 0) & (pixels + change <= 1)
            change = np.clip(change + 0.1 * np.sign(wrong @ weight.T) * inside, -0.1, 0.1)
            weight = weight - RATE * seen.T @ wrong / 6
        np.testing.assert_allclose(metrics[number]["loss"], lost, rtol=1e-5)
        assert metrics[number]["images"] == 6 * replays
    np.testing.assert_allclose(state.params["weight"], weight, atol=1e-5)
    perturbation = np.asarray(state.optimiser.perturbation).reshape(6, 4)
    np.testing.assert_allclose(perturbation, change, atol=1e-6)
    assert state.step == 4


def test_the_first_replay_is_natural_training_and_the_second_sees_fgsm():
    """From the perturbation of zero that a run begins with."""
    params, batch = by_hand.f32({"weight": WEIGHT}), next(batches(1))
    once = free(NATURAL, THREAT, optax.sgd(RATE), batch_shape=SHAPE, replays=1)
    state, metrics = run(once, params, 1)
    expected, logged = run(training.minimise(NATURAL, optax.sgd(RATE)), params, 1)
    np.testing.assert_allclose(state.params["weight"], expected.params["weight"], atol=1e-7)
    np.testing.assert_allclose(metrics[0]["loss"], logged[0]["loss"], rtol=1e-6)
    logits_fn = lambda key, x: jnp.matmul(x.reshape(4), params["weight"], precision="highest")
    attack = attacks.fgsm(THREAT)
    find = jax.jit(jax.vmap(lambda x, y: attack(jax.random.key(0), logits_fn, x, y)))
    images = find(batch.image, batch.label)
    perturbed = np.clip(np.asarray(batch.image) + state.optimiser.perturbation, 0, 1)
    np.testing.assert_allclose(perturbed, images, atol=1e-6)


def remembering():
    """A learning rate of zero: an optimiser whose state is the last gradient."""
    nothing = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return optax.GradientTransformation(
        nothing, lambda gradient, state, params=None: (nothing(gradient), gradient)
    )


def test_without_replays_and_on_one_batch_it_is_training_on_fgsm_and_then_on_pgd():
    """While the weights stay, each step learns from one step of ascent more, from the image itself.

    Through batch statistics, which attacks in the mode "train" see and move as these steps do.
    """
    network, shape = models.cnn(3, widths=(2,), hidden=4, batch_norm=True), (6, 4, 4, 1)
    natural = methods.natural(network)
    method = free(natural, THREAT, remembering(), batch_shape=shape, replays=1)
    batch = next(batches(1, shape))
    # Away from the bounds of pixels, at which the two treat a perturbation differently.
    batch = batch._replace(image=0.2 + 0.6 * batch.image)
    variables = jax.jit(network.init)(jax.random.key(0), batch.image)
    state, step = method.init(variables), jax.jit(method.step)
    pgd = attacks.pgd(THREAT, steps=2, step_size=THREAT.radius, start="clean", keep="last")
    seen = [
        natural,
        methods.adversarial(network, attacks.fgsm(THREAT), batch_norm="train"),
        methods.adversarial(network, pgd, batch_norm="train"),
    ]
    params, model_state, losses = variables["params"], {**variables}, []
    del model_state["params"]
    for objective in seen:
        state, metrics = step(jax.random.key(0), state, batch)
        value_and_gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (loss, (after, _)), gradient = value_and_gradient(
            params, model_state, jax.random.key(1), batch
        )
        losses.append(float(loss))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        mean = jax.tree.map(lambda leaf: np.asarray(leaf) / 6, gradient)
        chex.assert_trees_all_close(state.optimiser.optimiser, mean, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(state.model_state, after, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(state.params, params)
    # Each step of ascent is worth something: no two of the three are alike.
    assert losses[0] < 0.9 * losses[1] < 0.9 * losses[2]


def test_the_perturbation_keeps_to_another_norm_as_well():
    threat = Threat(l2, 0.3)
    method = free(NATURAL, threat, optax.sgd(RATE), batch_shape=SHAPE, replays=3)
    state, _ = run(method, by_hand.f32({"weight": WEIGHT}), 2)
    sizes = np.linalg.norm(np.asarray(state.optimiser.perturbation).reshape(6, -1), axis=1)
    np.testing.assert_allclose(sizes, 0.3, rtol=1e-5)


def test_schedules_and_averages_count_replays():
    rates = []
    schedule = lambda count: rates.append(count) or jnp.where(count < 4, RATE, 0.0)
    average = training.Averaging(0.9, start=2)
    method = free(
        NATURAL, THREAT, optimisers.sgd(schedule, momentum=0.0), batch_shape=SHAPE, replays=2,
        average=average,
    )  # fmt: skip
    params = by_hand.f32({"weight": WEIGHT})
    after = [run(method, params, count)[0] for count in (1, 2, 3)]
    # Four steps of the weights in two batches, and then no more.
    after = jax.tree.map(np.asarray, after)
    assert np.any(after[0].params["weight"] != after[1].params["weight"])
    np.testing.assert_array_equal(after[1].params["weight"], after[2].params["weight"])
    # For two replays the average is a copy, and from then on it lags behind.
    np.testing.assert_array_equal(after[0].average["weight"], after[0].params["weight"])
    assert np.any(after[1].average["weight"] != after[1].params["weight"])


def test_padding_weighs_nothing():
    method = free(NATURAL, THREAT, optax.sgd(RATE), batch_shape=SHAPE, replays=3)
    state = method.init({"params": by_hand.f32({"weight": WEIGHT})})
    half = next(batches(1))._replace(valid=jnp.arange(6) < 3)
    image, label = np.array(half.image), np.array(half.label)
    image[3:], label[3:] = 0.5, 0
    other = half._replace(image=jnp.asarray(image), label=jnp.asarray(label))
    step = jax.jit(method.step)
    found = [step(jax.random.key(0), state, batch) for batch in (half, other)]
    chex.assert_trees_all_close(found[0][0].params, found[1][0].params, atol=1e-6)
    assert found[0][1]["images"] == 9
    np.testing.assert_allclose(found[0][1]["loss"], found[1][1]["loss"], rtol=1e-6)


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_two_devices_train_as_one(mapping):
    """Batch statistics of all images, and each device its own rows of the perturbation."""
    network = models.cnn(3, widths=(4,), hidden=4, batch_norm=True)
    shape = (8, 4, 4, 1)
    method = free(
        methods.natural(network), THREAT, optimisers.sgd(0.02), batch_shape=shape, replays=2
    )
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape[1:])))

    def after(count):
        devices = place(mapping, choose_devices(count))
        program = devices.map(
            lambda state, batch, axis_name: method.step(jax.random.key(5), state, batch, axis_name),
            inputs=(False, True), outputs=(False, False),
        )  # fmt: skip
        state = devices.replicate(method.init(variables))
        for batch in batches(3, shape):
            state, metrics = program(state, devices.split(jax.tree.map(np.asarray, batch)))
        return jax.device_get((state, metrics))

    (one, told_one), (two, told_two) = after(1), after(2)
    chex.assert_trees_all_close(two.params, one.params, atol=1e-5)
    chex.assert_trees_all_close(two.model_state, one.model_state, atol=1e-5)
    chex.assert_trees_all_close(told_two, told_one, rtol=1e-4)
    np.testing.assert_allclose(two.optimiser.perturbation, one.optimiser.perturbation, atol=1e-6)
    # The two halves of the perturbation are different ones.
    assert np.any(two.optimiser.perturbation[:4] != two.optimiser.perturbation[4:])


def test_bad_settings_are_refused():
    make = lambda **options: free(
        NATURAL, THREAT, optax.sgd(RATE), **{"batch_shape": SHAPE, **options}
    )
    with pytest.raises(UsageError, match="replays=0"):
        make(replays=0)
    with pytest.raises(UsageError, match="step_size=0"):
        make(step_size=0)
    for shape in ((12, 2, 2, 1), (6, 2, 2, 3)):
        method = make(batch_shape=shape)
        state = method.init({"params": by_hand.f32({"weight": WEIGHT})})
        with pytest.raises(UsageError, match=r"expected \[6, 2, 2, 1\]"):
            method.step(jax.random.key(0), state, next(batches(1)))
