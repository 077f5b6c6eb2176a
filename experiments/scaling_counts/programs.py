"""The programs of a config, compiled for so many devices and never run."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.scaling_counts import hlo, sending, working
from rain_jax import evaluation
from rain_jax.checks import UsageError
from rain_jax.config import build
from rain_jax.config.networks import logits_fn_of
from rain_jax.data import as_float
from rain_jax.models.conv import by_lax
from rain_jax.parallel import Devices, check_batch_size, image_keys, place
from rain_jax.runs import step_programs
from rain_jax.types import Array, AxisName, Batch, Key, PyTree

# Simulated devices need no code that is fast: it is not run.
_HASTE = {"cpu": {"xla_backend_optimization_level": 0}, "tpu": {}}


class Memory(NamedTuple):
    """Bytes on each device, as the compiler plans them."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


class Counts(NamedTuple):
    """What is read from one compiled program."""

    collectives: list[sending.Collective]
    work: working.Work
    memory: Memory


def simulated(count: int) -> list[jax.Device]:
    """`count` devices of the CPU. To be called before anything else touches a device."""
    jax.config.update("jax_platforms", "cpu")
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the devices are there already
            jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise UsageError(
            f"config.devices: expected at most the {len(jax.devices())} CPU devices that this "
            "process has: unset XLA_FLAGS"
        )
    return jax.devices()


def described(topology: str) -> list[Any]:
    """The devices of a TPU slice such as "v5p:2x2x2", which need not be there.

    They can be compiled for wherever libtpu is installed, by the compiler of TPUs itself.
    """
    # Without these, libtpu asks the machine's owner what kind of TPU it is on, and waits; and it
    # locks what a TPU would have to itself.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # whatever a plugin raises
        raise UsageError(
            f"config.compiler='tpu': expected libtpu to be installed (pip install "
            f"'rain_jax[tpu]') and to know {topology}: {' '.join(str(error).split()):.120}"
        ) from None
    return list(found.devices)


def resized(experiment: build.Experiment, batch_size: int) -> build.Experiment:
    """The experiment with another batch size, over all devices."""
    training = dataclasses.replace(experiment.training, batch_size=batch_size)
    return experiment._replace(training=training)


def state_of(experiment: build.Experiment) -> PyTree:
    """The shapes of the state of training."""
    method = experiment.method(step_programs.plan_of(experiment))
    images = jax.ShapeDtypeStruct((1, *experiment.splits.train.shape), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(method.init, jax.eval_shape(experiment.network.init, key, images))


def kept(experiment: build.Experiment) -> int:
    """Bytes that JAX hands from the forward to the backward pass, for a batch of training.

    Before any compiler has seen it: one may keep less, and what the network itself holds is in it.
    """
    network, size = experiment.network, experiment.training.batch_size
    images = jax.ShapeDtypeStruct((size, *experiment.splits.train.shape), jnp.float32)

    def backward(key: Key, images: Array) -> Any:
        variables = network.init(key, images[:1])
        keys = jax.random.split(key, size) if network.random else None

        def logits(params: PyTree) -> Array:
            return network.apply({**variables, "params": params}, images, True, None, keys)[0]

        return jax.vjp(logits, variables["params"])[1]

    with by_lax():
        found = jax.eval_shape(backward, jax.eval_shape(jax.random.key, 0), images)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))


def training_step(experiment: build.Experiment, devices: Sequence[Any]) -> Counts:
    """The training step over all `devices`, by `shard_map`, as accelerators run it.

    `pmap` makes the same program.
    """
    plan = step_programs.plan_of(experiment)
    check_batch_size("config.training.batch_size", plan.batch_size, len(devices))
    there = place("shard_map", devices, overlap=experiment.parallel.overlap)
    step = step_programs.make_step(experiment, experiment.method(plan), plan, _lowering(there))
    source, keys = experiment.splits.train, jax.eval_shape(lambda: step_programs.keys_of(0))
    dtype = source.read(0)[0].dtype
    if step_programs.is_resident(experiment):
        size = source.size + (source.extra.source.size if source.extra else 0)
        order = jax.eval_shape(step_programs.order_of(experiment, plan), keys.order, 0)
        images = jax.ShapeDtypeStruct((size, *source.shape), dtype)
        labels = jax.ShapeDtypeStruct((size,), jnp.int32)
        numbers = jax.ShapeDtypeStruct((len(devices),), jnp.int32)
        fed: Any = (keys, images, labels, order), (numbers,)
    else:
        fed = keys, (_batch(plan.batch_size, source.shape, dtype),)
    return _compiled(lambda: step(state_of(experiment), fed), devices)


def evaluations(experiment: build.Experiment, devices: Sequence[Any]) -> dict[str, Counts]:
    """Programs that judge clean images, and that attack and judge, for each column of a run.

    Each takes its images through the whole attack at once, where an evaluation goes step by step
    and lets images leave: what is counted is the most that an image can cost.
    """
    there = _lowering(place("shard_map", devices))
    rules = evaluation.Rules(experiment.threat, experiment.evaluation.draws or 1)
    of = logits_fn_of(experiment.network)
    images = jax.ShapeDtypeStruct((1, *experiment.splits.train.shape), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(experiment.network.init, key, images)
    dtype = experiment.splits.test.read(0)[0].dtype
    size = len(devices) * -(-experiment.evaluation.batch_size // len(devices))
    batch = _batch(size, experiment.splits.test.shape, dtype)

    def lowered(attack: Any) -> Any:
        def one(variables: PyTree, key: Key, clean: Array, label: Array) -> Any:
            attack_key, judge_key = evaluation.split_for_judge(key)
            logits_fn = of(variables)
            found = clean if attack is None else attack(attack_key, logits_fn, clean, label)
            return evaluation.judge(logits_fn, rules, judge_key, clean, found, label)

        def body(variables: PyTree, key: Key, batch: Batch, axis_name: AxisName = None) -> Any:
            keys, clean = image_keys(key, batch.index), as_float(batch.image)
            return jax.vmap(partial(one, variables))(keys, clean, batch.label)

        program = there.map(body, inputs=(False, False, True), outputs=True)
        return program(variables, key, batch)

    attacks = {"clean": None, **{name: look.attack for name, look in experiment.columns.items()}}
    return {name: _compiled(partial(lowered, attack), devices) for name, attack in attacks.items()}


def _batch(size: int, shape: tuple[int, ...], dtype: Any) -> Batch:
    """The shapes of a batch."""
    number: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    image: Any = jax.ShapeDtypeStruct((size, *shape), dtype)
    valid: Any = jax.ShapeDtypeStruct((size,), jnp.bool_)
    return Batch(image, number, number, valid)


def _lowering(devices: Devices) -> Devices:
    """Devices whose programs are lowered when they are called, on shapes."""

    def over(*body: Any, **how: Any) -> Callable[..., Any]:
        program: Any = devices.map(*body, **how)
        return program.lower

    return devices._replace(map=over)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without the compilation cache: what is in it can be read on a machine with a TPU alone."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _compiled(lower: Callable[[], Any], devices: Sequence[Any]) -> Counts:
    # Convolutions as `lax` has them: the rule for CPUs is no part of what accelerators run.
    with by_lax():
        lowered = lower()
    platform = devices[0].platform
    with _uncached() if platform == "tpu" else contextlib.nullcontext():
        compiled = lowered.compile(compiler_options=_HASTE[platform])
    program, memory = hlo.read(compiled.as_text()), compiled.memory_analysis()
    return Counts(
        sending.collectives(program),
        working.work(program),
        Memory(
            memory.argument_size_in_bytes, memory.output_size_in_bytes,
            memory.alias_size_in_bytes, memory.temp_size_in_bytes,
        ),
    )  # fmt: skip
