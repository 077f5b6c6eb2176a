"""Balls, boxes and the geometry that attacks rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from rain_jax.norms import allowed, l1, l2, linf, project, random_start
from rain_jax.types import Threat

NORMS = pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
SHAPE = (6, 5, 3)


@NORMS
def test_projection_lands_in_the_ball_and_stays_there(norm, key):
    once = norm.project(jax.random.normal(key, SHAPE), 0.3)
    assert norm.measure(once) <= 0.3 + 1e-6  # float32 may pass the radius by an ulp
    np.testing.assert_allclose(norm.project(once, 0.3), once, atol=1e-6)


@NORMS
def test_projection_leaves_what_is_inside(norm, key):
    inside = norm.sample(key, SHAPE, 0.2)
    np.testing.assert_array_equal(norm.project(inside, 0.3, -1.0, 1.0), inside)


@NORMS
def test_projection_is_nearest_in_ball_and_box(norm, key):
    """No other allowed perturbation is nearer: checked along lines to many of them."""
    far = jax.random.normal(key, SHAPE)
    low = -jnp.abs(jax.random.normal(jax.random.fold_in(key, 1), SHAPE)) * 0.3
    high = jnp.abs(jax.random.normal(jax.random.fold_in(key, 2), SHAPE)) * 0.3
    radius = {id(linf): 0.2, id(l2): 0.8, id(l1): 4.0}[id(norm)]
    found = norm.project(far, radius, low, high)
    assert norm.measure(found) <= radius * (1 + 1e-5)
    assert bool(jnp.all((found >= low) & (found <= high)))
    # The nearest point p of a convex set has <far - p, other - p> <= 0 for every other point.
    for seed in range(50):
        other = jnp.clip(norm.sample(jax.random.key(seed), SHAPE, radius), low, high)
        inner = float(jnp.vdot(far - found, other - found))
        assert inner <= 1e-3, f"a nearer point lies towards sample {seed}: {inner}"


def test_l1_projection_matches_the_sorted_formula(key):
    """Duchi et al. 2008: the soft threshold by sorting."""
    far = np.asarray(jax.random.normal(key, SHAPE)).ravel()
    size = np.sort(np.abs(far))[::-1]
    sums = np.cumsum(size) - 2.0
    last = np.nonzero(size - sums / np.arange(1, size.size + 1) > 0)[0][-1]
    cut = sums[last] / (last + 1)
    expected = np.sign(far) * np.maximum(np.abs(far) - cut, 0)
    found = l1.project(jnp.asarray(far), 2.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@NORMS
def test_radius_zero_allows_the_image_alone(norm, key):
    image = jax.random.uniform(key, SHAPE)
    threat = Threat(norm, 0.0)
    np.testing.assert_allclose(random_start(threat, key, image), image, atol=1e-6)
    np.testing.assert_allclose(project(threat, image, 1 - image), image, atol=1e-6)


@NORMS
def test_random_starts_are_allowed_and_fill_the_ball(norm):
    threat = Threat(norm, 0.5)
    keys = jax.random.split(jax.random.key(3), 200)
    image = jnp.full(SHAPE, 0.5)
    starts = jax.vmap(lambda k: random_start(threat, k, image))(keys)
    assert bool(jnp.all(jax.vmap(lambda s: allowed(threat, image, s))(starts)))
    sizes = jax.vmap(lambda s: norm.measure(s - image))(starts)
    # In 90 dimensions nearly all of a ball's volume lies near its surface.
    assert 0.4 < float(jnp.median(sizes)) <= 0.5 + 1e-6
    np.testing.assert_allclose(jnp.mean(starts, 0), image, atol=0.15)


def test_l2_samples_are_uniform_in_two_dimensions():
    """A quarter of a disc's area lies within half its radius."""
    keys = jax.random.split(jax.random.key(5), 4000)
    sizes = jax.vmap(lambda k: l2.measure(l2.sample(k, (2,), 1.0)))(keys)
    assert abs(float(jnp.mean(sizes < 0.5)) - 0.25) < 0.03


def test_l1_samples_are_uniform_in_two_dimensions():
    keys = jax.random.split(jax.random.key(5), 4000)
    sizes = jax.vmap(lambda k: l1.measure(l1.sample(k, (2,), 1.0)))(keys)
    assert abs(float(jnp.mean(sizes < 0.5)) - 0.25) < 0.03


@NORMS
def test_steepest_step_has_size_one_and_climbs_by_the_dual_norm(norm, key):
    gradient = jax.random.normal(key, SHAPE)
    step = norm.steepest(gradient)
    assert abs(float(norm.measure(step)) - 1) < 1e-5
    dual = {id(linf): jnp.sum(jnp.abs(gradient)), id(l2): jnp.sqrt(jnp.sum(gradient**2)),
            id(l1): jnp.max(jnp.abs(gradient))}[id(norm)]  # fmt: skip
    np.testing.assert_allclose(jnp.vdot(gradient, step), dual, rtol=1e-5)


@NORMS
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_steepest_step_of_tiny_and_zero_gradients_is_finite(norm, scale):
    step = norm.steepest(scale * jnp.ones(SHAPE))
    assert bool(jnp.all(jnp.isfinite(step)))
    assert abs(float(norm.measure(step)) - (scale > 0)) < 1e-5


@NORMS
def test_measure_has_a_finite_gradient_at_zero(norm):
    assert bool(jnp.all(jnp.isfinite(jax.grad(norm.measure)(jnp.zeros(SHAPE)))))


@NORMS
def test_radius_may_be_traced(norm, key):
    far = jax.random.normal(key, SHAPE)
    radii = jnp.array([0.1, 0.5, 2.0])
    many = jax.vmap(lambda r: norm.project(far, r, -0.5, 0.5))(radii)
    for radius, one in zip(radii, many, strict=True):
        np.testing.assert_allclose(one, norm.project(far, float(radius), -0.5, 0.5), atol=1e-6)


def test_allowed_refuses_what_is_outside_or_not_a_number():
    image = jnp.full(SHAPE, 0.5)
    threat = Threat(linf, 8 / 255)
    assert allowed(threat, image, image + 8 / 255)
    assert not allowed(threat, image, image + 8.1 / 255)
    assert not allowed(threat, image, image.at[0, 0, 0].set(jnp.nan))
    assert not allowed(Threat(linf, 1.0), image, image + 0.6)


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
        change = np.asarray(norm.cross(*single))
        assert np.all((change >= single[2]) & (change <= single[3]))
        np.testing.assert_allclose(slope @ change, level, rtol=1e-5, atol=1e-6)
        expected = smallest(norm, slope, level, low, high)
        np.testing.assert_allclose(norm.measure(change), expected, rtol=1e-4)


@NORMS
def test_crossing_goes_to_the_corner_where_the_plane_is_out_of_reach(norm, key):
    slope = jax.random.normal(key, SHAPE).at[0, 0, 0].set(0.0)
    change = norm.cross(slope, 1e3, -0.1, 0.2)
    corner = jnp.where(slope > 0, 0.2, jnp.where(slope < 0, -0.1, 0.0))
    np.testing.assert_array_equal(change, corner)
    np.testing.assert_array_equal(norm.cross(-slope, -1e3, -0.1, 0.2), corner)


@NORMS
def test_crossing_without_bounds_is_a_steepest_step(norm, key):
    slope = jax.random.normal(key, SHAPE)
    step = norm.steepest(slope)
    expected = 0.7 * step / jnp.vdot(slope, step)
    np.testing.assert_allclose(norm.cross(slope, 0.7), expected, rtol=1e-5, atol=1e-7)


@NORMS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_crossing_does_not_depend_on_the_scale(norm, scale, key):
    slope = jax.random.normal(key, SHAPE)
    expected = norm.cross(slope, 2.0, -0.1, 0.1)
    np.testing.assert_allclose(
        norm.cross(scale * slope, 2.0 * scale, -0.1, 0.1), expected, rtol=1e-4, atol=1e-6
    )


@NORMS
def test_crossing_nothing_moves_nothing(norm):
    zero = jnp.zeros(SHAPE)
    np.testing.assert_array_equal(norm.cross(zero, 1.0, -0.1, 0.1), zero)
    np.testing.assert_array_equal(norm.cross(zero + 1, 0.0, -0.1, 0.1), zero)


@NORMS
def test_crossing_is_exact_to_float32_and_the_same_in_a_batch(norm, key):
    """Levels that take Newton's method from one step to many, on as many entries as CIFAR's."""
    image = jax.random.uniform(key, (3072,))
    slope = jax.random.normal(jax.random.fold_in(key, 1), (3072,))
    whole = float(jnp.sum(jnp.where(slope > 0, slope * (1 - image), -slope * image)))
    levels = whole * jnp.array([1e-3, 0.3, 0.9, 0.999])
    cross = jax.jit(lambda level: norm.cross(slope, level, -image, 1 - image))
    changes = jax.vmap(cross)(levels)
    reached = np.asarray(changes, np.float64) @ np.asarray(slope, np.float64)
    np.testing.assert_allclose(reached, levels, rtol=2e-6)
    for level, change in zip(levels, changes, strict=True):
        np.testing.assert_allclose(cross(level), change, atol=1e-4)
