"""What `chain`, `choose`, `bpda`, `defend` and `mean_of_draws` promise."""

import json

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import models
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.defences import bit_depth, gaussian_noise, jpeg, median, nn_jpeg, rain
from rain_jax.defences.compose import bpda, chain, choose, defend, form, mean_of_draws
from rain_jax.defences.network import in_front
from rain_jax.gradients import straight_through
from rain_jax.models.upscalers import bicubic
from rain_jax.types import Defence

IMAGE = np.random.default_rng(3).uniform(size=(4, 4, 1)).astype(np.float32)
KEY = jax.random.key(0)
KEYS = drawn.keys(4, 12)


def scale(factor, **more):
    """Multiplies by a parameter."""
    return Defence(
        lambda key, image: {"params": jnp.float32(factor)},
        lambda variables, key, image: variables["params"] * image,
        **more,
    )


def noise():
    """Adds noise whose size is a fixed variable."""
    return Defence(
        lambda key, image: {"fixed": jnp.float32(0.1)},
        lambda variables, key, image: (
            image + variables["fixed"] * jax.random.normal(key, image.shape)
        ),
        random=True,
    )


def halve():
    """Keeps every second row."""
    return Defence(lambda key, image: {}, lambda variables, key, image: image[::2])


def steps():
    """Rounds, with no slope of its own; `soft` has another one."""
    hard = lambda variables, key, image: jnp.round(4 * image) / 4
    return Defence(
        lambda key, image: {},
        straight_through(hard),
        surrogates={"soft": lambda variables, key, image: 3.0 * image},
    )


def total(key, image):
    return jnp.sum(image) * jnp.ones(2)


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def test_a_chain_goes_in_order_with_each_members_own_variables():
    both = chain((scale(2.0), halve(), scale(0.5)))
    variables = both.init(KEY, IMAGE)
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"0", "2"}
    variables["params"]["2"] = jnp.float32(5.0)
    np.testing.assert_allclose(run(both.apply, variables, KEY, IMAGE), 10 * IMAGE[::2], rtol=1e-6)
    assert not both.random
    assert chain((scale(1.0), noise())).random


def test_the_next_members_variables_are_of_the_image_that_it_gets():
    seen = Defence(
        lambda key, image: {"params": jnp.zeros(image.shape)},
        lambda variables, key, image: image + variables["params"],
    )
    assert chain((halve(), seen)).init(KEY, IMAGE)["params"]["1"].shape == (2, 4, 1)


def test_gradients_go_through_all_of_a_chain():
    both = chain((scale(2.0), steps(), scale(3.0)))
    variables = both.init(KEY, IMAGE)
    forms = both.apply, both.surrogates["soft"]

    def slopes(variables, image):
        of = lambda apply: jax.grad(lambda x: jnp.sum(apply(variables, KEY, x)))(image)
        return both.apply(variables, KEY, image), [of(apply) for apply in forms]

    value, (own, soft) = run(slopes, variables, IMAGE)
    np.testing.assert_allclose(own, 6.0, rtol=1e-6)
    # The others stay as they are deployed.
    np.testing.assert_allclose(soft, 18.0, rtol=1e-6)
    np.testing.assert_allclose(value, 3 * np.round(8 * IMAGE) / 4, rtol=1e-6)


def test_members_of_a_chain_draw_apart():
    both = chain((noise(), noise()))
    first = chain((noise(), scale(1.0)))
    drawn = lambda defence: defence.apply(defence.init(KEY, IMAGE), KEY, IMAGE) - IMAGE
    alone, sum_of_two = run(lambda: (drawn(first), drawn(both)))
    assert np.max(np.abs(sum_of_two - alone - alone)) > 1e-3


def test_a_choice_is_drawn_with_its_weights():
    either = choose((scale(0.0), scale(1.0)), weights=(1.0, 3.0))
    assert either.random
    variables = either.init(KEY, IMAGE)
    keys = jax.random.split(KEY, 2000)
    never = choose((scale(0.0), scale(1.0)), weights=(0.0, 1.0))
    drawn, second = run(
        lambda variables, keys, image: (
            jax.vmap(lambda key: either.apply(variables, key, image))(keys),
            never.apply(variables, KEY, image),
        ),
        variables, keys, IMAGE,
    )  # fmt: skip
    kept = np.all(drawn == IMAGE, axis=(1, 2, 3))
    gone = np.all(drawn == 0, axis=(1, 2, 3))
    assert np.all(kept | gone)
    assert abs(np.mean(kept) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000)
    np.testing.assert_array_equal(second, IMAGE)


def test_the_drawn_members_gradient_is_the_choices():
    either = choose((scale(2.0), steps()))
    variables = either.init(KEY, IMAGE)
    both_ways = jax.jit(lambda key, x: pulled(either.apply, variables, key, x, jnp.ones_like(x)))
    seen = set()
    for key in KEYS[:8]:
        value, slope = both_ways(key, IMAGE)
        scaled = bool(np.all(value == 2 * IMAGE))
        np.testing.assert_allclose(slope, 2.0 if scaled else 1.0)
        seen.add(scaled)
    assert seen == {False, True}


def test_bpda_keeps_the_function_and_changes_its_slope():
    zero = Defence(lambda key, image: {}, lambda variables, key, image: jnp.round(image))
    ours = bpda(zero)
    steep = bpda(zero, lambda variables, key, image: 7 * image)

    def everything(image):
        slope = lambda apply: jax.grad(lambda x: jnp.sum(x * apply({}, KEY, x)))(image)
        slopes = [slope(apply) for apply in (ours.apply, ours.surrogates["own"], steep.apply)]
        return ours.apply({}, KEY, image), slopes

    value, (through, own, steeper) = run(everything, IMAGE)
    np.testing.assert_array_equal(value, np.round(IMAGE))
    np.testing.assert_allclose(through, np.round(IMAGE) + IMAGE, rtol=1e-6)
    np.testing.assert_allclose(own, np.round(IMAGE), rtol=1e-6)
    np.testing.assert_allclose(steeper, np.round(IMAGE) + 7 * IMAGE, rtol=1e-5)


def test_a_defended_model_sees_the_defended_image_and_draws_apart():
    # The model's draw is none of the defence's.
    drawing = lambda key, image: jnp.concatenate([jax.random.normal(key, (1,)), image[0, 0]])

    def everything(image):
        twice = defend(total, scale(2.0), {"params": jnp.float32(2.0)})(KEY, image)
        through = defend(total, steps(), {}, through="soft")(KEY, image)
        fixed = {"fixed": jnp.float32(1.0)}
        drawn = defend(drawing, noise(), fixed)(KEY, jnp.zeros((1, 1, 1)))
        return total(KEY, image), twice, through, drawn

    plain, twice, through, logits = run(everything, IMAGE)
    np.testing.assert_allclose(twice, 2 * plain, rtol=1e-6)
    np.testing.assert_allclose(through, 3 * plain, rtol=1e-6)
    assert np.abs(logits[0] - logits[1]) > 1e-3


def test_a_model_deployed_as_a_mean_of_draws():
    noisy = defend(total, noise(), {"fixed": jnp.float32(1.0)})

    def both(keys, image):
        return jax.vmap(lambda key: noisy(key, image))(keys), mean_of_draws(noisy, 8)(KEY, image)

    each, mean = run(both, jax.random.split(KEY, 8), IMAGE)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), rtol=1e-6)


# --- Members as they are deployed and attacked --------------------------------------------------

RAIN = rain(bicubic(), reach=0.3)
JPEG = nn_jpeg(level=60.0)
COLOURS = np.random.default_rng(5).uniform(size=(8, 8, 3)).astype(np.float32)
SLOPE = np.random.default_rng(6).normal(size=COLOURS.shape).astype(np.float32)


def pulled(apply, variables, key, image, slope):
    """What a defence makes of an image, and what comes of a slope on its way back."""
    value, pull = jax.vjp(lambda image: apply(variables, key, image), image)
    return value, pull(slope)[0]


def by_hand(forms, variables, keys, image, slope):
    """The same of several in a row, each differentiated by itself."""
    pulls = []
    for apply, own, key in zip(forms, variables, keys, strict=True):
        image, pull = jax.vjp(lambda image, a=apply, v=own, k=key: a(v, k, image), image)
        pulls.append(pull)
    for pull in reversed(pulls):
        (slope,) = pull(slope)
    return image, slope


ONE_AFTER_ANOTHER = {
    None: (RAIN.apply, JPEG.apply),
    "identity": (RAIN.surrogates["identity"], JPEG.surrogates["identity"]),
    "average_one_shift": (RAIN.surrogates["average_one_shift"], JPEG.apply),
}


@pytest.mark.parametrize("through", ONE_AFTER_ANOTHER)
def test_a_chain_is_its_members_one_after_another_both_ways(through):
    both = chain((RAIN, JPEG))
    apply = form(both, through)

    @jax.jit  # by key: draws for many keys at once take twice as long to compile
    def compared(key, image, slope):
        variables = both.init(KEY, image)
        own = RAIN.init(key, image), JPEG.init(key, image)
        hand = by_hand(ONE_AFTER_ANOTHER[through], own, jax.random.split(key), image, slope)
        return pulled(apply, variables, key, image, slope), hand

    values = []
    for key in KEYS[:3]:
        (value, back), (expected, gradient) = compared(key, COLOURS, SLOPE)
        np.testing.assert_allclose(value, expected, atol=1e-6)
        np.testing.assert_allclose(back, gradient, atol=1e-5)
        assert np.linalg.norm(back) > 0.1
        values.append(np.asarray(value))
    # Other keys, other draws: all this does not hold for want of any.
    assert np.any(values[0] != values[1])


@pytest.mark.parametrize("through", [None, "identity"])
def test_a_choice_inside_a_chain_is_the_chain_with_the_drawn_member(through):
    members = (median(), gaussian_noise(scale=0.1))
    whole = chain((choose(members, weights=(1.0, 2.0)), RAIN))
    apply = form(whole, through)
    attacked = lambda defence: form(defence, through if through in defence.surrogates else None)

    def expected(place, keys, image):
        first, second = keys
        # The choice draws by the first half of its key; members share out the second.
        inner = jax.random.split(jax.random.split(first)[1], len(members))[place]
        forms = [attacked(members[place]), attacked(RAIN)]
        return by_hand(forms, ({}, {}), (inner, second), image, SLOPE)

    @jax.jit  # by key, as above
    def compared(key, image):
        keys = jax.random.split(key)
        each = [expected(place, keys, image) for place in range(len(members))]
        return pulled(apply, {}, key, image, SLOPE), each

    found = [jax.device_get(compared(key, COLOURS)) for key in KEYS]
    (value, back), each = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    near = np.stack([np.max(np.abs(value - other), axis=(1, 2, 3)) < 1e-5 for other, _ in each])
    np.testing.assert_array_equal(near.sum(axis=0), 1)
    which = np.argmax(near, axis=0)
    assert set(which) == {0, 1}
    gradients = np.stack([gradient for _, gradient in each])[which, np.arange(len(which))]
    np.testing.assert_allclose(back, gradients, atol=1e-5)
    assert np.all(np.max(np.abs(back), axis=(1, 2, 3)) > 0.1)


def test_a_section_of_a_config_is_the_call_that_it_describes():
    section = dict(
        name="chain",
        defences=[
            dict(name="rain", upscaler="bicubic", reach=0.3),
            dict(
                name="choose",
                defences=["bit_depth", dict(name="jpeg", quality=30)],
                weights=[1, 3],
            ),
        ],
    )
    network = dict(name="cnn", widths=(4,), hidden=8)
    built = build.experiment(
        dict(
            data=dict(name="digits", limit_train=64, limit_test=8),
            network=network,
            defence=section,
            threat=dict(radius=0.1),
            method=dict(name="natural"),
            optimiser=dict(name="sgd"),
            schedule=dict(name="constant", peak=0.1),
            training=dict(batch_size=32),
            evaluation=dict(attacks=dict(averaged=dict(name="fgsm", through="average"))),
        )
    )
    direct = chain(
        (
            rain(bicubic(), reach=0.3),
            choose((bit_depth(), jpeg(quality=30)), weights=(1.0, 3.0)),
        )
    )
    assert built.network.random
    assert built.assembly.forms == ("classifier", *direct.surrogates)
    classifier = models.cnn(classes=10, widths=(4,), hidden=8)
    images = np.random.default_rng(0).uniform(size=(8, *built.splits.train.shape)).astype("f4")

    params = drawn.variables(built.network.init, KEY, images[:1])["params"]

    @jax.jit  # tables are what `init` makes, weights need not be; one image, see above
    def by_both(params, keys, images):
        variables = {**built.network.init(KEY, images), "params": params}
        networks = built.network, in_front(direct, classifier)
        return [network.apply(variables, images, keys=keys)[0] for network in networks]

    for place in range(8):
        one = slice(place, place + 1)
        np.testing.assert_allclose(*by_both(params, KEYS[one], images[one]), atol=1e-6)
    # As it is saved with a run and read again.
    assert built.config["defence"] == tree.plain(section)
    assert tree.plain(tree.config(**json.loads(json.dumps(built.config)))) == built.config


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: chain(()), "one at least"),
        (lambda: choose(()), "one at least"),
        (lambda: choose((scale(1.0), noise()), weights=(1.0,)), "expected 2 numbers"),
        (lambda: choose((scale(1.0),), weights=(-1.0,)), "weights="),
        (lambda: choose((scale(1.0),), weights=(0.0,)), "expected 1 numbers, not all zero"),
        (lambda: choose((scale(1.0), noise()), weights=("a", "b")), "weights=.*expected a number"),
        (lambda: choose((scale(1.0), noise()), weights=((1, 2), 3)), "weights=.*expected a number"),
        (lambda: choose((scale(1.0), noise()), weights=(2.0, -1.0)), "weights="),
        (lambda: form(steps(), "sfot"), "did you mean 'soft'"),
        (lambda: form(noise(), "soft"), "no surrogates"),
        (lambda: mean_of_draws(total, 0), "draws=0"),
    ],
)
def test_mistakes_are_told(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_what_draws_nothing_in_any_member_draws_nothing_in_a_chain():
    random, sure = rain(bicubic(), reach=0.1), jpeg()
    assert "average" in random.fixed
    assert chain((random, sure)).fixed == random.fixed
    assert not chain((random, gaussian_noise(scale=0.1))).fixed
    assert not choose((random, sure)).fixed
