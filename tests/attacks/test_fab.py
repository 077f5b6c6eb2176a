"""FAB against distances that can be derived, and against the published loop written out."""

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
WEIGHT = jax.random.normal(jax.random.key(1), SHAPE)
WEIGHTS = jax.random.normal(jax.random.key(2), (72, 5))
MIDDLE = jnp.full(SHAPE, 0.5)
KEY = jax.random.key(0)


def plane(key, image):
    """Class 0 is right at MIDDLE, on a plane's other side from class 1."""
    return jnp.stack([1.0, jnp.sum(WEIGHT * (image - 0.5))])


def planes(key, image):
    flat = image.reshape(-1, 1) - 0.5
    return jnp.sum(flat * WEIGHTS, axis=0) + jnp.array([2.0, 0.0, 1.5, -1.0, 0.5])


def curved(key, image):
    """Five classes whose boundaries bend within the distances that they lie at."""
    flat = image.reshape(-1, 1)
    return jnp.sum(jnp.sin(4 * flat) * WEIGHTS, axis=0) + 40 * jnp.sum(
        (flat - 0.5) ** 2 * jnp.abs(WEIGHTS), axis=0
    )


def run(attack, logits_fn, image, label=0):
    """The answer, in one compiled program."""
    return jax.jit(lambda x: attack(KEY, logits_fn, x, label))(image)


def finished(attack, logits_fn, image):
    """The state after all steps: one row for each run."""

    def whole(image):
        state = attack.init(KEY, logits_fn, image, 0)
        step = lambda _, state: attack.step(logits_fn, state)
        return jax.lax.fori_loop(0, attack.steps, step, state)

    return jax.jit(whole)(image)


def dual(norm, slope):
    """How fast a plane of that slope is approached."""
    size = np.abs(np.asarray(slope, np.float64))
    return {linf: np.sum(size), l2: np.sqrt(np.sum(size**2)), l1: np.max(size)}[norm]


@NORMS
def test_finds_the_nearest_image_on_a_plane(norm):
    """In the middle of the cube, and near its corners, where the pixel bounds bind."""
    aside = jax.random.uniform(KEY, SHAPE) < 0.3
    corner = jnp.where(aside, 0.5 + 0.48 * jnp.sign(WEIGHT), 0.5 - 0.48 * jnp.sign(WEIGHT))
    level = 1.0 - float(jnp.sum(WEIGHT * (corner - 0.5)))
    bound = norm.measure(norm.cross(WEIGHT, level, -corner, 1 - corner))
    assert bound > 1.02 * level / dual(norm, WEIGHT), "no bound binds"

    attack = jax.jit(lambda x: fab(Threat(norm, jnp.inf), steps=20)(KEY, plane, x, 0))
    for image, expected in ((MIDDLE, 1.0 / dual(norm, WEIGHT)), (corner, bound)):
        found = attack(image)
        assert margin(plane(KEY, found), 0) > 0
        assert bool(jnp.all((found >= 0) & (found <= 1)))
        assert 0.999 <= norm.measure(found - image) / expected <= 1.01


@pytest.mark.parametrize(
    ("maker", "norm"), [(fab, linf), (fab, l2), (fab, l1), (fab_t, linf)],
    ids=["fab-linf", "fab-l2", "fab-l1", "fab_t-linf"],
)  # fmt: skip
def test_goes_to_the_nearest_of_several_classes(maker, norm):
    leads = planes(KEY, MIDDLE) - planes(KEY, MIDDLE)[0]
    distances = [
        -float(leads[k]) / dual(norm, (WEIGHTS[:, k] - WEIGHTS[:, 0]).reshape(SHAPE))
        for k in range(1, 5)
    ]
    found = run(maker(Threat(norm, jnp.inf), steps=20), planes, MIDDLE)
    assert margin(planes(KEY, found), 0) > 0
    assert 0.999 <= norm.measure(found - MIDDLE) / min(distances) <= 1.01


def test_targets_are_the_likeliest_wrong_classes():
    """The third class is nearer than the second, but comes after it."""

    def logits_fn(key, image):
        left, right = jnp.sum(image[:3] - 0.5), jnp.sum(image[3:] - 0.5)
        return jnp.stack([0.0, left - 1.0, 10 * right - 2.0])

    state = finished(fab_t(Threat(l2, jnp.inf), steps=20, targets=2), logits_fn, MIDDLE)
    # 36 pixels of one slope each: the distance is the level over the slope and six.
    shares = state.nearest.distance / jnp.array([1.0 / 6, 0.2 / 6])
    assert bool(jnp.all((shares >= 0.999) & (shares <= 1.01)))


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

    left, right = jnp.split(WEIGHT, 2)
    both = jnp.array([0.5 / dual(norm, left), 0.7 / dual(norm, right)])
    found = run(fab(Threat(norm, jnp.inf), steps=100), logits_fn, MIDDLE)
    assert margin(logits_fn(KEY, found), 0) > 0
    assert 0.999 <= norm.measure(found - MIDDLE) / norm.measure(both) <= 1.05


def test_restarts_may_find_a_nearer_boundary():
    """From the image one sees the farther of two planes, from around it the nearer one."""

    left, right = jnp.split(WEIGHT, 2)

    def logits_fn(key, image):
        above, below = jnp.split(image - 0.5, 2)
        farther, nearer = 0.1 * jnp.sum(left * above) - 1.0, 4 * jnp.sum(right * below) - 1.1
        return jnp.stack([0.0, jnp.maximum(farther, nearer)])

    attack = fab(Threat(l2, 0.2), steps=20, restarts=9)
    state = finished(attack, logits_fn, MIDDLE)
    assert state.nearest.distance[0] > 0.2, "the first run needs no help"
    found, score = jax.jit(lambda state: attack.best(logits_fn, state))(state)
    assert margin(logits_fn(KEY, found), 0) > 0
    np.testing.assert_allclose(1 / score, jnp.min(state.nearest.distance), rtol=1e-5)
    assert 0.999 <= l2.measure(found - MIDDLE) / (1.1 / (4 * dual(l2, right))) <= 1.01


@NORMS
def test_first_run_starts_at_the_image_and_others_within_half_the_radius(norm):
    init = jax.jit(lambda radius: fab(Threat(norm, radius), restarts=4).init(KEY, plane, MIDDLE, 0))
    for radius, widest in ((0.2, 0.2), (jnp.inf, {linf: 0.3, l2: 1.0, l1: 5.0}[norm])):
        starts = init(radius).image
        np.testing.assert_array_equal(starts[0], MIDDLE)
        sizes = jnp.stack([norm.measure(start - MIDDLE) for start in starts[1:]])
        assert bool(jnp.all((sizes > 0.3 * widest) & (sizes <= 0.5 * widest + 1e-6)))


def published(norm, start, label, steps):
    """AutoAttack's loop for one image, with the projections of `norm`."""
    logits = jax.jit(lambda x: curved(KEY, x))
    gradients = jax.jit(jax.jacrev(lambda x: curved(KEY, x)))
    cross = jax.jit(norm.cross)
    size = lambda d: float(norm.measure(jnp.float32(d)))
    x, trail, best = start, [], np.inf
    for _ in range(steps):
        z, g = np.asarray(logits(x)), np.asarray(gradients(x), np.float64)
        wrong = [k for k in range(5) if k != label]
        distances = [abs(z[k] - z[label]) / dual(norm, g[k] - g[label]) for k in wrong]
        k = wrong[int(np.argmin(distances))]
        w, lead = g[k] - g[label], float(z[k] - z[label])
        b = np.sum(w * x) - lead
        d1 = np.asarray(cross(w, b - np.sum(w * x), -x, 1 - x))
        d2 = np.asarray(cross(w, b - np.sum(w * start), -start, 1 - start))
        alpha = min(max(size(d1), 1e-8) / (max(size(d1), 1e-8) + max(size(d2), 1e-8)), 0.1)
        x = np.clip((x + 1.05 * d1) * (1 - alpha) + (start + 1.05 * d2) * alpha, 0, 1)
        if int(np.argmax(logits(x))) != label:
            best = min(best, size(x - start))
            x = start + (x - start) * 0.9
        trail.append(x)
    return trail, best


@NORMS
def test_follows_the_published_loop(norm):
    """Point by point while rounding allows it, and to the same distance in the end."""
    start = 0.5 + 0.2 * jax.random.normal(jax.random.key(4), SHAPE)
    start = jnp.clip(start, 0.0, 1.0)
    label = int(jnp.argmax(curved(KEY, start)))
    trail, distance = published(norm, np.asarray(start, np.float64), label, 30)
    attack = along_boundary(Threat(norm, jnp.inf), steps=30, alpha_max=0.1, eta=1.05, beta=0.9)
    state = attack.init(KEY, curved, start, label)
    step = jax.jit(lambda state: attack.step(curved, state))
    for number, expected in enumerate(trail):
        state = step(state)
        if number < 6:
            np.testing.assert_allclose(state.image, expected, atol=2e-4)
    # Images after the step back are judged too, so that the answer may be nearer.
    assert state.nearest.distance <= distance * 1.01
    assert state.nearest.distance >= distance * 0.9 * 0.99


def test_further_steps_never_lose_what_was_found():
    label = int(jnp.argmax(curved(KEY, MIDDLE)))

    @jax.jit
    def answers(radius):
        attack = fab_t(Threat(l2, radius), targets=2, restarts=2)

        def step(state, _):
            state = attack.step(curved, state)
            return state, attack.best(curved, state)

        return jax.lax.scan(step, attack.init(KEY, curved, MIDDLE, label), length=25)[1]

    for radius in (0.6, jnp.inf):
        images, scores = answers(radius)
        sizes = np.array([l2.measure(image - MIDDLE) for image in images])
        wrong = np.array([margin(curved(KEY, image), label) > 0 for image in images])
        assert np.all(sizes <= radius * (1 + 1e-5))
        np.testing.assert_array_equal(scores > 0, wrong)
        np.testing.assert_allclose(scores[wrong], 1 / sizes[wrong], rtol=1e-5)
        assert np.all(np.diff(scores[wrong]) >= 0)
        assert scores[wrong][-1] > scores[wrong][0]


def test_keeps_to_a_finite_radius():
    distance = 1.0 / dual(linf, WEIGHT)
    answer = jax.jit(lambda radius: fab(Threat(linf, radius), steps=20)(KEY, plane, MIDDLE, 0))
    for radius, broken in ((1.1 * distance, True), (0.9 * distance, False)):
        found = answer(radius)
        assert linf.measure(found - MIDDLE) <= radius * (1 + 1e-5)
        assert bool(margin(plane(KEY, found), 0) > 0) == broken


def test_a_misclassified_image_is_its_own_answer():
    found = run(fab_t(Threat(l1, jnp.inf), steps=2, restarts=2), plane, MIDDLE, 1)
    np.testing.assert_array_equal(found, MIDDLE)


def test_random_models_are_judged_by_their_mean():
    """A coin in the logits: single draws are often misclassified at once, the mean is not."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 3.0 * jax.random.rademacher(key, ())])

    found = run(fab(Threat(l2, jnp.inf), steps=5, estimator=eot(400)), noisy, MIDDLE)
    np.testing.assert_allclose(l2.measure(found - MIDDLE), 1.0 / dual(l2, WEIGHT), rtol=0.5)


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
