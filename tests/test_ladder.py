"""The ladder: its rungs follow from the defence, its sweep is one program, its checks can fail."""

import json
import runpy
from functools import partial
from typing import NamedTuple

import commands
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, evaluate, report, train
from rain_jax import attacks, data, evaluation
from rain_jax.audit import ladder, validity
from rain_jax.checks import UsageError
from rain_jax.config import build, networks, tree
from rain_jax.defences.tables import Statistics
from rain_jax.evaluation import audit, probe, resume
from rain_jax.gradients import eot, exact
from rain_jax.losses import margin
from rain_jax.parallel import choose_devices, image_keys, place
from rain_jax.runs import evaluating, initial_weights, loading
from rain_jax.types import Batch

TINY = dict(steps=2, draws=2, restarts=1, queries=4, answers=2, sweep_draws=(1, 2),
            sweep_steps=(1, 2))  # fmt: skip
RAIN = dict(name="rain", upscaler=dict(name="edsr", blocks=1, width=4, mean=0.5), reach=0.3)
JPEG = dict(name="nn_jpeg", table="fd")
VOTE = dict(key="defence.level", values=(15.0, 60.0))


def experiment_of(tmp_path, *changes, **sections):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    whole["evaluation"] = {"images": 20, "batch_size": 10, "ladder": TINY}
    whole["parallel"]["devices"] = 1
    return build.experiment(tree.changed({**whole, **sections}, changes))


def weights(experiment):
    return drawn.of(experiment.network, experiment.splits.train.shape)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A small run of a network without defence that is over: its folder, and what it learned."""
    folder = tmp_path_factory.mktemp("before")
    plain = tree.plain(experiment_of(folder).config)
    plain["method"], plain["validation"] = {"name": "natural"}, None
    plain["evaluation"] = {"attacks": {"noise": {"name": "noise"}}, "images": 10, "checks": False}
    train.main(tree.changed(plain, [("training.epochs", 0.2)]), folder / "run")
    return folder / "run", loading.restore(build.experiment(plain), folder / "run")[0]


# --- Rungs ------------------------------------------------------------------------------------


def test_a_random_defence_is_attacked_in_expectation_and_through_every_surrogate(tmp_path):
    experiment = experiment_of(tmp_path, defence=RAIN)
    assert experiment.evaluation.draws == 20
    looks = experiment.columns
    assert {"eot_ce", "eot_margin", "apgd", "square", "rays", "transfer", "gray"} <= set(looks)
    for name in ("average", "average_one_shift", "identity"):
        assert looks[name].through == name
    assert looks["transfer"].through == "classifier"
    assert looks["gray"].through == "gray"
    checks = [name for name, look in looks.items() if look.threat is not None]
    assert checks == ["official_pgd", "official_eot", "far"]
    assert looks["official_pgd"].threat.radius == pytest.approx(16 / 255)
    assert looks["far"].threat.radius == pytest.approx(0.5)  # of a radius of 0.1


@pytest.mark.parametrize(
    ("radius", "far"), [(4 / 255, 64 / 255), (8 / 255, 64 / 255), (0.05, 0.4), (0.3, 0.5)]
)
def test_far_away_is_far_of_any_threat(radius, far, tmp_path):
    looks = experiment_of(tmp_path, threat=dict(norm="linf", radius=radius)).columns
    assert looks["far"].threat.radius == pytest.approx(far)


def test_an_official_attack_at_the_threats_own_radius_counts(tmp_path):
    threat = dict(norm="linf", radius=8 / 255)
    looks = experiment_of(tmp_path, defence=RAIN, threat=threat).columns
    checks = [name for name, look in looks.items() if look.threat is not None]
    assert checks == ["official_pgd", "far"]


def test_a_fixed_defence_meets_the_standard_suite_and_its_members_one_by_one(tmp_path):
    experiment = experiment_of(tmp_path, defence=JPEG, ensemble=VOTE)
    assert experiment.evaluation.draws == 1
    looks = experiment.columns
    assert {"apgd_ce", "apgd_t", "fab_t", "cubic", "survivors", "identity"} <= set(looks)
    for name in ("mean", "margins", "member:0", "member:1"):
        assert looks[name].through == name
    assert "eot_ce" not in looks
    assert list(looks)[-3:] == ["square", "rays", "far"]


def test_members_may_differ_in_a_whole_number(tmp_path):
    group = dict(key="defence.quality", values=(80.0, 20.0))
    experiment = experiment_of(tmp_path, defence=dict(name="jpeg"), ensemble=group)
    tables = jax.tree.leaves(weights(experiment)["frozen"])
    assert any(np.shape(leaf)[-2:] == (8, 8) for leaf in tables)
    with pytest.raises(UsageError, match=r"quality=80\.5"):
        half = dict(key="defence.quality", values=(80.5, 20.0))
        experiment_of(tmp_path, defence=dict(name="jpeg"), ensemble=half)


def test_surrogates_can_be_chosen_and_the_run_before_is_what_transfers(tmp_path):
    chosen = experiment_of(tmp_path, ("evaluation.ladder.surrogates", ["identity"]), defence=JPEG)
    assert "identity" in chosen.columns
    assert "cubic" not in chosen.columns
    after = experiment_of(tmp_path, defence=JPEG, start=dict(classifier="runs/before"))
    assert after.columns["transfer"].through == "run:runs/before"
    # Then the fine-tuned classifier without its defence is a rung of its own.
    assert after.columns["gray"].through == "classifier"


def test_other_norms_have_the_rungs_that_exist_there(tmp_path):
    found = experiment_of(tmp_path, defence=JPEG, threat=dict(norm="l2", radius=0.5)).columns
    assert "square" in found
    assert "rays" not in found
    assert found["far"].threat.radius == pytest.approx(4.0)
    found = experiment_of(tmp_path, defence=JPEG, threat=dict(norm="l1", radius=2.0)).columns
    assert "square" not in found
    assert "apgd_ce" not in found


class Spent(NamedTuple):
    """What an attack asks in each step, and its first step on a model of a known slope."""

    steps: int
    passes: float  # of the model, backward where there are such
    begins: str
    size: float  # of the step, in levels of 255
    climbs: str


def spent(look, *, moving=True):
    """What a rung spends; `moving` is whether its steps are all of one size."""
    attack = look.attack
    asked = evaluation.cost(attack, (4, 4, 3), 10).step
    passes = asked.backward or asked.forward
    if not moving:
        return attack.steps, passes

    # Each logit follows a pixel of its own, and class 1 leads: of the slopes of the wrong classes
    # the margin has that one alone, cross-entropy all.
    def logits_fn(key, image):
        return 3.0 * (jnp.arange(10) == 1) + image.ravel()[:10]

    @jax.jit
    def begun(image):
        state = attack.init(jax.random.key(0), logits_fn, image, 0)
        return state.image, attack.step(logits_fn, state).image

    image = np.full((4, 4, 3), 0.5, np.float32)
    first, second = map(np.asarray, begun(image))
    change = np.abs(second - first).reshape(-1, image.size)
    return Spent(
        attack.steps, passes,
        "uniform" if np.any(first != image) else "clean",
        round(255 * float(np.max(change)), 3),
        "margin" if np.all(np.sum(change > 1e-6, axis=1) == 2) else "cross-entropy",
    )  # fmt: skip


CE = "cross-entropy"
# Of a random model at the full budget; a tenth of the radius is 0.8 levels.
RANDOM = {
    "transfer": Spent(40, 1, "uniform", 0.8, CE),
    "gray": Spent(40, 1, "uniform", 0.8, CE),
    "fgsm": Spent(1, 20, "clean", 8.0, CE),
    "pgd": Spent(200, 5, "uniform", 0.4, CE),  # five restarts, without draws
    "eot_ce": Spent(100, 20, "uniform", 0.8, CE),
    "eot_margin": Spent(100, 20, "uniform", 0.8, "margin"),
    "apgd": (100, 2 * 20),  # on cross-entropy and on DLR
    "official_pgd": Spent(40, 1, "clean", 1.0, CE),
    "official_eot": Spent(40, 40, "clean", 2.0, CE),
    "average_one_shift": Spent(100, 20, "uniform", 0.8, "margin"),
    "identity": Spent(100, 20, "uniform", 0.8, "margin"),
    "average": Spent(100, 1, "uniform", 0.8, "margin"),  # draws nothing
    "elsewhere": Spent(100, 20, "uniform", 0.8, "margin"),
    "square": (500 - 1, 10),  # 5,000 passes, the first image's among them
    "rays": (5000, 1),
    "far": Spent(100, 20, "uniform", 6.4, "margin"),
}
FIXED = {
    "fgsm": Spent(1, 1, "clean", 8.0, CE),
    "pgd": Spent(200, 5, "uniform", 0.4, CE),
    "apgd_ce": (100, 1),
    "apgd_t": (100, 9),
    "fab_t": (100, 9),
    "elsewhere": Spent(100, 1, "uniform", 0.8, "margin"),
    "square": (5000 - 1, 1),
    "rays": (5000, 1),
    "far": Spent(100, 1, "uniform", 6.4, "margin"),
}
# At the small budget: steps, and passes in each.
RANDOM_SMALL = {
    "transfer": (40, 1), "gray": (40, 1), "fgsm": (1, 8), "pgd": (60, 2), "eot_ce": (30, 8),
    "eot_margin": (30, 8), "apgd": (30, 16), "official_pgd": (40, 1), "official_eot": (40, 16),
    "average_one_shift": (30, 8), "identity": (30, 8), "average": (30, 1), "elsewhere": (30, 8),
    "square": (125 - 1, 4), "rays": (500, 1), "far": (30, 8),
}  # fmt: skip
FIXED_SMALL = {
    "fgsm": (1, 1), "pgd": (60, 2), "apgd_ce": (30, 1), "apgd_t": (30, 9), "fab_t": (30, 9),
    "elsewhere": (30, 1), "square": (500 - 1, 1), "rays": (500, 1), "far": (30, 1),
}  # fmt: skip


def photographs(name, data_dir, holdout, resize, limit_train, limit_test, extra, extra_fraction):
    """As many black images as `stl10_part` has photographs, without the memory."""

    def source(size):
        image = np.broadcast_to(np.uint8(0), (size, 96, 96, 3))
        return data.from_arrays(image, np.arange(size) % 10, name=name, classes=10)

    return data.Splits(source(3000 - holdout), source(holdout), source(1000))


@pytest.mark.parametrize(
    ("config", "full", "small"),
    [("stl10_rain", RANDOM, RANDOM_SMALL), ("stl10_natural", FIXED, FIXED_SMALL)],
)
def test_every_rung_spends_what_is_promised(config, full, small, monkeypatch):
    monkeypatch.setattr(data, "load", photographs)
    configs = commands.ROOT / "experiments" / "configs"
    whole = cli.load_config(f"{configs / config}.py:full")
    climbed = {**whole, **cli.load_config(str(configs / "ladder.py"))}
    experiment = build.experiment(
        tree.changed(climbed, [("evaluation.ladder.elsewhere", "runs/other")])
    )
    assert experiment.evaluation.images == 1000
    found = {name: look for name, look in experiment.columns.items() if name != "noise"}
    fixed = {name for name, row in full.items() if not isinstance(row, Spent)}
    assert {n: spent(look, moving=n not in fixed) for n, look in found.items()} == full

    through = {n: look.through for n, look in found.items() if look.through is not None}
    known = {"elsewhere": "run:runs/other"}
    if config == "stl10_rain":
        names = "gray", "average_one_shift", "identity", "average"
        known |= {"transfer": "run:runs/stl10_natural_full", **dict(zip(names, names, strict=True))}
    assert through == known
    radii = {n: 255 * look.threat.radius for n, look in found.items() if look.threat is not None}
    others = {"official_pgd": 16.0} if config == "stl10_rain" else {}
    assert radii == pytest.approx({"far": 64.0, **others})

    section = cli.load_config(f"{configs / 'ladder.py'}:small")["evaluation"]
    budget = ladder.Ladder(**section["ladder"], elsewhere="runs/other")
    looks = ladder.rungs(
        budget, experiment.threat, experiment.assembly.attackable, experiment.start.classifier
    )
    assert {n: spent(looks[n], moving=False) for n in looks if n != "noise"} == small


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("evaluation.ladder.steps", 0), "config.evaluation.ladder.steps=0"),
        (("evaluation.ladder.stps", 3), "did you mean 'steps'"),
        (("evaluation.ladder.without", ["squar"]), "did you mean 'square'"),
        (("evaluation.ladder.surrogates", ["cubik"]), "expected some of identity"),
        (("evaluation.attacks.x", dict(name="fgsm", through="cubik")), "did you mean 'cubic'"),
        (("evaluation.attacks.x", dict(name="fgsm", radius=8)), "8/255"),
        (("ensemble", dict(key="defence.lvel", values=(1.0, 2.0))), "did you mean 'defence.level'"),
        (("ensemble", dict(key="defence.level", values=(1.0,))), "two at least"),
        (("defence", None), "expected config.defence"),
        (("evaluation.cascade", True), "config.evaluation.cascade: expected False"),
        (("defence.statistics", "nowhere.npz"), "experiments.analyse"),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path, change, says):
    with pytest.raises(UsageError, match=says):
        experiment_of(tmp_path, change, defence=JPEG, ensemble=VOTE)


# --- The whole --------------------------------------------------------------------------------


@pytest.mark.structure
@pytest.mark.parametrize("defence", [RAIN, JPEG], ids=["rain", "jpeg"])
def test_it_is_climbed_judged_and_checked(tmp_path, defence):
    more = {"ensemble": VOTE} if defence is JPEG else {}
    # The others are attacks that have tests of their own, and take long to compile.
    left_out = (
        ["rays", "fgsm", "apgd", "pgd", "gray", "official_pgd", "official_eot"]
        if defence is RAIN
        else [
            "rays",
            "fgsm",
            "apgd_ce",
            "apgd_t",
            "fab_t",
            "margins",
            "member:0",
            "member:1",
        ]
    )
    experiment = experiment_of(
        tmp_path,
        ("evaluation.ladder.surrogates", ["identity"]),
        ("evaluation.ladder.without", left_out),
        defence=defence,
        **more,
    )
    row, _ = evaluate.evaluate(experiment, weights(experiment), tmp_path, "untrained", 0)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(record["attacks"]) == set(experiment.columns)
    found = record["ladder"]
    names = [check["name"] for check in found["checks"]]
    assert "nothing stands far away" in names
    assert "images have gradients" in names
    assert len(found["sweep"]) == (4 if defence is RAIN else 2)
    assert found["valid"] == all(check["passed"] for check in found["checks"])
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    # No number where a check fails.
    assert ("worst case" in row.columns) == found["valid"]
    assert (record["worst_case"] is not None) == found["valid"]


@pytest.fixture(scope="module")
def climbed(before, tmp_path_factory):
    """A network without defence that never learned, also by images made against one that did."""
    folder = tmp_path_factory.mktemp("climbed")
    others = ["pgd", "apgd_ce", "apgd_t", "fab_t", "square", "rays"]
    experiment = experiment_of(
        folder,
        ("evaluation.ladder.elsewhere", str(before[0])),
        ("evaluation.ladder.sweep_draws", []),
        ("evaluation.ladder.without", others),
    )
    variables = weights(experiment)
    evaluate.evaluate(experiment, variables, folder, "untrained", 0, finish=False)
    return experiment, variables, folder


def test_images_made_elsewhere_are_made_against_the_other_runs_model(before, climbed):
    experiment, variables, folder = climbed
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["attacks"]["elsewhere"]["through"] == f"run:{before[0]}"
    seen = np.load(folder / "verdicts.npz")
    of = networks.logits_fn_of(experiment.network)
    attack = experiment.columns["elsewhere"].attack
    source = data.first(experiment.splits.test, 20)
    (batch,) = data.evaluation_batches(source, 20)

    @jax.jit
    def margins(against):
        """Of the network that is judged, on what is made against another."""
        keys = image_keys(evaluating.key_of(experiment.seed, "elsewhere"), jnp.asarray(batch.index))
        keys, _ = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)  # the others are the judge's
        images = jax.vmap(lambda k, x, y: attack(k, of(against), x, y))(
            keys, data.as_float(batch.image), batch.label
        )
        logits = jax.vmap(lambda x: of(variables)(keys[0], x))(images)
        return jax.vmap(margin)(logits, batch.label)

    np.testing.assert_allclose(seen["elsewhere/margin"], margins(before[1]), atol=1e-4)
    assert np.max(np.abs(seen["elsewhere/margin"] - np.asarray(margins(variables)))) > 1e-2
    assert record["attacks"]["elsewhere"]["right"] == np.sum(seen["elsewhere/margin"] < 0)


@pytest.mark.parametrize("passed", [True, False])
def test_the_number_is_given_where_all_checks_pass_and_nowhere_else(climbed, passed, monkeypatch):
    experiment, variables, folder = climbed
    checks = [audit.Check("the margin rises", True, "by 1"), audit.Check("far", passed, "3 % left")]
    monkeypatch.setattr(validity, "checks", lambda *given: checks)
    row, _ = evaluate.evaluate(experiment, variables, folder, "untrained", 0, finish=False)
    record = json.loads((folder / "evaluation.json").read_text())
    table, _, notes = report.results_table([row]).partition("\n\n")
    assert record["ladder"]["valid"] == passed
    assert "ok   the margin rises: by 1" in notes
    # What was measured under each rung is told either way.
    counted = ["clean", "noise", "fgsm", "elsewhere"]
    assert list(row.columns)[:5] == [*counted, "far"]
    seen = np.load(folder / "verdicts.npz")
    right = {name: seen[f"{name}/right"] for name in counted}
    told = {"clean": record["clean"], **record["attacks"]}
    assert {name: told[name]["right"] for name in counted} == {n: r.sum() for n, r in right.items()}
    if passed:
        assert record["worst_case"]["right"] == np.sum(np.all(list(right.values()), axis=0))
        assert record["worst_case"]["of"] == 20
        assert "worst case" in table
        assert report.percent(row.columns["worst case"]) in table
        assert "ok   far: 3 % left" in notes
        assert "no worst case" not in notes
    else:
        assert record["worst_case"] is None
        assert "worst case" not in table
        assert "FAILS far: 3 % left" in notes
        assert "no worst case is given" in notes


@pytest.mark.structure
def test_rungs_that_are_climbed_stay_so_when_others_are_left_out(tmp_path, monkeypatch):
    spared = ["rays", "pgd", "apgd_ce", "apgd_t", "fab_t"]

    def measured(*changes):
        experiment = experiment_of(tmp_path, *changes)
        evaluating.evaluation_of(experiment, weights(experiment), "untrained", tmp_path)()

    measured(("evaluation.ladder.without", spared))
    taken = []
    read = resume.Pages.read

    def spying(self, number):
        taken.append(self._folder.name.split(".")[0])
        return read(self, number)

    monkeypatch.setattr(resume.Pages, "read", spying)
    others = ("evaluation.ladder.sweep_steps", [1])
    measured(("evaluation.ladder.without", [*spared, "square"]), others)
    assert {"clean", "noise", "far"} <= set(taken)
    taken.clear()
    measured(("evaluation.ladder.without", [*spared, "square"]), ("evaluation.ladder.steps", 3))
    assert not {"noise", "far"} & set(taken)


# --- The sweep --------------------------------------------------------------------------------


def test_a_sweeps_cells_are_the_runs_of_their_own(tmp_path):
    experiment = experiment_of(tmp_path, defence=JPEG)
    variables = weights(experiment)
    of = networks.logits_fn_of(experiment.network)
    devices = place("shard_map", choose_devices(1))
    judge = evaluation.judging(of, evaluation.Rules(experiment.threat), devices, batch_size=10)
    batches = list(data.evaluation_batches(data.first(experiment.splits.test, 20), 10))
    key = jax.random.key(5)

    def attack_of(draws, steps=4):
        return attacks.pgd(experiment.threat, steps=steps, step_size=0.02, loss=margin)

    lines = validity.sweep(attack_of, of, judge, variables, key, batches, (1,), (3, 1, 4))
    assert [line["steps"] for line in lines] == [1, 3, 4]
    for line in lines:
        alone = attack_of(1, line["steps"])
        found = []

        @jax.jit
        def run(index, image, label, a=alone):
            keys = image_keys(jax.random.fold_in(key, 1), index)
            return jax.vmap(lambda k, x, y: a(k, of(variables), x, y))(keys, image, label)

        for clean in evaluation.as_they_are(batches):
            images = run(clean.batch.index, clean.image, clean.batch.label)
            found.append(clean._replace(image=np.asarray(images)))
        judged = evaluation.join([v.judgement for v in judge(variables, key, found)])
        assert line["accuracy"] == pytest.approx(np.mean(judged.share))


@pytest.mark.structure
def test_stops_do_not_compile_again(tmp_path):
    experiment = experiment_of(tmp_path, defence=JPEG)
    attack = attacks.pgd(experiment.threat, steps=9, step_size=0.02)
    of, traced = networks.logits_fn_of(experiment.network), []

    def seen(variables):
        traced.append(variables)
        return of(variables)

    begin, advance, _ = validity.stages(attack, seen)
    image = jnp.zeros((2, *experiment.splits.train.shape))
    variables = weights(experiment)
    keys = jax.random.split(jax.random.key(0), 2)
    states = advance(variables, begin(variables, keys, image, jnp.zeros(2, int)), 1)
    before = len(traced)
    for steps in (2, 5):
        states = advance(variables, states, steps)
    assert 0 < len(traced) == before


# --- The checks -------------------------------------------------------------------------------

GOOD = dict(
    accuracy={"clean": 0.9, "noise": 0.9, "transfer": 0.7, "pgd": 0.3, "square": 0.5, "far": 0.0},
    margins={"clean": -3.0, "pgd": 1.0, "far": 5.0},
    images=1000,
    seen=probe.Slopes(np.ones(100), np.full(100, 0.8)),
    lines=[dict(draws=1, steps=10, accuracy=0.5), dict(draws=2, steps=20, accuracy=0.4)],
)


def failing(**changes):
    return [check.name for check in validity.checks(**{**GOOD, **changes}) if not check.passed]


def test_every_check_passes_where_attacks_work_and_fails_where_they_do_not():
    assert failing() == []
    accuracy = GOOD["accuracy"]
    assert failing(accuracy={**accuracy, "far": 0.1}) == ["nothing stands far away"]
    for name in ("noise", "transfer", "square"):
        found = failing(accuracy={**accuracy, name: 0.2})
        assert found == [f"{name} is no better than white-box"]
    assert failing(margins={"clean": 1.5, "pgd": 1.0}) == ["the margin rises"]
    lengths = np.r_[np.zeros(2), np.ones(98)]
    for silent in (0.0, np.inf, np.nan):
        lengths[:2] = silent
        assert failing(seen=probe.Slopes(lengths, np.ones(100))) == ["images have gradients"]
    weaker = [*GOOD["lines"], dict(draws=4, steps=20, accuracy=0.6)]
    assert failing(lines=weaker) == ["more draws or steps do not weaken the attack"]
    # Within what so many images can tell apart.
    assert failing(images=20, accuracy={**accuracy, "square": 0.2}) == []


def test_chance_is_less_where_nearly_all_or_none_stand():
    assert audit.above(0.6, 0.4, 100)
    assert not audit.above(0.5, 0.4, 100)
    assert audit.above(0.05, 0.0, 500)
    assert not audit.above(0.01, 0.0, 100)  # one image


@pytest.mark.parametrize("random", [False, True])
def test_slopes_are_those_of_the_margin(random):
    slope = np.array([[2.0], [-1.0]], np.float32)

    def logits_fn(key, image):
        noise = jax.random.normal(key, (2, 1)) if random else jnp.zeros((2, 1))
        return jnp.array([0.0, 1.0]) * jnp.sum((slope + noise) * image[..., 0])

    images = np.random.default_rng(1).uniform(size=(4, 2, 1, 1)).astype(np.float32)
    batch = Batch(images, np.zeros(4, np.int32), np.arange(4), np.ones(4, bool))
    estimator = eot(3) if random else exact()
    found = jax.jit(partial(probe.slopes, estimator, logits_fn))(jax.random.key(0), batch)
    if not random:
        np.testing.assert_allclose(found.length, np.sqrt(5.0), rtol=1e-5)
        np.testing.assert_allclose(found.cosine, 1.0, rtol=1e-5)
    else:
        assert np.all(np.asarray(found.cosine) < 0.9999)


# --- The weights that it begins with ----------------------------------------------------------


def test_members_all_begin_with_the_classifier_of_another_run(before, tmp_path):
    before, trained = before
    experiment = experiment_of(
        tmp_path, defence=JPEG, ensemble=VOTE, start=dict(classifier=str(before))
    )
    devices = place("shard_map", choose_devices(1))
    found = initial_weights.begun(experiment, weights(experiment), devices)
    for m in range(2):
        jax.tree.map(
            lambda a, b, m=m: np.testing.assert_array_equal(np.asarray(a)[m], b),
            found["params"]["classifier"], trained["params"],
        )  # fmt: skip
    luma = np.asarray(found["frozen"]["defence"]["tables"]["luma"])
    assert np.mean(luma[1]) > 2 * np.mean(luma[0])  # levels stay what the config says

    other = experiment_of(
        tmp_path, ("network.widths", [4]), defence=JPEG, start=dict(classifier=str(before))
    )
    with pytest.raises(UsageError, match="of another network"):
        initial_weights.begun(other, weights(other), devices)
    nowhere = experiment_of(tmp_path, defence=JPEG, start=dict(classifier=str(tmp_path / "no")))
    with pytest.raises(UsageError, match="expected the folder of a run"):
        initial_weights.begun(nowhere, weights(nowhere), devices)


# --- Configs ----------------------------------------------------------------------------------

CONFIGS = commands.ROOT / "experiments" / "configs"
DRAWING = ("picks-shift", "picks", "shift", "total_variation", "resize_and_pad", "shield")
VOTES = {"nn_jpeg_vote": 4, "jpeg_vote": 4, "nn": 4, "nn_420": 4, "nn_3": 3, "nn_2": 2, "std": 4}
PARTS = [
    f"{file}.py:{text}"
    for file in ("cifar10_ablations", "cifar10_nn_jpeg")
    for text in runpy.run_path(str(CONFIGS / f"{file}.py"))["TEXTS"]
]


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_defence_meet_the_ladder(part, tmp_path):
    spec = tree.plain(cli.load_config(str(CONFIGS / part)))
    if spec["defence"].get("statistics"):
        np.savez(
            tmp_path / "statistics.npz", **{name: np.ones((3, 8, 8)) for name in Statistics._fields}
        )
        spec["defence"]["statistics"] = str(tmp_path / "statistics.npz")
    kept = ("defence", "ensemble", "method", "optimiser", "schedule", "start")
    found = experiment_of(tmp_path, **{name: spec[name] for name in kept})
    name = part.partition(":")[2]
    assert found.network.random == (name in DRAWING)
    assert ("eot_margin" in found.columns) == (name in DRAWING)
    assert ("fab_t" in found.columns) == (name not in DRAWING)
    members = sum(rung.startswith("member:") for rung in found.columns)
    assert members == VOTES.get(name, 0)


def test_images_from_elsewhere_that_do_better_than_gradients_void_the_number():
    accuracy = {"clean": 0.9, "pgd": 0.7, "noise": 0.85, "far": 0.0, "elsewhere": 0.1}
    margins = {"clean": -1.0, "pgd": -0.5}
    seen = probe.Slopes(np.ones(64), np.ones(64))
    found = {c.name: c.passed for c in validity.checks(accuracy, margins, 64, seen)}
    assert not found["elsewhere is no better than white-box"]
    accuracy["elsewhere"] = 0.8
    assert all(c.passed for c in validity.checks(accuracy, margins, 64, seen))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("evaluation.ladder.without", ("fgsm", "pgd", "apgd_ce", "apgd_t", "fab_t")),
            "at least one",
        ),
        (("evaluation.attacks.pgd", dict(name="pgd", steps=33)), "a rung of the ladder has this"),
        (("evaluation.suite", "standard"), "expected None beside a ladder"),
    ],
)
def test_a_ladder_that_would_measure_something_else_is_refused(tmp_path, change, message):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    begun = [("evaluation.attacks.pgd40", None), ("evaluation.ladder", dict(steps=3))]
    build.experiment(tree.changed(scope["get_config"](), begun))
    with pytest.raises(build.UsageError, match=message):
        build.experiment(tree.changed(scope["get_config"](), [*begun, change]))


def test_another_runs_folder_is_looked_for_before_anything_is_measured(tmp_path):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    elsewhere = [("evaluation.ladder", dict(steps=3, elsewhere=str(tmp_path / "nowhere")))]
    begun = [("evaluation.attacks.pgd40", None), *elsewhere]
    experiment = build.experiment(tree.changed(scope["get_config"](), begun))
    with pytest.raises(build.UsageError, match="nowhere: expected the folder of a run"):
        evaluate.evaluate(experiment, weights(experiment), tmp_path, "untrained", 0)
