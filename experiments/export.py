"""Writes a trained model, with its defence, as a file that runs without this library.

    python -m experiments.export --workdir=RUN --out=DIR
    python -m experiments.export --workdir=RUN --out=DIR --config.format=onnx

`stablehlo` is for JAX alone: `jax.export.deserialize(FILE.read_bytes()).call(images)`, on CPU, GPU
or TPU, differentiable towards the images once. `onnx` goes through jax2onnx, which does not know
every operation: what it writes is run by onnxruntime and compared with the model, or refused.
Images are float32 [N, H, W, C] in [0, 1], whatever N; normalisation is inside, and so is the
defence. A random model takes a seed as its second input, and one image's draws come from it and
from the place in the batch. Beside the file is its description, model.json.
"""

import hashlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.interpreters import partial_eval

from experiments.cli import run
from rain_jax import data
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.config.schema import call
from rain_jax.logs import provenance, write_json
from rain_jax.models.conv import by_lax
from rain_jax.parallel import image_keys, initialise
from rain_jax.runs import cache, loading, workdir
from rain_jax.types import Array, Network, Variables

PLATFORMS = ("cpu", "cuda", "tpu")
CHECKED = 8  # test images that the file is tried on
TOLERANCE = 1e-4  # by which logits may differ, of the largest one
OPSET = 21  # of ONNX, from 2024: what runtimes of today know


class Export(NamedTuple):
    """What is written where."""

    format: Literal["stablehlo", "onnx"]
    out: str | None


def export(*, format: Literal["stablehlo", "onnx"] = "stablehlo", out: str | None = None) -> Export:
    """`out` is a folder, by default `export` in that of the run."""
    return Export(format, out)


def function_of(network: Network, variables: Variables) -> Callable[..., Array]:
    """Images [N, H, W, C], and a seed where the model is random, to logits [N, K]."""

    def logits(images: Array) -> Array:
        return network.apply(variables, images)[0]

    def drawn(images: Array, seed: Array) -> Array:
        keys = image_keys(jax.random.key(seed), jnp.arange(images.shape[0]))
        return network.apply(variables, images, keys=keys)[0]

    return drawn if network.random else logits


def _inputs(shape: tuple[int, ...], random: bool) -> list[jax.ShapeDtypeStruct]:
    (count,) = jax.export.symbolic_shape("N")
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return [jax.ShapeDtypeStruct((count, *shape), jnp.float32), *([seed] if random else [])]


def stablehlo(function: Callable[..., Array], inputs: list[jax.ShapeDtypeStruct]) -> bytes:
    """The serialised program, of any number of images, with its gradient."""
    _needed("stablehlo", "flatbuffers")
    # Our own convolutions are for CPUs and for batches of known sizes; a file is for all platforms.
    with by_lax():
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*inputs)
        return bytes(exported.serialize(vjp_order=1))


def onnx(function: Callable[..., Array], inputs: list[jax.ShapeDtypeStruct]) -> bytes:
    """The ONNX model, of any number of images."""
    _needed("onnx", "jax2onnx", "onnxruntime")
    if jax.__version_info__ >= _JAX2ONNX_BELOW:
        raise UsageError(
            "config.format='onnx': expected JAX below "
            f"{'.'.join(map(str, _JAX2ONNX_BELOW))}, as jax2onnx needs; here is {jax.__version__}"
        )
    # Traced here, since the converter would put its own layers in the place of Flax's; and without
    # what nobody uses, such as keys that are split for a defence that draws nothing.
    with by_lax():
        closed = jax.make_jaxpr(function)(*inputs)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
    traced = jax.extend.core.jaxpr_as_fun(closed.replace(jaxpr=needed))
    names = ["images", "seed"][: len(inputs)]
    converter = importlib.import_module("jax2onnx")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = converter.to_onnx(
            traced, inputs, opset=OPSET, input_names=names, output_names=["logits"]
        )
    return model.SerializeToString()


# The newest jax2onnx beside which our Orbax can be installed (0.13) reads what later ones moved.
_JAX2ONNX_BELOW = (0, 12)


def _needed(format: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"config.format={format!r}: expected {module} to be installed: "
                f"pip install 'rain_jax[{format}]'"
            )


def _run_stablehlo(written: bytes, *inputs: np.ndarray) -> np.ndarray:
    return np.asarray(jax.export.deserialize(bytearray(written)).call(*inputs))


def _run_onnx(written: bytes, *inputs: np.ndarray) -> np.ndarray:
    runtime = importlib.import_module("onnxruntime")
    runtime.set_default_logger_severity(4)
    session = runtime.InferenceSession(written, providers=["CPUExecutionProvider"])
    named = zip((one.name for one in session.get_inputs()), inputs, strict=True)
    return np.asarray(session.run(None, dict(named))[0])


_FORMATS: dict[str, tuple[Callable[..., bytes], Callable[..., np.ndarray]]] = {
    "stablehlo": (stablehlo, _run_stablehlo),
    "onnx": (onnx, _run_onnx),
}


def written(
    format: str, network: Network, variables: Variables, images: np.ndarray
) -> tuple[bytes, float]:
    """The model as a file's content, and by how much its logits of `images` differ from ours.

    As a share of the largest logit. Raises `UsageError` where the path fails for this network, or
    ends in other logits.
    """
    write, again = _FORMATS[format]
    function = function_of(network, variables)
    given = (images, *([np.uint32(7)] if network.random else []))
    expected = np.asarray(jax.jit(function)(*given))
    try:
        content = write(function, _inputs(images.shape[1:], network.random))
        found = again(content, *given)
    except UsageError:
        raise
    except Exception as error:  # of any kind: the converter's and the runtime's are their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"config.format={format!r}: fails for this network ({reason})") from error
    difference = float(np.max(np.abs(found - expected)) / max(1.0, np.max(np.abs(expected))))
    if not difference <= TOLERANCE:
        raise UsageError(
            f"config.format={format!r}: fails for this network (logits differ by {difference:.2g})"
        )
    return content, difference


def described(
    experiment: build.Experiment,
    asked: Export,
    content: bytes,
    checked: int,
    difference: float,
    step: int,
) -> dict[str, Any]:
    """What model.json says, of `checked` images whose logits differ by `difference` at most."""
    shape, classes = experiment.splits.test.shape, experiment.network.classes
    inputs: dict[str, Any] = {
        "images": {
            "shape": ["N", *shape], "dtype": "float32", "layout": "NHWC", "range": [0.0, 1.0]
        }
    }  # fmt: skip
    if experiment.network.random:
        inputs["seed"] = {"shape": [], "dtype": "uint32"}
    return {
        "format": asked.format,
        "file": _name(asked.format),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "inputs": inputs,
        "outputs": {"logits": {"shape": ["N", classes], "dtype": "float32"}},
        "classes": experiment.splits.test.class_names,
        "random": experiment.network.random,
        "platforms": PLATFORMS if asked.format == "stablehlo" else None,
        "checked": {"images": checked, "largest_difference": difference, "tolerance": TOLERANCE},
        "data": experiment.splits.test.name,
        "step": step,
        "config": experiment.config,
        "provenance": provenance(),
    }


def _name(format: str) -> str:
    return f"model.{format}"


def main(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Exports the run in `folder`."""
    cache.enable()
    initialise()
    asked: Export = call("config", export, dict(config.export))
    experiment = build.experiment(config.run)
    out = folder / "export" if asked.out is None else Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    workdir.check_writable(out)
    variables, step = loading.restore(experiment, folder)
    loading.check_finite(variables, str(folder))
    source = data.first(experiment.splits.test, min(CHECKED, experiment.splits.test.size))
    images = next(iter(data.evaluation_batches(source, source.size))).image
    content, difference = written(
        asked.format, experiment.network, variables, np.asarray(data.as_float(images))
    )
    (out / _name(asked.format)).write_bytes(content)
    write_json(
        out / "model.json", described(experiment, asked, content, len(images), difference, step)
    )
    print(
        f"{out / _name(asked.format)}: {len(content):,} bytes; logits of {len(images)} test images "
        f"as the model's, within {difference:.1g} of the largest",
        flush=True,
    )


def changed(config: Any, changes: Sequence[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """The run's config under `run`, and what this command alone knows under `export`."""
    own = {key: value for key, value in changes if key in Export._fields}
    rest = [change for change in changes if change[0] not in own]
    return ml_collections.ConfigDict({"export": own, "run": tree.changed(config, rest)})


def _arguments(argv: Sequence[str]) -> list[str]:
    """`--out` is short for `--config.out`."""
    return [f"--config.{word[2:]}" if word.partition("=")[0] == "--out" else word for word in argv]


if __name__ == "__main__":
    run(main, workdir.read_config, _arguments(sys.argv), changed=changed)
