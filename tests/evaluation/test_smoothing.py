"""Certified radii: closed form on a linear model, exact intervals, and the published rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rain_jax.checks import UsageError
from rain_jax.evaluation import smoothing
from rain_jax.parallel import choose_devices, place, round_up
from rain_jax.types import Batch

SHAPE = (4, 4, 1)
ROOT = jax.random.key(3)
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=SHAPE).astype(np.float32)
BIAS = -float(np.sum(WEIGHT)) / 2  # the plane goes through the grey image


def linear(variables):
    """Two classes; sums written out, so that batch sizes round alike."""

    def logits_fn(key, image):
        score = jnp.sum(variables * image) + BIAS
        return jnp.stack([-score, score])

    return logits_fn


def images_at(distances):
    """Images [N, 4, 4, 1] whose signed distances to the plane are these: inside the box or not."""
    away = np.asarray(distances)[:, None, None, None] * WEIGHT / np.linalg.norm(WEIGHT)
    along = RANDOM.normal(size=(len(distances), *SHAPE))
    sides = np.sum(along * WEIGHT, axis=(1, 2, 3), keepdims=True) / np.sum(WEIGHT**2)
    return (0.5 + away + 0.1 * (along - sides * WEIGHT)).astype(np.float32)


@functools.cache
def program(model, count, copies, mapping):
    devices = place(mapping, choose_devices(count))
    return devices, smoothing.counting(model, devices, copies=copies)


def counted(
    model, variables, images, *, sigma, draws, size=None, count=1, copies=64, key=ROOT,
    mapping="shard_map",
):  # fmt: skip
    devices, run = program(model, count, copies, mapping)
    size = round_up(size or len(images), count)
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        pad = size - len(part)
        batch = Batch(
            np.pad(part, ((0, pad), (0, 0), (0, 0), (0, 0))),
            np.zeros(size, np.int32),
            np.arange(start, start + size, dtype=np.int32),
            np.arange(size) < len(part),
        )
        parts.append(run(devices.replicate(variables), key, sigma, draws, batch))
    return np.concatenate(parts)


def certificates(images, *, sigma, draws, alpha, selection=50):
    first = counted(linear, WEIGHT, images, sigma=sigma, draws=selection, key=jax.random.key(1))
    second = counted(linear, WEIGHT, images, sigma=sigma, draws=draws, key=jax.random.key(2))
    return smoothing.certify(first, second, draws=draws, sigma=sigma, alpha=alpha)


# --- A linear model: the radius is the distance to the plane ------------------------------------


@pytest.mark.parametrize("sigma", [0.2, 1.0])  # clipped to the box, the larger noise would tell
def test_bounds_on_a_plane_hold_as_often_as_they_say(sigma):
    alpha, number = 0.05, 2000
    exact = sigma * np.linspace(0.4, 1.6, number)  # from p = 0.66 to 0.95
    found = certificates(images_at(exact), sigma=sigma, draws=200, alpha=alpha)
    assert np.all(np.isin(found.prediction, [1, smoothing.ABSTAIN]))
    wrong = np.sum(found.radius > exact)
    # At most alpha of them, as far as chance goes; and the exact interval uses most of that up.
    assert wrong <= scipy.stats.binom.ppf(0.9999, number, alpha)
    assert wrong >= scipy.stats.binom.ppf(0.0001, number, alpha / 2)


def test_bounds_approach_the_distance_with_more_draws():
    exact = np.array([0.3, -0.3, 0.1, -0.45])
    found = {
        draws: certificates(images_at(exact), sigma=0.5, draws=draws, alpha=0.001)
        for draws in (100, 2000, 40_000)
    }
    np.testing.assert_array_equal(found[40_000].prediction, [1, 0, 1, 0])
    gaps = [np.mean(np.abs(exact) - found[draws].radius) for draws in found]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    assert gaps[2] < 0.01
    # Far away it is the number of draws that bounds what can be shown.
    far = certificates(images_at([5.0]), sigma=0.5, draws=2000, alpha=0.001)
    assert far.radius[0] == smoothing.largest_radius(2000, sigma=0.5, alpha=0.001)
    assert far.radius[0] == pytest.approx(0.5 * scipy.stats.norm.ppf(0.001 ** (1 / 2000)))


def test_the_middle_is_left_undecided():
    found = certificates(images_at(np.zeros(300)), sigma=0.5, draws=200, alpha=0.05)
    said = found.prediction != smoothing.ABSTAIN
    assert np.sum(said) <= scipy.stats.binom.ppf(0.9999, 300, 0.05)
    np.testing.assert_array_equal(found.radius[~said], 0.0)
    counts = counted(linear, WEIGHT, images_at(np.zeros(300)), sigma=0.5, draws=200)
    decided = smoothing.predict(counts, alpha=0.05) != smoothing.ABSTAIN
    assert np.sum(decided) <= scipy.stats.binom.ppf(0.9999, 300, 0.05)


# --- Counts -------------------------------------------------------------------------------------

FEW = images_at(np.linspace(-0.4, 0.4, 11))


@pytest.mark.parametrize(
    ("size", "count", "copies", "mapping"),
    [
        (1, 1, 7, "shard_map"), (3, 1, 200, "shard_map"), (4, 1, 1, "shard_map"),
        (11, 8, 64, "shard_map"), (5, 8, 30, "pmap"),
    ],
)  # fmt: skip
def test_counts_feel_neither_batches_nor_rounds_nor_devices(size, count, copies, mapping):
    expected = counted(linear, WEIGHT, FEW, sigma=0.5, draws=100)
    assert np.all(np.sum(expected, axis=1) == 100)
    assert np.sum(np.min(expected, axis=1) > 5) >= 5  # or equal counts would say nothing
    found = counted(
        linear, WEIGHT, FEW, sigma=0.5, draws=100,
        size=size, count=count, copies=copies, mapping=mapping,
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)


def test_more_draws_go_on_where_fewer_ended():
    counts = [
        counted(linear, WEIGHT, FEW, sigma=0.5, draws=n, copies=16).astype(int) for n in (30, 77)
    ]
    assert np.all(counts[1] >= counts[0])
    np.testing.assert_array_equal(np.sum(counts[1] - counts[0], axis=1), 47)


def test_draws_are_of_the_image_and_of_the_key():
    same = np.repeat(images_at([0.1]), 40, axis=0)
    counts = counted(linear, WEIGHT, same, sigma=0.5, draws=50)
    assert len(np.unique(counts[:, 0])) > 4
    other = counted(linear, WEIGHT, same, sigma=0.5, draws=50, key=jax.random.key(9))
    assert np.mean(counts == other) < 0.5


def test_one_program_serves_all_sigmas_draws_and_variables():
    traced = []

    def spied(variables):
        traced.append(1)
        return linear(variables)

    devices = place("shard_map", choose_devices(1))
    run = smoothing.counting(spied, devices, copies=10)
    batch = Batch(FEW, np.zeros(11, np.int32), np.arange(11, dtype=np.int32), np.ones(11, bool))
    run(devices.replicate(WEIGHT), ROOT, 0.25, 100, batch)
    before = len(traced)
    run(devices.replicate(2 * WEIGHT), ROOT, 1.0, 7, batch)
    assert len(traced) == before


def test_logits_that_are_no_numbers_count_for_nobody():
    def broken(variables):
        def logits_fn(key, image):
            logits = linear(variables)(key, image)
            return jnp.where(logits[1] > 0, jnp.array([jnp.nan, 1.0]), logits)

        return logits_fn

    whole = counted(linear, WEIGHT, FEW, sigma=0.5, draws=100)
    found = counted(broken, WEIGHT, FEW, sigma=0.5, draws=100)
    np.testing.assert_array_equal(found[:, 0], whole[:, 0])
    np.testing.assert_array_equal(found[:, 1], 0)


def test_a_random_model_draws_anew_under_each_noise():
    def coin(variables):
        return lambda key, image: (
            jnp.where(jax.random.bernoulli(key, 0.3), 1.0, -1.0) * jnp.array([-1.0, 1.0])
        )

    hits = np.sum(counted(coin, WEIGHT, FEW, sigma=0.5, draws=1000)[:, 1])
    assert scipy.stats.binomtest(int(hits), 11_000, 0.3).pvalue > 0.005


# --- The published rules, written down again ----------------------------------------------------


def published_certify(first, second, draws, sigma, alpha):
    guess = int(np.argmax(first))
    test = scipy.stats.binomtest(int(second[guess]), draws, alternative="greater")
    bound = test.proportion_ci(confidence_level=1 - alpha, method="exact").low
    return (-1, 0.0) if bound < 0.5 else (guess, sigma * scipy.stats.norm.ppf(bound))


def published_predict(counts, alpha):
    runner, best = np.argsort(counts)[-2:]
    together = int(counts[best] + counts[runner])
    if not together or scipy.stats.binomtest(int(counts[best]), together, 0.5).pvalue > alpha:
        return -1
    return int(best)


@pytest.mark.parametrize(("alpha", "draws"), [(0.001, 100), (0.05, 30), (0.4, 7), (0.001, 3000)])
def test_decisions_are_those_of_the_published_code(alpha, draws):
    random = np.random.default_rng(draws)
    chances = random.dirichlet(np.full(5, 0.3), 200)
    chances[:20] = [0.5, 0.5, 0.0, 0.0, 0.0]
    chances[20:30] = [0.0, 1.0, 0.0, 0.0, 0.0]
    first, second = random.multinomial(10, chances), random.multinomial(draws, chances)
    second[30:35] = 0  # no answer was a number
    found = smoothing.certify(first, second, draws=draws, sigma=0.7, alpha=alpha)
    expected = [
        published_certify(*pair, draws, 0.7, alpha) for pair in zip(first, second, strict=True)
    ]
    np.testing.assert_array_equal(found.prediction, [each[0] for each in expected])
    np.testing.assert_allclose(found.radius, [each[1] for each in expected], rtol=1e-9, atol=1e-12)
    predicted = smoothing.predict(second, alpha=alpha)
    np.testing.assert_array_equal(predicted, [published_predict(row, alpha) for row in second])
    for said in (found.prediction, predicted):
        assert 10 < np.sum(said == smoothing.ABSTAIN) < 190


def test_the_bound_is_clopper_and_pearsons():
    for draws in (1, 10, 100_000):
        for hits in {0, 1, draws // 2, draws - 1, draws}:
            for alpha in (1e-6, 0.001, 0.05, 0.7):
                low = float(smoothing.lower_bound(hits, draws, alpha))
                test = scipy.stats.binomtest(hits, draws, alternative="greater")
                exact = test.proportion_ci(1 - alpha, "exact").low
                assert low == pytest.approx(exact, rel=1e-9)
                # By its meaning: were the probability that low, as many hits had a chance of alpha.
                if hits:
                    chance = scipy.stats.binom.sf(hits - 1, draws, low)
                    assert chance == pytest.approx(alpha, rel=1e-6)


# --- Sums over images ---------------------------------------------------------------------------


def test_accuracies_by_hand():
    found = smoothing.Certificates(
        np.array([0, 1, 2, smoothing.ABSTAIN, 4]), np.array([0.5, 0.25, 9.0, 0.0, 0.0])
    )
    label = np.array([0, 1, 0, 3, 4])
    radii = [0.0, 0.25, 0.2500001, 0.5, 1.0]
    np.testing.assert_allclose(
        smoothing.certified_accuracy(found, label, radii), [0.6, 0.4, 0.2, 0.2, 0.0]
    )
    np.testing.assert_array_equal(
        smoothing.certified(found, label, 0.25), [True, True, False, False, False]
    )
    assert smoothing.average_certified_radius(found, label) == pytest.approx(0.75 / 5)


def test_too_few_draws_prove_nothing():
    assert smoothing.largest_radius(9, sigma=1.0, alpha=0.001) == 0.0  # 0.001 < 2^-9
    assert smoothing.largest_radius(10, sigma=1.0, alpha=0.001) > 0.0
    counts = np.array([[9, 0]])
    found = smoothing.certify(counts, counts, draws=9, sigma=1.0, alpha=0.001)
    assert found.prediction[0] == smoothing.ABSTAIN


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: smoothing.lower_bound(3, 2, 0.1), "hits=3"),
        (lambda: smoothing.lower_bound(1, 2, 0.0), "alpha=0.0"),
        (lambda: smoothing.lower_bound(1, 2, 1.0), "alpha=1.0"),
        (lambda: smoothing.predict(np.zeros((3, 2))), "counts float64"),
        (lambda: smoothing.predict(np.zeros((3, 1), int)), r"\[3, 1\]"),
        (lambda: smoothing.predict(np.zeros(3, int)), r"\[3\]"),
        (lambda: smoothing.certify(TABLE, TABLE[:1], draws=9, sigma=1.0), "not alike"),
        (lambda: smoothing.certify(TABLE, TABLE, draws=1, sigma=1.0), "hits"),
        (lambda: smoothing.certify(TABLE, TABLE, draws=9, sigma=0.0), "sigma=0.0"),
        (lambda: counted(linear, WEIGHT, FEW, sigma=-0.5, draws=10), "sigma=-0.5"),
        (lambda: counted(linear, WEIGHT, FEW, sigma=0.5, draws=0), "draws=0"),
        (lambda: counted(linear, WEIGHT, FEW, sigma=0.5, draws=1, copies=0), "copies=0"),
    ],
)
def test_bad_numbers_are_refused(call, said):
    with pytest.raises(UsageError, match=said):
        call()


TABLE = np.array([[5, 4], [4, 5]])
