"""Models that people bring: every kind gives the logits that it gives by itself."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from rain_jax import evaluate, models
from rain_jax.adapters import as_model
from rain_jax.attacks import pgd
from rain_jax.checks import UsageError
from rain_jax.norms import linf
from rain_jax.types import Model, Threat

SHAPE = (8, 8, 3)
IMAGES = np.random.default_rng(0).random((2, *SHAPE)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(192, 3)).astype(np.float32)
KEY = jax.random.key(0)


class Linen(nn.Module):
    """As people write them: `train` has no default."""

    statistics: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        if self.statistics:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.convolution = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.statistics = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.statistics(self.convolution(x)))
        return self.dense(x.mean((1, 2)))


class InTraining(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(x).mean((1, 2)))


class Drawing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x).mean((1, 2)))


def flat(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def linen(module=None):
    module = Linen() if module is None else module
    flags = {"train": False} if isinstance(module, Linen) else {}
    return module, module.init({"params": KEY, "dropout": KEY}, IMAGES, **flags)


def nnx_model():
    model = NNX(nnx.Rngs(0))
    model.eval()
    return model


def logits_of(model: Model):
    """Image by image, in one program as attacks have it."""
    return jax.jit(jax.vmap(lambda x: model.logits(model.variables, KEY, x)))(IMAGES)


def test_linen_modules_are_asked_in_evaluation_mode():
    for statistics in (False, True):
        module, variables = linen(Linen(statistics))
        model = as_model((module, variables), SHAPE)
        expected = module.apply(variables, IMAGES, train=False)
        np.testing.assert_allclose(logits_of(model), expected, atol=1e-5)
        assert model.name == "Linen"
        assert not model.random
        # Equal modules share their programs.
        assert as_model((Linen(statistics), variables), SHAPE).logits is model.logits


def test_nnx_modules():
    module = nnx_model()
    model = as_model(module, SHAPE)
    before = logits_of(model)
    np.testing.assert_allclose(before, module(IMAGES), atol=1e-5)
    assert as_model(module, SHAPE).logits is model.logits
    # Other weights, the same program.
    module.dense.bias[...] += 1.0
    moved = as_model(module, SHAPE)
    assert moved.logits is model.logits
    np.testing.assert_allclose(logits_of(moved), before + 1.0, atol=1e-5)
    np.testing.assert_array_equal(logits_of(model), before)


def test_a_module_that_holds_keys_is_evaluated():
    """Its dropout's, which are among the weights and are not used."""
    module, threat = nnx_model(), Threat(linf, 0.3)
    labels = np.argmax(module(IMAGES), axis=1)
    result = evaluate(
        module, IMAGES, labels, threat, pgd(threat, steps=5), checks=False, progress=False
    )
    assert result.clean_accuracy == 1
    assert result.name == "NNX"
    assert result.warnings == ()


def test_networks_of_this_project():
    network = models.cnn(3, widths=(4,), hidden=8)
    variables = network.init(KEY, IMAGES)
    model = as_model((network, variables), SHAPE)
    np.testing.assert_allclose(logits_of(model), network.apply(variables, IMAGES)[0], atol=1e-5)


def test_a_function_of_an_image_around_a_network_of_this_project():
    """It refuses batches of batches by errors of this project's, which are no verdict on it."""
    network = models.cnn(3, widths=(4,), hidden=4)
    variables = network.init(KEY, IMAGES)
    shifted = lambda key, x: jnp.roll(x, jax.random.randint(key, (), 0, 2), 0)
    alone = lambda key, x: network.apply(variables, shifted(key, x)[None])[0][0]
    model = as_model(alone, SHAPE)
    assert model.random
    for key in jax.random.split(KEY, 3):
        expected = alone(key, IMAGES[0])
        np.testing.assert_allclose(
            model.logits(model.variables, key, IMAGES[0]), expected, rtol=1e-5
        )
    with pytest.raises(UsageError, match=r"expected \[B, H, W, C\]"):
        as_model(lambda x: network.apply(variables, x[None, None])[0], SHAPE)


def test_functions_of_a_batch_and_of_an_image():
    image = lambda x: x.reshape(-1) @ WEIGHTS
    shapes = []

    def batch(images):
        shapes.append(images.shape)
        return flat(images)

    for function in batch, image, lambda key, x: flat(x):
        np.testing.assert_allclose(logits_of(as_model(function, SHAPE)), flat(IMAGES), rtol=1e-5)
    assert set(shapes) == {(1, *SHAPE), (3, *SHAPE)}  # never a single image
    assert as_model(image, SHAPE).logits is as_model(image, SHAPE).logits


def test_a_pooling_function_is_not_taken_for_one_of_batches():
    """Over a batch its first two axes are others, and what comes out looks like logits, too."""
    pooled = lambda x: x.mean((0, 1)) @ WEIGHTS[:3]
    expected = IMAGES.mean((1, 2)) @ WEIGHTS[:3]
    np.testing.assert_allclose(logits_of(as_model(pooled, SHAPE)), expected, rtol=1e-5)


def test_a_key_makes_a_random_model():
    def noisy(key, x):
        return flat(x) + jax.random.normal(key, (len(x), 3))

    assert as_model(noisy, SHAPE).random
    assert not as_model(noisy, SHAPE, random=False).random
    assert not as_model(flat, SHAPE).random
    model = as_model(noisy, SHAPE)
    one, other = (model.logits(model.variables, jax.random.key(n), IMAGES[0]) for n in (0, 1))
    assert np.any(np.asarray(one) != other)


def test_a_function_is_what_it_closes_over_now():
    """And as long as that has the same shape, it needs no other program."""
    weights = WEIGHTS
    function = lambda x: x.reshape(len(x), -1) @ weights
    first = as_model(function, SHAPE)
    np.testing.assert_allclose(logits_of(first), flat(IMAGES), rtol=1e-5)
    weights = 2 * WEIGHTS
    again = as_model(function, SHAPE)
    assert again.logits is first.logits
    np.testing.assert_allclose(logits_of(again), 2 * flat(IMAGES), rtol=1e-5)


def test_weights_on_a_mesh_are_refused_with_the_remedy():
    """JAX cannot map over devices what was traced with them."""
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put(WEIGHTS, spec)
    with pytest.raises(UsageError, match=r"jax.device_put\(arrays, jax.devices\(\)\[0\]\)"):
        as_model(lambda x: x.ravel() @ placed, SHAPE)
    moved = jax.device_put(placed, jax.devices()[0])
    np.testing.assert_allclose(
        logits_of(as_model(lambda x: x.ravel() @ moved, SHAPE)), flat(IMAGES), rtol=1e-5
    )


def test_a_function_need_not_be_hashable():
    @dataclasses.dataclass
    class Layer:
        weights: np.ndarray

        def __call__(self, x):
            return x.reshape(len(x), -1) @ self.weights

    np.testing.assert_allclose(logits_of(as_model(Layer(WEIGHTS), SHAPE)), flat(IMAGES), rtol=1e-5)


def test_modules_that_draw_draw_from_the_key():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs
            self.widths = [3]  # which cannot be hashed

        def __call__(self, x):
            noise = jax.random.normal(self.rngs.noise(), (len(x), self.widths[0]))
            return x.reshape(len(x), -1) @ WEIGHTS + noise

    class NoisyLinen(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"), (len(x), 3))
            return nn.Dense(3)(x.reshape(len(x), -1)) + noise

    module = Noisy(nnx.Rngs(noise=0))
    with pytest.raises(UsageError, match=r"Noisy draws at random from its own Rngs: .*random=True"):
        as_model(module, SHAPE)
    linen_module = NoisyLinen()
    pair = linen_module, linen_module.init({"params": KEY, "noise": KEY}, IMAGES)
    for given in module, pair:
        model = as_model(given, SHAPE, random=True)
        assert model.random
        draws = [model.logits(model.variables, jax.random.key(n), IMAGES[0]) for n in (0, 0, 1)]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert np.any(np.asarray(draws[0]) != draws[2])
    network = models.cnn(3, widths=(4,), hidden=8)
    with pytest.raises(UsageError, match="random=True: expected False, as its Network says"):
        as_model((network, network.init(KEY, IMAGES)), SHAPE, random=True)


def test_logits_may_be_an_attribute():
    class Output(NamedTuple):
        logits: jax.Array

    model = as_model(lambda x: Output(flat(x)), SHAPE)
    np.testing.assert_allclose(logits_of(model), flat(IMAGES), rtol=1e-5)


def test_pytorch_modules():
    torch = pytest.importorskip("torch")

    class Classifier(torch.nn.Module):
        """Its output is that of Hugging Face: an object with `logits`."""

        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 4, 3)
            self.dense = torch.nn.Linear(4, 3)

        def forward(self, pixel_values):
            found = self.dense(self.convolution(pixel_values).relu().mean((2, 3)))
            return type("Output", (), {"logits": found})()

    module = Classifier()
    model = as_model(module, SHAPE)
    with torch.no_grad():
        expected = module(torch.tensor(np.moveaxis(IMAGES, -1, 1))).logits.numpy()
    np.testing.assert_allclose(logits_of(model), expected, atol=1e-5)
    module.train()
    assert as_model(module, SHAPE).logits is model.logits
    assert not module.training


def test_equinox_modules():
    equinox = pytest.importorskip("equinox")

    class Convolved(equinox.Module):
        convolution: equinox.nn.Conv2d
        dropout: equinox.nn.Dropout
        dense: equinox.nn.Linear

        def __init__(self, key):
            one, other = jax.random.split(key)
            self.convolution = equinox.nn.Conv2d(3, 4, 3, key=one)
            self.dropout = equinox.nn.Dropout(0.5)
            self.dense = equinox.nn.Linear(4, 3, key=other)

        def __call__(self, x):
            return self.dense(self.dropout(jax.nn.relu(self.convolution(x))).mean((1, 2)))

    module = Convolved(KEY)
    with pytest.raises(UsageError, match=r"training mode \(Dropout.inference is False\)"):
        as_model(module, SHAPE)
    module = equinox.nn.inference_mode(module)
    model = as_model(module, SHAPE)
    expected = jax.vmap(module)(jnp.moveaxis(IMAGES, -1, 1))
    np.testing.assert_allclose(logits_of(model), expected, atol=1e-5)
    assert as_model(module, SHAPE).logits is model.logits


REFUSED = [
    (lambda: linen(InTraining()), r"InTraining is not in evaluation mode: it updates its batch "
     r"statistics.*use_running_average=True"),
    (lambda: linen(Drawing()), r"Drawing is not in .*: it draws at random.*deterministic=True"),
    (lambda: NNX(nnx.Rngs(0)), r"NNX is in training mode \(.*\): expected model.eval\(\)"),
    (Linen, r"model=Linen: expected its variables beside it"),
    (lambda: (Linen(), {"kernel": 1}), r"variables of Linen are dict: expected \{\"params\""),
    (lambda: (flat, {}), r"model=\(function, dict\): expected a Flax linen module"),
    (lambda: 3, r"model=3: expected a function of images, a module"),
    (lambda: lambda v, k, x: x, r"the model takes v, k, x: expected a function of images, or of"),
    (lambda: lambda x: flat(x)[:, :1], r"gives one number for an image: .* two, jnp.concatenate"),
    (lambda: lambda x: jnp.argmax(flat(x), -1), r"the model gives \[1\] for a batch of one image"),
    (lambda: lambda x: flat(x).astype(jnp.int32), r"gives int32: expected logits, which are"),
    (lambda: lambda x: (flat(x), x), r"the model gives tuple for a batch of one image"),
    (lambda: lambda x: x, r"the model gives \[1, 8, 8, 3\] for a batch of one image \[8, 8, 3\]"),
    (lambda: lambda x: x.reshape(len(x), -1) @ WEIGHTS[:9], r"cannot be asked about images \[8, 8"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_others_are_refused_in_a_line(make, message):
    with pytest.raises(UsageError, match=message) as error:
        as_model(make(), SHAPE)
    assert "\n" not in str(error.value)
