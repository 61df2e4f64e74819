"""The example workflow in a real browser; skipped where Chromium or playwright-core is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from comfy_env import ROOT, Server

SCRIPTS = ROOT / "tests" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser_environment() -> dict[str, str]:
    """What the scripts need (see page.mjs); skips with the reason if something is missing."""
    folders = [Path(f) for f in (os.environ.get("PLAYWRIGHT_DIR"), ROOT) if f]
    playwright = next((f for f in folders if (f / "node_modules" / "playwright-core").is_dir()), None)
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not (playwright and chromium and shutil.which("node")):
        pytest.skip("needs node, Chromium (CHROMIUM) and playwright-core (PLAYWRIGHT_DIR: a folder with node_modules)")
    return {**os.environ, "PLAYWRIGHT_DIR": str(playwright), "CHROMIUM": chromium}


@pytest.mark.core
def test_words_reach_their_node_in_the_tab_that_asked(server: Server) -> None:
    command = ["node", str(SCRIPTS / "check_words.mjs"), server.url]
    done = subprocess.run(command, env=browser_environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail()}"
    lines = done.stdout.splitlines()
    assert len(lines) == 20 and all(line.startswith("ok ") for line in lines), done.stdout


def test_workflow_opens_runs_and_shows_its_result_in_both_renderers(server: Server, tmp_path: Path) -> None:
    environment = browser_environment()
    command = ["node", str(SCRIPTS / "check_workflow.mjs"), server.url, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail()}"
    lines = done.stdout.splitlines()
    assert len(lines) == 20 and all(line.startswith("ok ") for line in lines), done.stdout
