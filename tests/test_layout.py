"""Imports only go down, and rooms on one floor do not know each other."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Floor of every room. Tools may use the tools below them in this list of lists, never sideways up.
FLOORS = [
    ["types", "checks", "keys", "remembered"],
    ["losses", "norms", "gradients", "parallel", "members", "image",
     "models", "data", "schedules",
     "optimisers", "training", "checkpoints", "logs"],
    ["attacks", "defences", "methods", "bridges", "adapters"],
    ["evaluation"],
    ["audit"],
    ["config"],
    ["runs"],
]  # fmt: skip
# Within the tools, the few that lean on another one. Everything else on a floor is a stranger.
NEIGHBOURS = {
    "training": {"parallel"},
    "models": {"image"},
    "image": {"gradients"},
    "adapters": {"bridges"},
}
# The one door to each library.
DOORS = {
    "flax": ["models", "adapters"],
    "tensorflow_datasets": ["data"],
    "grain": ["data"],
    "orbax": ["checkpoints"],
    "ml_collections": ["config"],
    "matplotlib": [],
    "absl": ["checkpoints", "data"],
    "torch": ["bridges", "runs"],  # the latter reads weights from files
}


def rooms() -> dict[str, list[Path]]:
    package = ROOT / "rain_jax"
    found: dict[str, list[Path]] = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "rain_jax":
                names |= {f"rain_jax.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_go_down(room: str) -> None:
    floor = next((i for i, names in enumerate(FLOORS) if room in names), None)
    assert floor is not None, f"{room} has no floor: add it to FLOORS"
    below = {name for names in FLOORS[:floor] for name in names}
    for path in rooms()[room]:
        for name in imports(path):
            assert not name.startswith("experiments"), f"{path} imports {name}"
            if name.startswith("rain_jax."):
                other = name.split(".")[1]
                allowed = below | {room} | NEIGHBOURS.get(room, set())
                assert other in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_library_has_one_door(library: str) -> None:
    for room, paths in rooms().items():
        for path in paths:
            if any(n == library or n.startswith(library + ".") for n in imports(path)):
                assert room in DOORS[library], f"{path} imports {library}"


@pytest.mark.parametrize("package", ["attacks", "defences", "methods", "models"])
def test_registries_name_what_they_hold(package: str) -> None:
    module = __import__(f"rain_jax.{package}", fromlist=["__all__"])
    assert sorted(module.__all__) == list(module.__all__)
    for name in module.__all__:
        assert callable(getattr(module, name))
        assert getattr(module, name).__doc__, f"{name} says nothing about itself"


BEFORE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
sys.exit(xla_bridge.backends_are_initialized())
"""


def test_importing_touches_no_device() -> None:
    """Processes join, and cores become devices, before anything has used one; a module-level
    array would.
    """
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("rain_jax", "experiments")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name not in ("__init__.py", "peers.py", "twins.py") and "configs" not in path.parts
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    known = [name for name in modules if name != "rain_jax.bridges" or find_spec("torch")]
    subprocess.run([sys.executable, "-c", BEFORE, *known], check=True, env=environment)
