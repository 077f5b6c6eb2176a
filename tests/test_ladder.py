"""The ladder: its rungs follow from the defence, its sweep is one program, its checks can fail."""

import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, cli, defended, evaluate, journal, loading, measure, proof, start
from rain_jax import attacks, data, evaluation
from rain_jax.checks import UsageError
from rain_jax.defences.tables import Statistics
from rain_jax.gradients import eot, exact
from rain_jax.losses import margin
from rain_jax.parallel import choose_devices, image_keys, place
from rain_jax.types import Batch

TINY = dict(steps=2, draws=2, restarts=1, queries=4, answers=2, sweep_draws=(1, 2),
            sweep_steps=(1, 2))  # fmt: skip
RAIN = dict(name="rain", upscaler=dict(name="edsr", blocks=1, width=4, mean=0.5), reach=0.3)
JPEG = dict(name="nn_jpeg", table="fd")
VOTE = dict(key="defence.level", values=(15.0, 60.0))


def experiment_of(tmp_path, *changes, **sections):
    scope: dict = {}
    exec(commands.write_config(tmp_path).read_text(), scope)
    whole = build.plain(scope["get_config"]())
    whole["evaluation"] = {"images": 20, "batch_size": 10, "ladder": TINY}
    whole["parallel"]["devices"] = 1
    return build.experiment(build.changed({**whole, **sections}, changes))


def drawn(experiment):
    images = jnp.zeros((1, *experiment.splits.train.shape))
    return jax.jit(experiment.network.init)(jax.random.key(0), images)


# --- Rungs ------------------------------------------------------------------------------------


def test_a_random_defence_is_attacked_in_expectation_and_through_every_surrogate(tmp_path):
    experiment = experiment_of(tmp_path, defence=RAIN)
    assert experiment.evaluation.draws == 20
    looks = experiment.looks
    assert {"eot_ce", "eot_margin", "apgd", "square", "rays", "transfer", "gray"} <= set(looks)
    for name in ("average", "average_one_shift", "identity"):
        assert looks[name].through == name
    assert looks["transfer"].through == "classifier"
    assert looks["gray"].through == "gray"
    checks = [name for name, look in looks.items() if look.threat is not None]
    assert checks == ["official_pgd", "official_eot", "far"]
    assert looks["official_pgd"].threat.radius == pytest.approx(16 / 255)
    assert looks["far"].threat.radius == pytest.approx(64 / 255)


def test_an_official_attack_at_the_threats_own_radius_counts(tmp_path):
    threat = dict(norm="linf", radius=8 / 255)
    looks = experiment_of(tmp_path, defence=RAIN, threat=threat).looks
    checks = [name for name, look in looks.items() if look.threat is not None]
    assert checks == ["official_pgd", "far"]


def test_a_fixed_defence_meets_the_standard_suite_and_its_members_one_by_one(tmp_path):
    experiment = experiment_of(tmp_path, defence=JPEG, ensemble=VOTE)
    assert experiment.evaluation.draws == 1
    looks = experiment.looks
    assert {"apgd_ce", "apgd_t", "fab_t", "cubic", "survivors", "identity"} <= set(looks)
    for name in ("mean", "margins", "member:0", "member:1"):
        assert looks[name].through == name
    assert "eot_ce" not in looks
    assert list(looks)[-3:] == ["square", "rays", "far"]


def test_members_may_differ_in_a_whole_number(tmp_path):
    group = dict(key="defence.quality", values=(80.0, 20.0))
    experiment = experiment_of(tmp_path, defence=dict(name="jpeg"), ensemble=group)
    tables = jax.tree.leaves(drawn(experiment)["frozen"])
    assert any(np.shape(leaf)[-2:] == (8, 8) for leaf in tables)
    with pytest.raises(UsageError, match=r"quality=80\.5"):
        half = dict(key="defence.quality", values=(80.5, 20.0))
        experiment_of(tmp_path, defence=dict(name="jpeg"), ensemble=half)


def test_surrogates_can_be_chosen_and_the_run_before_is_what_transfers(tmp_path):
    chosen = experiment_of(tmp_path, ("evaluation.ladder.surrogates", ["identity"]), defence=JPEG)
    assert "identity" in chosen.looks
    assert "cubic" not in chosen.looks
    after = experiment_of(tmp_path, defence=JPEG, start=dict(classifier="runs/before"))
    assert after.looks["transfer"].through == "run:runs/before"
    # Then the fine-tuned classifier without its defence is a rung of its own.
    assert after.looks["gray"].through == "classifier"


def test_other_norms_have_the_rungs_that_exist_there(tmp_path):
    found = experiment_of(tmp_path, defence=JPEG, threat=dict(norm="l2", radius=0.5)).looks
    assert "square" in found
    assert "rays" not in found
    assert found["far"].threat.radius == pytest.approx(4.0)
    found = experiment_of(tmp_path, defence=JPEG, threat=dict(norm="l1", radius=2.0)).looks
    assert "square" not in found
    assert "apgd_ce" not in found


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
        (("defence.statistics", "nowhere.npz"), "experiments.analyse"),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path, change, says):
    with pytest.raises(UsageError, match=says):
        experiment_of(tmp_path, change, defence=JPEG, ensemble=VOTE)


# --- The whole --------------------------------------------------------------------------------


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
    row, _ = evaluate.evaluate(experiment, drawn(experiment), tmp_path, "untrained", 0)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(record["attacks"]) == set(experiment.looks)
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


def test_rungs_that_are_climbed_stay_so_when_others_are_left_out(tmp_path, monkeypatch):
    spared = ["square", "rays", "pgd", "apgd_ce", "apgd_t", "fab_t"]

    def measured(*changes):
        experiment = experiment_of(tmp_path, *changes)
        measure.measure(experiment, drawn(experiment), "untrained", tmp_path)

    measured(("evaluation.ladder.without", spared))
    taken = []
    read = journal.Pages.read

    def spying(self, number):
        taken.append(self._folder.name.split(".")[0])
        return read(self, number)

    monkeypatch.setattr(journal.Pages, "read", spying)
    others = ("evaluation.ladder.sweep_steps", [1])
    measured(("evaluation.ladder.without", [*spared, "fgsm"]), others)
    assert {"clean", "noise", "far"} <= set(taken)
    taken.clear()
    measured(("evaluation.ladder.without", [*spared, "fgsm"]), ("evaluation.ladder.steps", 3))
    assert not {"noise", "far"} & set(taken)


# --- The sweep --------------------------------------------------------------------------------


def test_a_sweeps_cells_are_the_runs_of_their_own(tmp_path):
    experiment = experiment_of(tmp_path, defence=JPEG)
    variables = drawn(experiment)
    of = defended.logits_fn_of(experiment.network)
    devices = place("shard_map", choose_devices(1))
    judge = evaluation.judging(of, evaluation.Rules(experiment.threat), devices, batch_size=10)
    batches = list(data.evaluation_batches(data.first(experiment.splits.test, 20), 10))
    key = jax.random.key(5)

    def attack_of(draws, steps=4):
        return attacks.pgd(experiment.threat, steps=steps, step_size=0.02, loss=margin)

    lines = proof.sweep(attack_of, of, judge, variables, key, batches, (1,), (3, 1, 4))
    assert [line["steps"] for line in lines] == [1, 3, 4]
    for line in lines:
        alone = attack_of(1, line["steps"])
        found = []
        for clean in evaluation.as_they_are(batches):
            keys = image_keys(jax.random.fold_in(key, 1), jnp.asarray(clean.batch.index))
            run = jax.vmap(lambda k, x, y, a=alone: a(k, of(variables), x, y))
            images = run(keys, clean.image, clean.batch.label)
            found.append(clean._replace(image=np.asarray(images)))
        judged = evaluation.join([v.judgement for v in judge(variables, key, found)])
        assert line["accuracy"] == pytest.approx(np.mean(judged.share))


def test_stops_do_not_compile_again(tmp_path):
    experiment = experiment_of(tmp_path, defence=JPEG)
    attack = attacks.pgd(experiment.threat, steps=9, step_size=0.02)
    begin, advance, _ = proof.stages(attack, defended.logits_fn_of(experiment.network))
    image = jnp.zeros((2, *experiment.splits.train.shape))
    variables = drawn(experiment)
    keys = jax.random.split(jax.random.key(0), 2)
    states = begin(variables, keys, image, jnp.zeros(2, int))
    for steps in (1, 2, 5):
        states = advance(variables, states, steps)
    assert advance._cache_size() == 1


# --- The checks -------------------------------------------------------------------------------

GOOD = dict(
    accuracy={"clean": 0.9, "noise": 0.9, "transfer": 0.7, "pgd": 0.3, "square": 0.5, "far": 0.0},
    margins={"clean": -3.0, "pgd": 1.0, "far": 5.0},
    images=1000,
    seen=proof.Slopes(np.ones(100), np.full(100, 0.8)),
    lines=[dict(draws=1, steps=10, accuracy=0.5), dict(draws=2, steps=20, accuracy=0.4)],
)


def failing(**changes):
    return [check.name for check in proof.checks(**{**GOOD, **changes}) if not check.passed]


def test_every_check_passes_where_attacks_work_and_fails_where_they_do_not():
    assert failing() == []
    accuracy = GOOD["accuracy"]
    assert failing(accuracy={**accuracy, "far": 0.1}) == ["nothing stands far away"]
    for name in ("noise", "transfer", "square"):
        found = failing(accuracy={**accuracy, name: 0.2})
        assert found == [f"{name} is no better than white-box"]
    assert failing(margins={"clean": 1.5, "pgd": 1.0}) == ["the margin rises"]
    lengths = np.r_[np.zeros(2), np.ones(98)]
    assert failing(seen=proof.Slopes(lengths, np.ones(100))) == ["images have gradients"]
    weaker = [*GOOD["lines"], dict(draws=4, steps=20, accuracy=0.6)]
    assert failing(lines=weaker) == ["more draws or steps do not weaken the attack"]
    # Within what so many images can tell apart.
    assert failing(images=20, accuracy={**accuracy, "square": 0.2}) == []


def test_chance_is_less_where_nearly_all_or_none_stand():
    assert proof.above(0.6, 0.4, 100)
    assert not proof.above(0.5, 0.4, 100)
    assert proof.above(0.05, 0.0, 500)
    assert not proof.above(0.01, 0.0, 100)  # one image


@pytest.mark.parametrize("random", [False, True])
def test_slopes_are_those_of_the_margin(random):
    slope = jnp.array([[2.0], [-1.0]])

    def logits_fn(key, image):
        noise = jax.random.normal(key, (2, 1)) if random else jnp.zeros((2, 1))
        return jnp.array([0.0, 1.0]) * jnp.sum((slope + noise) * image[..., 0])

    images = jax.random.uniform(jax.random.key(1), (4, 2, 1, 1))
    index = jnp.arange(4)
    batch = Batch(images, jnp.zeros(4, int), index, jnp.ones(4, bool))
    estimator = eot(3) if random else exact()
    found = proof.slopes(estimator, logits_fn, jax.random.key(0), batch)
    if not random:
        np.testing.assert_allclose(found.length, np.sqrt(5.0), rtol=1e-5)
        np.testing.assert_allclose(found.cosine, 1.0, rtol=1e-5)
    else:
        assert np.all(np.asarray(found.cosine) < 0.9999)


# --- The weights that it begins with ----------------------------------------------------------


def test_members_all_begin_with_the_classifier_of_another_run(tmp_path):
    from experiments import train

    before = tmp_path / "before"
    plain = build.plain(experiment_of(tmp_path).config)
    plain["evaluation"] = {"attacks": {"fgsm": {"name": "fgsm"}}, "images": 10}
    train.main(build.changed(plain, [("training.epochs", 0.2)]), before)
    trained, _ = loading.load(build.experiment(plain), before)

    experiment = experiment_of(
        tmp_path, defence=JPEG, ensemble=VOTE, start=dict(classifier=str(before))
    )
    devices = place("shard_map", choose_devices(1))
    found = start.begun(experiment, drawn(experiment), devices)
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
        start.begun(other, drawn(other), devices)
    nowhere = experiment_of(tmp_path, defence=JPEG, start=dict(classifier=str(tmp_path / "no")))
    with pytest.raises(UsageError, match="expected the folder of a run"):
        start.begun(nowhere, drawn(nowhere), devices)


# --- Configs ----------------------------------------------------------------------------------

ABLATIONS = commands.ROOT / "experiments" / "configs" / "cifar10_ablations.py"
PARTS = ["picks-shift", "picks", "shift", "jpeg", "nn_jpeg", "nn_jpeg_vote", "jpeg_vote"]


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_defence_meet_the_ladder(part, tmp_path):
    spec = build.plain(cli.load_config(f"{ABLATIONS}:{part}"))
    if spec["defence"].get("statistics"):
        np.savez(
            tmp_path / "statistics.npz", **{name: np.ones((3, 8, 8)) for name in Statistics._fields}
        )
        spec["defence"]["statistics"] = str(tmp_path / "statistics.npz")
    kept = ("defence", "ensemble", "method", "optimiser", "schedule", "start")
    found = experiment_of(tmp_path, **{name: spec[name] for name in kept})
    random = part in ("picks-shift", "picks", "shift")
    assert found.network.random == random
    assert ("eot_margin" in found.looks) == random
    assert ("fab_t" in found.looks) == (not random)
    assert ("member:3" in found.looks) == part.endswith("_vote")
