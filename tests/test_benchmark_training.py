"""The benchmark's training steps: their work is counted, and PyTorch takes the same ones."""

import importlib.util
from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benching import recipe, show, training
from experiments.benching.clock import ready
from experiments.benching.counted import gflop_of
from experiments.configs import benchmark as configs
from rain_jax import models
from rain_jax.models.conv import conv_general_dilated
from rain_jax.models.detours import CANONICAL

NEEDS_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: see the extra `peers`",
)
METHODS = get_args(training.Which)
CNN = training.Workload("cnn", 2, 8, "float32")


# --- The work of a program --------------------------------------------------------------------


def test_loops_count_as_often_as_they_run_and_branches_once():
    a = jnp.ones((4, 4))

    def squared(x, _):
        return x @ a, None

    one = gflop_of(lambda x: x @ a, a)
    assert one == 2 * 4**3 / 1e9
    assert gflop_of(lambda x: jax.lax.scan(squared, x, length=5)[0], a) == 5 * one
    assert gflop_of(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ a @ a, lambda: x), a) == 2 * one
    assert gflop_of(lambda x: x + 0 * (x @ a).shape[0], a) is None  # nothing depends on it


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_each_gradient_of_a_convolution_counts_as_the_convolution(stride, padding):
    images, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 5))

    def convolved(images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (stride, stride), padding, dimension_numbers=layout
        )

    def loss(images, kernel):
        return jnp.sum(convolved(images, kernel) ** 2)

    forward = gflop_of(convolved, images, kernel)
    if padding == "VALID":  # every pixel of a kernel meets one of the image
        pixels = 7**2 if stride == 1 else 4**2
        assert forward == 2 * 2 * pixels * 9 * 3 * 5 / 1e9
    assert gflop_of(jax.grad(loss, (0, 1)), images, kernel) == pytest.approx(3 * forward)


def test_detours_of_convolutions_count_as_what_they_stand_for():
    images, kernel = jnp.ones((2, 12, 12, 1)), jnp.ones((4, 4, 1, 16))  # two pixels at once

    def forward(images, kernel):
        strides, pads = (2, 2), ((1, 1), (1, 1))
        return conv_general_dilated(images, kernel, strides, pads, dimension_numbers=CANONICAL)

    assert 2 * 2 * 6**2 * 4**2 * 16 / 1e9 > gflop_of(forward, images, kernel) > 0  # its edges
    jax.jit(forward)(images, kernel)
    assert gflop_of(forward, images, kernel) == 2 * 2 * (6 * 4 - 2) ** 2 * 16 / 1e9


def test_an_attack_step_counts_two_passes_and_its_last_image_none():
    # Large enough that no image is padded to the size of its kernel, see `models.conv`.
    workload = CNN._replace(size=16)
    batch, variables = workload.batch, workload.variables

    def forward(images):
        return workload.made.apply(variables, images)[0]

    @cache
    def work(name, steps):
        function, arguments, *_ = workload.program(name, steps)
        return gflop_of(function, *arguments)

    once = gflop_of(forward, batch.image)
    for steps in 1, 3:
        assert work("pgd", steps) - work("natural", 1) == pytest.approx(2 * steps * once)
    assert work("fast", 1) == pytest.approx(work("pgd", 1))
    assert work("sense", 2) == pytest.approx(work("pgd", 3))  # it looks where it ends


# --- Beside PyTorch ---------------------------------------------------------------------------


def losses_of_both(workload, method, count):
    """The losses of the first `count` steps, ours and PyTorch's, from the same starts."""
    from experiments.benching import peers

    batch = workload.batch
    ours, _ = ready(workload.program(method, 3))
    theirs = peers.training_step(
        method, training.twin(workload), np.asarray(batch.image), np.asarray(batch.label),
        training.starts(method, batch, count), steps=3, bfloat16=False, compiled=False,
    )  # fmt: skip
    return [
        np.array([float(side.read(side.wait(side.call()))[0]) for _ in range(count)])
        for side in (ours, theirs)
    ]


@NEEDS_TORCH
@pytest.mark.parametrize("method", METHODS)
def test_pytorch_takes_the_same_steps(method, monkeypatch):
    # A step that can be seen, so that the second loss tells of the first step; no draws but those
    # that both are given.
    monkeypatch.setattr(recipe, "LEARNING_RATE", 0.05)
    monkeypatch.setattr(recipe, "FRIENDLY_NOISE", 0.0)
    monkeypatch.setattr(recipe, "MIX", "none")
    ours, theirs = losses_of_both(CNN, method, 3)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert abs(ours[1] - ours[0]) > 1e-3


@NEEDS_TORCH
@pytest.mark.parametrize("method", ["pgd", "trades", "awp", "grad_align", "free"])
def test_batch_norm_learns_on_the_batch_and_is_attacked_by_its_averages(method):
    workload = training.Workload("preact_resnet", 2, 8, "float32")
    ours, theirs = losses_of_both(workload, method, 1)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


@NEEDS_TORCH
@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [("small_cnn", {}, 18), ("wide_resnet", dict(depth=10, width=1), 8)],
)
def test_twins_of_the_networks_that_are_measured(name, settings, size):
    import torch

    from experiments import twins

    network = getattr(models, name)(10, **settings)
    images = jax.random.uniform(jax.random.key(0), (2, size, size, 3))
    variables = network.init(jax.random.key(1), images)
    twin = twins.twin({"name": name, **settings}, jax.tree.map(np.asarray, variables))
    found = twin(torch.tensor(np.moveaxis(np.asarray(images), -1, 1))).numpy()
    expected, _ = network.apply(variables, images)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# --- Sizes and bars -----------------------------------------------------------------


def test_a_config_times_every_method():
    spec = configs.get_config("methods")
    assert set(*spec["steps"]["methods"]) == set(METHODS)
    assert len(training.steps(**spec["steps"])) == len(METHODS)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_sizes_of_the_config_are_accepted(size, tmp_path):
    spec = benchmark.config(**configs.get_config(size)).to_dict()
    heavy = ("edsr", "jpeg", "rain")  # their images are made at once
    for name in set(benchmark.SUITES) - set(heavy):
        assert benchmark.made(name, spec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bars_are_drawn_for_whoever_was_measured(tmp_path):
    told = dict(wall=[1.5, 0.9, 2.0], cpu=[1.0, 1.0, 1.0], first_call=3.0)
    line = dict(what="a step", ours_milliseconds=[2.0, 1.0, 3.0], peak_bytes=4_000_000)
    line["peers"] = {"PyTorch": told, "kornia": {"absent": "not installed: kornia"}}
    show.draw([line, dict(what="alone")], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    one, other = show.cells(line)
    assert one[:6] == [
        "a step",
        "PyTorch",
        "1.50 [0.90, 2.00]",
        "1.00 [1.00, 1.00]",
        "3.00",
        "drawn",
    ]
    assert other[:3] == ["a step", "kornia", "not installed: kornia"]
    assert all(len(row) == len(show.HEADERS) for row in (one, other))
