"""Rounding on a Ray cluster of two workers on this machine: the same bytes, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from quant_core import cli, jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.jobs import remote
from quant_core.jobs.remote import Cluster, units
from quant_core.models.source import Source
from quant_core.planning import folding, recipes, splitting

LAYER = "layers.0.attention.out"
STOPPED_AT = "layers.1.attention.qkv.weight"  # where some layers are rounded and others are not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(models.ROOT)  # of the workers
    here = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=2, _node_ip_address="127.0.0.1", **here)
    try:
        with Cluster("auto") as joined:
            yield joined
        assert ray.is_initialized()  # whoever was connected stays so
    finally:
        ray.shutdown()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


def seen(source: Source) -> Calibration:
    """Of all layers but one, four runs."""
    collector = Collector(lambda layer: source.architecture.describe(layer).shared_input, 300)
    for run in range(4):
        collector.start_run(f"run {run}")
        for layer in [name for name in source.layers if name != LAYER]:
            x = models.correlated(80, source.shape(layer)[1], run)
            collector.add(layer, x, x[:, :8])
        collector.finish_run()
    return collector.result()


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    returned = cli.main(["quantize", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert returned == code and "Traceback" not in err, err
    return out, err


def named(report: Any) -> list[Any]:
    return [replace(layer, reason="") for layer in report.layers]


# --- layers of one file


@pytest.mark.parametrize("way", ["nearest", "gptq", "fold", "split"])
def test_a_cluster_makes_the_same_bytes_and_report(
    way: str, cluster: Cluster, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "UNIT", 3 * 64 * 128)  # so that layers with one input are several tasks, too
    made = {}
    with Source(file) as source:
        known, plan = seen(source), recipes.make_plan(source, "nvfp4")
        if way == "fold":
            plan = folding.folded(source, plan, known)
        if way == "split":
            known = replace(known, layers={**known.layers, LAYER: known.layers["layers.1.attention.out"]})
            plan = splitting.split(source, plan, known, "4")
        how = {"calibration": None if way == "nearest" else known, "rounding": "gptq" if way == "gptq" else "auto"}
        for place in (None, cluster):
            folder = tmp_path / f"{place is None}"
            folder.mkdir()
            report = jobs.quantize(source, plan, folder / "m.split.safetensors", device="cpu", cluster=place, **how)
            made[place] = named(report), [path.read_bytes() for path in sorted(folder.iterdir())]
    assert made[None] == made[cluster]
    assert len(made[None][1]) == 1 + (way == "split")


def test_layers_that_share_an_input_are_one_task(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Source(file) as source:
        plan, known = recipes.make_plan(source, "nvfp4"), seen(source)
        alone, together = units(source, plan, None), units(source, plan, known)
        assert [layer for unit in alone for layer in unit] == list(plan.quantized())
        assert sorted(layer for unit in together for layer in unit) == sorted(plan.quantized())
        assert ["layers.0.feed_forward.w1", "layers.0.feed_forward.w3"] in together
        assert {len(unit) for unit in alone} == {1} < {len(unit) for unit in together}
        monkeypatch.setattr(remote, "UNIT", 1)
        assert {len(unit) for unit in units(source, plan, known)} == {1}


def killer(flag: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ends its process, once; a patch that changes nothing. Of an inner function, so that it travels by value."""

    def patch(tensor: torch.Tensor) -> torch.Tensor:
        if flag.exists():
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return tensor

    return patch


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_a_worker_killed_in_the_middle_costs_nothing(cluster: Cluster, file: Path, tmp_path: Path) -> None:
    flag, patches = tmp_path / "flag", {f"{LAYER}.weight": killer(tmp_path / "flag")}
    with Source(file) as source:
        plan = recipes.make_plan(source, "nvfp4")
        jobs.quantize(source, plan, tmp_path / "here.safetensors", merge=patches)
        flag.touch()
        jobs.quantize(source, plan, tmp_path / "there.safetensors", merge=patches, cluster=cluster)
    assert not flag.exists()
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_a_problem_of_a_layer_is_our_one_line_and_nothing_is_left(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = models.zimage()
    tensors[f"{LAYER}.weight"][-1, 5] = float("nan")
    path = models.save(tmp_path / "m.safetensors", tensors)
    _, err = call(capsys, path, "-o", tmp_path / "o.safetensors", "--recipe", "nvfp4", "--ray", "auto", code=1)
    assert err.splitlines()[-1].startswith(f"error: {path}: layer {LAYER}: the weight has 1 NaN")
    assert list(tmp_path.iterdir()) == [path]


def test_what_ray_or_a_bug_ends_is_one_line_that_names_the_layer(cluster: Cluster, tmp_path: Path, file: Path) -> None:
    def broken(tensor: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by zero")

    def deadly(tensor: torch.Tensor) -> torch.Tensor:
        os._exit(1)

    with Source(file) as source:
        plan = recipes.make_plan(source, "nvfp4")
        for patch, said in ((broken, "failed on a Ray worker: ZeroDivisionError"), (deadly, "Ray gave up: ")):
            with pytest.raises(CalibQuantError, match=f"layer {LAYER}: {said}"):
                jobs.quantize(
                    source, plan, tmp_path / "o.safetensors", merge={f"{LAYER}.weight": patch}, cluster=cluster
                )
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_run_goes_on_where_it_was(cluster: Cluster, file: Path, tmp_path: Path) -> None:
    """The process that writes is killed; what it had written is not sent to the cluster again."""
    output = tmp_path / "o.safetensors"
    with Source(file) as source:
        plan = recipes.make_plan(source, "nvfp4")
        jobs.quantize(source, plan, tmp_path / "whole.safetensors", cluster=cluster)
        code = f"""
import os
from quant_core import jobs
from quant_core.models.source import Source
from quant_core.planning import recipes
def die(done, total, text):
    if text == {STOPPED_AT!r}:
        os._exit(9)
with Source({str(file)!r}) as source:
    jobs.quantize(source, recipes.make_plan(source, "nvfp4"), {str(output)!r}, device="cpu", progress=die)
"""
        assert subprocess.run(models.python(code), cwd=models.ROOT).returncode == 9
        sent: list[str] = []
        start = Cluster.start

        class Counting(Cluster):
            def start(self, function: Any, unit: Any, **how: Any) -> Any:
                sent.extend(unit.layers)
                return start(self, function, unit, **how)

        with Counting("auto") as counting:
            jobs.quantize(source, plan, output, cluster=counting)
    assert 0 < len(sent) < len(plan.quantized()) and "layers.0.attention.qkv" not in sent
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_another_release_or_another_file_on_a_worker_is_told(cluster: Cluster, file: Path, tmp_path: Path) -> None:
    known = remote._versions()
    assert remote._task(known, 1, str, 5) == "5"
    told = remote._task(("0.0.9", *known[1:]), 1, str, 5)
    assert isinstance(told, CalibQuantError) and "not 0.0.9" in str(told)
    with Source(file) as source:
        plan = recipes.make_plan(source, "nvfp4")
        layers = remote.Layers(cluster, source, plan, None, "auto", torch.device("cpu"), {}, lambda layer: None)
    other = models.zimage()
    other["layers.0.attention.qkv.weight"][0] += 1
    models.save(file, other)
    with layers, pytest.raises(CalibQuantError, match=r"m\.safetensors: is another file on the machine "):
        layers.made(LAYER)


# --- several files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        tensors = models.zimage()
        tensors[f"{LAYER}.weight"] += i
        models.save(folder / f"{i}.safetensors", tensors)
    return sorted(folder.iterdir())


def test_several_files_are_a_task_each_and_a_bad_one_stops_no_other(
    cluster: Cluster, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Source(files[0]) as source:
        known = seen(source)
    info = {**known.info, "architecture": "zimage", "source_fingerprint": "of another file"}
    calibration.save(replace(known, info=info), tmp_path / "c.safetensors")
    how = "--recipe", "nvfp4", "--calibration", tmp_path / "c.safetensors", "--force-calibration", "--device", "cpu"
    tensors = models.zimage()
    tensors[f"{LAYER}.weight"][-1, 5] = float("nan")
    models.save(files[1], tensors)
    out = tmp_path / "out"
    out.mkdir()
    table, err = call(capsys, *files, "-o", out, *how, "--ray", "auto", code=1)
    assert [path.name for path in sorted(out.iterdir())] == ["0.safetensors", "2.safetensors"]
    lines = table.splitlines()
    assert lines[0].split() == ["file", "seconds", "result"] and len(lines) == 4
    assert f"{files[1]}" in lines[2] and f"failed: {files[1]}: layer {LAYER}: the weight has 1 NaN" in lines[2]
    assert err.splitlines()[-1].startswith(f"error: {files[1]}: 1 of 3 files failed")
    assert f"{files[2]}: warning: " in err  # of the calibration
    for place in (0, 2):
        call(capsys, files[place], "-o", tmp_path / "here.safetensors", *how, "--overwrite")
        assert (out / files[place].name).read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    said, _ = call(capsys, *files, "-o", out, *how, "--ray", "auto", "--json", code=1)
    assert ["exists already" in fact.get("error", "") for fact in json.loads(said)] == [True, False, True]


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_a_file_whose_worker_is_killed_is_gone_on_with(cluster: Cluster, file: Path, tmp_path: Path) -> None:
    log, died, output = tmp_path / "log", tmp_path / "died", tmp_path / "o.safetensors"

    def quantize(paths: tuple[Path, Path]) -> list[str]:
        """As an inner function it travels by value."""
        from quant_core.rounding.choice import Rounder

        plain = Rounder.round

        def counted(self: Rounder, layer: str, *rest: Any, **how: Any) -> Any:
            with open(log, "a") as written:
                written.write(f"{layer}\n")
            return plain(self, layer, *rest, **how)

        def die(done: int, total: int, text: str) -> None:
            if text == STOPPED_AT and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        Rounder.round = counted  # type: ignore[method-assign]
        try:
            with Source(paths[0]) as source:
                jobs.quantize(source, recipes.make_plan(source, "nvfp4"), paths[1], device="cpu", progress=die)
        finally:
            Rounder.round = plain  # type: ignore[method-assign]
        return log.read_text().split()

    ((_, rounded),) = cluster.each(quantize, [(file, output)], ["m"], "cpu", 0)
    assert died.exists()
    again = {layer for layer in rounded if rounded.count(layer) > 1}
    assert len(again) <= 1 and "layers.0.attention.qkv" not in again  # the one that was not yet written
    with Source(file) as source:
        jobs.quantize(source, recipes.make_plan(source, "nvfp4"), tmp_path / "here.safetensors", device="cpu")
    assert output.read_bytes() == (tmp_path / "here.safetensors").read_bytes()


# --- how it is asked for


def test_usage_and_addresses(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = "--recipe", "nvfp4", "-o"
    assert "several files need --ray" in call(capsys, *files, *how, tmp_path, code=2)[1]
    nowhere = call(capsys, *files, *how, tmp_path / "none", "--ray", "auto", code=1)[1]
    assert "none: no such folder, which several files need for -o: make it first" in nowhere
    (tmp_path / "2").mkdir()
    same = models.save(tmp_path / "2" / files[0].name, models.zimage())
    assert "would both become" in call(capsys, files[0], same, *how, tmp_path, "--ray", "auto", code=2)[1]


def test_without_ray_one_line_says_what_to_install(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    _, err = call(capsys, file, "-o", tmp_path / "o.safetensors", "--recipe", "nvfp4", "--ray", "auto", code=1)
    assert err.splitlines()[-1] == "error: --ray needs the package ray: pip install 'calibquant[ray]'"


def test_a_cluster_that_is_not_there_is_told(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with socket.socket() as taken:  # and never listened at
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        how = ["quantize", file, "-o", tmp_path / "o.safetensors", "--recipe", "nvfp4", "--ray", address]
        command = [sys.executable, "-m", "quant_core.cli", *map(str, how)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --ray {address}: no Ray cluster answers there (")
