"""Tables by their formulas on statistics made by hand; statistics on images made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import norms
from rain_jax.attacks import fgsm
from rain_jax.checks import UsageError
from rain_jax.defences.tables import (
    Moments,
    Statistics,
    analyse,
    coefficients,
    deepn_table,
    fd_table,
    moments,
    nn_table,
    pixels,
    statistics,
    tables,
)
from rain_jax.image import standard_tables
from rain_jax.losses import cross_entropy
from rain_jax.types import Batch, Threat

FLAT = np.ones((3, 8, 8), np.float32)
KEY = jax.random.key(0)


def made(clean=FLAT, noise=FLAT, slope=FLAT) -> Statistics:
    return Statistics(clean, noise, slope)


def changed(at: tuple[int, int, int], value: float) -> np.ndarray:
    values = FLAT.copy()
    values[at] = value
    return values


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.array, jax.jit(function)(*arguments))


def linear(classes: int = 3, shape: tuple[int, ...] = (16, 8, 3)):
    weight = np.random.default_rng(7).normal(size=(classes, *shape)).astype(np.float32)
    return lambda key, image: jnp.einsum("khwc,hwc->k", weight, image)


def batch(size: int = 4, shape: tuple[int, ...] = (16, 8, 3)) -> Batch:
    images = np.random.default_rng(1).uniform(size=(size, *shape)).astype(np.float32)
    index = np.arange(size)
    return Batch(images, index % 3, index, index >= 0)


ATTACK = fgsm(Threat(norms.linf, 0.05))


@jax.jit
def measured(seen: Batch) -> Moments:
    return moments(KEY, linear(), ATTACK, seen)


# --- coefficients ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 8, 3), (13, 9, 3), (8, 8, 1)])
def test_coefficients_can_be_undone(shape):
    image = np.random.default_rng(0).uniform(size=shape).astype(np.float32)

    @jax.jit
    def there_and_back(image):
        found = coefficients(image)
        return found, pixels(found, *shape[:2])

    found, back = there_and_back(image)
    assert found.shape == (shape[2], -(-shape[0] // 8), -(-shape[1] // 8), 8, 8)
    np.testing.assert_allclose(back, image, atol=1e-5)


def test_edges_are_continued_into_whole_blocks():
    found = run(coefficients, np.full((13, 9, 3), 0.25, np.float32))
    found[:, :, :, 0, 0] = 0.0
    assert np.max(np.abs(found)) < 1e-3


def test_coefficients_are_of_jfif_planes():
    # A colour all over has 8 times its Y - 128, Cb and Cr, and nothing else.
    colour = np.zeros((8, 8, 3), np.float32)
    colour[:, :, 0] = 1.0
    red = run(coefficients, colour)[:, 0, 0]
    expected = [8 * (0.299 * 255 - 128), -8 * 0.168736 * 255, 8 * 0.5 * 255]
    np.testing.assert_allclose(red[:, 0, 0], expected, rtol=1e-5)
    red[:, 0, 0] = 0.0
    assert np.max(np.abs(red)) < 1e-3


def test_rows_are_vertical_frequencies():
    stripes = np.tile(np.arange(8).reshape(8, 1, 1) % 2, (1, 8, 1)).astype(np.float32)
    found = np.abs(run(coefficients, stripes)[0, 0, 0])
    assert found[7, 0] > 500
    assert np.max(found[:, 1:]) < 1e-3


# --- statistics ------------------------------------------------------------------------------


def test_statistics_are_those_of_numpy():
    seen = batch()
    found = statistics([measured(seen)])

    @jax.vmap
    def both(image, label):
        return coefficients(image), coefficients(ATTACK(KEY, linear(), image, label))

    clean, attacked = run(both, seen.image, seen.label)
    clean = clean.astype(np.float64)
    noise = attacked - clean
    np.testing.assert_allclose(found.clean, clean.std(axis=(0, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(found.noise, noise.std(axis=(0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_the_slope_is_that_of_the_loss_in_each_coefficient():
    image, label = batch().image[0], 1

    def both(image):
        # The image's own gradient, taken to the coefficients by the transform's transpose.
        toward = jax.grad(lambda image: cross_entropy(linear()(KEY, image), label))(image)
        back = jax.linear_transpose(
            lambda c: pixels(c, 16, 8) - pixels(jnp.zeros_like(c), 16, 8), coefficients(image)
        )
        return analyse(KEY, linear(), image, image, label), back(toward)[0]

    found, slopes = run(both, image)
    assert found.blocks == 2
    assert np.max(np.abs(found.noise)) == 0
    expected = np.sum(np.abs(slopes), axis=(1, 2))
    np.testing.assert_allclose(found.slope, expected, rtol=1e-4, atol=1e-7)


def test_moments_add_up_over_batches_and_leave_padding_out():
    seen = batch()
    parts = [jax.tree.map(lambda leaf, p=p: leaf[p : p + 2], seen) for p in (0, 2)]
    # Rows of padding behind each, so that parts and whole are of one size, and one program.
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:2]]), parts)
    padded = [part._replace(valid=np.arange(4) < 2) for part in padded]
    whole = statistics([measured(seen)])
    for other in (statistics(measured(part) for part in parts), statistics(map(measured, padded))):
        for name, one in whole._asdict().items():
            np.testing.assert_allclose(getattr(other, name), one, rtol=1e-4, err_msg=name)
    over = jax.vmap(lambda part: moments(KEY, linear(), ATTACK, part, "all"), axis_name="all")
    both = jax.jit(over)(jax.tree.map(lambda *leaves: np.stack(leaves), *parts))
    np.testing.assert_allclose(both.slope[0], measured(seen).slope, rtol=1e-4)
    np.testing.assert_array_equal(both.blocks, [8, 8])


def test_bytes_are_taken_as_pixels():
    seen = batch()._replace(image=np.full((4, 16, 8, 3), 128, np.uint8))
    assert np.max(np.abs(measured(seen).clean[0])) < 1e-2


def test_nothing_seen_is_refused():
    none = measured(batch()._replace(valid=np.zeros(4, bool)))
    for parts in ([], [none]):
        with pytest.raises(UsageError, match="one valid image"):
            statistics(parts)


# --- tables ----------------------------------------------------------------------------------


# The level is data, so each is one program.
PROGRAMS = {function: jax.jit(function) for function in (nn_table, deepn_table, fd_table)}


def by_nn(given, level):
    return [np.asarray(table) for table in PROGRAMS[nn_table](given, level)]


def by_deepn(given, level):
    return [np.asarray(table) for table in PROGRAMS[deepn_table](given, level)]


def by_fd(level):
    return [np.asarray(table) for table in PROGRAMS[fd_table](level)]


def test_nn_table_is_the_level_where_all_frequencies_are_alike():
    for level in (15.0, 30.0, 60.0):
        for table in by_nn(made(), level):
            np.testing.assert_array_equal(table, np.full((8, 8), level))


def test_nn_steps_grow_with_the_noise_and_shrink_where_the_model_is_sensitive():
    # Twice the noise at one of 64 places: the mean is 65 / 64.
    luma, chroma = by_nn(made(noise=changed((0, 2, 3), 2.0)), 30.0)
    assert luma[2, 3] == round(30 * 2 * 64 / 65)
    assert luma[0, 0] == round(30 * 64 / 65)
    np.testing.assert_array_equal(chroma, np.full((8, 8), 30.0))
    # Twice the slope: the geometric mean is 2 ** (1 / 64), and steps go by the inverse root.
    luma, _ = by_nn(made(slope=changed((0, 2, 3), 2.0)), 100.0)
    assert luma[2, 3] == round(100 * 2 ** ((1 / 64 - 1) / 2))
    assert luma[0, 0] == round(100 * 2 ** (1 / 128))


@pytest.mark.parametrize("slope, step", [(1e9, 15.0), (0.0, 60.0)])
def test_the_weight_of_the_slope_is_bounded(slope, step):
    luma, _ = by_nn(made(slope=changed((0, 1, 1), slope)), 30.0)
    assert luma[1, 1] == step


def test_chroma_is_of_both_its_channels():
    noise = np.stack([FLAT[0], FLAT[0], 7 * FLAT[0]])
    noise[:, 0, 0] = [1.0, 1.0, np.sqrt(199)]
    # Root mean squares: 5, and 10 at one place of 64.
    _, chroma = by_nn(made(noise=noise), 32.0)
    assert chroma[0, 0] == round(32 * 10 / (5 * 65 / 64))
    # Means: 2, and 4 at one place; the geometric mean of all is 2 * 2 ** (1 / 64).
    slope = np.stack([FLAT[0], FLAT[0], 3 * FLAT[0]])
    slope[:, 0, 0] = [1.0, 1.0, 7.0]
    _, chroma = by_nn(made(slope=slope), 100.0)
    assert chroma[0, 0] == round(100 * 2 ** ((1 / 64 - 1) / 2))
    grey = Statistics(*(one[:1] for one in made(clean=10 * FLAT)))
    np.testing.assert_array_equal(*by_deepn(grey, 30.0))


@pytest.mark.parametrize(
    "deviation, step",
    [(0.0, 255), (4.0, 216), (20.0, 60), (21.0, 59), (60.0, 20), (61.0, 57), (78.0, 6), (90.0, 5)],
)
def test_deepn_rule(deviation, step):
    luma, chroma = by_deepn(made(clean=deviation * FLAT), 30.0)
    assert luma[0, 0] == step
    assert chroma[7, 7] == step


def test_fd_table_is_as_published_at_level_30_and_scales():
    expected = np.full((8, 8), 30.0)
    expected[:4, :4] = 25
    for table in by_fd(30.0):
        np.testing.assert_array_equal(table, expected)
    np.testing.assert_array_equal(by_fd(60.0)[1], 2 * expected)


def test_std_is_annex_k_at_a_quality():
    for found, expected in zip(*run(lambda: (tables("std", 40), standard_tables(40))), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("table", ["nn", "fd", "deepn", "std"])
def test_tables_fit_a_file_and_levels_are_data(table):
    compiled = 0

    @jax.jit
    def program(level):
        nonlocal compiled
        compiled += 1
        return jnp.stack(tables(table, level, given))

    noise = np.exp(np.random.default_rng(0).normal(size=(3, 3, 8, 8))).astype(np.float32)
    given = Statistics(20 * noise[0], noise[1], noise[2])
    levels = [1.0, 15.0, 60.0, 100.0]
    one_by_one = [program(level) for level in levels]
    assert compiled == 1
    swept = jax.vmap(lambda level: jnp.stack(tables(table, level, given)))
    together = run(swept, np.float32(levels))
    np.testing.assert_array_equal(together, np.stack(one_by_one))
    assert together.shape == (4, 2, 8, 8)
    np.testing.assert_array_equal(together, np.round(together))
    assert np.min(together) >= 1
    assert np.max(together) <= 255
    coarser = -1 if table == "std" else 1
    assert np.all(coarser * np.diff(together, axis=0) >= 0)


def test_nothing_perturbed_means_the_finest_steps():
    np.testing.assert_array_equal(by_nn(made(noise=0 * FLAT), 30.0)[0], np.ones((8, 8)))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("dct", 30.0), "did you mean"),
        (("fd", 0.0), "level"),
        (("fd", 256.0), "level"),
        (("std", 0.5), "level"),
        (("std", 101.0), "level"),
        (("nn", 30.0), "statistics"),
        (("deepn", 30.0), "statistics"),
    ],
)
def test_bad_settings_are_refused(arguments, says):
    with pytest.raises(UsageError, match=says if says != "did you mean" else "table='dct'"):
        tables(*arguments)


def test_images_of_other_channels_are_refused():
    with pytest.raises(UsageError, match="2 channels"):
        coefficients(jnp.zeros((8, 8, 2)))
