"""Any model in one call: the same verdicts as attack and judge by hand, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import noise, pgd
from rain_jax.attacks.suites import standard
from rain_jax.checks import UsageError
from rain_jax.evaluation import Rules, attacked, judge, judging, packed, standing
from rain_jax.norms import l2, linf
from rain_jax.parallel import choose_devices, place
from rain_jax.types import Batch, Threat

THREAT = Threat(l2, 0.4)
WEIGHTS = jax.random.normal(jax.random.key(2), (60, 3))
IMAGES = np.random.default_rng(0).integers(0, 256, (37, 6, 5, 2)).astype(np.uint8)


def model(weights, key, image):
    return 2 * jnp.tanh(jnp.sum(image.reshape(-1, 1) * weights, axis=0))


LABELS = np.array([int(jnp.argmax(model(WEIGHTS, None, x / 255))) for x in IMAGES])
LABELS[:5] = (LABELS[:5] + 1) % 3  # five that it is wrong about
ATTACKS = {"noise": noise(THREAT), "pgd": pgd(THREAT, steps=10)}


@pytest.fixture(scope="module")
def by_hand():
    """PGD on every image by itself, with the keys that an image has in the third round."""
    root = jax.random.fold_in(jax.random.key(4), 2)

    @jax.jit
    def one(key, image, label):
        attack_key, judge_key = jax.random.split(key)
        known = lambda k, x: model(WEIGHTS, k, x)
        found = ATTACKS["pgd"](attack_key, known, image, label)
        return judge(known, Rules(THREAT), judge_key, image, found, label)[0][0]

    images = IMAGES * np.float32(1 / 255)
    triples = zip(images, LABELS, range(len(LABELS)), strict=True)
    return np.array([bool(one(jax.random.fold_in(root, i), x, y)) for x, y, i in triples])


@pytest.mark.parametrize(("batch_size", "devices"), [(256, 1), (8, 2), (5, 1)])
@pytest.mark.parametrize("as_floats", [False, True])
def test_who_stands_is_who_stands_by_hand(batch_size, devices, as_floats, by_hand):
    images = IMAGES * np.float32(1 / 255) if as_floats else IMAGES
    on = place("shard_map", choose_devices(devices))
    stands = attacked(
        model, WEIGHTS, ATTACKS, THREAT, images, LABELS.astype(np.int64),
        key=jax.random.key(4), batch_size=batch_size, devices=on,
    )  # fmt: skip
    assert list(stands) == ["clean", "noise", "pgd"]
    np.testing.assert_array_equal(stands["clean"], np.arange(len(LABELS)) >= 5)
    assert not np.any(stands["noise"] & ~stands["clean"])
    np.testing.assert_array_equal(stands["pgd"], stands["noise"] & by_hand)
    assert 3 < np.sum(stands["pgd"]) < np.sum(stands["clean"]) - 3


def test_a_suite_leaves_no_more_than_its_first_attack():
    threat = Threat(linf, 0.02)
    stands = attacked(model, WEIGHTS, standard(threat, steps=5, queries=10), threat, IMAGES, LABELS)
    counts = [int(np.sum(stood)) for stood in stands.values()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(LABELS) - 5 > counts[-1]


def test_a_model_that_draws_is_attacked_to_the_end():
    """It stands where its mean does: one unlucky draw is no reason to stop."""

    def noisy(weights, key, image):
        return model(weights, key, image) + jax.random.normal(key, (3,))

    threat = Threat(l2, 0.25)
    attack = pgd(threat, steps=10)
    on = place("shard_map", choose_devices(1))
    root = jax.random.key(1)
    stands = attacked(
        noisy, WEIGHTS, {"pgd": attack}, threat, IMAGES, LABELS, key=root, draws=200, devices=on
    )

    def left(early):
        of = lambda weights: lambda key, image: noisy(weights, key, image)
        batch = Batch(IMAGES, LABELS.astype(np.int32), np.arange(37, dtype=np.int32),
                      stands["clean"].copy())  # fmt: skip
        own = jax.random.fold_in(root, 1)
        found = packed(attack, of, on, batch_size=37, early=early)(WEIGHTS, own, [batch])
        judge_all = judging(of, Rules(threat, 200), on, batch_size=37)
        return sum(int(np.sum(standing(v.judgement))) for v in judge_all(WEIGHTS, own, found))

    assert np.sum(stands["pgd"]) == left(early=False) < left(early=True)


def test_keys_of_any_kind_will_do():
    own = {"key": jax.random.key(0, impl="rbg"), "batch_size": 8}
    stands = attacked(model, WEIGHTS, ATTACKS, THREAT, IMAGES, LABELS, **own)
    assert 3 < np.sum(stands["pgd"]) < np.sum(stands["clean"]) - 3


REFUSED = [
    (dict(threat=Threat(linf, -1.0)), r"threat.radius=-1.0"),
    (dict(threat=Threat(linf, 8.0)), r"threat.radius=8: expected .* did you mean 8 / 255"),
    (dict(threat=Threat(linf, 1000.0)), r"threat.radius=1000.0"),
    (dict(threat=Threat(linf, float("nan"))), r"threat.radius=nan"),
    (dict(threat=Threat(linf, jnp.float32(8))), r"did you mean 8 / 255"),
    (dict(threat=Threat(l2, float("inf"))), r"threat.radius=inf: expected a distance"),
    (dict(threat=Threat(linf, 0.1, 0.2, 0.8)), r"pixels in \[0, 1\]: expected \[0.2, 0.8\]$"),
    (dict(images=IMAGES[0]), r"images are \[6, 5, 2\]: expected \[N, H, W, C\]"),
    (dict(images=IMAGES[:0], labels=LABELS[:0]), r"images are \[0, 6, 5, 2\]"),
    (dict(images=IMAGES.astype(np.int32)), r"images are int32: expected uint8"),
    (dict(images=IMAGES.astype(np.float32)), r"pixels in \[0, 255\]: expected \[0, 1\]"),
    (dict(images=IMAGES * np.float32("nan")), r"images: 37 of 37 have pixels that are no numbers"),
    (dict(labels=LABELS[:-1]), r"labels are int64 \[36\]: expected whole numbers \[37\]"),
    (dict(labels=LABELS * 1.0), r"labels are float64"),
    (dict(labels=LABELS + 1), r"labels are 1 to 3: expected 0 to 2"),
    (dict(labels=LABELS - 1), r"labels are -1 to 1: expected 0 to 2"),
    (dict(model=lambda w, k, x: model(w, k, x)[None]), r"gives \(1, 3\) for one image"),
    (dict(model=lambda w, k, x: (model(w, k, x),)), r"gives tuple for one image"),
    (dict(attacks={"clean": noise(THREAT)}), r"another name than 'clean'"),
    (dict(batch_size=0), r"batch_size=0"),
    (dict(draws=0), r"draws=0"),
    (dict(draws=2.5), r"draws=2.5: expected a whole number"),
    (dict(batch_size=8.0), r"batch_size=8.0: expected a whole number"),
    (dict(attacks=ATTACKS["pgd"]), r"attacks are a Iteration: expected names and attacks"),
    (dict(attacks=[ATTACKS["pgd"]]), r"attacks are a list: expected names and attacks"),
    (dict(threat=(linf, 0.1)), r"threat=\(.*: expected a Threat"),
    (dict(threat=Threat(linf, "8")), r"threat.radius='8': expected a number"),
    (dict(key=3), r"key=3: expected one as jax.random.key makes it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_would_be_nonsense_is_refused(changes, message):
    given = dict(model=model, variables=WEIGHTS, attacks=ATTACKS, threat=THREAT, images=IMAGES,
                 labels=LABELS)  # fmt: skip
    with pytest.raises(UsageError, match=message):
        attacked(**{**given, **changes})


def told(**changes):
    """What a call says beside its result, and the result."""
    given = dict(model=model, variables=WEIGHTS, attacks=ATTACKS, threat=THREAT, images=IMAGES,
                 labels=LABELS)  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stands = attacked(**{**given, **changes})
    return [str(one.message) for one in said if one.category is UserWarning], stands


FAR = {"pgd": pgd(Threat(l2, 5.0), steps=10)}
SAID = [
    (dict(), ""),
    (dict(attacks=FAR), "pgd: 32 of 32 images are outside of the threat and count as unbroken"),
    (dict(attacks={"own": lambda key, of, x, y: x * jnp.nan}), "own: 32 of 32 images are outside"),
    (dict(model=lambda w, k, x: jax.nn.softmax(model(w, k, x))), "seems to give probabilities"),
    (dict(model=lambda w, k, x: model(w, k, x) * jnp.nan), "logits are not finite"),
    (dict(model=lambda w, k, x: model(w, k, x) + jax.random.normal(k)), "draws=20"),
    (dict(model=lambda w, k, x: model(w, k, x) + jax.random.normal(k), draws=3), ""),
]


@pytest.mark.parametrize(("changes", "message"), SAID, ids=[m for _, m in SAID])
def test_what_would_pass_for_robustness_is_said(changes, message):
    said, _ = told(**changes)
    assert len(said) == bool(message)
    assert all(message in one for one in said)


def test_an_image_without_an_answer_is_kept():
    """Beyond a brightness the model gives no numbers, which the judge calls wrong."""

    def breaks(weights, key, image):
        bright = jnp.mean(image) - 0.5
        return jnp.where(bright > 0.02, jnp.nan, jnp.stack([bright - 1, 0.0 * bright, -9.0]))

    threat = Threat(linf, 0.05)
    images = np.full((3, 6, 5, 2), 0.49, np.float32)
    own = dict(model=breaks, threat=threat, images=images, labels=np.ones(3, int))
    _, stands = told(**own, attacks={"pgd": pgd(threat, steps=10, step_size=0.02, start="clean")})
    assert np.all(stands["clean"])
    assert not np.any(stands["pgd"])


def test_images_can_be_judged_as_if_they_had_been_saved():
    """A model that is sure of whole levels alone, which rounding gives it back."""

    def levels(weights, key, image):
        return jnp.array([jnp.sum(jnp.cos(2 * jnp.pi * 255 * image)), 0.0])

    threat = Threat(linf, 0.45 / 255)
    own = dict(
        model=levels, threat=threat, labels=0 * LABELS, attacks={"pgd": pgd(threat, steps=20)}
    )
    left = [np.sum(told(**own, eight_bit=saved)[1]["pgd"]) for saved in (False, True)]
    assert left[0] < 3
    assert left[1] == len(LABELS)


def test_halves_and_bfloat16_are_floats():
    images = IMAGES / np.float32(256)
    for kind in (np.float16, jnp.bfloat16, np.float64):
        said, stands = told(images=images.astype(kind))
        np.testing.assert_array_equal(stands["pgd"], told(images=images)[1]["pgd"])
        assert not said
