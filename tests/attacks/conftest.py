"""What an attack draws is not in question here: its keys are quick to compile."""

import jax
import pytest
import quick_keys


@pytest.fixture
def key() -> jax.Array:
    return quick_keys.key(0)
