"""Tests run strict: eight simulated devices, no rank promotion, a shared compilation cache."""

import os
import tempfile
from pathlib import Path

# Before the first JAX call: eight devices on one CPU.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8".strip()
# Through the environment, so that the commands which tests start share the cache too. Entries are
# executable code, so the folder belongs to this user alone.
_CACHE = Path(tempfile.gettempdir()) / f"rain_jax-test-cache-{os.getuid()}"
_CACHE.mkdir(mode=0o700, exist_ok=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; tests that need it are skipped without."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED_DATA


VERBOSITY = logging.get_verbosity()


@pytest.fixture(autouse=True)
def verbosity() -> None:
    """Commands inside a test, or in a fixture before it, quiet the logs of the whole process."""
    logging.set_verbosity(VERBOSITY)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
