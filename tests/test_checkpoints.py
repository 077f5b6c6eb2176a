"""What is restored is what was saved, or the run is told: after kills, damage and new devices."""

import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rain_jax.checkpoints import Checkpoints
from rain_jax.checks import UsageError

ROOT = Path(__file__).resolve().parents[1]


class Momentum(NamedTuple):
    trace: Any
    count: Any


class Empty(NamedTuple):
    pass


def replicated(devices: int) -> NamedSharding:
    mesh = jax.make_mesh(
        (devices,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec())


def trees(step: int, width: int = 5) -> tuple[Any, Any]:
    key = jax.random.key(step)
    params = {"conv": {"kernel": jax.random.normal(key, (4, width)), "bias": jnp.ones(width)}}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    model = {"params": params, "model_state": {}, "averaged": half}
    train = {
        "optimiser": (Momentum(jax.tree.map(jnp.zeros_like, params), jnp.int32(step)), Empty()),
        "key": key,
        "keys": jax.random.split(key, 3),
        "nothing": None,
        "flag": jnp.asarray(True),
    }
    return model, train


def like(sharding: Any, width: int = 5) -> Any:
    structs = jax.eval_shape(lambda: trees(0, width))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), structs
    )


def raw(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


def folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 4)])
def test_what_was_saved_comes_back_on_other_devices(tmp_path, before, after):
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        checkpoints.save(3, *jax.device_put(trees(3), replicated(before)))
    sharding = replicated(after)
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        step, model, train = checkpoints.restore(*like(sharding))
        _, alone = checkpoints.restore_model(like(sharding)[0])
    assert step == 3
    assert_same((model, train), trees(3))
    assert_same(alone, trees(3)[0])
    for leaf in jax.tree.leaves((model, train, alone)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    np.testing.assert_array_equal(  # a key that works, not only one that looks right
        jax.random.uniform(train["key"]), jax.random.uniform(jax.random.key(3))
    )


def test_arrays_serve_as_targets_and_structs_without_sharding_go_to_the_first_device(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, *trees(1))
        checkpoints.wait()
        assert_same(checkpoints.restore(*trees(0))[1:], trees(1))
        _, model, _ = checkpoints.restore(*jax.eval_shape(lambda: trees(0)))
    assert {next(iter(leaf.devices())) for leaf in jax.tree.leaves(model)} == {jax.devices()[0]}


def test_numbers_and_numpy_arrays_come_back_as_numpy_arrays(tmp_path):
    train = {"epoch": 7, "rate": 0.5, "order": np.arange(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {}, train)
        checkpoints.wait()
        _, model, found = checkpoints.restore({}, {"epoch": 0, "rate": 0.0, "order": np.arange(3)})
    assert model == {}
    assert int(found["epoch"]) == 7
    assert float(found["rate"]) == 0.5
    np.testing.assert_array_equal(found["order"], np.arange(3))


def test_buffers_may_be_donated_at_once(tmp_path):
    sharding = replicated(8)
    start = jax.device_put({"weight": jnp.arange(200_000.0)}, sharding)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, start, {})
        jax.block_until_ready(spoil(start))
        checkpoints.wait()
        target = {"weight": jax.ShapeDtypeStruct((200_000,), jnp.float32, sharding=sharding)}
        _, found = checkpoints.restore_model(target)
    np.testing.assert_array_equal(found["weight"], np.arange(200_000.0, dtype=np.float32))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    model = {"x": jnp.zeros(())}
    scores = {1: 0.1, 2: 0.7, 3: 0.3, 4: 0.7, 5: 0.2, 6: None, 7: float("nan"), 8: 0.6}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is checkpoints.best() is None
        for step in range(1, 5):
            checkpoints.save(step, model, {}, score=scores[step])
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # scores survive a restart
        for step in range(5, 9):
            checkpoints.save(step, model, {}, score=scores[step])
        checkpoints.wait()
        assert folders(tmp_path) == ["4", "7", "8"]  # of equals the newest
        assert (checkpoints.latest(), checkpoints.best()) == (8, 4)
        assert checkpoints.restore_model(model)[0] == 4
        assert checkpoints.restore_model(model, "latest")[0] == 8
        assert checkpoints.restore_model(model, 7)[0] == 7


def test_the_best_may_go(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.zeros(())}, {}, score=-step)
    assert folders(tmp_path) == ["3"]


def test_without_scores_the_best_is_the_newest(tmp_path):
    model = {"x": jnp.zeros(())}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, {})
        checkpoints.save(2, model, {})
        checkpoints.wait()
        assert checkpoints.best() is None
        assert checkpoints.restore_model(model)[0] == 2


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(())}, {})
        checkpoints.save(1, {"x": jnp.zeros(())}, {})
        checkpoints.wait()
        assert checkpoints.restore_model({"x": jnp.zeros(())})[1]["x"] == 1


def test_reading_changes_nothing(tmp_path):
    under_way = "2.orbax-checkpoint-tmp"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, *trees(1))
    (tmp_path / under_way).mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.best() is None
        checkpoints.restore_model(trees(0)[0])
    assert folders(tmp_path) == ["1", under_way]
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UsageError, match="none: no checkpoint here"):
            checkpoints.restore_model(trees(0)[0])
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, *trees(2))
    assert folders(tmp_path) == ["1", "2"]


def test_a_run_that_begins_finds_nothing(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(*trees(0)) is None
    assert folders(tmp_path / "run") == []


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_is_kept(tmp_path, keep):
    with pytest.raises(UsageError, match=f"keep={keep}"):
        Checkpoints(tmp_path, keep=keep)


def test_a_misfit_is_named(tmp_path):
    model, train = trees(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, train)
        checkpoints.wait()

        def complaint(model_like, train_like):
            with pytest.raises(UsageError) as caught:
                checkpoints.restore(model_like, train_like)
            assert "\n" not in str(caught.value)
            assert str(tmp_path) in str(caught.value)
            return str(caught.value)

        wide = complaint(trees(0, width=6)[0], train)
        assert "of another network: in step 1, model leaf averaged.conv.bias" in wide
        assert "is bfloat16[5], expected bfloat16[6]" in wide
        missing = complaint({**model, "more": jnp.zeros(2)}, train)
        assert "model leaf more is missing, expected float32[2]" in missing
        extra = complaint({**model, "averaged": {}}, train)
        assert "leaf averaged.conv.bias is bfloat16[5], expected none" in extra
        other = complaint(model, {**train, "key": jnp.zeros((2,), jnp.uint32)})
        assert "of another kind of training" in other
        assert "train leaf key is key<fry>[], expected uint32[2]" in other
        with pytest.raises(UsageError, match="of another network"):
            checkpoints.restore_model(trees(0, width=6)[0])
    assert folders(tmp_path) == ["1"]


def test_a_step_that_is_not_there_is_met_with_those_that_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, *trees(2))
        checkpoints.save(4, *trees(4))
        checkpoints.wait()
        with pytest.raises(UsageError, match=r"no checkpoint of step 3; there are 2, 4$"):
            checkpoints.restore_model(trees(0)[0], 3)
        with pytest.raises(UsageError, match="did you mean 'latest'"):
            checkpoints.restore_model(trees(0)[0], "lastest")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Steps 1 and 2, to be copied; so wide that values get a file of their own."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, *trees(1, width=300), score=0.9)
        checkpoints.save(2, *trees(2, width=300), score=0.5)
    return folder


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def alter_shape(step: Path) -> None:
    text = (step / "about" / "metadata").read_text()
    (step / "about" / "metadata").write_text(text.replace("float32[4,300]", "float32[4,301]"))


DAMAGE = {
    "a flipped byte among the values": lambda step: flip(largest(step / "model")),
    "a flipped byte among the optimiser's values": lambda step: flip(largest(step / "train")),
    "values cut short": lambda step: truncate(largest(step / "model")),
    "values gone": lambda step: largest(step / "model").unlink(),
    "index scribbled over": lambda step: scribble(step / "model" / "manifest.ocdbt"),
    "index gone": lambda step: (step / "train" / "manifest.ocdbt").unlink(),
    "metadata cut short": lambda step: truncate(step / "model" / "_METADATA"),
    "metadata empty": lambda step: (step / "train" / "_METADATA").write_bytes(b""),
    "no model": lambda step: shutil.rmtree(step / "model"),
    "no train": lambda step: shutil.rmtree(step / "train"),
    "no list of leaves": lambda step: shutil.rmtree(step / "about"),
    "list of leaves cut short": lambda step: truncate(step / "about" / "metadata"),
    "list of leaves altered": alter_shape,
    "nothing": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path, two, damage, caplog):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        step, *found = checkpoints.restore(*trees(0, width=300))
        assert step == 1
        assert_same(tuple(found), trees(1, width=300))
        (line,) = checkpoints.skipped
        assert line.startswith(f"{tmp_path}: checkpoint 2 is broken")
        assert "\n" not in line
        assert [r.getMessage() for r in caplog.records] == [line]
        assert folders(tmp_path) == ["1", "2.unreadable"]
        checkpoints.save(2, *trees(2, width=300))  # its step is free again
        checkpoints.wait()
        step, *found = checkpoints.restore(*trees(0, width=300))
        assert step == 2
        assert_same(tuple(found), trees(2, width=300))


def test_wherever_a_byte_flips_no_wrong_value_comes_back(tmp_path, two):
    paths = [path.relative_to(two) for path in (two / "2").rglob("*") if path.is_file()]
    assert len(paths) > 20
    chance = random.Random(0)
    for path in paths:
        folder = tmp_path / "copy"
        shutil.copytree(two, folder)
        flip(folder / path, chance.random())
        with Checkpoints(folder) as checkpoints:
            step, *found = checkpoints.restore(*trees(0, width=300))
            assert_same(tuple(found), trees(step, width=300))
        shutil.rmtree(folder)


def test_several_broken_ones_are_passed_over_and_set_aside(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("3", "4"):
        shutil.copytree(two / "2", tmp_path / step)
        flip(largest(tmp_path / step / "model"))
    (tmp_path / "4.unreadable").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(*trees(0, width=300))[0] == 2
        assert len(checkpoints.skipped) == 2
    assert folders(tmp_path) == ["1", "2", "3.unreadable", "4.unreadable", "4.unreadable-again"]


def test_where_none_is_whole_the_run_is_told_and_nothing_is_moved(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        (tmp_path / step / "train" / "manifest.ocdbt").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UsageError, match="no other checkpoint there is whole"):
            checkpoints.restore(*trees(0, width=300))
        assert folders(tmp_path) == ["1", "2"]
        # Half of it is enough for an evaluation.
        assert_same(checkpoints.restore_model(trees(0, width=300)[0], 2)[1], trees(2, 300)[0])


def test_an_evaluation_gets_the_step_it_asked_for_or_none(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    flip(largest(tmp_path / "1" / "model"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == 1
        with pytest.raises(UsageError, match=r"checkpoint 1 is broken .*; there are 1, 2$"):
            checkpoints.restore_model(trees(0, width=300)[0])
        scribble(tmp_path / "1" / "about" / "metadata")
        assert checkpoints.best() == 2  # what cannot be read has no score


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with Checkpoints(folder) as checkpoints:
            with pytest.raises(UsageError, match=f"{folder}: cannot .* checkpoints here: "):
                checkpoints.restore(*trees(0))
            with pytest.raises(UsageError, match=f"{folder}: cannot .* checkpoints here: "):
                checkpoints.save(1, *trees(0))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UsageError, match="cannot write checkpoints here: Permission denied"):
        checkpoints.restore(*trees(0))


def save_and_wait(checkpoints: Checkpoints, step: int, model: Any) -> None:
    checkpoints.save(step, model, {})
    checkpoints.wait()


# One write has failed and orbax has closed its event loop when TensorStore tells of another.
@pytest.mark.filterwarnings(
    "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("room", [100_000, 10], ids=["for metadata only", "for nothing"])
def test_a_full_disk_is_told_in_one_line_and_costs_no_checkpoint(tmp_path, room, caplog):
    model = {"x": jax.random.normal(jax.random.key(0), (100_000,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, model, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(UsageError, match=f"{tmp_path}: cannot write .*: File too large$"):
                save_and_wait(checkpoints, 2, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoints.latest() == 1
        assert checkpoints.restore(model, {})[0] == 1
        checkpoints.save(2, model, {})  # there is room again
        checkpoints.wait()
        assert checkpoints.restore(model, {})[0] == 2
    assert folders(tmp_path) == ["2"]
    assert not caplog.records


# Every value follows from the step, so whoever restores can tell what it should be.
VICTIM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from rain_jax.checkpoints import Checkpoints

def state(step):
    values = np.random.default_rng(step).normal(size=(8, 30_000)).astype(np.float32)
    return {f"w{i}": jnp.asarray(v) for i, v in enumerate(values)}, {"step": jnp.int32(step)}

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    found = checkpoints.restore(*state(0))
    step = found[0] if found else 0
    while True:
        step += 1
        checkpoints.save(step, *state(step), score=-step)
        if step % 3 == 0:
            checkpoints.wait()
            print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    chance = random.Random(time.time_ns())
    durable = 0
    target = (
        {f"w{i}": jax.ShapeDtypeStruct((30_000,), jnp.float32) for i in range(8)},
        {"step": jax.ShapeDtypeStruct((), jnp.int32)},
    )
    for _ in range(5):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        lines = [victim.stdout.readline()]  # at least one save after each restart
        time.sleep(chance.uniform(0, 0.3))
        victim.kill()
        lines += victim.communicate()[0].splitlines()
        last = int(lines[-1])
        assert last > durable
        durable = last
        with Checkpoints(tmp_path) as checkpoints:
            step, model, train = checkpoints.restore(*target)
            assert not checkpoints.skipped
        assert step >= durable
        assert int(train["step"]) == step
        expected = np.random.default_rng(step).normal(size=(8, 30_000)).astype(np.float32)
        for i, row in enumerate(expected):
            np.testing.assert_array_equal(model[f"w{i}"], row)


HOST = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rain_jax.checkpoints import Checkpoints

process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec())
make = jax.jit(
    lambda: ({"w": jnp.arange(4.0)}, {"key": jax.random.key(5)}), out_shardings=sharding
)
with Checkpoints(folder) as checkpoints:
    model, train = make()
    assert checkpoints.restore(model, train) is None
    for step in (1, 2, 3):
        checkpoints.save(step, jax.tree.map(lambda leaf: leaf + step, model), train, score=-step)
    checkpoints.wait()
    (checkpoints.folder / "3" / "train" / "manifest.ocdbt").unlink(missing_ok=True)
    step, found, _ = checkpoints.restore(model, train)
    assert (step, len(checkpoints.skipped)) == (2, 1)
    np.testing.assert_array_equal(found["w"].addressable_data(0), np.arange(4.0) + 2)
    checkpoints.save(3, found, train)
"""


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", HOST, process, port, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in ("0", "1")
    ]
    try:
        told = [host.communicate(timeout=100)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(told)
    assert folders(tmp_path) == ["1", "2", "3", "3.unreadable"]  # 1 is the best
    with Checkpoints(tmp_path) as checkpoints:  # and here alone, on other devices
        sharding = replicated(8)
        target = ({"w": jnp.zeros(4)}, {"key": jax.random.key(0)})
        step, model, train = checkpoints.restore(*jax.device_put(target, sharding))
    assert step == 3
    np.testing.assert_array_equal(model["w"], np.arange(4.0) + 2)
    assert_same(train["key"], jax.random.key(5))
