"""Bytes that must not change: golden hashes, and the same bytes on any number of threads and for any chunk size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

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
# are multiples of 2**-10 with few bits, so that a rotation's sums are exact. They are the same with AVX-512, with AVX2
# and without either.
GOLDEN = {
    ("nvfp4", "nearest"): "9c1cd6a1e176cc61",
    ("nvfp4", "search"): "f6c7d93c0eed7191",
    ("asym_w4a8_int8", "nearest"): "8292529d01385dce",
    ("asym_w4a8_int8", "search"): "df083dd95d058dea",
    ("asym_w6a8_int8", "nearest"): "414a4895e7c07b32",
    ("asym_w6a8_int8", "search"): "ce1ef0c5a08f0c9f",
    ("mxfp8", "nearest"): "569ae9a10520052c",
    ("mxfp8", "search"): "569ae9a10520052c",
    ("float8_e4m3fn", "nearest"): "29c050e7ed583346",
    ("float8_e4m3fn", "search"): "b80648f24ba10a33",
    ("int8_convrot", "nearest"): "bf966d6c99303ec4",
    ("int8_convrot", "search"): "bf966d6c99303ec4",
    ("int8_tensorwise", "nearest"): "a4919cdbd7c16c08",
    ("int8_tensorwise", "search"): "a4919cdbd7c16c08",
    ("float8_e4m3fn_unscaled", "nearest"): "425c69aa2b6c99e5",
    ("float8_e4m3fn_unscaled", "search"): "425c69aa2b6c99e5",
}

LAYERS = ("attention.qkv", "attention.out", "feed_forward.w2")
# Chunk sizes: (module, name), all so small that each layer has several.
CHUNKS = {
    (pack, "CHUNK"): 5000,
    (pack, "SEARCHED"): 3000,
    (pack, "ROWS"): 33,
    (gptq, "ROWS"): 128,  # whole tiles of a matrix product, whose edges BLAS may sum in another order
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
    assert digest(source, planned(source, fmt, seen), tmp_path, rounding) == GOLDEN[fmt, rounding]


# auto tries nearest, search and GPTQ, each with a corrected bias, and takes one of them
WAYS = [*((name, "auto") for name in (*FORMATS, "split", "fold")), ("nvfp4", "gptq"), ("nvfp4", "search")]


@pytest.mark.parametrize(("name", "rounding"), WAYS)
def test_threads_and_chunks_change_no_byte(
    name: str, rounding: str, source: Source, seen: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    plan = planned(source, name, seen)
    if name in FORMATS:  # a few layers are enough
        plan = replace(plan, layers={f"layers.0.{layer}": LayerPlan(name, "") for layer in LAYERS})
    again = partial(digest, source, plan, tmp_path, rounding, seen)
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
