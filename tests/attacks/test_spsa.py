"""NES and SPSA against optima that can be derived, and the queries that they count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks
from rain_jax.attacks import nes
from rain_jax.checks import UsageError
from rain_jax.losses import margin
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Threat

SHAPE = (4, 4, 2)
WEIGHT = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
GREY = np.full(SHAPE, 0.5, np.float32)
BOTH = pytest.mark.parametrize("name", ["nes", "spsa"])


RADIUS = {linf: 0.1, l2: 0.4, l1: 0.4}


@functools.cache
def program(name, norm):
    """What a margin that stays below zero reaches, as the second logit.

    It climbs along WEIGHT from `middle`, to one side of it or, in a `valley`, to both: one program
    for all of these, and for all images and settings that are numbers.
    """

    @jax.jit
    def whole(key, image, middle, valley, settings):
        def model(key, image):
            along = jnp.sum(WEIGHT * (image - middle))
            return jnp.stack([100.0, jnp.where(valley, jnp.abs(along), along), -100.0])

        maker, threat = getattr(attacks, name), Threat(norm, RADIUS[norm])
        attack = maker(threat, steps=60, draws=400, **settings)
        return model(key, attack(key, model, image, 0))[1]

    return whole


def reached(name, norm, key, image=GREY, *, middle=0.5, valley=False, **settings):
    return float(program(name, norm)(key, image, middle, valley, settings))


def brighter(key, image):
    """Broken where the one pixel is more than 0.025 above grey."""
    return jnp.stack([0.525, jnp.sum(image)])


PIXEL = np.full((1, 1, 1), 0.5, np.float32)


def climbed(image):
    return np.sum(WEIGHT * (image - 0.5))


@pytest.mark.parametrize("norm", [l2, l1], ids=["l2", "l1"])
def test_nes_reaches_the_optimum_on_a_plane(norm, key):
    best = 0.4 * (np.linalg.norm(WEIGHT) if norm is l2 else np.max(np.abs(WEIGHT)))
    assert 0.99 <= reached("nes", norm, key, step_size=0.04) / best <= 1 + 1e-4


@BOTH
def test_both_reach_the_corner_of_the_cube(name, key):
    """Within the pixel bounds: black and white pixels can only go one way."""
    image = np.random.default_rng(0).uniform(-0.5, 1.5, SHAPE).clip(0.0, 1.0).astype(np.float32)
    corner = np.clip(image + 0.1 * np.sign(WEIGHT), 0.0, 1.0)
    share = (reached(name, linf, key, image) - climbed(image)) / (climbed(corner) - climbed(image))
    assert 0.99 <= share <= 1 + 1e-4


@BOTH
def test_leaves_a_valley(name, key):
    """The margin climbs equally far to both sides of the start, at whose kink it has no slope."""
    corner = 0.5 + 0.1 * np.sign(WEIGHT)
    best = max(abs(np.sum(WEIGHT * (x - 0.501))) for x in (corner, 1 - corner))
    assert reached(name, linf, key, middle=0.501, valley=True) >= 0.98 * best


def test_a_running_mean_outweighs_the_noise_of_few_directions(key):
    def plane(key, image):
        return jnp.stack([100.0, jnp.sum(WEIGHT * (image - 0.5)), -100.0])

    def climbed(key, decay):
        attack = nes(Threat(linf, 0.1), steps=20, draws=4, decay=decay)
        return plane(key, attack(key, plane, GREY, 0))[1]

    keys, decays = jax.random.split(key, 16), np.float32([0.0, 0.9])
    alone, running = np.mean(
        jax.jit(jax.vmap(lambda d: jax.vmap(lambda k: climbed(k, d))(keys)))(decays), axis=1
    )
    assert running > 1.1 * alone


@BOTH
@pytest.mark.parametrize("answers", [1, 3])
def test_counts_queries_until_it_breaks_and_changes_nothing_after(name, answers, key):
    """On a single pixel every estimate has the right sign, so each step goes 0.01 up."""
    attack = getattr(attacks, name)(
        Threat(linf, 0.1), steps=12, step_size=0.01, draws=5, answers=answers
    )

    def tell(state):
        broken = margin(brighter(key, state.image), 0) > 0
        return attack.queries(state), broken, attack.best(brighter, state)[1] > 0

    def step(state, _):
        after = attack.step(brighter, state)
        numbers = after._replace(ascent=after.ascent._replace(key=()))
        return after, (*tell(state), numbers)

    @jax.jit
    def whole(key):
        state = attack.init(key, brighter, PIXEL, 0)
        if name == "spsa":  # its random start is no part of this
            state = state._replace(ascent=state.ascent._replace(image=PIXEL), image=PIXEL)
        return jax.lax.scan(step, state, length=8)[1]

    counts, broken, found, states = jax.tree.map(np.asarray, whole(key))
    each = 2 * 5 + answers
    assert broken[:4].tolist() == [False, False, False, True]
    np.testing.assert_array_equal(found, np.logical_or.accumulate(broken))
    assert counts.tolist() == [answers + each * min(steps, 3) for steps in range(8)]
    for leaf in jax.tree.leaves(states):
        np.testing.assert_array_equal(leaf[5], leaf[7])


@BOTH
def test_a_broken_start_costs_one_look(name, key):
    attack = getattr(attacks, name)(Threat(linf, 0.1), steps=3, draws=5)

    @jax.jit
    def told(key):
        state = attack.step(brighter, attack.init(key, brighter, np.ones_like(PIXEL), 0))
        return attack.queries(state), state.ascent.score

    queries, score = told(key)
    assert queries == 1
    assert score > 0


@BOTH
def test_random_models_are_judged_by_the_mean_of_their_answers(name, key):
    """Right on average, and wrong in a third of all draws."""

    def noisy(key, image):
        return jnp.stack([1.0, 2 * jax.random.normal(key)])

    def score(answers):
        attack = getattr(attacks, name)(Threat(linf, 0.1), steps=10, draws=2, answers=answers)
        state = attack.init(key, noisy, GREY, 0)
        state, _ = jax.lax.scan(lambda s, _: (attack.step(noisy, s), None), state, length=10)
        return attack.best(noisy, state)[1]

    one, many = jax.jit(lambda: (score(1), score(64)))()
    assert one > 0
    assert -1.5 < many < 0


@BOTH
def test_asks_for_no_gradient(name, key):
    """A loop of unknown length, which cannot be differentiated backwards."""

    def looped(key, image):
        total = jax.lax.while_loop(
            lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, carry[1] + jnp.sum(image)),
            (0, jnp.float32(0.0)),
        )[1]  # fmt: skip
        return jnp.stack([3 * np.sum(GREY) + 1.0, total])

    attack = getattr(attacks, name)(Threat(linf, 0.1), steps=20, draws=20)
    lead = jax.jit(lambda k: margin(looped(k, attack(k, looped, GREY, 0)), 0))
    assert lead(key) > 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nes", dict(steps=0), "steps=0"),
        ("nes", dict(steps=5, step_size=0.0), "step_size=0.0"),
        ("nes", dict(steps=5, step_size=2.0), "2/255"),
        ("nes", dict(steps=5, decay=1.0), "decay=1.0"),
        ("nes", dict(steps=5, restarts=0), "restarts=0"),
        ("nes", dict(steps=5, draws=0), "draws=0"),
        ("spsa", dict(steps=0), "steps=0"),
        ("spsa", dict(step_size=0.0), "step_size=0.0"),
        ("spsa", dict(step_size=2.0), "2/255"),
        ("spsa", dict(scale=0.0), "scale=0.0"),
        ("spsa", dict(answers=0), "answers=0"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        getattr(attacks, name)(Threat(linf, 0.1), **settings)
