"""A defence in front of a network, and networks that vote, as networks."""

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

CLASSIFIER = models.preact_resnet(10, depths=(1,), width=4)
RAIN = rain(upscalers.edsr(blocks=1, width=4))
IMAGES = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))
KEYS = jax.random.split(jax.random.key(2), 3)
BATCH = Batch(IMAGES, jnp.array([1, 2, 3]), jnp.array([5, 6, 7]), jnp.ones(3, bool))


def made(network):
    return network.init(jax.random.key(0), IMAGES)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("trained", ["classifier", "defence", "both"])
def test_what_is_trained_is_under_params_and_nothing_is_lost(trained):
    variables = made(in_front(RAIN, CLASSIFIER, trained=trained))
    assert set(variables["params"]) == (
        {"classifier", "defence"} if trained == "both" else {trained}
    )
    whole = parts_of(variables)
    assert shapes(whole["classifier"]) == shapes(made(CLASSIFIER))
    assert shapes(whole["defence"]) == shapes(RAIN.init(jax.random.key(0), IMAGES[0]))
    back = with_parts(variables, whole)
    assert jax.tree.structure(back) == jax.tree.structure(variables)


@pytest.mark.parametrize("through", [None, "average_one_shift"])
def test_it_is_the_classifier_behind_the_defence(through):
    network = in_front(RAIN, CLASSIFIER, trained="both", through=through)
    assert network.random
    variables = made(network)
    whole = parts_of(variables)
    logits, state = network.apply(variables, IMAGES, keys=KEYS)
    alone = lambda key, image: CLASSIFIER.apply(whole["classifier"], image[None])[0][0]
    defended = defend(alone, RAIN, whole["defence"], through=through)
    np.testing.assert_allclose(logits, jax.vmap(defended)(KEYS, IMAGES), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, {"frozen": variables["frozen"]})


def test_a_frozen_classifier_stands_still_unless_it_drifts():
    def trained(drift):
        network = in_front(RAIN, CLASSIFIER, trained="defence", drift=drift)
        variables = made(network)
        objective = natural(network)
        state = {name: held for name, held in variables.items() if name != "params"}
        (_, (state, _)), gradient = jax.value_and_grad(objective, has_aux=True)(
            variables["params"], state, jax.random.key(4), BATCH
        )
        assert set(gradient) == {"defence"}
        assert float(jnp.max(jnp.abs(gradient["defence"]["head"]["kernel"]))) > 0
        before = variables["frozen"]["classifier"]
        after = state["frozen"]["classifier"]
        jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
        return jax.tree.leaves(before["batch_stats"]), jax.tree.leaves(after["batch_stats"])

    for before, after in zip(*trained(False), strict=True):
        np.testing.assert_array_equal(before, after)
    assert any(np.any(a != b) for a, b in zip(*trained(True), strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_shift_is_the_batchs_and_no_attacks(shared):
    """A network that shows its image: equal images differ where they were shifted apart."""
    shifting = rain(upscalers.bicubic(), down="bicubic", reach=0.5, shared_shift=shared)
    shown = Network(
        lambda key, images: {"params": {"w": jnp.zeros(())}},
        lambda variables, images, train=False, axis_name=None, keys=None: (
            images.reshape(len(images), -1), {}
        ),
        192,
    )  # fmt: skip
    network = in_front(shifting, shown)
    same = jnp.broadcast_to(IMAGES[:1], (6, 8, 8, 3))
    keys = jax.random.split(jax.random.key(5), 6)
    variables = network.init(jax.random.key(0), same)
    whole, _ = network.apply(variables, same, keys=keys)
    assert bool(jnp.all(whole == whole[:1])) == shared
    # One at a time, as attacks and the judge see them, each draws its own.
    one = jax.vmap(lambda image, key: network.apply(variables, image[None], keys=key[None])[0][0])
    alone = one(same, keys)
    assert not bool(jnp.all(alone == alone[:1]))
    np.testing.assert_array_equal(alone[0], whole[0])


def test_a_random_defence_needs_keys_and_a_trained_part_needs_parameters():
    network = in_front(RAIN, CLASSIFIER)
    with pytest.raises(UsageError, match="expected a key for each image"):
        network.apply(made(network), IMAGES)
    with pytest.raises(UsageError, match="trained='defence'"):
        made(in_front(gaussian_noise(), CLASSIFIER, trained="defence"))
    with pytest.raises(UsageError, match="did you mean 'defence'"):
        in_front(RAIN, CLASSIFIER, trained="defense")


def members():
    networks = [in_front(nn_jpeg(level=level), CLASSIFIER) for level in (15.0, 30.0, 60.0)]
    variables = [n.init(jax.random.key(k), IMAGES) for k, n in enumerate(networks)]
    return networks, variables


@pytest.mark.parametrize("how", ["vmap", "unroll"])
@pytest.mark.parametrize("combine", [mean_logits, vote_scores])
def test_an_ensemble_combines_its_members_each_with_its_own_tables(how, combine):
    networks, variables = members()
    whole = ensemble(networks, combine, how=how)
    together = stacked(variables)
    assert shapes(made(whole)) == shapes(together)
    each = jnp.stack(
        [n.apply(v, IMAGES, keys=KEYS)[0] for n, v in zip(networks, variables, strict=True)]
    )
    logits, _ = whole.apply(together, IMAGES, keys=KEYS)
    np.testing.assert_allclose(logits, jax.vmap(combine, in_axes=1)(each), atol=1e-4)
    assert float(jnp.max(jnp.abs(each[0] - each[2]))) > 1e-3


@pytest.mark.parametrize("how", ["vmap", "unroll"])
def test_members_train_as_if_alone(how):
    networks, variables = members()
    whole = side_by_side([natural(n) for n in networks], how=how)
    together = stacked(variables)
    state = {"frozen": together["frozen"]}
    key = jax.random.key(9)
    (loss, (after, metrics)), gradient = jax.value_and_grad(whole, has_aux=True)(
        together["params"], state, key, BATCH
    )
    total, right = 0.0, 0.0
    for m, (network, own) in enumerate(zip(networks, variables, strict=True)):
        (one, (moved, seen)), slope = jax.value_and_grad(natural(network), has_aux=True)(
            own["params"], {"frozen": own["frozen"]}, jax.random.fold_in(key, m), BATCH
        )
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
    variables = stacked([made(networks[0])] * 2)
    alone = [n.apply(made(n), IMAGES)[0] for n in networks]
    logits, _ = ensemble(networks, lambda each: each[1] - each[0]).apply(variables, IMAGES)
    np.testing.assert_allclose(logits, alone[1] - alone[0], atol=1e-5)
    assert float(jnp.max(jnp.abs(logits))) > 1e-3
    losses = [natural(n)({**made(n)["params"]}, rest(n), KEYS[0], BATCH)[0] for n in networks]
    state = {name: held for name, held in variables.items() if name != "params"}
    whole = side_by_side([natural(n) for n in networks])
    found, _ = whole(variables["params"], state, KEYS[0], BATCH)
    np.testing.assert_allclose(found, sum(losses), rtol=1e-5)
    assert abs(float(losses[0] - losses[1])) > 1e-3


def rest(network):
    return {name: held for name, held in made(network).items() if name != "params"}


@pytest.mark.parametrize(
    "optimiser",
    [
        optimisers.sgd(0.1, weight_decay=0.5, decay="kernels", clip=1.0),
        optimisers.adam(0.1, weight_decay=0.5),
    ],
)
def test_members_are_decayed_and_clipped_as_if_alone(optimiser):
    """A bias of each of two is an array of rank two."""
    each = [
        made(CLASSIFIER)["params"],
        jax.tree.map(lambda leaf: leaf + 1, made(CLASSIFIER)["params"]),
    ]
    slopes = [
        jax.tree.map(lambda leaf, s=s: s * jnp.ones_like(leaf), p)
        for s, p in zip((0.01, 9.0), each, strict=True)
    ]
    together, both = stacked(each), stacked(slopes)
    moved, _ = apart(optimiser).update(both, apart(optimiser).init(together), together)
    alone = [
        optimiser.update(s, optimiser.init(p), p)[0] for s, p in zip(slopes, each, strict=True)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved, stacked(alone))


def test_members_know_their_numbers():
    found = over_members("abc", lambda member, own, number: own * number, jnp.arange(3.0), "unroll")
    np.testing.assert_array_equal(found, [0.0, 1.0, 4.0])
    with pytest.raises(UsageError, match="did you mean 'unroll'"):
        over_members("a", lambda member, own, number: own, jnp.arange(1.0), "unrol")
    with pytest.raises(UsageError, match="one at least"):
        ensemble([], mean_logits)
