"""Keys, and how their generator is compiled."""

import subprocess
import sys

import jax
import numpy as np

from rain_jax.keys import unroll_threefry

DRAWS = """
import jax, sys
if sys.argv[1] == "unrolled":
    from rain_jax.keys import unroll_threefry
    assert unroll_threefry()
draws = lambda key: jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 7), (3, 5)))(
    jax.random.split(key, 100)
)
lowered = jax.jit(draws).lower(jax.random.key(5))
text = lowered.compile().as_text()
# Rounds of 32 bits: four in a turn of JAX's loops, all twenty in one of ours.
rotations = text.count("shift-right-logical(")
assert "while(" in text and (rotations > 60) == (sys.argv[1] == "unrolled"), rotations
sys.stdout.buffer.write(bytes(lowered.compile()(jax.random.key(5)).tobytes()))
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


def test_a_jax_that_keeps_its_rules_elsewhere_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.random.threefry2x32", None)
    monkeypatch.delattr(jax._src.random, "threefry2x32", raising=False)
    assert not unroll_threefry()
