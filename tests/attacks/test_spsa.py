"""NES and SPSA against optima that can be derived, and the queries that they count."""

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
WEIGHT = jax.random.normal(jax.random.key(1), SHAPE)
GREY = jnp.full(SHAPE, 0.5)
BOTH = pytest.mark.parametrize("name", ["nes", "spsa"])


def plane(key, image):
    """A margin that climbs along WEIGHT and stays below zero."""
    return jnp.stack([100.0, jnp.sum(WEIGHT * (image - 0.5)), -100.0])


def brighter(key, image):
    """Broken where the one pixel is more than 0.025 above grey."""
    return jnp.stack([0.525, jnp.sum(image)])


PIXEL = jnp.full((1, 1, 1), 0.5)


def reached(attack, model, image, key):
    return float(model(key, jax.jit(lambda k: attack(k, model, image, 0))(key))[1])


def share_of_the_best(attack, image, best, key):
    clean, best = plane(key, image)[1], plane(key, best)[1]
    return float((reached(attack, plane, image, key) - clean) / (best - clean))


@pytest.mark.parametrize("norm", [l2, l1], ids=["l2", "l1"])
def test_nes_reaches_the_optimum_on_a_plane(norm, key):
    attack = nes(Threat(norm, 0.4), steps=60, step_size=0.04, draws=400)
    best = GREY + 0.4 * norm.steepest(WEIGHT)
    assert 0.99 <= share_of_the_best(attack, GREY, best, key) <= 1 + 1e-4


@BOTH
def test_both_reach_the_corner_of_the_cube(name, key):
    """Within the pixel bounds: black and white pixels can only go one way."""
    image = jnp.clip(jax.random.uniform(key, SHAPE, minval=-0.5, maxval=1.5), 0.0, 1.0)
    attack = getattr(attacks, name)(Threat(linf, 0.1), steps=60, draws=400)
    corner = jnp.clip(image + 0.1 * jnp.sign(WEIGHT), 0.0, 1.0)
    assert 0.99 <= share_of_the_best(attack, image, corner, key) <= 1 + 1e-4


@BOTH
def test_leaves_a_valley(name, key):
    """The margin climbs equally far to both sides of the start, at whose kink it has no slope."""

    def valley(key, image):
        return jnp.stack([100.0, jnp.abs(jnp.sum(WEIGHT * (image - 0.501)))])

    attack = getattr(attacks, name)(Threat(linf, 0.1), steps=60, draws=400)
    corner = 0.5 + 0.1 * jnp.sign(WEIGHT)
    best = max(float(valley(key, x)[1]) for x in (corner, 1 - corner))
    assert reached(attack, valley, GREY, key) >= 0.98 * best


def test_a_running_mean_outweighs_the_noise_of_few_directions(key):
    def climbed(key, decay):
        attack = nes(Threat(linf, 0.1), steps=20, draws=4, decay=decay)
        return plane(key, attack(key, plane, GREY, 0))[1]

    keys, decays = jax.random.split(key, 16), jnp.array([0.0, 0.9])
    alone, running = jnp.mean(
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
    state = jax.jit(lambda: attack.init(key, brighter, PIXEL, 0))()
    if name == "spsa":  # its random start is no part of this
        state = state._replace(ascent=state.ascent._replace(image=PIXEL), image=PIXEL)
    step = jax.jit(lambda state: attack.step(brighter, state))
    best = jax.jit(lambda state: attack.best(brighter, state))
    counts, broken = [], []
    for _ in range(6):
        counts.append(int(attack.queries(state)))
        broken.append(bool(margin(brighter(key, state.image), 0) > 0))
        assert bool(best(state)[1] > 0) == any(broken)
        state = step(state)
    each = 2 * 5 + answers
    assert broken[:4] == [False, False, False, True]
    assert counts == [answers + each * min(steps, 3) for steps in range(6)]
    after = step(step(state))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


@BOTH
def test_a_broken_start_costs_one_look(name, key):
    attack = getattr(attacks, name)(Threat(linf, 0.1), steps=3, draws=5)
    state = jax.jit(
        lambda k: attack.step(brighter, attack.init(k, brighter, jnp.ones((1, 1, 1)), 0))
    )(key)
    assert attack.queries(state) == 1
    assert state.ascent.score > 0


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
        return jnp.stack([3 * jnp.sum(GREY) + 1.0, total])

    attack = getattr(attacks, name)(Threat(linf, 0.1), steps=20, draws=20)
    found = jax.jit(lambda k: attack(k, looped, GREY, 0))(key)
    assert margin(looped(key, found), 0) > 0


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
