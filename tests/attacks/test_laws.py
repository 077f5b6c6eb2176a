"""Laws that every attack keeps. A new attack is listed in SMALL, or this file fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks
from rain_jax.checks import UsageError
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
# The norms that an attack is defined for, where those are not all three.
NORMS_OF = {
    "carlini_wagner": (linf, l2),
    "ddn": (l2,),
    "rays": (linf,),
    "square": (linf, l2),
}
ALL = pytest.mark.parametrize("name", attacks.__all__)
NORMS = pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
RADIUS = {id(linf): 0.1, id(l2): 0.5, id(l1): 2.0}
SHAPE = (6, 5, 2)
IMAGES = jax.random.uniform(jax.random.key(1), (64, *SHAPE))
LABELS = jnp.arange(64) % 3
WEIGHTS = jax.random.normal(jax.random.key(2), (2, 60, 3))
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(64))


def logits_fn(key, image):
    """A small curved classifier of three classes.

    Its sums are written out: a matrix product may round differently at another batch size, and a
    last bit is enough for a sign or a halved step to come out otherwise.
    """
    flat = image.reshape(-1, 1)
    bent = jnp.tanh(jnp.sum(flat * WEIGHTS[0], axis=0))
    return 2 * bent + jnp.sum(flat**2 * WEIGHTS[1], axis=0)


def in_first_norm(name, radius, **bounds):
    return Threat(NORMS_OF.get(name, (linf,))[0], radius, **bounds)


@functools.lru_cache(maxsize=8)
def compiled(attack, model):
    return jax.jit(jax.vmap(lambda k, x, y: attack(k, model, x, y)))


def run(attack, count, start=0, model=logits_fn):
    many = compiled(attack, model)
    part = slice(start, start + count)
    return many(KEYS[part], IMAGES[part], LABELS[part])


def test_every_attack_is_listed():
    assert sorted(SMALL) == sorted(attacks.__all__)


@ALL
@NORMS
def test_stays_in_the_threat(name, norm):
    if norm not in NORMS_OF.get(name, (linf, l2, l1)):
        with pytest.raises(UsageError, match=r"norm=.*expects"):
            SMALL[name](Threat(norm, 1.0))
        return
    threat = Threat(norm, RADIUS[id(norm)])
    found = run(SMALL[name](threat), 64)
    assert found.shape == IMAGES.shape
    assert found.dtype == jnp.float32
    assert bool(jnp.all((found >= 0) & (found <= 1)))
    assert bool(jnp.all(jax.vmap(lambda a, b: allowed(threat, a, b))(IMAGES, found)))
    # and again in double precision, to the rounding of float32 images
    sizes = [
        float(norm.measure(np.float64(b) - np.float64(a)))
        for a, b in zip(np.asarray(IMAGES), np.asarray(found), strict=True)
    ]
    assert max(sizes) <= threat.radius * (1 + 1e-4)


@ALL
def test_pixel_bounds_are_the_threats_own(name):
    threat = in_first_norm(name, 0.5, low=0.2, high=0.6)
    attack = SMALL[name](threat)
    many = jax.jit(jax.vmap(lambda k, x: attack(k, logits_fn, x, 0)))
    found = many(KEYS[:4], 0.2 + 0.4 * IMAGES[:4])
    assert jnp.min(found) >= jnp.float32(0.2)
    assert jnp.max(found) <= jnp.float32(0.6)


@ALL
def test_an_image_does_not_feel_its_neighbours(name):
    attack = SMALL[name](in_first_norm(name, 0.1))
    together = run(attack, 64)
    for place in (0, 3, 63):
        alone = run(attack, 1, place)
        np.testing.assert_allclose(alone, together[place : place + 1], atol=1e-6)
    np.testing.assert_allclose(run(attack, 7, 3), together[3:10], atol=1e-6)


@ALL
def test_same_key_same_bits(name):
    attack = SMALL[name](Threat(NORMS_OF.get(name, (l2,))[-1], 0.5))
    np.testing.assert_array_equal(run(attack, 7), run(attack, 7))


@ALL
def test_other_keys_other_starts(name):
    if name in (*attacks.MINIMUM_NORM, "fgsm", "mi_fgsm"):
        pytest.skip("starts at the image itself by default")
    attack = SMALL[name](in_first_norm(name, 0.1))
    same = jnp.repeat(IMAGES[:1], 2, axis=0)
    one, other = compiled(attack, logits_fn)(KEYS[:2], same, jnp.zeros(2, jnp.int32))
    assert bool(jnp.any(one != other))


@ALL
def test_radius_may_be_a_tracer_and_costs_no_recompile(name):
    traces = []

    @jax.jit
    def at(radius):
        traces.append(radius)
        return SMALL[name](in_first_norm(name, radius))(KEYS[0], logits_fn, IMAGES[0], LABELS[0])

    for radius in (0.02, 0.1, 0.3):
        fixed = SMALL[name](in_first_norm(name, radius))(KEYS[0], logits_fn, IMAGES[0], LABELS[0])
        np.testing.assert_allclose(at(radius), fixed, atol=1e-6)
    assert len(traces) == 1


@ALL
def test_radius_zero_returns_the_image(name):
    found = run(SMALL[name](in_first_norm(name, 0.0)), 7)
    np.testing.assert_allclose(found, IMAGES[:7], atol=1e-6)


@ALL
def test_a_model_without_gradients_yields_finite_images(name):
    def flat(key, image):
        return jnp.array([1.0, 0.0, 0.0])

    threat = Threat(NORMS_OF.get(name, (l2,))[-1], 0.5)
    assert bool(jnp.all(jnp.isfinite(run(SMALL[name](threat), 7, model=flat))))


@ALL
def test_what_was_seen_on_the_way_is_true_and_never_more_than_the_end(name):
    """Of states after every step: a broken image is one, and `best` is at least as good."""
    attack = SMALL[name](in_first_norm(name, 0.1))
    if getattr(attack, "seen", None) is None:
        pytest.skip("its best asks the model nothing, or it is no Iteration")

    def along(key, image, label):
        states = attack.init(key, logits_fn, image, label)
        told = []
        for _ in range(attack.steps):
            states = attack.step(logits_fn, states)
            told.append((attack.seen(states), attack.best(logits_fn, states)))
        return told

    broken = 0
    for (image, score), (_, best) in jax.jit(jax.vmap(along))(KEYS, IMAGES, LABELS):
        wrong = jax.vmap(lambda k, x: jnp.argmax(logits_fn(k, x)))(KEYS, image) != LABELS
        assert bool(jnp.all(wrong[score > 0]))
        assert bool(jnp.all((best >= score - 1e-5) | (score <= 0)))
        broken += int(jnp.sum(score > 0))
    assert broken > 0
