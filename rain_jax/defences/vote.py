"""From the logits [M, K] of an ensemble to one [K]: the vote, and what attackers climb."""

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError
from rain_jax.gradients import straight_through
from rain_jax.types import Array, Logits


def _of_members(logits: Array, least: int = 1) -> Array:
    """Refuses what is not [M, K] with a member and `least` classes."""
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < least:
        raise UsageError(f"logits {list(logits.shape)}: expected [members, classes]")
    return logits


def mean_logits(logits: Array) -> Logits:
    """The mean over members: smooth, and the usual way to attack a vote."""
    return jnp.mean(_of_members(logits), axis=0)


def mean_probabilities(logits: Array) -> Logits:
    """The logarithm of the members' mean softmax, so that its own softmax is that mean."""
    members = _of_members(logits).shape[0]
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(float(members))


def _votes(logits: Array) -> Logits:
    count = jnp.sum(jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1]), axis=0)
    # Half a vote at most: it orders those with as many votes and no others.
    return count + jnp.mean(jax.nn.softmax(logits), axis=0) / 2


def vote_scores(logits: Array) -> Logits:
    """Scores whose argmax is the members' majority.

    Votes plus half the mean softmax, both of which are in [0, 1] for each member: with as many
    votes the higher mean softmax wins (to float32's resolution), then the lower class. The rule is
    our own choice. Votes have no gradient; backwards it is that of `mean_logits` (BPDA).
    """
    return _straight_votes(_of_members(logits))


_straight_votes = straight_through(_votes, mean_logits)


def smallest_margins(logits: Array) -> Logits:
    """How near a strict majority is to voting for each class: 0 where it does, negative before.

    Of the M members the M // 2 + 1 count that lack the least, with the sum of what their logit of
    the class is short of their best other one. To climb a class's score moves those members only
    that can be won most cheaply, and spends nothing on members already won; the mean logits do
    both. A form to attack the vote through (our own), never the vote itself.
    """
    members, classes = _of_members(logits, 2).shape
    best, runner_up = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    leads = jnp.arange(classes)[None, :] == jnp.argmax(logits, axis=-1)[:, None]
    others = jnp.where(leads, runner_up[:, None], best[:, None])
    lacking = jnp.minimum(logits - others, 0.0)
    nearest, _ = jax.lax.top_k(lacking.T, members // 2 + 1)
    return jnp.sum(nearest, axis=-1)
