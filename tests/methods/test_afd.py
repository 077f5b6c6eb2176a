"""AFD and its networks: the condition, what is mixed with what, and what the loss is made of."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import load_config
from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.config import schema
from rain_jax.defences import jpeg, vote
from rain_jax.defences.network import ensemble, in_front
from rain_jax.losses import soft_cross_entropy
from rain_jax.methods.afd import against
from rain_jax.models.conditional import FiLM, with_condition
from rain_jax.norms import linf
from rain_jax.types import Batch, Threat

RADIUS = 0.1
PGD = attacks.pgd(Threat(linf, RADIUS), steps=3, start="sign", keep="last")
PIXELS = np.random.default_rng(1).random((16, 8, 8, 1), np.float32)
PLACES = np.arange(16, dtype=np.int32)
ONE_HOT = np.eye(3)[PLACES % 3]
IMAGES = jnp.asarray(PIXELS)
BATCH = jax.tree.map(jnp.asarray, Batch(IMAGES, PLACES % 3, 100 + PLACES, np.ones(16, bool)))
SHAPES = {
    "cnn": dict(widths=(4, 4), hidden=8, batch_norm=True),
    "preact_resnet": dict(depths=(1,), width=2),
}
CONFIG = "experiments/configs/afd/ablation.py"


def make(name="cnn", **options):
    return getattr(models, name)(3, **SHAPES[name], **options)


def begun(network, images=IMAGES):
    """Variables as the network makes them."""
    return jax.jit(network.init)(jax.random.key(0), images)


def shaken(variables, parts=("params", "batch_stats")):
    """Variables away from where they begin, so that no layer is without effect."""
    draw = np.random.default_rng(9)

    def shake(leaf):
        return np.asarray(leaf) + np.float32(0.2) * np.abs(draw.normal(size=leaf.shape)).astype(
            np.float32
        )

    return {k: jax.tree.map(shake, v) if k in parts else v for k, v in variables.items()}


def plain_of(tree):
    """What the network without modulation has of a tree of variables."""
    if not isinstance(tree, dict):
        return tree
    own = {k: v for k, v in tree.items() if not k.endswith(("_film", "_noise"))}
    return {k: plain_of(v) for k, v in own.items() if k not in ("condition", "noise")}


FILM = make(modulation="film")
VARIABLES = shaken(begun(FILM))
PARAMS = VARIABLES["params"]
STATE = {k: v for k, v in VARIABLES.items() if k != "params"}


# --- The condition ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_fresh_film_is_the_plain_network_for_every_condition(name):
    network, plain = make(name, modulation="film"), make(name)
    variables = begun(network)
    own = plain_of(variables)
    like = jax.eval_shape(plain.init, jax.random.key(0), IMAGES)
    assert jax.tree.structure(own) == jax.tree.structure(like)
    expected = jax.jit(plain.apply)(own, IMAGES)[0]
    logits = jax.jit(lambda s: network.apply(with_condition(variables, s), IMAGES)[0])
    for s in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(logits(s), expected, rtol=1e-6, atol=1e-6)


def test_film_scales_and_shifts_each_channel():
    maps, s = np.random.default_rng(3).normal(size=(2, 3, 3, 4)).astype(np.float32), 0.4
    module = FiLM()
    variables = shaken(jax.jit(module.init)(jax.random.key(0), maps, np.float32(s)))
    hidden, last = (variables["params"][name] for name in ("hidden", "last"))
    inner = s * hidden["kernel"][0] + hidden["bias"]
    both = np.where(inner > 0, inner, 0.01 * inner) @ last["kernel"] + last["bias"]
    expected = maps * (1 + both[:4]) + both[4:]
    found = jax.jit(module.apply)(variables, maps, np.float32(s))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_float_adds_its_share_of_noise_to_every_kernel(name):
    """The same as the plain network with those kernels: none at 0, all of the noise at 1."""
    network, plain = make(name, modulation="float"), make(name)
    variables = jax.tree.map(np.asarray, begun(network))

    def moved(params, noise, s):
        own = {}
        for key, value in params.items():
            if f"{key}_noise" in params:
                share = params[f"{key}_noise"]["share"]
                assert share == 0.25
                draw = noise[f"{key}_noise"]["draw"]
                kernel = value["kernel"] + np.float32(s * share * np.std(value["kernel"])) * draw
                own[key] = {**value, "kernel": kernel}
            elif isinstance(value, dict) and not key.endswith("_noise"):
                own[key] = moved(value, noise.get(key, {}), s)
            elif not key.endswith("_noise"):
                own[key] = value
        return own

    seen = []
    logits_at = jax.jit(lambda s: network.apply(with_condition(variables, s), IMAGES)[0])
    apply = jax.jit(plain.apply)
    for s in (0.0, 0.5, 1.0):
        logits = logits_at(s)
        params = moved(variables["params"], variables["noise"], s)
        expected = apply({**plain_of(variables), "params": params}, IMAGES)[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        seen.append(np.asarray(logits))
    assert np.max(np.abs(seen[2] - seen[0])) > 0.01


@pytest.mark.parametrize("modulation", ["film", "float"])
def test_remat_changes_nothing(modulation):
    """The condition reaches what is computed again in the backward pass."""
    results = []
    images = IMAGES[:4]
    plain = make("preact_resnet", modulation=modulation, remat="none")
    variables = with_condition(shaken(begun(plain, images)), 0.3)
    for remat in ("none", "convolutions", "blocks"):
        network = make("preact_resnet", modulation=modulation, remat=remat)
        own = with_condition(shaken(begun(network, images)), 0.3)
        jax.tree.map(np.testing.assert_array_equal, own, variables)

        def loss(params, network=network):
            given = {**variables, "params": params}
            return jnp.sum(network.apply(given, images, True)[0][:, 0])

        results.append(jax.jit(jax.value_and_grad(loss))(variables["params"]))
    for again in results[1:]:
        for a, b in zip(*map(jax.tree.leaves, (results[0], again)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_the_condition_is_one_constant_in_the_state_and_is_found_behind_a_defence():
    assert STATE["condition"] == {"s": 1.0}
    logits, after = zip(*(trained(IMAGES, s) for s in (0.2, 0.2, 0.9, 0.25)), strict=True)
    assert float(after[3]["condition"]["s"]) == 0.25  # training does not move it
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.max(np.abs(np.asarray(logits[0]) - logits[2])) > 1e-3
    defended = in_front(jpeg(), FILM)
    set_to = with_condition(begun(defended), 0.25)
    assert float(set_to["frozen"]["classifier"]["condition"]["s"]) == 0.25
    fronts = [in_front(jpeg(quality=quality), FILM) for quality in (20, 80)]
    several = ensemble(fronts, vote.vote_scores)
    variables = begun(several)
    set_to = with_condition(variables, 0.25)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), set_to, variables)
    np.testing.assert_array_equal(set_to["frozen"]["classifier"]["condition"]["s"], [0.25, 0.25])
    logits = jax.eval_shape(several.apply, set_to, IMAGES)[0]
    assert logits.shape == (len(IMAGES), FILM.classes)
    plain = begun(make())
    jax.tree.map(np.testing.assert_array_equal, with_condition(plain, 0.25), plain)


# --- The loss ---------------------------------------------------------------------------------


@functools.cache
def program(**options):
    """What AFD finds, and its loss with what comes with it."""
    objective = methods.afd(FILM, PGD, **options)

    @jax.jit
    def run(key):
        found, _ = objective.find(PARAMS, STATE, key, BATCH, None, 0)
        return found, objective(PARAMS, STATE, key, BATCH)

    return run


def outcome(key, **options):
    return jax.tree.map(np.asarray, program(**options)(key))


def parts_of(key, **options):
    return outcome(key, **options)[0]


@jax.jit
def trained(images, s):
    """Logits and state in training mode."""
    return FILM.apply({"params": PARAMS, **with_condition(STATE, s)}, images, True)


@jax.jit
def attacked(key, s):
    """What PGD finds where the network has the condition `s`."""

    def one(key, image, label):
        given = {"params": PARAMS, **with_condition(STATE, s)}
        return PGD(key, lambda k, x: FILM.apply(given, x[None])[0][0], image, label)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, BATCH.index)
    return jax.vmap(one)(keys, IMAGES, BATCH.label)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


@pytest.mark.parametrize(
    ("options", "clean", "attacked_at", "weight"),
    [
        (dict(cond="source"), 0.0, 1.0, 0.5),
        (dict(conditions=(0.3,)), 0.3, 0.3, 0.3),
        (dict(conditions=(1.0,)), 1.0, 1.0, 1.0),
    ],
)
def test_each_part_of_the_loss_has_its_condition_and_its_weight(
    options, clean, attacked_at, weight, key
):
    parts, (loss, (state, metrics)) = outcome(key, mix_stage="none", **options)
    found = np.asarray(attacked(key, attacked_at))
    np.testing.assert_allclose(parts.images, found, atol=1e-6)
    natural, robust = (
        -log_softmax(trained(images, s)[0])[PLACES, PLACES % 3]
        for images, s in ((IMAGES, clean), (found, attacked_at))
    )
    expected = np.sum((1 - weight) * natural + weight * robust)
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
    fresh = begun(FILM)
    params, state = fresh["params"], {k: v for k, v in fresh.items() if k != "params"}
    slope = jax.jit(jax.grad(objective, has_aux=True))
    sizes = []
    for _ in range(2):
        gradient, _ = slope(params, state, key, BATCH)
        gradient = jax.tree.map(np.asarray, gradient)
        sizes.append(np.max(np.abs(gradient["norm1_film"]["hidden"]["kernel"])))
        params = jax.tree.map(lambda p, g: np.asarray(p) - np.float32(0.01) * g, params, gradient)
    assert sizes[0] == 0
    assert sizes[1] > 0


# --- Mixing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_post_mixes_clean_and_attacked_images_alike(kind, key):
    mixed = parts_of(key, mix_kind=kind, mix_alpha=9.0)
    plain = parts_of(key, mix_stage="none")
    np.testing.assert_allclose(np.sum(mixed.targets, axis=1), 1.0, rtol=1e-6)
    moved = np.max(np.abs(mixed.batch.image - PIXELS), axis=(1, 2, 3))
    assert np.max(moved) > 2 * RADIUS  # no longer near any one image
    # Mixed by the same matrix: what takes the clean ones there takes the attacked ones, too.
    change = mixed.images - mixed.batch.image
    assert np.max(np.abs(change)) <= RADIUS + 1e-6
    rows = np.max(mixed.targets, axis=1) < 0.999
    assert np.any(rows)
    moves = (plain.images - PIXELS).reshape(16, -1)
    # Each mixed change is a combination of two rows of the plain ones, at every pixel.
    for row in np.flatnonzero(rows):
        share = mixed.targets[row] @ ONE_HOT[row]
        lone = change[row].ravel()
        if kind == "mixup":
            rest = np.abs((lone - share * moves[row])[None] - (1 - share) * moves)
            assert np.min(np.max(rest, axis=1)) < 1e-5
        else:
            foreign = np.mean(np.abs(lone - moves[row]) > 1e-6)
            assert foreign <= 1 - share + 1e-6


def test_a_share_of_one_is_no_mixing(key):
    """With so small a parameter Beta draws nothing but zeros and ones."""
    for number in range(8):
        one = jax.random.fold_in(key, number)
        parts, (loss, _) = outcome(one, mix_alpha=1e-4)
        if np.allclose(parts.targets, ONE_HOT):
            break
    else:
        pytest.fail("eight draws and no share of one")
    _, (unmixed, _) = outcome(one, mix_stage="none")
    np.testing.assert_allclose(loss, unmixed, rtol=1e-4)


def test_across_classes_alone_an_image_that_meets_its_own_stays_as_it_is(key):
    across = parts_of(key, cross_class_only=True)
    plain = parts_of(key, mix_stage="none")
    whole = np.max(across.targets, axis=1) > 0.999
    assert 0 < np.sum(whole) < 16
    np.testing.assert_array_equal(across.batch.image[whole], PIXELS[whole])
    np.testing.assert_array_equal(across.images[whole], plain.images[whole])
    change = np.max(np.abs(across.batch.image - PIXELS), axis=(1, 2, 3))
    assert np.all(change[~whole] > 0)


def test_pre_attacks_the_mixtures(key):
    found = parts_of(key, mix_stage="pre")
    mixed = parts_of(key, mix_stage="post")
    np.testing.assert_allclose(found.batch.image, mixed.batch.image, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.targets, mixed.targets, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(found.images - found.batch.image)) <= RADIUS + 1e-6

    @jax.jit
    def losses(images):
        given = {"params": PARAMS, **with_condition(STATE, found.attacked)}
        return jax.vmap(soft_cross_entropy)(FILM.apply(given, images)[0], found.targets)

    clean, robust = (np.asarray(losses(images)) for images in (found.batch.image, found.images))
    assert np.mean(robust - clean) > 0.01


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_soft_labels_are_climbed_by_their_own_cross_entropy(scale, key):
    """By value and gradient, also where the network is so sure that the loss rounds to zero."""
    weight = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)

    def logits_fn(key, image):
        return scale * (image.ravel() @ weight)

    image = IMAGES[0]
    top = jnp.float32(np.arange(3) == np.argmax(logits_fn(key, PIXELS[0])))
    # Operation by operation: how a sure network's last bits round is the compiler's to choose.
    for target in (top, 0.7 * top + 0.1):
        seen = []

        def spy(key, two, image, label, seen=seen):
            loss = lambda x: -jax.nn.log_softmax(two(key, x))[label]
            seen.append(jax.value_and_grad(loss)(image))
            return image

        against(spy)(key, logits_fn, image, target)
        expected = jax.value_and_grad(lambda x, t=target: soft_cross_entropy(logits_fn(key, x), t))
        value, gradient = expected(image)
        np.testing.assert_allclose(seen[0][0], np.maximum(value, 1e-6), rtol=1e-4, atol=1e-7)
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
    variables = jax.jit(network.init)(key, IMAGES)
    assert ("condition" in variables) == (modulation == "film")
    state = {k: v for k, v in variables.items() if k != "params"}
    step = jax.value_and_grad(objective, has_aux=True)
    found = step(variables["params"], state, key, BATCH)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    for path, gradient in jax.tree.leaves_with_path(found[1]):
        # The first layer of a fresh FiLM cannot learn yet: what comes after it is zero.
        waits = "'hidden'" in jax.tree_util.keystr(path)
        assert np.any(np.asarray(gradient) != 0) != waits, path


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
