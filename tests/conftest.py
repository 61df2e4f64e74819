"""Fixtures of the tests that need a real ComfyUI; without one they are skipped with one line that says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_env import ComfyUINotFound, Server, import_comfy, start_server


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI imported into this process; the value is its base directory (models, output, … of this run)."""
    base_dir = tmp_path_factory.mktemp("comfy")
    try:
        import_comfy(base_dir)
    except ComfyUINotFound as missing:
        pytest.skip(str(missing))
    return base_dir


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI server with this pack, started by the first test that asks and shared by all."""
    try:
        with start_server(tmp_path_factory.mktemp("server")) as running:
            yield running
    except ComfyUINotFound as missing:
        pytest.skip(str(missing))
