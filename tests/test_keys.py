"""Keys, and how their generator is compiled."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

from rain_jax.keys import unroll_threefry

DRAWS = """
import jax, sys
if sys.argv[1] == "unrolled":
    from rain_jax.keys import unroll_threefry
    assert unroll_threefry()
draws = lambda key: jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 7), (3, 5)))(
    jax.random.split(key, 100)
)
program = jax.jit(draws).lower(jax.random.key(5)).compile()
text = program.as_text()
# Rounds of 32 bits: four in a turn of JAX's loops, all twenty in one of ours.
rotations = text.count("shift-right-logical(")
assert "while(" in text and (rotations > 60) == (sys.argv[1] == "unrolled"), rotations
sys.stdout.buffer.write(program(jax.random.key(5)).tobytes())
"""


def test_threefry_written_out_has_the_same_bits():
    """In processes of their own: one compiles as JAX does by itself."""
    rolled, unrolled = (
        subprocess.run(
            [sys.executable, "-c", DRAWS, how], check=True, capture_output=True
        ).stdout
        for how in ("rolled", "unrolled")
    )  # fmt: skip
    assert len(rolled) == 4 * 100 * 15
    assert len(set(np.frombuffer(rolled, np.uint32))) > 1490
    assert rolled == unrolled


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("random.threefry2x32", "_threefry2x32_lowering"),
        ("random.threefry2x32", "threefry2x32_p"),
        ("interpreters.mlir", "lower_fun"),
        ("interpreters.mlir", "register_lowering"),
    ],
)
def test_a_jax_whose_inner_parts_are_others_is_left_alone(module, name, monkeypatch):
    monkeypatch.delattr(importlib.import_module(f"jax._src.{module}"), name)
    assert not unroll_threefry()


def test_so_is_one_whose_inner_parts_take_other_arguments(monkeypatch):
    module = importlib.import_module("jax._src.random.threefry2x32")
    monkeypatch.setattr(module, "_threefry2x32_lowering", lambda key1, key2, x1, x2: (x1, x2))
    assert not unroll_threefry()
