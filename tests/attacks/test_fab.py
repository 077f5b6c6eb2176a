"""FAB against distances that can be derived, and against the published loop written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import fab, fab_t
from rain_jax.attacks.fab import along_boundary
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import margin
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Threat

NORMS = pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
SHAPE = (6, 6, 2)
DRAW = np.random.default_rng(1)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
WEIGHTS = DRAW.normal(size=(72, 5)).astype(np.float32)
MIDDLE = np.full(SHAPE, 0.5, np.float32)
KEY = jax.random.key(0)


def plane(key, image):
    """Class 0 is right at MIDDLE, on a plane's other side from class 1."""
    return jnp.stack([1.0, jnp.sum(WEIGHT * (image - 0.5))])


def planes(key, image):
    flat = image.reshape(-1, 1) - 0.5
    return jnp.sum(flat * WEIGHTS, axis=0) + np.float32([2.0, 0.0, 1.5, -1.0, 0.5])


def curved(key, image):
    """Five classes whose boundaries bend within the distances that they lie at."""
    flat = image.reshape(-1, 1)
    return jnp.sum(jnp.sin(4 * flat) * WEIGHTS, axis=0) + 40 * jnp.sum(
        (flat - 0.5) ** 2 * jnp.abs(WEIGHTS), axis=0
    )


def run(attack, logits_fn, image=MIDDLE, label=0):
    """The answer and its margin, in one compiled program."""

    @jax.jit
    def whole(image):
        found = attack(KEY, logits_fn, image, label)
        return found, margin(logits_fn(KEY, found), label)

    return jax.tree.map(np.asarray, whole(image))


@functools.cache
def on_the_plane(norm):
    """The answer and its margin for any image and radius."""

    @jax.jit
    def whole(radius, image):
        found = fab(Threat(norm, radius), steps=20)(KEY, plane, image, 0)
        return found, margin(plane(KEY, found), 0)

    return lambda radius, image: jax.tree.map(np.asarray, whole(float(radius), image))


def finished(attack, logits_fn, image):
    """After all steps: each run's nearest distance, the answer, its score and its margin."""

    @jax.jit
    def whole(image):
        state = attack.init(KEY, logits_fn, image, 0)
        step = lambda _, state: attack.step(logits_fn, state)
        state = jax.lax.fori_loop(0, attack.steps, step, state)
        found, score = attack.best(logits_fn, state)
        return state.nearest.distance, found, score, margin(logits_fn(KEY, found), 0)

    return map(np.asarray, whole(image))


def size(norm, change):
    change = np.abs(np.float64(change))
    return {linf: np.max(change), l2: np.sqrt(np.sum(change**2)), l1: np.sum(change)}[norm]


@functools.cache
def cross(norm):
    return jax.jit(norm.cross)


def dual(norm, slope):
    """How fast a plane of that slope is approached."""
    size = np.abs(np.asarray(slope, np.float64))
    return {linf: np.sum(size), l2: np.sqrt(np.sum(size**2)), l1: np.max(size)}[norm]


@NORMS
def test_finds_the_nearest_image_on_a_plane(norm):
    """In the middle of the cube, and near its corners, where the pixel bounds bind."""
    aside = np.where(np.random.default_rng(0).random(SHAPE) < 0.3, 0.48, -0.48)
    corner = np.float32(0.5 + aside * np.sign(WEIGHT))
    level = 1.0 - np.sum(WEIGHT * (corner - 0.5))
    bound = size(norm, cross(norm)(WEIGHT, level, -corner, 1 - corner))
    assert bound > 1.02 * level / dual(norm, WEIGHT), "no bound binds"

    for image, expected in ((MIDDLE, 1.0 / dual(norm, WEIGHT)), (corner, bound)):
        found, lead = on_the_plane(norm)(np.inf, image)
        assert lead > 0
        assert np.all((found >= 0) & (found <= 1))
        assert 0.999 <= size(norm, found - image) / expected <= 1.01


@pytest.mark.parametrize(
    ("maker", "norm"), [(fab, linf), (fab, l2), (fab, l1), (fab_t, linf)],
    ids=["fab-linf", "fab-l2", "fab-l1", "fab_t-linf"],
)  # fmt: skip
def test_goes_to_the_nearest_of_several_classes(maker, norm):
    logits = np.asarray(planes(KEY, MIDDLE))
    leads = logits - logits[0]
    distances = [
        -float(leads[k]) / dual(norm, (WEIGHTS[:, k] - WEIGHTS[:, 0]).reshape(SHAPE))
        for k in range(1, 5)
    ]
    found, lead = run(maker(Threat(norm, jnp.inf), steps=20), planes)
    assert lead > 0
    assert 0.999 <= size(norm, found - MIDDLE) / min(distances) <= 1.01


def test_targets_are_the_likeliest_wrong_classes():
    """The third class is nearer than the second, but comes after it."""

    def logits_fn(key, image):
        left, right = jnp.sum(image[:3] - 0.5), jnp.sum(image[3:] - 0.5)
        return jnp.stack([0.0, left - 1.0, 10 * right - 2.0])

    distances, *_ = finished(fab_t(Threat(l2, jnp.inf), steps=20, targets=2), logits_fn, MIDDLE)
    # 36 pixels of one slope each: the distance is the level over the slope and six.
    shares = distances / [1.0 / 6, 0.2 / 6]
    assert np.all((shares >= 0.999) & (shares <= 1.01))


@pytest.mark.parametrize(("classes", "runs"), [(2, 2), (5, 6)])
def test_each_target_has_its_runs(classes, runs):
    attack = fab_t(Threat(l2, 0.5), targets=3, restarts=2)
    state = jax.jit(
        lambda x: attack.init(KEY, lambda key, image: planes(key, image)[:classes], x, 0)
    )(MIDDLE)
    likeliest = [k for k in (2, 4, 1, 3) if k < classes][:3]
    np.testing.assert_array_equal(state.classes[:, 0], np.repeat(likeliest, 2))
    assert state.image.shape == (runs, *SHAPE)


@NORMS
def test_follows_a_boundary_round_a_kink(norm):
    """Two planes over pixels of their own must both be crossed: the distances add up."""

    def logits_fn(key, image):
        left, right = jnp.split(WEIGHT * (image - 0.5), 2)
        return jnp.stack([0.0, jnp.minimum(jnp.sum(left) - 0.5, jnp.sum(right) - 0.7)])

    left, right = np.split(WEIGHT, 2)
    both = np.array([0.5 / dual(norm, left), 0.7 / dual(norm, right)])
    found, lead = run(fab(Threat(norm, jnp.inf), steps=100), logits_fn)
    assert lead > 0
    assert 0.999 <= size(norm, found - MIDDLE) / size(norm, both) <= 1.05


def test_restarts_may_find_a_nearer_boundary():
    """From the image one sees the farther of two planes, from around it the nearer one."""

    left, right = np.split(WEIGHT, 2)

    def logits_fn(key, image):
        above, below = jnp.split(image - 0.5, 2)
        farther, nearer = 0.1 * jnp.sum(left * above) - 1.0, 4 * jnp.sum(right * below) - 1.1
        return jnp.stack([0.0, jnp.maximum(farther, nearer)])

    attack = fab(Threat(l2, 0.2), steps=20, restarts=9)
    distances, found, score, lead = finished(attack, logits_fn, MIDDLE)
    assert distances[0] > 0.2, "the first run needs no help"
    assert lead > 0
    np.testing.assert_allclose(1 / score, np.min(distances), rtol=1e-5)
    assert 0.999 <= size(l2, found - MIDDLE) / (1.1 / (4 * dual(l2, right))) <= 1.01


@NORMS
def test_first_run_starts_at_the_image_and_others_within_half_the_radius(norm):
    init = jax.jit(lambda radius: fab(Threat(norm, radius), restarts=4).init(KEY, plane, MIDDLE, 0))
    for radius, widest in ((0.2, 0.2), (jnp.inf, {linf: 0.3, l2: 1.0, l1: 5.0}[norm])):
        starts = np.asarray(init(radius).image)
        np.testing.assert_array_equal(starts[0], MIDDLE)
        sizes = np.array([size(norm, start - MIDDLE) for start in starts[1:]])
        assert np.all((sizes > 0.3 * widest) & (sizes <= 0.5 * widest + 1e-6))


@functools.cache
def bends():
    """The logits of `curved` and their gradients, on images of any precision."""
    logits = jax.jit(lambda x: curved(KEY, x))
    gradients = jax.jit(jax.jacrev(lambda x: curved(KEY, x)))
    return (
        lambda x: np.asarray(logits(np.asarray(x, np.float32))),
        lambda x: np.asarray(gradients(np.asarray(x, np.float32)), np.float64),
    )


def published(norm, start, label, steps):
    """AutoAttack's loop for one image, with the projections of `norm`."""
    logits, gradients = bends()
    length = lambda change: max(size(norm, change), 1e-8)
    x, trail, best = start, [], np.inf
    for _ in range(steps):
        z, g = logits(x), gradients(x)
        wrong = [k for k in range(5) if k != label]
        distances = [abs(z[k] - z[label]) / dual(norm, g[k] - g[label]) for k in wrong]
        k = wrong[int(np.argmin(distances))]
        w, lead = g[k] - g[label], float(z[k] - z[label])
        b = np.sum(w * x) - lead
        d1 = np.asarray(cross(norm)(w, b - np.sum(w * x), -x, 1 - x))
        d2 = np.asarray(cross(norm)(w, b - np.sum(w * start), -start, 1 - start))
        alpha = min(length(d1) / (length(d1) + length(d2)), 0.1)
        x = np.clip((x + 1.05 * d1) * (1 - alpha) + (start + 1.05 * d2) * alpha, 0, 1)
        if int(np.argmax(logits(x))) != label:
            best = min(best, size(norm, x - start))
            x = start + (x - start) * 0.9
        trail.append(x)
    return trail, best


@NORMS
def test_follows_the_published_loop(norm):
    """Point by point while rounding allows it, and to the same distance in the end."""
    start = 0.5 + 0.2 * np.random.default_rng(4).normal(size=SHAPE)
    start = np.clip(start, 0.0, 1.0).astype(np.float32)
    label = int(np.argmax(bends()[0](start)))
    trail, distance = published(norm, np.asarray(start, np.float64), label, 30)
    attack = along_boundary(Threat(norm, jnp.inf), steps=30, alpha_max=0.1, eta=1.05, beta=0.9)

    @jax.jit
    def run(image):
        def step(state, _):
            state = attack.step(curved, state)
            return state, state.image

        return jax.lax.scan(step, attack.init(KEY, curved, image, label), length=30)

    state, images = run(start)
    np.testing.assert_allclose(images[:6], trail[:6], atol=2e-4)
    # Images after the step back are judged too, so that the answer may be nearer.
    assert state.nearest.distance <= distance * 1.01
    assert state.nearest.distance >= distance * 0.9 * 0.99


def test_further_steps_never_lose_what_was_found():
    label = int(np.argmax(bends()[0](MIDDLE)))

    @jax.jit
    def answers(radius):
        attack = fab_t(Threat(l2, radius), targets=2, restarts=2)

        def step(state, _):
            state = attack.step(curved, state)
            image, score = attack.best(curved, state)
            return state, (image, score, margin(curved(KEY, image), label) > 0)

        return jax.lax.scan(step, attack.init(KEY, curved, MIDDLE, label), length=25)[1]

    for radius in (0.6, jnp.inf):
        images, scores, wrong = map(np.asarray, answers(radius))
        sizes = np.array([size(l2, image - MIDDLE) for image in images])
        assert np.all(sizes <= radius * (1 + 1e-5))
        np.testing.assert_array_equal(scores > 0, wrong)
        np.testing.assert_allclose(scores[wrong], 1 / sizes[wrong], rtol=1e-5)
        assert np.all(np.diff(scores[wrong]) >= 0)
        assert scores[wrong][-1] > scores[wrong][0]


def test_keeps_to_a_finite_radius():
    distance = 1.0 / dual(linf, WEIGHT)
    for radius, broken in ((1.1 * distance, True), (0.9 * distance, False)):
        found, lead = on_the_plane(linf)(radius, MIDDLE)
        assert size(linf, found - MIDDLE) <= radius * (1 + 1e-5)
        assert (lead > 0) == broken


def test_a_misclassified_image_is_its_own_answer():
    found, _ = run(fab_t(Threat(l1, jnp.inf), steps=2, restarts=2), plane, label=1)
    np.testing.assert_array_equal(found, MIDDLE)


def test_random_models_are_judged_by_their_mean():
    """A coin in the logits: single draws are often misclassified at once, the mean is not."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 3.0 * jax.random.rademacher(key, ())])

    found, _ = run(fab(Threat(l2, jnp.inf), steps=5, estimator=eot(400)), noisy)
    np.testing.assert_allclose(size(l2, found - MIDDLE), 1.0 / dual(l2, WEIGHT), rtol=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(restarts=0), "restarts=0"),
        (dict(alpha_max=1.5), "alpha_max=1.5"),
        (dict(eta=0.9), "eta=0.9"),
        (dict(beta=-0.1), "beta=-0.1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    for maker in (fab, fab_t):
        with pytest.raises(UsageError, match=message):
            maker(Threat(l2, 0.5), **settings)
    with pytest.raises(UsageError, match="targets=0"):
        fab_t(Threat(l2, 0.5), targets=0)
