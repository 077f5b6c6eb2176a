"""Spectra of waves whose frequency is known, and a projection that keeps the low ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import image as ops
from rain_jax.checks import UsageError


def wave(height, width, down, across):
    """A cosine of `down` and `across` periods around 0.5, [H, W, 1]."""
    y, x = np.mgrid[:height, :width]
    phase = 2 * np.pi * (down * y / height + across * x / width)
    return (0.5 + 0.25 * np.cos(phase)).astype(np.float32)[:, :, None]


def noise(seed, height, width):
    return np.random.default_rng(seed).uniform(size=(height, width, 3)).astype(np.float32)


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.array, jax.jit(function)(*arguments))


GREY = np.float32([[0.299], [0.587], [0.114]])


@pytest.mark.parametrize("down, across, ring", [(0, 5, 5), (3, 4, 5), (16, 0, 16), (0, 0, 0)])
def test_a_wave_stands_in_the_ring_of_its_frequency(down, across, ring):
    spectrum = run(ops.radial_spectrum, wave(32, 32, down, across))
    assert spectrum.shape == (17,)
    quiet = np.delete(spectrum, [0, ring])
    if ring:
        spectrum[0] = -8.0
    assert np.argmax(spectrum) == ring
    assert np.all(quiet < -4)  # what float32's FFT leaves of zero


def test_rings_are_means_and_grow_with_the_square_of_contrast():
    image = noise(0, 24, 33)
    grey = image @ GREY

    def several(image, grey):
        of = ops.radial_spectrum
        return of(image), of(image / 10), of(grey), jax.vmap(of)(jnp.stack([image, 1 - image]))

    spectrum, darker, of_grey, batch = run(several, image, grey)
    assert spectrum.shape == (13,)
    np.testing.assert_allclose(darker, spectrum - 2, atol=1e-4)
    np.testing.assert_allclose(of_grey, spectrum, atol=1e-3)
    # Ring 0 is zero frequency alone: the squared sum of the luminance.
    np.testing.assert_allclose(spectrum[0], 2 * np.log10(np.sum(grey)), atol=1e-5)
    np.testing.assert_allclose(batch[0], spectrum, atol=1e-4)


def test_low_pass_keeps_what_is_slow_on_both_axes():
    slow, fast_down, fast_across = wave(16, 20, 2, 2), wave(16, 20, 5, 0), wave(16, 20, 1, 6)
    both = (slow + fast_down + fast_across) / 3
    # 0.25 cycles per pixel: 4 periods of 16 pixels, 5 of 20.
    kept, whole = run(lambda x, y: (ops.low_pass(x, 0.5), ops.low_pass(y, 5 / 8)), both, fast_down)
    np.testing.assert_allclose(kept, (slow + 0.5 + 0.5) / 3, atol=1e-6)
    np.testing.assert_allclose(whole, fast_down, atol=1e-6)  # the very end


def test_low_pass_is_a_projection_from_the_mean_to_everything():
    image = noise(1, 15, 18)
    weight = np.random.default_rng(2).normal(size=image.shape).astype(np.float32)

    @jax.jit
    def several(image, weight, cutoffs):
        passed = jax.vmap(ops.low_pass, (None, 0))(image, cutoffs)
        slope = jax.grad(lambda image: jnp.sum(weight * ops.low_pass(image, 0.3)))(image)
        return passed, ops.low_pass(passed[1], 0.3), slope, ops.low_pass(weight, 0.3)

    passed, again, slope, low = several(image, weight, np.float32([0.0, 0.3, 1.0]))
    mean = np.broadcast_to(np.mean(image, axis=(0, 1), keepdims=True), image.shape)
    np.testing.assert_allclose(passed[0], mean, atol=1e-6)
    np.testing.assert_allclose(again, passed[1], atol=1e-6)
    np.testing.assert_allclose(passed[2], image, atol=1e-6)
    # An orthogonal projection is its own transpose, so its gradient is a low pass too.
    np.testing.assert_allclose(slope, low, atol=1e-5)


def test_the_energy_of_a_band_is_that_of_the_waves_in_it():
    slow, fast, slanted = wave(16, 20, 2, 0), wave(16, 20, 0, 8), wave(16, 20, 4, 5)
    image = slow + fast + slanted
    # A cosine of amplitude 1/4 has a mean square of 1/32; they are at 1/8, 2/5 and root 1/8.
    each = 16 * 20 / 32
    above = np.float32([0.0, 0.125, 0.35, 0.36, 0.4])
    found = jax.jit(jax.vmap(lambda f: ops.band_energy(image, above=f)))(above)
    np.testing.assert_allclose(found, np.array([3, 2, 2, 1, 0]) * each, atol=1e-3)


def test_energies_above_zero_are_the_variance_of_luminance_wherever_it_stands():
    image = noise(3, 15, 18)
    energy = jax.jit(lambda image, above: ops.band_energy(image, above=above))
    total = 15 * 18 * np.var(image @ GREY)
    np.testing.assert_allclose(energy(image, 0.0), total, rtol=1e-5)
    high = energy(image, 0.25)
    elsewhere = np.roll(image, (4, -3), axis=(0, 1))
    np.testing.assert_allclose(energy(elsewhere, 0.25), high, rtol=1e-5)
    # Above half a cycle only the corners are left, and above 0.71 nothing.
    assert 0 < energy(image, 0.5) < high
    assert energy(image, 0.71) == 0


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="cutoff"):
        ops.low_pass(wave(8, 8, 1, 1), 1.5)
    with pytest.raises(UsageError, match="above=-1"):
        ops.band_energy(wave(8, 8, 1, 1), above=-1)
    with pytest.raises(UsageError, match="channels"):
        ops.radial_spectrum(jnp.zeros((8, 8, 2)))
