"""Our models for PyTorch's attacks and PyTorch's models for ours: same logits, same gradients."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, evaluation, models, norms
from rain_jax.checks import UsageError
from rain_jax.parallel import place
from rain_jax.types import Batch, Network, Threat

torch = pytest.importorskip("torch", reason="PyTorch is not installed: see the extra `torch`")

from experiments import twins  # noqa: E402
from rain_jax.bridges import from_torch, to_torch  # noqa: E402

SECTION = dict(name="cnn", widths=(4, 6), hidden=10, mean=0.3, std=0.2)
CLASSES, SIZE = 5, 10
OURS = models.cnn(CLASSES, **{k: v for k, v in SECTION.items() if k != "name"})
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (5, SIZE, SIZE, 3)))
LABELS = np.array([0, 1, 2, 3, 4], np.int32)
VARIABLES = jax.jit(OURS.init)(jax.random.key(0), IMAGES)
KEYS = jax.random.split(jax.random.key(2), len(IMAGES))
LINF = Threat(norms.linf, 0.1)


def ours(key, image):
    return OURS.apply(VARIABLES, image[None])[0][0]


def theirs():
    return twins.twin(SECTION, VARIABLES)


def tensor(images):
    return torch.tensor(np.moveaxis(np.asarray(images), -1, 1))


def array(images):
    return np.moveaxis(images.detach().numpy(), 1, -1)


def noisy(key, image):
    """A random model: a linear one of the image under noise."""
    weights = jnp.linspace(-1, 1, image.size * CLASSES).reshape(image.size, CLASSES)
    return (image + jax.random.normal(key, image.shape)).ravel() @ weights


# Ours in PyTorch


@pytest.mark.parametrize("model", [(ours,), (OURS, VARIABLES)], ids=["function", "network"])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_module_of_ours_has_our_logits_and_gradients(model, count):
    module, twin = to_torch(*model), theirs()
    assert not module.training
    images = tensor(IMAGES[:count]).requires_grad_()
    along = torch.linspace(-1, 2, count * CLASSES).reshape(count, CLASSES)
    found = [m(images) for m in (module, twin)]
    assert found[0].shape == (count, CLASSES)
    slopes = [torch.autograd.grad(logits, images, along)[0] for logits in found]
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(module(images), found[0], atol=1e-6, rtol=0)


def test_a_graph_may_be_walked_twice_but_not_differentiated():
    module, images = to_torch(ours), tensor(IMAGES).requires_grad_()
    logits = module(images)
    rows = [torch.autograd.grad(logits[0, k], images, retain_graph=True)[0] for k in range(2)]
    assert not torch.equal(*rows)
    (slope,) = torch.autograd.grad(module(images).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_writing_to_the_images_afterwards_changes_nothing():
    """Memory is shared: what has been computed must be done with it."""
    module = to_torch(ours)
    images = tensor(IMAGES[:4])
    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf).square().sum(), leaf)[0]
    for _ in range(5):
        again = images.clone().requires_grad_()
        logits = module(again)
        with torch.no_grad():
            again.zero_()
        found = torch.autograd.grad(logits.square().sum(), again)[0]
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_many_batch_sizes_are_few_programs():
    traced = []

    def counted(key, image):
        traced.append(image.shape)
        return ours(key, image)

    module = to_torch(counted)
    for count in (5, 6, 7, 8, 3, 4, 2, 0):
        assert module(tensor(np.resize(IMAGES, (count, SIZE, SIZE, 3)))).shape == (count, CLASSES)
    assert len(traced) <= 4  # 8, 4, 2, 1


def test_random_models_draw_anew_in_every_call_or_never():
    images = tensor(np.repeat(IMAGES[:1], 3, axis=0))
    module = to_torch(noisy, seed=3)
    first, second = module(images), module(images)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])  # each image its own
    # The same from the beginning, and whatever stands beside.
    assert module.calls == 2
    module.calls = 0
    torch.testing.assert_close(module(images[:2]), first[:2], atol=1e-4, rtol=0)
    assert not torch.equal(to_torch(noisy, seed=4)(images), first)
    fixed = to_torch(noisy, seed=3, draws="fixed")
    assert torch.equal(fixed(images), fixed(images))


def test_the_way_back_keeps_to_the_draws_of_the_way_there():
    def gated(key, image):
        gate = jax.random.bernoulli(key, 0.5, image.shape).astype(image.dtype)
        return (image * gate).ravel()[: 2 * CLASSES].reshape(2, CLASSES).sum(0)

    images = tensor(np.ones_like(IMAGES)).requires_grad_()
    logits = to_torch(gated)(images)
    (slope,) = torch.autograd.grad(logits.sum(), images)
    # Of ones the logits count open gates, and so does the slope.
    torch.testing.assert_close(slope.sum((1, 2, 3)), logits.detach().sum(1))


def test_random_networks_are_given_keys():
    random = Network(
        OURS.init,
        lambda variables, images, train=False, axis_name=None, keys=None: (
            jax.vmap(noisy)(keys, images), {},
        ),
        CLASSES,
        random=True,
    )  # fmt: skip
    module = to_torch(random, {})
    assert not torch.equal(module(tensor(IMAGES)), module(tensor(IMAGES)))


def test_what_libraries_ask_of_a_module():
    module = to_torch(ours)
    assert next(module.parameters()).device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module(tensor(IMAGES).double()).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: to_torch(ours, seed=-1), "seed=-1"),
        (lambda: to_torch(ours, draws="often"), "expected one of fresh, fixed"),
        (lambda: to_torch(OURS), "variables: expected those of a network"),
        (lambda: to_torch(ours, VARIABLES), "variables: expected those of a network"),
        (lambda: to_torch(ours)(torch.zeros(3, 4, 4)), r"images are \[3, 4, 4\]"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("peer", "attack"), [("torchattacks", "pgd"), ("foolbox", "pgd"), ("art", "pgd"),
                         ("torchattacks", "apgd_ce")],
)  # fmt: skip
def test_other_libraries_attack_ours_as_they_do_its_twin(peer, attack):
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed: see the extra `peers`")
    from experiments import peers

    labels = np.argmax(jax.vmap(ours)(KEYS, IMAGES), axis=-1)
    settings = dict(norm="linf", radius=0.02, steps=5, batch_size=5, seed=1)
    found = peers.run(peer, attack, to_torch(OURS, VARIABLES), IMAGES, labels, **settings)
    expected = peers.run(peer, attack, theirs(), IMAGES, labels, **settings)
    # The sign of a gradient of nearly zero is all that may differ.
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.01
    assert np.abs(found - IMAGES).max() > 0.019


# Theirs in JAX


def counting(module):
    """The module, and the sizes of the batches that it is called with."""
    sizes = []
    module.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    return module, sizes


def test_a_function_of_theirs_has_their_logits_and_gradients():
    found = from_torch(theirs())
    np.testing.assert_allclose(found(KEYS[0], IMAGES[0]), ours(KEYS[0], IMAGES[0]), atol=1e-5)
    loss = lambda f, key, image: jnp.sum(jnp.sin(f(key, image)))
    values = [jax.vmap(f)(KEYS, IMAGES) for f in (found, ours)]
    np.testing.assert_allclose(*values, atol=1e-5)
    slopes = [
        jax.jit(jax.vmap(jax.grad(partial(loss, f), argnums=1)))(KEYS, IMAGES)
        for f in (found, ours)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-5)
    rows = [jax.jacrev(f, argnums=1)(KEYS[0], IMAGES[0]) for f in (found, ours)]
    np.testing.assert_allclose(*rows, atol=1e-5)


def test_every_batch_is_one_call_and_every_step_one_pass_forward():
    module, sizes = counting(theirs())
    found = from_torch(module)
    attack = attacks.pgd(LINF, steps=4, restarts=3)
    over = lambda f: jax.jit(jax.vmap(lambda key, x, y: attack(key, f, x, y)))
    seen = over(found)(KEYS, IMAGES, LABELS)
    # One image to know the number of classes; then restarts x batch, in every step and at the end.
    assert sizes == [1] + 5 * [3 * len(IMAGES)]
    # A gradient near zero may have either sign.
    assert np.mean(np.abs(seen - over(ours)(KEYS, IMAGES, LABELS)) > 1e-5) < 0.01


def test_a_backward_pass_does_not_take_another_ones_graph():
    """Two forward passes before the first way back: the second has taken the graph's place."""
    found = from_torch(theirs())
    _, first = jax.vjp(partial(found, KEYS[0]), IMAGES[0])
    _, second = jax.vjp(partial(found, KEYS[0]), IMAGES[1])
    along = jnp.arange(CLASSES, dtype=jnp.float32)
    for back, image in ((first, IMAGES[0]), (second, IMAGES[1]), (second, IMAGES[1])):
        expected = jax.vjp(partial(ours, KEYS[0]), image)[1](along)[0]
        np.testing.assert_allclose(back(along)[0], expected, atol=1e-5)


def test_devices_take_turns():
    devices = place("shard_map")
    images, labels = np.resize(IMAGES, (16, SIZE, SIZE, 3)), np.resize(LABELS, 16)
    batch = Batch(images, labels, np.arange(16), np.ones(16, bool))
    attack = attacks.pgd(LINF, steps=2)
    verdicts = []
    for f in (from_torch(theirs()), ours):
        of = lambda _, f=f: f
        drive = evaluation.packed(attack, of, devices, batch_size=16, early=False)
        judge = evaluation.judging(of, evaluation.Rules(LINF), devices, batch_size=16)
        found = evaluation.attack_and_judge(drive, judge, ({}, {}), jax.random.key(0), [batch])
        verdicts.append(evaluation.join([some.judgement for some in found]))
    np.testing.assert_allclose(verdicts[0].margin, verdicts[1].margin, atol=1e-3)


class Noise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = theirs()

    def forward(self, images):
        return self.classifier(images + torch.randn_like(images))


def test_random_modules_draw_by_their_keys():
    found = jax.jit(jax.vmap(from_torch(Noise(), random=True), (0, None)))
    state = torch.random.get_rng_state()
    draws = found(KEYS, IMAGES[0])
    assert len(np.unique(np.asarray(draws), axis=0)) == len(KEYS)
    np.testing.assert_array_equal(found(KEYS, IMAGES[0]), draws)
    assert not np.array_equal(found(KEYS[::-1], IMAGES[0]), draws)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws are touched


@pytest.mark.parametrize(
    "attack",
    [attacks.apgd(LINF, steps=5), attacks.square(LINF, queries=20)],
    ids=["apgd", "square"],
)
def test_our_attacks_do_to_their_modules_what_they_do_to_ours(attack):
    found, expected = (
        jax.jit(jax.vmap(lambda key, x, y, f=f: attack(key, f, x, y)))(KEYS, IMAGES, LABELS)
        for f in (from_torch(theirs()), ours)
    )
    assert np.abs(expected - IMAGES).max() > 0.05
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.01


def test_a_module_is_put_into_evaluation_mode():
    module = theirs().train()
    from_torch(module)
    assert not module.training


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_modules_of_other_precisions_get_images_of_theirs(kind):
    """Of three pixels, which no precision rounds."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2)).to(kind)
    logits_fn = from_torch(module)
    image = jnp.array([[[0.0, 0.5, 1.0]]])
    weight, bias = (p.detach().float().numpy() for p in module.parameters())
    logits = logits_fn(jax.random.key(0), image)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, weight @ [0.0, 0.5, 1.0] + bias, atol=0.02)
    slope = jax.grad(lambda x: logits_fn(jax.random.key(0), x)[1])(image)
    np.testing.assert_allclose(slope[0, 0], weight[1], rtol=1e-5)


def test_modules_without_logits_are_refused():
    found = from_torch(torch.nn.Identity())
    with pytest.raises(UsageError, match=r"the module gives \[1, 3, 10, 10\]: expected logits"):
        found(KEYS[0], IMAGES[0])
    pair = torch.nn.LSTM(SIZE, 2)  # gives two things
    with pytest.raises(UsageError, match=r"the module gives tuple: expected logits"):
        from_torch(torch.nn.Sequential(torch.nn.Flatten(0, 2), pair))(KEYS[0], IMAGES[0])
    with pytest.raises(UsageError, match=r"module=<function .*: expected a torch.nn.Module"):
        from_torch(ours)


ONE_CORE = """
import os
os.sched_setaffinity(0, {0})
os.environ["XLA_FLAGS"] = ""
import jax, jax.numpy as jnp, torch
from rain_jax.bridges import from_torch

module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
logits_fn = from_torch(module)
key = jax.random.key(0)

@jax.jit
def climb(images):
    slope = jax.vmap(jax.grad(lambda image: jnp.sum(logits_fn(key, image) ** 2)))
    return jax.lax.scan(lambda x, _: (x + slope(x), None), images, length=20)[0]

for _ in range(5):
    jax.block_until_ready([climb(jnp.ones((300, 32, 32, 3))) for _ in range(2)])
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose its cores here")
def test_one_core_is_enough():
    """Callbacks that hand arrays over through JAX wait here for the thread that runs them."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]
