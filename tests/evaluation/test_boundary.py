"""Verdicts on the decision boundary are alike for all batch sizes, devices and CPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import boundary_images
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import evaluation, models
from rain_jax.evaluation import boundary
from rain_jax.norms import linf
from rain_jax.parallel import choose_devices, place
from rain_jax.types import Batch, Threat

SIZES, DEVICES = (1, 7, 32), (1, 8)
COUNT, BESIDE = 200, (0.5, 2.0, 10.0)  # bounds from the boundary, forty images each
ROOT = Path(__file__).resolve().parents[2]
# Whether this process multiplies and adds in one rounding, which SSE4_2 does not.
FUSED = not re.search(r"max_isa=(SSE4_2|AVX)\b", os.environ["XLA_FLAGS"])
VARIABLES = boundary_images.weights()


@pytest.fixture(scope="module")
def images():
    """On the boundary, then beside it by half a bound and by more than one."""
    parts = [boundary_images.on_the_boundary(COUNT)]
    parts += [boundary_images.on_the_boundary(40, beside=bounds) for bounds in BESIDE]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def found(images):
    return boundary_images.table(*images, SIZES, DEVICES)


def test_verdicts_there_feel_neither_batches_nor_devices(found):
    first, near = found["right/1/1"], COUNT + 40
    assert 10 < np.sum(first[:COUNT]) < COUNT - 10, "equal verdicts would say nothing"
    for size in SIZES:
        for count in DEVICES:
            np.testing.assert_array_equal(found[f"right/{size}/{count}"], first)
            # So are the numbers that they follow from.
            margin, expected = found[f"margin/{size}/{count}"], found["margin/1/1"]
            np.testing.assert_array_equal(margin[:near], expected[:near])
            counted = found[f"near_boundary/{size}/{count}"]
            np.testing.assert_array_equal(counted, np.arange(len(first)) < near)


def test_they_are_those_of_the_image_alone(images, found):
    """Whatever the flags of the program of one image are, it is the network's own arithmetic."""
    label = images[1]
    alone = jax.jit(lambda v, x: boundary_images.NETWORK.apply(v, x)[0][0])
    for row in range(0, len(label), 40):
        logits = np.asarray(alone(VARIABLES, images[0][row : row + 1]))
        margin = np.max(np.delete(logits, label[row])) - logits[label[row]]
        np.testing.assert_allclose(margin, found["margin/1/1"][row], atol=1e-6)


@pytest.mark.parametrize("isa", ["SSE4_2"])
def test_between_instruction_sets_those_differ_that_are_counted(images, found, isa, tmp_path):
    image, label = images
    np.savez(tmp_path / "in.npz", images=image, label=label, sizes=(7, 32), devices=(1, 8))
    path = f"{ROOT}:{ROOT / 'tests'}"
    flags = f"--xla_force_host_platform_device_count=8 --xla_cpu_max_isa={isa}"
    subprocess.run(
        [sys.executable, boundary_images.__file__, tmp_path / "in.npz", tmp_path / "out.npz"],
        check=True, cwd=ROOT, timeout=240,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )  # fmt: skip
    with np.load(tmp_path / "out.npz") as there:
        for size, count in ((7, 1), (7, 8), (32, 1), (32, 8)):
            np.testing.assert_array_equal(there[f"right/{size}/{count}"], there["right/7/1"])
            differ = there[f"right/{size}/{count}"] != found["right/1/1"]
            assert np.any(differ) or not FUSED
            assert np.all(there[f"near_boundary/{size}/{count}"][differ])
            assert np.all(found["near_boundary/1/1"][differ])
        np.testing.assert_allclose(there["margin/7/1"], found["margin/7/1"], atol=1e-5)


# --- A model that rounds otherwise in a batch, visibly ------------------------------------------


def judged(pixels, off):
    """The judge's word on images of one pixel, which is the margin; in batches it is off."""

    def logits(images):
        far = 0.0 if len(images) == 1 else off
        pixel = np.asarray(images)[:, 0, 0, 0]
        return np.stack([1.0 - pixel - far, np.ones_like(pixel)], axis=1).astype(np.float32)

    def model(key, image):
        batched = jax.pure_callback(
            lambda images: logits(images.reshape(-1, 1, 1, 1)).reshape(*images.shape[:-3], 2),
            jax.ShapeDtypeStruct((2,), jnp.float32), image, vmap_method="broadcast_all",
        )  # fmt: skip
        return batched

    return judged_by(model, pixels)


def judged_by(model, pixels):
    count = len(pixels)
    images = np.asarray(pixels, np.float32)[:, None, None, None]
    index = np.arange(count, dtype=np.int32)
    batch = Batch(images, np.zeros(count, np.int32), index, np.ones(count, bool))
    on = place("shard_map", choose_devices(1))
    rules = evaluation.Rules(Threat(linf, 1.0, low=-1.0))
    judge = evaluation.judging(lambda variables: model, rules, on, batch_size=count)
    (seen,) = judge({}, jax.random.key(0), evaluation.as_they_are([batch]))
    return seen.judgement


BOUND = boundary.FLOAT32  # times the largest logit, which is about one here


def test_within_rounding_the_image_alone_decides_and_beyond_it_the_batch():
    pixels = [0.5, -0.5, BOUND / 2, -BOUND / 4, 0.0, 3 * BOUND, -3 * BOUND]
    seen = judged(pixels, off=BOUND / 2)
    near = [False, False, True, True, True, False, False]
    np.testing.assert_array_equal(seen.near_boundary, near)
    # The batch alone would have called the fourth image wrong.
    np.testing.assert_array_equal(seen.right, [False, True, False, True, False, False, True])
    expected = np.asarray(pixels) + np.where(near, 0.0, BOUND / 2)
    np.testing.assert_allclose(seen.margin, expected, atol=2e-7)
    np.testing.assert_allclose(seen.rounding, BOUND * np.maximum(1, 1 - expected), rtol=1e-3)


def test_a_model_that_rounds_more_than_the_bound_is_warned_of():
    with pytest.warns(UserWarning, match="a margin moved by .* may depend on the batch size"):
        judged([0.5, -3.5 * BOUND, 0.5], off=3 * BOUND)


def test_logits_that_are_not_finite_are_wrong_and_not_near():

    def model(key, image):
        pixel = image[0, 0, 0]
        first = jnp.select([pixel > 0.8, pixel > 0.6, pixel > 0.4], [jnp.nan, -jnp.inf, jnp.inf], 0)
        return jnp.stack([first, 0.5])

    seen = judged_by(model, [0.1, 0.5, 0.7, 0.9])
    np.testing.assert_array_equal(seen.near_boundary, False)
    np.testing.assert_array_equal(seen.right, False)


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("float32", "cpu", boundary.FLOAT32), ("bfloat16", "cpu", boundary.FEWER_BITS),
        ("float32", "gpu", boundary.FEWER_BITS), ("bfloat16", "tpu", boundary.FEWER_BITS),
    ],
)  # fmt: skip
def test_the_bound_follows_from_the_numbers_inside(dtype, platform, expected):
    """Logits are float32 either way: what a network computes in stands in its program."""
    network = models.preact_resnet(10, depths=(1,), width=4, dtype=dtype)
    shape = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), shape)
    model = lambda variables, images: network.apply(variables, images)[0]
    assert jax.eval_shape(model, variables, shape).dtype == jnp.float32
    assert boundary.rounding(model, variables, shape, platform=platform) == expected


def test_an_accelerator_that_multiplies_in_full_is_as_exact_as_a_cpu():
    model = lambda image: image @ image
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    with jax.default_matmul_precision("highest"):
        assert boundary.rounding(model, shape, platform="gpu") == boundary.FLOAT32


def test_inner_programs_are_looked_into():
    def model(image):
        def body(_, total):
            half = image.astype(jnp.bfloat16)
            return total + jnp.sum(half @ half).astype(jnp.float32)

        return jax.lax.fori_loop(0, 3, jax.jit(body), jnp.float32(0))

    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert boundary.rounding(model, shape, platform="cpu") == boundary.FEWER_BITS
