"""Several threads change the time only: same bytes, same errors, a cancel stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.files.checkpoint import Writer
from quant_core.formats import FORMATS, nvfp4
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.rounding import gptq, pack
from quant_core.rounding.parallel import workers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For chunks so small that every layer has several."""
    monkeypatch.setattr(pack, "CHUNK", 2000)
    monkeypatch.setattr(pack, "SEARCHED", 500)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def quantize(source: Path, output: Path, recipe: str = "nvfp4", rounding: str = "search") -> bytes:
    with Source(source) as opened:
        plan = recipes.make_plan(opened, recipe)
        jobs.quantize(opened, plan, output, device="cpu", rounding=rounding, overwrite=True)
    return output.read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "fp8", "int8", "w4a8"])
def test_the_number_of_threads_changes_no_byte(recipe: str, rounding: str, file: Path, tmp_path: Path) -> None:
    several = quantize(file, tmp_path / "out.safetensors", recipe, rounding)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        assert quantize(file, tmp_path / "out.safetensors", recipe, rounding) == several
    torch.set_num_threads(1)
    assert quantize(file, tmp_path / "out.safetensors", recipe, rounding) == several
    torch.set_num_threads(3)


def test_torch_runs_on_one_thread_in_each_worker() -> None:
    together = threading.Barrier(3)  # passed by three workers at once only

    def work(part: int) -> tuple[int, int]:
        together.wait(timeout=60)
        return part, torch.get_num_threads()

    with workers(CPU) as each:
        assert each(work, range(6)) == [(part, 1) for part in range(6)]
        assert torch.get_num_threads() == 1
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_an_interrupt_amid_a_layer_stops_at_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, rounded = threading.main_thread().ident, []
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
    snap = nvfp4.round_e2m1

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        rounded.append(x.shape)
        if len(rounded) == 20:
            assert main and threading.get_ident() != main
            signal.pthread_kill(main, signal.SIGINT)
        return snap(x)

    monkeypatch.setattr(nvfp4, "round_e2m1", interrupt)
    before, threads = sorted(tmp_path.iterdir()), threading.active_count()
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize(file, tmp_path / "out.safetensors")
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert sorted(tmp_path.iterdir()) == before
    assert threading.active_count() == threads
    in_all = sum(t.numel() for t in models.zimage().values()) // pack.SEARCHED
    assert len(rounded) < in_all // 2


def test_a_write_that_fails_behind_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(writer: Writer, name: str, tensor: torch.Tensor) -> None:
        raise CalibQuantError(f"{writer.path}: cannot be written: {name}")

    monkeypatch.setattr(Writer, "write", fail)
    with pytest.raises(CalibQuantError, match=r"out\.safetensors: cannot be written: "):
        quantize(file, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [file]


def test_the_first_damaged_layer_is_the_one_that_is_named(tmp_path: Path) -> None:
    tensors = models.zimage()
    for layer in ("layers.0.attention.out", "layers.1.attention.out"):
        tensors[f"{layer}.weight"][-1, 5] = float("nan")
    path = models.save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: layer layers\.0\.attention\.out: the weight has 1 NaN"):
        quantize(path, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [path]


def test_nvfp4_search_finds_the_least_error_of_all_its_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    fmt, weight = FORMATS["nvfp4"], torch.randn(32, 64, generator=generator) ** 3
    importance = torch.rand(4, 16, generator=generator)
    frame = fmt.frame(weight, fmt.tensor(weight, weight.abs().amax()))
    blocks = weight.view(32, 4, 16)

    def cost(scale: torch.Tensor) -> torch.Tensor:
        values = nvfp4.e2m1_value(fmt.codes(weight, scale, frame)).double().view(32, 4, 16)
        off = values * fmt.step(scale, frame).double().unsqueeze(-1) - blocks
        return (off.square() * importance).sum(-1)

    chosen = fmt.choose(blocks, frame, importance)
    nearest = fmt.quantize(weight, frame.tensor).scale.view(torch.uint8).to(torch.int16)
    tried = [cost((nearest + i).clamp(0, 126).to(torch.uint8).view(torch.float8_e4m3fn)) for i in range(-4, 9)]
    torch.testing.assert_close(cost(chosen), torch.stack(tried).amin(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [96, 768])  # fewer than columns, and more
def test_gptq_in_comfyui_is_that_of_the_command_line(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "ALONE", 16)
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(n, 192, generator=generator) for n in (128, rows))

    def rounded() -> torch.Tensor:
        return pack.by_gptq(weight, FORMATS["nvfp4"], CPU, "w", gptq.factor(inputs)).tensors["weight"]

    with torch.inference_mode():  # as ComfyUI runs its nodes
        inside = rounded()
    assert torch.equal(inside, rounded())
