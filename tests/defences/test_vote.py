"""The majority by its tie rule, and forms of it that can be climbed."""

import jax
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


# Compiled once for every number of members and of classes, not step by step.
PROGRAMS = {combine: jax.jit(combine) for combine in COMBINERS}


def by(combine, logits) -> np.ndarray:
    return np.asarray(PROGRAMS[combine](logits))


def drawn(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def members(*votes: tuple[int, float], classes: int = 4) -> np.ndarray:
    """[M, K]: each member has one class ahead of the others by so much."""
    rows = [lead * np.eye(classes, dtype=np.float32)[label] for label, lead in votes]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("combine", COMBINERS)
def test_a_unanimous_vote_stands(combine):
    for label in range(4):
        scores = by(combine, members(*[(label, lead) for lead in (1.0, 2.0, 0.1)]))
        assert scores.shape == (4,)
        assert np.argmax(scores) == label


@pytest.mark.parametrize("combine", COMBINERS)
def test_the_order_of_members_does_not_matter(combine):
    logits = drawn(0, 5, 7, scale=3)
    turned = by(combine, logits[[3, 0, 4, 2, 1]])
    np.testing.assert_allclose(turned, by(combine, logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINERS)
def test_one_member_decides_alone(combine):
    logits = drawn(1, 1, 6)
    assert np.argmax(by(combine, logits)) == np.argmax(logits)


def test_more_votes_win_over_any_confidence():
    logits = members((1, 0.01), (1, 0.01), (2, 50.0))
    assert np.argmax(by(vote_scores, logits)) == 1
    assert np.argmax(by(mean_logits, logits)) == 2


def test_equal_votes_go_to_the_higher_mean_softmax_then_to_the_lower_class():
    assert np.argmax(by(vote_scores, members((3, 2.0), (1, 1.0)))) == 3
    assert np.argmax(by(vote_scores, members((1, 2.0), (3, 1.0)))) == 1
    assert np.argmax(by(vote_scores, members((3, 1.0), (1, 1.0)))) == 1
    # A class that nobody votes for does not win by everybody's second choice.
    second = np.float32([[1.0, 0.0, 0.9], [0.0, 1.0, 0.9]])
    assert np.argmax(softmax(second).mean(0)) == 2
    assert np.argmax(by(vote_scores, second)) == 0


def test_the_vote_is_the_rule_written_out():
    logits = drawn(2, 200, 4, 5, scale=4)
    found = np.argmax(jax.jit(jax.vmap(vote_scores))(logits), -1)
    ties = 0
    for one, label in zip(logits, found, strict=True):
        count = np.bincount(one.argmax(-1), minlength=5)
        tied = np.flatnonzero(count == count.max())
        ties += len(tied) > 1
        chance = softmax(one).mean(0)
        assert label == tied[np.argmax(chance[tied])]
    assert ties > 20


def test_the_votes_gradient_is_the_mean_logits():
    logits, weight = drawn(3, 3, 5), drawn(4, 5)
    slope = lambda combine, z: jax.grad(lambda z: weight @ combine(z))(z)
    both = jax.jit(lambda z: [slope(combine, z) for combine in (vote_scores, mean_logits)])
    np.testing.assert_allclose(*both(logits), atol=1e-7)


def test_mean_probabilities_are_the_mean_softmax():
    logits = drawn(5, 4, 6, scale=100)
    found = np.exp(by(mean_probabilities, logits))
    np.testing.assert_allclose(found, softmax(logits).mean(0), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("majority", [2, 3, 4])
def test_smallest_margins_are_zero_just_for_a_strict_majority(majority):
    votes = [(1, 1.0 + m) for m in range(majority)] + [(0, 1.0)] * (4 - majority)
    scores = by(smallest_margins, members(*votes))
    assert (scores[1] == 0) == (majority > 2)
    assert np.all(scores[[0, 2, 3]] < 0)


def test_smallest_margins_add_what_the_nearest_members_lack():
    # To win class 1, three of four are needed: one is won, and the nearest others lack 0.5 and 2.
    logits = members((1, 3.0), (0, 2.0), (0, 9.0), (0, 0.5), classes=2)
    value, slope = jax.jit(jax.value_and_grad(lambda z: smallest_margins(z)[1]))(logits)
    assert value == -2.5
    np.testing.assert_array_equal(slope, [[0, 0], [-1, 1], [0, 0], [-1, 1]])


def test_climbing_smallest_margins_breaks_the_vote():
    logits = drawn(6, 4, 5, scale=2) + 3 * np.eye(1, 5, dtype=np.float32)
    assert np.argmax(by(vote_scores, logits)) == 0
    climb = jax.jit(lambda z: z + 0.1 * jax.grad(lambda z: margin(smallest_margins(z), 0))(z))
    for _ in range(60):
        logits = climb(logits)
    assert np.argmax(by(vote_scores, logits)) != 0
