"""The networks: laws that every maker keeps, the standard parameter counts, and refusals."""

import inspect
import math
import re
from functools import cache, partial
from typing import Any, get_args

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rain_jax import models
from rain_jax.checks import UsageError
from rain_jax.models.layers import Activation, batch_norm, max_pool_2x2
from rain_jax.models.network import network
from rain_jax.types import Network

# A small form of every maker and an image size for it; None: too large to run in a test, and the
# same code as another. Whoever adds a maker adds it here.
SMALL: dict[str, tuple[dict[str, Any], int] | None] = {
    "cnn": (dict(widths=(4, 8), hidden=16, batch_norm=True), 8),
    "madry_cnn": ({}, 8),
    "preact_resnet": (dict(depths=(1, 1), width=4), 8),
    "preact_resnet18": None,
    "resnet18": ({}, 4),
    "resnet50": None,
    "small_cnn": (dict(padding="SAME"), 8),
    "wide_resnet": (dict(depth=10, width=1), 8),
    "wrn_28_10": None,
    "wrn_34_10": None,
}
RUN = [name for name, small in SMALL.items() if small]
CLASSES = 5
Maker = Any


def make(name: str, **options: Any) -> Network:
    small = SMALL[name]
    assert small is not None
    return getattr(models, name)(CLASSES, **{**small[0], **options})


def images_for(name: str, batch: int = 4) -> np.ndarray:
    small = SMALL[name]
    assert small is not None
    shape = batch, small[1], small[1], 3
    return np.random.default_rng(7).uniform(size=shape).astype(np.float32)


@cache
def variables_of(name: str) -> Any:
    """Variables of the small form, with running averages that are not those of a fresh network."""
    # Of its own draws only `test_variables_are_plain_..` asks: generators take long to compile.
    variables = drawn.variables(make(name).init, jax.random.key(0), images_for(name))
    shake = lambda x: x + 0.1 + 0.1 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(shake, variables["batch_stats"])
    return variables


def forward(net: Network, **static: Any) -> Any:
    return jax.jit(partial(net.apply, **static))


@cache
def evaluated(name: str) -> Any:
    """The small form's own program, which several tests share."""
    return forward(make(name))


def parameters(net: Network, *shape: int) -> int:
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def assert_trees_close(left: Any, right: Any, tolerance: float) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# Laws of every maker


def test_every_maker_is_in_the_table() -> None:
    assert set(SMALL) == set(models.__all__)


@pytest.mark.parametrize("name", models.__all__)
def test_arguments_are_plain_annotated_values_with_defaults(name: str) -> None:
    first, *others = inspect.signature(getattr(models, name)).parameters.values()
    assert first.name == "classes"
    for argument in others:
        assert argument.kind is argument.KEYWORD_ONLY
        assert argument.default is not argument.empty
        assert argument.annotation is not argument.empty
        assert isinstance(argument.default, str | bool | int | float | tuple)
    assert {"mean", "std", "activation", "dtype"} <= {argument.name for argument in others}


@pytest.mark.parametrize("name", RUN)
def test_logits_are_float32_and_eval_leaves_images_and_state_alone(name: str) -> None:
    net, variables, images = make(name), variables_of(name), images_for(name)
    assert net.classes == CLASSES
    logits, state = evaluated(name)(variables, images)
    assert logits.shape == (4, CLASSES)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))
    assert np.std(logits) > 0
    assert set(state) == set(variables) - {"params"}
    assert_trees_close(state, {k: variables[k] for k in state}, 0.0)

    others = images.copy()
    others[1:] = 0.5
    np.testing.assert_allclose(evaluated(name)(variables, others)[0][0], logits[0], 0, 1e-5)


def hanging_on(place: int, program: Any) -> list[bool]:
    """Which results of a program, made by `jax.make_jaxpr`, its input at that place may reach."""

    def results(jaxpr: Any, touched: list[bool]) -> list[bool]:
        seen = {v for v, reached in zip(jaxpr.invars, touched, strict=True) if reached}
        reached = lambda v: not hasattr(v, "val") and v in seen  # literals hang on nothing
        for equation in jaxpr.eqns:
            of_inputs = [reached(v) for v in equation.invars]
            inner = equation.params.get("jaxpr")
            if inner is not None and len(inner.jaxpr.invars) == len(of_inputs):
                of_outputs = results(inner.jaxpr, of_inputs)
            else:
                of_outputs = [any(of_inputs)] * len(equation.outvars)
            seen |= {v for v, hit in zip(equation.outvars, of_outputs, strict=True) if hit}
        return [reached(v) for v in jaxpr.outvars]

    inputs = range(len(program.jaxpr.invars))
    return results(program.jaxpr, [number == place for number in inputs])


@pytest.mark.parametrize("name", RUN)
def test_variables_are_plain_dictionaries_and_follow_from_the_key(name: str) -> None:
    """Read off the program, for generators take half a minute to compile for a large network."""
    program, variables = jax.make_jaxpr(make(name).init, return_shape=True)(
        jax.random.key(0), images_for(name)
    )
    assert type(variables) is dict
    assert all(type(collection) is dict for collection in variables.values())
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    # Kernels hang on the key, and nothing on what the images show.
    assert hanging_on(0, program) == [len(leaf.shape) > 1 for leaf in leaves]
    assert not any(hanging_on(1, program))


@pytest.mark.parametrize(
    ("name", "thin"),
    [("cnn", dict(widths=(1, 2), hidden=2)), ("preact_resnet", dict(width=1))],
)
def test_the_same_key_the_same_variables_and_another_others(name: str, thin: Any) -> None:
    net, images = make(name, **thin), images_for(name)
    variables, again = (net.init(jax.random.key(0), x) for x in (images, 1 - images))
    assert_trees_close(variables, again, 0.0)
    other = net.init(jax.random.key(1), images)
    pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", RUN)
def test_training_moves_the_running_averages_and_nothing_else(name: str) -> None:
    net, variables, images = make(name), variables_of(name), images_for(name)
    logits, state = forward(net, train=True)(variables, images)
    assert logits.shape == (4, CLASSES)
    assert set(state) == set(variables) - {"params"}
    for collection in state:
        before, after = jax.tree.leaves(variables[collection]), jax.tree.leaves(state[collection])
        assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        assert {leaf.dtype for leaf in after} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", RUN)
def test_normalising_inside_is_normalising_outside(name: str) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    variables, images = variables_of(name), images_for(name)
    inside, _ = forward(make(name, mean=mean, std=std))(variables, images)
    outside, _ = evaluated(name)(variables, (images - np.float32(mean)) / np.float32(std))
    np.testing.assert_allclose(inside, outside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUN)
def test_bfloat16_computes_nearly_the_same_logits(name: str) -> None:
    variables, images = variables_of(name), images_for(name)
    exact = np.asarray(evaluated(name)(variables, images)[0])
    net = make(name, dtype="bfloat16")
    coarse, _ = forward(net)(variables, images)
    assert coarse.dtype == jnp.float32
    assert not np.array_equal(exact, coarse)
    np.testing.assert_allclose(coarse, exact, rtol=0, atol=0.05 * np.max(np.abs(exact)))
    _, state = jax.eval_shape(partial(net.apply, train=True), variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32")}


@pytest.mark.parametrize("name", [name for name in RUN if name != "resnet18"])  # slow by the op
def test_jit_changes_nothing(name: str) -> None:
    net, variables, images = make(name), variables_of(name), images_for(name)
    np.testing.assert_allclose(
        net.apply(variables, images)[0], evaluated(name)(variables, images)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", RUN)
def test_input_gradients_are_finite_and_not_zero(name: str) -> None:
    net, variables, images = make(name), variables_of(name), images_for(name)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(net.apply(variables, x)[0][:, 0])))(images)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.max(np.abs(gradient), axis=(1, 2, 3)) > 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about what XLA:CPU does")
@pytest.mark.parametrize("name", ["cnn", "madry_cnn", "preact_resnet", "small_cnn"])
def test_no_slow_convolution_is_left_in_loops_over_whole_networks(name: str) -> None:
    net, variables, images = make(name), variables_of(name), images_for(name)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        logits, _ = net.apply({**variables, "params": params}, images, train=True)
        return jnp.sum(logits**2)

    def climb(_: Any, carry: Any) -> Any:
        return jax.tree.map(jnp.add, carry, jax.grad(loss, (0, 1))(*carry))

    program = jax.jit(lambda *carry: jax.lax.fori_loop(0, 3, climb, carry))
    text = program.lower(variables["params"], images).compile().as_text()
    assert set(re.findall(r"dim_labels=(\w+)->", text)) == {"b01f_01io"}


# Batch statistics, however the batch is spread out

NORMALISED = ["cnn", "preact_resnet"]
LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 2])


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return -jax.nn.log_softmax(logits)[label]


@cache
def batched(name: str) -> tuple[Any, Any, Any]:
    """Logits, state and the gradient of the summed loss of a batch of eight in training."""
    net, variables, images = make(name), variables_of(name), images_for(name, 8)

    def loss(images: jax.Array) -> Any:
        logits, state = net.apply(variables, images, train=True)
        return jnp.sum(jax.vmap(cross_entropy)(logits, LABELS)), (logits, state)

    gradient, (logits, state) = jax.jit(jax.grad(loss, has_aux=True))(images)
    return logits, state, gradient


def one_by_one(name: str, axis_name: Any) -> Any:
    """The same of one image at a time, its batch being what lies along `axis_name`."""
    net, variables = make(name), variables_of(name)

    def loss(image: jax.Array, label: jax.Array) -> Any:
        logits, state = net.apply(variables, image[None], train=True, axis_name=axis_name)
        return cross_entropy(logits[0], label), (logits[0], state)

    def gradient(image: jax.Array, label: jax.Array) -> Any:
        gradient, (logits, state) = jax.grad(loss, has_aux=True)(image, label)
        return logits, state, gradient

    return gradient


@pytest.mark.parametrize("name", NORMALISED)
def test_a_vmap_axis_is_a_batch(name: str) -> None:
    images = images_for(name, 8)
    each = jax.vmap(one_by_one(name, "image"), axis_name="image", out_axes=(0, None, 0))
    assert_trees_close(jax.jit(each)(images, LABELS), batched(name), 2e-5)


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_a_device_axis_is_a_batch(name: str, mapping: str) -> None:
    net, variables, images = make(name), variables_of(name), images_for(name, 8)
    body = lambda images: net.apply(variables, images, train=True, axis_name="device")
    if mapping == "pmap":
        logits, state = jax.pmap(body, "device", out_axes=(0, None))(images[:, None])
        logits = logits[:, 0]
    else:
        mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
        specs = dict(in_specs=P("device"), out_specs=(P("device"), P()), check_vma=False)
        logits, state = jax.jit(jax.shard_map(body, mesh=mesh, **specs))(images)
    assert_trees_close((logits, state), batched(name)[:2], 2e-5)


def test_devices_and_vmap_together_are_a_batch() -> None:
    name = "preact_resnet"
    images = images_for(name, 8)
    mesh = jax.make_mesh((4,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    each = jax.vmap(one_by_one(name, ("device", "image")), axis_name="image", out_axes=(0, None, 0))
    split = P("device")
    program = jax.jit(
        jax.shard_map(
            each,
            mesh=mesh,
            in_specs=(split, split),
            out_specs=(split, P(), split),
            check_vma=False,
        )
    )
    assert_trees_close(program(images, LABELS), batched(name), 2e-5)


def test_the_running_averages_move_by_a_tenth() -> None:
    class OnlyNorm(nn.Module):
        axis_name: Any = None

        @nn.compact
        def __call__(self, images: jax.Array, train: bool) -> jax.Array:
            norm = batch_norm(train, self.axis_name, jnp.float32)
            return jnp.mean(norm()(images), (1, 2))

    net = network(OnlyNorm(), classes=3)
    images = np.random.default_rng(1).uniform(size=(4, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def moved(images: jax.Array) -> Any:
        return net.apply(net.init(jax.random.key(0), images), images, train=True)[1]

    (found,) = moved(images)["batch_stats"].values()
    np.testing.assert_allclose(found["mean"], 0.1 * np.mean(images, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * np.var(images, (0, 1, 2)), rtol=1e-5)


# Options


@pytest.mark.parametrize("remat", ["convolutions", "blocks"])
def test_remat_changes_neither_variables_nor_gradients(remat: str) -> None:
    name = "preact_resnet"
    variables, images = variables_of(name), images_for(name)

    def gradients(net: Network, variables: Any, images: jax.Array) -> Any:
        def loss(params: Any, images: jax.Array) -> Any:
            logits, state = net.apply({**variables, "params": params}, images, train=True)
            return jnp.sum(logits**2), state

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], images)

    plain, again = make(name), make(name, remat=remat)
    # Draws hang on names, whatever the width: of one channel, generators are soon compiled.
    thin = [make(name, width=1, **more).init for more in (dict(remat=remat), {})]
    assert_trees_close(*[init(jax.random.key(0), images) for init in thin], 0.0)
    inits = [jax.eval_shape(net.init, jax.random.key(0), images) for net in (again, plain)]
    assert jax.tree.structure(inits[0]) == jax.tree.structure(inits[1])
    assert jax.tree.map(np.shape, inits[0]) == jax.tree.map(np.shape, inits[1])
    assert "remat" in str(jax.make_jaxpr(partial(gradients, again))(variables, images))
    both = jax.jit(lambda *given: [gradients(net, *given) for net in (again, plain)])
    assert_trees_close(*both(variables, images), 2e-5)


def test_what_the_backward_pass_keeps_is_what_remat_says() -> None:
    """In what JAX hands from the forward to the backward pass; compilers may still do better."""

    def kept(remat: str) -> float:
        net = make("wide_resnet", depth=10, width=1, remat=remat)
        images = jnp.zeros((8, 32, 32, 3))
        variables = jax.eval_shape(net.init, jax.random.key(0), images)

        def backward(variables: Any) -> Any:
            def logits(params: Any) -> jax.Array:
                return net.apply({**variables, "params": params}, images, train=True)[0]

            return jax.vjp(logits, variables["params"])[1]

        arrays = [leaf for leaf in jax.tree.leaves(jax.eval_shape(backward, variables))
                  if leaf.shape[:1] == (8,)]  # fmt: skip
        return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) / (8 * 4)

    # Numbers for an image: the stem's image, what enters each block, and what its first convolution
    # puts out, for the second one's is only added. Outside of blocks are the last normalisation,
    # its activation, and their mean.
    wide, half, quarter = 16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8
    entering = 3 * 32 * 32 + wide + wide + half
    convolved = wide + half + quarter
    blocks = kept("blocks")
    assert entering <= blocks <= entering + 6 * quarter
    assert kept("convolutions") == blocks + convolved
    assert kept("none") > 2 * kept("convolutions")


@pytest.mark.parametrize("name", ["cnn", "preact_resnet"])
def test_every_activation_is_another_network(name: str) -> None:
    variables, images = variables_of(name), images_for(name)
    nets = [make(name, activation=activation) for activation in get_args(Activation)]
    each = jax.jit(lambda *given: [net.apply(*given)[0] for net in nets])
    logits = jax.device_get(each(variables, images))
    assert np.all(np.isfinite(logits))
    for i in range(len(logits)):
        for j in range(i):
            assert np.max(np.abs(logits[i] - logits[j])) > 1e-3


def test_parameter_counts_are_the_standard_ones() -> None:
    cifar, digit = (32, 32, 3), (28, 28, 1)
    assert parameters(models.wrn_28_10(10), *cifar) == 36_479_194
    assert parameters(models.wrn_34_10(10), *cifar) == 46_160_474
    assert parameters(models.resnet18(10), *cifar) == 11_173_962
    assert parameters(models.preact_resnet18(10), *cifar) == 11_172_170
    assert parameters(models.resnet18(1000, stem="imagenet"), 224, 224, 3) == 11_689_512
    assert parameters(models.resnet50(1000, stem="imagenet"), 224, 224, 3) == 25_557_032
    assert parameters(models.cnn(10), *digit) == 166_406
    assert parameters(models.small_cnn(10), *digit) == 312_202
    assert parameters(models.madry_cnn(10), *digit) == 3_274_634


@pytest.mark.parametrize("maker", [models.cnn, models.madry_cnn, models.preact_resnet])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 7), (28, 28), (32, 32)])
def test_image_sizes(maker: Maker, size: tuple[int, int]) -> None:
    assert parameters(maker(10), *size, 1) > 0


def test_smallest_images_of_small_cnn() -> None:
    assert parameters(models.small_cnn(10), 16, 16, 1) > 0
    assert parameters(models.small_cnn(10, padding="SAME"), 4, 4, 1) > 0


# Refusals


@pytest.mark.parametrize(
    "make_it, said",
    [
        (lambda: models.cnn(1), "classes=1: expected a whole number >= 2"),
        (lambda: models.cnn(10.0), "classes=10.0"),
        (lambda: models.cnn(10, std=0.0), "std=0.0"),
        (lambda: models.cnn(10, std=(0.2, -0.2, 0.2)), "std=(0.2, -0.2, 0.2)"),
        (lambda: models.cnn(10, mean=float("nan")), "mean=nan"),
        (lambda: models.cnn(10, mean=((0.1,),)), "mean=((0.1,),)"),
        (lambda: models.cnn(10, activation="rellu"), "did you mean 'relu'?"),
        (lambda: models.resnet18(10, dtype="float16"), "did you mean 'bfloat16'?"),
        (lambda: models.cnn(10, widths=()), "widths=()"),
        (lambda: models.cnn(10, widths=(16, 0)), "widths=(16, 0)"),
        (lambda: models.cnn(10, hidden=0), "hidden=0"),
        (lambda: models.small_cnn(10, padding="same"), "expected one of VALID, SAME"),
        (lambda: models.resnet50(10, stem="cifar10"), "did you mean 'cifar'?"),
        (lambda: models.preact_resnet(10, depths=2), "depths=2"),
        (lambda: models.preact_resnet(10, width=-4), "width=-4"),
        (lambda: models.wide_resnet(10, depth=30), "did you mean 28 or 34?"),
        (lambda: models.wide_resnet(10, depth=4), "did you mean 10 or 16?"),
        (lambda: models.wide_resnet(10, width=0), "width=0"),
        (lambda: parameters(models.cnn(10, mean=(0.1, 0.2)), 28, 28, 3), "mean has 2 values"),
        (lambda: parameters(models.cnn(10, std=(0.1, 0.2)), 28, 28, 1), "std has 2 values"),
        (lambda: parameters(models.small_cnn(10), 8, 8, 1), "at least 16x16 (or padding='SAME')"),
        (lambda: parameters(models.madry_cnn(10), 8, 3, 1), "images are 8x3"),
        (lambda: parameters(models.cnn(10, widths=(4, 4, 4)), 7, 7, 1), "at least 8x8"),
        (lambda: parameters(models.cnn(10), 28, 28), "expected [B, H, W, C]"),
    ],
)
def test_a_wrong_value_is_met_by_one_line(make_it: Any, said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        make_it()
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_images_that_do_not_fit_are_met_by_one_line() -> None:
    net, variables, images = make("cnn"), variables_of("cnn"), images_for("cnn")
    with pytest.raises(UsageError, match="another size or number of channels"):
        jax.eval_shape(net.apply, variables, images[..., :1])
    with pytest.raises(UsageError, match="uint8: expected floats"):
        jax.eval_shape(net.apply, variables, (255 * images).astype(np.uint8))


def test_a_module_that_cannot_synchronise_says_so() -> None:
    class Alone(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, train: bool) -> jax.Array:
            return jnp.mean(nn.BatchNorm(use_running_average=not train)(images), (1, 2))

    net = network(Alone(), classes=3)
    images = images_for("cnn")
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    jax.eval_shape(partial(net.apply, train=True), variables, images)
    with pytest.raises(UsageError, match="Alone has no field"):
        jax.eval_shape(partial(net.apply, train=True, axis_name="device"), variables, images)


@pytest.mark.parametrize("shape", [(3, 8, 8, 2), (2, 7, 5, 3), (1, 2, 3, 1)])
def test_the_maximum_is_that_of_flax_in_value_and_gradient(shape):
    """With many ties, where the first pixel of a window has the gradient."""
    draw = np.random.default_rng(0)
    maps = (np.round(2 * draw.normal(size=shape)) / 2).astype(np.float32)
    slope = draw.normal(size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3])).astype(np.float32)
    flax = lambda maps: nn.max_pool(maps, (2, 2), strides=(2, 2))

    @jax.jit
    def both(maps: jax.Array, slope: jax.Array) -> Any:
        pairs = [jax.vjp(pool, maps) for pool in (max_pool_2x2, flax)]
        return [(value, pull(slope)[0]) for value, pull in pairs]

    for found, expected in zip(*both(maps, slope), strict=True):
        np.testing.assert_array_equal(found, expected)
