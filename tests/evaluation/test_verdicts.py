"""The judge is strict and fair, and counts do not depend on how images are batched or placed."""

import dataclasses
import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import evaluate
from rain_jax import attacks, data, evaluation, methods, models, optimisers, training
from rain_jax.checks import UsageError
from rain_jax.config import attack_columns, build, networks
from rain_jax.evaluation import Rules, verdicts
from rain_jax.norms import l1, l2, linf, random_start
from rain_jax.parallel import choose_devices, place, round_up
from rain_jax.types import Batch, Threat

THREAT = Threat(linf, 0.1)
IMAGES = 157  # no multiple of any batch below
NETWORK = models.cnn(10, widths=(8, 16), hidden=32)
ROOT = jax.random.key(7)


# --- A trained network on digits --------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def test_images(digits):
    return data.first(digits.test, IMAGES)


@pytest.fixture(scope="module")
def variables(digits):
    """Three epochs of training: enough to be right often, not enough to be robust."""
    method = training.minimise(methods.natural(NETWORK), optimisers.sgd(0.05, nesterov=True))
    state = method.init(NETWORK.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    images, labels = map(jnp.asarray, data.resident(digits.train))
    order = data.epoch_order(jax.random.key(1), 0, len(labels))

    @jax.jit
    def step(state):
        batch = data.take(images, labels, order, state.step % 20, 64)
        return method.step(jax.random.key(2), state, batch)[0]

    for _ in range(60):
        state = step(state)
    return training.variables_of(training.model_of(state))


def judged(variables, source, *, size, count=1, mapping="shard_map", attack=None):
    attack = attacks.pgd(THREAT, steps=4, restarts=2) if attack is None else attack
    devices = place(mapping, choose_devices(count))
    batches = data.evaluation_batches(source, round_up(size, count))
    return attacked(
        networks.logits_fn_of(NETWORK), THREAT, attack, devices, size, variables, ROOT, batches
    )


def attacked(of, threat, attack, devices, size, variables, key, batches):
    """The judgement on what an attack finds; no image leaves it early."""
    drive = evaluation.packed(attack, of, devices, batch_size=size, early=False)
    judge = evaluation.judging(of, Rules(threat), devices, batch_size=size)
    both = (devices.replicate(variables),) * 2
    found = evaluation.attack_and_judge(drive, judge, both, key, batches)
    return evaluation.join([some.judgement for some in found])


@pytest.fixture(scope="module")
def reference(variables, test_images):
    found = judged(variables, test_images, size=16)
    # Some stand and some fall, or equal verdicts would say nothing.
    assert 10 < np.sum(evaluation.standing(found)) < IMAGES - 10
    return found


@pytest.mark.parametrize(
    ("size", "count", "mapping"),
    [
        (50, 1, "shard_map"), (256, 1, "shard_map"), (256, 1, "pmap"), (16, 8, "shard_map"),
        (50, 8, "shard_map"), (50, 8, "pmap"), (256, 8, "pmap"),
    ],
)  # fmt: skip
def test_verdicts_feel_neither_batches_nor_devices(
    size, count, mapping, variables, test_images, reference
):
    found = judged(variables, test_images, size=size, count=count, mapping=mapping)
    np.testing.assert_array_equal(found.index, np.arange(IMAGES))
    np.testing.assert_array_equal(found.label, test_images.arrays[1])
    np.testing.assert_array_equal(found.right, reference.right)
    np.testing.assert_array_equal(found.allowed, reference.allowed)
    np.testing.assert_allclose(found.margin, reference.margin, atol=1e-3)


def test_verdicts_do_not_feel_the_other_images(variables, test_images, reference):
    few = judged(variables, data.first(test_images, 21), size=16)
    np.testing.assert_array_equal(few.index, np.arange(21))
    np.testing.assert_array_equal(few.right, reference.right[:21])
    np.testing.assert_allclose(few.margin, reference.margin[:21], atol=1e-3)
    # In another order, too: keys belong to places in the data set.
    order = np.random.default_rng(0).permutation(IMAGES)[:16]
    image, label = test_images.arrays
    batch = Batch(image[order], label[order], order.astype(np.int32), np.ones(16, bool))
    devices = place("shard_map", choose_devices(1))
    attack = attacks.pgd(THREAT, steps=4, restarts=2)
    of = networks.logits_fn_of(NETWORK)
    found = attacked(of, THREAT, attack, devices, 16, variables, ROOT, [batch])
    np.testing.assert_array_equal(found.index, np.sort(order))
    np.testing.assert_array_equal(found.right, reference.right[np.sort(order)])


@pytest.mark.parametrize(("size", "count", "batch"), [(50, 8, 56), (16, 8, 16), (1, 8, 8)])
def test_batches_are_rounded_up_to_the_devices(size, count, batch):
    assert round_up(size, count) == batch


# --- The judge --------------------------------------------------------------------------------

BLANK = jnp.full((8, 8, 1), 0.5)


def verdict(logits_fn, candidate=BLANK, label=0, draws=1, key=ROOT):
    (right, _, margin, prediction, allowed, distance, *_), _ = evaluation.judge(
        logits_fn, Rules(THREAT, draws), key, BLANK, candidate, label
    )
    return dict(right=bool(right), margin=float(margin), prediction=int(prediction),
                allowed=bool(allowed), distance=float(distance))  # fmt: skip


def judgement(right, allowed=True, index=None):
    right = np.asarray(right)
    index = np.arange(len(right)) if index is None else np.asarray(index)
    zeros = np.zeros(len(right))
    kept = np.broadcast_to(allowed, right.shape)
    return evaluation.Judgement(
        index, zeros, right, right, zeros, zeros, kept, zeros, zeros, zeros.astype(bool)
    )


@pytest.mark.parametrize("label", range(4))
def test_constant_logits_are_wrong_for_every_label(label):
    assert not verdict(lambda key, image: jnp.zeros(4), label=label)["right"]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_logits_that_are_no_numbers_are_wrong(bad, place):
    logits = jnp.array([9.0, 1.0, 2.0]).at[place].set(bad)
    assert not verdict(lambda key, image: logits)["right"]


def test_a_clear_case_by_hand():
    found = verdict(lambda key, image: jnp.array([3.0, 1.0, 2.5]))
    assert found == dict(right=True, margin=-0.5, prediction=0, allowed=True, distance=0.0)
    found = verdict(lambda key, image: jnp.array([3.0, 1.0, 2.5]), label=2)
    assert (found["right"], found["margin"], found["prediction"]) == (False, 0.5, 0)


@pytest.mark.parametrize(
    "candidate", [BLANK + 0.2, BLANK.at[0, 0, 0].set(jnp.nan)], ids=["too far", "no number"]
)
def test_an_image_outside_the_threat_breaks_nothing(candidate):
    found = verdict(lambda key, image: jnp.array([0.0, 1.0]), candidate)
    assert not found["right"]
    assert not found["allowed"]
    stands = evaluation.standing(judgement([False, False], allowed=[False, True]))
    np.testing.assert_array_equal(stands, [True, False])


def test_the_threat_is_kept_to_the_last_bit_of_float32_arithmetic():
    assert verdict(lambda key, image: jnp.array([0.0, 1.0]), BLANK + 0.1)["allowed"]
    assert not verdict(lambda key, image: jnp.array([0.0, 1.0]), BLANK + 0.1001)["allowed"]


def moody(key, image):
    """Right in three draws of four, by 1; wrong in the fourth, by 11."""
    return jnp.where(jax.random.uniform(key) < 0.75, jnp.array([1.0, 0]), jnp.array([-11.0, 0]))


def test_the_share_of_single_draws_is_told_beside_the_verdict():
    (right, share, *_), _ = evaluation.judge(moody, Rules(THREAT, 400), ROOT, BLANK, BLANK, 0)
    assert not right
    np.testing.assert_allclose(share, 0.75, atol=0.07)


@pytest.mark.parametrize(
    ("norm", "radius", "shape"),
    # In front of the third and fourth lies a level hardly out of reach; of a distance over many
    # pixels float32 and float64 think differently.
    [(linf, 8 / 255, (6, 6, 3)), (l1, 2.0, (6, 6, 3)), (linf, 0.03137, (6, 6, 3)),
     (linf, 0.00784, (6, 6, 3)), (l2, 0.3, (6, 6, 3)), (l2, 0.5, (28, 28, 1))],
)  # fmt: skip
def test_eight_bits_keep_to_the_threat_and_are_eight_bits(norm, radius, shape, key):
    threat = Threat(norm, radius)
    clean = jnp.round(jax.random.uniform(key, (256, *shape)) * 255) / 255
    keys = jax.random.split(key, 256)
    found = jax.vmap(lambda k, x: random_start(threat, k, x))(keys, clean)
    images = np.asarray(jax.vmap(lambda x, z: verdicts.rounded(threat, x, z))(clean, found))
    np.testing.assert_allclose(images * 255, np.round(images * 255), atol=1e-4)
    keeps, _ = verdicts.kept_in_float64(threat, np.asarray(clean), images)
    assert np.all(keeps)
    # The nearest level wherever that is allowed: nothing is given away.
    assert np.max(np.abs(images - np.asarray(found))) <= 1.001 / 255
    corners = jnp.clip(clean + 8 / 255, 0, 1)
    kept = jax.vmap(lambda x, z: verdicts.rounded(Threat(linf, 8 / 255), x, z))(clean, corners)
    np.testing.assert_allclose(kept, corners, atol=1e-6)


def test_rounding_happens_before_the_verdict():
    """A model that is wrong only between the levels is right once images are saved."""

    def logits_fn(key, image):
        off = jnp.max(jnp.abs(image * 255 - jnp.round(image * 255)))
        return jnp.where(off > 0.1, jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))

    clean, between = jnp.full((4, 4, 1), 100 / 255), jnp.full((4, 4, 1), 100.3 / 255)
    for eight_bit in (False, True):
        rules = Rules(THREAT, eight_bit=eight_bit)
        (right, *_), image = evaluation.judge(logits_fn, rules, ROOT, clean, between, 0)
        assert bool(right) == eight_bit
        np.testing.assert_allclose(image, clean if eight_bit else between, atol=1e-7)


@pytest.mark.parametrize("order", [np.inf, 2, 1])
def test_distances_are_checked_in_float64(order):
    norm = {np.inf: linf, 2: l2, 1: l1}[order]
    change = np.zeros((3, 4, 4, 2), np.float32)
    change[:, 1, 2, 0] = [0.1, 0.1001, np.nan]
    clean = np.full((3, 4, 4, 2), 0.5, np.float32)
    keeps, distance = verdicts.kept_in_float64(Threat(norm, 0.1), clean, clean + change)
    np.testing.assert_array_equal(keeps, [True, False, False])
    np.testing.assert_allclose(distance[:2], [0.1, 0.1001], rtol=1e-6)
    keeps, _ = verdicts.kept_in_float64(Threat(norm, np.inf), clean, clean + 5.1 * change)
    np.testing.assert_array_equal(keeps, [False, False, False])  # 0.5 + 0.51 is no pixel
    keeps, _ = verdicts.kept_in_float64(Threat(norm, np.inf), clean, clean - 3 * change)
    np.testing.assert_array_equal(keeps, [True, True, False])


def test_random_models_are_judged_by_the_mean_of_their_draws():
    single = [verdict(moody, key=jax.random.key(seed))["right"] for seed in range(20)]
    assert any(single)
    assert not all(single)
    for seed in range(3):
        key = jax.random.key(seed)
        found = verdict(moody, key=key, draws=100)
        expected = np.mean([moody(k, BLANK) for k in jax.random.split(key, 100)], axis=0)
        np.testing.assert_allclose(found["margin"], expected[1] - expected[0], rtol=1e-4)
        assert not found["right"]
    assert verdict(moody, key=jax.random.key(0), draws=4) != verdict(
        moody, key=jax.random.key(1), draws=4
    )


def test_the_judge_draws_keys_that_the_attack_does_not_know():
    """The model is wrong on an image that was made for the very draw with which it looks."""

    def logits_fn(key, image):
        seen = jnp.any(jnp.abs(image - jax.random.uniform(key)) < 1e-6)
        return jnp.where(seen, jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))

    def attack(key, logits_fn, image, label):
        keys = [key, jax.random.fold_in(key, 0), *jax.random.split(key, 2), jax.random.key(7)]
        known = [jax.random.uniform(k) for k in [*keys, jax.random.split(key, 1)[0]]]
        return image.at[0, : len(known), 0].set(jnp.stack(known))

    key = jax.random.key(7)
    spied = attack(key, logits_fn, BLANK, 0)
    wide = Threat(linf, 1.0)
    assert not evaluation.judge(logits_fn, Rules(wide), key, BLANK, spied, 0)[0][0], (
        "the trap works"
    )

    devices = place("shard_map")
    batch = Batch(
        np.tile(BLANK, (16, 1, 1, 1)), np.zeros(16, np.int32), np.arange(16, dtype=np.int32),
        np.ones(16, bool),
    )  # fmt: skip
    found = attacked(lambda _: logits_fn, wide, attack, devices, 16, {}, key, [batch])
    assert np.all(found.allowed)
    assert np.all(found.right)


def test_the_worst_case_is_the_and_over_attacks():
    clean = judgement([True, True, True, False])
    first, second = judgement([True, False, True, True]), judgement([True, True, False, True])
    stands = evaluation.worst_case(clean, [first, second])
    np.testing.assert_array_equal(stands, [True, False, False, False])
    np.testing.assert_array_equal(clean.right, [True, True, True, False])  # not written over
    np.testing.assert_array_equal(evaluation.worst_case(clean, []), clean.right)
    with pytest.raises(UsageError, match="different images"):
        evaluation.worst_case(clean, [judgement([True] * 4, index=[0, 1, 3, 7])])


def test_an_attack_has_no_say_about_images_it_was_spared():
    clean = judgement([True, True, True, False])
    part = judgement([False, True], index=[2, 0])
    np.testing.assert_array_equal(evaluation.worst_case(clean, [part]), [True, True, False, False])
    np.testing.assert_array_equal(evaluation.worst_case(clean, [evaluation.nobody()]), clean.right)


def test_judgements_are_joined_in_the_order_of_the_data_set():
    joined = evaluation.join([judgement([True, False], index=[5, 0]), judgement([True], index=[3])])
    np.testing.assert_array_equal(joined.index, [0, 3, 5])
    np.testing.assert_array_equal(joined.right, [False, True, True])


def test_a_curve_counts_who_is_further_than_the_radius():
    clean = judgement([True, True, True, True, False])
    distance = np.array([0.1, 0.4, 0.2, 9.0])
    # Of the last one nothing was found: it stands at every radius.
    nearest = judgement([False, False, False, True], index=[0, 1, 2, 3])._replace(distance=distance)
    found = evaluation.curve(clean, nearest, [0.0, 0.1, 0.15, 0.3, 0.5, 100.0])
    np.testing.assert_allclose(found, [0.8, 0.6, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    ("hits", "total"), [(0, 10), (10, 10), (1, 7), (437, 500), (1, 10_000), (5000, 10_000)]
)
def test_intervals_are_wilsons(hits, total):
    found = evaluation.Proportion(hits, total)
    expected = scipy.stats.binomtest(hits, total).proportion_ci(method="wilson")
    np.testing.assert_allclose(found.interval, [expected.low, expected.high], atol=1e-7)
    assert found.value == hits / total


def test_nothing_counted_is_not_a_number():
    found = evaluation.proportion(np.zeros(0, bool))
    assert np.isnan([found.value, *found.interval]).all()


# --- The report of an evaluation --------------------------------------------------------------


def test_cheating_is_reported_and_does_not_count(tmp_path):
    path = commands.write_config(tmp_path)
    scope: dict = {}
    exec(path.read_text(), scope)
    experiment = build.experiment(scope["get_config"]())
    cheat = lambda key, logits_fn, image, label: jnp.where(label % 2, image + 0.5, image)
    settings = dataclasses.replace(experiment.evaluation, attacks={"cheat": {"name": "cheat"}})
    experiment = experiment._replace(
        columns={"cheat": attack_columns.Column(cheat)}, evaluation=settings
    )
    variables = experiment.network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    evaluate.evaluate(experiment, variables, tmp_path, "untrained", 0)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    odd = int(np.sum(experiment.splits.test.arrays[1] % 2))
    assert found["attacks"]["cheat"]["outside_the_threat"] == odd
    assert found["attacks"]["cheat"]["right"] == found["clean"]["right"] > 0
    np.testing.assert_allclose(found["attacks"]["cheat"]["largest_distance"], 0.5, rtol=1e-6)
