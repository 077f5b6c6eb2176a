"""The README's examples do what they say, in their order, on a few images."""

import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SECTION = README[README.index("## As a library") : README.index("## Results")]
FIRST, *EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
# What each example is of, by a word of its own.
KINDS = {"linen": "linen", "NNX": "nnx", "Equinox": "equinox", "PyTorch": "torch"}


@pytest.fixture
def names(monkeypatch):
    """What the first example leaves, with fewer images."""
    monkeypatch.setenv("RAIN_JAX_PROGRESS", "0")
    found: dict = {}
    exec(FIRST, found)
    found["images"], found["labels"] = found["images"][:12], found["labels"][:12]
    return found


def example(word):
    (found,) = (text for text in EXAMPLES if word in text)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_evaluated(kind, names):
    if kind in ("Equinox", "PyTorch"):
        pytest.importorskip(KINDS[kind])
    exec(example(f"import {KINDS[kind]}\n"), names)
    assert names["result"].robust["attack"].shape == (12,)


def test_a_function_is_evaluated_and_attacks_make_images(names):
    exec(example("model = lambda images"), names)
    assert names["result"].passes.forward > 0
    assert "attack" in str(names["result"])
    exec(example("as_model"), names)
    assert names["adversarial"].shape == names["images"].shape
    moved = np.asarray(names["adversarial"]) - names["x"]
    assert 0 < np.max(np.abs(moved)) < 0.1001
    assert names["curve"].shape == (9, *names["images"].shape[1:])
