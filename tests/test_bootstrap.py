"""One command for the tests, on one core or on two."""

from __future__ import annotations

from pathlib import Path

import pytest

import bootstrap
from quant_core.locate import find_newer_comfyui


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ComfyUI (COMFYUI_PATH) and ComfyUI-next."""
    for name in ("ComfyUI", "ComfyUI-next"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    monkeypatch.delenv("COMFYUI_PATH_NEW", raising=False)
    return tmp_path


def test_the_newer_core_is_named_or_lies_beside_the_first(cores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_newer_comfyui() == cores / "ComfyUI-next"
    (cores / "ComfyUI-next" / "main.py").rename(cores / "main.py")
    assert find_newer_comfyui() is None
    monkeypatch.setenv("COMFYUI_PATH_NEW", str(cores))
    assert find_newer_comfyui() == cores
    monkeypatch.setenv("COMFYUI_PATH_NEW", str(cores / "ComfyUI-next"))
    with pytest.raises(FileNotFoundError, match=r"COMFYUI_PATH_NEW=.*holds no main.py"):
        find_newer_comfyui()


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(0, 0, 0), (1, 0, 1), (0, 1, 1), (0, bootstrap.NO_TESTS, 0), (bootstrap.INTERRUPTED, 0, 2)],
)
def test_both_runs_count(cores: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, code: int) -> None:
    runs: list[tuple[str, Path | None, list[str]]] = []

    def run(command: str, where: bootstrap.Environment, arguments: list[str]) -> int:
        runs.append((where.folder.name, where.comfyui, arguments))
        return (first, second)[len(runs) - 1]

    monkeypatch.setattr(bootstrap, "run", run)
    assert bootstrap.main(["test", "-q"]) == code
    assert runs[0] == (".venv", cores / "ComfyUI", ["-q"])
    if first != bootstrap.INTERRUPTED:
        assert runs[1] == (".venv-next", cores / "ComfyUI-next", ["-m", "core and not wide", "-q"])


def test_one_line_says_that_there_is_no_second_core(
    cores: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cores / "ComfyUI-next" / "main.py").unlink()
    monkeypatch.setattr(bootstrap, "run", lambda *_: 0)
    assert bootstrap.main(["test"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert bootstrap.main(["demo"]) == 0
    assert "newer" not in capsys.readouterr().err
