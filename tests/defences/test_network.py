"""A defence in front of a network, and networks that vote, as networks."""

from functools import cache

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import models, optimisers
from rain_jax.checks import UsageError
from rain_jax.defences import bit_depth, gaussian_noise, nn_jpeg, rain
from rain_jax.defences.compose import defend
from rain_jax.defences.network import ensemble, in_front, parts_of, with_parts
from rain_jax.defences.vote import mean_logits, vote_scores
from rain_jax.members import over_members, stacked
from rain_jax.methods import natural
from rain_jax.methods.members import apart, side_by_side
from rain_jax.models import upscalers
from rain_jax.types import Batch, Network

CLASSIFIER = drawn.instead(models.preact_resnet(10, depths=(1,), width=4))
EDSR = drawn.instead(upscalers.edsr(blocks=1, width=4))
RAIN = rain(EDSR)
# With weights to train, and no draws to compile.
STILL = rain(EDSR, down="bicubic", reach=0)
IMAGES = np.random.default_rng(1).uniform(size=(3, 8, 8, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(2), 3)
BATCH = Batch(IMAGES, np.array([1, 2, 3]), np.array([5, 6, 7]), np.ones(3, bool))


def made(network):
    return network.init(jax.random.key(0), IMAGES)


def shapes_of(network):
    return jax.eval_shape(network.init, jax.random.key(0), IMAGES)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


@pytest.mark.parametrize("trained", ["classifier", "defence", "both"])
def test_what_is_trained_is_under_params_and_nothing_is_lost(trained):
    variables = shapes_of(in_front(RAIN, CLASSIFIER, trained=trained))
    assert set(variables["params"]) == (
        {"classifier", "defence"} if trained == "both" else {trained}
    )
    whole = parts_of(variables)
    assert shapes(whole["classifier"]) == shapes(shapes_of(CLASSIFIER))
    front = jax.eval_shape(RAIN.init, jax.random.key(0), IMAGES[0])
    assert shapes(whole["defence"]) == shapes(front)
    back = with_parts(variables, whole)
    assert jax.tree.structure(back) == jax.tree.structure(variables)


@pytest.mark.parametrize("through", [None, "average_one_shift"])
def test_it_is_the_classifier_behind_the_defence(through):
    network = in_front(RAIN, CLASSIFIER, trained="both", through=through)
    assert network.random
    variables = made(network)
    logits, state = run(lambda v, x, k: network.apply(v, x, keys=k), variables, IMAGES, KEYS)

    @jax.jit
    def defended(whole, key, image):
        alone = lambda key, image: CLASSIFIER.apply(whole["classifier"], image[None])[0][0]
        return defend(alone, RAIN, whole["defence"], through=through)(key, image)

    whole = parts_of(variables)
    each = [defended(whole, key, image) for key, image in zip(KEYS, IMAGES, strict=True)]
    np.testing.assert_allclose(logits, each, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, {"frozen": variables["frozen"]})


def test_a_frozen_classifier_stands_still_unless_it_drifts():
    def trained(drift):
        network = in_front(STILL, CLASSIFIER, trained="defence", drift=drift)
        variables = made(network)
        state = {name: held for name, held in variables.items() if name != "params"}
        (_, (state, _)), gradient = run(
            jax.value_and_grad(natural(network), has_aux=True),
            variables["params"], state, jax.random.key(4), BATCH,
        )  # fmt: skip
        assert set(gradient) == {"defence"}
        assert np.max(np.abs(gradient["defence"]["head"]["kernel"])) > 0
        before = variables["frozen"]["classifier"]
        after = state["frozen"]["classifier"]
        jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
        return jax.tree.leaves(before["batch_stats"]), jax.tree.leaves(after["batch_stats"])

    for before, after in zip(*trained(False), strict=True):
        np.testing.assert_array_equal(before, after)
    assert any(np.any(a != b) for a, b in zip(*trained(True), strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_shift_is_the_batchs_and_no_attacks(shared):
    """A network that shows its image: equal images differ where they were shifted apart.

    Those that are shifted alike are the same but for rounding, which may hang on the place in the
    batch.
    """
    shifting = rain(upscalers.bicubic(), down="bicubic", reach=0.5, shared_shift=shared)
    shown = Network(
        lambda key, images: {"params": {"w": jnp.zeros(())}},
        lambda variables, images, train=False, axis_name=None, keys=None: (
            images.reshape(len(images), -1), {}
        ),
        192,
    )  # fmt: skip
    network = in_front(shifting, shown)

    def both(variables, same, keys):
        whole, _ = network.apply(variables, same, keys=keys)
        # One at a time, as attacks and the judge see them, each draws its own.
        one = lambda image, key: network.apply(variables, image[None], keys=key[None])[0][0]
        return whole, jax.vmap(one)(same, keys)

    same = np.broadcast_to(IMAGES[:1], (6, 8, 8, 3))
    keys = jax.random.split(jax.random.key(5), 6)
    whole, alone = run(both, made(network), same, keys)
    if shared:
        np.testing.assert_allclose(whole, np.broadcast_to(whole[0], whole.shape), 0, 1e-6)
    else:
        assert np.max(np.abs(whole - whole[:1])) > 1e-2
    assert np.max(np.abs(alone - alone[:1])) > 1e-2
    np.testing.assert_allclose(alone[0], whole[0], 0, 1e-6)


def test_a_random_defence_needs_keys_and_a_trained_part_needs_parameters():
    network = in_front(RAIN, CLASSIFIER)
    with pytest.raises(UsageError, match="expected a key for each image"):
        network.apply(shapes_of(network), IMAGES)
    with pytest.raises(UsageError, match="trained='defence'"):
        shapes_of(in_front(gaussian_noise(), CLASSIFIER, trained="defence"))
    with pytest.raises(UsageError, match="did you mean 'defence'"):
        in_front(RAIN, CLASSIFIER, trained="defense")


@cache
def members():
    """Three networks, by level; each with other weights, too."""
    classifiers = [drawn.instead(CLASSIFIER, seed) for seed in (1, 2, 3)]
    levels = (15.0, 30.0, 60.0)
    fronts = [nn_jpeg(level=level) for level in levels]
    networks = [in_front(front, c) for front, c in zip(fronts, classifiers, strict=True)]
    return networks, run(lambda: [made(network) for network in networks])


# Tables are variables, so that one program is every member's.
ALONE = in_front(nn_jpeg(), CLASSIFIER)


@cache
def logits_of_each():
    one = jax.jit(lambda variables, images, keys: ALONE.apply(variables, images, keys=keys)[0])
    return np.stack([one(own, IMAGES, KEYS) for own in members()[1]])


@cache
def trained_each():
    step = jax.jit(jax.value_and_grad(natural(ALONE), has_aux=True))
    key = jax.random.key(9)
    return jax.device_get(
        [
            step(own["params"], {"frozen": own["frozen"]}, jax.random.fold_in(key, m), BATCH)
            for m, own in enumerate(members()[1])
        ]
    )


@cache
def combined(how):
    """By one ensemble, whose program both ways of combining share."""
    networks, variables = members()
    whole = ensemble(networks, lambda each: (mean_logits(each), vote_scores(each)), how=how)
    apply = lambda variables, images, keys: whole.apply(variables, images, keys=keys)[0]
    logits = run(apply, stacked(variables), IMAGES, KEYS)
    return dict(zip((mean_logits, vote_scores), logits, strict=True))


@pytest.mark.parametrize("how", ["vmap", "unroll"])
@pytest.mark.parametrize("combine", [mean_logits, vote_scores])
def test_an_ensemble_combines_its_members_each_with_its_own_tables(how, combine):
    networks, variables = members()
    whole = ensemble(networks, combine, how=how)
    assert shapes(shapes_of(whole)) == shapes(jax.eval_shape(lambda: stacked(variables)))
    each = logits_of_each()
    expected = run(jax.vmap(combine, in_axes=1), each)
    np.testing.assert_allclose(combined(how)[combine], expected, atol=1e-4)
    assert np.max(np.abs(each[0] - each[2])) > 1e-3


@pytest.mark.parametrize("how", ["vmap", "unroll"])
def test_members_train_as_if_alone(how):
    networks, variables = members()
    whole = side_by_side([natural(n) for n in networks], how=how)
    together = stacked(variables)
    (loss, (after, metrics)), gradient = run(
        jax.value_and_grad(whole, has_aux=True),
        together["params"], {"frozen": together["frozen"]}, jax.random.key(9), BATCH,
    )  # fmt: skip
    total, right = 0.0, 0.0
    for m, ((one, (moved, seen)), slope) in enumerate(trained_each()):
        total, right = total + one, right + seen["correct"]
        picked = jax.tree.map(lambda leaf, m=m: leaf[m], (gradient, after))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
            picked, (slope, moved),
        )  # fmt: skip
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(metrics["correct"], right / 3, rtol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_members_keep_their_own_settings_wherever_they_run(backend, monkeypatch):
    """Settings that no variable holds: as one function of the variables all would be the first."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    networks = [in_front(bit_depth(bits=bits), CLASSIFIER) for bits in (1, 8)]
    own = made(networks[0])
    together = ensemble(networks, lambda each: each[1] - each[0])
    whole = side_by_side([natural(n) for n in networks])

    def everything(own, key, batch):
        variables = stacked([own, own])
        alone = [n.apply(own, batch.image)[0] for n in networks]
        logits, _ = together.apply(variables, batch.image)
        losses = [natural(n)(own["params"], rest(own), key, batch)[0] for n in networks]
        found, _ = whole(variables["params"], rest(variables), key, batch)
        return alone, logits, losses, found

    alone, logits, losses, found = run(everything, own, KEYS[0], BATCH)
    np.testing.assert_allclose(logits, alone[1] - alone[0], atol=1e-5)
    assert np.max(np.abs(logits)) > 1e-3
    np.testing.assert_allclose(found, sum(losses), rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def rest(variables):
    return {name: held for name, held in variables.items() if name != "params"}


@pytest.mark.parametrize(
    "optimiser",
    [
        optimisers.sgd(0.1, weight_decay=0.5, decay="kernels", clip=1.0),
        optimisers.adam(0.1, weight_decay=0.5),
    ],
)
def test_members_are_decayed_and_clipped_as_if_alone(optimiser):
    """A bias of each of two is an array of rank two."""
    params = made(CLASSIFIER)["params"]
    each = [params, jax.tree.map(lambda leaf: leaf + 1, params)]
    slopes = [
        jax.tree.map(lambda leaf, s=s: np.full_like(leaf, s), p)
        for s, p in zip((0.01, 9.0), each, strict=True)
    ]

    def both(each, slopes):
        together = stacked(each)
        moved, _ = apart(optimiser).update(
            stacked(slopes), apart(optimiser).init(together), together
        )
        alone = [
            optimiser.update(s, optimiser.init(p), p)[0] for s, p in zip(slopes, each, strict=True)
        ]
        return moved, stacked(alone)

    moved, alone = run(both, each, slopes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved, alone)


def test_members_know_their_numbers():
    found = over_members("abc", lambda member, own, number: own * number, jnp.arange(3.0), "unroll")
    np.testing.assert_array_equal(found, [0.0, 1.0, 4.0])
    with pytest.raises(UsageError, match="did you mean 'unroll'"):
        over_members("a", lambda member, own, number: own, jnp.arange(1.0), "unrol")
    with pytest.raises(UsageError, match="one at least"):
        ensemble([], mean_logits)
