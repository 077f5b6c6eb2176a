"""Laws of every training method, and natural and adversarial training themselves."""

import functools

import by_hand
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.defences import resize_and_pad
from rain_jax.defences.network import in_front
from rain_jax.gradients import eot
from rain_jax.methods.awp import awp
from rain_jax.methods.common import Staged, attack_batch
from rain_jax.methods.rat import with_perturbations
from rain_jax.norms import linf
from rain_jax.parallel import choose_devices, place, psum
from rain_jax.types import Batch, Threat

NETWORK = models.cnn(3, widths=(4,), hidden=4, batch_norm=True)
THREAT = Threat(linf, 0.1)
PGD = attacks.pgd(THREAT, steps=3, keep="last")
# What only the command of RAT makes: a pattern for each class.
PATTERNS = jnp.asarray(0.1 * np.sign(np.random.default_rng(5).normal(size=(3, 8, 8, 1))), "f4")


def carried(objective):
    """The same with `PATTERNS` in the state that it is given."""

    def find(params, state, *rest):
        return objective.find(params, with_perturbations(state, PATTERNS), *rest)

    return Staged(find, objective.learn)


SMALL = {
    "adversarial": lambda network=NETWORK: methods.adversarial(network, PGD),
    # Without mixing, whose partners are images of the same device.
    "afd": lambda network=NETWORK: methods.afd(network, PGD, mix_stage="none"),
    "fat": lambda network=NETWORK: methods.fat(network, THREAT, steps=3, step_size=0.1),
    "grad_align": lambda network=NETWORK: methods.grad_align(network, attacks.fgsm(THREAT), THREAT),
    "mart": lambda network=NETWORK: methods.mart(network, PGD),
    "n_fgsm": lambda network=NETWORK: methods.n_fgsm(network, THREAT),
    "natural": lambda network=NETWORK: methods.natural(network),
    "rat": lambda network=NETWORK: carried(methods.rat(network)),
    "sense": lambda network=NETWORK: methods.sense(
        network, THREAT, threshold=0.2, steps=3, step_size=0.05, clean_weight=0.5, warmup=0
    ),
    "trades": lambda network=NETWORK: methods.trades(network, PGD),
}
ALL = pytest.mark.parametrize("name", methods.__all__)


@pytest.fixture(scope="module")
def batch() -> Batch:
    places = np.arange(16, dtype=np.int32)
    image = np.random.default_rng(7).random((16, 8, 8, 1), np.float32)
    whole = Batch(image, places % 3, 100 + places, np.ones(16, bool))
    return jax.tree.map(jnp.asarray, whole)


@pytest.fixture(scope="module")
def parts(batch):
    @jax.jit
    def begun(key):
        variables = NETWORK.init(key, batch.image)
        # Running averages away from their start, so that evaluation differs from training mode.
        return variables["params"], NETWORK.apply(variables, batch.image, train=True)[1]

    return begun(jax.random.key(0))


@functools.cache
def program(name):
    """Loss, state and metrics, and the gradient."""
    return jax.jit(jax.value_and_grad(SMALL[name](), has_aux=True))


@functools.cache
def attacking(mode, attack=PGD):
    """Images and state after the attack."""
    return jax.jit(
        lambda params, state, key, batch: attack_batch(
            NETWORK, attack, params, state, key, batch, batch_norm=mode
        )
    )


@jax.jit
def trained(params, state, images):
    """Logits and state in training mode."""
    return NETWORK.apply({"params": params, **state}, images, train=True)


def test_every_method_is_listed():
    assert sorted(SMALL) == sorted(methods.__all__)


@ALL
def test_padding_weighs_nothing(name, batch, parts, key):
    """Images that are not valid add nothing to the sums, whatever they hold.

    Without batch normalisation, whose statistics are the batch's: training batches are full.
    """
    network = models.cnn(3, widths=(4,), hidden=4)
    parts = jax.jit(network.init)(jax.random.key(0), batch.image)["params"], {}
    objective = jax.jit(SMALL[name](network))
    half = batch._replace(valid=jnp.arange(16) < 8)
    other = half._replace(label=jnp.where(half.valid, half.label, (half.label + 1) % 3))
    a, (_, metrics_a) = objective(*parts, key, half)
    b, (_, metrics_b) = objective(*parts, key, other)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert metrics_a["correct"] == metrics_b["correct"]


@ALL
def test_same_key_same_bits_and_jit_agrees(name, batch, parts, key):
    (a, _), _ = program(name)(*parts, key, batch)
    np.testing.assert_array_equal(a, program(name)(*parts, key, batch)[0][0])
    np.testing.assert_allclose(a, SMALL[name]()(*parts, key, batch)[0], rtol=1e-4)


@ALL
def test_gradient_is_finite_and_reaches_every_parameter(name, batch, parts, key):
    _, gradient = program(name)(*parts, key, batch)
    for leaf in map(np.asarray, jax.tree.leaves(gradient)):
        assert np.all(np.isfinite(leaf))
        assert np.max(np.abs(leaf)) > 0


@ALL
def test_two_devices_find_the_loss_and_gradient_of_one(name, batch, parts, key):
    """Batch statistics, attacks and penalties are those of the whole batch."""
    objective = SMALL[name]()

    def body(params, state, batch, axis_name):
        value = jax.value_and_grad(objective, has_aux=True)
        (loss, (state, metrics)), gradient = value(params, state, key, batch, axis_name, 0)
        return *psum((loss, metrics, gradient), axis_name), state

    devices = place("shard_map", choose_devices(2))
    two = devices.map(body, inputs=(False, False, True), outputs=(False,) * 4)
    loss, metrics, gradient, after = jax.device_get(
        two(*devices.replicate(parts), devices.split(batch))
    )
    (one, (state, sums)), slope = jax.device_get(program(name)(*parts, key, batch))
    np.testing.assert_allclose(loss, one, rtol=1e-4)
    chex.assert_trees_all_close(metrics, sums, rtol=1e-4)
    chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(after, state, rtol=1e-4)


# All that climb a gradient, AWP around one of them, and FAT without noise, which is no climbing.
CLIMBING = {
    **{name: make for name, make in SMALL.items() if name not in ("natural", "rat")},
    "awp": lambda network: awp(SMALL["adversarial"](network), gamma=0.1),
    "fat": lambda network: methods.fat(network, THREAT, steps=3, step_size=0.1, noise=0.0),
}


def attacked(found):
    """The images after the attack, in what the first stage of any method finds."""
    if hasattr(found, "images"):
        return found.images
    first, second = found  # of SENSE (batch, what it found), of AWP (found, shifts)
    return second.image if hasattr(second, "image") else first.images


@pytest.fixture(scope="module")
def defended(batch):
    """A linear network behind a random defence, its variables, and labels that it gets right.

    The defence keeps the odd rows and columns, at a random place on grey, mirrored or not. One
    class is ahead of the others at every place.
    """
    ahead = jnp.array([[0.2, 0.0, -0.2]])
    draw = lambda key, images: 0.3 * jax.random.normal(key, (images[0].size, 3)) + ahead
    linear = by_hand.LINEAR._replace(
        init=lambda key, images: {"params": {"weight": draw(key, images)}}
    )
    network = in_front(resize_and_pad(smallest=0.5, canvas=0.6), linear)
    assert network.random

    @jax.jit
    def made(key):
        variables = network.init(key, batch.image)
        keys = jax.random.split(key, len(batch.image))
        return variables, network.apply(variables, batch.image, keys=keys)[0]

    variables, logits = made(jax.random.key(0))
    # SENSE and FAT leave images alone that are misclassified to begin with.
    return network, variables, batch._replace(label=jnp.argmax(logits, -1))


@pytest.mark.parametrize("name", CLIMBING)
def test_an_attack_climbs_through_a_random_defence_and_the_method_learns(name, defended, key):
    """Pixels that the defence drops have no gradient: they stay where the attack began."""
    network, variables, batch = defended
    state = {kind: held for kind, held in variables.items() if kind != "params"}
    objective = CLIMBING[name](network)

    @jax.jit
    def step(params):
        found, after = objective.find(params, state, key, batch, None, 0)
        learn = jax.value_and_grad(objective.learn, has_aux=True)
        return attacked(found), learn(params, after, key, found, None)

    params = variables["params"]
    images, learnt = step(params)
    # Weights of zero have no gradient either: there the attack ends where it began.
    began, _ = step(jax.tree.map(np.zeros_like, params))
    moved = np.abs(images - began) > 1e-6
    kept = np.zeros(moved.shape, bool)
    kept[:, 1::2, 1::2] = True
    assert not np.any(moved & ~kept)
    assert np.mean(moved[kept]) > 0.8
    (loss, _), gradient = learnt
    assert np.isfinite(loss)
    slope = np.asarray(gradient["classifier"]["weight"])
    assert np.all(np.isfinite(slope))
    assert np.all(np.any(slope != 0, axis=0))


def test_natural_is_the_sum_of_cross_entropies(batch, parts, key):

    @jax.jit
    def both(params, state, batch):
        outcome = methods.natural(NETWORK)(params, state, key, batch)
        return outcome, NETWORK.apply({"params": params, **state}, batch.image, train=True)

    (loss, (after, metrics)), (logits, expected) = both(*parts, batch)
    log_p = by_hand.log_softmax(np.float64(logits))
    np.testing.assert_allclose(loss, -np.sum(log_p[np.arange(16), batch.label]), rtol=1e-5)
    assert metrics["correct"] == np.sum(np.argmax(logits, -1) == batch.label)
    chex.assert_trees_all_equal(after, expected)


def test_label_smoothing_mixes_in_the_uniform(batch, parts, key):
    objective = methods.natural(NETWORK, label_smoothing=0.3)
    loss, _ = jax.jit(objective)(*parts, key, batch)
    log_p = by_hand.log_softmax(np.float64(trained(*parts, batch.image)[0]))
    target = 0.7 * np.eye(3)[batch.label] + 0.1
    np.testing.assert_allclose(loss, -np.sum(target * log_p), rtol=1e-5)


def test_adversarial_with_radius_zero_is_natural(batch, parts, key):
    attack = attacks.pgd(Threat(linf, 0.0), steps=2, keep="last")
    a, _ = jax.jit(methods.adversarial(NETWORK, attack))(*parts, key, batch)
    (b, _), _ = program("natural")(*parts, key, batch)
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_adversarial_images_are_those_of_the_attack_alone(batch, parts, key):
    """What training sees of an image is what the attack finds for it with the same key."""
    images, _ = attacking("eval")(*parts, key, batch)

    @jax.jit
    def alone(params, state, key, image, label):
        def logits_fn(key, image):
            return NETWORK.apply({"params": params, **state}, image[None])[0][0]

        return PGD(key, logits_fn, image, label)

    for row in (0, 5):
        own = jax.random.fold_in(key, batch.index[row])
        found = alone(*parts, own, batch.image[row], batch.label[row])
        np.testing.assert_allclose(images[row], found, atol=1e-6)


def test_eval_mode_leaves_images_independent_and_batch_mode_does_not(batch, parts, key):
    image = np.array(batch.image)
    image[1:] = 1 - image[1:]
    changed = batch._replace(image=jnp.asarray(image))
    for mode, same in (("eval", True), ("batch", False), ("train", False)):
        first, second = (
            np.asarray(attacking(mode)(*parts, key, b)[0])[0] for b in (batch, changed)
        )
        assert np.allclose(first, second, atol=1e-6) == same, mode


def test_only_train_mode_moves_the_running_averages(batch, parts, key):
    _, state = parts
    for mode in ("eval", "batch"):
        _, after = attacking(mode)(*parts, key, batch)
        chex.assert_trees_all_equal(after, state)
    _, after = attacking("train")(*parts, key, batch)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))), after, state)
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("estimator", [None, eot(2)], ids=["once", "more than once"])
def test_train_mode_averages_follow_the_images_visited(estimator, batch, parts, key):
    """The running averages after the attack, computed again from its images one by one."""
    params, state = parts
    attack = attacks.pgd(THREAT, steps=3, estimator=estimator)
    assert attack.once == (estimator is None)
    _, after = attacking("train", attack)(params, state, key, batch)

    @jax.jit
    def starts(key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
        never = lambda key, image: jnp.zeros(3)
        return jax.vmap(lambda k, x, y: PGD.init(k, never, x, y).image)(
            keys, batch.image, batch.label
        )

    @jax.jit
    def visited(averages, images):
        """The averages when the images have been seen, and the next ones."""

        def loss(images):
            logits, _ = NETWORK.apply({"params": params, **state}, images, train=True)
            return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(16), batch.label])

        _, averages = NETWORK.apply({"params": params, **averages}, images, train=True)
        step = 2.5 * 0.1 / 3 * jnp.sign(jax.grad(loss)(images))
        moved = batch.image + jnp.clip(images + step - batch.image, -0.1, 0.1)
        return averages, jnp.clip(moved, 0, 1)

    expected, images = state, starts(key)
    for _ in range(3):
        expected, images = visited(expected, images)
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
