"""What holds for the source as a whole."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import models
import pytest

ENGINE = sorted((models.ROOT / "quant_core").rglob("*.py"))

# Imports every module of the engine while anything of ComfyUI is forbidden.
WITHOUT_COMFYUI = """
import importlib, importlib.abc, pkgutil, sys
class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"):
            raise AssertionError(f"the engine imports {name}")
sys.meta_path.insert(0, Forbid())
import quant_core
names = [m.name for m in pkgutil.walk_packages(quant_core.__path__, "quant_core.") if "_assets" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def imports(tree: ast.AST) -> set[str]:
    """Top-level packages imported anywhere in a module, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def test_no_module_of_the_engine_imports_comfyui() -> None:
    foreign = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
    for path in ENGINE:
        assert not imports(ast.parse(path.read_text("utf-8"))) & foreign, path.name


def test_the_engine_imports_where_comfyui_is_forbidden() -> None:
    command = models.python(WITHOUT_COMFYUI)
    done = subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(ENGINE) - 1


# The way of the data, last first: a room imports from the rooms below it only (and from itself).
ROOMS = ("cli", "demo", "queue", "jobs", "reports", "planning", "rounding", "evidence", "models", "files", "formats")
BESIDE = {("cli", "demo"), ("files", "formats"), ("formats", "files")}  # of one height; formats know nothing of files
SHARED = {"errors", "locate", "progress", "__version__"}  # single modules that every room may use


def room_of(path: Path) -> str:
    """The room a module lies in, in a folder of it or not; "" for a single module."""
    return path.relative_to(models.ROOT / "quant_core").parts[0] if path.parent.name != "quant_core" else ""


def imported_rooms(path: Path) -> set[str]:
    """Rooms (or single modules) of quant_core that a module of it imports, inside functions too."""
    inside, found = path.relative_to(models.ROOT / "quant_core").parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*inside][: len(inside) - node.level + 1]
            assert node.level <= len(inside) + 1, f"{path.name} imports from above quant_core"
            target = [*base, *(node.module.split(".") if node.module else [])]
            found |= {target[0]} if target else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_the_way_of_the_data(room: str) -> None:
    below = ROOMS[ROOMS.index(room) :]
    modules = [path for path in ENGINE if room_of(path) == room]
    assert modules
    for path in modules:
        upwards = {other for other in imported_rooms(path) - SHARED if other not in below}
        assert not {other for other in upwards if (room, other) not in BESIDE}, f"{room}/{path.name}: {upwards}"


def test_every_module_of_the_engine_is_in_a_room() -> None:
    loose = {path.stem for path in ENGINE if not room_of(path)}
    assert loose == {"__init__", *SHARED} - {"__version__"}
    assert {room_of(path) for path in ENGINE} == {"", *ROOMS}


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_ruff_has_nothing_to_say() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], capture_output=True, text=True, cwd=models.ROOT)
    assert done.returncode == 0, done.stdout


def test_no_file_names_a_place_on_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=models.ROOT
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    home_or_temp = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work)/\w|[A-Z]:\\\\?Users")
    for name in listed.stdout.splitlines():
        path = models.ROOT / name
        if path.suffix in {".py", ".md", ".json", ".toml", ".yml", ".yaml", ".js", ".sh"} and path.exists():
            found = home_or_temp.search(path.read_text("utf-8"))
            assert found is None, f"{name}: {found and found.group()}"


def test_benchmarks_find_what_they_import() -> None:
    """No test runs them, so a name that moved would only be missed by whoever wants a figure."""
    wanted = {
        (path.name, node.module, alias.name)
        for path in (models.ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quant_core")
        for alias in node.names
    }
    assert wanted and [found for found in sorted(wanted) if not _is_there(*found[1:])] == []


def _is_there(module: str, name: str) -> bool:
    """Whether it is a module in this package, or a name in this module."""
    parent = importlib.import_module(module)
    return hasattr(parent, name) or (hasattr(parent, "__path__") and bool(importlib.util.find_spec(f"{module}.{name}")))
