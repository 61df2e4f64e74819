"""Branches and folds in the cost table: what is measured, what is chosen, what is written."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from test_folding import loud_model

from quant_core import jobs
from quant_core.cli import main
from quant_core.errors import CalibQuantError, OptionError
from quant_core.evidence import calibration
from quant_core.evidence.calibration import Calibration, Rows
from quant_core.evidence.sensitivity import LayerSensitivity
from quant_core.formats import FORMATS
from quant_core.jobs.finished import QuantizedFile
from quant_core.models.source import Source
from quant_core.planning import budget, costs, folds, layout
from quant_core.planning.budget import Wish
from quant_core.planning.costs import Cost, CostTable
from quant_core.planning.plan import Plan
from quant_core.planning.recipes import sized
from quant_core.rounding import trial
from quant_core.rounding.judge import as_loaded
from quant_core.rounding.layerplan import LayerPlan

CPU = torch.device("cpu")
MAIN, BRANCH = "m.split.safetensors", "m.split.lora.safetensors"


def table_of(
    path: Path, seen: Calibration, options: tuple[str, ...], fold: bool, rounding: str = "auto", gpu: str = "blackwell"
) -> CostTable:
    with Source(path) as source:
        how = costs.made_with(source, gpu, options, rounding, True, seen, fold)
        return costs.measure(source, seen, how, CPU)


def uniform(source: Source, table: CostTable, seen: Calibration, option: str) -> Plan:
    """Every layer that has this option in it, by hand."""
    known = costs.entries(source, (option,), folds.seen(source, table.folds, seen))
    layers = dict.fromkeys(source.layers, LayerPlan("bf16", ""))
    layers |= {n: known[n][option] for n, options in table.layers.items() if option in options}
    return sized(source, Plan(source.architecture.name, "", source.name, layers, folds=table.folds))


# --- what is measured


def test_errors_and_bytes_are_those_of_the_written_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all outputs are tried and nothing is held out they are the very same; rotated layers are folded, too."""
    monkeypatch.setattr(trial, "JUDGED_OUTPUTS", 1024)
    path, seen = loud_model(tmp_path, runs=1)
    options = ("nvfp4", "nvfp4+r8", "nvfp4+r24", "int8-convrot", "bf16")
    table = table_of(path, seen, options, True)
    assert len(folds.used(table.folds)) == 12
    for option in options[:-1]:
        with Source(path) as source:
            plan = uniform(source, table, seen, option)
            report = jobs.quantize(source, plan, tmp_path / MAIN, calibration=seen, rounding="auto", overwrite=True)
            compared = jobs.compare(source, tmp_path / MAIN, calibration=seen)
            branches = {n: r * 2 * sum(source.shape(n)) for n, r in plan.ranks().items()}
        found = {layer.name: layer for layer in compared.layers if layer.format != "bf16"}
        assert len(found) > 10 and bool(branches) is ("+r" in option)
        for name, layer in found.items():
            cost = table.layers[name][option]
            assert cost.error == pytest.approx(layer.loader_error, rel=2e-3), (option, name)
            assert cost.nbytes == layer.nbytes
        if branches:
            assert not any("no better" in layer.note for layer in report.layers)
            assert (tmp_path / BRANCH).stat().st_size == report.lora_bytes > sum(branches.values())


def test_what_no_branch_or_fold_can_help_has_none(tmp_path: Path) -> None:
    path, seen = loud_model(tmp_path)
    options = costs.choose_options("nvfp4,w4a8,int8,bf16", "blackwell", None)
    assert costs.with_branches(options, "ada", "4") == (
        "nvfp4", "w4a8", "w4a8+r2", "w4a8+r4", "w4a8+r8", "w4a8+r16", "int8", "bf16"
    )  # fmt: skip
    assert "nvfp4+r1" in costs.with_branches(options, "blackwell", "0.3")
    with pytest.raises(OptionError, match="follow from the size, bits or error: give a rank"):
        costs.with_branches(options, "blackwell", "6%")
    for formats, gpu, folded in (
        (("nvfp4", "bf16"), "blackwell", True),
        (("nvfp4", "bf16"), "ampere", False),  # inputs stay exact
        (("nvfp4", "w4a8", "bf16"), "blackwell", False),  # rotated inputs are better than folded ones
    ):
        table = table_of(path, seen, formats, True, "nearest", gpu)
        assert bool(folds.used(table.folds)) is folded, (formats, gpu)
    with Source(path) as source:
        few = replace(seen, rows={g: Rows(r.rows[:4], r.keys[:4], r.runs[:4]) for g, r in seen.rows.items()})
        unseen = replace(seen, rows={})
        for known in (few, unseen):
            how = costs.made_with(source, "blackwell", ("nvfp4", "nvfp4+r16", "bf16"), "nearest", True, known)
            assert all("nvfp4+r16" not in c for c in costs.measure(source, known, how, CPU).layers.values())


def test_damage_is_that_of_the_model_as_it_was(tmp_path: Path) -> None:
    """Of a layer whose inputs are folded and whose rows are: the value rows of qkv. Worked out from the file."""
    path, seen = loud_model(tmp_path)
    name, third = "layers.0.attention.qkv", 128
    known = {n: LayerSensitivity(seen.rows_of(n), gain=1.0) for n in seen.layers}
    table = table_of(path, replace(seen, sensitivities=known), ("nvfp4", "mxfp8", "bf16"), True, "nearest")
    assert table.has_damage
    fed, made = (torch.exp2(-folds._exponents(table.folds[n]).float()) for n in (name, "layers.0.attention.out"))
    assert fed.unique().numel() > 1 and made.unique().numel() > 1
    with Source(path) as source:
        plan = uniform(source, table, seen, "mxfp8")
        jobs.quantize(source, plan, tmp_path / "q.safetensors", calibration=seen)
        weight = source.load(name).float()
    with QuantizedFile(tmp_path / "q.safetensors") as file:
        stored = torch.cat([part.float() for part in file.rows(name, tuple(weight.shape))])
    rows = seen.rows_of(name).float()
    loaded = as_loaded(FORMATS["mxfp8"], rows * fed, plan.layers[name])
    outputs = loaded @ stored.T
    outputs[:, 2 * third :] /= made
    lost = (outputs - rows @ weight.T).square().sum(1).mean().item()
    of_inputs = ((rows * fed - loaded) @ (weight / fed).T).square().sum(1).mean().item()
    counted = lost - (1 - costs.INPUTS_SHARE) * of_inputs
    assert table.layers[name]["mxfp8"].damage == pytest.approx(counted, rel=0.15)  # 256 of 384 outputs were tried


# --- what is chosen


def small_table(source: Source) -> CostTable:
    """Five layers with made-up errors, a branch worth more here and less there."""
    generator = torch.Generator().manual_seed(3)
    options = ("nvfp4", "nvfp4+r8", "nvfp4+r16", "mxfp8", "bf16")
    layers = {}
    for name in list(costs.entries(source, options))[:5]:
        losses = [*torch.rand(4, generator=generator).sort(descending=True).values.tolist(), 0.0]
        known = costs.entries(source, options)[name]
        layers[name] = {
            option: Cost(losses[options.index(option)], costs.stored_bytes(source, name, entry), "native")
            for option, entry in known.items()
        }
    how = costs.made_with(source, "blackwell", options)
    return CostTable(replace(how, calibration={}), layers)


def choices(table: CostTable) -> Iterator[tuple[Fraction, int]]:
    """The mean error and the bytes of every way to choose."""
    for chosen in itertools.product(*(list(c.values()) for c in table.layers.values())):
        yield sum(Fraction(cost.error) for cost in chosen) / len(chosen), sum(cost.nbytes for cost in chosen)


@pytest.mark.parametrize("bits", [4.8, 5.5, 6.4, 7.5])
def test_the_ranks_are_those_that_trying_everything_finds(bits: float, tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage(dim=256, ffn=512, layers=1))
    with Source(path) as source:
        table = small_table(source)
        plan = budget.plan(source, table, Wish("bits", bits))
        weights = sum(torch.Size(source.shape(name)).numel() for name in table.layers)
    best = min(error for error, nbytes in choices(table) if 8 * nbytes <= Fraction(bits) * weights)
    assert plan.predicted is not None
    assert plan.predicted["error"] == pytest.approx(float(best), rel=2e-4)
    fewest = min(nbytes for error, nbytes in choices(table) if error <= best)
    with Source(path) as source:
        again = budget.plan(source, table, Wish("max_error", float(best) * (1 + 1e-9))).predicted
    assert again is not None and again["bits"] == pytest.approx(8 * fewest / weights, rel=1e-3)


def test_tied_layers_get_one_rank(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage(dim=256, ffn=512, layers=1))
    with Source(path) as source:
        table = small_table(source)
        plan = budget.plan(source, table, Wish("bits", 5.5, tied=True))
        pair = [n for n in table.layers if source.layers[n].shared_input]
        groups = {(source.layers[n].shared_input, source.layers[n].block) for n in pair}
    assert len({(plan.layers[n].format, plan.layers[n].rank, source.layers[n].block) for n in pair}) == len(groups)


# --- what is written


def test_both_files_are_as_large_as_asked_for_and_lose_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, seen = loud_model(tmp_path)
    known, table, plan = (str(tmp_path / name) for name in ("c.calibration.safetensors", "t.json", "p.json"))
    calibration.save(seen, known)
    size = 0.0002 * 3.3
    words = ["--gpu", "blackwell", "--formats", "nvfp4,bf16", "--calibration", known, "--split", "8"]
    words += ["--smooth", "fold"]
    planning = ["plan", str(path), *words, "--size", f"{size}", "-o", plan, "--table", table]
    assert main(planning) == 0
    said = capsys.readouterr().out
    made = json.loads(Path(plan).read_text())
    assert made["folds"] and "LoRAs made for the original model do not fit" in said
    stem = tmp_path / MAIN
    assert main(["quantize", str(path), "--plan", plan, "--calibration", known, "-o", str(stem), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored = stem.stat().st_size, (tmp_path / BRANCH).stat().st_size
    assert (made["size"], made["predicted"]["size"]) == (stored[0], sum(stored))
    assert size * 1e9 - 10_000 < sum(stored) <= size * 1e9
    assert f"({stored[1]} bytes)" in said
    measured = json.loads(Path(table).read_text())["layers"]
    for layer in report["layers"]:
        option = next((o for o in measured.get(layer["name"], {}) if key(o) == (layer["format"], layer["rank"])), None)
        if option and option != "bf16":
            assert measured[layer["name"]][option]["error"] == pytest.approx(layer["loader_error"], rel=1e-5)
    # The table holds for another size, and for nothing else.
    before = Path(table).stat().st_mtime_ns
    assert main([*planning[:-4], "--bits", "6", "-o", plan, "--table", table]) == 2  # two budgets
    assert main(["plan", str(path), *words, "--bits", "6", "-o", plan, "--table", table]) == 0
    assert Path(table).stat().st_mtime_ns == before
    for different, other in (("fold", words[:-2]), ("options", [*words, "--split", "4"])):
        assert main(["plan", str(path), *other, "--bits", "6", "-o", plan, "--table", table]) == 1
        assert f"was made with another {different}" in capsys.readouterr().err


def key(option: str) -> tuple[str, int]:
    entry = costs.layer_plan(option)
    return entry.format, entry.rank


def test_a_file_has_one_size_whatever_it_is_named(tmp_path: Path) -> None:
    path, seen = loud_model(tmp_path)
    with Source(path) as source:
        layers = {n: LayerPlan("bf16", "") for n in source.layers}
        layers["layers.0.attention.qkv"] = LayerPlan("nvfp4", "", rank=4)
        plan = sized(source, Plan(source.architecture.name, "", source.name, layers))
        for name in ("a", "a much longer näme"):
            report = jobs.quantize(source, plan, tmp_path / f"{name}.split.safetensors", calibration=seen)
            assert report.lora_bytes == layout.branch_size(source, plan) > 4 * 2 * 512


@pytest.mark.parametrize("words", [["--split", "8"], ["--smooth", "fold"]])
def test_without_a_calibration_nothing_is_split_or_folded(words: list[str], tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage())
    assert main(["plan", str(path), "--bits", "6", *words, "-o", str(tmp_path / "p.json")]) == 2


def test_a_table_with_damaged_folds_is_refused(tmp_path: Path) -> None:
    path, seen = loud_model(tmp_path)
    table, stored = table_of(path, seen, ("nvfp4", "bf16"), True, "nearest"), tmp_path / "t.json"
    table.save(stored)
    assert costs.load(stored, table.made_with) == table
    raw = json.loads(stored.read_text())
    next(iter(raw["folds"].values()))["exponents"] = "x"
    stored.write_text(json.dumps(raw))
    with pytest.raises(CalibQuantError, match=r"its fold is damaged.*remove it"):
        costs.load(stored, table.made_with)


# --- the node


def test_the_node_takes_ranks_and_folds_as_options(comfy: Path) -> None:
    """One table for any size; a size is that of both files; without a calibration nothing is split."""
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    node = nodes.NODE_CLASS_MAPPINGS["CalibQuantPlan"]
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    words = {"gpu": "blackwell", "formats": "nvfp4,bf16", "weighting": "auto", "tie": False, "max_slow": 1.0}
    model = {"model_name": "calibquant_digits_wan.safetensors", "smooth": "fold", "split": " 8 "}
    strategy = {"strategy": "size", "size": 0.00175, **words}
    done = node.execute(**model, strategy=strategy, calibration=SimpleNamespace(current=lambda: seen))
    plan, said = done.result[0], done.ui["text"][0]
    assert plan.ranks() and plan.folds and plan.size < plan.predicted["size"] <= 1.75e6
    assert "more in a LoRA of their own" in said and "in native kernels" in said
    with pytest.raises(Exception, match="needs a calibration: link one"):
        node.execute(**model, strategy=strategy)
