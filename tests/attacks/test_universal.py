"""Universal perturbations against answers that can be derived, and each of their promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks.universal import apply, boundary_first, tup, uap
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.norms import allowed, l1, l2, linf
from rain_jax.types import Threat

SHAPE, CLASSES, TARGET = (6, 5, 2), 5, 2
IMAGES, UNSEEN = jax.random.uniform(jax.random.key(1), (2, 80, *SHAPE))
WEIGHTS = jax.random.normal(jax.random.key(2), (*SHAPE, CLASSES))
KEY = jax.random.key(0)
RADIUS = {id(linf): 0.15, id(l2): 1.0}
KINDS = pytest.mark.parametrize(
    ("maker", "generator", "norm"),
    [
        (uap, "deepfool", linf),
        (uap, "sgd", linf),
        (tup, "deepfool", linf),
        (tup, "sgd", linf),
        (tup, "fgsm", linf),
        (uap, "deepfool", l2),
        (tup, "sgd", l2),
    ],
    ids=["uap", "uap-sgd", "tup", "tup-sgd", "tup-fgsm", "uap-l2", "tup-sgd-l2"],
)


def linear(weights, bias=0.0):
    """Five linear classes. Sums are written out, so that they round alike in any batch."""
    return lambda key, image: bias + jnp.sum((image[..., None] - 0.5) * weights, axis=(0, 1, 2))


def predictions(images):
    return jax.vmap(lambda image: jnp.argmax(linear(WEIGHTS)(KEY, image)))(images)


@functools.cache
def program(maker, generator, norm):
    """Compiled once for all tests: whatever is a number may be traced, the radius too."""

    @jax.jit
    def run(key, radius, rate, passes, images, target, weights, bias):
        universal = maker(Threat(norm, radius), generator=generator, rate=rate, passes=passes)
        return universal(key, linear(weights, bias), images, target)

    return run


def search(
    maker, generator="deepfool", norm=linf, *, images=IMAGES, target=None, key=KEY, radius=None,
    rate=1.0, passes=10, weights=WEIGHTS, bias=(0.0,) * CLASSES,
):  # fmt: skip
    if target is None:
        target = predictions(images) if maker is uap else TARGET
    radius = RADIUS[id(norm)] if radius is None else radius
    return program(maker, generator, norm)(
        key, radius, rate, passes, images, jnp.int32(target), weights, jnp.array(bias)
    )


def share(maker, norm, perturbation, images=IMAGES):
    """The share of the images that are hit, counted apart from the search."""
    attack = apply(Threat(norm, RADIUS[id(norm)]), perturbation)
    now = predictions(jax.vmap(lambda image: attack(KEY, None, image, 0))(images))
    return float(jnp.mean(now != predictions(images) if maker is uap else now == TARGET))


@KINDS
def test_keeps_to_the_radius(maker, generator, norm):
    for radius in (0.0, 0.02, RADIUS[id(norm)]):
        found = search(maker, generator, norm, radius=radius)
        assert found.perturbation.shape == SHAPE
        size = norm.measure(found.perturbation)
        assert size <= jnp.float32(radius) if norm is linf else size <= radius * (1 + 3e-7)
    # A search that is held back by its radius uses it.
    assert search(maker, generator, norm, radius=0.02, passes=3).passes == 3
    assert norm.measure(search(maker, generator, norm, radius=0.02).perturbation) > 0.019


@KINDS
def test_reaches_the_rate_or_says_that_it_did_not(maker, generator, norm):
    easy = search(maker, generator, norm, rate=0.5)
    assert easy.converged
    assert easy.rate >= 0.5
    hard = search(maker, generator, norm, rate=0.99, radius=0.01, passes=2)
    assert not hard.converged
    assert hard.rate < 0.99
    assert hard.passes == 2
    for found in (easy, search(maker, generator, norm)):
        assert float(found.rate) == pytest.approx(share(maker, norm, found.perturbation), abs=1e-6)


@KINDS
def test_beats_noise_on_images_it_has_not_seen(maker, generator, norm):
    radius = RADIUS[id(norm)]
    signs = jax.random.rademacher(jax.random.key(9), (20, *SHAPE), jnp.float32)
    noise = np.mean([share(maker, norm, norm.project(radius * s, radius)) for s in signs])
    # Towards a target one pass is enough, but for the few steps that batches make of it.
    passes = 1 if maker is tup and generator != "sgd" else 10
    found = search(maker, generator, norm, passes=passes)
    reached = share(maker, norm, found.perturbation, UNSEEN)
    assert found.rate > (0.9 if maker is tup else 0.6)
    assert reached > (0.85 if maker is tup else 0.5)
    assert noise < (0.3 if maker is tup else 0.4)


@KINDS
def test_more_passes_are_never_worse(maker, generator, norm):
    rates = [
        float(search(maker, generator, norm, radius=0.05, passes=passes).rate)
        for passes in range(1, 9)
    ]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]


@KINDS
def test_one_answer_for_each_key(maker, generator, norm):
    one, again, other = (
        search(maker, generator, norm, key=jax.random.key(seed), radius=0.05, passes=2)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.perturbation, again.perturbation)
    assert bool(jnp.any(one.perturbation != other.perturbation))


@KINDS
def test_nothing_is_done_where_all_is_hit_already(maker, generator, norm):
    if maker is uap:
        found = search(maker, generator, norm, target=(predictions(IMAGES) + 1) % CLASSES)
    else:
        of_target = IMAGES[predictions(IMAGES) == TARGET]
        found = search(maker, generator, norm, images=jnp.resize(of_target, IMAGES.shape))
    assert found.converged
    assert found.rate == 1.0
    assert found.passes == 0
    np.testing.assert_array_equal(found.perturbation, 0.0)


@KINDS
def test_a_model_without_gradients_yields_zero(maker, generator, norm):
    label = jnp.zeros(80) if maker is uap else 0
    found = search(maker, generator, norm, weights=0 * WEIGHTS, target=label, passes=2)
    np.testing.assert_array_equal(found.perturbation, 0.0)
    assert not found.converged


@pytest.mark.parametrize("maker", [uap, tup], ids=["uap", "tup"])
def test_a_step_of_deepfool_is_the_projection_on_the_nearest_boundary(maker):
    """Copies of one image: once the first is over the boundary, the others are."""
    image = 0.5 + 0.02 * WEIGHTS[..., 0]
    logits = linear(WEIGHTS)(KEY, image)
    assert int(jnp.argmax(logits)) == 0
    slopes = (WEIGHTS - WEIGHTS[..., :1])[..., 1:]
    gaps, lengths = logits[0] - logits[1:], jnp.sqrt(jnp.sum(slopes**2, axis=(0, 1, 2)))
    # Untargeted, it is the nearest of all boundaries, which here is not that of the second class.
    place = int(jnp.argmin(gaps / lengths)) if maker is uap else int(jnp.argmax(logits[1:]))
    target = 0 if maker is uap else place + 1
    copies = jnp.broadcast_to(image, IMAGES.shape)
    found = search(
        maker, images=copies, radius=5.0,
        target=jnp.full(80, target) if maker is uap else target,
    )  # fmt: skip
    expected = 1.02 * gaps[place] / lengths[place] ** 2 * slopes[..., place]
    np.testing.assert_allclose(found.perturbation, expected, atol=2e-5)
    on_boundary = linear(WEIGHTS)(KEY, image + found.perturbation / 1.02)
    assert abs(float(on_boundary[0] - on_boundary[place + 1])) < 1e-3
    assert found.passes == 1
    assert found.rate == 1.0


def test_images_at_the_target_leave_it_unchanged():
    for generator in ("deepfool", "fgsm"):
        astray = 0.5 + 0.005 * (WEIGHTS[..., 0] - WEIGHTS[..., TARGET])
        there = 0.5 + 0.1 * WEIGHTS[..., TARGET]
        one = jnp.broadcast_to(there, IMAGES.shape).at[17].set(astray)
        all_ = jnp.broadcast_to(astray, IMAGES.shape)
        among_others = search(tup, generator, images=one)
        alone = search(tup, generator, images=all_)
        assert bool(jnp.any(alone.perturbation != 0))
        np.testing.assert_array_equal(among_others.perturbation, alone.perturbation)


def test_an_image_that_takes_too_many_steps_leaves_it_unchanged(key):
    """On a concave lead each step falls short, here of what all ten steps could reach."""

    def concave(key, image):
        return jnp.stack([0.0, jnp.log(image[0, 0, 0] + 0.001) - jnp.log(0.5)])

    image = jnp.full((1, 1, 1, 1), 0.01)
    few, many = (
        jax.jit(lambda key, s=s: tup(Threat(l2, 1.0), steps=s)(key, concave, image, 1))(key)
        for s in (3, 10)
    )
    assert float(few.perturbation[0, 0, 0]) == 0.0
    assert not few.converged
    assert float(many.perturbation[0, 0, 0]) > 0.489
    assert many.converged


def test_a_step_that_does_not_hit_is_not_taken(key):
    def plane(key, image):
        return jnp.stack([1.0, jnp.sum(WEIGHTS[..., 0] * (image - 0.5))])

    grey, needed = jnp.full((1, *SHAPE), 0.5), 1 / float(jnp.sum(jnp.abs(WEIGHTS[..., 0])))
    for factor in (0.99, 1.01):
        universal = tup(Threat(linf, 1.0), generator="fgsm", step_size=factor * needed)
        step = factor * needed * jnp.sign(WEIGHTS[..., 0]) if factor > 1 else jnp.zeros(SHAPE)
        np.testing.assert_allclose(universal(key, plane, grey, 1).perturbation, step, atol=1e-7)


def test_images_at_a_bound_have_a_say():
    """White images cannot get any brighter, yet others may: the perturbation is not clipped."""
    rise = jnp.zeros_like(WEIGHTS).at[..., TARGET].set(jnp.abs(WEIGHTS[..., TARGET]))
    found = search(
        tup, "sgd", images=jnp.ones_like(IMAGES), weights=rise,
        bias=(99.0, 0.0, 0.0, 0.0, 0.0), radius=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(found.perturbation, 0.1, atol=1e-7)
    assert found.rate == 0.0


def test_an_image_far_over_the_boundary_has_no_say_in_the_untargeted_loss():
    """One half, broken by 20 logits, would pull up; the other, not broken yet, pulls down."""
    far = jnp.arange(80) < 40
    images = jnp.full_like(IMAGES, 0.5).at[:, 0, 0, 0].add(jnp.where(far, 0.4, 0.01))
    found = search(
        uap, "sgd", images=images, target=jnp.where(far, 0, 1), radius=0.1,
        weights=jnp.zeros_like(WEIGHTS).at[0, 0, 0, 1].set(50.0), bias=(0.0, 0.0) + (-99.0,) * 3,
    )  # fmt: skip
    # One pass of three batches, each with a step of a fifth of the radius.
    np.testing.assert_allclose(found.perturbation[0, 0, 0], -0.06, atol=1e-6)
    assert found.rate == 1.0


def test_judges_random_models_by_their_mean_logits(key):
    """In three draws of ten the target leads, in the mean never."""

    def random(key, image):
        return jnp.stack([1.0, 2.0 * jax.random.bernoulli(key, 0.3)])

    few = IMAGES[:20, :2, :2, :1]
    one, mean = (
        jax.jit(lambda key, e=e: tup(Threat(linf, 0.1), estimator=e)(key, random, few, 1))(key)
        for e in (None, eot(100))
    )
    assert 0.1 < one.rate < 0.8
    assert mean.rate == 0.0


def test_all_classes_are_one_vmap():
    classes = jnp.arange(CLASSES)
    keys = jax.random.split(KEY, CLASSES)

    def towards(key, target):
        return tup(Threat(linf, 0.15), rate=0.97)(key, linear(WEIGHTS), IMAGES, target)

    together = jax.jit(jax.vmap(towards))(keys, classes)
    assert len(set(np.asarray(together.passes).tolist())) > 1
    for place in range(CLASSES):
        alone = search(tup, key=keys[place], target=place, rate=0.97)
        one = jax.tree.map(lambda leaf, place=place: leaf[place], together)
        np.testing.assert_allclose(one.perturbation, alone.perturbation, atol=1e-6)
        assert (one.rate, one.converged, one.passes) == (alone.rate, alone.converged, alone.passes)


@pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
def test_applied_it_is_an_attack_within_the_threat(norm, key):
    threat = Threat(norm, 0.3, low=0.2, high=0.7)
    images = 0.2 + 0.5 * IMAGES
    attack = apply(threat, WEIGHTS[..., 0])
    found = jax.vmap(lambda image: attack(key, linear(WEIGHTS), image, 0))(images)
    assert bool(jnp.all(jax.vmap(lambda a, b: allowed(threat, a, b))(images, found)))
    assert bool(jnp.all((found >= jnp.float32(0.2)) & (found <= jnp.float32(0.7))))
    # One that keeps to the threat as it is, is added as it is.
    small = 0.001 * jnp.sign(WEIGHTS[..., 0])
    np.testing.assert_allclose(
        apply(threat, small)(key, None, jnp.full(SHAPE, 0.5), 0), 0.5 + small, atol=1e-7
    )


def test_boundary_first_takes_the_nearest_from_either_side(key):
    heights = jnp.array([0.9, 0.3, -0.1, 0.7, -0.4, 0.2, -0.8])
    weights = jnp.zeros_like(WEIGHTS).at[0, 0, 0, 1].set(1.0)
    images = jnp.full((7, *SHAPE), 0.5).at[:, 0, 0, 0].add(heights)

    @functools.partial(jax.jit, static_argnums=1)
    def first(images, count):
        return boundary_first(linear(weights), key, images, jnp.int32(1), count)

    taken = first(images, 4)
    np.testing.assert_allclose(taken, images[jnp.array([2, 5, 1, 4])])
    many = jnp.resize(images, (300, *SHAPE))  # more than are looked at together
    nearest = first(many, 40)
    np.testing.assert_allclose(nearest, jnp.broadcast_to(images[2], nearest.shape))


@pytest.mark.parametrize("count", [0, 8])
def test_boundary_first_refuses_more_than_there_are(count, key):
    with pytest.raises(UsageError, match=f"count={count}"):
        boundary_first(linear(WEIGHTS), key, IMAGES[:7], 1, count)


@pytest.mark.parametrize("maker", [uap, tup], ids=["uap", "tup"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rate=0.0), r"rate=0\.0"),
        (dict(rate=1.2), r"rate=1\.2"),
        (dict(passes=0), "passes=0"),
        (dict(generator="deepfol"), "did you mean 'deepfool'"),
        (dict(steps=0), "steps=0"),
        (dict(overshoot=-0.1), r"overshoot=-0\.1"),
        (dict(step_size=0.0), r"step_size=0\.0"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_bad_settings_are_refused(maker, settings, message):
    with pytest.raises(UsageError, match=message):
        maker(Threat(linf, 0.1), **settings)
    with pytest.raises(UsageError, match="norm=l1"):
        maker(Threat(l1, 0.1))
