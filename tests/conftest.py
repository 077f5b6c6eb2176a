"""Tests run strict: eight simulated devices, no rank promotion, a shared compilation cache."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Before the first JAX call. Programs are compiled as users' are. `COMPILE=fast` runs the tests
# marked `structure` and no others: they assert nothing about numbers that a program computed, so
# XLA's older emitters and code that LLVM has not optimised will do, which are there sooner.
FAST = os.environ.get("COMPILE") == "fast"
_FLAGS = os.environ.get("XLA_FLAGS", "")
_OWN = {"xla_force_host_platform_device_count": 8}
if FAST:
    _OWN["xla_backend_optimization_level"] = 0
    if version("jaxlib") < "0.12":  # later ones have no other emitters, and refuse the flag
        _OWN["xla_cpu_use_fusion_emitters"] = "false"
for _name, _value in _OWN.items():
    if _name not in _FLAGS:
        _FLAGS = f"{_FLAGS} --{_name}={_value}".strip()
os.environ["XLA_FLAGS"] = _FLAGS
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

from rain_jax.keys import unroll_threefry  # noqa: E402

unroll_threefry()  # as commands do
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What asserts numbers is never compiled in haste."""
    if FAST:
        left = [item for item in items if item.get_closest_marker("structure") is None]
        items[:] = [item for item in items if item.get_closest_marker("structure") is not None]
        config.hook.pytest_deselected(items=left)


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


@pytest.fixture(autouse=True, scope="module")
def kept() -> Iterator[None]:
    """What JAX has traced and compiled stays: the collector need not walk through it ever again.

    Unless there is so much of it that the process would soon end: on CPU each program takes some
    six memory mappings, and Linux allows a process 65,530. The compiler ends the process where it
    gets no more.
    """
    yield
    if _mappings() > _MOST_MAPPINGS // 2:
        jax.clear_caches()
    gc.collect()
    gc.freeze()


def _mappings() -> int:
    """How many memory mappings this process has; 0 where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def _most_mappings() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530


_MOST_MAPPINGS = _most_mappings()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
