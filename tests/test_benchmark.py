"""PyTorch twins of upscalers and of RAIN, the clock, and the benchmark's command."""

import gzip
import importlib.util
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark, cli
from experiments.benching import kernels, show
from experiments.benching.clock import Peaks, Program, Row, Side, measure, ready
from rain_jax.checks import UsageError
from rain_jax.defences import rain
from rain_jax.image import random_pick
from rain_jax.models import imports, upscalers
from rain_jax.types import Upscaler

NEEDS_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: see the extra `peers`",
)
NETWORK = upscalers.edsr(blocks=2, width=8, residual_scale=0.5)
IMAGE = np.random.default_rng(1).uniform(size=(12, 8, 3)).astype(np.float32)


def weights():
    """Variables of `NETWORK` with biases, which begin at zero and a twin might leave out."""
    fresh, draw = jax.jit(NETWORK.init)(jax.random.key(1), IMAGE), np.random.default_rng(2)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + _noise(draw, leaf.shape), fresh)


def _noise(draw, shape):
    return 0.05 * draw.standard_normal(shape).astype(np.float32)


def twin_of(variables):
    from experiments import twins

    return twins.edsr(jax.tree.map(np.asarray, variables), residual_scale=0.5)


def there(image):
    import torch

    return torch.tensor(np.moveaxis(np.asarray(image), -1, 0)[None])


def back(batch):
    return np.moveaxis(batch.detach().numpy()[0], 0, -1)


def drawn_by_rain(key, shape, reach):
    """Which pixel of each window RAIN kept, [H/2, W/2, C] in 0..3, before it shifted, and how far.

    Seen through an upscaler that does nothing but repeat, and images that tell where they are.
    """
    repeat = Upscaler(
        lambda key, image: {},
        lambda variables, image: jnp.repeat(jnp.repeat(image, 2, 0), 2, 1),
        2,
    )

    def seen(image):
        whole = np.broadcast_to(image, shape).astype(np.float32) / 1000  # RAIN clips to [0, 1]
        small = seen_by_rain(whole)[::2, ::2]
        return np.round(1000 * np.asarray(small)).astype(int)

    seen_by_rain = jax.jit(lambda image: rain(repeat, reach=reach).apply({}, key, image))
    rows, columns = np.arange(shape[0]).reshape(-1, 1, 1), np.arange(shape[1]).reshape(1, -1, 1)
    move = [-int(seen(rows // 2)[0, 0, 0]), -int(seen(columns // 2)[0, 0, 0])]
    winners = np.roll(seen(2 * (rows % 2) + columns % 2), [-m for m in move], axis=(0, 1))
    return winners, move


def noise_for(winners):
    """Noise that is largest at the winners, [H, W, C]."""
    height, width, channels = winners.shape
    places = np.arange(4).reshape(1, 2, 1, 2, 1)
    won = winners.reshape(height, 1, width, 1, channels) == places
    noise = np.random.default_rng(0).uniform(0, 1, won.shape) + won
    return noise.reshape(2 * height, 2 * width, channels).astype(np.float32)


@NEEDS_TORCH
def test_the_twin_of_edsr_has_published_names_and_is_the_same_function():
    variables = weights()
    twin = twin_of(variables)
    state = twin.state_dict()
    assert {"sub_mean.bias", "head.0.weight", "body.1.body.2.bias", "body.2.weight",
            "tail.0.0.weight", "tail.1.bias", "add_mean.weight"} <= set(state)  # fmt: skip
    found = imports.edsr_from_torch(state)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    expected = jax.jit(NETWORK.apply)(found, IMAGE)
    assert np.std(expected) > 1e-2
    np.testing.assert_allclose(back(twin(there(IMAGE))), expected, atol=1e-4)


@NEEDS_TORCH
def test_random_pick_keeps_what_the_authors_mask_keeps():
    from experiments import twins

    height, width, _ = IMAGE.shape
    place = 2 * (jnp.arange(height) % 2).reshape(-1, 1, 1) + jnp.arange(width).reshape(1, -1, 1) % 2
    key = jax.random.key(3)
    winners = random_pick(key, jnp.broadcast_to(place, IMAGE.shape).astype(jnp.float32))
    assert set(np.unique(winners)) == {0, 1, 2, 3}
    kept = twins.largest(there(IMAGE), there(noise_for(np.asarray(winners))))
    np.testing.assert_array_equal(back(kept), random_pick(key, IMAGE))


@NEEDS_TORCH
@pytest.mark.parametrize("seed", range(3))
def test_rain_is_its_twin_given_the_same_draws(seed):
    from experiments import twins

    variables, key, reach = weights(), jax.random.key(seed), 0.5
    winners, move = drawn_by_rain(key, IMAGE.shape, reach)
    expected = jax.jit(rain(NETWORK, reach=reach).apply)(variables, key, IMAGE)
    assert np.std(expected) > 1e-2
    twin = twins.Rain(twin_of(variables), reach)
    found = twin.drawn(there(IMAGE), there(noise_for(winners)), move)
    np.testing.assert_allclose(back(found), expected, atol=1e-4)


@NEEDS_TORCH
def test_the_twin_of_rain_draws_every_shift_and_none_further():
    import torch

    from experiments import twins

    torch.manual_seed(0)
    repeat = torch.nn.Upsample(scale_factor=2)
    rows = there(jnp.broadcast_to(jnp.arange(6).repeat(2).reshape(-1, 1, 1) / 10, (12, 8, 3)))
    # Half as high the image has 6 rows, so shifts are in -2..2: which row comes first tells.
    first = {round(10 * float(twins.Rain(repeat, 0.34)(rows)[0, 0, 0, 0])) for _ in range(60)}
    assert first == {4, 5, 0, 1, 2}


# --- The clock --------------------------------------------------------------------------------


def added():
    return Program(jnp.sum, (jnp.ones(3),))


def test_a_line_tells_ratios_differences_and_counted_work():
    ours = jnp.ones((64, 64))

    def twice_the_work():
        for _ in range(2):
            result = np.asarray(ours) @ np.asarray(ours)
        return result

    row = Row(
        "matrices",
        lambda: Program(lambda a: a @ a, (ours,)),
        {"NumPy": lambda: Side(twice_the_work, lambda found: [1.5 * found])},
        images=64,
        bytes=2 * ours.nbytes,
    )
    line = measure(row, 3, 0.0, Peaks({"float32": 2.0}, 1000.0))
    assert line["gflop"] == 2 * 64**3 / 1e9
    assert line["peak_bytes"] >= 2 * ours.nbytes
    seconds = line["ours_milliseconds"][0] / 1000
    assert line["images_per_second"][0] == pytest.approx(64 / seconds)
    assert line["peak_fraction"][0] == pytest.approx(line["gflop"] / seconds / 2)
    assert line["copy_fraction"][0] == pytest.approx(2 * ours.nbytes / seconds / 1000)
    told = line["peers"]["NumPy"]
    assert told["difference"] == [pytest.approx(0.5)]
    for spread in told["wall"], told["cpu"], line["ours_milliseconds"]:
        assert spread[1] <= spread[0] <= spread[2]
    assert told["wall"][1] > 0
    assert line["compile_seconds"] > 0


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_turns_are_as_long_as_asked_and_ratios_are_theirs_over_ours(seconds):
    naps = []

    def nap():
        naps.append(time.sleep(0.01))

    peers = {"sleeper": lambda: Side(nap, list)}
    line = measure(Row("sum", added, peers, alike=False), 2, seconds)
    assert line["peers"]["sleeper"]["wall"][0] > 10
    assert "difference" not in line["peers"]["sleeper"]
    # Once to see that it works, once to see how long it takes, and two turns.
    assert len(naps) == 4 if seconds == 0 else len(naps) > 4


def test_the_results_of_a_carried_program_begin_the_next_call():
    side, _ = ready(Program(lambda n, by: (n + by, 10 * n), (jnp.int32(1), 2), carried=True))
    assert [int(side.wait(side.call())) for _ in range(3)] == [10, 30, 50]


def test_a_peer_that_is_missing_or_fails_is_a_line():
    def missing():
        raise ModuleNotFoundError("No module named 'torch'")

    def broken():
        return Side(lambda: 1 / 0, list)

    peers = {"missing": missing, "broken": broken}
    line = measure(Row("sum", added, peers), 1, 0.0)
    assert line["peers"]["missing"] == {"absent": "not installed: No module named 'torch'"}
    assert line["peers"]["broken"] == {"absent": "fails: division by zero"}
    assert [row[:3] for row in show.cells(line)] == [
        ["sum", name, told["absent"]] for name, told in line["peers"].items()
    ]


# --- The command ------------------------------------------------------------------------------

SMALL = {
    "checkpoint": dict(model="cnn", size=8, saves=2),
    "compile": dict(networks=("cnn",), batch_sizes=(2,), size=8, attack_steps=2),
    "convolutions": dict(shapes=((2, 8, 1, 16, 3, 1, 1), (2, 8, 16, 16, 3, 2, 0))),
    "data": dict(images=((4, 16),), batches=3),
    "dispatch": dict(model="cnn", methods=("pgd",), batch_size=2, count=2, size=8, attack_steps=2),
    "edsr": dict(networks=((1, 4),), images=(2, 8), compiled=False),
    "evaluation": dict(model="cnn", images=2, size=8, pgd_steps=2, apgd_steps=2,
                       standard_steps=2, standard_queries=3),
    "jpeg": dict(images=((2, 16),)),
    "peak": dict(size=256, megabytes=1),
    "rain": dict(blocks=1, width=4, images=(2, 16)),
    "steps": dict(networks=("cnn",), batch_sizes=(2,), methods=(("natural", "sense"),), size=8,
                  attack_steps=2, compiled=False),
    "sweep": dict(model="cnn", images=2, size=8, radii=(0.03, 0.1), draws=2, steps=2),
}  # fmt: skip
# Beside the three of "peak"; the packages that peers need; and whether results are compared.
LINES = {"checkpoint": 1, "compile": 1, "convolutions": 4, "data": 3, "dispatch": 1, "edsr": 2,
         "evaluation": 3, "jpeg": 3, "peak": 0, "rain": 2, "steps": 2, "sweep": 1}  # fmt: skip
NEEDS = {"Pillow": "PIL", "kornia": "kornia", "PyTorch": "torch", "torchattacks": "torchattacks"}
DRAWN = ("data", "evaluation", "rain")

CACHE_HITS = []
jax.monitoring.register_event_listener(
    lambda event, **_: CACHE_HITS.append(event) if event.endswith("cache_hits") else None
)


def small(suite):
    sections = {name: SMALL[name] for name in {suite, "peak"}}
    return [f"--config.{n}.{key}={value!r}" for n, some in sections.items()
            for key, value in some.items()]  # fmt: skip


def command(*arguments):
    file = "--config=experiments/configs/benchmark.py"
    cli.run(benchmark.main, argv=["benchmark", file, *arguments], changed=benchmark.changed)


# Of these suites nothing is compared that was computed.
FILES_ALONE = {"checkpoint", "compile", "data", "evaluation", "peak", "rain"}


@pytest.mark.parametrize("suite", [
    pytest.param(suite, marks=[pytest.mark.structure] if suite in FILES_ALONE else [])
    for suite in benchmark.SUITES
])  # fmt: skip
def test_the_command_prints_a_table_and_writes_json(suite, tmp_path, capsys):
    before, hits = dict(jax.config.values), len(CACHE_HITS)
    limits = ["--config.rounds=2", "--config.seconds=0"]
    command(f"--config.suite={suite}", f"--workdir={tmp_path / 'new'}", *limits, *small(suite))
    found = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert set(found["asked"]) == {"suite", "rounds", "seconds", "profile", "peak", suite}
    assert found["provenance"]["versions"]["jax"] == jax.__version__
    assert found["threads"] >= 1
    shown = capsys.readouterr().out
    assert "peer / ours" in shown
    lines = found["lines"]
    assert len(lines) == 3 + LINES[suite]
    measured = 0
    for line in lines:
        assert line["what"] in shown
        assert 0 < line.get("peak_fraction", [1.0])[0] < 1.5
        for peer, told in line.get("peers", {}).items():
            if peer in NEEDS and importlib.util.find_spec(NEEDS[peer]) is None:
                assert told["absent"].startswith("not installed")
                continue
            measured += 1
            assert told["wall"][0] > 0
            assert ("difference" in told) == (suite not in DRAWN)
            if suite in ("convolutions", "edsr", "steps"):
                assert max(told["difference"]) < 1e-4
            if suite in ("dispatch", "sweep"):  # ours beside ours
                assert max(told["difference"]) < 1e-5
            if peer == "Pillow":
                assert max(told["difference"]) < 1e-2
    if suite == "compile":
        assert len(CACHE_HITS) > hits  # the second time it came out of the cache
        for entry in lines[-1]["empty_cache"], lines[-1]["warm_cache"]:
            parts = [entry[part] for part in ("trace", "compile", "run")]
            assert min(parts) > 0
            assert sum(parts) == pytest.approx(entry["seconds"])
    if suite not in ("checkpoint", "compile", "data"):
        assert all(line["gflop"] > 0 for line in lines if not line["what"].startswith("copy"))
    assert (tmp_path / "new" / "benchmark.png").is_file() == (measured > 0)
    assert not (tmp_path / "new" / "scratch").exists()
    assert dict(jax.config.values) == before


def test_a_profile_is_a_trace_for_every_line(tmp_path):
    short = ["--config.rounds=1", "--config.seconds=0", *small("peak")]
    command("--config.suite=peak", "--config.profile", f"--workdir={tmp_path}", *short)
    lines = json.loads((tmp_path / "benchmark.json").read_text())["lines"]
    assert len({line["profile"] for line in lines}) == 3
    for line in lines:
        assert list(Path(line["profile"]).rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "suite=jpge",
            "config.suite='jpge': expected one of all, checkpoint, .*did you mean 'jpeg'",
        ),
        ("rouns=3", "config.rouns: no such key: .*did you mean 'rounds'"),
        ("rounds=0", r"config.rounds=0: expected a number in \[1, inf\)"),
        ("jpeg.qualty=3", "config.jpeg.qualty: no such key: .*did you mean 'quality'"),
        ("jpeg.quality=0", "config.jpeg.quality=0"),
        ("edsr.images=(4,)", "config.edsr.images"),
        ("convolutions.shapes=((1,2,3),)", "expected batch, size, channels, .*padding"),
        ("convolutions.shapes=((1,2,1,1,4,1,0),)", "expected no kernel larger than its images"),
        (
            "steps.batch_sizes=(4,)",
            r"config.steps.batch_sizes=\(4,\): expected one for each of the 2",
        ),
        ("steps.networks=('smal_cnn','cnn')", "config.steps.networks='smal_cnn'.*'small_cnn'"),
        ("steps.methods=(('pdg',),('pgd',))", "config.steps.methods.*did you mean 'pgd'"),
        ("sweep.model=cnnn", "config.sweep.model='cnnn': .*did you mean 'cnn'"),
        ("dispatch.count=1", r"config.dispatch.count=1: expected a number in \[2, inf\)"),
        ("data.workers=-1", "config.data.workers=-1"),
        ("profile=3", "config.profile=3: expected True or False"),
        ("rain.images=(4,0)", r"config.rain.images=\(4, 0\): expected a number in \[1, inf\)"),
    ],
)
def test_mistakes_are_told_in_a_line(argument, said, tmp_path, capsys):
    suite = argument.partition(".")[0]
    only = [f"--config.suite={suite}"] if suite in benchmark.SUITES else []
    with pytest.raises(SystemExit) as left:
        command(f"--config.{argument}", *only, f"--workdir={tmp_path}")
    assert left.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_kernels_of_a_profile_are_counted_by_what_they_do(tmp_path, capsys):
    def kernel(name, start, took, lane=1):
        return {"ph": "X", "pid": 1, "tid": lane, "name": name, "ts": start, "dur": took}

    lanes = [
        {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
        for number, name in ((1, "Stream #1(Compute)"), (2, "python"))
    ]
    events = [
        *lanes, kernel("sm90_fprop_nhwc", 0, 2000), kernel("loop_add_fusion", 2000, 1000),
        kernel("sm90_dgrad_nhwc", 4000, 500), kernel("a_host_call", 0, 9000, lane=2),
    ]  # fmt: skip
    took, many, span = kernels.kinds(events)
    assert took == {"convolution": 2.0, "elementwise": 1.0, "convolution, towards images": 0.5}
    assert sum(many.values()) == 3
    assert span == 4.5
    file = tmp_path / "vm.trace.json.gz"
    with gzip.open(file, "wt") as opened:
        json.dump({"traceEvents": events}, opened)
    kernels.main(str(file))
    assert "3 kernels, 3.5 ms of 4.5 ms" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no such file"):
        kernels.main(str(tmp_path / "none.gz"))


def test_operations_of_a_cpu_are_counted_too():
    """But not loops, which are made of others, nor what is no operation."""
    loop = {"hlo_op": "while.1"}
    events = [
        {"ph": "X", "pid": 1, "tid": 1, "name": "ynn_fusion.3", "ts": 0, "dur": 3000, "args": loop},
        {"ph": "X", "pid": 1, "tid": 2, "name": "add_fusion", "ts": 0, "dur": 1000, "args": loop},
        {"ph": "X", "pid": 1, "tid": 2, "name": "while.1", "ts": 0, "dur": 4000, "args": loop},
        {"ph": "X", "pid": 1, "tid": 2, "name": "Execute", "ts": 0, "dur": 9000},
    ]
    took, many, span = kernels.kinds(events)
    assert took == {"products and convolutions, by YNNPACK": 3.0, "elementwise": 1.0}
    assert (sum(many.values()), span) == (2, 3.0)
