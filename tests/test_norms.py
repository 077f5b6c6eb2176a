"""Balls, boxes and the geometry that attacks rely on."""

from functools import cache

import jax
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from rain_jax.norms import allowed, l1, l2, linf, project, random_start
from rain_jax.types import Threat

NORMS = pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
SHAPE = (6, 5, 3)


def drawn(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


@cache
def projected(norm):
    """One program for every radius and every box of this shape."""
    return jax.jit(norm.project)


@cache
def sampled(norm):
    return jax.jit(lambda key, radius: norm.sample(key, SHAPE, radius))


@cache
def started(norm):
    """A random start, whether it is allowed, and how far it is."""

    @jax.jit
    def one(radius, key, image):
        threat = Threat(norm, radius)
        start = random_start(threat, key, image)
        return start, allowed(threat, image, start), norm.measure(start - image)

    return one


@cache
def measured(norm):
    return jax.jit(norm.measure)


@cache
def crossed(norm):
    return jax.jit(norm.cross)


@NORMS
def test_projection_lands_in_the_ball_and_stays_there(norm):
    once = projected(norm)(drawn(0), 0.3)
    assert measured(norm)(once) <= 0.3 + 1e-6  # float32 may pass the radius by an ulp
    np.testing.assert_allclose(projected(norm)(once, 0.3), once, atol=1e-6)


@NORMS
def test_projection_leaves_what_is_inside(norm, key):
    inside = sampled(norm)(key, 0.2)
    np.testing.assert_array_equal(projected(norm)(inside, 0.3, -1.0, 1.0), inside)


@NORMS
def test_projection_is_nearest_in_ball_and_box(norm):
    """No other allowed perturbation is nearer: checked along lines to many of them."""
    far = drawn(0)
    low, high = (sign * 0.3 * np.abs(drawn(seed)) for sign, seed in ((-1, 1), (1, 2)))
    radius = {id(linf): 0.2, id(l2): 0.8, id(l1): 4.0}[id(norm)]
    found = np.asarray(projected(norm)(far, radius, low, high))
    assert measured(norm)(found) <= radius * (1 + 1e-5)
    assert np.all((found >= low) & (found <= high))
    # The nearest point p of a convex set has <far - p, other - p> <= 0 for every other point.
    for seed in range(50):
        other = np.clip(sampled(norm)(jax.random.key(seed), radius), low, high)
        inner = np.vdot(far - found, other - found)
        assert inner <= 1e-3, f"a nearer point lies towards sample {seed}: {inner}"


def test_l1_projection_matches_the_sorted_formula():
    """Duchi et al. 2008: the soft threshold by sorting."""
    far = drawn(0).ravel()
    size = np.sort(np.abs(far))[::-1]
    sums = np.cumsum(size) - 2.0
    last = np.nonzero(size - sums / np.arange(1, size.size + 1) > 0)[0][-1]
    cut = sums[last] / (last + 1)
    expected = np.sign(far) * np.maximum(np.abs(far) - cut, 0)
    found = projected(l1)(far, 2.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@NORMS
def test_radius_zero_allows_the_image_alone(norm, key):
    image = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
    start, _, _ = started(norm)(0.0, key, image)
    np.testing.assert_allclose(start, image, atol=1e-6)
    found = run(lambda image: project(Threat(norm, 0.0), image, 1 - image), image)
    np.testing.assert_allclose(found, image, atol=1e-6)


@NORMS
def test_random_starts_are_allowed_and_fill_the_ball(norm):
    keys = jax.random.split(jax.random.key(3), 200)
    image = np.full(SHAPE, 0.5, np.float32)
    # By key: draws for many at once take twice as long to compile.
    each = [started(norm)(0.5, key, image) for key in keys]
    starts, inside, sizes = (np.stack(leaves) for leaves in zip(*each, strict=True))
    assert np.all(inside)
    # In 90 dimensions nearly all of a ball's volume lies near its surface.
    assert 0.4 < np.median(sizes) <= 0.5 + 1e-6
    np.testing.assert_allclose(np.mean(starts, 0), image, atol=0.15)


def test_l2_samples_are_uniform_in_two_dimensions():
    """A quarter of a disc's area lies within half its radius."""
    keys = jax.random.split(jax.random.key(5), 4000)
    sizes = run(jax.vmap(lambda k: l2.measure(l2.sample(k, (2,), 1.0))), keys)
    assert abs(np.mean(sizes < 0.5) - 0.25) < 0.03


def test_l1_samples_are_uniform_in_two_dimensions():
    keys = jax.random.split(jax.random.key(5), 4000)
    sizes = run(jax.vmap(lambda k: l1.measure(l1.sample(k, (2,), 1.0))), keys)
    assert abs(np.mean(sizes < 0.5) - 0.25) < 0.03


@NORMS
def test_steepest_step_has_size_one_and_climbs_by_the_dual_norm(norm):
    gradient = drawn(0)
    step, size = run(stepped(norm), gradient)
    assert abs(size - 1) < 1e-5
    dual = {id(linf): np.sum(np.abs(gradient)), id(l2): np.sqrt(np.sum(gradient**2)),
            id(l1): np.max(np.abs(gradient))}[id(norm)]  # fmt: skip
    np.testing.assert_allclose(np.vdot(gradient, step), dual, rtol=1e-5)


@cache
def stepped(norm):
    """A steepest step and its size."""
    return lambda gradient: (norm.steepest(gradient), norm.measure(norm.steepest(gradient)))


@NORMS
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_steepest_step_of_tiny_and_zero_gradients_is_finite(norm, scale):
    step, size = run(stepped(norm), np.full(SHAPE, scale, np.float32))
    assert np.all(np.isfinite(step))
    assert abs(size - (scale > 0)) < 1e-5


@NORMS
def test_measure_has_a_finite_gradient_at_zero(norm):
    assert np.all(np.isfinite(run(jax.grad(norm.measure), np.zeros(SHAPE, np.float32))))


@NORMS
def test_radius_may_be_traced(norm):
    far, radii = drawn(0), (0.1, 0.5, 2.0)

    def both_ways(traced):
        many = jax.vmap(lambda r: norm.project(far, r, -0.5, 0.5))(traced)
        return many, [norm.project(far, known, -0.5, 0.5) for known in radii]

    np.testing.assert_allclose(*run(both_ways, np.float32(radii)), atol=1e-6)


def test_allowed_refuses_what_is_outside_or_not_a_number():
    image = np.full(SHAPE, 0.5, np.float32)
    within = jax.jit(lambda radius, found: allowed(Threat(linf, radius), image, found))
    broken = image.copy()
    broken[0, 0, 0] = np.nan
    assert within(8 / 255, image + np.float32(8 / 255))
    assert not within(8 / 255, image + np.float32(8.1 / 255))
    assert not within(8 / 255, broken)
    assert not within(1.0, image + np.float32(0.6))


def smallest(norm, slope, level, low, high):
    """The size of the smallest change with <slope, change> = level, by SciPy."""
    n = slope.size
    if norm is l2:
        start = np.clip(level * slope / np.sum(slope**2), low, high)
        plane = {"type": "eq", "fun": lambda d: slope @ d - level, "jac": lambda d: slope}
        found = minimize(
            lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=list(zip(low, high, strict=True)),
            constraints=plane, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        assert found.success
        return np.sqrt(found.fun)
    # The change and its absolute bounds: one for all entries in L-inf, one for each in L1.
    bounds = np.ones((n, 1)) if norm is linf else np.eye(n)
    found = linprog(
        np.concatenate([np.zeros(n), np.ones(bounds.shape[1])]),
        A_ub=np.block([[np.eye(n), -bounds], [-np.eye(n), -bounds]]), b_ub=np.zeros(2 * n),
        A_eq=np.concatenate([slope, np.zeros(bounds.shape[1])])[None], b_eq=[level],
        bounds=[*zip(low, high, strict=True), *[(0, None)] * bounds.shape[1]],
    )  # fmt: skip
    assert found.success
    return found.fun


@NORMS
@pytest.mark.parametrize("share", [-0.9, -0.2, 0.05, 0.5, 0.99])
def test_crossing_is_the_smallest_change_that_reaches_the_plane(norm, share):
    """`share` of what the bounds allow; a point of the box itself may lie at its edge."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        slope = rng.normal(size=24)
        low, high = -rng.uniform(size=24) * (rng.uniform(size=24) > 0.2), rng.uniform(size=24)
        far = np.maximum(np.sign(share) * slope * low, np.sign(share) * slope * high)
        level = share * float(np.sum(far))
        single = [np.float32(part) for part in (slope, level, low, high)]
        change = np.asarray(crossed(norm)(*single))
        assert np.all((change >= single[2]) & (change <= single[3]))
        np.testing.assert_allclose(slope @ change, level, rtol=1e-5, atol=1e-6)
        expected = smallest(norm, slope, level, low, high)
        np.testing.assert_allclose(measured(norm)(change), expected, rtol=1e-4)


@NORMS
def test_crossing_goes_to_the_corner_where_the_plane_is_out_of_reach(norm):
    slope = drawn(0)
    slope[0, 0, 0] = 0.0
    change = crossed(norm)(slope, 1e3, -0.1, 0.2)
    corner = np.where(slope > 0, 0.2, np.where(slope < 0, -0.1, 0.0)).astype(np.float32)
    np.testing.assert_array_equal(change, corner)
    np.testing.assert_array_equal(crossed(norm)(-slope, -1e3, -0.1, 0.2), corner)


@NORMS
def test_crossing_without_bounds_is_a_steepest_step(norm):
    slope = drawn(0)
    step = run(norm.steepest, slope)
    expected = 0.7 * step / np.vdot(slope, step)
    found = crossed(norm)(slope, 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@NORMS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_crossing_does_not_depend_on_the_scale(norm, scale):
    slope = drawn(0)
    expected = crossed(norm)(slope, 2.0, -0.1, 0.1)
    found = crossed(norm)(np.float32(scale) * slope, 2.0 * scale, -0.1, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@NORMS
def test_crossing_nothing_moves_nothing(norm):
    zero = np.zeros(SHAPE, np.float32)
    np.testing.assert_array_equal(crossed(norm)(zero, 1.0, -0.1, 0.1), zero)
    np.testing.assert_array_equal(crossed(norm)(zero + 1, 0.0, -0.1, 0.1), zero)


@NORMS
def test_crossing_is_exact_to_float32_and_the_same_in_a_batch(norm):
    """Levels that take Newton's method from one step to many, on as many entries as CIFAR's."""
    image = np.random.default_rng(0).uniform(size=3072).astype(np.float32)
    slope = drawn(1, 3072)
    whole = np.sum(np.where(slope > 0, slope * (1 - image), -slope * image))
    levels = (whole * np.array([1e-3, 0.3, 0.9, 0.999])).astype(np.float32)
    cross = jax.jit(lambda level: norm.cross(slope, level, -image, 1 - image))
    changes = np.asarray(jax.jit(jax.vmap(cross))(levels))
    reached = changes.astype(np.float64) @ slope.astype(np.float64)
    np.testing.assert_allclose(reached, levels, rtol=2e-6)
    for level, change in zip(levels, changes, strict=True):
        np.testing.assert_allclose(cross(level), change, atol=1e-4)
