"""SENSE: its adversary against a plain loop, its promises, its losses in NumPy."""

import functools
import itertools

import by_hand
import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.losses import cross_entropy, kl
from rain_jax.methods.sense import sensible
from rain_jax.norms import l2, linf, random_start
from rain_jax.types import Batch, Threat

SHAPE, COUNT = (3, 3, 1), 64
THREAT = Threat(linf, 0.15)
SIZES = dict(steps=6, step_size=0.05)
DRAW = np.random.default_rng(8)  # some images are right with near certainty, and some are not
PIXELS = DRAW.random((COUNT, *SHAPE), np.float32)
IMAGES = jnp.asarray(PIXELS)
WEIGHTS = DRAW.normal(size=(2, 9, 3)).astype(np.float32)
KEYS = drawn.keys(3, COUNT)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def logits_fn(key, image):
    """A small curved classifier, its sums written out so that batches round alike."""
    flat = image.reshape(-1, 1)
    return 2 * jnp.tanh(jnp.sum(flat * WEIGHTS[0], 0)) + jnp.sum(flat**2 * WEIGHTS[1], 0)


@jax.jit
def predicted(images):
    return jnp.argmax(jax.vmap(lambda x: logits_fn(None, x))(images), -1)


def _labels():
    """Right for three images in four."""
    own = np.asarray(predicted(IMAGES))
    return jnp.asarray(np.where(np.arange(COUNT) % 4 == 0, (own + 1) % 3, own))


LABELS = _labels()


@jax.jit
@jax.vmap
def start(key, image):
    """Where an image's ascent begins."""
    return random_start(THREAT, jax.random.split(key, 3)[0], image)


@functools.cache
def run(threshold, threat=THREAT, **options):
    one = functools.partial(sensible, threat, threshold=threshold, **{**SIZES, **options})
    many = jax.jit(jax.vmap(lambda key, image, label: one(key, logits_fn, image, label)))
    return jax.tree.map(np.asarray, many(KEYS, IMAGES, LABELS))


@jax.jit
def entropies(images):
    return jax.vmap(lambda x, y: cross_entropy(logits_fn(None, x), y))(images, LABELS)


@jax.jit
def changes(images):
    return jax.vmap(lambda x, c: kl(logits_fn(None, x), logits_fn(None, c)))(images, IMAGES)


def losses(images):
    return np.asarray(entropies(images))


@functools.cache
def slope(form):
    measure = {"at": entropies, "trade": changes}[form]
    return jax.jit(jax.grad(lambda x: jnp.sum(measure(x))))


def plain_loop(threshold, adaptive, form):
    """The authors' control flow: all images at once, and an early way out."""
    cut = -np.log(threshold)
    measure, climb = {"at": entropies, "trade": changes}[form], slope(form)
    clean, radius = PIXELS, np.float32(THREAT.radius)
    images = np.array(start(KEYS, IMAGES))
    stopped = (np.asarray(predicted(images)) != LABELS) | (losses(images) > cut)
    ignored = stopped.copy()
    for _ in range(SIZES["steps"]):
        if stopped.all():
            break
        step = np.float32(SIZES["step_size"]) * np.sign(climb(images))
        change = np.clip(images + step - clean, -radius, radius)
        moved = np.clip(clean + change, 0, 1).astype(np.float32)
        if adaptive:
            stopped = stopped | (np.asarray(measure(moved)) > cut)
        images = np.where(stopped[:, None, None, None], images, moved)
    return images, ignored, stopped & ~ignored


@pytest.mark.parametrize("form", ["at", "trade"])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_it_is_the_authors_loop(threshold, adaptive, form):
    if form == "trade":
        threshold = 1 - threshold / 10  # as a KL: smaller changes
    expected, ignored, reverted = plain_loop(threshold, adaptive, form)
    found = run(threshold, adaptive=adaptive, form=form)
    np.testing.assert_array_equal(found.ignored, ignored)
    np.testing.assert_array_equal(found.reverted, reverted)
    np.testing.assert_allclose(found.image, expected, atol=1e-6)
    assert 0 < ignored.sum() < COUNT
    assert (reverted.sum() > 0) == adaptive


@pytest.mark.parametrize("threat", [THREAT, Threat(l2, 0.4)], ids=["linf", "l2"])
@pytest.mark.parametrize("bisect", [False, True])
def test_keeps_to_the_threat(threat, bisect):
    found = run(0.5, threat, bisect=bisect)
    assert np.all((found.image >= 0) & (found.image <= 1))
    changes = np.abs(np.float64(found.image) - PIXELS).reshape(COUNT, -1)
    sizes = changes.max(1) if threat.norm is linf else np.linalg.norm(changes, axis=1)
    assert np.max(sizes) <= threat.radius + 1e-6


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_an_image_that_is_not_ignored_stays_above_the_threshold(threshold):
    found = run(threshold)
    kept = ~found.ignored
    assert np.all(np.where(kept, losses(found.image), 0) <= -np.log(threshold) + 1e-5)
    if threshold >= 0.5:
        right = np.asarray(predicted(found.image)) == LABELS
        assert np.all(right | ~kept)


def test_an_ignored_image_is_its_random_start():
    found = run(0.7)
    begun, ignored = np.asarray(start(KEYS, IMAGES)), found.ignored
    np.testing.assert_array_equal(found.image[ignored], begun[ignored])
    # They are the wrong ones and the unsure ones, at the start.
    wrong = np.asarray(predicted(begun)) != LABELS
    np.testing.assert_array_equal(ignored, wrong | (losses(begun) > -np.log(0.7)))


def test_without_a_threshold_to_speak_of_it_is_pgd():
    """From the same key; only images that are right at their start are attacked."""
    attack = attacks.pgd(THREAT, **SIZES, keep="last")
    many = jax.jit(jax.vmap(lambda k, x, y: attack(k, logits_fn, x, y)))
    expected = np.asarray(many(KEYS, IMAGES, LABELS))
    for found in (run(1e-12), run(0.5, adaptive=False)):
        attacked = ~np.asarray(found.ignored)
        assert attacked.sum() > 10
        np.testing.assert_array_equal(found.image[attacked], expected[attacked])
        assert not found.reverted.any()


def test_at_threshold_one_the_image_comes_back():
    np.testing.assert_array_equal(run(1.0).image, IMAGES)


def test_same_key_same_images_alone_or_among_others():
    one = functools.partial(sensible, THREAT, threshold=0.5, **SIZES)
    call = jax.jit(lambda key, place: one(key, logits_fn, IMAGES[place], LABELS[place]).image)
    seeds = jax.jit(jax.vmap(call, (0, None)))(KEYS[:3], 5)
    for number in range(3):
        np.testing.assert_allclose(seeds[number], call(KEYS[number], 5), atol=1e-6)
    np.testing.assert_allclose(call(KEYS[5], 5), run(0.5).image[5], atol=1e-6)
    # The label of image 0 is wrong, so it stays at its start.
    assert np.any(np.asarray(call(KEYS[0], 0)) != call(KEYS[1], 0))


def test_a_smaller_threshold_stops_fewer_images_and_hurts_more():
    found = [run(threshold) for threshold in THRESHOLDS]
    for smaller, larger in itertools.pairwise(found):
        assert np.all(~smaller.ignored | larger.ignored)
        stopped = smaller.ignored | smaller.reverted
        assert np.all(~stopped | larger.ignored | larger.reverted)
        assert np.mean(losses(smaller.image)) > np.mean(losses(larger.image))


def test_a_reverted_image_of_a_linear_model_is_within_a_step_of_the_threshold():
    """Binary: with margin m = w x, p_y = sigmoid(m), and a step lowers m by step * |w|_1."""
    weight = np.random.default_rng(8).normal(size=SHAPE).astype(np.float32)
    offset = np.sum(0.5 * weight) - 1.0

    def margin_of(images):
        return np.sum(weight * images, axis=(1, 2, 3)) - offset

    line = lambda key, image: jnp.stack([jnp.sum(weight * image) - offset, 0.0])
    images = jnp.full((COUNT, *SHAPE), 0.5)  # the pixel bounds stay out of the way
    attack = functools.partial(sensible, Threat(linf, 0.4), threshold=0.6, steps=12, step_size=0.03)

    def run(**options):
        many = jax.jit(jax.vmap(lambda key, image: attack(key, line, image, 0, **options)))
        return jax.tree.map(np.asarray, many(KEYS, images))

    found = run()
    level, reach = np.log(0.6 / 0.4), 0.03 * np.sum(np.abs(weight))
    margins = margin_of(found.image)[found.reverted]
    assert len(margins) > 10
    assert margins.min() >= level - 1e-5
    assert margins.max() < level + reach
    # and by bisection at the threshold itself
    exact = run(bisect=True)
    np.testing.assert_array_equal(exact.reverted, found.reverted)
    margins = margin_of(exact.image)[exact.reverted]
    np.testing.assert_allclose(margins, level, atol=1e-4)


# --- the method --------------------------------------------------------------------------------


BATCH = Batch(
    jnp.asarray(DRAW.random((6, 2, 2, 1), np.float32)), by_hand.ROWS.label, by_hand.ROWS.index,
    by_hand.ROWS.valid,
)  # fmt: skip
WEIGHT = {"weight": 3 * np.random.default_rng(1).standard_normal((4, 3))}


def by_equation(params, images, form, clean_weight):
    """CE(f(x'), y), or KL(f(x) || f(x')), and the clean cross-entropy by its weight."""
    log_q, log_p = (
        by_hand.log_softmax(np.asarray(x, np.float64).reshape(6, 4) @ params["weight"])
        for x in (images, BATCH.image)
    )
    rows = np.arange(6)
    loss = (
        -log_q[rows, by_hand.LABEL] if form == "at" else np.sum(np.exp(log_p) * (log_p - log_q), -1)
    )
    return np.sum((loss - clean_weight * log_p[rows, by_hand.LABEL])[by_hand.VALID])


@pytest.mark.parametrize(("form", "clean_weight"), [("at", 0.0), ("at", 0.5), ("trade", 1.0)])
def test_loss_and_gradient_are_the_equations(form, clean_weight, key):
    objective = methods.sense(
        by_hand.LINEAR, THREAT, steps=3, step_size=0.05, form=form, clean_weight=clean_weight
    )
    params = by_hand.f32(WEIGHT)
    (_, found), _ = jax.jit(lambda: objective.find(params, {}, key, BATCH, None, 0))()
    value_and_gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (_, metrics)), gradient = value_and_gradient(params, {}, key, BATCH)

    def expected(params):
        return by_equation(params, found.image, form, clean_weight)

    np.testing.assert_allclose(loss, expected(WEIGHT), rtol=1e-5)
    slope = by_hand.slopes(expected, WEIGHT)["weight"]
    np.testing.assert_allclose(gradient["weight"], slope, rtol=1e-5, atol=1e-5)
    assert metrics["ignored"] == np.sum(np.asarray(found.ignored)[by_hand.VALID])
    assert metrics["reverted"] == np.sum(np.asarray(found.reverted)[by_hand.VALID])


NETWORK = models.cnn(3, widths=(4,), hidden=4, batch_norm=True)


@pytest.fixture(scope="module")
def parts():
    variables = jax.jit(NETWORK.init)(jax.random.key(0), IMAGES)
    return variables.pop("params"), variables


@pytest.fixture(scope="module")
def batch():
    return Batch(IMAGES[:8], LABELS[:8], jnp.arange(8), jnp.ones(8, bool))


def test_threshold_one_is_natural_training_to_the_last_bit(parts, batch, key):
    found = [
        jax.jit(jax.value_and_grad(objective, has_aux=True))(*parts, key, batch)
        for objective in (methods.sense(NETWORK, THREAT, threshold=1.0), methods.natural(NETWORK))
    ]
    np.testing.assert_array_equal(found[0][0][0], found[1][0][0])
    chex.assert_trees_all_equal(found[0][1], found[1][1])
    assert found[0][0][1][1]["moved"] == 0


def test_the_attack_leaves_the_state_alone_and_images_independent(parts, batch, key):
    params, state = parts
    objective = methods.sense(NETWORK, THREAT, **SIZES, warmup=0)
    find = jax.jit(lambda batch: objective.find(params, state, key, batch, None, 0))
    (_, found), after = find(batch)
    chex.assert_trees_all_equal(after, state)
    order = np.array([6, 1, 3])
    some = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[order]), batch)
    (_, part), _ = find(some)
    np.testing.assert_allclose(part.image, np.asarray(found.image)[order], atol=1e-6)


def test_nothing_is_undone_before_the_warm_up_is_over(key):
    objective = methods.sense(
        by_hand.LINEAR, THREAT, threshold=0.5, **SIZES, warmup=1.5, steps_per_epoch=5
    )
    params = by_hand.f32(WEIGHT)
    metrics = jax.jit(lambda step: objective(params, {}, key, BATCH, None, step)[1][1])
    undone = [float(metrics(jnp.int32(step))["reverted"]) for step in (0, 7, 8, 100)]
    assert undone[:2] == [0, 0]
    assert undone[2] == undone[3] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(threshold=0.0), "threshold=0.0"),
        (dict(threshold=1.5), "threshold=1.5"),
        (dict(steps=0), "steps=0"),
        (dict(step_size=0.0), "step_size=0.0"),
        (dict(clean_weight=-1.0), "clean_weight=-1.0"),
        (dict(warmup=-1.0), "warmup=-1.0"),
        (dict(form="trades"), "did you mean 'trade'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        methods.sense(NETWORK, THREAT, **options)
