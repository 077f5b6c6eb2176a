"""The compilation cache of the commands: where it is, what it is for, and how to do without."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rain_jax.runs import cache

ROOT = Path(__file__).resolve().parents[1]

TWICE = """
import jax
from rain_jax.runs import cache
cache.enable()
hits = []
listen = lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
jax.monitoring.register_event_listener(listen)
for _ in range(2):
    jax.jit(lambda x: 2 * x)(1.0)
    jax.clear_caches()  # as another process would begin
print(len(hits))
"""


@pytest.mark.parametrize("switch", [{}, {"RAIN_JAX_CACHE": "0"}], ids=["on", "off"])
def test_what_is_compiled_is_kept_for_the_next_start_unless_told_otherwise(switch, tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "RAIN_JAX_", "XLA_"))}
    said = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={
            **kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path / "deep" / "cache"), **switch,
        },
    )  # fmt: skip
    hits = int(said.stdout)
    if switch:
        assert hits == 0
        assert list(tmp_path.iterdir()) == []
    else:
        assert hits > 0
        folder = tmp_path / "deep" / "cache" / "rain_jax"
        assert any(path.stat().st_size for path in folder.iterdir())
        # What is in there will be executed.
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def settings():
    """A way to look at JAX's settings, which are afterwards what they were before."""
    look = lambda: {name: jax.config.values[name] for name in SETTINGS}
    before = look()
    yield look
    for name, value in before.items():
        jax.config.update(name, value)


def test_another_folder_that_jax_was_told_of_stays(settings, tmp_path, monkeypatch):
    """As the tests' own is: `conftest`."""
    monkeypatch.delenv("RAIN_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = settings()
    assert before["jax_compilation_cache_dir"]
    cache.enable()
    assert settings() == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_done_without(settings, tmp_path, monkeypatch):
    """Nobody can make a folder inside a file."""
    monkeypatch.delenv("RAIN_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    jax.config.update("jax_compilation_cache_dir", None)
    before = settings()
    cache.enable()
    assert settings() == before

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", nowhere)
    cache.enable()
    assert settings() == before
