"""Gradient ascent against answers that can be derived, and its options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rain_jax.attacks import fgsm, mi_fgsm, multi_targeted, pgd
from rain_jax.attacks.pgd import ascent, wrong_classes
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import cross_entropy, dlr, kl, margin, targeted
from rain_jax.methods.fast import noisy_step
from rain_jax.norms import allowed, l1, l2, linf, steepest
from rain_jax.types import Threat

DRAW = np.random.default_rng(14)  # no slope is so slight that Adam's guard outweighs it
SHAPE = (8, 8, 3)
IMAGE = np.full(SHAPE, 0.5, np.float32)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
# A steeper slope, not quite the same way.
SECOND = WEIGHT * DRAW.uniform(2.0, 3.0, SHAPE).astype(np.float32)


def answer(attack, model, key, image=IMAGE, label=0):
    """That of the attack and the model's logits there, in one compiled program."""

    @jax.jit
    def run(key, image, label):
        found = attack(key, model, image, label)
        return found, model(key, found)

    return jax.tree.map(np.asarray, run(key, image, label))


def plane(key, image):
    """Two classes on the sides of a plane; class 0 is right at IMAGE."""
    return jnp.stack([3.0, jnp.sum(WEIGHT * (image - 0.5))])


def optimum(norm, radius, slope, image):
    """The most that <slope, change> can be within the ball and with the image in [0, 1]."""
    steep, slope, image = (np.asarray(x, np.float64).ravel() for x in (abs(slope), slope, image))
    room = np.where(slope > 0, 1 - image, image)
    if norm is linf:
        return np.sum(steep * np.minimum(radius, room))
    if norm is l1:  # the steepest pixels go to their bounds until the radius is spent
        order = np.argsort(-steep)
        spent = np.cumsum(room[order]) - room[order]
        return np.sum(steep[order] * np.clip(radius - spent, 0, room[order]))
    low, high = 0.0, 1e6  # along the slope, cut off at the bounds, to just within the radius
    for _ in range(100):
        middle = (low + high) / 2
        inside = np.linalg.norm(np.minimum(middle * steep, room)) <= radius
        low, high = (middle, high) if inside else (low, middle)
    return np.sum(steep * np.minimum(low * steep, room))


def balls(*pairs):
    return pytest.mark.parametrize(("norm", "radius"), pairs, ids=lambda x: getattr(x, "order", x))


LARGE = [(linf, 0.7), (l2, 5.0), (l1, 4.0)]
BALLS, BOUNDED = balls((linf, 0.1), (l2, 0.45), (l1, 0.45), *LARGE), balls(*LARGE)
# Here some pixels are at a bound already, and in the larger balls many get there.
UNEVEN = DRAW.random(SHAPE, np.float32)
UNEVEN[:2], UNEVEN[6:] = 0.0, 1.0


@functools.cache
def climber(maker, norm):
    """Up the larger of two planes, where the label leads by far; one program for all of them."""

    @jax.jit
    def run(key, radius, slope, second, level, image):
        def planes(key, x):
            change = x - image
            above = jnp.maximum(jnp.sum(slope * change), jnp.sum(second * change) - level)
            return jnp.stack([9.0, above, -99.0])

        return maker(Threat(norm, radius))(key, planes, image, 0)

    return run


def climbed(maker, norm, radius, key, slope=WEIGHT, image=UNEVEN):
    """How much of the slope the attack has climbed, on a single plane."""
    found = np.asarray(climber(maker, norm)(key, radius, slope, slope, np.inf, image))
    return float(np.sum(slope * (found - image)))


def share_at_the_kink(maker, norm, radius, key):
    """Of all there is to climb where the way up one plane leads onto another, steeper one."""
    # The first is above at the start, the second wherever the first is highest.
    level = 0.7 * optimum(norm, radius, WEIGHT, UNEVEN)
    found = np.asarray(climber(maker, norm)(key, radius, WEIGHT, SECOND, level, UNEVEN))
    reached = max(np.sum(slope * (found - UNEVEN)) - lost
                  for slope, lost in ((WEIGHT, 0.0), (SECOND, level)))  # fmt: skip
    return reached / (optimum(norm, radius, SECOND, UNEVEN) - level)


def twentieths(threat):
    return pgd(threat, steps=100, step_size=threat.radius / 20)


@BALLS
def test_reaches_the_optimum_on_a_plane(norm, radius, key):
    # In L2 a start across the sphere comes round only as the steps add up to several radii.
    reached = climbed(twentieths, norm, radius, key) / optimum(norm, radius, WEIGHT, UNEVEN)
    assert 0.99 <= reached <= 1 + 1e-4


@pytest.mark.parametrize("loss", [margin, dlr], ids=lambda f: f.__name__)
def test_whatever_the_loss(loss, key):
    maker = lambda threat: pgd(threat, steps=100, loss=loss)
    reached = climbed(maker, linf, 0.1, key) / optimum(linf, 0.1, WEIGHT, UNEVEN)
    assert 0.99 <= reached <= 1 + 1e-4


@BALLS
def test_fgsm_is_the_best_single_step_on_a_plane(norm, radius, key):
    reached = climbed(fgsm, norm, radius, key)
    best = optimum(norm, radius, WEIGHT, UNEVEN)
    # In L2 it goes along the gradient and is cut off at the bounds, which is less where they bind.
    assert reached >= (0.5 if norm is l2 else 1 - 1e-4) * best
    assert reached <= best * (1 + 1e-4)


@BOUNDED
def test_turns_at_the_kink_of_two_planes(norm, radius, key):
    """The larger of two planes: the way up the first leads onto the second, which is steeper."""
    assert 0.99 <= share_at_the_kink(twentieths, norm, radius, key) <= 1 + 1e-4


def test_linf_reaches_the_corner_of_the_cube(key):
    found, _ = answer(pgd(Threat(linf, 0.1), steps=10, step_size=0.05), plane, key)
    np.testing.assert_allclose(found, 0.5 + 0.1 * np.sign(WEIGHT), atol=1e-6)


def test_fgsm_is_the_sign_of_the_gradient(key):
    found = climber(fgsm, linf)(key, 0.1, WEIGHT, WEIGHT, np.inf, IMAGE)
    np.testing.assert_allclose(found, 0.5 + 0.1 * np.sign(WEIGHT), atol=1e-6)


def test_momentum_reaches_the_corner_too(key):
    found, _ = answer(mi_fgsm(Threat(linf, 0.1), steps=10), plane, key)
    np.testing.assert_allclose(found, 0.5 + 0.1 * np.sign(WEIGHT), atol=1e-6)


def test_any_optax_transformation_can_climb(key):
    climb = optax.chain(optax.scale_by_adam(), optax.scale(0.03))
    found, _ = answer(ascent(Threat(linf, 0.1), climb, steps=20), plane, key)
    np.testing.assert_allclose(found, 0.5 + 0.1 * np.sign(WEIGHT), atol=1e-6)


def test_keeps_the_best_and_not_the_last(key):
    """A step that overshoots a narrow peak: the last image is worse than one before it."""

    def peak(key, image):
        distance = jnp.mean(image) - 0.5
        return jnp.stack([0.0, 1.0 - 40 * jnp.abs(distance - 0.03)])

    climb = optax.chain(steepest(linf), optax.scale(0.04))
    threat = Threat(linf, 0.1)
    runs = {
        keep: ascent(threat, climb, steps=6, keep=keep, start="clean", loss=margin)
        for keep in ("best", "last")
    }
    logits = {keep: answer(run, peak, key)[1] for keep, run in runs.items()}
    reached = {keep: wrong - right for keep, (right, wrong) in logits.items()}
    assert reached["best"] >= reached["last"]
    assert reached["best"] > 0.55


def test_restarts_return_the_best_run(key):
    """Many local peaks: with more restarts the margin reached cannot fall."""

    def bumps(key, image):
        return jnp.stack([0.0, jnp.sum(jnp.sin(60 * image))])

    threat = Threat(linf, 0.2)
    _, logits = answer(pgd(threat, steps=5, restarts=8), bumps, key)

    @jax.jit
    def alone(keys):
        attack = pgd(threat, steps=5)
        return jax.vmap(lambda k: bumps(key, attack(k, bumps, IMAGE, 0))[1])(keys)

    np.testing.assert_allclose(logits[1], np.max(alone(jax.random.split(key, 8))), rtol=1e-4)


def test_targeted_loss_moves_towards_the_target(key):
    attack = pgd(Threat(linf, 0.2), steps=20, loss=targeted(cross_entropy), keep="last")

    def reached(target):
        model = lambda key, image: PLANES @ image.ravel()
        return jnp.argmax(model(key, attack(key, model, IMAGE, target)))

    np.testing.assert_array_equal(jax.jit(jax.vmap(reached))(np.arange(5)), range(5))


def test_eot_finds_the_mean_direction_of_a_random_model(key):
    """Signs of random noise outweigh the signal in one draw; the mean over draws finds it."""

    def noisy(key, image):
        noise = 6 * jax.random.normal(key, WEIGHT.shape)
        return jnp.stack([0.0, jnp.sum((WEIGHT + noise) * (image - 0.5))])

    threat = Threat(linf, 0.1)
    reached = {}
    for draws in (1, 64):
        attack = pgd(threat, steps=20, estimator=eot(draws), loss=margin)
        found, _ = answer(attack, noisy, key)
        reached[draws] = np.sum(WEIGHT * (found - 0.5))
    assert reached[64] > 1.5 * reached[1]


def test_adam_reaches_the_corner_however_faint_the_gradients(key):
    def faint(key, image):
        return 1e-9 * plane(key, image)

    attack = pgd(Threat(linf, 0.1), steps=20, climber="adam", loss=margin)
    found, _ = answer(attack, faint, key)
    np.testing.assert_allclose(found, 0.5 + 0.1 * np.sign(WEIGHT), atol=1e-6)


def test_adam_shortens_steps_that_turn_back(key):
    """Over a valley whose sides alternate, steepest steps never settle; Adam's do."""

    def ridge(key, image):
        return jnp.stack([0.0, -jnp.sum((image - 0.537) ** 2)])

    def distance(climber):
        attack = pgd(
            Threat(linf, 0.1), steps=40, step_size=0.05, climber=climber, start="clean",
            loss=margin, keep="last",
        )  # fmt: skip
        return np.max(np.abs(answer(attack, ridge, key)[0] - 0.537))

    assert distance("adam") < distance("steepest")


def test_a_normal_start_is_near_the_image_and_allowed(key):
    for threat in (Threat(linf, 0.1), Threat(l2, 0.005)):
        attack = pgd(threat, steps=1, start="normal")

        @jax.jit
        def first(key, attack=attack, threat=threat):
            image = attack.init(key, plane, IMAGE, 0).image
            return image, allowed(threat, IMAGE, image)

        image, kept = first(key)
        assert 0 < np.max(np.abs(image - IMAGE)) < 0.006
        assert kept


def classes(key, image):
    """Five classes, each a plane."""
    return PLANES @ (image - 0.5).ravel() + np.float32([0.5, 0.3, 1.0, 0.0, 0.2])


PLANES = DRAW.normal(size=(5, 192)).astype(np.float32)


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_kl_moves_away_from_the_clean_prediction_whatever_the_label(start, key):
    """On a plane that is to either corner, by the side that the start is on."""
    attack = pgd(Threat(linf, 0.1), steps=10, loss=kl, start=start, keep="last")

    @jax.jit
    def run(keys, label):
        start = lambda k: attack.init(k, plane, IMAGE, label).image
        return jax.vmap(start)(keys), jax.vmap(lambda k: attack(k, plane, IMAGE, label))(keys)

    keys = jax.random.split(key, 16)
    starts, found = map(np.asarray, run(keys, 0))
    np.testing.assert_array_equal(found, run(keys, 1)[1])
    sides = np.sign(np.sum(WEIGHT * (starts - 0.5), axis=(1, 2, 3)))
    corner = 0.5 + 0.1 * sides[:, None, None, None] * np.sign(WEIGHT)[None]
    np.testing.assert_allclose(found, corner, atol=1e-6)
    assert set(sides.tolist()) == {-1.0, 1.0}


def test_kl_compares_with_the_mean_prediction_of_a_random_model(key):
    def random(key, image):
        return classes(key, image) + jax.random.normal(key, (5,))

    attack = pgd(Threat(linf, 0.05), steps=1, loss=kl, estimator=eot(2000))
    against = jax.jit(lambda key: attack.init(key, random, IMAGE, 0).against)(key)
    np.testing.assert_allclose(against, classes(key, IMAGE), atol=0.1)


def test_kl_is_not_started_where_it_has_no_gradient():
    for make in (
        fgsm,
        mi_fgsm,
        lambda threat, loss: pgd(threat, steps=2, loss=loss, start="clean"),
    ):
        with pytest.raises(UsageError, match="start='clean'"):
            make(Threat(linf, 0.1), loss=kl)


def test_wrong_classes_come_in_order_and_without_the_label():
    logits = jnp.array([0.5, 3.0, -1.0, 2.0])
    np.testing.assert_array_equal(wrong_classes(logits, 1), [3, 0, 2])
    np.testing.assert_array_equal(wrong_classes(logits, 2), [1, 3, 0])


@pytest.mark.parametrize(("goal", "reached"), [("likeliest", 0), ("least_likely", 3)])
@pytest.mark.parametrize("loss", [cross_entropy, margin], ids=lambda f: f.__name__)
def test_a_goal_is_reached(goal, reached, loss, key):
    attack = pgd(Threat(linf, 0.2), steps=20, goal=goal, loss=loss, keep="last")
    _, logits = answer(attack, classes, key, label=2)
    assert np.argmax(logits) == reached


def test_random_goals_are_all_the_wrong_classes(key):
    attack = pgd(Threat(linf, 0.2), steps=1, goal="random")
    goals = jax.jit(jax.vmap(lambda k: attack.init(k, classes, IMAGE, 2).against))
    assert set(np.asarray(goals(jax.random.split(key, 40))).tolist()) == {0, 1, 3, 4}


@BOUNDED
def test_multi_targeted_finds_the_optimum_over_all_classes(norm, radius, key):
    attack = multi_targeted(Threat(norm, radius), steps=100, step_size=radius / 20)

    def many(key, x):
        return PLANES @ (x - UNEVEN).ravel() / 4

    _, logits = answer(attack, many, key, UNEVEN, 2)
    best = max(optimum(norm, radius, (PLANES[aim] - PLANES[2]) / 4, UNEVEN) for aim in (0, 1, 3, 4))
    assert 0.99 <= (max(np.delete(logits, 2)) - logits[2]) / best <= 1 + 1e-4


def decoy(key, image):
    """Class 1 is near and nothing moves it; class 2 is behind it and can be raised above both."""
    return jnp.stack([1.0, 0.9, 0.1 * jnp.sum(WEIGHT * (image - 0.5)) - 0.5])


def test_multi_targeted_is_not_held_by_a_decoy(key):
    def reached(attack):
        _, (right, *wrong) = answer(attack, decoy, key)
        return max(wrong) - right

    threat = Threat(linf, 0.2)
    assert reached(pgd(threat, steps=20, loss=margin)) < 0
    assert reached(multi_targeted(threat, steps=20, targets=1)) < 0  # the decoy alone
    assert reached(multi_targeted(threat, steps=20, targets=2, restarts=2)) > 0


@pytest.mark.parametrize(("targets", "tried"), [(9, 4), (2, 2)])
def test_targets_are_the_likeliest_wrong_classes(targets, tried, key):
    attack = multi_targeted(Threat(linf, 0.1), steps=1, targets=targets)
    labels, aims = jax.jit(lambda key: attack.init(key, classes, IMAGE, 2).against)(key)
    np.testing.assert_array_equal(labels, [2] * tried)
    np.testing.assert_array_equal(aims, [0, 1, 4, 3][:tried])


def test_a_scan_and_not_an_unrolled_loop():
    """Compile time must not grow with the steps."""

    def size(steps):
        attack = pgd(Threat(linf, 0.1), steps=steps)
        return len(str(jax.make_jaxpr(lambda k: attack(k, plane, IMAGE, 0))(jax.random.key(0))))

    assert size(100) < size(3) * 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=5, step_size=-0.1), "step_size=-0.1"),
        (dict(steps=5, restarts=0), "restarts=0"),
        (dict(steps=5, start="clear"), "did you mean 'clean'"),
        (dict(steps=5, keep="lsat"), "did you mean 'last'"),
        (dict(steps=5, goal="least_likley"), "did you mean 'least_likely'"),
        (dict(steps=5, climber="adm"), "did you mean 'adam'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        pgd(Threat(linf, 0.1), **settings)


def test_bad_combinations_are_refused(key):
    with pytest.raises(UsageError, match="norm=l2: climber='adam' expects linf"):
        pgd(Threat(l2, 0.1), steps=5, climber="adam")
    with pytest.raises(UsageError, match="loss='kl'"):
        attack = pgd(Threat(linf, 0.1), steps=5, loss=kl, goal="random")
        jax.eval_shape(lambda key: attack(key, classes, IMAGE, 0), key)
    with pytest.raises(UsageError, match="targets=0"):
        multi_targeted(Threat(linf, 0.1), steps=5, targets=0)
    with pytest.raises(UsageError, match="steps=0"):
        multi_targeted(Threat(linf, 0.1), steps=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_sign_start_is_a_random_corner(scale, key):
    """As far as asked from the image at every pixel, before the pixel bounds; signs are fair."""
    radius, (grey, black) = 0.2, (np.full((40, 40, 3), value, np.float32) for value in (0.5, 0.0))
    attack = pgd(Threat(linf, radius), steps=1, start="sign", start_scale=scale)

    @jax.jit
    def change(key, image):
        return attack.init(key, plane, image, 0).image - image

    middle, dark = (np.asarray(change(key, image)) for image in (grey, black))
    np.testing.assert_allclose(np.abs(middle), scale * radius, rtol=1e-5)
    assert abs(np.mean(np.sign(middle))) < 4 / math.sqrt(middle.size)
    np.testing.assert_allclose(dark, np.maximum(middle, 0.0), rtol=1e-5)
    other = np.asarray(change(jax.random.fold_in(key, 1), grey))
    assert np.mean(np.sign(other) == np.sign(middle)) < 0.6


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_other_starts_are_stretched_as_well(start, key):
    @jax.jit
    def change(key, scale):
        attack = pgd(Threat(linf, 0.2), steps=1, start=start, start_scale=scale)
        return attack.init(key, plane, IMAGE, 0).image - IMAGE

    whole, part = (np.asarray(change(key, scale)) for scale in (1.0, 0.25))
    np.testing.assert_allclose(0.25 * whole, part, atol=1e-7)


def test_a_corner_is_no_head_start_on_a_plane(key):
    """Steps of length d in all climb d / 2 a pixel from a corner, d - d^2 / 4r from anywhere."""
    radius, image = 0.2, np.full((40, 40, 3), 0.5, np.float32)
    slope = np.sign(np.random.default_rng(2).normal(size=image.shape)).astype(np.float32)

    def plane(key, x):
        return jnp.stack([9.0, jnp.sum(slope * (x - image)), -99.0])

    for start in ("sign", "uniform"):
        attack = pgd(Threat(linf, radius), steps=3, step_size=0.05, start=start, keep="last")

        @jax.jit
        def answers(key, attack=attack):
            def step(state, _):
                state = attack.step(plane, state)
                return state, attack.best(plane, state)[0]

            return jax.lax.scan(step, attack.init(key, plane, image, 0), length=3)[1]

        for d, found in zip((0.05, 0.1, 0.15), np.asarray(answers(key)), strict=True):
            mean = np.mean(slope * (found - image))
            expected = d / 2 if start == "sign" else d - d**2 / (4 * radius)
            assert abs(mean - expected) < 5 * radius / math.sqrt(image.size)


def test_bad_starts_are_refused():
    with pytest.raises(UsageError, match=r"start='sing'.*did you mean 'sign'"):
        pgd(Threat(linf, 0.1), steps=1, start="sing")
    with pytest.raises(UsageError, match=r"norm=l2: start='sign' expects linf"):
        pgd(Threat(l2, 0.1), steps=1, start="sign")
    with pytest.raises(UsageError, match=r"start_scale=0.0"):
        pgd(Threat(linf, 0.1), steps=1, start_scale=0.0)


ONCE = {
    "pgd": pgd(Threat(linf, 0.1), steps=3),
    "last": pgd(Threat(l2, 0.5), steps=3, keep="last"),
    "kl": pgd(Threat(linf, 0.1), steps=3, loss=kl),
    "goal": pgd(Threat(linf, 0.1), steps=3, goal="likeliest"),
    "fgsm": fgsm(Threat(linf, 0.1)),
    "mi_fgsm": mi_fgsm(Threat(linf, 0.1), steps=3),
    "noisy_step": noisy_step(Threat(linf, 0.1), noise=2.0),
}


@pytest.mark.parametrize("attack", ONCE.values(), ids=ONCE)
def test_whoever_asks_once_asks_about_the_image_of_its_state(attack, key):
    asked = 0

    @jax.jit
    def states(key, whatever):
        """Of a model that knows nothing but that image, unless it answers `whatever` is asked."""

        def model(key, image, known=None):
            logits = jnp.tanh(jnp.tensordot(image, WEIGHT, 3) * jnp.arange(1.0, 4.0))
            knows = True if known is None else whatever | jnp.all(image == known)
            return jnp.where(knows, logits, jnp.nan)

        def step(state, _):
            def knows_one(key, image):
                nonlocal asked
                asked += 1
                return model(key, image, state.image)

            state = attack.step(knows_one, state)
            return state, state._replace(key=jax.random.key_data(state.key))

        return jax.lax.scan(step, attack.init(key, model, IMAGE, 0), length=attack.steps)[1]

    # In one program, which rounds alike whatever the model knows.
    jax.tree.map(np.testing.assert_array_equal, states(key, True), states(key, False))
    assert asked == 1
    assert attack.once


def test_draws_and_restarts_ask_more_than_once():
    for more in ({"estimator": eot(2)}, {"restarts": 2}):
        assert not pgd(Threat(linf, 0.1), steps=3, **more).once
