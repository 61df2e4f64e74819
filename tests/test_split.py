"""The split: a 16-bit branch in a LoRA beside a quantized file, exact together, never mixed up, never worse."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import correlated
from safetensors import safe_open
from safetensors.torch import load_file

from quant_core import jobs
from quant_core.cli import decision
from quant_core.cli.main import main
from quant_core.errors import CalibQuantError, OptionError
from quant_core.evidence import calibration
from quant_core.evidence.collector import Collector
from quant_core.files.disk import NewFile
from quant_core.formats import FORMATS, SOURCE
from quant_core.models.source import Source
from quant_core.planning import layout, recipes, splitting
from quant_core.planning import plan as plans
from quant_core.planning.plan import Plan
from quant_core.reports import describe
from quant_core.reports.report import Report
from quant_core.rounding import split
from quant_core.rounding.choice import Rounded, Rounder
from quant_core.rounding.judge import as_loaded
from quant_core.rounding.layerplan import LayerPlan

CPU = torch.device("cpu")
DEMO = models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"
LAYER = "blocks.0.ffn.0"
MAIN, BRANCH = "m.split.safetensors", "m.split.lora.safetensors"


def fed_by(fmt: str, rows: torch.Tensor) -> torch.Tensor:
    return as_loaded(FORMATS[fmt], rows, LayerPlan(fmt, ""))


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


# --- the mathematics


@pytest.mark.parametrize("rows", [300, 24], ids=["more rows than outputs", "fewer"])
def test_the_branch_is_the_svd_weighted_by_the_inputs_rounding_error(rows: int) -> None:
    weight, x, rank = drawn(48, 64), correlated(rows, 64, 1), 5
    fed = fed_by("nvfp4", x)
    w, e = weight.double().numpy(), (fed - x).double().numpy()
    values, vectors = np.linalg.eigh(e.T @ e / rows)  # N
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    u, s, vt = np.linalg.svd(w @ root)
    made = split.branch(weight, x, fed, rank)
    assert (made.up.shape, made.down.shape) == ((48, rank), (rank, 64))
    got = made.product().double().numpy()
    left = np.linalg.norm((w - got) @ root) ** 2
    assert left == pytest.approx((s[rank:] ** 2).sum(), rel=1e-3)  # the least that any branch of that rank leaves
    if rows > 64:  # N has an inverse
        wanted = u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
        assert np.linalg.norm(got - wanted) < 0.01 * np.linalg.norm(wanted)  # both factors are bfloat16
    expected = s[: min(rows, 48)] ** 2 / (s**2).sum()
    assert split.spectrum(weight, x, fed).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6 * expected[0])


# --- one layer


def rounded(name: str, weight: torch.Tensor, rank: int, rounding: str = "auto") -> Rounded:
    collector = Collector(lambda layer: "", 2048)
    for run in range(6):
        x = correlated(128, weight.shape[1], run)
        collector.start_run(f"run {run}")
        collector.add("layer", x, x @ weight.T)
        collector.finish_run()
    rounder = Rounder(CPU, collector.result(), rounding)
    return rounder.round("layer", LayerPlan(name, "", rank=rank), weight, "m: layer layer")


def loaded(name: str, done: Rounded, weight: torch.Tensor) -> float:
    """Its output error as loaded on inputs that nobody saw."""
    x = correlated(256, weight.shape[1], 99)
    got = fed_by(name, x) @ FORMATS[name].decode(done.packed.tensors, tuple(weight.shape)).T
    if done.branch is not None:
        got += x @ done.branch.down.float().T @ done.branch.up.float().T
    return ((got - x @ weight.T).square().sum() / (x @ weight.T).square().sum()).item()


@pytest.mark.parametrize(
    ("name", "bound"),  # measured .07, .06, .06, .82, .81: INT8's inputs have one scale a row, so their error is flat
    [("nvfp4", 0.15), ("mxfp8", 0.15), ("float8_e4m3fn", 0.15), ("asym_w4a8_int8", 0.9)],
)
def test_a_branch_lowers_the_error_of_loud_channels_on_unseen_inputs(name: str, bound: float) -> None:
    weight = drawn(256, 256)
    plain, done = rounded(name, weight, 0), rounded(name, weight, 16)
    assert loaded(name, done, weight) < bound * loaded(name, plain, weight)
    assert done.branch is not None and done.branch.up.count_nonzero()
    assert done.unsplit_error == plain.loader_error and done.loader_error < plain.loader_error


def test_the_weighted_branch_beats_that_of_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(256, 256)
    weighted = loaded("nvfp4", rounded("nvfp4", weight, 16), weight)
    best = split.branch

    def plain(weight: torch.Tensor, rows: torch.Tensor, fed: torch.Tensor, rank: int) -> split.Branch:
        return best(weight, torch.eye(weight.shape[1]), torch.zeros(weight.shape[1], weight.shape[1]), rank)

    monkeypatch.setattr(split, "branch", plain)
    assert weighted < 0.8 * loaded("nvfp4", rounded("nvfp4", weight, 16), weight)


@pytest.mark.parametrize("rounding", ["nearest", "auto"])
def test_a_branch_that_is_no_better_on_held_out_rows_is_left_out(
    rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = drawn(64, 64)
    bad = split.Branch(drawn(64, 4, 1).bfloat16() * 50, drawn(4, 64, 2).bfloat16() * 50)
    monkeypatch.setattr(split, "branch", lambda *_: bad)
    plain, done = rounded("nvfp4", weight, 0, rounding), rounded("nvfp4", weight, 4, rounding)
    assert "branch was no better" in done.note and not done.branch.product().any()
    assert plain.loader_error in (None, done.loader_error)
    for name, tensor in plain.packed.tensors.items():
        assert reference.raw(done.packed.tensors[name]) == reference.raw(tensor)


def test_a_branch_needs_rows() -> None:
    with pytest.raises(CalibQuantError, match=r"^m: layer a: a branch needs a calibration"):
        Rounder(CPU, None, "nearest").round("a", LayerPlan("nvfp4", "", rank=2), drawn(64, 64), "m: layer a")


# --- ranks under one total


spectra = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=4)


@given(
    spectra=spectra,
    costs=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    totals=st.tuples(st.integers(0, 500), st.integers(0, 500)),
)
@settings(max_examples=200, deadline=None)
def test_ranks_stay_below_the_total_and_grow_with_it(
    spectra: list[list[float]], costs: list[int], totals: tuple[int, int]
) -> None:
    gains = {str(i): torch.tensor(sorted(found, reverse=True)) for i, found in enumerate(spectra)}
    price = {layer: costs[int(layer)] for layer in gains}
    few, many = (splitting.ranked(gains, price, total) for total in sorted(totals))
    for ranks, total in zip((few, many), sorted(totals), strict=True):
        assert sum(price[layer] * rank for layer, rank in ranks.items()) <= total
        assert all(rank <= int((gains[layer] > 0).sum()) for layer, rank in ranks.items())
    assert all(few[layer] <= many[layer] for layer in gains)


@pytest.fixture(scope="module")
def seen() -> calibration.Calibration:
    return calibration.load(CALIBRATION)


def planned(seen: calibration.Calibration, wanted: str = "4", recipe: str = "nvfp4", only: str = "blocks.0.") -> Plan:
    """Of the demo model, one block of it quantized."""
    with Source(DEMO) as source:
        plan = recipes.calibrated(source, recipes.make_plan(source, recipe), seen)
        layers = {n: e if n.startswith(only) else LayerPlan(SOURCE, "") for n, e in plan.layers.items()}
        return splitting.split(source, recipes.sized(source, replace(plan, layers=layers)), seen, wanted)


def branch_bytes(plan: Plan) -> int:
    with Source(DEMO) as source:
        return sum(rank * 2 * sum(source.shape(layer)) for layer, rank in plan.ranks().items())


def test_the_total_is_a_mean_rank_or_a_share_of_the_file(seen: calibration.Calibration) -> None:
    with Source(DEMO) as source:
        per_rank = sum(2 * sum(source.shape(layer)) for layer in planned(seen).quantized())
    mean = planned(seen, "4")
    assert 0.9 * 4 * per_rank < branch_bytes(mean) <= 4 * per_rank
    assert len(set(mean.ranks().values())) > 1 and "branch of rank" in mean.layers[LAYER].reason
    share = planned(seen, "2%")
    assert 0.9 * 0.02 * share.size < branch_bytes(share) <= 0.02 * share.size


def test_only_layers_with_sampled_and_quantized_inputs_get_a_branch(seen: calibration.Calibration) -> None:
    with Source(DEMO) as source:
        plan = recipes.make_plan(source, "nvfp4")
        layers = dict(plan.layers)
        layers[LAYER] = replace(layers[LAYER], full_precision=True)
        unseen = "blocks.1.ffn.2"
        known = replace(seen, rows={g: r for g, r in seen.rows.items() if g != seen.layers[unseen].group})
        ranks = splitting.split(source, replace(plan, layers=layers), known, "16").ranks()
        assert len(ranks) > 50 and LAYER not in ranks and unseen not in ranks
        with pytest.raises(OptionError, match="none has sampled inputs that are rounded"):
            splitting.split(source, plan, replace(seen, rows={}), "16")
        with pytest.raises(OptionError, match="too little for one rank"):
            splitting.split(source, plan, seen, "0.0001")
        with pytest.raises(OptionError, match="INT8 layers aside"):  # a bypass would be lost in core 0.33
            splitting.split(source, recipes.make_plan(source, "int8"), seen, "16")
        layers[LAYER] = LayerPlan("int8_convrot", "", rank=4)
        with pytest.raises(CalibQuantError, match=f"layer {LAYER} cannot.*newer ComfyUI would lose it"):
            layout.check(source, replace(plan, layers=layers))


@pytest.mark.parametrize("bad", ["0", "-3", "nan", "inf", "0%", "x", "", "%", "6%%"])
def test_nonsense_is_no_split(bad: str) -> None:
    with pytest.raises(OptionError, match="give a rank"):
        splitting.amount(bad)


def test_a_plan_keeps_its_ranks_and_an_old_one_has_none(seen: calibration.Calibration) -> None:
    plan = planned(seen)
    assert plans.from_json(plan.to_json()).ranks() == plan.ranks() != {}
    old = json.loads(plan.to_json())
    for entry in old["layers"].values():
        del entry["rank"]
    assert plans.from_json(json.dumps(old)).ranks() == {}
    for bad in (-1, 2.5, True, "4", 10**6):
        old["layers"][LAYER]["rank"] = bad
        with Source(DEMO) as source, pytest.raises(CalibQuantError, match=f"layer {LAYER}.*rank"):
            jobs.quantize(source, plans.from_json(json.dumps(old)), DEMO.with_name("never.split.safetensors"))


# --- two files


def quantize(folder: Path, plan: Plan, seen: calibration.Calibration, **options: Any) -> Report:
    with Source(DEMO) as source:
        return jobs.quantize(source, plan, folder / MAIN, calibration=seen, rounding="auto", **options)


def test_both_files_are_what_the_report_and_the_headers_say(seen: calibration.Calibration, tmp_path: Path) -> None:
    plan = planned(seen)
    report = quantize(tmp_path, plan, seen, verify=True)
    main, branch = tmp_path / MAIN, tmp_path / BRANCH
    assert sorted(tmp_path.iterdir()) == [branch, main]
    assert main.stat().st_size == report.bytes_after == plan.size
    assert (report.lora, report.lora_bytes) == (str(branch), branch.stat().st_size)
    assert BRANCH in report.summary() and "LoraLoaderBypassModelOnly" in report.summary()
    said = describe.inspect(main)["provenance"]["split"]
    digest = hashlib.sha256(branch.read_bytes()).hexdigest()
    assert (said["lora"], said["sha256"], said["ranks"]) == (BRANCH, digest, plan.ranks())
    with safe_open(branch, "pt") as opened:
        metadata = json.loads(opened.metadata()["calibquant"])
    assert metadata["belongs_to"] == MAIN and metadata["source"] == describe.inspect(main)["provenance"]["source"]
    found, factors, source = reference.File(main), load_file(branch), load_file(DEMO)
    assert len(factors) == 2 * len(plan.ranks())
    for layer in report.layers:
        if not layer.rank:
            continue
        up, down = (factors[f"diffusion_model.{layer.name}.lora_{part}.weight"].float() for part in ("up", "down"))
        assert up.shape[1] == layer.rank == plan.layers[layer.name].rank and 0.5 <= up.norm() / down.norm() <= 2
        stored = torch.from_numpy(np.asarray(found.decode(layer.name, layer.format, layer.shape))).float()
        weight = source[f"{layer.name}.weight"].float()
        error = ((weight - stored - up @ down).square().sum() / weight.square().sum()).item()
        assert layer.error == pytest.approx(error, rel=1e-3)
        assert layer.loader_error <= layer.unsplit_error


def test_a_split_file_is_compared_with_its_branch_or_not_at_all(
    seen: calibration.Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quantize(tmp_path, planned(seen), seen)
    with Source(DEMO) as source:
        compared = jobs.compare(source, tmp_path / MAIN, calibration=seen)
        found = next(layer for layer in compared.layers if layer.name == LAYER)
        made = next(layer for layer in report.layers if layer.name == LAYER)
        assert found.error == pytest.approx(made.error, rel=1e-4) and found.loader_error < made.unsplit_error
        elsewhere = tmp_path / "elsewhere.safetensors"
        (tmp_path / BRANCH).rename(elsewhere)
        with pytest.raises(CalibQuantError, match=rf"{MAIN}: is split and wrong without its LoRA .*{BRANCH}.*name it"):
            jobs.compare(source, tmp_path / MAIN)
        assert main(["compare", str(DEMO), str(tmp_path / MAIN), "--lora", str(elsewhere)]) == 0
        damaged = bytearray(elsewhere.read_bytes())
        damaged[-1] ^= 1
        (tmp_path / BRANCH).write_bytes(damaged)
        with pytest.raises(CalibQuantError, match=rf"{BRANCH}: is not the LoRA that .* quantize again"):
            jobs.compare(source, tmp_path / MAIN)
        with pytest.raises(CalibQuantError, match="is not split"):
            jobs.compare(source, DEMO, lora=elsewhere)
    assert main(["inspect", str(tmp_path / MAIN)]) == 0
    assert f"wrong without its LoRA {BRANCH}" in capsys.readouterr().out


@pytest.mark.parametrize("said", ["x", {"lora": "../x", "sha256": "0"}, {"lora": "x"}, {"lora": 3, "sha256": "0"}])
def test_a_header_that_names_no_lora_is_refused(said: object, tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.wan(), {"calibquant": json.dumps({"split": said})})
    with pytest.raises(CalibQuantError, match="does not say which LoRA"):
        jobs.QuantizedFile(path)


def test_names_are_checked_before_the_work(seen: calibration.Calibration, tmp_path: Path) -> None:
    plan = planned(seen)
    with Source(DEMO) as source:
        for output in (tmp_path / "m.safetensors", tmp_path / ".split.safetensors"):
            with pytest.raises(CalibQuantError, match=r"ends in \.split\.safetensors"):
                jobs.quantize(source, plan, output, calibration=seen)
    with pytest.raises(CalibQuantError, match="give its LoRA another name"):
        quantize(tmp_path, plan, seen, lora_output=tmp_path / MAIN)
    (tmp_path / BRANCH).write_bytes(b"mine")
    with pytest.raises(CalibQuantError, match=rf"{BRANCH}: exists already"):
        quantize(tmp_path, plan, seen)
    assert [path.name for path in tmp_path.iterdir()] == [BRANCH] and (tmp_path / BRANCH).read_bytes() == b"mine"
    (tmp_path / "loras").mkdir()
    report = quantize(tmp_path, plan, seen, lora_output=tmp_path / "loras" / "b.safetensors")
    assert report.lora == str(tmp_path / "loras" / "b.safetensors") and report.bytes_after == plan.size


def test_an_interrupted_run_leaves_nothing_and_spares_the_old_pair(
    seen: calibration.Calibration, tmp_path: Path
) -> None:
    for name in (MAIN, BRANCH):
        (tmp_path / name).write_bytes(b"old")

    def interrupt(done: int, total: int, text: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path, planned(seen), seen, overwrite=True, verify=True, progress=interrupt)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {MAIN: b"old", BRANCH: b"old"}


def test_a_run_that_dies_between_two_names_leaves_no_main_file(
    seen: calibration.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new one without its LoRA nor an old one beside another's."""
    plan = planned(seen)
    quantize(tmp_path, plan, seen)
    old, publish = (tmp_path / BRANCH).read_bytes(), NewFile.publish

    def die(self: NewFile, overwrite: bool) -> None:
        publish(self, overwrite)
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(NewFile, "publish", die)
        quantize(tmp_path, planned(seen, "2"), seen, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [BRANCH] and (tmp_path / BRANCH).read_bytes() != old
    assert quantize(tmp_path, plan, seen, overwrite=True, verify=True).lora_bytes == len(old)


# --- the command line


def test_the_command_line_plans_and_makes_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ["--recipe", "nvfp4", "--calibration", str(CALIBRATION)]
    plan = tmp_path / "p.json"
    assert main(["plan", str(DEMO), *recipe, "--split", "2%", "-o", str(plan)]) == 0
    assert "MB more in a LoRA" in capsys.readouterr().out
    quantizing = ["quantize", str(DEMO), "-o", str(tmp_path / MAIN), "--rounding", "nearest", "--verify"]
    assert main([*quantizing, "--plan", str(plan), "--calibration", str(CALIBRATION)]) == 0
    assert (tmp_path / BRANCH).exists()
    assert main([*quantizing, "--recipe", "nvfp4", "--split", "4"]) == 2
    assert main([*quantizing, "--plan", str(plan), "--split", "4"]) == 2
    assert main([*quantizing, *recipe, "--split", "4", "--pre-quant-scale", "--overwrite"]) != 0
    with pytest.raises(SystemExit) as wrong:
        main([*quantizing, *recipe, "--split", "none"])
    assert wrong.value.code == 2
    other = [str(tmp_path / "hidden.safetensors") if word.endswith(MAIN) else word for word in quantizing]
    monkeypatch.setattr(decision, "make_plan", lambda *_: pytest.fail("planned before the name was looked at"))
    capsys.readouterr()
    assert main([*other, *recipe, "--split", "4"]) == 1
    assert "by a name that ends in .split.safetensors" in capsys.readouterr().err


# --- ComfyUI


def emulate_native(patch: pytest.MonkeyPatch) -> None:
    """The loader takes this machine for a GPU of every format, and multiplies what it quantized in float."""
    management, kitchen = (importlib.import_module(name) for name in ("comfy.model_management", "comfy_kitchen"))

    def absent(*_: object, **__: object) -> None:
        raise RuntimeError("emulated")

    for name in ("nvfp4", "mxfp8", "fp8"):
        patch.setattr(management, f"supports_{name}_compute", lambda *_, **__: True)
    for name in ("scaled_mm_nvfp4", "scaled_mm_mxfp8"):
        patch.setattr(kitchen, name, absent)


@pytest.mark.core
@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "w4a8"])
def test_the_stock_bypass_loader_gives_what_compare_predicts(
    recipe: str, seen: calibration.Calibration, tmp_path: Path, comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.import_module("comfy.quant_ops").QUANT_ALGOS
    if recipe == "w4a8" and "asym_w4a8_int8" not in known:
        pytest.skip("this core does not read W4A8")
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    quantize(tmp_path, planned(seen, "8", recipe), seen)
    with Source(DEMO) as source:
        compared = jobs.compare(source, tmp_path / MAIN, calibration=seen)
        weight, bias = source.load(LAYER).float(), source.checkpoint.read(f"{LAYER}.bias").float()
    predicted = next(layer for layer in compared.layers if layer.name == LAYER)
    emulate_native(monkeypatch)
    x = seen.rows_of(LAYER).float()
    wanted = x @ weight.T
    with torch.inference_mode():
        model = importlib.import_module("comfy.sd").load_diffusion_model(str(tmp_path / MAIN))
        loader = importlib.import_module("comfy_extras.nodes_lora_debug").LoraLoaderBypassModelOnly()
        (both,) = loader.load_lora_model_only(model, BRANCH, 1.0)
        layer = both.model.diffusion_model.blocks[0].ffn[0]
        alone = layer(x) - bias
        both.inject_model()
        together = layer(x) - bias
        both.eject_model()
    error, without = (((y - wanted).square().sum() / wanted.square().sum()).item() for y in (together, alone))
    assert error == pytest.approx(predicted.loader_error, rel=0.02) and without > 0.1
