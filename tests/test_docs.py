"""What the README and docs/ tell people to type works, and what they link to exists.

A block tagged `sh` is run, line by line, in a folder that holds `model.safetensors` and its calibration (the demo
model's) and a LoRA `style.safetensors`; `python` blocks run there too. `console` blocks install or fetch things and
are not run here: test_bootstrap.py has those of bootstrap.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import models
import pytest
import torch
from safetensors.torch import save_file

PAGES = [models.ROOT / "README.md", *sorted((models.ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


def _blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    return [found for found in BLOCK.findall(page.read_text(encoding="utf-8")) if found[0] in languages]


def _folder(tmp_path: Path) -> Path:
    shipped = models.ROOT / "workflows"
    shutil.copy(shipped / "models/calibquant_digits_wan.safetensors", tmp_path / "model.safetensors")
    seen = shipped / "calibrations/digits.calibration.safetensors"
    shutil.copy(seen, tmp_path / "model.calibration.safetensors")
    layer = "diffusion_model.blocks.0.self_attn.q"
    lora = {f"{layer}.lora_A.weight": torch.zeros(2, 128), f"{layer}.lora_B.weight": torch.zeros(128, 2)}
    save_file(lora, tmp_path / "style.safetensors")
    return tmp_path


def _command(line: str) -> list[str]:
    words = shlex.split(line)
    assert words[0] == "calibquant", f"tag it console, or call calibquant: {line}"
    return [sys.executable, "-m", "quant_core.cli", *words[1:]]


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "sh", "python")], ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    folder, environment = _folder(tmp_path), {**os.environ, "PYTHONPATH": str(models.ROOT)}
    for language, text in _blocks(page, "sh", "python"):
        lines = text.splitlines() if language == "sh" else []
        for command in [_command(line) for line in lines if line.strip()] or [[sys.executable, "-c", text]]:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}: {shlex.join(command)}: {done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_node_has_its_line_among_the_nodes() -> None:
    named = set(re.findall(r"js/docs/(\w+)\.md", (models.ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")))
    assert named == {page.stem for page in (models.ROOT / "js" / "docs").glob("*.md")}


def test_pages_use_only_known_tags() -> None:
    tags = {tag for page in PAGES for tag in re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert tags <= {"sh", "python", "console", "diff"}


def test_the_registry_finds_what_pyproject_names() -> None:
    """Icon and banner lie where their addresses say, in the repository that is named; svg, as the registry takes it."""
    text = (models.ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is newer than Python 3.10
    found = dict(re.findall(r'^(Repository|Icon|Banner) = "(.*)"$', text, re.MULTILINE))
    at = found["Repository"].replace("//github.com/", "//raw.githubusercontent.com/") + "/main/"
    for address in (found["Icon"], found["Banner"]):
        assert address.startswith(at)
        picture = ElementTree.parse(models.ROOT / address.removeprefix(at)).getroot()
        _, _, width, height = map(float, picture.attrib["viewBox"].split())
        assert picture.tag == "{http://www.w3.org/2000/svg}svg" and height <= width
