"""Every mistake that a check is for, made; and beside it what is sound and must not be flagged."""

import json
from typing import Any

import commands
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import evaluate, report, sanity
from rain_jax import attacks
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.evaluation import audit, probe
from rain_jax.evaluation.resume import FOLDER
from rain_jax.runs import evaluating
from rain_jax.types import Network

# Images that are darker or brighter than 0.5 on average, which is their label, by so much. In
# L-inf that is how far the nearest image of the other class is from a model that sees the mean.
OFF = 0.02 * np.arange(10) + 0.01
RADIUS = 0.1
PGD = dict(name="pgd", steps=20, step_size=0.005, start="clean")
FGSM = dict(name="fgsm")
SQUARE = dict(name="square", queries=100)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """80 grey images of 8 x 8 pixels: more than a batch, and not a multiple of one."""
    rng = np.random.default_rng(0)
    label = np.arange(80) % 2
    noise = rng.uniform(-0.1, 0.1, (80, 8, 8, 1))
    noise -= noise.mean(axis=(1, 2, 3), keepdims=True)
    mean = 0.5 + (2 * label - 1) * OFF[np.arange(80) // 2 % 10]
    image = (mean[:, None, None, None] + noise).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "greys.npz"
    np.savez(path, train_image=image, train_label=label, test_image=image, test_label=label,
             class_names=["dark", "bright", "neither"])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def experiment_of(file):
    """Of a model that is one function `(key, image) -> logits [3]`, and of some attacks."""
    scope: dict[str, Any] = {}
    exec(commands.CONFIG, scope)
    plain = tree.plain(scope["get_config"]())
    plain["data"] = dict(name=f"arrays:{file}")
    plain["validation"] = None
    plain["parallel"] = dict(devices=1)
    plain["network"] = dict(name="cnn", widths=(4,), hidden=4)

    def made(function=None, *changes, random=False, **columns):
        spec = dict(attacks=columns or dict(pgd=PGD), batch_size=64)
        built = build.experiment(tree.changed({**plain, "evaluation": spec}, changes))
        if function is not None:
            built = built._replace(network=network_of(function, random))
        return built

    return made


def network_of(function, random=False):
    def apply(variables, images, train=False, axis_name=None, keys=None):
        keys = jax.random.split(jax.random.key(7), len(images)) if keys is None else keys
        return jax.vmap(function)(keys, images), {}

    return Network(lambda key, images: {"params": {}}, apply, 3, random)


def logits_of(brightness):
    """Dark, bright, and a class that no image is of."""
    return 10 * jnp.stack([-brightness, brightness, jnp.float32(-2)])


def brightness(image):
    return jnp.mean(image) - 0.5


def sound(key, image):
    return logits_of(brightness(image))


def quantised(key, image):
    """Rounds the mean brightness, so that it hardly ever changes."""
    return logits_of(jnp.round(250 * brightness(image)) / 250)


def detached(key, image):
    return logits_of(jax.lax.stop_gradient(brightness(image)))


def told(experiment, folder):
    """The row for people and the record, of an evaluation without trained weights."""
    row, _ = evaluate.evaluate(experiment, {"params": {}}, folder, "model", 0)
    return row, json.loads((folder / "evaluation.json").read_text())


def planned(experiment):
    """The evaluation of an experiment, without trained weights."""
    return evaluating.evaluation_of(experiment, {"params": {}}, "model")


def failing(checks):
    return {check["name"] for check in checks if not check["passed"]}


def of_the_model(experiment):
    found = audit.of_the_model(probe.look(planned(experiment)))
    return failing(check._asdict() for check in found)


# --- What is refused --------------------------------------------------------------------------

IMAGES = np.random.default_rng(1).uniform(size=(12, 8, 8, 1)).astype(np.float32)


def noisy(key, image):
    return sound(key, image) + 0.1 * jax.random.normal(key, (3,))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda key, image: jax.nn.softmax(sound(key, image)), "probabilities"),
        (lambda key, image: jax.nn.one_hot(jnp.argmax(sound(key, image)), 3), "probabilities"),
        (lambda key, image: sound(key, image) * jnp.inf, "not finite"),
        (noisy, "draws at random and does not say so"),
    ],
    ids=["softmax", "labels", "infinite", "silent draws"],
)
def test_models_that_are_certainly_wrong_are_refused(function, message):
    with pytest.raises(UsageError, match=message):
        sanity.refuse(network_of(function), {}, IMAGES)


@pytest.mark.parametrize(
    ("function", "random"),
    [
        (sound, False),
        (quantised, False),
        (lambda key, image: jax.nn.log_softmax(sound(key, image)), False),
        (lambda key, image: jnp.float32(sound(key, image.astype(jnp.bfloat16))), False),
        (lambda key, image: jnp.zeros(3), False),
        (noisy, True),
    ],
    ids=["logits", "quantised", "log-probabilities", "bfloat16", "constant", "said draws"],
)
def test_others_are_not_refused(function, random):
    sanity.refuse(network_of(function, random), {}, IMAGES)


def test_one_draw_for_a_whole_batch_is_not_refused():
    """As RAIN's authors shift: what an image is given does not turn on what its neighbours are."""

    def first_draws(variables, images, train=False, axis_name=None, keys=None):
        together = jnp.broadcast_to(keys[0], len(images))
        return jax.vmap(noisy)(together, images), {}

    sanity.refuse(network_of(noisy, True)._replace(apply=first_draws), {}, IMAGES)


def test_a_model_in_training_mode_is_refused(experiment_of):
    experiment = experiment_of(None, ("network.batch_norm", True))
    network = experiment.network
    variables = drawn.of(network, IMAGES.shape[1:])

    def training(variables, images, train=False, axis_name=None, keys=None):
        return network.apply(variables, images, True, axis_name, keys)

    sanity.refuse(network, variables, IMAGES)
    with pytest.raises(UsageError, match="expected a model in evaluation mode"):
        sanity.refuse(network._replace(apply=training), variables, IMAGES)


@pytest.mark.parametrize(
    "changes",
    [(), [("evaluation.attacks.pgd", None), ("evaluation.ladder", dict(steps=2, restarts=1))]],
)
def test_a_refusal_comes_before_anything_is_measured(experiment_of, tmp_path, changes):
    experiment = experiment_of(lambda key, image: jax.nn.softmax(sound(key, image)), *changes)
    assert (experiment.ladder is None) == (not changes)
    with pytest.raises(UsageError, match="probabilities"):
        told(experiment, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image * 255, "divide by 255"),
        (lambda image: 2 * image - 1, r"expected \[0, 1\]"),
        (lambda image: np.where(image > 0.6, np.nan, image), r"expected \[0, 1\]"),
        (lambda image: np.round(255 * image).astype(np.int32), "expected uint8, or floats"),
    ],
    ids=["0 to 255", "-1 to 1", "NaN", "int32"],
)
def test_images_outside_their_range_are_refused(experiment_of, file, tmp_path, change, message):
    with np.load(file) as arrays:
        changed = {k: change(v) if k.endswith("image") else v for k, v in arrays.items()}
    np.savez(tmp_path / "changed.npz", **changed)
    with pytest.raises(UsageError, match=message):
        experiment_of(None, ("data.name", f"arrays:{tmp_path / 'changed.npz'}"))


@pytest.mark.parametrize(
    "change",
    [
        ("threat.radius", 8),
        ("evaluation.attacks.pgd.step_size", 2),
        ("evaluation.attacks.pgd.radius", 8.0),
        ("threat.radius", -0.1),
    ],
)
def test_levels_in_the_place_of_pixel_values_are_refused(experiment_of, change):
    with pytest.raises(UsageError, match=r"/255\?" if change[1] > 0 else "expected a number in"):
        experiment_of(None, change)
    experiment_of(None, (change[0], abs(change[1]) / 255))


# --- What is flagged --------------------------------------------------------------------------

EASY = {"fgsm": FGSM, "pgd": PGD, "square": SQUARE, "noise": dict(name="noise")}
# Much weaker than PGD; with settings of its own it is another attack and not a longer one.
TIMID = {**PGD, "loss": "margin", "steps": 40, "step_size": 1e-4}


def test_a_sound_evaluation_has_no_flag(experiment_of, tmp_path):
    distances = ("evaluation.distances.fmn", dict(name="fmn", steps=30))
    row, record = told(experiment_of(sound, distances, timid=TIMID, **EASY), tmp_path)
    names = {check["name"] for check in record["checks"]}
    assert failing(record["checks"]) == set()
    assert not record["flagged"]
    assert not row.flagged
    assert {f"{t} finds little that gradients did not" for t in ("square", "noise")} <= names
    assert {"pgd changes images", "more steps than fgsm takes do not weaken the attack"} <= names
    assert {f"{t} finds little that this evaluation did not" for t in ("PGD-40", "fmn")} <= names
    assert "!" not in report.results_table([row])
    # Half of the images are nearer to the other class than the radius.
    assert record["worst_case"]["accuracy"] == pytest.approx(np.mean(OFF > RADIUS))


@pytest.mark.parametrize(
    ("through", "flagged"),
    [(None, True), ("gray", True), ("mean+cubic", False)],
)
def test_a_defence_is_flagged_whose_surrogates_nobody_climbs(
    experiment_of, tmp_path, through, flagged
):
    experiment = experiment_of(sound)
    straight = network_of(sound)
    experiment = experiment._replace(
        columns={
            **experiment.columns,
            "other": experiment.columns["pgd"]._replace(through=through),
        },
        assembly=experiment.assembly._replace(
            through=lambda form: straight, forms=("classifier", "cubic", "gray")
        ),
    )
    _, record = told(experiment, tmp_path)
    name = "some attack goes through a surrogate of the defence"
    assert failing(record["checks"]) == ({name} if flagged else set())
    assert name in {check["name"] for check in record["checks"]}


def test_a_quantised_model_is_flagged_wherever_its_number_stands(experiment_of, tmp_path):
    """Its gradient is zero: what asks for logits alone, or climbs another model, does better."""
    experiment = experiment_of(quantised, **EASY)
    straight = network_of(sound)
    experiment = experiment._replace(
        columns={
            **experiment.columns,
            "other": experiment.columns["pgd"]._replace(through="classifier"),
        },
        assembly=experiment.assembly._replace(through=lambda form: straight),
    )
    row, record = told(experiment, tmp_path)
    found = failing(record["checks"])
    assert {
        "images have gradients",
        "next to nothing stands far away",
        "square finds little that gradients did not",
        "other finds little that gradients did not",
        "pgd changes images",
        "fgsm changes images",
        "the margin rises",
    } <= found
    assert record["flagged"]
    table = report.results_table([row])
    assert f"{report.percent(row.columns['pgd'])} !" in table
    assert all("!" not in line for line in table.splitlines() if line.startswith("clean"))
    assert "model: FLAG, does not hold: images have gradients (80 of 80 images without)" in table


def test_gradients_that_are_not_there_or_not_numbers_are_flagged(experiment_of):
    def unguarded(key, image):
        nothing = image - jax.lax.stop_gradient(image)
        return logits_of(brightness(image) + jnp.sqrt(jnp.sum(nothing**2)))

    assert of_the_model(experiment_of(sound)) == set()
    assert "images have gradients" in of_the_model(experiment_of(detached))
    assert "gradients are finite" in of_the_model(experiment_of(unguarded))


def test_a_model_that_no_longer_answers_far_away_is_flagged(experiment_of):
    """As if a larger radius made images safer: its gradient is gone where pixels are noisy."""

    def detecting(key, image):
        seen = brightness(image)
        found = jnp.std(jax.lax.stop_gradient(image)) > 0.1
        return logits_of(jnp.where(found, jax.lax.stop_gradient(seen), seen))

    found = of_the_model(experiment_of(detecting))
    assert found == {
        "a larger radius does not weaken the attack", "next to nothing stands far away"
    }  # fmt: skip


def test_one_step_that_beats_many_is_flagged(experiment_of, tmp_path):
    """On a rippled slope small steps come to rest on the first crest; a long one flies over it."""

    def rippled(key, image):
        seen = brightness(image)
        return logits_of(seen + 0.01 * jnp.sin(2 * jnp.pi * (seen - 0.01) / 0.02))

    _, record = told(experiment_of(rippled, fgsm=FGSM, pgd=PGD), tmp_path)
    assert "more steps than fgsm takes do not weaken the attack" in failing(record["checks"])


def test_of_one_attack_longer_runs_are_not_weaker(experiment_of, tmp_path):
    """Steps that are too short for their number."""
    columns = dict(pgd=PGD, pgd40={**PGD, "steps": 40, "step_size": 1e-4})
    _, record = told(experiment_of(sound, **columns), tmp_path)
    assert failing(record["checks"]) == {"more steps than pgd takes do not weaken the attack"}


def test_an_attack_that_finds_less_than_a_short_one_is_flagged(experiment_of, tmp_path):
    """Cross-entropy of huge logits is zero in float32, and so is its gradient; the margin's not."""

    def confident(key, image):
        return 1e6 * sound(key, image)

    distances = ("evaluation.distances.fmn", dict(name="fmn", steps=30))
    _, record = told(experiment_of(confident, distances, pgd={**PGD, "start": "uniform"}), tmp_path)
    assert {
        f"{title} finds little that this evaluation did not" for title in ("PGD-40", "fmn")
    } <= failing(record["checks"])


def test_an_attack_that_leaves_the_threat_is_flagged(experiment_of, tmp_path):
    """Its images count as unbroken, so that the model looks as good as on clean ones."""
    experiment = experiment_of(sound, pgd=PGD, fgsm=FGSM)
    wide = experiment.threat._replace(radius=2 * experiment.threat.radius)
    given = experiment.columns["pgd"]._replace(attack=attacks.pgd(wide, steps=5, step_size=1.0))
    row, record = told(experiment._replace(columns={**experiment.columns, "pgd": given}), tmp_path)
    assert record["attacks"]["pgd"]["outside_the_threat"] > 0
    assert "pgd keeps to the threat" in failing(record["checks"])
    assert "fgsm keeps to the threat" not in failing(record["checks"])
    assert any(note.startswith("FLAG, does not hold: pgd keeps to") for note in row.notes)


def test_an_attack_that_descends_is_flagged(experiment_of, tmp_path):
    def turned(key, image):
        seen = brightness(image)
        return logits_of(2 * jax.lax.stop_gradient(seen) - seen)

    _, record = told(experiment_of(turned, fgsm=FGSM), tmp_path)
    assert "the margin rises" in failing(record["checks"])


# --- Random models ----------------------------------------------------------------------------

EOT = dict(name="eot", draws=10)


def shaken(key, image):
    """A slope of either sign, the right one on average."""
    return logits_of(brightness(image) * (1 + jax.random.normal(key, ())))


def test_a_random_model_that_is_attacked_as_one_has_no_flag(experiment_of, tmp_path):
    columns = {"pgd": {**PGD, "estimator": EOT}, "noise": dict(name="noise")}
    experiment = experiment_of(shaken, ("evaluation.draws", 20), random=True, **columns)
    _, record = told(experiment, tmp_path)
    assert failing(record["checks"]) == set()
    assert "a random model is judged by several draws" in {c["name"] for c in record["checks"]}


@pytest.mark.parametrize(
    ("draws", "estimator", "flagged"),
    [
        (20, EOT, set()),
        (20, "eot", set()),
        (1, EOT, {"a random model is judged by several draws"}),
        (20, None, {"a random model is attacked over several draws"}),
        (20, dict(name="eot", draws=1), {"a random model is attacked over several draws"}),
    ],
)
def test_one_draw_of_a_random_model_is_flagged(experiment_of, draws, estimator, flagged):
    columns = {"pgd": {**PGD, "estimator": estimator}}
    experiment = experiment_of(shaken, ("evaluation.draws", draws), random=True, **columns)
    assert failing(c._asdict() for c in audit.of_the_rules(planned(experiment))) == flagged
    # Of a fixed model one draw tells all.
    fixed = experiment._replace(network=network_of(sound))
    assert failing(c._asdict() for c in audit.of_the_rules(planned(fixed))) == set()


def test_the_suite_for_random_models_takes_its_draws(experiment_of):
    suite = ("evaluation.suite", dict(name="rand", steps=2, draws=4))
    experiment = experiment_of(shaken, suite, ("evaluation.draws", 20), random=True)
    assert failing(c._asdict() for c in audit.of_the_rules(planned(experiment))) == set()


# --- What the checks know ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "radius", "flagged"),
    [
        ("linf", 8 / 255, False),
        ("linf", 8 / 255 / 255, True),
        ("linf", 0.0, False),
        ("l2", 0.5, False),
        ("l2", 2 / 255, True),
        ("l1", 2 / 255, False),
    ],
)
def test_a_radius_that_rounding_exceeds_is_flagged(experiment_of, norm, radius, flagged):
    experiment = experiment_of(None, ("threat.norm", norm), ("threat.radius", radius))
    found = failing(c._asdict() for c in audit.of_the_rules(planned(experiment)))
    assert found == ({"the radius is more than rounding to 8 bits"} if flagged else set())


@pytest.mark.parametrize(
    ("norm", "radius", "flagged"),
    [("linf", 0.3, False), ("linf", 0.5, True), ("l2", 0.5, False), ("l2", 127.5, True),
     ("l1", 12.0, False), ("l1", 3060.0, True)],
)  # fmt: skip
def test_a_radius_of_levels_in_other_norms_is_flagged(experiment_of, norm, radius, flagged):
    experiment = experiment_of(None, ("threat.norm", norm), ("threat.radius", radius))
    found = failing(c._asdict() for c in audit.of_the_rules(planned(experiment)))
    assert found == ({"no image is as good as any other"} if flagged else set())


@pytest.mark.parametrize(
    ("norm", "radius", "radii"),
    [
        ("linf", 0.1, (0.1, 0.2, 0.5)),
        ("linf", 0.3, (0.3, 0.5)),
        ("linf", 0.5, (0.5,)),
        ("l2", 0.5, (0.5, 1.0, 4.0)),
        ("l1", 3.0, (3.0, 6.0, 32.0)),
        ("linf", 0.0, (0.0, 0.5)),
    ],
)
def test_far_is_where_every_image_can_be_made_grey(experiment_of, norm, radius, radii):
    threat = experiment_of(None, ("threat.norm", norm), ("threat.radius", radius)).threat
    found = probe._radii(threat, (8, 8, 1))
    assert found == pytest.approx(radii)
    grey = np.full((8, 8, 1), 0.5, np.float32)
    assert threat.norm.measure(grey) <= found[-1] * (1 + 1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_in_other_norms_a_sound_model_has_no_flag(experiment_of, norm):
    # The nearest image of the other class is 8 or 64 times as far away as in L-inf.
    radius = {"l2": 0.8, "l1": 6.4}[norm]
    experiment = experiment_of(sound, ("threat.norm", norm), ("threat.radius", radius))
    assert of_the_model(experiment) == set()


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (PGD, "white"),
        (FGSM, "white"),
        (SQUARE, "black"),
        (dict(name="nes", steps=2), "black"),
        ({**PGD, "estimator": "spsa"}, "black"),
        ({**PGD, "estimator": EOT}, "white"),
        ({**PGD, "through": "run:elsewhere"}, "transfer"),
    ],
)
def test_which_attacks_see_gradients(experiment_of, column, kind):
    assert audit.kind_of(planned(experiment_of(None, column=column)).columns["column"]) == kind


@pytest.mark.parametrize(
    ("form", "kind"),
    [("classifier", "transfer"), ("gray", "transfer"), ("gray+mean", "transfer"),
     ("identity", "white"), ("mean", "white")],
)  # fmt: skip
def test_forms_that_are_not_the_model_are_transfer(experiment_of, form, kind):
    experiment = experiment_of(None)
    look = experiment.columns["pgd"]._replace(through=form)
    assert audit.kind_of(planned(experiment._replace(columns={"pgd": look})).columns["pgd"]) == kind


@pytest.mark.parametrize("share", [audit._BLIND, audit.SILENT, audit.LEFT, audit._UNCHANGED])
@pytest.mark.parametrize("images", [10, 50, 128, 1000, 10_000])
def test_false_alarms_are_rare_at_any_size(images, share):
    hits = np.arange(images + 1)
    flagged = np.array([audit._surely_more(int(h), images, share) for h in hits])
    assert np.sum(stats.binom.pmf(hits[flagged], images, share)) <= audit._ALARM
    # And what is three times as much is found where there are images enough.
    assert flagged[-1]
    if images * share >= 20:
        assert np.sum(stats.binom.pmf(hits[flagged], images, 3 * share)) > 0.99


def test_what_is_seen_does_not_turn_on_the_batches(experiment_of):
    """Nor does the number of programs turn on them, or on the radii."""
    calls = []

    def counted(key, image):
        calls.append(1)
        return sound(key, image)

    seen = []
    for size in (64, 33):
        calls.clear()
        seen_now = probe.look(planned(experiment_of(counted, ("evaluation.batch_size", size))))
        seen.append((seen_now, len(calls)))
    (whole, traced), (parts, again) = seen
    assert traced == again
    assert whole.slopes.length.shape == (80,)
    np.testing.assert_allclose(whole.slopes.length, parts.slopes.length, rtol=1e-5)
    np.testing.assert_array_equal(whole.share, parts.share)


def test_nothing_is_said_where_nothing_was_asked(experiment_of, tmp_path):
    row, record = told(experiment_of(quantised, ("evaluation.checks", False)), tmp_path)
    assert record["checks"] == []
    assert not row.flagged


def test_at_radius_zero_attacks_are_not_to_blame(experiment_of, tmp_path):
    _, record = told(experiment_of(sound, ("threat.radius", 0.0), pgd=PGD), tmp_path)
    assert failing(record["checks"]) == set()
