"""What holds for the source as a whole."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys

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
