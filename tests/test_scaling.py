"""Programs are counted as they run, and what they send is what is learnt."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import pytest

from experiments import cli, scaling
from experiments.scaling_counts import hlo, programs, roofline, sending, working
from experiments.scaling_counts.roofline import Machine
from rain_jax.checks import UsageError
from rain_jax.config import build, tree
from rain_jax.models.conv import by_lax
from rain_jax.parallel import choose_devices, place

# What is counted stands in the programs' texts: none of them is run.
pytestmark = pytest.mark.structure

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "docs" / "jobs"

WRITTEN = """HloModule made_up, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[2])) -> (s32[], f32[2]) {
  %state = (s32[], f32[2]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[2]{0:T(128)} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %all = f32[2]{0:T(128)S(1)} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %out = (s32[], f32[2]{0}) tuple(%next, %all)
}

%condition (state.1: (s32[], f32[2])) -> pred[] {
  %state.1 = (s32[], f32[2]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[2]) -> f32[2] {
  %x.1 = f32[2]{0} parameter(0), metadata={op_name="x (the first)"}
  %zero = s32[] constant(0)
  %begin = (s32[], f32[2]{0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[2]{0}) while(%begin), condition=%condition, body=%body
  %last = f32[2]{0} get-tuple-element(%loop), index=1
  %started = (f32[2]{0}, f32[8]{0}) all-gather-start(%last), replica_groups={{0,1},{2,3}}
  %gathered = f32[8]{0} all-gather-done(%started)
  %two = (bf16[3,1]{1,0}, /*index=1*/f32[]) all-reduce(%x.1, %zero), replica_groups={{0,1,2,3}}
  %part = bf16[3,1]{1,0} get-tuple-element(%two), index=0, metadata={op_name="a/b"}
  ROOT %done = f32[2]{0} copy(%last)
}
"""


def test_collectives_of_a_program_by_hand():
    looped, gathered, combined = sending.collectives(hlo.read(WRITTEN))
    assert (looped.kind, looped.times, looped.looped, looped.bytes) == ("all-reduce", 7, True, 8)
    assert looped.groups == "[1,4]<=[4]"
    assert (gathered.kind, gathered.times, gathered.bytes) == ("all-gather", 1, 32)
    assert gathered.groups == "{{0,1},{2,3}}"
    assert [part.bytes for part in combined.parts] == [6, 4]
    assert [part.scalar for part in combined.parts] == [False, True]
    assert [part.op_name for part in combined.parts] == ["a/b", ""]


HIDDEN = """HloModule made_up, is_scheduled=true

%begins (p: f32[4]) -> (f32[4], f32[4]) {
  %p = f32[4]{0} parameter(0)
  %first = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
  ROOT %state = (f32[4]{0}, f32[4]{0}) custom-call(%p, %first)
}

%goes_on (p.1: f32[4], q: f32[2]) -> f32[2] {
  %p.1 = f32[4]{0} parameter(0)
  %q = f32[2]{0} parameter(1)
  %again = f32[4]{0} all-reduce(%p.1), replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
  ROOT %twice = f32[2]{0} add(%q, %q)
}

ENTRY %main (x: f32[4], y: f32[2]) -> (f32[4], f32[2]) {
  %x = f32[4]{0} parameter(0)
  %y = f32[2]{0} parameter(1)
  %begun = (f32[4]{0}, f32[4]{0}) fusion(%x), kind=kCustom, calls=%begins
  %sum = f32[4]{0} get-tuple-element(%begun), index=1
  %work = f32[2]{0} fusion(%sum, %y), kind=kLoop, calls=%goes_on
  %early = f32[2]{0} all-reduce-start(%y), replica_groups={{0,1}}
  %other = f32[2]{0} multiply(%work, %work)
  %late = f32[2]{0} all-reduce-done(%early)
  %idle = f32[2]{0} all-reduce-start(%other), replica_groups={{0,1}}
  %name = f32[2]{0} bitcast(%late)
  %end = f32[2]{0} all-reduce-done(%idle)
  %after = f32[2]{0} multiply(%end, %name)
  ROOT %out = (f32[4]{0}, f32[2]{0}) tuple(%sum, %after)
}
"""


def test_a_sum_is_hidden_where_something_is_computed_before_its_end():
    """Begun and ended around other work, by a chain of fusions (TPU) or a pair (GPU)."""
    chained, around, idle = sending.collectives(hlo.read(HIDDEN))
    assert (chained.bytes, chained.times, chained.hidden) == (16, 1, True)
    assert (around.bytes, around.hidden) == (8, True)
    assert (idle.bytes, idle.hidden) == (8, False)
    (sent,) = roofline.sent([chained, around, idle]).values()
    assert sent == roofline.Sent(32, 3, 24)


def test_a_tpu_sends_gradients_in_parts_where_it_is_asked_to(tmp_path):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    changes = [
        "--config.compiler=tpu", "--config.machine=tpu_v5p_8", "--config.devices=8",
        "--config.network={'name': 'preact_resnet', 'depths': (1, 1), 'width': 256}",
        "--config.training.batch_size=640", "--config.evaluations=false",
        "--config.method.name=natural",
    ]  # fmt: skip
    found = {}
    for overlap in ("false", "true"):
        folder = tmp_path / overlap
        folder.mkdir()
        command(folder, *changes, f"--config.parallel.overlap={overlap}")
        found[overlap] = json.loads((folder / "out" / "scaling.json").read_text())["steps"][-1]
    whole, parts = (row["sent"]["gradients"] for row in found.values())
    assert whole["bytes"] == parts["bytes"]
    assert (whole["times"], whole["hidden"]) == (1, 0)
    assert parts["times"] > 1


def test_a_sum_in_a_loop_of_unknown_length_is_refused():
    unknown = WRITTEN.replace("direction=LT", "direction=NE")
    with pytest.raises(UsageError, match="all: all-reduce in a loop of unknown length"):
        sending.collectives(hlo.read(unknown))
    assert working.work(hlo.read(unknown)).unknown_loops == 1
    # What XLA has found out goes before the condition.
    known = 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    counted = sending.collectives(hlo.read(unknown.replace("body=%body", known)))
    assert counted[0].times == 3


def counted(function, *arguments):
    with by_lax():
        compiled = jax.jit(function).lower(*arguments).compile()
    return working.work(hlo.read(compiled.as_text())), compiled


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [(1, "VALID", 1), (1, "SAME", 1), (2, ((1, 1), (1, 1)), 1), (2, "SAME", 2)],
)
def test_flops_of_a_convolution_and_of_its_gradients_are_those_of_xla(stride, padding, dilation):
    images, kernel = jnp.ones((4, 9, 8, 3)), jnp.ones((3, 3, 3, 5))

    def gradients(images, kernel):
        convolve = partial(
            jax.lax.conv_general_dilated, window_strides=(stride, stride), padding=padding,
            rhs_dilation=(dilation, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        maps, back = jax.vjp(convolve, images, kernel)
        return maps, back(maps)

    found, compiled = counted(gradients, images, kernel)
    theirs = compiled.cost_analysis()["flops"]
    assert found.flops == pytest.approx(theirs, rel=0.02)  # theirs has the odd addition in it
    assert found.looped_flops == 0


def test_a_loop_counts_as_often_as_it_runs():
    matrix = jnp.ones((16, 16))

    def chain(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ matrix), None), x, length=6)[0] @ matrix

    found, compiled = counted(chain, jnp.ones((3, 16)))
    once = 2 * 3 * 16 * 16
    assert (found.flops, found.looped_flops) == (7 * once, 6 * once)
    assert compiled.cost_analysis()["flops"] < 4 * once  # XLA's own counts the body once


def test_moved_bytes_are_what_is_touched():
    size = 1000
    table, few = jnp.ones((500, size)), jnp.arange(3)
    added, _ = counted(lambda a, b: a + b, jnp.ones(size), jnp.ones(size))
    assert added.bytes == 3 * 4 * size
    taken, _ = counted(lambda t, i: jnp.take(t, i, axis=0, mode="clip") + 1, table, few)
    assert 2 * 4 * 3 * size <= taken.bytes < 5 * 4 * 3 * size


@pytest.mark.parametrize("count", [2, 8])
def test_sums_in_a_loop_over_devices(count):
    devices = place("shard_map", choose_devices(count))

    def body(x, axis_name):
        def step(x, _):
            return jnp.sin(jax.lax.psum(x, axis_name)), None

        return jax.lax.all_gather(jax.lax.scan(step, x, length=5)[0], axis_name)

    program = devices.map(body, inputs=(True,), outputs=True)
    compiled = program.lower(jnp.ones((count, 3))).compile()
    found = sending.collectives(hlo.read(compiled.as_text()))
    assert [(one.kind, one.times) for one in found] == [("all-reduce", 5), ("all-gather", 1)]
    assert found[0].bytes == 4 * 3
    assert found[0].groups == "{{" + ",".join(map(str, range(count))) + "}}"


# --- Steps of configs --------------------------------------------------------------------------


NATURAL = ("method.name", "natural")  # compiles soon


def experiment_of(folder, *changes):
    path = commands.write_config(folder)
    return build.experiment(tree.changed(cli.load_config(str(path)), changes))


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_a_step_sends_its_gradients_once_and_statistics_where_they_are_asked_for(mode, tmp_path):
    experiment = experiment_of(tmp_path, ("method.batch_norm", mode))
    counts = programs.training_step(experiment, choose_devices(2))
    assert {one.kind for one in counts.collectives} == {"all-reduce"}
    assert {one.groups for one in counts.collectives} == {"{{0,1}}"}
    held, sent = scaling.held(experiment), roofline.sent(counts.collectives)
    assert sent["gradients"].bytes == held["params"]
    # loss, correct, moved and the number of images
    assert sent["metrics"].bytes == 4 * 4
    assert sent["statistics"].bytes == held["model_state"]
    assert sent["statistics' cotangents"].bytes == held["model_state"]
    assert ("statistics in attacks" in sent) == (mode != "eval")
    if mode != "eval":
        # Each of the two steps: forward and back. The running averages cost no pass of their own.
        assert sent["statistics in attacks"].bytes == 2 * 2 * held["model_state"]


@pytest.mark.parametrize(("mode", "visits"), [("eval", 0), ("batch", 0), ("train", 2)])
def test_statistics_of_each_device_send_running_averages_alone(mode, visits, tmp_path):
    experiment = experiment_of(
        tmp_path, ("method.batch_norm", mode), ("parallel.statistics", "device")
    )
    counts = programs.training_step(experiment, choose_devices(2))
    assert {one.kind for one in counts.collectives} == {"all-reduce"}
    held, sent = scaling.held(experiment), roofline.sent(counts.collectives)
    assert sent["gradients"].bytes == held["params"]
    assert sent["statistics"].bytes == held["model_state"]
    assert "statistics' cotangents" not in sent
    # The averages that the two steps of the attack leave.
    kept = sent["statistics in attacks"].bytes if visits else 0
    assert kept == visits * held["model_state"]


def test_images_that_are_streamed_change_no_sum(tmp_path):
    found = [
        roofline.sent(programs.training_step(experiment, choose_devices(2)).collectives)
        for feed in ("resident", "stream")
        for experiment in [experiment_of(tmp_path, NATURAL, ("training.feed", feed))]
    ]
    assert found[0] == found[1]


def test_one_device_sends_nothing_and_evaluation_neither(tmp_path):
    experiment = experiment_of(tmp_path)
    alone = programs.training_step(experiment, choose_devices(1))
    assert sum(one.bytes for one in alone.collectives if "," in one.groups) == 0
    judged = programs.evaluations(experiment, choose_devices(2))
    assert set(judged) == {"clean", "pgd40"}
    assert all(counts.collectives == [] for counts in judged.values())
    assert judged["pgd40"].work.flops > 3 * judged["clean"].work.flops


# --- On paper ----------------------------------------------------------------------------------


def counts_of(flops, looped, gradients, statistics, apart=1):
    total, inside = f"{roofline.TOTALS}/psum", "Net/norm/psum"
    sums = [
        sending.Collective(
            "all-reduce", (sending.Part(size // apart, False, name),), "{{0,1}}", 1, False
        )
        for name, size in ((total, gradients), (inside, statistics))
        for _ in range(apart if name == total else 1)
    ]
    memory = programs.Memory(10, 5, 4, 7)
    return programs.Counts(sums, working.Work(flops, looped, 300, 0), memory)


def test_a_roofline_by_hand():
    machine = Machine(8, {"float32": 100.0}, 80, 30.0, 10.0, start=0.5, hop=0.25, axes=1)
    found = roofline.seconds(counts_of(600, 300, 40, 8), machine, 4, "float32")
    wait = 0.5 + 2 * 3 * 0.25
    assert found.compute == 6.0
    assert found.memory == 10.0
    assert found.gradients == pytest.approx(2 * 3 / 4 * 40 / 10 + wait)
    assert found.others == pytest.approx(2 * 3 / 4 * 8 / 10 + wait)
    assert found.room == pytest.approx(2 / 3 * 3.0)
    assert found.alone == pytest.approx(6 + found.gradients + found.others)
    assert found.overlapped == pytest.approx(6 + found.others + found.gradients - 2.0)
    several = roofline.seconds(counts_of(600, 300, 40, 8, apart=4), machine, 4, "float32")
    assert several.gradients == pytest.approx(found.gradients + 3 * wait)
    nobody = roofline.seconds(counts_of(600, 300, 40, 8), machine, 1, "float32")
    assert nobody.gradients == nobody.others == 0
    assert counts_of(1, 0, 8, 8).memory.total == 10 + 5 - 4 + 7


def test_a_torus_has_shorter_ways_than_a_ring():
    torus = roofline.MACHINES["tpu_v5p_64"]
    assert torus.hops(64) == pytest.approx(2 * 3 * (4 - 1))
    assert roofline.MACHINES["h100x8"].hops(8) == 2 * 7
    assert torus.hops(1) == 0
    assert all(machine.devices >= 8 for machine in roofline.MACHINES.values())


# --- The command -------------------------------------------------------------------------------


def command(folder, *arguments):
    config = commands.write_config(folder)
    given = ["scaling", f"--config={config}", f"--workdir={folder / 'out'}", *arguments]
    cli.run(scaling.main, argv=given, changed=scaling.changed)


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    command(
        tmp_path, "--config.devices=2", "--config.batches=16,64", "--config.evaluations=false",
        "--config.network.batch_norm=False", "--config.method.name=natural",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())
    shown = capsys.readouterr().out
    assert found["measured"] is False
    assert "calculations, no measurements" in shown
    rows = {row["how"]: row for row in found["steps"]}
    assert [rows[how]["batch_size"] for how in ("alone", "strong", "weak")] == [64, 64, 128]
    assert rows["alone"]["efficiency"] == {"alone": 1.0, "overlapped": 1.0}
    for how in ("strong", "weak"):
        ways = rows[how]["efficiency"]
        assert 0 < ways["alone"] <= ways["overlapped"] < 1
        assert rows[how]["sent"]["gradients"]["bytes"] == found["held"]["params"]
        assert set(rows[how]["sent"]) == {"gradients", "metrics"}
    assert rows["weak"]["work"]["flops"] == rows["alone"]["work"]["flops"]
    assert rows["strong"]["work"]["flops"] == pytest.approx(rows["alone"]["work"]["flops"] / 2)
    small, large = found["memory"]
    assert small["temporaries"] < large["temporaries"]
    # Four times as many images, and the parameters once in both.
    assert 2 * small["kept"] < large["kept"] < 4 * small["kept"]
    assert "images in 74.5 GiB" in shown
    assert "Collectives other than all-reduce: none" in shown


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("machine=h100x9", "config.machine='h100x9': expected one of .*did you mean 'h100x8'"),
        ("devices=0", r"config.devices=\(0,\): expected a number in"),
        ("devices=9", "config.devices: expected at most the 8 CPU devices"),
        ("batches=0", r"config.batches=\(0,\)"),
        ("compiler=gpu", "config.compiler='gpu'"),
        ("compiler=tpu", "config.machine='h100x8': expected a TPU for its compiler"),
        ("machin=h100x8", "config.machin: no such section"),
    ],
)
def test_mistakes_are_told_in_a_line(argument, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command(tmp_path, f"--config.{argument}")
    assert left.value.code == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_compiler_that_is_absent_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command(tmp_path, "--config.compiler=tpu", "--config.machine=tpu_v5e_8")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: config.compiler='tpu': expected libtpu to be installed")
    assert said.count("\n") == 1


# --- Job files ---------------------------------------------------------------------------------


def test_job_files_name_commands_and_configs_that_exist():
    files = sorted(JOBS.glob("*"))
    assert len(files) == 4
    for file in files:
        said = file.read_text()
        modules = re.findall(r"(?:-m|-) experiments\.(\w+)", said)
        assert modules, file
        for name in modules:
            module = ROOT / "experiments" / f"{name}.py"
            names = {getattr(node, "name", None) for node in ast.parse(module.read_text()).body}
            assert "main" in names, f"{file}: {module}"
        configs = re.findall(r"--config=([\w/.]+\.py)(?::(\S+))?", said)
        assert configs, file
        for path, text in configs:
            spec = cli.load_config(str(ROOT / path) + (f":{text}" if text else ""))
            changes = [
                (key, cli.value_of(value.rstrip("\\").strip()))
                for key, value in re.findall(r"--config\.([\w.]+)=(\S+)", said)
            ]
            if "sweep" not in spec:
                tree.changed(spec, changes)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("file", sorted(JOBS.glob("*.sh")), ids=lambda file: file.stem)
def test_job_scripts_parse(file):
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_the_jobset_has_a_process_for_each_pod_and_what_jax_asks_for():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    account, role, binding, jobset = yaml.safe_load_all((JOBS / "jobset.yaml").read_text())
    (job,) = (replicated["template"]["spec"] for replicated in jobset["spec"]["replicatedJobs"])
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    allowed = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert allowed == {"pods", "services", "jobs"}
    (container,) = pod["containers"]
    assert {"name": "RAIN_JAX_DISTRIBUTED", "value": "1"} in container["env"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
