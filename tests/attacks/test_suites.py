"""Suites are what their paper says they are, and random models are not scored on lucky draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import apgd, suites
from rain_jax.attacks.restarts import together
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import dlr, margin
from rain_jax.norms import l2, linf
from rain_jax.types import Threat

IMAGE = np.full((6, 6, 2), 0.5, np.float32)
WEIGHTS = np.random.default_rng(2).normal(size=(72, 5)).astype(np.float32)


def curved(key, image):
    flat = image.ravel()
    return jnp.sin(4 * flat @ WEIGHTS) * 3 + jnp.cos(9 * flat) @ WEIGHTS


def test_members_are_the_published_ones_in_the_published_order():
    assert list(suites.standard(Threat(linf, 0.1))) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert list(suites.plus(Threat(l2, 0.1))) == [
        "apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t",
    ]  # fmt: skip
    assert list(suites.rand(Threat(linf, 0.1))) == ["apgd"]


def test_budgets_are_the_published_ones(key):
    members = suites.standard(Threat(linf, 0.1))
    # The first of 5,000 queries is the start.
    assert [a.steps for a in members.values()] == [100, 100, 100, 4999]

    def ten(key, image):
        return jnp.concatenate([curved(key, image), curved(key, image) - 1])

    state = jax.eval_shape(lambda: members["apgd_t"].init(key, ten, IMAGE, 0))
    assert jax.tree.leaves(state)[0].shape[0] == 9


@pytest.mark.parametrize("name", suites.__all__)
def test_every_member_runs_and_may_be_shortened(name, key):
    settings = dict(steps=3, draws=2) if name == "rand" else dict(steps=3, queries=4)
    for attack in getattr(suites, name)(Threat(linf, 0.02), **settings).values():
        found = jax.jit(lambda k, attack=attack: attack(k, curved, IMAGE, 2))(key)
        assert np.max(np.abs(found - IMAGE)) <= 0.02 + 1e-6


def test_together_keeps_the_worst_of_both(key):
    threat = Threat(linf, 0.05)
    parts = apgd(threat, steps=8), apgd(threat, steps=8, loss=dlr)
    both = together(*parts)

    @jax.jit
    def whole(key):
        state = both.init(key, curved, IMAGE, 2)
        state = jax.lax.fori_loop(0, 8, lambda _, state: both.step(curved, state), state)
        image, score = both.best(curved, state)
        each = [part.best(curved, one)[1] for part, one in zip(parts, state.parts, strict=True)]
        return score, margin(curved(key, image), 2), each

    score, reached, scores = jax.tree.map(float, whole(key))
    assert scores[0] != scores[1]
    assert score == max(scores)
    np.testing.assert_allclose(reached, score, rtol=1e-5)


def test_together_needs_equal_steps():
    with pytest.raises(UsageError, match=r"steps=\[3, 4\]"):
        together(*(apgd(Threat(linf, 0.1), steps=steps) for steps in (3, 4)))


def test_the_score_on_a_random_model_is_that_of_the_mean_logits(key):
    """Noise in the logits: mean of margins lies above the margin of the mean, and misleads."""

    def noisy(key, image):
        return curved(key, image) / 10 + 5 * jax.random.normal(key, (5,))

    attack = apgd(Threat(linf, 0.01), steps=8, estimator=eot(16))

    @jax.jit
    def whole(key):
        def step(state, number):
            keys = jax.random.split(jax.random.fold_in(state.key, number + 1), 16)
            state = attack.step(noisy, state)
            logits = jnp.mean(jax.vmap(noisy, (0, None))(keys, state.image), axis=0)
            return state, (state.score, margin(logits, 2))

        return jax.lax.scan(step, attack.init(key, noisy, IMAGE, 2), jnp.arange(8))[1]

    for score, lead in zip(*map(np.asarray, whole(key)), strict=True):
        if score == pytest.approx(lead, rel=1e-4):
            break
    else:
        pytest.fail("no step's score was the margin of its mean logits")
