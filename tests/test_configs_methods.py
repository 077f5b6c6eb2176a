"""Rows of the tables of training methods, and published recipes: each of them builds and trains."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import commands
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, evaluate, train
from rain_jax import data, defences, models, training
from rain_jax.checks import UsageError
from rain_jax.config import build, networks, schema, tree
from rain_jax.evaluation.resume import digest_of
from rain_jax.losses import cross_entropy
from rain_jax.models.conditional import with_condition
from rain_jax.parallel import choose_devices, place
from rain_jax.runs import loading, step_programs
from rain_jax.types import Batch, Method

FOLDER = commands.ROOT / "experiments" / "configs"
PATHS = sorted(path for name in ("methods", "published") for path in (FOLDER / name).glob("*.py"))
SHAPE = (8, 8, 3)
CHEAP = dict(attacks=dict(fgsm=dict(name="fgsm")))
METHODS = [
    "natural", "pgd_at", "trades", "mart", "sense", "sense_trade", "fat", "fast", "n_fgsm",
    "grad_align", "free", "awp", "trades_awp", "afd",
]  # fmt: skip


def texts_of(path: Path) -> tuple[str, ...]:
    """What may stand behind the file's name, by its own account."""
    found: dict[str, Any] = {}
    exec(compile(path.read_text(), path, "exec"), found)
    return found["TEXTS"]


ROWS = [f"{path}:{text}" for path in PATHS for text in texts_of(path)]


def told(row: str) -> str:
    return str(Path(row).relative_to(FOLDER))


def spec_of(row: str) -> dict[str, Any]:
    return cli.load_config(row)


def structure(row: str) -> str:
    """What decides which program a step is, and not the numbers in it."""

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return value if isinstance(value, str | bool | None) else 0

    spec = spec_of(row)
    kept = {name: spec[name] for name in ("method", "defence")}
    return json.dumps([
        shape(kept), spec["training"]["replays"], spec["network"]["modulation"],
        spec["data"]["extra"] is None,
    ])  # fmt: skip


# One of each kind: what is left compiles to a program of its own.
KINDS = list({structure(row): row for row in reversed(ROWS)}.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve training images, five test images, and twenty to mix in."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images = partial(draw.integers, 0, 256, dtype=np.uint8)
    np.savez(
        folder / "data.npz",
        train_image=images(size=(12, *SHAPE)), train_label=np.arange(12) % 10,
        test_image=images(size=(5, *SHAPE)), test_label=np.arange(5),
    )  # fmt: skip
    np.savez(folder / "extra.npz", image=images(size=(20, *SHAPE)), label=np.arange(20) % 10)
    return folder


def tiny(row: str, files: Path, **sections: Any) -> dict[str, Any]:
    """The row on a few small images, a smaller network and with attacks of one step."""
    spec = spec_of(row)
    network = {k: spec["network"][k] for k in ("mean", "std", "activation", "modulation")}
    method = json.loads(json.dumps(spec["method"]))
    for section in (method, method.get("attack", {})):
        if "steps" in section:
            section["steps"] = 1
    extra = spec["data"]["extra"] and f"arrays:{files / 'extra.npz'}"
    return tree.plain(tree.config(**{
        **spec,
        "network": dict(name="cnn", widths=(4,), hidden=4, batch_norm=True, **network),
        "method": method,
        "data": dict(spec["data"], name=f"arrays:{files / 'data.npz'}", holdout=4, extra=extra),
        "training": {**spec["training"], "batch_size": 4},
        "parallel": dict(devices=1),
        **sections,
    }))  # fmt: skip


def test_every_method_has_its_row():
    for path in (FOLDER / "methods").glob("*.py"):
        assert [text for text in texts_of(path) if text != "pgd_at_jpeg"] == METHODS
    with pytest.raises(UsageError, match="did you mean 'sense'"):
        spec_of(f"{FOLDER / 'methods' / 'mnist.py'}:sence")


@pytest.mark.parametrize("row", ROWS, ids=told)
def test_every_row_builds(row, files):
    spec = spec_of(row)
    assert schema.make("config.network", models, spec["network"], classes=10).classes == 10
    assert (
        f"experiments/configs/{told(row).partition(':')[0]}"
        in Path(row.partition(":")[0]).read_text()
    )
    # One evaluation serves all rows of a file.
    first = row.partition(":")[2] == texts_of(Path(row.partition(":")[0]))[0]
    # Of the few images there are all.
    evaluation = {**spec["evaluation"], "images": None} if first else CHEAP
    built = build.experiment(tiny(row, files, evaluation=evaluation))
    assert json.loads(json.dumps(built.config)) == built.config


@pytest.mark.parametrize("row", KINDS, ids=told)
def test_every_kind_of_row_takes_two_steps(row, files):
    experiment = build.experiment(tiny(row, files, evaluation=CHEAP))
    devices, plan = place("shard_map", choose_devices(1)), step_programs.plan_of(experiment)
    keys, method = step_programs.keys_of(0), experiment.method(plan)
    variables = drawn.of(experiment.network, SHAPE)
    state = devices.replicate(jax.jit(method.init)(variables))
    before = jax.tree.map(np.asarray, state.params)
    step = step_programs.make_step(experiment, method, plan, devices)
    feeds = commands.one_by_one(step_programs.feed(experiment, plan, keys, devices, 0), 2)
    for _ in range(2):
        state, metrics = step(state, next(feeds))
        assert all(np.isfinite(np.asarray(value)).all() for value in metrics.values())
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, state.params)
    assert any(jax.tree.leaves(moved))
    assert float(metrics["images"][0]) == 4 * experiment.training.replays


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("mnist.py:sense", "method.threshold", 0.3),
        ("cifar10.py:trades", "method.beta", 1.0),
        ("cifar10.py:pgd_at", "seed", 2),
        ("cifar10_resnet18.py:mart", "threat.radius", 0.031),
        ("cifar10.py:afd", "evaluation.condition", 0.25),
        ("mnist.py:awp", "method.awp.gamma", 0.005),
    ],
)
def test_what_curves_are_over_can_be_typed(text, key, value, files):
    row = tiny(f"{FOLDER / 'methods'}/{text}", files, evaluation=CHEAP)
    found: Any = build.experiment(tree.changed(row, [(key, value)])).config
    for name in key.split("."):
        found = found[name]
    assert found == value


# --- Training through a defence ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["adversarial", "trades"])
def test_the_attack_of_a_method_climbs_through_the_defence(method, files):
    """One step of FGSM inside the method, against the gradient composed by hand."""
    row = f"{FOLDER / 'methods' / 'cifar10.py'}:pgd_at_jpeg"
    network = dict(name="cnn", widths=(4,), hidden=8)
    attack = dict(name="fgsm", loss="cross_entropy")
    spec = tiny(
        row, files, network=network, defence=dict(name="jpeg", quality=10), threat=dict(radius=0.1),
        method=dict(name=method, attack=attack),
        evaluation=CHEAP,
    )  # fmt: skip
    built = build.experiment(spec)
    key = jax.random.key(1)
    # Away from the bounds, so that no sign of the gradient is lost by clipping.
    images = np.random.default_rng(1).uniform(0.2, 0.8, (6, *SHAPE)).astype(np.float32)
    batch = Batch(images, np.arange(6), np.arange(6), np.ones(6, bool))
    variables = drawn.of(built.network, SHAPE)
    state = {name: value for name, value in variables.items() if name != "params"}
    find = jax.jit(
        lambda params: built.objective.find(params, state, key, batch, None, 0)[0].images
    )
    found = find(variables["params"])

    front, classifier = defences.jpeg(quality=10), models.cnn(10, widths=(4,), hidden=8)
    own = networks.parts_of(variables)

    def slopes(through: bool) -> jax.Array:
        def loss(image, label):
            seen = front.apply(own["defence"], key, image) if through else image
            return cross_entropy(classifier.apply(own["classifier"], seen[None])[0][0], label)

        return jax.vmap(jax.grad(loss))(images, batch.label)

    seen, bare = map(np.asarray, jax.jit(lambda: (slopes(True), slopes(False)))())
    np.testing.assert_allclose(found, images + np.float32(0.1) * np.sign(seen), atol=1e-6)
    assert np.mean(np.sign(seen) != np.sign(bare)) > 0.05


# --- AFD's condition, when it is evaluated ----------------------------------------------------


@pytest.fixture(scope="module")
def conditional(files, tmp_path_factory):
    """A run of two steps whose network feels its condition from the first step on, by "float"."""
    spec = tiny(
        f"{FOLDER / 'methods' / 'mnist.py'}:afd", files,
        training=dict(epochs=1, batch_size=4),
        evaluation=dict(
            attacks=dict(fgsm=dict(name="fgsm")), batch_size=5, checkpoint="latest", checks=False
        ),
    )  # fmt: skip
    spec["network"]["modulation"] = "float"
    folder = tmp_path_factory.mktemp("run")
    train.train(build.experiment(spec), folder, "afd", lambda devices: None)
    return spec, folder


def at(spec: dict[str, Any], condition: float | None) -> build.Experiment:
    return build.experiment(tree.changed(spec, [("evaluation.condition", condition)]))


def test_a_condition_is_what_clean_images_and_attacks_meet(conditional, tmp_path):
    spec, folder = conditional
    deployed, _ = loading.restore(at(spec, None), folder)
    margins = {}
    for condition in (None, 0.0, 1.0):
        built = at(spec, condition)
        variables, step = loading.restore(built, folder)
        expected = deployed if condition is None else with_condition(deployed, condition)
        assert digest_of(variables) == digest_of(expected)
        out = tmp_path / str(condition)
        out.mkdir()
        evaluate.evaluate(built, variables, out, "afd", step)
        assert json.loads((out / "evaluation.json").read_text())["condition"] == condition
        with np.load(out / "verdicts.npz") as verdicts:
            clean = verdicts["clean/margin"]
            margins[condition] = np.stack([clean, verdicts["fgsm/margin"]])
        images = np.stack([built.splits.test.read(n)[0] for n in range(5)]) / np.float32(255)
        logits = np.asarray(jax.jit(built.network.apply)(expected, images)[0])
        wrong = np.where(np.eye(10, dtype=bool)[:5], -np.inf, logits).max(axis=1)
        np.testing.assert_allclose(clean, wrong - np.diagonal(logits)[:5], atol=1e-4)
    np.testing.assert_array_equal(margins[None], margins[1.0])
    assert np.all(np.any(margins[0.0] != margins[1.0], axis=1))


def test_the_journal_tells_conditions_apart(conditional):
    """By the weights' digest, which the condition is a part of."""
    spec, folder = conditional
    seen = {digest_of(loading.restore(at(spec, s), folder)[0]) for s in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert len(seen) == 5


def test_a_network_without_modulation_has_no_condition(conditional):
    spec, _ = conditional
    plain = tree.changed(spec, [("network.modulation", "none")])
    with pytest.raises(UsageError, match=r"evaluation\.condition=0\.5: expected None") as error:
        at(tree.plain(plain), 0.5)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"evaluation\.condition=1\.5"):
        at(spec, 1.5)


# --- Extra images -----------------------------------------------------------------------------


def noted(state):
    """A method that learns nothing, and tells which images it was shown."""

    def step(key, state, batch, axis_name=None):
        everyone = batch if axis_name is None else jax.lax.all_gather(batch, axis_name, tiled=True)
        shown = {"index": everyone.index, "label": everyone.label, "image": everyone.image}
        return state._replace(step=state.step + 1), shown

    return Method(lambda variables: state, step)


def shown(experiment, mapping, devices, first, count):
    """What a run that begins at step `first` sees, step by step."""
    placed, plan = place(mapping, choose_devices(devices)), step_programs.plan_of(experiment)
    keys = step_programs.keys_of(experiment.seed)
    state = training.TrainState(jnp.int32(first), {}, {}, {}, None)
    step = step_programs.make_step(experiment, noted(state), plan, placed)
    feeds = commands.one_by_one(step_programs.feed(experiment, plan, keys, placed, first), count)
    state, seen = placed.replicate(state), []
    for fed in feeds:
        state, metrics = step(state, fed)
        seen.append(jax.tree.map(lambda leaf: np.asarray(leaf)[0], metrics))
    return seen


@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_batches_with_extra_images_are_the_same_after_a_stop_and_on_all_devices(feed, files):
    experiment = build.experiment(tiny(
        f"{FOLDER / 'published' / 'rebuffi2021.py'}:ddpm", files,
        training=dict(epochs=9, batch_size=8, feed=feed), schedule=dict(name="constant", peak=0.1),
        evaluation=CHEAP,
    ))  # fmt: skip
    source = experiment.splits.train
    images, labels = data.pooled(source)
    # Of eight images in a batch six are extra ones (0.7 of them, rounded); an epoch is one step.
    whole = shown(experiment, "shard_map", 1, 0, 6)
    for batch in whole:
        assert np.sum(batch["index"] >= source.size) == 6
        np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
    # Each image is cropped and flipped by its own key, which its index decides.
    assert any(np.any(b["image"] != data.as_float(images[b["index"]])) for b in whole)
    for mapping, devices, first in (("shard_map", 1, 3), ("shard_map", 4, 2), ("pmap", 2, 2)):
        again = shown(experiment, mapping, devices, first, 3)
        for one, other in zip(again, whole[first:], strict=False):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_a_share_that_no_batch_can_hold_is_refused_at_once(files):
    row = tiny(f"{FOLDER / 'published' / 'rebuffi2021.py'}:ddpm", files)
    with pytest.raises(UsageError, match=r"config\.data\.extra_fraction=0\.01: expected images"):
        build.experiment(tree.changed(row, [("data.extra_fraction", 0.01)]))
