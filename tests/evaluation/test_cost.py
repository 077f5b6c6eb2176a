"""Passes that attacks cost, against what one can count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks
from rain_jax.attacks import suites
from rain_jax.evaluation import Passes, cost, passes
from rain_jax.gradients import eot
from rain_jax.norms import linf
from rain_jax.types import Iteration, Threat

THREAT = Threat(linf, 0.1)
SHAPE, CLASSES = (6, 5, 2), 4


def counted(attack, steps, looks=1):
    found = cost(attack, SHAPE, CLASSES)
    return found.init + found.step * steps + found.best * looks


@pytest.mark.parametrize(
    ("attack", "forward", "backward"),
    [
        # every step a gradient, and the last image judged
        (attacks.pgd(THREAT, steps=10), 11, 10),
        (attacks.pgd(THREAT, steps=10, restarts=3), 33, 30),
        (attacks.pgd(THREAT, steps=10, estimator=eot(5)), 55, 50),
        (attacks.fgsm(THREAT), 2, 1),
        # the start's gradient, and every step's
        (attacks.apgd(THREAT, steps=10), 11, 11),
        (attacks.square(THREAT, queries=10), 10, 0),
        # two forward passes for each direction, one to judge where it is
        (attacks.spsa(THREAT, steps=3, draws=4), 3 * (2 * 4 + 1) + 1, 0),
    ],
)
def test_passes_of_attacks_are_those_of_their_papers(attack, forward, backward):
    assert counted(attack, attack.steps) == Passes(forward, backward)


def test_targets_are_no_more_than_the_wrong_classes():
    one = cost(suites.standard(THREAT)["apgd_t"], SHAPE, 4).step
    assert one == Passes(3, 3)
    assert cost(suites.standard(THREAT)["apgd_t"], SHAPE, 100).step == Passes(9, 9)


def test_loops_count_their_length_and_what_nobody_uses_does_not_count():
    def init(key, logits_fn, image, target):
        return key, image

    def step(logits_fn, state):
        key, image = state

        def once(image, _):
            slope = jax.grad(lambda x: logits_fn(key, x)[0])(image)
            return image + slope, None

        image, _ = jax.lax.scan(once, image, length=7)
        _unused = logits_fn(key, image)
        return key, image

    attack = Iteration(init, step, lambda f, s: (s[1], jnp.max(f(*s))), 2)
    assert cost(attack, SHAPE, CLASSES).step == Passes(7, 7)
    assert counted(attack, 2, looks=3) == Passes(14 + 3, 14)


def test_the_count_is_that_of_calls_made_one_by_one():
    """Against a model that counts how often it is run, outside of any program."""
    asked = []

    def logits_fn(key, image):
        jax.debug.callback(lambda: asked.append(1))
        return jnp.sin(jnp.sum(image) * jnp.arange(1.0, CLASSES + 1))

    attack = attacks.square(THREAT, queries=9)
    attack(jax.random.key(0), logits_fn, jnp.full(SHAPE, 0.5), jnp.int32(1))
    jax.effects_barrier()
    assert np.sum(asked) == counted(attack, attack.steps).forward


def test_an_evaluation_adds_up_what_its_images_took():
    """Ten steps each, but for two images: one broke on the way, one at its start."""
    steps = np.array([10, 4, 0, 10])
    pgd = attacks.pgd(THREAT, steps=10)  # tells without asking what it has seen on the way
    assert passes(pgd, cost(pgd, SHAPE, CLASSES), steps) == Passes(24 + 2, 24)
    fgsm = attacks.fgsm(THREAT)  # is asked for its image at its end, and knows nothing before
    assert passes(fgsm, cost(fgsm, SHAPE, CLASSES), np.array([1, 1, 1])) == Passes(6, 3)
    apgd = attacks.apgd(THREAT, steps=10)  # carries its best along
    assert passes(apgd, cost(apgd, SHAPE, CLASSES), steps) == Passes(24 + 4, 24 + 4)
