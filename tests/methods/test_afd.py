"""AFD and its networks: the condition, what is mixed with what, and what the loss is made of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import schema
from experiments.cli import load_config
from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.defences import jpeg, vote
from rain_jax.defences.network import ensemble, in_front
from rain_jax.losses import soft_cross_entropy
from rain_jax.methods.afd import against
from rain_jax.models.conditional import FiLM, with_condition
from rain_jax.norms import linf
from rain_jax.types import Batch, Threat

RADIUS = 0.1
PGD = attacks.pgd(Threat(linf, RADIUS), steps=3, start="sign", keep="last")
IMAGES = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1))
BATCH = Batch(IMAGES, jnp.arange(16) % 3, 100 + jnp.arange(16, dtype=jnp.int32), jnp.ones(16, bool))
SHAPES = {
    "cnn": dict(widths=(4, 4), hidden=8, batch_norm=True),
    "preact_resnet": dict(depths=(1,), width=2),
}
CONFIG = "experiments/configs/afd/ablation.py"


def make(name="cnn", **options):
    return getattr(models, name)(3, **SHAPES[name], **options)


def shaken(variables, parts=("params", "batch_stats")):
    """Variables away from where they begin, so that no layer is without effect."""
    keys = iter(jax.random.split(jax.random.key(9), 200))
    shake = lambda leaf: leaf + 0.2 * jnp.abs(jax.random.normal(next(keys), leaf.shape))
    return {k: jax.tree.map(shake, v) if k in parts else v for k, v in variables.items()}


def plain_of(tree):
    """What the network without modulation has of a tree of variables."""
    if not isinstance(tree, dict):
        return tree
    own = {k: v for k, v in tree.items() if not k.endswith(("_film", "_noise"))}
    return {k: plain_of(v) for k, v in own.items() if k not in ("condition", "noise")}


FILM = make(modulation="film")
VARIABLES = shaken(FILM.init(jax.random.key(0), IMAGES))
PARAMS = VARIABLES["params"]
STATE = {k: v for k, v in VARIABLES.items() if k != "params"}


# --- The condition ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_fresh_film_is_the_plain_network_for_every_condition(name):
    network, plain = make(name, modulation="film"), make(name)
    variables = network.init(jax.random.key(0), IMAGES)
    own = plain_of(variables)
    assert jax.tree.structure(own) == jax.tree.structure(plain.init(jax.random.key(0), IMAGES))
    expected = jax.jit(plain.apply)(own, IMAGES)[0]
    logits = jax.jit(lambda s: network.apply(with_condition(variables, s), IMAGES)[0])
    for s in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(logits(s), expected, rtol=1e-6, atol=1e-6)


def test_film_scales_and_shifts_each_channel():
    maps, s = jax.random.normal(jax.random.key(3), (2, 3, 3, 4)), jnp.float32(0.4)
    module = FiLM()
    variables = shaken(module.init(jax.random.key(0), maps, s))
    hidden, last = (variables["params"][name] for name in ("hidden", "last"))
    inner = s * hidden["kernel"][0] + hidden["bias"]
    both = jnp.where(inner > 0, inner, 0.01 * inner) @ last["kernel"] + last["bias"]
    expected = np.asarray(maps) * np.asarray(1 + both[:4]) + np.asarray(both[4:])
    np.testing.assert_allclose(module.apply(variables, maps, s), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_float_adds_its_share_of_noise_to_every_kernel(name):
    """The same as the plain network with those kernels: none at 0, all of the noise at 1."""
    network, plain = make(name, modulation="float"), make(name)
    variables = network.init(jax.random.key(0), IMAGES)

    def moved(params, noise, s):
        own = {}
        for key, value in params.items():
            if f"{key}_noise" in params:
                share = params[f"{key}_noise"]["share"]
                assert share == 0.25
                draw = noise[f"{key}_noise"]["draw"]
                kernel = value["kernel"] + s * share * jnp.std(value["kernel"]) * draw
                own[key] = {**value, "kernel": kernel}
            elif isinstance(value, dict) and not key.endswith("_noise"):
                own[key] = moved(value, noise.get(key, {}), s)
            elif not key.endswith("_noise"):
                own[key] = value
        return own

    seen = []
    told = jax.jit(lambda s: network.apply(with_condition(variables, s), IMAGES)[0])
    apply = jax.jit(plain.apply)
    for s in (0.0, 0.5, 1.0):
        logits = told(s)
        params = moved(variables["params"], variables["noise"], s)
        expected = apply({**plain_of(variables), "params": params}, IMAGES)[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        seen.append(logits)
    assert float(jnp.max(jnp.abs(seen[2] - seen[0]))) > 0.01


@pytest.mark.parametrize("modulation", ["film", "float"])
def test_remat_changes_nothing(modulation):
    """The condition reaches what is computed again in the backward pass."""
    results = []
    for remat in ("none", "convolutions", "blocks"):
        network = make("preact_resnet", modulation=modulation, remat=remat)
        variables = with_condition(shaken(network.init(jax.random.key(0), IMAGES)), 0.3)

        def loss(params, network=network, variables=variables):
            given = {**variables, "params": params}
            return jnp.sum(network.apply(given, IMAGES, True)[0][:, 0])

        results.append(jax.jit(jax.value_and_grad(loss))(variables["params"]))
    for again in results[1:]:
        for a, b in zip(*map(jax.tree.leaves, (results[0], again)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_the_condition_is_one_constant_in_the_state_and_is_found_behind_a_defence():
    assert STATE["condition"] == {"s": 1.0}
    _, state = FILM.apply(with_condition(VARIABLES, 0.25), IMAGES, True)
    assert float(state["condition"]["s"]) == 0.25  # training does not move it
    logits = [FILM.apply(with_condition(VARIABLES, s), IMAGES)[0] for s in (0.2, 0.2, 0.9)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert float(jnp.max(jnp.abs(logits[0] - logits[2]))) > 1e-3
    defended = in_front(jpeg(), FILM)
    variables = defended.init(jax.random.key(0), IMAGES)
    told = with_condition(variables, 0.25)
    assert float(told["frozen"]["classifier"]["condition"]["s"]) == 0.25
    fronts = [in_front(jpeg(quality=quality), FILM) for quality in (20, 80)]
    several = ensemble(fronts, vote.vote_scores)
    variables = several.init(jax.random.key(0), IMAGES)
    told = with_condition(variables, 0.25)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), told, variables)
    np.testing.assert_array_equal(told["frozen"]["classifier"]["condition"]["s"], [0.25, 0.25])
    assert several.apply(told, IMAGES)[0].shape == (len(IMAGES), FILM.classes)
    plain = make().init(jax.random.key(0), IMAGES)
    jax.tree.map(np.testing.assert_array_equal, with_condition(plain, 0.25), plain)


# --- The loss ---------------------------------------------------------------------------------


def parts_of(objective, key):
    return jax.jit(lambda key: objective.find(PARAMS, STATE, key, BATCH, None, 0)[0])(key)


@jax.jit
def logits_at(images, s):
    given = with_condition(STATE, s)
    return FILM.apply({"params": PARAMS, **given}, images, True)[0]


@pytest.mark.parametrize(
    ("options", "clean", "attacked", "weight"),
    [
        (dict(cond="source"), 0.0, 1.0, 0.5),
        (dict(conditions=(0.3,)), 0.3, 0.3, 0.3),
        (dict(conditions=(1.0,)), 1.0, 1.0, 1.0),
    ],
)
def test_each_part_of_the_loss_has_its_condition_and_its_weight(
    options, clean, attacked, weight, key
):
    objective = methods.afd(FILM, PGD, mix_stage="none", **options)
    loss, (state, metrics) = jax.jit(objective)(PARAMS, STATE, key, BATCH)

    def attack_at(key, image, label):
        given = {"params": PARAMS, **with_condition(STATE, attacked)}
        return PGD(key, lambda k, x: FILM.apply(given, x[None])[0][0], image, label)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, BATCH.index)
    found = jax.jit(jax.vmap(attack_at))(keys, IMAGES, BATCH.label)
    np.testing.assert_allclose(parts_of(objective, key).images, found, atol=1e-6)
    natural, robust = (
        -jax.nn.log_softmax(logits_at(images, s))[jnp.arange(16), BATCH.label]
        for images, s in ((IMAGES, clean), (found, attacked))
    )
    expected = jnp.sum((1 - weight) * natural + weight * robust)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], 16 * weight, rtol=1e-6)
    assert float(state["condition"]["s"]) == 1.0


def test_conditions_are_drawn_one_for_a_batch_and_the_state_has_the_deployed_one(key):
    wanted = (0.0, 0.25, 1.0)
    objective = methods.afd(FILM, PGD, mix_stage="none", conditions=wanted, deployed=0.5)
    keys = jax.random.split(key, 60)
    drawn = jax.jit(jax.vmap(lambda k: objective.find(PARAMS, STATE, k, BATCH, None, 0)[0].weight))
    found = drawn(keys)
    assert set(np.asarray(found).tolist()) == set(wanted)
    _, (state, _) = jax.jit(objective)(PARAMS, STATE, key, BATCH)
    assert float(state["condition"]["s"]) == 0.5


def test_films_first_layer_learns_after_one_step(key):
    """At first it cannot: what comes after it is zero."""
    objective = methods.afd(FILM, PGD, mix_stage="none", conditions=(0.4,))
    fresh = FILM.init(jax.random.key(0), IMAGES)
    params, state = fresh["params"], {k: v for k, v in fresh.items() if k != "params"}
    slope = jax.jit(jax.grad(objective, has_aux=True))
    sizes = []
    for _ in range(2):
        gradient, _ = slope(params, state, key, BATCH)
        sizes.append(float(jnp.max(jnp.abs(gradient["norm1_film"]["hidden"]["kernel"]))))
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
    assert sizes[0] == 0
    assert sizes[1] > 0


# --- Mixing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_post_mixes_clean_and_attacked_images_alike(kind, key):
    mixed = parts_of(methods.afd(FILM, PGD, mix_kind=kind, mix_alpha=9.0), key)
    plain = parts_of(methods.afd(FILM, PGD, mix_stage="none"), key)
    np.testing.assert_allclose(jnp.sum(mixed.targets, axis=1), 1.0, rtol=1e-6)
    moved = jnp.max(jnp.abs(mixed.batch.image - IMAGES), axis=(1, 2, 3))
    assert float(jnp.max(moved)) > 2 * RADIUS  # no longer near any one image
    # Mixed by the same matrix: what takes the clean ones there takes the attacked ones, too.
    change = mixed.images - mixed.batch.image
    assert float(jnp.max(jnp.abs(change))) <= RADIUS + 1e-6
    own = jax.nn.one_hot(BATCH.label, 3)
    rows = jnp.max(mixed.targets, axis=1) < 0.999
    assert bool(jnp.any(rows))
    moves = (plain.images - IMAGES).reshape(16, -1)
    # Each mixed change is a combination of two rows of the plain ones, at every pixel.
    for row in np.flatnonzero(rows):
        share = float(mixed.targets[row] @ own[row])
        lone = change[row].ravel()
        if kind == "mixup":
            rest = jnp.abs((lone - share * moves[row])[None] - (1 - share) * moves)
            assert float(jnp.min(jnp.max(rest, axis=1))) < 1e-5
        else:
            foreign = jnp.mean(jnp.abs(lone - moves[row]) > 1e-6)
            assert float(foreign) <= 1 - share + 1e-6


def test_a_share_of_one_is_no_mixing(key):
    """With so small a parameter Beta draws nothing but zeros and ones."""
    mixing = methods.afd(FILM, PGD, mix_alpha=1e-4)
    own = jax.nn.one_hot(BATCH.label, 3)
    found = jax.jit(lambda key: mixing.find(PARAMS, STATE, key, BATCH, None, 0)[0].targets)
    for number in range(8):
        one = jax.random.fold_in(key, number)
        if bool(jnp.allclose(found(one), own)):
            break
    else:
        pytest.fail("eight draws and no share of one")
    none = methods.afd(FILM, PGD, mix_stage="none")
    losses = [jax.jit(each)(PARAMS, STATE, one, BATCH)[0] for each in (mixing, none)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_across_classes_alone_an_image_that_meets_its_own_stays_as_it_is(key):
    across = parts_of(methods.afd(FILM, PGD, cross_class_only=True), key)
    plain = parts_of(methods.afd(FILM, PGD, mix_stage="none"), key)
    whole = np.asarray(jnp.max(across.targets, axis=1) > 0.999)
    assert 0 < np.sum(whole) < 16
    np.testing.assert_array_equal(across.batch.image[whole], IMAGES[whole])
    np.testing.assert_array_equal(across.images[whole], plain.images[whole])
    change = jnp.max(jnp.abs(across.batch.image - IMAGES), axis=(1, 2, 3))
    assert bool(jnp.all(change[~whole] > 0))


def test_pre_attacks_the_mixtures(key):
    found = parts_of(methods.afd(FILM, PGD, mix_stage="pre"), key)
    mixed = parts_of(methods.afd(FILM, PGD, mix_stage="post"), key)
    np.testing.assert_allclose(found.batch.image, mixed.batch.image, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.targets, mixed.targets, rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(found.images - found.batch.image))) <= RADIUS + 1e-6
    given = {"params": PARAMS, **with_condition(STATE, found.attacked)}
    losses = [
        jax.vmap(soft_cross_entropy)(FILM.apply(given, images)[0], found.targets)
        for images in (found.batch.image, found.images)
    ]
    assert float(jnp.mean(losses[1] - losses[0])) > 0.01


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_soft_labels_are_climbed_by_their_own_cross_entropy(scale, key):
    """By value and gradient, also where the network is so sure that the loss rounds to zero."""
    weight = jax.random.normal(key, (64, 3))

    def logits_fn(key, image):
        return scale * (image.ravel() @ weight)

    image = IMAGES[0]
    top = jax.nn.one_hot(jnp.argmax(logits_fn(key, image)), 3)
    for target in (top, 0.7 * top + 0.1):
        seen = []

        def spy(key, two, image, label, seen=seen):
            loss = lambda x: -jax.nn.log_softmax(two(key, x))[label]
            seen.append(jax.value_and_grad(loss)(image))
            return image

        against(spy)(key, logits_fn, image, target)
        expected = jax.value_and_grad(lambda x, t=target: soft_cross_entropy(logits_fn(key, x), t))
        value, gradient = expected(image)
        np.testing.assert_allclose(seen[0][0], jnp.maximum(value, 1e-6), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(seen[0][1], gradient, rtol=2e-3, atol=1e-12)


# --- The ablation -----------------------------------------------------------------------------

GRID = list(itertools.product(("sign", "uniform"), ("post", "pre", "none"), ("film", "none")))


def sections_of(parts):
    """The method, the attack and the modulation of a run, from its config."""
    spec = load_config(f"{CONFIG}:{'-'.join(parts)}")
    method = dict(spec["method"])
    return method, method.pop("attack"), spec["network"]["modulation"]


def test_the_ablation_is_what_its_texts_say():
    for parts in GRID:
        method, attack, modulation = sections_of(parts)
        assert (attack["start"], method["mix_stage"], modulation) == parts


@pytest.mark.parametrize("parts", GRID, ids="-".join)
def test_every_mixture_and_modulation_takes_a_step(parts, key):
    """By the method's section of its config, on a smaller network; the start is the attack's.

    Without `jit`: these twelve differ in little, and share the operations that they are made of.
    """
    method, attack, modulation = sections_of(parts)
    network = models.cnn(3, widths=(2,), hidden=2, batch_norm=True, modulation=modulation)
    objective = make_objective(method, network, {**attack, "steps": 1})
    variables = network.init(key, IMAGES)
    assert ("condition" in variables) == (modulation == "film")
    state = {k: v for k, v in variables.items() if k != "params"}
    step = jax.value_and_grad(objective, has_aux=True)
    found = step(variables["params"], state, key, BATCH)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))
    for path, gradient in jax.tree.leaves_with_path(found[1]):
        # The first layer of a fresh FiLM cannot learn yet: what comes after it is zero.
        waits = "'hidden'" in jax.tree_util.keystr(path)
        assert bool(jnp.any(gradient != 0)) != waits, path


def make_objective(method, network, attack):
    made = schema.make("config.method.attack", attacks, attack, threat=Threat(linf, 8 / 255))
    return schema.make("config.method", methods, method, network=network, attack=made)


def test_bad_settings_are_refused():
    for options, message in (
        (dict(mix_stage="pst"), "did you mean 'post'"),
        (dict(mix_kind="mixu"), "did you mean 'mixup'"),
        (dict(cond="orb"), "cond='orb': expected one of oat, source"),
        (dict(mix_alpha=0.0), "mix_alpha=0.0"),
        (dict(conditions=(0.5, 1.5)), "conditions="),
        (dict(conditions=()), "conditions=.*at least"),
        (dict(deployed=2.0), "deployed=2.0"),
    ):
        with pytest.raises(UsageError, match=message):
            methods.afd(FILM, PGD, **options)
    with pytest.raises(UsageError, match=r"modulation='flim'.*did you mean 'film'"):
        models.resnet18(3, modulation="flim")
    with pytest.raises(UsageError, match="modulation='film': expected batch_norm=True"):
        models.cnn(3, modulation="film")
    with pytest.raises(UsageError, match="mixing='before'"):
        load_config(f"{CONFIG}:sign-before-film")
    with pytest.raises(UsageError, match="expected start-mixing-modulation"):
        load_config(f"{CONFIG}:sign")
