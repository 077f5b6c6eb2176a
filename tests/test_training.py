"""From an objective to steps: devices, weights that average, schedules, optimisers, the loop."""

import re
from functools import cache, partial

import chex
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rain_jax import attacks, methods, models, optimisers, schedules, training
from rain_jax.checks import UsageError
from rain_jax.norms import linf
from rain_jax.parallel import choose_devices, place, with_statistics
from rain_jax.types import Batch, Threat

NETWORK = models.cnn(4, widths=(4, 8), hidden=16, batch_norm=True)
ATTACK = attacks.pgd(Threat(linf, 0.1), steps=3, keep="last")


def batches(count, size=16):
    for number in range(count):
        draw = np.random.default_rng(number)
        label = draw.integers(0, 4, size, np.int32)
        image = 0.5 * draw.uniform(size=(size, 8, 8, 1)) + 0.1 * label[:, None, None, None]
        index = number * size + np.arange(size, dtype=np.int32)
        yield Batch(image.astype(np.float32), label, index, np.ones(size, bool))


def method_of(average=None, sums="float32"):
    objective = methods.adversarial(NETWORK, ATTACK)
    optimiser = optimisers.sgd(0.05, nesterov=True)
    return training.minimise(objective, optimiser, average=average, sums=sums)


VARIABLES = cache(partial(drawn.of, NETWORK, (8, 8, 1)))


def fresh(method):
    return jax.jit(method.init)(VARIABLES())


@cache  # one program serves all that is seen of so many devices
def steps_over(mapping, count, sums):
    devices = place(mapping, choose_devices(count))
    method = method_of(training.Averaging(0.9), sums)
    program = devices.map(
        lambda state, batch, axis_name: method.step(jax.random.key(5), state, batch, axis_name),
        inputs=(False, True), outputs=(False, False), donate=(0,),
    )  # fmt: skip
    return devices, method, program


def losses_over(mapping, count, steps=20, sums="float32"):
    devices, method, program = steps_over(mapping, count, sums)
    state = devices.replicate(fresh(method))
    losses = []
    for batch in batches(steps):
        state, metrics = program(state, devices.split(batch))
        losses.append(float(metrics["loss"]) / float(metrics["images"]))
    return np.array(losses), jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return losses_over("shard_map", 1)


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_a_step_of_gradients_that_crossed_devices_in_bfloat16_goes_nearly_there(mapping):
    begin = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(fresh(method_of()).params)])

    def step(count, sums):
        _, state = losses_over(mapping, count, steps=1, sums=sums)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]) - begin

    exact, rounded = step(8, "float32"), step(8, "bfloat16")
    apart = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < apart < 2**-8
    np.testing.assert_array_equal(step(1, "bfloat16"), step(1, "float32"))


def test_what_is_sent_in_bfloat16_are_the_gradients_alone():
    """Read in the program as it is handed to the compiler: CPU's own sums bfloat16 in float32."""
    devices = place("shard_map", choose_devices(2))
    method = method_of(sums="bfloat16")
    program = devices.map(
        lambda state, batch, axis_name: method.step(jax.random.key(5), state, batch, axis_name),
        inputs=(False, True), outputs=(False, False),
    )  # fmt: skip
    state = fresh(method)
    text = program.lower(state, next(batches(1))).as_text()
    # An operation ends with its type, behind the sum of two scalars in its braces.
    sent = re.findall(r'"stablehlo.all_reduce".*?\}\) : \((.*?)\) ->', text, re.DOTALL)
    rounded = [kind for types in sent for kind in types.split(", ") if "bf16" in kind]
    shapes = ["x".join([*map(str, leaf.shape), "bf16"]) for leaf in jax.tree.leaves(state.params)]
    assert sorted(rounded) == sorted(f"tensor<{shape}>" for shape in shapes)
    metrics = [kind for types in sent for kind in types.split(", ") if kind == "tensor<f32>"]
    assert len(metrics) >= 3  # loss, images, correct


SHARED, KEY = 4, jax.random.key(5)  # devices, and what they draw by


@cache  # no mapping of devices is in it
def without_devices(mode):
    """What each share of a batch tells by statistics of its own, and the step by everybody's."""
    objective = methods.adversarial(NETWORK, ATTACK, batch_norm=mode)
    together = training.minimise(objective, optimisers.sgd(0.05))
    (batch,), state = batches(1), fresh(together)

    @jax.jit
    def apart(share):
        told = jax.value_and_grad(objective, has_aux=True)
        key_of_step = jax.random.fold_in(KEY, state.step)
        return told(state.params, state.model_state, key_of_step, share, None, state.step)

    shares = [jax.tree.map(lambda x, d=d: np.split(x, SHARED)[d], batch) for d in range(SHARED)]
    told = [jax.device_get(apart(share)) for share in shares]
    return told, jax.device_get(jax.jit(together.step)(KEY, state, batch)[0].params)


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_a_step_by_statistics_of_each_device_is_the_mean_of_steps_apart(mapping, mode):
    optimiser, count = optimisers.sgd(0.05), SHARED
    own = methods.adversarial(with_statistics("device", NETWORK), ATTACK, batch_norm=mode)
    method = training.minimise(own, optimiser)
    devices = place(mapping, choose_devices(count))
    program = devices.map(
        lambda state, batch, axis_name: method.step(KEY, state, batch, axis_name),
        inputs=(False, True), outputs=(False, False),
    )  # fmt: skip
    (batch,), state = batches(1), fresh(method)
    after, metrics = program(devices.replicate(state), devices.split(batch))

    told, together = without_devices(mode)
    gradient = jax.tree.map(lambda *each: sum(each) / 16, *(g for _, g in told))

    @jax.jit
    def updated(gradient):
        change, _ = optimiser.update(gradient, state.optimiser, state.params)
        return optax.apply_updates(state.params, change)

    chex.assert_trees_all_close(after.params, updated(gradient), atol=1e-6)
    averages = jax.tree.map(lambda *each: sum(each) / count, *(s for (_, (s, _)), _ in told))
    chex.assert_trees_all_close(after.model_state, averages, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(sum(float(loss) for (loss, _), _ in told))
    # And it is another step than that by everybody's statistics.
    moved = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - np.asarray(b)))), together, after.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_eight_devices_draw_the_loss_curve_of_one(mapping, one_device):
    losses, state = losses_over(mapping, 8)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
    chex.assert_trees_all_close(state.params, one_device[1].params, atol=1e-4)
    assert losses[-5:].mean() < losses[:5].mean()


def test_pmap_on_one_device_gives_the_same_curve(one_device):
    losses, _ = losses_over("pmap", 1)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-6)


def test_padding_does_not_change_a_step():
    batch = next(batches(1))
    network = models.cnn(4, widths=(4, 8), hidden=16)
    method = training.minimise(methods.natural(network), optimisers.sgd(0.05))
    state = jax.jit(method.init)(drawn.of(network, (8, 8, 1)))
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:8]]), batch)
    padded = padded._replace(valid=np.arange(24) < 16)
    step = jax.jit(method.step)
    a, metrics_a = step(jax.random.key(1), state, batch)
    b, metrics_b = step(jax.random.key(1), state, padded)
    assert metrics_b["images"] == 16
    np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], rtol=1e-5)
    chex.assert_trees_all_close(a.params, b.params, atol=1e-6)


def test_averaged_weights_by_hand():
    average = training.Averaging(0.9, start=2)
    weights, kept = [1.0, 2.0, 3.0, 4.0], 0.0
    mean = jnp.float32(0.0)
    for step, weight in enumerate(weights):
        mean = average.update(mean, jnp.float32(weight), jnp.int32(step))
        share = 0.0 if step < 2 else min(0.9, (1 + step - 2) / (10 + step - 2))
        kept = share * kept + (1 - share) * weight
        np.testing.assert_allclose(mean, kept, rtol=1e-6)


def test_evaluation_takes_the_average_and_the_trained_statistics():
    _, state = losses_over("shard_map", 1, steps=1)
    variables = training.variables_of(training.model_of(state))
    assert variables["params"] is state.average
    assert variables["batch_stats"] is state.model_state["batch_stats"]


def test_loop_fetches_one_step_late_and_all_at_stops():
    def step(state, feed):
        metrics = {"loss": jnp.float32([feed]), "gradient_norm": jnp.float32([1])}
        return state + 1, metrics

    seen = list(training.loop(step, 3, iter(range(100)), 3, 8, due=lambda done: done == 6))
    assert [passed.done for passed in seen] == [4, 5, 6, 7, 8]
    assert [passed.due for passed in seen] == [False, False, True, False, False]
    assert [[number for number, _ in passed.metrics] for passed in seen] == [
        [], [4], [5, 6], [], [7, 8],
    ]  # fmt: skip
    assert seen[-1].state == 8


def test_loop_takes_several_steps_in_a_dispatch_and_tells_each():
    def step(state, count):
        numbers = jnp.arange(state, state + count, dtype=jnp.float32)
        return state + count, {"loss": numbers, "gradient_norm": jnp.ones(count)}

    seen = list(training.loop(step, 2, iter([3, 1, 3, 2]), 2, 11))
    assert [passed.done for passed in seen] == [5, 6, 9, 11]
    told = [pair for passed in seen for pair in passed.metrics]
    assert [number for number, _ in told] == list(range(3, 12))
    assert all(values["loss"] == number - 1 for number, values in told)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_loop_stops_when_numbers_stop_being_numbers(name, together):
    def step(state, feed):
        first = feed * together
        bad = jnp.where(jnp.arange(first, first + together) == 2, jnp.nan, 1.0)
        return state, {"loss": jnp.ones(together), "gradient_norm": jnp.ones(together), name: bad}

    with pytest.raises(training.Diverged, match=f"{name} is nan at step 3") as error:
        list(training.loop(step, None, iter(range(10)), 0, 10))
    assert error.value.step == 3


def test_one_training_step_is_one_program_and_attacks_take_no_weight_gradients():
    """Counted in the traced program: weight gradients are made once, outside the attack's loop.

    A gradient with respect to a kernel has the kernel's shape. Inside the attack's scan no
    convolution or dot may produce one.
    """
    method = training.minimise(methods.adversarial(NETWORK, ATTACK), optimisers.sgd(0.05))
    state = fresh(method)
    batch = jax.tree.map(jnp.asarray, next(batches(1)))
    jaxpr = jax.make_jaxpr(method.step)(jax.random.key(0), state, batch)
    kernels = {leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1}

    def products(jaxpr, inside):
        for equation in jaxpr.eqns:
            scanned = inside or equation.primitive.name in ("scan", "while")
            if equation.primitive.name in ("conv_general_dilated", "dot_general"):
                yield inside, {v.aval.shape for v in equation.outvars}
            for value in equation.params.values():
                for part in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        yield from products(inner, scanned)

    def kernel_shaped(shapes):
        # dw comes transposed out of some rules: compare sizes as sets
        return any(sorted(shape) == sorted(kernel) for shape in shapes for kernel in kernels)

    found = list(products(jaxpr.jaxpr, False))
    assert any(inside for inside, _ in found), "the attack's loop was not found"
    assert not [s for inside, s in found if inside and kernel_shaped(s)]
    # Outside, each kernel has its one gradient.
    assert sum(kernel_shaped(s) for inside, s in found if not inside) >= len(kernels)


# --- schedules and optimisers ------------------------------------------------------------------


def test_schedules_by_hand():
    at = lambda schedule, *steps: [float(schedule(s)) for s in steps]
    cosine = schedules.cosine(100, 10, peak=0.1, warmup=1)
    np.testing.assert_allclose(at(cosine, 0, 5, 10, 55, 100), [0, 0.05, 0.1, 0.05, 0], atol=1e-7)
    steps = schedules.piecewise(100, 10, peak=1.0, at=(5, 7.5), factor=0.1)
    np.testing.assert_allclose(at(steps, 0, 49, 51, 74, 76), [1, 1, 0.1, 0.1, 0.01], rtol=1e-6)
    by_step = schedules.piecewise(100, 10, peak=1.0, at=(50,), unit="steps")
    np.testing.assert_allclose(at(by_step, 49, 51), [1, 0.1], rtol=1e-6)
    cycle = schedules.one_cycle(100, 10, peak=0.2, rise=0.4)
    np.testing.assert_allclose(at(cycle, 0, 20, 40, 70, 100), [0, 0.1, 0.2, 0.1, 0], atol=1e-7)
    flat = schedules.constant(100, 10, peak=0.3, warmup=2)
    np.testing.assert_allclose(at(flat, 0, 10, 20, 99), [0, 0.15, 0.3, 0.3], atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.cosine(10, 10, peak=0.0), "peak=0.0"),
        (lambda: schedules.cosine(10, 10, peak=0.1, warmup=1), "warmup=1"),
        (lambda: schedules.piecewise(10, 1, peak=0.1, at=(7, 5)), "rising milestones"),
        (lambda: schedules.one_cycle(10, 1, peak=0.1, rise=1.0), "rise=1.0"),
        (lambda: schedules.constant(10, 1, peak=0.1, unit="epoch"), "did you mean 'epochs'"),
        (lambda: optimisers.sgd(0.1, momentum=1.0), "momentum=1.0"),
        (lambda: optimisers.sgd(0.1, decay="kernel"), "did you mean 'kernels'"),
        (lambda: optimisers.sgd(0.1, clip=0.0), "clip=0.0"),
        (lambda: training.averaging(10, 1, decay=1.5), "decay=1.5"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov):
    """torch.optim.SGD's rule written out: decay into the gradient, buffer, then the step."""
    rate, momentum, decay = 0.1, 0.9, 0.01
    transform = optimisers.sgd(rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    params = {"w": jnp.array([1.0, -2.0])}
    state = transform.init(params)
    w, buffer = np.array([1.0, -2.0]), np.zeros(2)
    for step in range(5):
        gradient = np.array([0.3 * step, 1.0])
        change, state = transform.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, change)
        g = gradient + decay * w
        buffer = momentum * buffer + g
        w = w - rate * (g + momentum * buffer if nesterov else buffer)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_decay_of_kernels_spares_biases():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    transform = optimisers.sgd(1.0, momentum=0.0, weight_decay=0.1, decay="kernels")
    change, _ = transform.update(zero, transform.init(params), params)
    np.testing.assert_allclose(change["kernel"], -0.1 * jnp.ones((2, 2)), rtol=1e-6)
    np.testing.assert_array_equal(change["bias"], jnp.zeros(2))


def test_clipping_bounds_the_gradient_before_decay():
    transform = optimisers.sgd(1.0, momentum=0.0, clip=1.0)
    params = {"w": jnp.zeros(2)}
    change, _ = transform.update({"w": jnp.array([30.0, 40.0])}, transform.init(params), params)
    np.testing.assert_allclose(change["w"], [-0.6, -0.8], rtol=1e-5)
