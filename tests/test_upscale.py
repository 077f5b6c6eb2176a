"""The command that trains super-resolution networks: it learns, goes on, measures and refuses."""

import json
import signal

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as pillow

from experiments import upscale
from experiments.cli import load_config
from rain_jax.checks import UsageError
from rain_jax.runs import step_programs

CONFIG = '''"""A tiny EDSR."""

from experiments.upscale import config


def get_config():
    return config(
        seed=1,
        data=dict(name="arrays:{data}", holdout=8),
        upscaler=dict(name="edsr", blocks=1, width=8),
        method=dict(crop=16),
        optimiser=dict(name="adam"),
        schedule=dict(name="constant", peak=2e-3),
        average=dict(decay=0.9),
        training=dict(epochs=20, batch_size=8, log_every=4),
        validation=dict(every_epochs=5, batch_size=8),
        checkpoints=dict(every_epochs=2),
        evaluation=dict(images=10, batch_size=8),
    )
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared_data):
    """A config file with 72 training photographs and 12 test photographs of STL-10, 48 pixels."""
    folder = tmp_path_factory.mktemp("config")
    mosaic = np.asarray(pillow.open(shared_data / "stl10" / "train_0.webp"))
    photographs = mosaic[:960].reshape(10, 96, 10, 96, 3).swapaxes(1, 2).reshape(-1, 96, 96, 3)
    image, label = photographs[:92, 24:72, 24:72], np.arange(92) % 2
    np.savez(
        folder / "data.npz", train_image=image[:80], train_label=label[:80],
        test_image=image[80:], test_label=label[80:],
    )  # fmt: skip
    path = folder / "tiny.py"
    path.write_text(CONFIG.replace("{data}", str(folder / "data.npz")))
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("uninterrupted")
    said = commands.command(
        "upscale", f"--config={config}", f"--workdir={folder / 'run'}", folder=folder
    )
    return folder / "run", said


def test_it_learns_and_says_what_came_out(uninterrupted):
    run, said = uninterrupted
    lines = commands.metrics(run)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 45
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    looks = [line for line in lines if line["kind"] == "validation"]
    assert [look["step"] for look in looks] == [45, 90, 135, 180]
    assert looks[-1]["psnr"] > looks[0]["psnr"] + 1.0
    assert len({look["bicubic"] for look in looks}) == 1
    found = json.loads((run / "evaluation.json").read_text())
    assert found["images"] == 10
    assert set(found["psnr"]) == {"random_pick", "bicubic"}
    for row in found["psnr"].values():
        np.testing.assert_allclose(row["gain"], row["edsr"] - row["bicubic"])
        assert f"{row['edsr']:.2f}" in said
        assert f"{row['bicubic']:.2f}" in said
    # Aliased halves are the harder ones for who takes them at their word.
    assert found["psnr"]["random_pick"]["bicubic"] < found["psnr"]["bicubic"]["bicubic"]
    assert (run / "table.txt").read_text().strip() in said
    assert {path.name for path in run.iterdir()} == {
        "config.json", "provenance.json", "metrics.jsonl", "checkpoints", "evaluation.json",
        "table.txt",
    }  # fmt: skip


def test_stopped_it_goes_on_and_ends_as_if_nothing_had_happened(uninterrupted, config, tmp_path):
    arguments = "upscale", f"--config={config}", f"--workdir={tmp_path / 'run'}"
    process = commands.start(*arguments, folder=tmp_path)
    seen = lambda: max([0, *(line["step"] for line in commands.metrics(tmp_path / "run"))])
    assert commands.kill_when(process, lambda: seen() >= 20, signal.SIGTERM)
    assert "state saved" in commands.finish(process, tmp_path, code=128 + signal.SIGTERM)
    assert "edsr: goes on from step" in commands.command(*arguments, folder=tmp_path)
    assert commands.metrics(tmp_path / "run") == commands.metrics(uninterrupted[0])
    assert commands.results(tmp_path / "run") == commands.results(uninterrupted[0])


@pytest.mark.parametrize("name", ["edsr_small", "edsr_bicubic"])
def test_the_configs_in_the_house_are_of_this_command(name, config):
    spec = load_config(str(commands.ROOT / f"experiments/configs/upscaling/{name}.py"))
    spec["data"] = {"name": load_config(str(config))["data"]["name"], "holdout": 8}
    built = upscale.experiment(spec)
    assert built.upscaler.factor == 2
    assert step_programs.plan_of(built).per_epoch == 72 // 16


@pytest.mark.parametrize("text", ["edsr.py", "edsr.py:bicubic"])
def test_the_size_of_its_authors_builds_on_their_squares(text, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 96, 96, 3), np.uint8)
    label = np.arange(48) % 2
    np.savez(
        tmp_path / "data.npz", train_image=image[:44], train_label=label[:44],
        test_image=image[44:], test_label=label[44:],
    )  # fmt: skip
    spec = load_config(str(commands.ROOT / f"experiments/configs/upscaling/{text}"))
    spec["data"] = {"name": f"arrays:{tmp_path / 'data.npz'}", "holdout": 8}
    built = upscale.experiment(spec)
    shapes = jax.eval_shape(
        built.upscaler.init, jax.eval_shape(jax.random.key, 0), jnp.zeros((96, 96, 3))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_369_859
    assert built.config["method"]["down"] == (text.partition(":")[2] or "random_pick")


def test_another_network_begins_with_its_own_settings(config):
    spec = load_config(str(config))
    found = upscale.changed(spec, [("upscaler.blocks", 3), ("upscaler.name", "imdn")])
    assert found.upscaler.to_dict() == {"name": "imdn", "blocks": 3, "width": 64}
    assert upscale.changed(spec, [("seed", 7)]).seed == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("upscaler.name", "esdr"), "did you mean 'edsr'"),
        (("upscaler.width", 0), "config.upscaler.width=0"),
        (("upscaler.name", "bicubic"), "'bicubic' has nothing to train"),
        (("upscaler.mean", (0.5, 0.5)), "config.upscaler.mean has 2 values"),
        (("upscalers.width", 8), "did you mean 'upscaler'"),
        (("upscaler", 8), "config.upscaler=8: expected a section"),
        (("method.crop", 64), "config.method.crop=64"),
        (("method.down", "area"), "config.method.down='area'"),
        (("data.holdout", 0), "config.validation: no images are held out"),
        (("training.batch_size", 100), "config.training.batch_size=100"),
        (("validation.attack", {}), "config.validation.attack: no such key"),
        (("evaluation.images", 0), "config.evaluation.images=0"),
        (("seed", -1), "config.seed=-1"),
    ],
)
def test_a_mistake_is_told_in_one_line(config, change, message):
    with pytest.raises(UsageError) as caught:
        upscale.experiment(upscale.changed(load_config(str(config)), [change]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
