"""The majority by its tie rule, and forms of it that can be climbed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.defences.vote import (
    mean_logits,
    mean_probabilities,
    smallest_margins,
    vote_scores,
)
from rain_jax.losses import margin

COMBINERS = [mean_logits, mean_probabilities, smallest_margins, vote_scores]


def members(*votes: tuple[int, float], classes: int = 4) -> jax.Array:
    """[M, K]: each member has one class ahead of the others by so much."""
    return jnp.stack([lead * jax.nn.one_hot(label, classes) for label, lead in votes])


@pytest.mark.parametrize("combine", COMBINERS)
def test_a_unanimous_vote_stands(combine):
    for label in range(4):
        scores = combine(members(*[(label, lead) for lead in (1.0, 2.0, 0.1)]))
        assert scores.shape == (4,)
        assert jnp.argmax(scores) == label


@pytest.mark.parametrize("combine", COMBINERS)
def test_the_order_of_members_does_not_matter(combine):
    logits = 3 * jax.random.normal(jax.random.key(0), (5, 7))
    turned = combine(logits[jnp.array([3, 0, 4, 2, 1])])
    np.testing.assert_allclose(turned, combine(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINERS)
def test_one_member_decides_alone(combine):
    logits = jax.random.normal(jax.random.key(1), (1, 6))
    assert jnp.argmax(combine(logits)) == jnp.argmax(logits)


def test_more_votes_win_over_any_confidence():
    logits = members((1, 0.01), (1, 0.01), (2, 50.0))
    assert jnp.argmax(vote_scores(logits)) == 1
    assert jnp.argmax(mean_logits(logits)) == 2


def test_equal_votes_go_to_the_higher_mean_softmax_then_to_the_lower_class():
    assert jnp.argmax(vote_scores(members((3, 2.0), (1, 1.0)))) == 3
    assert jnp.argmax(vote_scores(members((1, 2.0), (3, 1.0)))) == 1
    assert jnp.argmax(vote_scores(members((3, 1.0), (1, 1.0)))) == 1
    # A class that nobody votes for does not win by everybody's second choice.
    second = jnp.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.9]])
    assert jnp.argmax(jax.nn.softmax(second).mean(0)) == 2
    assert jnp.argmax(vote_scores(second)) == 0


def test_the_vote_is_the_rule_written_out():
    logits = 4 * jax.random.normal(jax.random.key(2), (200, 4, 5))
    found = jnp.argmax(jax.vmap(vote_scores)(logits), -1)
    ties = 0
    for one, label in zip(np.asarray(logits), np.asarray(found), strict=True):
        count = np.bincount(one.argmax(-1), minlength=5)
        tied = np.flatnonzero(count == count.max())
        ties += len(tied) > 1
        chance = np.asarray(jax.nn.softmax(one).mean(0))
        assert label == tied[np.argmax(chance[tied])]
    assert ties > 20


def test_the_votes_gradient_is_the_mean_logits():
    logits = jax.random.normal(jax.random.key(3), (3, 5))
    weight = jax.random.normal(jax.random.key(4), (5,))
    found, expected = (
        jax.grad(lambda z, c=combine: weight @ c(z))(logits)
        for combine in (vote_scores, mean_logits)
    )
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_mean_probabilities_are_the_mean_softmax():
    logits = 100 * jax.random.normal(jax.random.key(5), (4, 6))
    found = jnp.exp(mean_probabilities(logits))
    np.testing.assert_allclose(found, jax.nn.softmax(logits).mean(0), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("majority", [2, 3, 4])
def test_smallest_margins_are_zero_just_for_a_strict_majority(majority):
    votes = [(1, 1.0 + m) for m in range(majority)] + [(0, 1.0)] * (4 - majority)
    scores = smallest_margins(members(*votes))
    assert (scores[1] == 0) == (majority > 2)
    assert jnp.all(scores[jnp.array([0, 2, 3])] < 0)


def test_smallest_margins_add_what_the_nearest_members_lack():
    # To win class 1, three of four are needed: one is won, and the nearest others lack 0.5 and 2.
    logits = members((1, 3.0), (0, 2.0), (0, 9.0), (0, 0.5), classes=2)
    assert smallest_margins(logits)[1] == -2.5
    slope = jax.grad(lambda z: smallest_margins(z)[1])(logits)
    np.testing.assert_array_equal(slope, [[0, 0], [-1, 1], [0, 0], [-1, 1]])


def test_climbing_smallest_margins_breaks_the_vote():
    logits = 2 * jax.random.normal(jax.random.key(6), (4, 5)) + 3 * jax.nn.one_hot(0, 5)[None]
    assert jnp.argmax(vote_scores(logits)) == 0
    for _ in range(60):
        logits += 0.1 * jax.grad(lambda z: margin(smallest_margins(z), 0))(logits)
    assert jnp.argmax(vote_scores(logits)) != 0
