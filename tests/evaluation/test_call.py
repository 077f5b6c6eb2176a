"""Any model in one call: the same verdicts as attack and judge by hand, and what is refused."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rain_jax
from rain_jax.attacks import noise, pgd, square
from rain_jax.attacks.suites import standard
from rain_jax.checks import UsageError
from rain_jax.evaluation import Rules, judge, judging, key_of, packed, resume, standing
from rain_jax.norms import l2, linf
from rain_jax.parallel import choose_devices, place
from rain_jax.types import Batch, Model, Threat

evaluate = functools.partial(rain_jax.evaluate, checks=False)
THREAT = Threat(l2, 0.4)
DRAW = np.random.default_rng(2)
WEIGHTS = DRAW.normal(size=(60, 3)).astype(np.float32)
IMAGES = np.random.default_rng(0).integers(0, 256, (37, 6, 5, 2)).astype(np.uint8)


def logits(weights, key, image):
    return 2 * jnp.tanh(jnp.sum(image.reshape(-1, 1) * weights, axis=0))


MODEL = Model(logits, WEIGHTS)


def of(function, random=False):
    """The model of a function of weights, key and image."""
    return Model(function, WEIGHTS, random)


LABELS = np.array([np.argmax(np.sum(x.reshape(-1, 1) * WEIGHTS, axis=0)) for x in IMAGES / 255])
LABELS[:5] = (LABELS[:5] + 1) % 3  # five that it is wrong about
ATTACKS = {"noise": noise(THREAT), "pgd": pgd(THREAT, steps=10)}


@pytest.fixture(scope="module")
def by_hand():
    """PGD on every image by itself, with the keys that an image has in its column."""
    root = key_of(jax.random.key(4), "pgd")

    @jax.jit
    def one(key, image, label):
        attack_key, judge_key = jax.random.split(key)
        known = lambda k, x: logits(WEIGHTS, k, x)
        found = ATTACKS["pgd"](attack_key, known, image, label)
        return judge(known, Rules(THREAT), judge_key, image, found, label)[0][0]

    images = IMAGES * np.float32(1 / 255)
    triples = zip(images, LABELS, range(len(LABELS)), strict=True)
    return np.array([bool(one(jax.random.fold_in(root, i), x, y)) for x, y, i in triples])


@pytest.mark.parametrize(("batch_size", "devices"), [(256, 1), (8, 2), (5, 1)])
@pytest.mark.parametrize("as_floats", [False, True])
def test_images_are_robust_that_are_so_by_hand(batch_size, devices, as_floats, by_hand):
    images = IMAGES * np.float32(1 / 255) if as_floats else IMAGES
    on = place("shard_map", choose_devices(devices))
    result = evaluate(
        MODEL, images, LABELS.astype(np.int64), THREAT, ATTACKS,
        key=jax.random.key(4), batch_size=batch_size, devices=on, progress=False,
    )  # fmt: skip
    robust = result.robust
    assert list(robust) == ["clean", "noise", "pgd"]
    np.testing.assert_array_equal(robust["clean"], np.arange(len(LABELS)) >= 5)
    assert not np.any(robust["noise"] & ~robust["clean"])
    np.testing.assert_array_equal(robust["pgd"], robust["noise"] & by_hand)
    assert 3 < np.sum(robust["pgd"]) < np.sum(robust["clean"]) - 3
    assert result.clean_accuracy == np.mean(robust["clean"])
    assert result.robust_accuracy == result.accuracy["pgd"] == np.mean(robust["pgd"])


@pytest.fixture(scope="module")
def result():
    return evaluate(MODEL, IMAGES, LABELS, THREAT, ATTACKS, devices=place(), progress=False)


def test_its_images_are_what_misled_the_model(result):
    images, robust = result.adversarial_images, result.robust["pgd"]
    clean = IMAGES * np.float32(1 / 255)
    np.testing.assert_allclose(images[robust], clean[robust], atol=1e-7)
    predicted = np.argmax(np.sum(images.reshape(37, -1, 1) * WEIGHTS, axis=1), axis=1)
    np.testing.assert_array_equal(predicted == LABELS, robust)
    assert np.all(result.distances <= 0.4 * (1 + 1e-5))
    np.testing.assert_array_equal(result.distances > 0, ~robust & result.robust["clean"])


def test_each_attack_has_its_images_and_its_cost(result):
    found = result.misclassified
    np.testing.assert_array_equal(found["clean"], ~result.robust["clean"])
    assert not np.any(found["pgd"] & ~result.robust["noise"])
    np.testing.assert_array_equal(result.robust["pgd"], result.robust["noise"] & ~found["pgd"])
    # The judge asks once about each image that is attacked, noise nothing, and PGD in every step.
    given = np.sum(result.robust["clean"]) + np.sum(result.robust["noise"])
    assert result.passes.forward >= 37 + given + 1
    assert 0 < result.passes.backward <= 10 * np.sum(result.robust["noise"])
    assert result.warnings == ()


def test_it_is_shown_as_a_table(result):
    text, page = str(result), result._repr_html_()
    *_, last, note = text.splitlines()
    assert f" {100 * result.robust_accuracy:.1f} [" in last
    assert note == "no checks were made (checks=False)"
    assert "per cent correct of 37 images, 95 % intervals; l2 radius 0.4" in text
    assert repr(result) == text
    assert page.count("<tr>") == 4
    assert f"<td>{100 * result.robust_accuracy:.1f} [" in page


def test_without_a_cascade_every_attack_gets_every_image():
    result = evaluate(MODEL, IMAGES, LABELS, THREAT, ATTACKS, cascade=False, progress=False)
    assert len(result.run.columns["pgd"].judgement.index) == 37
    robust = result.robust
    assert list(robust) == ["clean", "noise", "pgd"]
    np.testing.assert_array_equal(robust["pgd"], robust["noise"] & ~result.misclassified["pgd"])


def test_the_same_call_compiles_nothing():
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event)
    attack = lambda: pgd(THREAT, steps=11)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        given = dict(progress=False, checks=True)
        first = evaluate(MODEL, IMAGES, LABELS, THREAT, attack(), **given)
        assert [event for event in compiled if event.endswith("backend_compile_duration")]
        compiled.clear()
        again = evaluate(MODEL, IMAGES, LABELS, THREAT, attack(), **given)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if event.endswith("backend_compile_duration")]
    np.testing.assert_array_equal(again.robust["attack"], first.robust["attack"])


def test_killed_it_goes_on_and_ends_with_the_same_result(tmp_path, monkeypatch, result):
    class Killed(Exception):
        pass

    write = resume.Pages.write

    def write_and_stop(self, number, block):
        write(self, number, block)
        if self._folder.name.startswith("noise"):
            raise Killed

    given = MODEL, IMAGES, LABELS, THREAT, ATTACKS
    with monkeypatch.context() as patch:
        patch.setattr(resume.Pages, "write", write_and_stop)
        with pytest.raises(Killed):
            evaluate(*given, folder=tmp_path, progress=False)
    read, seen = [], resume.Pages.read

    def read_and_tell(self, number):
        read.append(self._folder.name.split(".")[0])
        return seen(self, number)

    monkeypatch.setattr(resume.Pages, "read", read_and_tell)
    again = evaluate(*given, folder=tmp_path, progress=False)
    assert read == ["clean", "noise"]
    np.testing.assert_array_equal(again.robust["pgd"], result.robust["pgd"])
    np.testing.assert_array_equal(again.adversarial_images, result.adversarial_images)
    left = {"evaluation.json", "verdicts.npz", "adversarial.npy"}
    assert {path.name for path in tmp_path.iterdir()} == left  # what was kept has served
    before = (tmp_path / "evaluation.json").read_bytes()
    # Other attacks of the same names, weights, labels and programs are no such call.
    label = np.where(np.arange(37) == 20, (LABELS + 1) % 3, LABELS)
    for changed in (
        (*given[:4], {"noise": ATTACKS["pgd"], "pgd": ATTACKS["noise"]}),
        (Model(logits, WEIGHTS[:, ::-1]), *given[1:]),
        (*given[:2], label, *given[3:]),
        (Model(lambda w, k, x: logits(jax.lax.stop_gradient(w), k, x), WEIGHTS), *given[1:]),
    ):
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(resume.Pages, "write", write_and_stop)
            with pytest.raises(Killed):
                evaluate(*given, folder=tmp_path, progress=False)
        with pytest.raises(UsageError, match="the record of another evaluation: name another"):
            evaluate(*changed, folder=tmp_path, progress=False)
        assert (tmp_path / "evaluation.json").read_bytes() == before
        evaluate(*changed, folder=tmp_path, replace=True, progress=False)
        assert "noise" not in read
        evaluate(*given, folder=tmp_path, replace=True, progress=False)
        before = (tmp_path / "evaluation.json").read_bytes()


def test_the_record_says_what_the_result_does(tmp_path):
    attacks = {"noise": ATTACKS["noise"], "far": pgd(THREAT._replace(radius=1.0), steps=2)}
    with pytest.warns(UserWarning, match="outside of the threat"):
        result = evaluate(
            MODEL, IMAGES, LABELS, THREAT, attacks, folder=tmp_path / "new", progress=False
        )
    record = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert record["model"] == result.name
    assert record["images"] == len(LABELS)
    assert record["threat"]["radius"] == pytest.approx(THREAT.radius)
    assert record["clean"]["accuracy"] == pytest.approx(result.clean_accuracy)
    assert record["worst_case"]["accuracy"] == pytest.approx(result.robust_accuracy)
    for title in attacks:
        assert record["attacks"][title]["accuracy"] == pytest.approx(result.accuracy[title])
    assert record["attacks"]["far"]["settings"] == {"steps": 2, "uses": "gradient", "draws": 1}
    assert record["attacks"]["far"]["outside_the_threat"] > 0
    assert record["flagged"]
    assert record["warnings"] == list(result.warnings)
    images = np.load(tmp_path / "new" / "adversarial.npy")
    with np.load(tmp_path / "new" / "verdicts.npz") as verdicts:
        place = verdicts["adversarial/index"]
        np.testing.assert_array_equal(verdicts["broken_by"], result.run.broken_by)
    np.testing.assert_array_equal(images, result.adversarial_images[place])
    others = np.setdiff1d(np.arange(len(LABELS)), place)
    np.testing.assert_array_equal(result.adversarial_images[others], result.clean[others])


def test_checks_are_made_told_and_recorded(tmp_path):
    attacks = {"pgd": pgd(THREAT, steps=10), "square": square(THREAT, queries=200)}
    given = dict(checks=True, cascade=False, progress=False)
    sound = evaluate(MODEL, IMAGES, LABELS, THREAT, attacks, **given)
    assert {check.name for check in sound.checks if not check.passed} == set()
    assert {"images have gradients", "square finds little that gradients did not"} <= {
        check.name for check in sound.checks
    }
    assert "!" not in str(sound)

    def detached(weights, key, image):
        return logits(weights, key, jax.lax.stop_gradient(image))

    blind = evaluate(
        Model(detached, WEIGHTS), IMAGES, LABELS, THREAT, attacks, folder=tmp_path, **given
    )
    failed = {check.name for check in blind.checks if not check.passed}
    assert {"images have gradients", "square finds little that gradients did not"} <= failed
    for text in (str(blind), blind._repr_html_()):
        assert "FLAG, does not hold: images have gradients" in text
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["flagged"]
    assert {check["name"] for check in record["checks"] if not check["passed"]} == failed
    assert "no checks were made" in str(evaluate(MODEL, IMAGES, LABELS, THREAT, attacks["pgd"],
                                                 progress=False))  # fmt: skip


def test_a_suite_leaves_no_more_than_its_first_attack():
    threat = Threat(linf, 0.02)
    suite = standard(threat, steps=5, queries=10)
    result = evaluate(MODEL, IMAGES, LABELS, threat, suite, progress=False)
    counts = [int(np.sum(robust)) for robust in result.robust.values()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(LABELS) - 5 > counts[-1]


def test_a_model_that_draws_is_attacked_to_the_end():
    """It is robust where its mean is: one unlucky draw is no reason to stop."""

    def noisy(weights, key, image):
        return logits(weights, key, image) + jax.random.normal(key, (3,))

    threat = Threat(l2, 0.25)
    attack = pgd(threat, steps=10)
    on = place("shard_map", choose_devices(1))
    root = jax.random.key(1)
    result = evaluate(
        of(noisy, random=True), IMAGES, LABELS, threat, {"pgd": attack},
        key=root, draws=200, devices=on, progress=False,
    )  # fmt: skip
    clean, after = (result.run.columns[name].judgement for name in ("clean", "pgd"))
    # Every image is attacked that some draw gets right, also where the mean does not.
    np.testing.assert_array_equal(after.index, np.flatnonzero(clean.share > 0))
    assert np.sum(clean.right) < len(after.index)
    # What is counted is the share of the draws, of which those that were not attacked have none.
    share = np.zeros(37, np.float32)
    share[after.index] = after.share
    np.testing.assert_allclose(result.robust["pgd"], share)
    assert result.robust_accuracy == pytest.approx(np.mean(share), abs=1e-6)

    def left(early):
        of = lambda weights: lambda key, image: noisy(weights, key, image)
        batch = Batch(IMAGES, LABELS.astype(np.int32), np.arange(37, dtype=np.int32),
                      clean.share > 0)  # fmt: skip
        own = key_of(root, "pgd")
        found = packed(attack, of, on, batch_size=37, early=early)(WEIGHTS, own, [batch])
        judge_all = judging(of, Rules(threat, 200), on, batch_size=37)
        return sum(int(np.sum(standing(v.judgement))) for v in judge_all(WEIGHTS, own, found))

    assert np.sum(standing(after)) == left(early=False) < left(early=True)


def test_keys_of_any_kind_will_do():
    for impl in ("threefry2x32", "rbg"):  # one after the other, whose programs are kept
        own = {"key": jax.random.key(0, impl=impl), "progress": False}
        robust = evaluate(MODEL, IMAGES, LABELS, THREAT, ATTACKS, **own).robust
        assert 3 < np.sum(robust["pgd"]) < np.sum(robust["clean"]) - 3


REFUSED = [
    (dict(threat=Threat(linf, -1.0)), r"threat.radius=-1.0"),
    (dict(threat=Threat(linf, 8.0)), r"threat.radius=8: expected .* did you mean 8 / 255"),
    (dict(threat=Threat(linf, 1000.0)), r"threat.radius=1000.0"),
    (dict(threat=Threat(linf, float("nan"))), r"threat.radius=nan"),
    (dict(threat=Threat(linf, jnp.float32(8))), r"did you mean 8 / 255"),
    (dict(threat=Threat(l2, float("inf"))), r"threat.radius=inf: expected a distance"),
    (dict(threat=Threat(linf, 0.1, 0.2, 0.8)), r"pixels in \[0, 1\]: expected \[0.2, 0.8\]$"),
    (dict(images=IMAGES[0]), r"images are \[6, 5, 2\]: expected \[N, H, W, C\]"),
    (dict(images=IMAGES[:0], labels=LABELS[:0]), r"images are \[0, 6, 5, 2\]"),
    (dict(images=IMAGES.astype(np.int32)), r"images are int32: expected uint8"),
    (dict(images=IMAGES.astype(np.float32)), r"pixels in \[0, 255\]: expected \[0, 1\]"),
    (dict(images=IMAGES * np.float32("nan")), r"images: 37 of 37 have pixels that are no numbers"),
    (dict(labels=LABELS[:-1]), r"labels are int64 \[36\]: expected whole numbers \[37\]"),
    (dict(labels=LABELS * 1.0), r"labels are float64"),
    (dict(labels=LABELS + 1), r"labels are 1 to 3: expected 0 to 2"),
    (dict(labels=LABELS - 1), r"labels are -1 to 1: expected 0 to 2"),
    (dict(model=of(lambda w, k, x: logits(w, k, x)[None])), r"gives \(1, 3\) for one image"),
    (dict(model=of(lambda w, k, x: (logits(w, k, x),))), r"gives tuple for one image"),
    (dict(model=of(logits, random=True), attacks="standard"), r"expected 'rand' for a model that"),
    (dict(attacks="standart"), r"attacks='standart': .*did you mean 'standard'"),
    (dict(attacks={"clean": noise(THREAT)}), r"another name than 'clean'"),
    (dict(batch_size=0), r"batch_size=0"),
    (dict(draws=0), r"draws=0"),
    (dict(draws=2.5), r"draws=2.5: expected a whole number"),
    (dict(batch_size=8.0), r"batch_size=8.0: expected a whole number"),
    (dict(attacks=[ATTACKS["pgd"]]), r"attacks are a list: expected a suite's name, an attack"),
    (dict(threat=(linf, 0.1)), r"threat=\(.*: expected a Threat"),
    (dict(threat=Threat(linf, "8")), r"threat.radius='8': expected a number"),
    (dict(threat=Threat(linf, None)), r"threat.radius=None: expected a number"),
    (dict(threat=Threat("linf", 0.1)), r"threat.norm='linf': expected rain_jax.norms.linf"),
    (dict(attacks={"pgd": pgd}), r"attacks: pgd is <function pgd .*as pgd\(threat, steps=40\)"),
    (dict(attacks={"pgd": 3}), r"attacks: pgd is 3: expected an attack"),
    (dict(images=[[1], [1, 2]]), r"images and labels: expected arrays"),
    (dict(devices=1), r"devices=1: expected what rain_jax.parallel.place gives"),
    (dict(key=3), r"key=3: expected one as jax.random.key makes it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_would_be_nonsense_is_refused(changes, message):
    given = dict(model=MODEL, attacks=ATTACKS, threat=THREAT, images=IMAGES, labels=LABELS)
    with pytest.raises(UsageError, match=message):
        evaluate(**{**given, **changes})


def told(**changes):
    """What a call warns of, and its result."""
    given = dict(model=MODEL, attacks=ATTACKS, threat=THREAT, images=IMAGES, labels=LABELS,
                 progress=False)  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = evaluate(**{**given, **changes})
    messages = [str(one.message) for one in said if one.category is UserWarning]
    assert list(result.warnings) == messages
    assert all(f"! {message}" in str(result) for message in messages)
    return messages, result


def NOISY(w, k, x):
    return logits(w, k, x) + jax.random.normal(k)


def HOLLOW(w, k, x):
    """The usual mistake: the branch that is not taken has no finite slope."""
    pixel = x[0, 0, 0] - x[0, 0, 0]
    return logits(w, k, x) + jnp.where(pixel > 0, jnp.sqrt(pixel), 0.0)


FAR = {"pgd": pgd(Threat(l2, 5.0), steps=10)}
SAID = [
    (dict(), ""),
    (dict(attacks=FAR), "pgd: 32 of 32 images are outside of the threat and count as correct"),
    (dict(attacks={"own": lambda key, of, x, y: x * jnp.nan}), "own: 32 of 32 images are outside"),
    (dict(model=of(lambda w, k, x: jax.nn.softmax(logits(w, k, x)))), "give probabilities"),
    (dict(model=of(lambda w, k, x: logits(w, k, x) * jnp.nan)), "logits are not finite"),
    (dict(model=of(lambda w, k, x: logits(w, k, x) + jax.random.normal(k))), "random=True"),
    (dict(model=of(NOISY, random=True), draws=1), "draws=20"),
    (dict(model=of(NOISY, random=True), draws=3), ""),
    (dict(model=of(lambda w, k, x: jnp.round(logits(w, k, x)))), "have no gradient"),
    (dict(model=of(HOLLOW)), "gradients of 4 of the first 4 images are not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SAID, ids=[m for _, m in SAID])
def test_what_would_pass_for_robustness_is_said(changes, message):
    said, _ = told(**changes)
    assert len(said) == bool(message)
    assert all(message in one for one in said)


def test_an_image_without_an_answer_is_kept():
    """Beyond a brightness the model gives no numbers, which the judge calls wrong."""

    def breaks(weights, key, image):
        bright = jnp.mean(image) - 0.5
        return jnp.where(bright > 0.02, jnp.nan, jnp.stack([bright - 1, 0.0 * bright, -9.0]))

    threat = Threat(linf, 0.05)
    images = np.full((3, 6, 5, 2), 0.49, np.float32)
    own = dict(model=of(breaks), threat=threat, images=images, labels=np.ones(3, int))
    attack = pgd(threat, steps=10, step_size=0.02, start="clean")
    robust = told(**own, attacks={"pgd": attack})[1].robust
    assert np.all(robust["clean"])
    assert not np.any(robust["pgd"])


def test_images_can_be_judged_as_if_they_had_been_saved():
    """A model that is sure of whole levels alone, which rounding gives it back."""

    def levels(weights, key, image):
        return jnp.array([jnp.sum(jnp.cos(2 * jnp.pi * 255 * image)), 0.0])

    threat = Threat(linf, 0.45 / 255)
    own = dict(
        model=of(levels),
        threat=threat,
        labels=0 * LABELS,
        attacks={"pgd": pgd(threat, steps=20, restarts=4)},
    )
    left = [np.sum(told(**own, eight_bit=saved)[1].robust["pgd"]) for saved in (False, True)]
    assert left[0] < 3
    assert left[1] == len(LABELS)


def test_halves_and_bfloat16_are_floats():
    images = IMAGES / np.float32(256)
    for kind in (np.float16, jnp.bfloat16, np.float64):
        said, result = told(images=images.astype(kind))
        np.testing.assert_array_equal(result.robust["pgd"], told(images=images)[1].robust["pgd"])
        assert not said
