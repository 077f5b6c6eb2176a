"""Adversarial weight perturbation against its equation, around any objective."""

from functools import partial

import by_hand
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.methods.awp import awp
from rain_jax.norms import linf
from rain_jax.parallel import choose_devices, place, psum
from rain_jax.types import Batch, Network, Threat

NETWORK = models.cnn(3, widths=(4,), hidden=4, batch_norm=True)
THREAT = Threat(linf, 0.05)
ADVERSARIAL = methods.adversarial(NETWORK, attacks.fgsm(THREAT))
IMAGES = jnp.asarray(np.random.default_rng(4).random((8, 8, 8, 1), np.float32))
BATCH = Batch(IMAGES, jnp.arange(8) % 3, jnp.arange(8), jnp.ones(8, bool))
SMALL = jnp.asarray(np.random.default_rng(5).random((6, 2, 2, 1), np.float32))


@pytest.fixture(scope="module")
def parts():
    variables = jax.jit(NETWORK.init)(jax.random.key(0), IMAGES)
    return variables.pop("params"), variables


def test_by_hand(key):
    """Natural training of a linear model: V = gamma |W| G / |G|, the gradient is that at W + V."""
    rows = by_hand.ROWS
    batch = rows._replace(image=SMALL)
    pixels = np.asarray(batch.image, np.float64).reshape(6, 4)
    weight = np.random.default_rng(1).standard_normal((4, 3))

    def loss(params):
        log_p = by_hand.log_softmax(pixels @ params["weight"])
        return -np.sum(log_p[np.arange(6), by_hand.LABEL][by_hand.VALID])

    uphill = by_hand.slopes(loss, {"weight": weight})["weight"]
    shift = 0.3 * np.linalg.norm(weight) * uphill / np.linalg.norm(uphill)
    there = {"weight": weight + shift}
    objective = awp(methods.natural(by_hand.LINEAR), gamma=0.3)
    (found, _), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        by_hand.f32({"weight": weight}), {}, key, batch
    )
    np.testing.assert_allclose(found, loss(there), rtol=1e-5)
    assert loss(there) > loss({"weight": weight}) + 0.1
    expected = by_hand.slopes(loss, there)["weight"]
    np.testing.assert_allclose(gradient["weight"], expected, rtol=1e-5, atol=1e-5)


def two_layers():
    """A network of two kernels and two biases, and parameters of unlike sizes for it."""

    def apply(variables, images, train=False, axis_name=None, keys=None):
        params, flat = variables["params"], images.reshape(len(images), -1)
        product = partial(jnp.matmul, precision="highest")
        inner = jnp.tanh(product(flat, params["first"]) + params["inner"][None])
        return product(inner, params["second"]) + params["last"][None], {}

    draw = np.random.default_rng(2).standard_normal
    sizes = {"first": (4, 5), "inner": (5,), "second": (5, 3), "last": (3,)}
    scales = {"first": 1.0, "inner": 0.5, "second": 3.0, "last": 0.5}
    return Network(lambda key, images: {}, apply, 3), {
        name: scales[name] * draw(size) for name, size in sizes.items()
    }


def test_by_hand_around_an_attack_with_several_kernels(key):
    """PGD against W, then V = gamma |W| G / |G| kernel by kernel, then the gradient at W + V."""
    network, params = two_layers()
    image = SMALL
    pixels, radius, gamma = np.asarray(image, np.float64).reshape(6, 4), 0.1, 0.2

    def losses(params, pixels):
        inner = np.tanh(pixels @ params["first"] + params["inner"])
        log_p = by_hand.log_softmax(inner @ params["second"] + params["last"])
        return -log_p[np.arange(6), by_hand.LABEL]

    found = {"pixels": pixels}
    for _ in range(2):
        slope = by_hand.slopes(lambda at: np.sum(losses(params, at["pixels"])), found)["pixels"]
        change = found["pixels"] + 0.08 * np.sign(slope) - pixels
        found = {"pixels": np.clip(pixels + np.clip(change, -radius, radius), 0, 1)}

    def loss(params):
        return np.sum(losses(params, found["pixels"])[by_hand.VALID])

    uphill, there = by_hand.slopes(loss, params), dict(params)
    for name in ("first", "second"):
        weight, slope = params[name], uphill[name]
        there[name] = weight + gamma * np.linalg.norm(weight) * slope / np.linalg.norm(slope)

    attack = attacks.pgd(Threat(linf, radius), steps=2, step_size=0.08, start="clean", keep="last")
    objective = awp(methods.adversarial(network, attack), gamma=gamma)
    (value, (_, metrics)), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        by_hand.f32(params), {}, key, by_hand.ROWS._replace(image=image)
    )
    np.testing.assert_allclose(value, loss(there), rtol=1e-5)
    for name, expected in by_hand.slopes(loss, there).items():
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-5, atol=1e-5)
    furthest = np.max(np.abs(found["pixels"] - pixels), axis=1)[by_hand.VALID]
    np.testing.assert_allclose(metrics["moved"], np.sum(furthest), rtol=1e-5)
    # Both parts of the adversary are worth something, and so is each kernel.
    assert np.sum(losses(params, pixels)[by_hand.VALID]) + 0.1 < loss(params)
    for name in ("first", "second"):
        assert loss({**there, name: params[name]}) + 0.1 < loss(there)


def test_gamma_zero_is_the_objective_itself(parts, key):
    found = [
        jax.jit(jax.value_and_grad(objective, has_aux=True))(*parts, key, BATCH)
        for objective in (awp(ADVERSARIAL, gamma=0.0), ADVERSARIAL)
    ]
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_each_array_moves_by_gamma_times_its_size_and_vectors_stay(parts, key):
    params, state = parts
    find = jax.jit(lambda: awp(ADVERSARIAL, gamma=0.02).find(params, state, key, BATCH, None, 0))
    (found, shifts), _ = find()
    both = (map(np.asarray, jax.tree.leaves(tree)) for tree in (params, shifts))
    for weights, shift in zip(*both, strict=True):
        if weights.ndim > 1:
            size = 0.02 * np.linalg.norm(weights.ravel())
            np.testing.assert_allclose(np.linalg.norm(shift.ravel()), size, rtol=1e-5)
        else:
            np.testing.assert_array_equal(shift, 0.0)
    # The images are those that the objective finds against the weights as they are.
    plain, _ = jax.jit(lambda: ADVERSARIAL.find(params, state, key, BATCH, None, 0))()
    np.testing.assert_array_equal(found.images, plain.images)


def test_weights_without_a_gradient_stay(key):
    """No division by zero: a linear model of black images."""
    rows, params = by_hand.ROWS, {"weight": jnp.ones((4, 3))}
    objective = awp(methods.natural(by_hand.LINEAR), gamma=0.1)
    (_, shifts), _ = jax.jit(lambda: objective.find(params, {}, key, rows, None, 0))()
    np.testing.assert_array_equal(shifts["weight"], 0.0)


def test_running_averages_see_one_pass_and_the_warm_up_waits(key):
    objective = awp(
        methods.trades(by_hand.TABLE, by_hand.lighten), gamma=0.1, warmup=2, steps_per_epoch=3
    )
    params = by_hand.f32(by_hand.TABLES)
    loss_at = jax.jit(lambda step: objective(params, by_hand.TRAIL, key, by_hand.ROWS, None, step))
    losses = []
    for step in (0, 5, 6):
        loss, (state, _) = loss_at(step)
        assert state["trail"] == 21
        losses.append(float(loss))
    assert losses[0] == losses[1] < losses[2]


def test_two_devices_move_the_weights_as_one(parts, key):
    """Each device has half of the images; the way up is that of all."""
    params, state = parts
    objective = awp(methods.natural(NETWORK), gamma=0.1)

    def body(params, state, batch, axis_name):
        value = jax.value_and_grad(objective, has_aux=True)
        (loss, _), gradient = value(params, state, key, batch, axis_name, 0)
        return psum((loss, gradient), axis_name)

    devices = place("shard_map", choose_devices(2))
    program = devices.map(body, inputs=(False, False, True), outputs=False)
    loss, gradient = program(*devices.replicate(parts), devices.split(BATCH))
    alone = jax.jit(body, static_argnums=3)(params, state, BATCH, None)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(gradient), jax.device_get(alone[1]), rtol=1e-4, atol=1e-4
    )


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="gamma=-1"):
        awp(ADVERSARIAL, gamma=-1)
    with pytest.raises(UsageError, match="warmup=-1"):
        awp(ADVERSARIAL, gamma=0.1, warmup=-1)
    with pytest.raises(UsageError, match="two stages"):
        awp(lambda *arguments: None, gamma=0.1)
