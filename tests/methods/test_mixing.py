"""Mixup and CutMix: what is mixed with what, and what the methods make of it."""

import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import methods
from rain_jax.checks import UsageError
from rain_jax.methods.mixing import mixed
from rain_jax.types import Batch

COUNT = 10
# Image i is 2^i throughout, so that a mixture tells of what; the last two are padding.
IMAGES = np.tile(np.float32(2.0) ** np.arange(COUNT)[:, None, None, None], (1, 16, 12, 1))
IMAGES = IMAGES.astype(np.float32)
PLACES = np.arange(COUNT, dtype=np.int32)
BATCH = Batch(IMAGES, PLACES, 100 + PLACES, PLACES < COUNT - 2)
ONE_HOT = np.eye(COUNT, dtype=np.float32)


@functools.cache
def program(kind):
    return jax.jit(
        lambda key, batch, alpha: mixed(key, batch, jnp.asarray(ONE_HOT), kind=kind, alpha=alpha)
    )


def run(kind, seed, batch=BATCH, alpha=3.0):
    return jax.tree.map(np.asarray, program(kind)(jax.random.key(seed), batch, alpha))


many = pytest.mark.parametrize("seed", range(4))


def shares(targets):
    """Lambda, and the partner of each row: from rows that did not meet themselves."""
    targets = np.asarray(targets)
    own = np.diag(targets)
    share = own[own < 1 - 1e-6]
    partner = np.argmax(targets - np.diag(own), -1)
    return share, np.where(own < 1 - 1e-6, partner, np.arange(COUNT))


@many
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_one_share_for_all_and_the_partners_are_a_permutation_of_the_valid(kind, seed):
    batch, targets = run(kind, seed)
    share, partner = shares(targets)
    np.testing.assert_allclose(np.sum(targets, -1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(share, share[0], rtol=1e-6)
    np.testing.assert_array_equal(np.sort(partner[:8]), np.arange(8))
    np.testing.assert_array_equal(batch.image[8:], IMAGES[8:])
    larger = np.arange(COUNT) if share[0] >= 0.5 else partner
    np.testing.assert_array_equal(batch.label, larger)


@many
def test_mixup_is_the_mean_by_its_share(seed):
    batch, targets = run("mixup", seed)
    expected = np.float64(targets) @ IMAGES[:, 0, 0, 0]
    np.testing.assert_allclose(batch.image[:, :, 0, 0], np.tile(expected[:, None], 16), rtol=1e-5)


@many
def test_cutmix_puts_one_rectangle_in_its_place(seed):
    batch, targets = run("cutmix", seed)
    share, partner = shares(targets)
    rows = np.flatnonzero(partner != np.arange(COUNT))
    inside = np.asarray(batch.image != IMAGES)[rows, :, :, 0]
    assert np.all(inside == inside[0])
    np.testing.assert_array_equal(
        batch.image[rows], np.where(inside[..., None], IMAGES[partner[rows]], IMAGES[rows])
    )
    down, across = inside[0].any(1), inside[0].any(0)
    np.testing.assert_array_equal(inside[0], down[:, None] & across[None, :])
    np.testing.assert_allclose(share, 1 - inside[0].mean(), atol=1e-6)


def test_what_padding_holds_does_not_matter():
    image, index = IMAGES.copy(), BATCH.index.copy()
    image[8:], index[8:] = -1.0, index[8:] + 7
    other = BATCH._replace(image=image, index=index)
    for kind in ("mixup", "cutmix"):
        one, two = run(kind, 0), run(kind, 0, other)
        np.testing.assert_array_equal(one[0].image[:8], two[0].image[:8])
        np.testing.assert_array_equal(one[1][:8], two[1][:8])


def test_the_share_is_the_same_on_all_devices_and_the_partners_are_not():
    here, there = run("mixup", 0), run("mixup", 0, BATCH._replace(index=BATCH.index + 50))
    assert shares(here[1])[0][0] == pytest.approx(shares(there[1])[0][0])
    assert np.any(shares(here[1])[1] != shares(there[1])[1])


def test_alpha_draws_shares_to_the_middle_or_the_ends():
    draw = jax.vmap(lambda key, alpha: program("mixup")(key, BATCH, alpha)[1], (0, None))
    draw = jax.jit(lambda keys, alpha, draw=draw: jnp.max(draw(keys, alpha)[:, :8], -1))
    keys = jax.random.split(jax.random.key(0), 100)
    # The least over a batch skips those that met themselves; of two shares it is the larger.
    middle, even, ends = (np.min(draw(keys, alpha), -1) for alpha in (1e4, 1.0, 0.05))
    np.testing.assert_allclose(middle, 0.5, atol=0.03)
    np.testing.assert_allclose(np.mean(even), 0.75, atol=0.05)
    assert np.mean(ends) > 0.9


# --- in the methods ----------------------------------------------------------------------------

WEIGHT = np.random.default_rng(1).standard_normal((4, 3))
SMALL = by_hand.ROWS._replace(
    image=jnp.asarray(np.random.default_rng(4).random((6, 2, 2, 1), np.float32))
)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("name", ["natural", "adversarial", "trades"])
def test_the_loss_has_both_labels_and_the_attack_the_larger_one(name, kind, key):
    attack = lambda key, logits_fn, image, label: jnp.clip(image + 0.1 * label, 0, 1)
    given = () if name == "natural" else (attack,)
    options = dict(mix=kind, mix_alpha=2.0, label_smoothing=0.1)
    objective = getattr(methods, name)(by_hand.LINEAR, *given, **options)
    smooth = np.float32(0.9 * np.eye(3)[SMALL.label] + 0.1 / 3)
    batch, targets = jax.jit(
        lambda key: mixed(key, SMALL, jnp.asarray(smooth), kind=kind, alpha=2.0)
    )(key)  # fmt: skip
    clean = np.asarray(batch.image, np.float64).reshape(6, 4)
    attacked = np.clip(clean + 0.1 * np.asarray(batch.label)[:, None], 0, 1)
    p, q = (by_hand.log_softmax(x @ WEIGHT) for x in (clean, attacked))
    losses = -np.sum(np.asarray(targets) * (q if name == "adversarial" else p), -1)
    if name == "trades":
        losses = losses + 6.0 * np.sum(np.exp(p) * (p - q), -1)
    loss, _ = jax.jit(objective)(by_hand.f32({"weight": WEIGHT}), {}, key, SMALL)
    np.testing.assert_allclose(loss, np.sum(losses[by_hand.VALID]), rtol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="did you mean 'cutmix'"):
        methods.natural(by_hand.LINEAR, mix="cutmx")
    with pytest.raises(UsageError, match="mix_alpha=0"):
        methods.trades(by_hand.LINEAR, by_hand.lighten, mix="mixup", mix_alpha=0)
