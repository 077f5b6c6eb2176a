"""Laws that every attack keeps. A new attack is listed in SMALL, or this file fails.

One program for each attack and norm serves all of them: what they change are numbers to it.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks
from rain_jax.checks import UsageError
from rain_jax.evaluation import cost
from rain_jax.norms import allowed, l1, l2, linf
from rain_jax.types import Threat

# Each attack at a size that tests can afford, on a threat that is given.
SMALL = {
    "apgd": lambda threat: attacks.apgd(threat, steps=5),
    "apgd_t": lambda threat: attacks.apgd_t(threat, steps=4),
    "carlini_wagner": lambda threat: attacks.carlini_wagner(threat, steps=6, searches=2),
    "ddn": lambda threat: attacks.ddn(threat, steps=5),
    "deepfool": lambda threat: attacks.deepfool(threat, steps=3),
    "fab": lambda threat: attacks.fab(threat, steps=3, restarts=2),
    "fab_t": lambda threat: attacks.fab_t(threat, steps=3),
    "fgsm": lambda threat: attacks.fgsm(threat),
    "fmn": lambda threat: attacks.fmn(threat, steps=5),
    "mi_fgsm": lambda threat: attacks.mi_fgsm(threat, steps=3),
    "multi_targeted": lambda threat: attacks.multi_targeted(threat, steps=3, targets=2),
    "nes": lambda threat: attacks.nes(threat, steps=3, draws=4),
    "noise": lambda threat: attacks.noise(threat),
    "pgd": lambda threat: attacks.pgd(threat, steps=4, restarts=2),
    "rays": lambda threat: attacks.rays(threat, queries=40),
    "spsa": lambda threat: attacks.spsa(threat, steps=3, draws=4),
    "square": lambda threat: attacks.square(threat, queries=20),
}
NORMS = pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
RADIUS = {id(linf): 0.1, id(l2): 0.5, id(l1): 2.0}
COUNT, SHAPE = 64, (6, 5, 2)
DRAW = np.random.default_rng(1)
IMAGES = DRAW.random((COUNT, *SHAPE), np.float32)
CLASSES = 5  # of three, DLR towards the last one is a constant, up to rounding
LABELS = np.arange(COUNT, dtype=np.int32) % CLASSES
WEIGHTS = DRAW.normal(size=(2, 60, CLASSES)).astype(np.float32)
KEYS = drawn.keys(3, COUNT)
# Radius and pixel bounds of what is compiled once more with constants: for an image alone, within
# other bounds than usual, and for seven in a batch.
ALONE, SEVEN = (0.3, 0.2, 0.6), (0.02, 0.0, 1.0)


@pytest.fixture(scope="module", params=attacks.__all__)
def name(request):
    """Of the module, so that all laws of one attack come together, in one process."""
    return request.param


def logits_fn(key, image):
    """A small curved classifier.

    Its sums are written out: a matrix product may round differently at another batch size, and a
    last bit is enough for a sign or a halved step to come out otherwise.
    """
    flat = image.reshape(-1, 1)
    bent = jnp.tanh(jnp.sum(flat * WEIGHTS[0], axis=0))
    return 2 * bent + jnp.sum(flat**2 * WEIGHTS[1], axis=0)


def constant(key, image):
    return jnp.array([1.0] + [0.0] * (CLASSES - 1))


def hollow(pixel, whole):
    """Zero, by the usual mistake: where `whole` is 0 and not 1, the pixel's gradient is NaN."""
    hidden = whole + whole * (1.0 - whole) * pixel
    return jnp.where(hidden > 0, jnp.sqrt(hidden), 0.0) - whole


@functools.cache
def declared(name):
    """The attack on some threat, for what it says of itself."""
    for norm in (linf, l2):
        with contextlib.suppress(UsageError):
            return SMALL[name](Threat(norm, 1.0))
    raise AssertionError(f"{name} is defined neither in linf nor in l2")


def first_norm(name):
    return linf if linf in declared(name).norms else l2


def last_norm(name):
    return l2 if l2 in declared(name).norms else linf


class Progress(NamedTuple):
    """What is known after each step: `seen` and `best` of the attack."""

    wrong: Any  # whether the image that was seen is misclassified
    score: Any
    best: Any


class Answers(NamedTuple):
    image: Any
    progress: Progress | None  # where the attack has `seen`


@functools.cache
def program(name, norm):
    """Compiled once for all laws, for all images side by side; and how often it was traced.

    The radius, the pixel bounds and the model's steepness, zero for a constant one, are traced; so
    is `whole`, without which the model has no gradient at some pixels.
    """
    traces = []

    @jax.jit
    def many(radius, low, high, steepness, whole, keys, images, labels):
        traces.append(radius)
        attack = SMALL[name](Threat(norm, radius, low, high))

        def model(key, image):
            logits = steepness * logits_fn(key, image) + (1.0 - steepness) * constant(key, image)
            return logits + hollow(image[0, 0, 0], whole)

        def one(key, image, label):
            if getattr(attack, "seen", None) is None:
                return Answers(attack(key, model, image, label), None)

            def step(state, _):
                state = attack.step(model, state)
                image, score = attack.seen(state)
                found, best = attack.best(model, state)
                wrong = jnp.argmax(model(key, image)) != label
                return state, (found, Progress(wrong, score, best))

            begin = attack.init(key, model, image, label)
            found, progress = jax.lax.scan(step, begin, length=attack.steps)[1]
            return Answers(found[-1], progress)

        return jax.vmap(one)(keys, images, labels)

    return many, traces


def run(
    name, norm, radius, low=0.0, high=1.0, *,
    steepness=1.0, whole=1.0, images=IMAGES, labels=LABELS,
):  # fmt: skip
    many, _ = program(name, norm)
    answers = many(radius, low, high, steepness, whole, KEYS, images, labels)
    return jax.tree.map(np.asarray, answers)


@functools.cache
def fixed_program(name, threat, batched):
    attack = SMALL[name](Threat(first_norm(name), *threat))
    one = lambda key, image, label: attack(key, logits_fn, image, label)
    return jax.jit(jax.vmap(one) if batched else one)


def within(threat):
    """The images within a threat's pixel bounds."""
    _, low, high = threat
    return np.float32(low) + np.float32(high - low) * IMAGES


def fixed(name, threat, place):
    """Of one image with no batch around it, or of those of a slice; `threat` is constants."""
    answer = fixed_program(name, threat, isinstance(place, slice))
    return answer(KEYS[place], within(threat)[place], LABELS[place])


@functools.cache
def judge(norm):
    return jax.jit(jax.vmap(lambda r, a, b: allowed(Threat(norm, r), a, b), (None, 0, 0)))


def sizes(norm, change):
    """Those of many, in double precision."""
    size = np.abs(np.float64(change)).reshape(len(change), -1)
    return {
        id(linf): size.max(axis=1),
        id(l2): np.sqrt(np.sum(size**2, axis=1)),
        id(l1): size.sum(axis=1),
    }[id(norm)]


def test_every_attack_is_listed():
    assert sorted(SMALL) == sorted(attacks.__all__)


@NORMS
def test_stays_in_the_threat(name, norm):
    if norm not in declared(name).norms:
        with pytest.raises(UsageError, match=r"norm=.*expects"):
            SMALL[name](Threat(norm, 1.0))
        return
    radius = RADIUS[id(norm)]
    found = run(name, norm, radius).image
    assert found.shape == IMAGES.shape
    assert found.dtype == np.float32
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(judge(norm)(radius, IMAGES, found))
    # and again in double precision, to the rounding of float32 images
    assert np.max(sizes(norm, np.float64(found) - IMAGES)) <= radius * (1 + 1e-4)


def test_pixel_bounds_are_the_threats_own(name):
    images, labels = 0.2 + np.float32(0.4) * IMAGES, np.zeros_like(LABELS)
    found = run(name, first_norm(name), 0.5, 0.2, 0.6, images=images, labels=labels).image
    assert np.min(found) >= np.float32(0.2)
    assert np.max(found) <= np.float32(0.6)


def test_an_image_does_not_feel_its_neighbours(name):
    for threat, places in ((ALONE, (0, 3, 63)), (SEVEN, (slice(3, 10),))):
        together = run(name, first_norm(name), *threat, images=within(threat)).image
        for place in places:
            np.testing.assert_allclose(fixed(name, threat, place), together[place], atol=1e-6)


def test_same_key_same_bits(name):
    one, other = (run(name, last_norm(name), 0.5).image for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_other_keys_other_starts(name):
    if declared(name).minimum_norm or name in ("fgsm", "mi_fgsm"):
        pytest.skip("starts at the image itself by default")
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    found = run(name, first_norm(name), 0.1, images=same, labels=np.zeros_like(LABELS)).image
    assert np.any(found[0] != found[1])


def test_radius_may_be_a_tracer_and_costs_no_recompile(name):
    """And so may the pixel bounds."""
    for threat, place in ((SEVEN, slice(3, 10)), (ALONE, 0)):
        found = run(name, first_norm(name), *threat, images=within(threat)).image
        np.testing.assert_allclose(found[place], fixed(name, threat, place), atol=1e-6)
    _, traces = program(name, first_norm(name))
    assert len(traces) == 1


def test_radius_zero_returns_the_image(name):
    found = run(name, first_norm(name), 0.0).image
    np.testing.assert_allclose(found, IMAGES, atol=1e-6)
    # as a constant, too, by which Python would not divide
    attack = SMALL[name](Threat(first_norm(name), 0.0))
    jax.eval_shape(lambda key: attack(key, logits_fn, IMAGES[0], 0), KEYS[0])
    alone = jax.jit(lambda key, image: attack(key, constant, image, 0))
    np.testing.assert_allclose(alone(KEYS[0], IMAGES[0]), IMAGES[0], atol=1e-6)


def test_a_model_without_gradients_yields_finite_images(name):
    found = run(name, last_norm(name), 0.5, steepness=0.0).image
    assert np.all(np.isfinite(found))
    # and where JAX can tell that there are none
    attack = SMALL[name](Threat(last_norm(name), 0.5))
    alone = jax.jit(lambda key, image: attack(key, constant, image, 0))(KEYS[0], IMAGES[0])
    assert alone.shape == SHAPE
    assert np.all(np.isfinite(alone))


def test_it_uses_of_the_model_what_it_declares(name):
    attack = declared(name)
    parts = cost(attack, SHAPE, CLASSES)[:3]  # to begin, of a step, and at the end
    assert any(part.backward > 0 for part in parts) == (attack.uses == "gradient")
    assert any(part.forward > 0 for part in parts) == (attack.uses != "nothing")


def test_where_gradients_are_not_numbers_the_other_pixels_are_climbed(name):
    norm = last_norm(name)
    found = run(name, norm, 0.5, whole=0.0).image
    assert np.all((found >= 0) & (found <= 1))  # of which not-a-number is neither
    assert np.all(judge(norm)(0.5, IMAGES, found))
    moved = np.any((found != IMAGES).reshape(COUNT, -1)[:, 2:], axis=1)
    usual = np.any((run(name, norm, 0.5).image != IMAGES).reshape(COUNT, -1), axis=1)
    assert np.mean(moved) > 0.9 * np.mean(usual) > 0


def test_what_was_seen_on_the_way_is_true_and_never_more_than_the_end(name):
    """Of states after every step: a broken image is one, and `best` is at least as good."""
    progress = run(name, first_norm(name), 0.1).progress
    if progress is None:
        pytest.skip("its best asks the model nothing, or it is no Iteration")
    assert np.all(progress.wrong[progress.score > 0])
    assert np.all((progress.best >= progress.score - 1e-5) | (progress.score <= 0))
    assert np.any(progress.score > 0)
