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
DRAW = np.random.default_rng(1)
IMAGES, UNSEEN = DRAW.random((2, 80, *SHAPE), np.float32)
WEIGHTS = DRAW.normal(size=(*SHAPE, CLASSES)).astype(np.float32)
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
    return np.argmax(np.sum((images[..., None] - 0.5) * WEIGHTS, axis=(1, 2, 3)), axis=-1)


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
        key, radius, rate, passes, images, np.int32(target), weights, np.float32(bias)
    )


@functools.cache
def applied(norm):
    """Images with a perturbation on them, and whether they keep to the threat."""

    @jax.jit
    def run(radius, low, high, perturbation, images):
        threat = Threat(norm, radius, low, high)
        attack = apply(threat, perturbation)
        found = jax.vmap(lambda image: attack(KEY, linear(WEIGHTS), image, 0))(images)
        return found, jax.vmap(lambda a, b: allowed(threat, a, b))(images, found)

    return lambda *given: map(np.asarray, run(*given))


def size(norm, change):
    change = np.abs(np.float64(change))
    return {linf: np.max, l2: np.linalg.norm}[norm](change.ravel())


def share(maker, norm, perturbation, images=IMAGES):
    """The share of the images that are hit, counted apart from the search."""
    found, _ = applied(norm)(RADIUS[id(norm)], 0.0, 1.0, perturbation, images)
    now = predictions(found)
    return np.mean(now != predictions(images) if maker is uap else now == TARGET)


@KINDS
def test_keeps_to_the_radius(maker, generator, norm):
    for radius in (0.0, 0.02, RADIUS[id(norm)]):
        found = search(maker, generator, norm, radius=radius)
        assert found.perturbation.shape == SHAPE
        reach = size(norm, found.perturbation)
        assert reach <= np.float32(radius) if norm is linf else reach <= radius * (1 + 3e-7)
    # A search that is held back by its radius uses it.
    assert search(maker, generator, norm, radius=0.02, passes=3).passes == 3
    assert size(norm, search(maker, generator, norm, radius=0.02).perturbation) > 0.019


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
    signs = np.sign(np.random.default_rng(9).normal(size=(20, *SHAPE))).astype(np.float32)
    # At the radius already in L-inf, and brought to it in L2.
    noise = np.mean([share(maker, norm, radius * s / size(norm, s)) for s in signs])
    # Towards a target one pass is enough, but for the few steps that batches make of it.
    passes = 1 if maker is tup and generator != "sgd" else 10
    found = search(maker, generator, norm, passes=passes)
    reached = share(maker, norm, found.perturbation, UNSEEN)
    assert found.rate > (0.9 if maker is tup else 0.6)
    assert reached > (0.85 if maker is tup else 0.5)
    assert noise < (0.3 if maker is tup else 0.4)


@KINDS
def test_more_passes_are_never_worse(maker, generator, norm):
    """And better somewhere: of some keys the first pass is the best one."""
    better = []
    for seed in range(4):
        one = functools.partial(
            search, maker, generator, norm, key=jax.random.key(seed), radius=0.3 * RADIUS[id(norm)]
        )
        rates = [float(one(passes=passes).rate) for passes in range(1, 9)]
        assert rates == sorted(rates)
        better.append(rates[-1] > rates[0])
    assert any(better)


@KINDS
def test_one_answer_for_each_key(maker, generator, norm):
    one, again, other = (
        search(maker, generator, norm, key=jax.random.key(seed), radius=0.05, passes=2)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.perturbation, again.perturbation)
    assert np.any(np.asarray(one.perturbation) != np.asarray(other.perturbation))


@KINDS
def test_nothing_is_done_where_all_is_hit_already(maker, generator, norm):
    if maker is uap:
        found = search(maker, generator, norm, target=(predictions(IMAGES) + 1) % CLASSES)
    else:
        of_target = IMAGES[predictions(IMAGES) == TARGET]
        found = search(maker, generator, norm, images=np.resize(of_target, IMAGES.shape))
    assert found.converged
    assert found.rate == 1.0
    assert found.passes == 0
    np.testing.assert_array_equal(found.perturbation, 0.0)


@KINDS
def test_a_model_without_gradients_yields_zero(maker, generator, norm):
    label = np.zeros(80) if maker is uap else 0
    found = search(maker, generator, norm, weights=0 * WEIGHTS, target=label, passes=2)
    np.testing.assert_array_equal(found.perturbation, 0.0)
    assert not found.converged


@pytest.mark.parametrize("maker", [uap, tup], ids=["uap", "tup"])
def test_a_step_of_deepfool_is_the_projection_on_the_nearest_boundary(maker):
    """Copies of one image: once the first is over the boundary, the others are."""
    image = 0.5 + 0.02 * WEIGHTS[..., 0]
    logits = np.sum((image[..., None] - 0.5) * WEIGHTS, axis=(0, 1, 2))
    assert np.argmax(logits) == 0
    slopes = (WEIGHTS - WEIGHTS[..., :1])[..., 1:]
    gaps, lengths = logits[0] - logits[1:], np.sqrt(np.sum(slopes**2, axis=(0, 1, 2)))
    # Untargeted, it is the nearest of all boundaries, which here is not that of the second class.
    place = int(np.argmin(gaps / lengths)) if maker is uap else int(np.argmax(logits[1:]))
    target = 0 if maker is uap else place + 1
    copies = np.broadcast_to(image, IMAGES.shape)
    found = search(
        maker, images=copies, radius=5.0,
        target=np.full(80, target) if maker is uap else target,
    )  # fmt: skip
    expected = 1.02 * gaps[place] / lengths[place] ** 2 * slopes[..., place]
    np.testing.assert_allclose(found.perturbation, expected, atol=2e-5)
    at = image + np.asarray(found.perturbation) / 1.02
    on_boundary = np.sum((at[..., None] - 0.5) * WEIGHTS, axis=(0, 1, 2))
    assert abs(on_boundary[0] - on_boundary[place + 1]) < 1e-3
    assert found.passes == 1
    assert found.rate == 1.0


def test_images_at_the_target_leave_it_unchanged():
    for generator in ("deepfool", "fgsm"):
        astray = 0.5 + 0.005 * (WEIGHTS[..., 0] - WEIGHTS[..., TARGET])
        there = 0.5 + 0.1 * WEIGHTS[..., TARGET]
        one, all_ = (np.broadcast_to(image, IMAGES.shape).copy() for image in (there, astray))
        one[17] = astray
        among_others = search(tup, generator, images=one)
        alone = search(tup, generator, images=all_)
        assert np.any(np.asarray(alone.perturbation) != 0)
        np.testing.assert_array_equal(among_others.perturbation, alone.perturbation)


def test_an_image_that_takes_too_many_steps_leaves_it_unchanged(key):
    """On a concave lead each step falls short, here of what all ten steps could reach."""

    def concave(key, image):
        return jnp.stack([0.0, jnp.log(image[0, 0, 0] + 0.001) - jnp.log(0.5)])

    image = np.full((1, 1, 1, 1), 0.01, np.float32)

    @jax.jit
    def run(key, steps, images):
        return tup(Threat(l2, 1.0), steps=steps)(key, concave, images, 1)

    few, many = (jax.tree.map(np.asarray, run(key, steps, image)) for steps in (3, 10))
    assert float(few.perturbation[0, 0, 0]) == 0.0
    assert not few.converged
    assert float(many.perturbation[0, 0, 0]) > 0.489
    assert many.converged


def test_a_step_that_does_not_hit_is_not_taken(key):
    def plane(key, image):
        return jnp.stack([1.0, jnp.sum(WEIGHTS[..., 0] * (image - 0.5))])

    grey = np.full((1, *SHAPE), 0.5, np.float32)
    needed = 1 / float(np.sum(np.abs(WEIGHTS[..., 0])))

    @jax.jit
    def run(key, step_size, images):
        universal = tup(Threat(linf, 1.0), generator="fgsm", step_size=step_size)
        return universal(key, plane, images, 1).perturbation

    for factor in (0.99, 1.01):
        step = factor * needed * np.sign(WEIGHTS[..., 0]) if factor > 1 else np.zeros(SHAPE)
        np.testing.assert_allclose(run(key, factor * needed, grey), step, atol=1e-7)


def test_images_at_a_bound_have_a_say():
    """White images cannot get any brighter, yet others may: the perturbation is not clipped."""
    rise = np.where(np.arange(CLASSES) == TARGET, np.abs(WEIGHTS), np.float32(0.0))
    found = search(
        tup, "sgd", images=np.ones_like(IMAGES), weights=rise,
        bias=(99.0, 0.0, 0.0, 0.0, 0.0), radius=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(found.perturbation, 0.1, atol=1e-7)
    assert found.rate == 0.0


def test_an_image_far_over_the_boundary_has_no_say_in_the_untargeted_loss():
    """One half, broken by 20 logits, would pull up; the other, not broken yet, pulls down."""
    far = np.arange(80) < 40
    images, weights = np.full_like(IMAGES, 0.5), np.zeros_like(WEIGHTS)
    images[:, 0, 0, 0] += np.where(far, 0.4, 0.01)
    weights[0, 0, 0, 1] = 50.0
    found = search(
        uap, "sgd", images=images, target=np.where(far, 0, 1), radius=0.1, weights=weights,
        bias=(0.0, 0.0) + (-99.0,) * 3,
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
        jax.jit(lambda key, x, e=e: tup(Threat(linf, 0.1), estimator=e)(key, random, x, 1))(
            key, few
        )
        for e in (None, eot(100))
    )
    assert 0.1 < one.rate < 0.8
    assert mean.rate == 0.0


def test_all_classes_are_one_vmap():
    classes = np.arange(CLASSES)
    keys = jax.random.split(KEY, CLASSES)

    def towards(key, target, images):
        return tup(Threat(linf, 0.15), rate=0.97)(key, linear(WEIGHTS), images, target)

    together = jax.jit(jax.vmap(towards, (0, 0, None)))(keys, classes, IMAGES)
    together = jax.tree.map(np.asarray, together)
    assert len(set(together.passes.tolist())) > 1
    for place in range(CLASSES):
        alone = search(tup, key=keys[place], target=place, rate=0.97)
        one = jax.tree.map(lambda leaf, place=place: leaf[place], together)
        np.testing.assert_allclose(one.perturbation, alone.perturbation, atol=1e-6)
        assert (one.rate, one.converged, one.passes) == (alone.rate, alone.converged, alone.passes)


@pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
def test_applied_it_is_an_attack_within_the_threat(norm):
    slope = WEIGHTS[..., 0]
    found, kept = applied(norm)(0.3, 0.2, 0.7, slope, 0.2 + np.float32(0.5) * IMAGES)
    assert np.all(kept)
    assert np.all((found >= np.float32(0.2)) & (found <= np.float32(0.7)))
    # One that keeps to the threat as it is, is added as it is.
    small = np.float32(0.001) * np.sign(slope)
    found, _ = applied(norm)(0.3, 0.2, 0.7, small, np.full_like(IMAGES, 0.5))
    np.testing.assert_allclose(found, np.broadcast_to(0.5 + small, found.shape), atol=1e-7)


def test_boundary_first_takes_the_nearest_from_either_side(key):
    weights, images = np.zeros_like(WEIGHTS), np.full((7, *SHAPE), 0.5, np.float32)
    weights[0, 0, 0, 1] = 1.0
    images[:, 0, 0, 0] += np.float32([0.9, 0.3, -0.1, 0.7, -0.4, 0.2, -0.8])

    @functools.partial(jax.jit, static_argnums=1)
    def first(images, count):
        return boundary_first(linear(weights), key, images, jnp.int32(1), count)

    taken = first(images, 4)
    np.testing.assert_allclose(taken, images[[2, 5, 1, 4]])
    many = np.resize(images, (300, *SHAPE))  # more than are looked at together
    nearest = first(many, 40)
    np.testing.assert_allclose(nearest, np.broadcast_to(images[2], nearest.shape))


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
