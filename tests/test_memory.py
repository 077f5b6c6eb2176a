"""When a device's memory is exhausted: fewer images at once, the same verdicts, and one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_evaluate
import test_sweep

from experiments import cli
from rain_jax import evaluation
from rain_jax.evaluation import engine
from rain_jax.evaluation.room import Room

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 98765432109 bytes.\nMore of it."


def limited(monkeypatch, name: str, fits: int) -> list[int]:
    """Programs called `name` hold `fits` images and no more; returns the sizes that were tried.

    The second time that one is used it fails, in the middle of its work.
    """
    where: Any = evaluation if name.endswith("_lanes") else engine
    make, tried = getattr(where, name), []

    def made(*given, batch_size: int, **settings):
        program = make(*given, batch_size=batch_size, **settings)

        def used(*arguments):
            tried.append(batch_size)
            for number, found in enumerate(program(*arguments)):
                if batch_size > fits and number == 1:
                    raise jax.errors.JaxRuntimeError(FULL)
                yield found

        return used

    monkeypatch.setattr(where, name, made)
    evaluation.forget()
    return tried


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    yield
    evaluation.forget()


@pytest.fixture(scope="module")
def untrained():
    network = test_evaluate.build.experiment(test_evaluate._plain()).network
    return drawn.of(network, (8, 8, 1), seed=1)


@pytest.mark.parametrize("name", ["packed", "judging"])
def test_an_evaluation_goes_on_with_smaller_batches(
    tmp_path: Path, untrained, monkeypatch, capsys, name: str
) -> None:
    asked = {"attacks.pgd40": dict(name="pgd", steps=4), "checks": False, "batch_size": 32,
             "block": 83}  # fmt: skip
    (tmp_path / "whole").mkdir()
    _, _, _, expected = test_evaluate.told(tmp_path / "whole", untrained, **asked)
    tried = limited(monkeypatch, name, 16)
    _, _, record, verdicts = test_evaluate.told(tmp_path, untrained, **asked)
    assert "out of the device's memory: 16 images at once instead of 32" in capsys.readouterr().out
    assert set(tried) == {32, 16}
    # Once is enough: what comes after begins with what fits.
    assert tried == sorted(tried, reverse=True)
    assert record["clean"]["of"] == 83
    rounded = ("margin", "distance", "rounding")
    for key in expected:
        if key.endswith(rounded):  # other batches round otherwise
            np.testing.assert_allclose(verdicts[key], expected[key], atol=1e-5, err_msg=key)
        elif not key.endswith("/steps"):  # until an image is let go turns on who was beside it
            np.testing.assert_array_equal(verdicts[key], expected[key], err_msg=key)


def test_one_image_on_each_device_that_does_not_fit_is_an_error(
    tmp_path: Path, untrained, monkeypatch
) -> None:
    asked = {"attacks.pgd40": dict(name="pgd", steps=4), "checks": False, "images": 20,
             "batch_size": 16, "block": 20}  # fmt: skip
    tried = limited(monkeypatch, "packed", 0)
    with pytest.raises(jax.errors.JaxRuntimeError):
        test_evaluate.told(tmp_path, untrained, **asked)
    assert tried == [16, 8]  # eight devices


def test_other_errors_are_not_taken_for_it() -> None:
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    for error in (other, ValueError(FULL)):
        with pytest.raises(type(error)):
            Room(32, 8).halve(error)
    room = Room(24, 8)
    room.halve(jax.errors.JaxRuntimeError(FULL))
    assert room.size == 16


trained = test_sweep.trained
numbers = test_sweep.numbers


@pytest.mark.parametrize("name", ["packed_lanes", "judging_lanes"])
def test_a_sweep_goes_on_with_smaller_batches(
    trained, numbers, tmp_path: Path, monkeypatch, capsys, name: str
) -> None:
    (record, stands), _ = numbers
    tried = limited(monkeypatch, name, 4)
    again, verdicts = test_sweep.swept(trained, tmp_path, *test_sweep.NUMBERS)
    assert "out of the device's memory" in capsys.readouterr().out
    assert set(tried) == {7, 3}
    np.testing.assert_array_equal(verdicts, stands)
    test_sweep.assert_same(again, record)


def test_a_command_says_it_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def main(config, folder) -> None:
        jnp.zeros(1 << 45).block_until_ready()  # more than any machine has

    main.__module__ = cli.__name__
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(SystemExit) as left:
        cli.run(main, argv=["x", "--config=empty.py"], changed=lambda config, changes: config)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the device's memory is exhausted (")
    assert str((1 << 45) * 4) in line
    assert "batch_size" in line
