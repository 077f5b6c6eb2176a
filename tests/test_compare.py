"""Comparisons with other libraries: one command, four modes, each attack before one judge."""

import importlib.util
import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: see the extra `peers`")

from experiments import compare, train  # noqa: E402
from experiments.comparing import bridges  # noqa: E402
from experiments.comparing.subject import Subject, subject  # noqa: E402
from rain_jax import attacks, evaluation  # noqa: E402
from rain_jax.bridges import to_torch  # noqa: E402
from rain_jax.checks import UsageError  # noqa: E402
from rain_jax.config import tree  # noqa: E402

COUNT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps on digits, so that attacks find both easy images and hard ones."""
    folder = tmp_path_factory.mktemp("compared")
    scope: dict = {}
    exec(commands.write_config(folder).read_text(), scope)
    whole = tree.plain(scope["get_config"]())
    whole |= {"method": {"name": "natural"}, "validation": None}
    whole["parallel"]["devices"] = 1
    train.main(tree.changed(whole, [("training.epochs", 2)]), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def what(run) -> Subject:
    return subject(run, COUNT, None, COUNT)


def told(run, out, *arguments):
    """The lines that the command writes, and the table of them is printed."""
    compare.main([
        str(run), f"--images={COUNT}", f"--batch_size={COUNT}", "--threads=1", f"--out={out}",
        "--steps=3", "--queries=10", *arguments,
    ])  # fmt: skip
    return json.loads(out.read_text())


def needs(*libraries):
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: see the extra `peers`")


def stands_of(line):
    return [
        np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=line["images"]) > 0
        for bits in line["standing"]
    ]


def test_bridges_cost_our_attack_nothing_and_are_counted_as_told(run, tmp_path, capsys):
    needs("torchattacks", "foolbox")
    record = told(run, tmp_path / "bridges.json", "--bridges", "--seeds=2", "--attacks=pgd")
    lines = record["lines"]
    assert [line["who"] for line in lines] == [
        "ours", "ours, from_torch", "torchattacks, to_torch", "foolbox, to_torch"
    ]  # fmt: skip
    mine = stands_of(lines[0])
    for line in lines:
        stands = stands_of(line)
        assert len(stands) == 2
        assert line["of_seeds"] == pytest.approx([np.mean(one) for one in stands])
        assert line["accuracy"] == pytest.approx(np.mean(stands))
        assert (line["least"], line["most"]) == (min(line["of_seeds"]), max(line["of_seeds"]))
        assert line["as_ours"] == pytest.approx(np.mean(np.equal(stands, mine)))
        assert line["least"] < line["clean"]  # each of them breaks something
        assert line["outside_the_threat"] == 0
    assert lines[1]["as_ours"] == 1
    assert "ours, from_torch" in capsys.readouterr().out


def test_suites_go_through_the_bridges_too(run, tmp_path, monkeypatch):
    needs("torchattacks")
    # Ours has four members to compile, and goes through both forms as any attack does.
    short = lambda what, settings: {"standard": {"fgsm": attacks.fgsm(what.experiment.threat)}}
    monkeypatch.setattr(bridges, "our_attacks", short)
    record = told(
        run, tmp_path / "suites.json", "--bridges", "--seeds=1", "--attacks=standard",
        "--peers=torchattacks", "--radius=0.4",
    )  # fmt: skip
    assert [(line["attack"], line["who"]) for line in record["lines"]] == [
        ("standard", "ours"), ("standard", "ours, from_torch"),
        ("standard", "torchattacks, to_torch"), ("autoattack", "torchattacks, to_torch"),
    ]  # fmt: skip
    for line in record["lines"]:
        assert line["accuracy"] < line["clean"]
        assert line["outside_the_threat"] == 0


def test_every_seed_is_a_draw_of_its_own(what):
    def coin(key, logits_fn, image, label):
        return jnp.where(jax.random.bernoulli(key), image, 1 - image)

    threat = what.experiment.threat._replace(radius=1.0)
    free = what._replace(experiment=what.experiment._replace(threat=threat))
    attacker = bridges.our_attacker(free, free, {"coin": evaluation.as_iteration(coin)})
    once, other, again = (attacker(seed)[0] for seed in (0, 1, 0))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


def test_a_handed_model_is_ours_and_a_crossed_one_the_twin(what):
    images = np.ascontiguousarray(np.moveaxis(what.images, -1, 1))
    expected = np.asarray(what.experiment.network.apply(what.variables, what.images)[0])
    module = bridges.handed(what).twin
    assert type(module) is type(to_torch(lambda key, image: jnp.sum(image)))
    np.testing.assert_allclose(module(torch.tensor(images)).numpy(), expected, atol=1e-5)
    crossed = bridges.crossed(what)
    keys = jax.random.split(jax.random.key(0), COUNT)
    found = jax.vmap(crossed.logits_fn_of(None))(keys, what.images)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_stopped_comparison_goes_on_and_another_one_is_refused(run, tmp_path):
    needs("torchattacks")
    out = tmp_path / "strength.json"
    first = told(run, out, "--attacks=pgd", "--peers=torchattacks")
    (line,) = first["lines"]
    assert {"ours", "torchattacks", "ours_alone_breaks_of_torchattacks"} <= set(line)
    # As a file says it that knows of no bridges.
    del first["asked"]["bridges"], first["asked"]["seeds"]
    out.write_text(json.dumps(first))
    again = told(run, out, "--attacks=pgd,apgd_ce", "--peers=torchattacks")
    assert again["lines"][0] == line  # not run again: its seconds are the same
    assert again["lines"][1]["attack"] == "apgd_ce"
    out.write_text(json.dumps({**again, "asked": {**again["asked"], "weights": "others"}}))
    with pytest.raises(UsageError, match="it compares other weights"):
        told(run, out, "--peers=torchattacks")
    out.write_text(json.dumps(again))
    with pytest.raises(UsageError, match="it compares with --steps=3, and not 4"):
        told(run, out, "--peers=torchattacks", "--steps=4")


def test_speed_is_told_as_ratios(run, tmp_path):
    needs("torchattacks")
    record = told(
        run, tmp_path / "speed.json", "--speed", "--attacks=apgd_ce", "--peers=torchattacks",
        "--rounds=2",
    )  # fmt: skip
    (line,) = record["lines"]
    for median, least, most in line["torchattacks"].values():
        assert 0 < least <= median <= most


def test_random_models_are_judged_by_fresh_draws(run, tmp_path):
    needs("torchattacks")
    lines = told(run, tmp_path / "shift.json", "--random=shift")["lines"]
    assert [line["draws"] for line in lines] == [50, 20, 50, 50]
    for line in lines[1:]:
        assert line["accuracy_of_one_draw"] <= lines[0]["accuracy_of_one_draw"]


def test_mistakes_are_told_in_one_line(run, tmp_path):
    for arguments, says in (
        (("--bridges", "--seeds=0"), "--seeds=0: expected a number in"),
        (("--peers=torchattack",), "did you mean 'torchattacks'"),
        (("--attacks=pdg",), "did you mean 'pgd'"),
    ):
        with pytest.raises(UsageError, match=says) as found:
            told(run, tmp_path / "none.json", *arguments)
        assert "\n" not in str(found.value)
    whole = json.loads((run / "config.json").read_text())
    whole["defence"] = dict(name="jpeg")
    (tmp_path / "defended").mkdir()
    (tmp_path / "defended" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match="expected a run without a defence"):
        told(tmp_path / "defended", tmp_path / "none.json")
