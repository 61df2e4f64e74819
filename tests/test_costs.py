"""The planner's table: what each layer would lose in each format, as loaded."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.evidence.sensitivity import LayerSensitivity
from quant_core.formats import FORMATS
from quant_core.models.source import Source
from quant_core.planning import budget, costs
from quant_core.planning.plan import Plan
from quant_core.planning.recipes import sized
from quant_core.rounding import gptq, trial
from quant_core.rounding.choice import Rounder
from quant_core.rounding.judge import as_loaded
from quant_core.rounding.layerplan import LayerPlan

CPU = torch.device("cpu")
OPTIONS = ("nvfp4", "nvfp4-w4a16", "w4a8", "fp8", "int8", "mxfp8", "bf16")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = models.zimage(layers=1)
    tensors |= {"layers.0.attention.out.bias": torch.randn(64).bfloat16()}
    return models.save(tmp_path / "m.safetensors", tensors)


def calibrated(file: Path, runs: int = 1, rows: int = 256) -> Calibration:
    """Correlated inputs with a loud channel; layers of a group see one tensor."""
    with Source(file) as source:
        collector = Collector(lambda layer: source.layers[layer].shared_input)
        for run in range(runs):
            collector.start_run(f"seed {run}")
            for layer in source.layers:
                width = source.shape(layer)[1]
                generator = torch.Generator().manual_seed(run)
                x = torch.randn(rows, 16, generator=generator) @ torch.randn(16, width, generator=generator)
                x = (x + torch.randn(rows, width, generator=generator)) * torch.linspace(0.5, 4, width)
                collector.add(layer, x, x @ source.load(layer).float().T)
            collector.finish_run()
    return collector.result()


def table_of(file: Path, seen: Calibration, rounding: str = "auto", gpu: str = "blackwell") -> costs.CostTable:
    with Source(file) as source:
        how = costs.made_with(source, gpu, OPTIONS, rounding, True, seen)
        return costs.measure(source, seen, how, CPU)


@pytest.mark.parametrize("rounding", ["nearest", "search", "auto"])
def test_errors_are_those_of_the_finished_file_as_loaded(file: Path, rounding: str, tmp_path: Path) -> None:
    """Where all outputs and rows are tried and nothing is held out they are the very same."""
    seen = calibrated(file)
    table = table_of(file, seen, rounding)
    for option in OPTIONS[:-1]:
        with Source(file) as source:
            made = costs.entries(source, OPTIONS, seen)
            layers = {n: LayerPlan("bf16", "") for n in source.layers}
            layers |= {n: entries[option] for n, entries in made.items()}
            plan = sized(source, Plan(source.architecture.name, "", source.name, layers))
            output = tmp_path / f"{option}.safetensors"
            jobs.quantize(source, plan, output, device="cpu", calibration=seen, rounding=rounding)
            report = jobs.compare(source, output, calibration=seen)
        found = {layer.name: layer for layer in report.layers}
        for name in made:
            cost = table.layers[name][option]
            assert cost.error == pytest.approx(found[name].loader_error, rel=1e-3), (option, name)
            assert cost.nbytes == found[name].nbytes


def test_of_a_large_layer_only_a_part_is_rounded_and_judged_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, collector = (
        torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)) * 0.02,
        Collector(lambda _: ""),
    )
    for run in range(5):
        collector.start_run(f"seed {run}")
        collector.add("layer", torch.randn(64, 64, generator=torch.Generator().manual_seed(run)), torch.zeros(64, 2048))
        collector.finish_run()
    seen, rounded = collector.result(), []
    original = gptq.quantize
    monkeypatch.setattr(gptq, "quantize", lambda w, *rest: rounded.append(len(w)) or original(w, *rest))
    entry = LayerPlan("nvfp4", "", input_scale=0.01)
    tried = Rounder(CPU, seen, "auto").trial("layer", entry, weight, "w")
    assert rounded == [trial.JUDGED_OUTPUTS]
    done = Rounder(CPU, seen, "auto").round("layer", entry, weight, "w")
    assert (tried.rounding, tried.error) == (done.rounding, pytest.approx(done.loader_error))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(9))
    decoded = FORMATS["nvfp4"].decode(done.packed.tensors, tuple(weight.shape))
    fed = as_loaded(FORMATS["nvfp4"], x, entry)
    true = (x @ weight.T - fed @ decoded.T).square().sum()
    assert tried.changes(x).square().sum().item() == pytest.approx(true.item(), rel=0.1)


def test_changes_of_outputs_are_those_that_the_error_is_made_of(file: Path) -> None:
    """A layer with a bias, which takes up part of the error, and every output tried."""
    seen, name = calibrated(file), "layers.0.attention.out"
    with Source(file) as source:
        weight, bias = source.load(name), source.checkpoint.read(f"{name}.bias")
    rows = seen.rows_of(name).float()
    for fmt in ("nvfp4", "int8_convrot"):
        tried = Rounder(CPU, seen, "auto").trial(name, LayerPlan(fmt, ""), weight, "w", bias)
        change = tried.changes(rows).square().sum() / (rows @ weight.float().T).square().sum()
        assert change.item() == pytest.approx(tried.error, rel=1e-3)
    assert tried.rounding.endswith("+bias")


def test_a_card_without_kernels_does_not_round_inputs(file: Path) -> None:
    seen = calibrated(file)
    blackwell, ada = (
        table_of(file, seen, "nearest", gpu).layers["layers.0.attention.qkv"] for gpu in ("blackwell", "ada")
    )
    assert ada["nvfp4"].error == blackwell["nvfp4-w4a16"].error < 0.8 * blackwell["nvfp4"].error
    assert ada["mxfp8"].error < blackwell["mxfp8"].error
    assert ada["int8"] == blackwell["int8"] and ada["fp8"] == blackwell["fp8"]
    assert (ada["nvfp4"].speed, blackwell["nvfp4"].speed) == ("emulated", "native")


def test_damage_is_what_the_sensitivities_say_of_every_option(file: Path) -> None:
    """Known by its gain alone, a layer's damage is that times the mean square of its outputs' changes; what becomes of
    them by the rounding of inputs counts half, for it cancels over the steps of sampling."""
    seen = calibrated(file)
    known = {name: LayerSensitivity(seen.rows_of(name), gain=1.0) for name in seen.layers}
    seen = replace(seen, sensitivities=known)
    with Source(file) as source:
        how = costs.made_with(source, "blackwell", OPTIONS, "nearest", True, seen)
        table = costs.measure(source, seen, how, CPU)
        plan = budget.plan(source, table, budget.Wish("bits", 7.0), calibration=seen)
        kept = budget.plan(source, table, budget.Wish("bits", 7.0), calibration=seen, weighting="uniform")
    for name, options in table.layers.items():
        rows = seen.rows_of(name).float()
        with Source(file) as source:
            weight = source.load(name).float()
            entry = costs.entries(source, OPTIONS, seen)[name]["nvfp4"]
        energy = (rows @ weight.T).square().sum(1).mean().item()
        of_inputs = ((rows - as_loaded(FORMATS["nvfp4"], rows, entry)) @ weight.T).square().sum(1).mean().item()
        assert options["nvfp4-w4a16"].damage == pytest.approx(options["nvfp4-w4a16"].error * energy, rel=1e-3)
        assert options["nvfp4"].damage == pytest.approx(options["nvfp4"].error * energy - of_inputs / 2, rel=1e-3)
    assert plan.predicted is not None and plan.predicted["weighting"] == "gradient"
    harm = sum(
        min(c.damage for c in table.layers[n].values() if c.nbytes == table.layers[n][option_of(e)].nbytes)
        for n, e in plan.layers.items() if n in table.layers
    )  # fmt: skip
    assert plan.predicted["error"] == pytest.approx(harm)
    assert {n: e.format for n, e in plan.layers.items()} != {n: e.format for n, e in kept.layers.items()}


def option_of(entry: LayerPlan) -> str:
    return next(o for o, known in costs.OPTIONS.items() if known == (entry.format, entry.full_precision))


def test_layers_that_share_inputs_share_factors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made = calibrated(file, runs=3), []
    original = gptq.factor
    monkeypatch.setattr(gptq, "factor", lambda *words: made.append(1) or original(*words))
    table = table_of(file, seen)
    with Source(file) as source:
        groups = {(seen.layers[n].group, f"{n}.bias" in source.checkpoint.entries) for n in table.layers}
    assert len(made) == 2 * len(groups)  # in the plain and in the rotated basis


def test_one_weight_is_in_memory_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    original = Source.load

    def load(self: Source, layer: str) -> torch.Tensor:
        assert not [ref for ref in alive[:-1] if ref() is not None]  # the loop's last one may still have its name
        weight = original(self, layer)
        alive.append(weakref.ref(weight))
        return weight

    seen = calibrated(file)
    monkeypatch.setattr(Source, "load", load)
    table_of(file, seen, "nearest")
    assert len(alive) > 5


def test_a_table_comes_back_from_its_file_and_knows_what_it_was_made_with(file: Path, tmp_path: Path) -> None:
    seen, path = calibrated(file), tmp_path / "t.json"
    table = table_of(file, seen, "nearest")
    table.save(path)
    assert costs.load(path, table.made_with) == table
    for change in ({"rounding": "auto"}, {"calibration": None}, {"source": "another"}, {"options": ("nvfp4",)}):
        with pytest.raises(CalibQuantError, match=f"made with another {next(iter(change))}: remove it"):
            costs.load(path, replace(table.made_with, **change))
    path.write_text(path.read_text().replace('"error": 0.0', '"error": -1', 1))
    with pytest.raises(CalibQuantError, match="is no cost table"):
        costs.load(path, table.made_with)
