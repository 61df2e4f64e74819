"""What a killed run had finished is kept: the next one does the rest, and the file is the same to the byte."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from quant_core import cli, jobs
from quant_core.errors import CalibQuantError
from quant_core.files import checkpoint, disk
from quant_core.files.checkpoint import TensorSpec, Writer
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.reports.report import Report
from quant_core.rounding.choice import Rounder

POSIX = pytest.mark.skipif(os.name != "posix", reason="forks")
STOPPED_AT = "layers.1.attention.qkv.weight"  # where the run that is killed has rounded some layers and not others


# --- killed, failed, or short of space anywhere (``faults``)


def faults(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    paths = os.pathsep.join([str(models.ROOT), str(models.ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, models.ROOT / "tests" / "faults.py", folder, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@POSIX
@pytest.mark.parametrize("split", [[], ["split"]], ids=["one file", "split"])
def test_killed_at_any_call_a_run_leaves_no_half_file_and_the_next_one_finishes(
    split: list[str], tmp_path: Path
) -> None:
    runs = faults(tmp_path, "kill", *split)
    assert len(runs) > (14 if split else 25) and runs[-1]["code"] == 0
    assert all(run["whole"] and run["again"] == 0 and run["same"] for run in runs), runs
    rounded = {run["rounded"] for run in runs}
    assert rounded == {0, 1, 2, 3}  # of 3: none that was finished is rounded again
    assert sum("m.safetensors" in run["left"] for run in runs) == 3 or split  # killed after it had its name, or not


@POSIX
def test_failing_at_any_call_a_run_leaves_nothing(tmp_path: Path) -> None:
    runs = faults(tmp_path, "fail")
    assert len(runs) > 25 and runs[-1]["code"] == 0
    assert all(run["whole"] and run["again"] == 0 and run["same"] for run in runs), runs
    assert not any(run["left"] for run in runs if run["code"] != 0 and "m.safetensors" not in run["left"]), runs


@POSIX
def test_killed_at_any_moment_a_run_is_continued(tmp_path: Path) -> None:
    runs = faults(tmp_path, "signal")
    assert len(runs) == 20 and all(run["whole"] and run["again"] == 0 and run["same"] for run in runs), runs


# --- what is continued, and what is not


class Killed(BaseException):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


def quantize(source: Path, target: Path, recipe: str = "nvfp4", **options: object) -> Report:
    with Source(source) as opened:
        plan = recipes.make_plan(opened, recipe)
        report = jobs.quantize(opened, plan, target, rounding="nearest", **options)  # type: ignore[arg-type]
    return replace(report, seconds=0, output="")


def killed(source: Path, target: Path, recipe: str = "nvfp4") -> list[Path]:
    """What a run that dies halfway leaves: its file and its journal."""

    def stop(_done: int, _total: int, key: str) -> None:
        if key == STOPPED_AT:
            for path in target.parent.glob("*.calibquant-*"):
                shutil.copy(path, target.parent.parent / path.name)
            raise Killed

    with pytest.raises(Killed):
        quantize(source, target, recipe, progress=stop)
    assert list(target.parent.iterdir()) == []
    return [Path(shutil.move(path, target.parent)) for path in target.parent.parent.glob("*.calibquant-*")]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "m.safetensors"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> tuple[bytes, Report]:
    """What an uninterrupted run makes."""
    (tmp_path / "whole").mkdir()
    report = quantize(source, tmp_path / "whole" / "m.safetensors")
    return (tmp_path / "whole" / "m.safetensors").read_bytes(), report


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers that were rounded, for the test to clear."""
    seen, round_one = [], Rounder.round
    monkeypatch.setattr(
        Rounder, "round", lambda self, layer, *rest: (seen.append(layer), round_one(self, layer, *rest))[1]
    )
    return seen


def test_a_killed_run_is_continued_where_it_stopped(
    source: Path, target: Path, rounded: list[str], whole: tuple[bytes, Report]
) -> None:
    every = list(rounded)
    rounded.clear()
    killed(source, target)
    done = rounded[:-1]  # the last was not yet written when the run died
    rounded.clear()
    assert (quantize(source, target), target.read_bytes()) == (whole[1], whole[0])
    assert 3 < len(done) < len(every) and rounded in (every[len(done) :], every[len(done) + 1 :])
    assert list(target.parent.iterdir()) == [target]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# What can be wrong with what a kill or a power cut left: (suffix, what befalls it)
DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a byte of the tensors": (".partial", lambda path: flip(path, path.stat().st_size - 2000)),
    "zeros for all tensors": (".partial", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "an empty file": (".partial", lambda path: cut(path, 0)),
    "half of the journal": (".journal", lambda path: cut(path, path.stat().st_size // 2)),
    "its last byte": (".journal", lambda path: cut(path, path.stat().st_size - 1)),
    "a byte of the journal": (".journal", lambda path: flip(path, path.stat().st_size // 2)),
    "a byte of its first line": (".journal", lambda path: flip(path, 30)),
    "the journal": (".journal", lambda path: path.unlink()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_done_again(name: str, source: Path, target: Path, whole: tuple[bytes, Report]) -> None:
    suffix, damage = DAMAGE[name]
    damage(next(path for path in killed(source, target) if path.suffix == suffix))
    assert (quantize(source, target), target.read_bytes()) == (whole[1], whole[0])
    assert list(target.parent.iterdir()) == [target]


def test_another_job_begins_anew(source: Path, target: Path, rounded: list[str], whole: tuple[bytes, Report]) -> None:
    every = len(rounded)
    for change in ("recipe", "source", "fresh"):
        killed(source, target, "mxfp8" if change == "recipe" else "nvfp4")
        if change == "source":
            os.utime(source, (1, 1))  # changed perhaps where the fingerprint, of some pieces, does not look
        rounded.clear()
        assert (quantize(source, target, fresh=change == "fresh"), target.read_bytes()) == (whole[1], whole[0])
        assert len(rounded) == every, change
        assert list(target.parent.iterdir()) == [target]
        target.unlink()


@POSIX
def test_what_another_run_works_on_is_left_alone(source: Path, target: Path, whole: tuple[bytes, Report]) -> None:
    import fcntl

    left = killed(source, target)
    with open(next(path for path in left if path.suffix == ".partial"), "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = {path: path.read_bytes() for path in left}
        assert (quantize(source, target), target.read_bytes()) == (whole[1], whole[0])
        assert {path: path.read_bytes() for path in left} == before
    quantize(source, target, overwrite=True)
    assert list(target.parent.iterdir()) == [target]


def test_where_files_cannot_be_locked_a_rename_claims_them(
    source: Path, target: Path, rounded: list[str], whole: tuple[bytes, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "fcntl", None)  # as on Windows
    every = len(rounded)
    killed(source, target)
    rounded.clear()
    assert (quantize(source, target), target.read_bytes()) == (whole[1], whole[0])
    assert 0 < len(rounded) < every and list(target.parent.iterdir()) == [target]


def test_room_that_leftovers_take_counts_as_free(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed(source, target)
    needed = whole_size = next(path.stat().st_size for path in left if path.suffix == ".partial")
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    taken = disk.abandoned(target)
    assert taken and taken <= whole_size + 4096
    usage.free = 10 * needed
    quantize(source, target)
    size = target.stat().st_size
    target.unlink()
    killed(source, target)
    usage.free = size - disk.abandoned(target)
    quantize(source, target)
    target.unlink()
    usage.free = size - 1
    with pytest.raises(CalibQuantError, match="make room"):
        quantize(source, target)


def test_the_command_has_fresh(source: Path, target: Path, rounded: list[str]) -> None:
    command = [
        "quantize",
        str(source),
        "-o",
        str(target),
        "--recipe",
        "nvfp4",
        "--rounding",
        "nearest",
        "--device",
        "cpu",
    ]
    counts = []
    for options in ([], ["--fresh"]):
        killed(source, target)
        rounded.clear()
        assert cli.main([*command, *options]) == 0
        counts.append(len(rounded))
        target.unlink()
    assert counts[0] < counts[1]


@pytest.fixture(scope="module")
def pack(comfy: Path) -> Path:
    """The pack as ComfyUI loads it; the value is ComfyUI's base directory."""
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return comfy


@pytest.fixture
def folders(pack: Path) -> Any:
    import nodes

    return sys.modules[
        f"{nodes.NODE_CLASS_MAPPINGS['CalibQuantQuantize'].__module__.rpartition('.')[0]}.comfyui.folders"
    ]


@pytest.mark.core
def test_the_node_continues_under_the_number_it_had(folders: Any, pack: Path, source: Path) -> None:
    def path() -> Path:
        return folders.output_path("resume/m", "demo.safetensors")[0]

    first = path()
    first.parent.mkdir(parents=True, exist_ok=True)
    left = killed(source, first)
    assert left and path() == first
    with Writer(first, [TensorSpec("a", torch.uint8, (1,))], {}) as at_work:  # which removed what was left
        assert path() != first
        at_work.write("a", torch.ones(1, dtype=torch.uint8))
    assert path().name == first.name.replace("00001", "00002")
    first.unlink()
    killed(source, first)
    first.touch()  # what was left is of a name that was given meanwhile
    assert path().name == first.name.replace("00001", "00002")
