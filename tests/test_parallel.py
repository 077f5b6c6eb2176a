"""Programs over devices: both mappings, the same sums, and refusals."""

import contextlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import parallel
from rain_jax.checks import UsageError
from rain_jax.parallel import (
    check_batch_size,
    choose_devices,
    image_keys,
    place,
    psum,
    psum_as,
    with_statistics,
)
from rain_jax.types import Network

ROOT = Path(__file__).resolve().parents[1]
MAPPINGS = pytest.mark.parametrize("mapping", ["shard_map", "pmap"])


def descend(weights, batch, axis_name=None):
    """One step of least squares, as a per-device body."""

    def loss(weights):
        return jnp.sum((batch["x"] @ weights - batch["y"]) ** 2)

    total, gradient = psum(jax.value_and_grad(loss)(weights), axis_name)
    number = psum(jnp.float32(batch["y"].shape[0]), axis_name)
    return weights - 0.1 * gradient / number, {"loss": total / number}, 2.0 * batch["y"]


@MAPPINGS
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_step_over_devices_is_the_step(mapping, count, key):
    batch = {
        "x": np.asarray(jax.random.normal(key, (16, 3))),
        "y": np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (16,))),
    }
    weights = jnp.ones(3)
    expected = descend(weights, batch)
    devices = place(mapping, choose_devices(count))
    step = devices.map(descend, inputs=(False, True), outputs=(False, False, True), donate=(0,))
    found = step(devices.replicate(jnp.array(weights)), devices.split(batch))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1]["loss"], expected[1]["loss"], rtol=1e-5)
    np.testing.assert_array_equal(devices.gather(found[2]), expected[2])
    assert devices.size == count


def test_both_mappings_give_the_same_bits(key):
    batch = {"x": np.ones((16, 3), np.float32) * 0.3, "y": np.linspace(0, 1, 16, dtype=np.float32)}
    results = []
    for mapping in ("shard_map", "pmap"):
        devices = place(mapping)
        step = devices.map(descend, inputs=(False, True), outputs=(False, False, True))
        results.append(step(devices.replicate(jnp.ones(3)), devices.split(batch)))
    np.testing.assert_array_equal(results[0][0], results[1][0])


def test_keys_belong_to_places_and_not_to_batches(key):
    all_keys = jax.random.key_data(image_keys(key, jnp.arange(10)))
    some = jax.random.key_data(image_keys(key, jnp.array([7, 2])))
    np.testing.assert_array_equal(some, all_keys[jnp.array([7, 2])])
    assert len({tuple(k) for k in np.asarray(all_keys).tolist()}) == 10


def test_keys_pass_through_both_mappings(key):
    for mapping in ("shard_map", "pmap"):
        devices = place(mapping)

        def draw(key, index, axis_name=None):
            return jax.vmap(jax.random.uniform)(image_keys(key, index))

        program = devices.map(draw, inputs=(False, True), outputs=True)
        found = program(devices.replicate(key), devices.split(np.arange(16)))
        expected = jax.vmap(jax.random.uniform)(image_keys(key, jnp.arange(16)))
        np.testing.assert_array_equal(devices.gather(found), expected)


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_sums_in_bfloat16_are_as_near_as_its_bits(mapping):
    spread = 10.0 ** np.arange(-2, 2)[:, None]
    shares = np.float32(np.random.default_rng(2).normal(size=(4, 1000)) * spread)
    devices = place(mapping, choose_devices(4))
    total = devices.map(
        lambda share, axis_name: psum_as("bfloat16", share[0], axis_name),
        inputs=(True,), outputs=False,
    )  # fmt: skip
    found = np.asarray(total(devices.split(shares)), np.float64)
    exact, sizes = np.sum(shares, 0, np.float64), np.sum(np.abs(shares), 0, np.float64)
    rounded = shares.astype(jnp.bfloat16).astype(np.float64).sum(0)
    assert np.max(np.abs(found - exact) / sizes) > 2e-4
    # Of each share, and of the sums of them where the platform rounds those too.
    np.testing.assert_array_less(np.abs(found - rounded), 2**-8 * sizes + 1e-9)
    np.testing.assert_array_less(np.abs(found - exact), 2 * 2**-8 * sizes)
    with pytest.raises(UsageError, match="sums='float16': expected one of float32, bfloat16"):
        psum_as("float16", shares, None)


def test_options_that_overlap_are_known_to_xla_and_given_to_several_devices(key, monkeypatch):
    options = parallel._OVERLAPPING["gpu"]
    program = jax.jit(lambda x: x + 1).lower(1.0)
    program.compile(compiler_options=options)  # a name that XLA does not know is refused
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        program.compile(compiler_options={"xla_gpu_all_reduce_combine": 1})

    batch = {"x": np.ones((16, 3), np.float32), "y": np.linspace(0, 1, 16, dtype=np.float32)}

    def stepped(count, options, **how):
        monkeypatch.setitem(parallel._OVERLAPPING, "cpu", options)
        devices = place("shard_map", choose_devices(count), **how)
        step = devices.map(descend, inputs=(False, True), outputs=(False, False, True))
        return step(devices.replicate(jnp.ones(3)), devices.split(batch))[0]

    np.testing.assert_array_equal(stepped(4, options, overlap=True), stepped(4, {}))
    unknown = {"xla_of_nobody": True}
    for count, overlap in ((4, False), (1, True)):
        stepped(count, unknown, overlap=overlap)  # nothing is asked of XLA
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_nobody"):
        stepped(4, unknown, overlap=True)


def test_of_a_network_that_keeps_its_own_statistics_only_what_moved_is_sent(key):
    """Frozen weights are part of a defended network's state, and large."""

    def apply(variables, images, train=False, axis_name=None, keys=None):
        seen = images.mean() if axis_name is None else jax.lax.pmean(images.mean(), axis_name)
        state = {"frozen": variables["frozen"], "mean": variables["mean"] + seen,
                 "count": variables["count"] + 1}  # fmt: skip
        return images * variables["frozen"].sum() - seen, state

    network = with_statistics("device", Network(lambda key, images: {}, apply, 2))
    devices = place("shard_map", choose_devices(4))
    program = devices.map(
        lambda variables, images, axis_name: network.apply(variables, images, True, axis_name),
        inputs=(False, True), outputs=(True, False),
    )  # fmt: skip
    variables = {"frozen": jnp.ones(1000), "mean": jnp.zeros(()), "count": jnp.int32(3)}
    images = jnp.arange(8.0)
    logits, state = program(variables, images)
    shares = images.reshape(4, 2)
    expected = 1000 * shares - shares.mean(1, keepdims=True)
    np.testing.assert_allclose(np.reshape(logits, (4, 2)), expected, rtol=1e-6)
    assert float(state["mean"]) == pytest.approx(3.5)
    text = program.lower(variables, images).as_text()
    sent = re.findall(r'"stablehlo.all_reduce".*?\}\) : \((.*?)\) ->', text, re.DOTALL)
    assert sorted(sent) == ["tensor<f32>", "tensor<i32>"]
    assert state["count"].dtype == jnp.int32
    assert int(state["count"]) == 4
    assert with_statistics("all", network) is network


def test_refusals():
    with pytest.raises(UsageError, match="overlap=True: expected mapping='shard_map'"):
        place("pmap", overlap=True)
    with pytest.raises(UsageError, match=r"batch_size=20: expected a positive multiple of the 8"):
        check_batch_size("batch_size", 20, 8)
    with pytest.raises(UsageError, match="devices=9: expected 1 to 8"):
        choose_devices(9)
    with pytest.raises(UsageError, match="did you mean 'shard_map'"):
        place("shardmap")


SHARED = """
import jax
from rain_jax.parallel import choose_devices, initialise
initialise()
initialise()  # afterwards it does nothing
print(len(jax.devices()), len(choose_devices()), len(choose_devices(training=True)))
"""


@pytest.mark.parametrize(
    ("environment", "everywhere", "training"),
    [({}, "cores", 1), ({"JAX_NUM_CPU_DEVICES": "3"}, 3, 3),
     ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5, 5)],
)  # fmt: skip
def test_a_cpu_device_for_each_core_that_training_does_not_turn_on(
    environment, everywhere, training
):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    said = subprocess.run(
        [sys.executable, "-c", SHARED], capture_output=True, text=True, check=True,
        env={**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    if everywhere == "cores":
        everywhere = min(16, len(os.sched_getaffinity(0)))
    assert said.stdout.split() == [str(everywhere), str(everywhere), str(training)]


JOINED = """
import jax
from rain_jax.parallel import initialise, place
initialise()
devices = place()
total = devices.map(
    lambda x, axis_name: jax.lax.psum(x.sum(), axis_name), inputs=(True,), outputs=False
)
mine = jax.numpy.arange(2.0) + 2 * jax.process_index()
print(jax.process_index(), jax.process_count(), devices.size, float(total(devices.split(mine))))
"""


def said_by(*environments, before=""):
    """What processes print that find each other by their environments."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_CO", "JAX_NUM", "SLURM"))}
    everybody = {
        "RAIN_JAX_DISTRIBUTED": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", before + JOINED], stdout=subprocess.PIPE, text=True,
            env={**kept, **everybody, **own},
        )
        for own in environments
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_job_of_slurm_is_found_by_its_variables():
    """Who and how many, and by the job's number at which port: see docs/jobs/slurm_train.sh."""
    ports = 2**12  # the last so many
    for number in range(4321, 4321 + ports):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", number % ports + 2**16 - ports))
            break
    job = {
        "SLURM_JOB_ID": str(number), "SLURM_STEP_NODELIST": "localhost,elsewhere",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    said = said_by(*({**job, "SLURM_PROCID": place, "SLURM_LOCALID": place} for place in "01"))
    assert said == ["0 2 4 6.0", "1 2 4 6.0"]


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a TPU's host is told about its slice when it asks Google's cloud."""

    def do_GET(self):
        name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        answer = self.server.answers.get(name)
        self.send_response(404 if answer is None else 200)
        self.end_headers()
        self.wfile.write((answer or "").encode())

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def metadata_of(worker):
    """The address of a server that takes its caller for one of a slice's two hosts."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.answers = {
            "agent-worker-number": str(worker),
            "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:192.0.2.1",
            "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nTYPE: 'V5P'\n",
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("told", ["by Google's metadata", "by its variables"])
def test_the_hosts_of_a_tpu_slice_are_found(told):
    """As on the hosts of docs/jobs/tpu_pod.sh, and in the pods of a Kubernetes cluster.

    JAX's detection of TPUs is made to believe that there are some; the devices are CPUs.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8482))  # JAX's own choice for TPUs
        except OSError:
            pytest.skip("port 8482 is taken")
    with metadata_of(0) as first, metadata_of(1) as second:
        if told == "by its variables":
            hosts = {"TPU_WORKER_HOSTNAMES": "localhost,192.0.2.1"}
            each = [{**hosts, "TPU_WORKER_ID": "0"}, {**hosts, "TPU_WORKER_ID": "1"}]
        else:
            each = [{"GCE_METADATA_IP": first}, {"GCE_METADATA_IP": second}]
        # Where it sees no chips, JAX also turns the question to the metadata off.
        asking = "" if "TPU_WORKER_ID" in each[0] else "del os.environ['TPU_SKIP_MDS_QUERY']\n"
        said = said_by(
            *({"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": ip, **own}
              for ip, own in zip((first, second), each, strict=True)),
            before=f"import os, jax\n{asking}",
        )  # fmt: skip
    assert said == ["0 2 4 6.0", "1 2 4 6.0"]
