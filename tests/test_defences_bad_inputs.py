"""Bad images, settings and tables, for every defence and image operation: refused in one line
before anything compiles, or with the result that is documented.
"""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import defences
from rain_jax import image as ops
from rain_jax.checks import UsageError
from rain_jax.config import options
from rain_jax.defences import compose, network, tables, vote
from rain_jax.models import cnn, upscalers

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **__: COMPILED.append(name) if "mlir" in name or "backend" in name else None
)
KEY = jax.random.key(0)
EDSR = drawn.instead(upscalers.edsr(blocks=1, width=4, mean=0.5))
# Those that cannot be made without others; whoever else is listed is made with its defaults.
PARTS = {
    "chain": lambda: defences.chain((defences.bit_depth(), defences.median())),
    "choose": lambda: defences.choose((defences.bit_depth(), defences.median())),
    "rain": lambda: defences.rain(EDSR, reach=0.3),
    "total_variation": lambda: defences.total_variation(steps=5),
}
DEFENCES = {name: PARTS.get(name, getattr(defences, name)) for name in defences.__all__}
ONES = np.ones((8, 8), np.float32)
OPERATIONS = {
    "band_energy": lambda image: ops.band_energy(image, above=0.25),
    "jpeg": lambda image: ops.jpeg(image, ONES, ONES),
    "low_pass": lambda image: ops.low_pass(image, 0.5),
    "mean_pool": ops.mean_pool,
    "radial_spectrum": ops.radial_spectrum,
    "random_pick": lambda image: ops.random_pick(KEY, image),
    "random_shift": lambda image: ops.random_shift(KEY, image, reach=1),
    "resize": lambda image: ops.resize(image, (4, 4), canvas=(8, 8)),
    "shift": lambda image: ops.shift(image, (1, 1)),
    "to_even": ops.to_even,
}
NO_IMAGES = {
    "bytes": np.zeros((8, 8, 3), np.uint8),
    "whole numbers": np.zeros((8, 8, 3), np.int32),
    "a plane": np.zeros((8, 8), np.float32),
    "a batch": np.zeros((2, 8, 8, 3), np.float32),
    "no pixel": np.zeros((0, 8, 3), np.float32),
}


def refused(call, says):
    COMPILED.clear()
    with pytest.raises(UsageError) as found:
        call()
    assert "\n" not in str(found.value)
    assert says in str(found.value)
    assert not COMPILED


def test_every_operation_on_images_is_among_these():
    others = {"corruptions", "dct", "idct", "standard_tables"}
    assert set(ops.__all__) - set(OPERATIONS) == others


# --- Images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_refused(kind):
    image = NO_IMAGES[kind]
    says = f"image {image.dtype} {list(image.shape)}: expected floats in [0, 1], [H, W, C]"
    good = jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)
    for operation in OPERATIONS.values():
        refused(lambda f=operation: jax.jit(f)(image), says)
    for make in DEFENCES.values():
        defence = make()
        variables = jax.eval_shape(defence.init, KEY, good)
        # Of another rank no form is a way in: what is deployed stands for all.
        forms = (defence.apply, *(defence.surrogates.values() if image.ndim == 3 else ()))
        for form in forms:
            refused(lambda f=form, v=variables: jax.eval_shape(f, v, KEY, image), says)


def test_bytes_are_refused_in_front_of_a_model_too():
    image = NO_IMAGES["bytes"]
    logits_fn = compose.defend(lambda key, image: jnp.sum(image), defences.bit_depth(), {})
    refused(lambda: jax.jit(logits_fn)(KEY, image), "uint8")
    whole = network.in_front(defences.bit_depth(), cnn(10, widths=(2,), hidden=2))
    variables = jax.eval_shape(whole.init, KEY, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    refused(lambda: jax.eval_shape(whole.apply, variables, image[None]), "uint8")


@pytest.mark.parametrize("name", DEFENCES)
def test_odd_grey_images_pass_and_a_nan_stays_in_its_own(name):
    images = np.random.default_rng(1).uniform(size=(2, 7, 5, 1)).astype(np.float32)
    defence = DEFENCES[name]()
    variables = jax.jit(defence.init)(KEY, images[0])
    program = jax.jit(jax.vmap(defence.apply, (None, 0, 0)))
    keys = jax.random.split(KEY, 2)
    clean = np.asarray(program(variables, keys, images))
    assert clean.shape == (2, *((8, 6) if name == "resize_and_pad" else (7, 5)), 1)
    assert np.all(np.isfinite(clean))
    if name != "gaussian_noise":  # which does not clip, and says so
        assert np.min(clean) >= 0
        assert np.max(clean) <= 1
    broken = images.copy()
    broken[0, 3, 2, 0] = np.nan
    found = np.asarray(program(variables, keys, broken))
    np.testing.assert_array_equal(found[1], clean[1])
    told = found[0][~np.isnan(found[0])]
    if name != "gaussian_noise":
        assert np.all((told >= 0) & (told <= 1))
    # Picks and medians may leave the pixel out. No other may hide it.
    if name not in ("median", "chain", "choose", "rain"):
        assert np.any(np.isnan(found[0]))


def test_other_numbers_of_channels():
    two = jax.ShapeDtypeStruct((8, 8, 2), jnp.float32)
    for name, make in DEFENCES.items():
        defence = make()
        variables = jax.eval_shape(defence.init, KEY, two)
        run = lambda d=defence, v=variables: jax.eval_shape(d.apply, v, KEY, two)
        if name in ("jpeg", "nn_jpeg", "shield"):
            refused(run, "expected 3 channels, or 1")
        else:
            assert run().shape[-1] == 2


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFENCES)
def test_a_wrong_surrogate_is_met_with_the_right_ones(name):
    defence = DEFENCES[name]()
    for wrong in ("identiy", "", "apply"):
        refused(lambda w=wrong: compose.form(defence, w), f"through={wrong!r}: expected")
    if "identity" in defence.surrogates:
        refused(lambda: compose.form(defence, "identiy"), "did you mean 'identity'")


# --- Settings, tables and votes ---------------------------------------------------------------

NOISE = np.ones((3, 8, 8), np.float32)
IMAGE = np.zeros((8, 8, 3), np.float32)
STEPS = {"tables": {"steps": np.zeros((8, 8), np.float32)}}


def statistics(noise):
    return tables.Statistics(NOISE, noise, NOISE)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: defences.jpeg(quality=0), "quality=0: expected a number in [1, 100]"),
        (lambda: defences.jpeg(quality=101), "quality=101"),
        (lambda: defences.jpeg(quality=75.5), "quality=75.5: expected a whole number"),
        (lambda: defences.jpeg(quality=float("nan")), "quality=nan"),
        (lambda: defences.jpeg(quality="75"), "quality='75'"),
        (lambda: defences.jpeg(subsampling="422"), "subsampling='422'"),
        (lambda: ops.standard_tables(101), "quality=101"),
        (lambda: ops.standard_tables(None), "quality=None"),
        (lambda: defences.shield(qualities=()), "qualities=()"),
        (lambda: defences.shield(qualities=(80, 0)), "qualities=0"),
        (lambda: defences.shield(qualities=(80, 20.5)), "qualities=20.5"),
        (lambda: defences.nn_jpeg(level=0.0), "level=0.0"),
        (lambda: defences.nn_jpeg(table="depn"), "did you mean 'deepn'"),
        (lambda: defences.nn_jpeg(table="nn"), "statistics=None"),
        (lambda: defences.nn_jpeg(table="nn", statistics=statistics(NOISE[0])),
         "statistics.noise [8, 8]"),
        (lambda: defences.nn_jpeg(table="nn", statistics=statistics(NOISE * np.nan)),
         "statistics.noise [3, 8, 8]: expected finite"),
        (lambda: ops.jpeg(IMAGE, 0 * ONES, ONES), "luma of 0 to 0: expected finite steps"),
        (lambda: ops.jpeg(IMAGE, ONES, ONES / 0.9 - 1), "chroma of 0.111111 to 0.111111"),
        (lambda: ops.jpeg(IMAGE, ONES * np.nan, ONES), "luma of nan to nan"),
        (lambda: ops.jpeg(IMAGE, ONES, np.where(np.eye(8), np.inf, 1)), "chroma of 1 to inf"),
        (lambda: ops.jpeg(IMAGE, ONES, None), "chroma []: expected [8, 8]"),
        (lambda: ops.jpeg(IMAGE, ONES[:4], ONES), "luma [4, 8]: expected [8, 8]"),
        (lambda: defences.feature_distillation().apply(STEPS, KEY, IMAGE), "steps of 0 to 0"),
        (lambda: tables.coefficients(NO_IMAGES["bytes"]), "image uint8"),
        (lambda: ops.dct(ONES[:, :7]), "block_image [8, 7]: expected [H, W], multiples of 8"),
        (lambda: ops.dct(IMAGE), "block_image [8, 8, 3]"),
        (lambda: options.Ensemble("defence.level", ()), "config.ensemble.values=()"),
        (lambda: options.Ensemble("defence.level", (15.0,)), "expected two at least"),
        (lambda: network.ensemble((), vote.vote_scores), "networks=()"),
        (lambda: defences.rain(EDSR, reach=-0.1), "reach=-0.1"),
        (lambda: defences.rain(EDSR, reach=float("nan")), "reach=nan"),
        (lambda: ops.random_shift(KEY, IMAGE, reach=-1), "reach=-1"),
        (lambda: ops.random_shift(KEY, IMAGE, reach=1.5), "reach=1.5: expected a whole number"),
        (lambda: ops.shift(IMAGE, (0.5, 0)), "move=0.5: expected a whole number"),
        (lambda: ops.resize(IMAGE, (2.5, 2), canvas=(8, 8)), "size=2.5: expected a whole number"),
        (lambda: ops.resize(IMAGE, (9, 2), canvas=(8, 8)), "size=9"),
        (lambda: ops.mean_pool(IMAGE[:7]), "image [7, 8, 3]: expected even height and width"),
        (lambda: ops.low_pass(IMAGE, float("nan")), "cutoff=nan"),
        (lambda: ops.band_energy(IMAGE, above=-0.1), "above=-0.1"),
        (lambda: ops.band_energy(IMAGE[:, :, :2], above=0.1), "expected 3 channels, or 1"),
        (lambda: defences.bit_depth(bits=2.5), "bits=2.5: expected a whole number"),
        (lambda: defences.bit_depth(bits=True), "bits=True"),
        (lambda: defences.median(width=2.5), "width=2.5: expected a whole number"),
        (lambda: defences.median(width=-1), "width=-1"),
        (lambda: defences.total_variation(steps=2.5), "steps=2.5: expected a whole number"),
        (lambda: defences.total_variation(keep=1.5), "keep=1.5"),
        (lambda: defences.gaussian_noise(scale=float("nan")), "scale=nan"),
        (lambda: defences.resize_and_pad(smallest=1.2, canvas=1.1), "canvas=1.1"),
        (lambda: defences.chain(()), "defences=()"),
        (lambda: defences.choose((defences.median(),), weights=()), "weights=()"),
        (lambda: defences.choose((defences.median(),), weights=(float("nan"),)), "weights=(nan,)"),
        (lambda: vote.vote_scores(ONES[0]), "logits [8]: expected [members, classes]"),
        (lambda: vote.mean_logits(ONES[:0]), "logits [0, 8]"),
        (lambda: vote.mean_probabilities(IMAGE), "logits [8, 8, 3]"),
        (lambda: vote.smallest_margins(ONES[:, :1]), "logits [8, 1]"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(call, says):
    refused(call, says)


def test_a_known_table_may_be_refused_where_a_traced_one_cannot():
    zero = jax.jit(lambda table: ops.jpeg(IMAGE + 0.3, table, ONES))(0 * ONES)
    assert np.all(np.isnan(zero))  # nothing that looks like an image


@pytest.mark.parametrize("votes", [(2, 1), (1, 2)])
def test_two_members_that_disagree(votes):
    logits = 3 * np.eye(4, dtype=np.float32)[list(votes)]
    scores = jax.jit(vote.vote_scores)
    assert np.argmax(scores(logits)) == 1  # as sure: the lower class, in either order
    surer = logits.copy()
    surer[votes.index(2)] *= 1.5
    assert np.argmax(scores(surer)) == 2
