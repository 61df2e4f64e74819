"""Bytes that must not change: golden hashes, and the same bytes on any number of threads and for any chunk size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch

from quant_core import jobs
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.files import checkpoint
from quant_core.formats import FORMATS, base
from quant_core.models.source import Source
from quant_core.planning import folding, recipes, splitting
from quant_core.planning.plan import Plan
from quant_core.rounding import gptq, hswq, pack
from quant_core.rounding.layerplan import LayerPlan

# SHA-256, its first 16 digits, over all tensors of what the source below becomes without a calibration. Its weights
# are multiples of 2**-10 with few bits, so that no sum, not even a rotation's, ever rounds: any CPU has these.
GOLDEN: dict[tuple[str, str], str] = {}

# Chunk sizes: (module, name), all so small that each layer has several.
CHUNKS = {
    (pack, "CHUNK"): 5000,
    (pack, "SEARCHED"): 3000,
    (pack, "ROWS"): 33,
    (gptq, "ROWS"): 100,
    (base, "TURNED"): 7000,
    (hswq, "ROWS_AT_ONCE"): 4000,
    (checkpoint, "COPY_CHUNK"): 1000,
}


def made(shape: tuple[int, ...], number: int) -> torch.Tensor:
    """bfloat16 weights by integer arithmetic alone: a triangular distribution, each 97th weight four times as large."""
    n = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(1000003 * number)
    n = (n ^ (n >> np.uint64(15))) * np.uint64(0x9E3779B97F4A7C15)
    n = (n ^ (n >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    value = ((n >> np.uint64(56)) + ((n >> np.uint64(40)) & np.uint64(255))).astype(np.int64) // 2 - 127
    value[::97] *= 4
    return (torch.from_numpy(value).float() / 1024).to(torch.bfloat16).view(shape)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    shapes = {name: tuple(t.shape) for name, t in models.zimage(dim=256, ffn=512, layers=1, text=256).items()}
    shapes = {name: shape for name, shape in shapes.items() if "refiner" not in name and "embedder.mlp" not in name}
    path = tmp_path_factory.mktemp("golden") / "m.safetensors"
    models.save(path, {name: made(shape, i) for i, (name, shape) in enumerate(sorted(shapes.items()))})
    with Source(path, "zimage") as opened:
        yield opened


@pytest.fixture(scope="module")
def seen(source: Source) -> Calibration:
    """Of all layers, four runs."""
    collector = Collector(lambda layer: source.architecture.describe(layer).shared_input, 400)
    for run in range(4):
        collector.start_run(f"run {run}")
        for layer in source.layers:
            x = models.correlated(100, source.shape(layer)[1], run)
            collector.add(layer, x, x[:, :8])
        collector.finish_run()
    return collector.result()


def digest(source: Source, plan: Plan, folder: Path, rounding: str, seen: Calibration | None = None) -> str:
    """Of the data of all files that the job makes."""
    jobs.quantize(source, plan, folder / "m.split.safetensors", rounding=rounding, device="cpu", calibration=seen)
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found.update(data[8 + int.from_bytes(data[:8], "little") :])
        path.unlink()
    return found.hexdigest()[:16]


def planned(source: Source, name: str, seen: Calibration) -> Plan:
    """All layers in one format; split and fold: of NVFP4."""
    plan = recipes.make_plan(source, "nvfp4")
    if name == "fold":
        return folding.folded(source, plan, seen)
    if name == "split":
        return splitting.split(source, plan, seen, "4")
    return replace(plan, layers={layer: LayerPlan(name, "") for layer in plan.quantized()})


@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_golden(fmt: str, rounding: str, source: Source, seen: Calibration, tmp_path: Path) -> None:
    assert digest(source, planned(source, fmt, seen), tmp_path, rounding) == GOLDEN.get((fmt, rounding), "")


@pytest.mark.parametrize("rounding", ["search", "gptq", "auto"])
@pytest.mark.parametrize("name", [*FORMATS, "split", "fold"])
def test_threads_and_chunks_change_no_byte(
    name: str, rounding: str, source: Source, seen: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    again = partial(digest, source, planned(source, name, seen), tmp_path, rounding, seen)
    try:
        found = {}
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found[threads] = again()
        for (module, size), value in CHUNKS.items():
            monkeypatch.setattr(module, size, value)
        found["chunks"] = again()  # type: ignore[index]
        assert len(set(found.values())) == 1, found
    finally:
        torch.set_num_threads(before)
