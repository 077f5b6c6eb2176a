"""Models as files that others run, and other people's files as runs of ours."""

import hashlib
import importlib.util
import json
from functools import cache

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adopt, export
from experiments.cli import run
from rain_jax import defences, models
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.defences.network import in_front
from rain_jax.models import upscalers
from rain_jax.runs import loading, workdir

IMAGES = np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)
CNN = models.cnn(4, widths=(4,), hidden=8, batch_norm=True, mean=0.4, std=0.3)
NETWORKS = {
    "bare": CNN,
    "residual": models.preact_resnet(4, depths=(1, 1), width=4),
    "behind rain": in_front(defences.rain(upscalers.bicubic()), CNN),
}
NEEDED = {"stablehlo": ("flatbuffers",), "onnx": ("jax2onnx", "onnxruntime")}


def needs(format):
    absent = [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{absent[0]} is not installed: see the extra `{format}`")
    if format == "onnx" and jax.__version_info__ >= export._JAX2ONNX_BELOW:
        pytest.skip("jax2onnx does not work with this JAX")


def test_onnx_says_which_jax_it_needs(monkeypatch):
    monkeypatch.setattr(export, "_needed", lambda *modules: None)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    with pytest.raises(UsageError, match=r"config.format='onnx': expected JAX below 0.12"):
        export.onnx(lambda images: images, [])


@cache
def of(which):
    network = NETWORKS[which]
    return network, drawn.of(network, IMAGES.shape[1:])


@pytest.mark.parametrize("which", NETWORKS)
def test_stablehlo_has_the_logits_of_any_number_of_images(which):
    needs("stablehlo")
    network, variables = of(which)
    content, difference = export.written("stablehlo", network, variables, IMAGES)
    assert difference <= 1e-6
    again = jax.export.deserialize(bytearray(content))
    assert again.platforms == export.PLATFORMS
    seed = [np.uint32(3)] if network.random else []
    for count in (1, 5):
        images = np.resize(IMAGES, (count, 8, 8, 3))
        expected = jax.jit(export.function_of(network, variables))(images, *seed)
        np.testing.assert_allclose(again.call(images, *seed), expected, atol=1e-5)
    if network.random:
        assert np.abs(again.call(images, np.uint32(4)) - expected).max() > 1e-4


def test_stablehlo_convolves_as_every_platform_does():
    """Our own ways to convolve are for this CPU; a file is for others, too."""
    needs("stablehlo")
    network = models.preact_resnet(4, depths=(1,), width=64)
    images = np.resize(IMAGES, (3, 16, 16, 3))
    variables = drawn.of(network, (16, 16, 3))
    kernels = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(variables))
    here = jax.jit(export.function_of(network, variables)).lower(images).as_text()
    assert here.count("stablehlo.convolution") < kernels
    content, _ = export.written("stablehlo", network, variables, images)
    again = jax.export.deserialize(bytearray(content))
    # A convolution for each kernel and platform and, back to the images, once more.
    several = kernels * len(export.PLATFORMS)
    assert again.mlir_module().count("stablehlo.convolution") == several
    assert again.vjp().mlir_module().count("stablehlo.convolution") >= several


def test_stablehlo_can_be_attacked():
    needs("stablehlo")
    network, variables = of("bare")
    content, _ = export.written("stablehlo", network, variables, IMAGES)
    again = jax.export.deserialize(bytearray(content))
    loss = lambda f, images: jnp.sum(jnp.sin(f(images)))
    slopes = [
        jax.jit(jax.grad(lambda images, f=f: loss(f, images)))(IMAGES)
        for f in (again.call, export.function_of(network, variables))
    ]
    assert np.abs(slopes[1]).max() > 1e-3
    np.testing.assert_allclose(*slopes, atol=1e-6)


@pytest.mark.parametrize("which", ["bare", "residual"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_the_logits_of_any_number_of_images(which):
    needs("onnx")
    import onnxruntime

    network, variables = of(which)
    content, difference = export.written("onnx", network, variables, IMAGES)
    assert difference <= 1e-4
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = np.resize(IMAGES, (count, 8, 8, 3))
        (found,) = session.run(["logits"], {"images": images})
        expected = export.function_of(network, variables)(images)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_onnx_cannot_do_is_told_in_a_line():
    needs("onnx")
    with pytest.raises(UsageError, match=r"onnx.*fails for this network") as told:
        export.written("onnx", *of("behind rain"), IMAGES)
    assert "\n" not in str(told.value)


def test_a_file_with_other_logits_is_refused(monkeypatch):
    other = lambda content, images: np.zeros((len(images), 4), np.float32)
    monkeypatch.setitem(export._FORMATS, "onnx", (lambda *_: b"", other))
    with pytest.raises(UsageError, match="logits differ by"):
        export.written("onnx", *of("bare"), IMAGES)


@pytest.mark.parametrize("format", NEEDED)
def test_what_is_not_installed_is_told_in_a_line(format, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"pip install 'rain_jax\[{format}\]'"):
        export.written(format, *of("bare"), IMAGES)


# A published file becomes a run, and the run a file


def config(**start):
    attack = dict(name="pgd", steps=2)
    return tree.config(
        data=dict(name="digits", holdout=100, limit_train=128, limit_test=40),
        network=dict(
            name="preact_resnet", depths=(1, 2), width=4, variant="kuangliu", mean=0.3, std=0.5
        ),
        threat=dict(radius=0.1),
        method=dict(name="natural"),
        optimiser=dict(name="sgd"),
        schedule=dict(name="constant", peak=0.1),
        training=dict(epochs=1, batch_size=64),
        start=start,
        evaluation=dict(attacks=dict(pgd=attack), batch_size=40),
    )


def published(**more):
    """Random arrays by the names of kuangliu's pre-activation networks, and our variables."""
    variables = drawn.of(build.experiment(config()).network, (8, 8, 1))
    state = {"mu": np.array([0.3]), "sigma": np.array([0.5])}

    def add(name, params, stats):
        for ours, value in params.items():
            theirs = {"kernel": "weight", "scale": "weight", "bias": "bias"}[ours]
            order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
            state[f"{name}.{theirs}"] = np.asarray(value).transpose(order)
        for ours, value in stats.items():
            state[f"{name}.running_{ours}"] = np.asarray(value)

    params, stats = variables["params"], variables["batch_stats"]
    add("conv1", params["stem"], {})
    add("linear", params["classifier"], {})
    for block in [name for name in params if name.startswith("group")]:
        place = f"layer{block[5]}.{int(block[-1]) - 1}"
        for layer, leaves in params[block].items():
            named = {"shortcut": "shortcut.0"}.get(layer, layer.replace("norm", "bn"))
            add(f"{place}.{named}", leaves, stats[block].get(layer, {}))
    return {**state, **more}, variables


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_published_file_becomes_a_run(tmp_path, suffix):
    state, variables = published()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(file, **state)
    else:
        torch = pytest.importorskip("torch", reason="not installed: see the extra `torch`")
        tensors = {f"module.{k}": torch.tensor(v) for k, v in state.items()}
        torch.save({"epoch": 3, "state_dict": tensors}, file)
    experiment = build.experiment(config(classifier=str(file)))
    adopt.adopt(experiment, tmp_path / "run")
    found, step = loading.restore(experiment, tmp_path / "run")
    assert step == 0
    same(found, variables)
    told = (tmp_path / "run" / "provenance.json").read_bytes()
    with pytest.raises(UsageError, match="expected a new folder"):
        adopt.adopt(experiment, tmp_path / "run")
    assert (tmp_path / "run" / "provenance.json").read_bytes() == told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sigma": np.array([0.25])}, r"config.network.std=0.5: expected \(0.25,\), as in config."),
        ({"mu": np.array([0.4])}, "config.network.mean=0.3: expected"),
        ({"extra.weight": np.zeros(3)}, "'extra.weight' has no place in this network"),
        ({"bn.weight": np.ones(8), "bn.bias": np.ones(8), "bn.running_mean": np.ones(8),
          "bn.running_var": np.ones(8)}, "config.network.variant='kuangliu': expected 'paper'"),
        ({"linear.weight": np.zeros((5, 8)), "linear.bias": np.zeros(5)},
         "expected the weights of the network that the config describes; the file's is {'name"),
    ],
)  # fmt: skip
def test_files_of_other_networks_are_refused(tmp_path, more, message):
    file = tmp_path / "weights.npz"
    np.savez(file, **published(**more)[0])
    with pytest.raises(UsageError, match=message):
        adopt.adopt(build.experiment(config(classifier=str(file))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"not a file of arrays"])
def test_files_of_something_else_are_refused(tmp_path, content):
    pytest.importorskip("torch", reason="PyTorch is not installed: see the extra `torch`")
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"config.start.classifier=.*: expected a file of arrays"):
        adopt.adopt(build.experiment(config(classifier=str(file))), tmp_path / "run")


def test_whole_modules_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: see the extra `torch`")
    file = tmp_path / "weights.pt"
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(UsageError, match="expected a file of arrays") as told:
        adopt.adopt(build.experiment(config(classifier=str(file))), tmp_path / "run")
    assert "\n" not in str(told.value)
    torch.save({"epoch": 3}, file)
    with pytest.raises(UsageError, match="expected a state dictionary, alone or under one of"):
        adopt.adopt(build.experiment(config(classifier=str(file))), tmp_path / "run")


def test_the_command_writes_the_file_and_its_description(tmp_path, capsys):
    needs("stablehlo")
    state, variables = published()
    np.savez(tmp_path / "weights.npz", **state)
    experiment = build.experiment(config(classifier=str(tmp_path / "weights.npz")))
    adopt.adopt(experiment, tmp_path / "run")
    out = tmp_path / "out"
    argv = export._arguments(["export", f"--workdir={tmp_path / 'run'}", f"--out={out}"])
    run(export.main, workdir.read_config, argv, changed=export.changed)
    content = (out / "model.stablehlo").read_bytes()
    told = json.loads((out / "model.json").read_text())
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    assert told["inputs"]["images"]["shape"] == ["N", 8, 8, 1]
    assert told["inputs"]["images"]["range"] == [0, 1]
    assert told["classes"] == list("0123456789")
    assert not told["random"]
    images = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)
    found = jax.export.deserialize(bytearray(content)).call(images)
    expected = jax.jit(experiment.network.apply)(variables, images)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "model.stablehlo" in capsys.readouterr().out

    with pytest.raises(SystemExit) as left:
        run(export.main, workdir.read_config, [*argv, "--config.format=onxx"],
            changed=export.changed)  # fmt: skip
    assert left.value.code == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err


def test_without_weights_there_is_nothing_to_adopt(tmp_path):
    with pytest.raises(UsageError, match="expected a file of weights, or a run"):
        adopt.adopt(build.experiment(config()), tmp_path / "run")
