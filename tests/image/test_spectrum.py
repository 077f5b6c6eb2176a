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
    return jnp.asarray(0.5 + 0.25 * np.cos(phase), jnp.float32)[:, :, None]


@pytest.mark.parametrize("down, across, ring", [(0, 5, 5), (3, 4, 5), (16, 0, 16), (0, 0, 0)])
def test_a_wave_stands_in_the_ring_of_its_frequency(down, across, ring):
    spectrum = ops.radial_spectrum(wave(32, 32, down, across))
    assert spectrum.shape == (17,)
    assert int(jnp.argmax(spectrum.at[0].set(-8.0) if ring else spectrum)) == ring
    quiet = np.delete(np.asarray(spectrum), [0, ring])
    assert np.all(quiet < -4)  # what float32's FFT leaves of zero


def test_rings_are_means_and_grow_with_the_square_of_contrast():
    noise = jax.random.uniform(jax.random.key(0), (24, 33, 3))
    spectrum = ops.radial_spectrum(noise)
    assert spectrum.shape == (13,)
    np.testing.assert_allclose(ops.radial_spectrum(noise / 10), spectrum - 2, atol=1e-4)
    grey = noise @ jnp.array([[0.299], [0.587], [0.114]])
    np.testing.assert_allclose(ops.radial_spectrum(grey), spectrum, atol=1e-3)
    # Ring 0 is zero frequency alone: the squared sum of the luminance.
    np.testing.assert_allclose(spectrum[0], 2 * jnp.log10(jnp.sum(grey)), atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(ops.radial_spectrum)(jnp.stack([noise, 1 - noise]))[0], spectrum, atol=1e-4
    )


def test_low_pass_keeps_what_is_slow_on_both_axes():
    slow, fast_down, fast_across = wave(16, 20, 2, 2), wave(16, 20, 5, 0), wave(16, 20, 1, 6)
    both = (slow + fast_down + fast_across) / 3
    # 0.25 cycles per pixel: 4 periods of 16 pixels, 5 of 20.
    kept = ops.low_pass(both, 0.5)
    np.testing.assert_allclose(kept, (slow + 0.5 + 0.5) / 3, atol=1e-6)
    np.testing.assert_allclose(ops.low_pass(fast_down, 5 / 8), fast_down, atol=1e-6)  # the very end


def test_low_pass_is_a_projection_from_the_mean_to_everything():
    image = jax.random.uniform(jax.random.key(1), (15, 18, 3))
    cutoffs = jnp.array([0.0, 0.3, 1.0])
    passed = jax.jit(jax.vmap(ops.low_pass, (None, 0)))(image, cutoffs)
    mean = jnp.broadcast_to(jnp.mean(image, axis=(0, 1), keepdims=True), image.shape)
    np.testing.assert_allclose(passed[0], mean, atol=1e-6)
    np.testing.assert_allclose(ops.low_pass(passed[1], 0.3), passed[1], atol=1e-6)
    np.testing.assert_allclose(passed[2], image, atol=1e-6)
    # An orthogonal projection is its own transpose, so its gradient is a low pass too.
    weight = jax.random.normal(jax.random.key(2), image.shape)
    slope = jax.grad(lambda image: jnp.sum(weight * ops.low_pass(image, 0.3)))(image)
    np.testing.assert_allclose(slope, ops.low_pass(weight, 0.3), atol=1e-5)


def test_the_energy_of_a_band_is_that_of_the_waves_in_it():
    slow, fast, slanted = wave(16, 20, 2, 0), wave(16, 20, 0, 8), wave(16, 20, 4, 5)
    image = slow + fast + slanted
    # A cosine of amplitude 1/4 has a mean square of 1/32; they are at 1/8, 2/5 and root 1/8.
    each = 16 * 20 / 32
    above = jnp.array([0.0, 0.125, 0.35, 0.36, 0.4])
    found = jax.jit(jax.vmap(lambda f: ops.band_energy(image, above=f)))(above)
    np.testing.assert_allclose(found, np.array([3, 2, 2, 1, 0]) * each, atol=1e-3)


def test_energies_above_zero_are_the_variance_of_luminance_wherever_it_stands():
    noise = jax.random.uniform(jax.random.key(3), (15, 18, 3))
    grey = noise @ jnp.array([[0.299], [0.587], [0.114]])
    total = 15 * 18 * jnp.var(grey)
    np.testing.assert_allclose(ops.band_energy(noise, above=0.0), total, rtol=1e-5)
    high = ops.band_energy(noise, above=0.25)
    np.testing.assert_allclose(
        ops.band_energy(ops.shift(noise, (4, -3)), above=0.25), high, rtol=1e-5
    )
    # Above half a cycle only the corners are left, and above 0.71 nothing.
    assert 0 < ops.band_energy(noise, above=0.5) < high
    assert ops.band_energy(noise, above=0.71) == 0


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="cutoff"):
        ops.low_pass(wave(8, 8, 1, 1), 1.5)
    with pytest.raises(UsageError, match="above=-1"):
        ops.band_energy(wave(8, 8, 1, 1), above=-1)
    with pytest.raises(UsageError, match="channels"):
        ops.radial_spectrum(jnp.zeros((8, 8, 2)))
