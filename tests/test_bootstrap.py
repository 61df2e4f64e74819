"""One command for the tests, on one core or on two."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest

import bootstrap
from quant_core import locate
from quant_core.locate import find_comfyui, find_newer_comfyui


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


# --- bringing a ComfyUI for the demo


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No ComfyUI on this machine; one that is brought would go to ``tmp_path / "brought"``."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for module in (bootstrap, locate):
        monkeypatch.setattr(module, "BROUGHT", tmp_path / "brought")
    assert find_comfyui() is None
    return tmp_path / "brought"


@pytest.fixture
def remote(tmp_path: Path) -> str:
    """A repository with two commits; the tag v1 is at the first, which holds a main.py."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "main.py").touch()
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e"]
    for step in (["init", "-q"], ["add", "main.py"], ["commit", "-qm", "1"], ["tag", "v1"], ["rm", "-q", "main.py"]):
        subprocess.run([*git, *step], check=True)
    subprocess.run([*git, "commit", "-qm", "2"], check=True)
    return folder.as_uri()


def test_a_release_is_brought_once_and_found(nowhere: Path, remote: str, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted = nowhere.with_name("brought.partial")
    interrupted.mkdir()
    (interrupted / "main.py").touch()
    assert find_comfyui() is None
    assert bootstrap.bring_comfyui(remote, "v1", nowhere) == nowhere == find_comfyui()
    depth = subprocess.run(["git", "-C", str(nowhere), "rev-list", "--count", "HEAD"], capture_output=True, text=True)
    assert depth.stdout == "1\n" and not interrupted.exists()
    assert capsys.readouterr().err == f"bootstrap: bringing ComfyUI v1 from {remote} into brought\n"


@pytest.mark.parametrize("failure", ["no tag", "no remote", "no main.py", "no git", "stopped"])
def test_a_failed_clone_is_one_line_and_leaves_nothing(
    nowhere: Path, remote: str, failure: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, tag = {"no remote": (remote + "2", "v1"), "no tag": (remote, "v2"), "no main.py": (remote, "master")}.get(
        failure, (remote, "v1")
    )
    if failure == "no main.py":
        subprocess.run(["git", "-C", str(nowhere.parent / "remote"), "branch", "-M", "master"], check=True)
    if failure == "no git":
        monkeypatch.setenv("PATH", str(nowhere))
    if failure == "stopped":
        monkeypatch.setattr(subprocess, "run", _stopped)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.bring_comfyui(url, tag, nowhere)
    else:
        assert bootstrap.bring_comfyui(url, tag, nowhere) is None
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and said[1].startswith("bootstrap: no ComfyUI brought (")
        assert said[1].endswith("): the built-in sampler draws")
    assert not nowhere.exists() and not nowhere.with_name("brought.partial").exists()


def _stopped(command: list[str], **_: object) -> None:
    (Path(command[-1]) / "half").mkdir(parents=True)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "terminal", "answer", "brought", "passed"),
    [
        ([], False, "y", False, []),
        ([], True, "\n", False, []),
        ([], True, "y\n", True, []),
        (["--comfyui", "--seeds", "3"], False, "", True, ["--seeds", "3"]),
        (["--no-comfyui"], True, "y\n", False, ["--no-comfyui"]),
    ],
)
def test_comfyui_is_brought_only_when_asked_for(
    nowhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    terminal: bool,
    answer: str,
    brought: bool,
    passed: list[str],
) -> None:
    stdin = io.StringIO(answer)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(bootstrap.sys, "stdin", stdin)
    for stream in (stdin, bootstrap.sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(bootstrap, "bring_comfyui", lambda: nowhere)
    monkeypatch.setattr(bootstrap, "ensure_installed", lambda *_: None)
    runs: list[tuple[Path | None, list[str]]] = []
    monkeypatch.setattr(bootstrap, "run", lambda _, where, rest: runs.append((where.comfyui, rest)) or 0)
    assert bootstrap.main(["demo", *arguments]) == 0
    assert runs == [(nowhere if brought else None, passed)]


def test_a_brought_comfyui_whose_packages_fail_is_left_out(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(where: bootstrap.Environment, _: str) -> None:
        raise bootstrap.SetupError("pip failed")

    nowhere.mkdir()
    (nowhere / "main.py").touch()
    monkeypatch.setattr(bootstrap, "ensure_installed", offline)
    runs: list[tuple[Path | None, list[str]]] = []
    monkeypatch.setattr(bootstrap, "run", lambda _, where, rest: runs.append((where.comfyui, rest)) or 0)
    assert bootstrap.main(["demo"]) == 0
    assert runs == [(None, ["--no-comfyui"])]
    assert "left out (pip failed)" in capsys.readouterr().err
