"""Which machine a file is for, and which INT8 layers are rotated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import models
import pytest
import reference
import torch

from quant_core import jobs
from quant_core.errors import CalibQuantError, OptionError
from quant_core.evidence import calibration
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.formats import FORMATS
from quant_core.models.source import Source
from quant_core.planning import recipes, rotation, targets
from quant_core.planning.folds import Fold
from quant_core.planning.plan import Plan
from quant_core.rounding.layerplan import LayerPlan

LAYER = "layers.0.attention.out"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage(dim=256, ffn=512))


def make_plan(file: Path, recipe: str) -> Plan:
    with Source(file) as source:
        return recipes.make_plan(source, recipe)


def core(folder: Path, words: str) -> Path:
    """A folder that looks like a ComfyUI whose loader knows these words."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "quant_ops.py").write_text(words)
    return folder


# --- cores


def test_every_format_has_a_target() -> None:
    assert set(targets.TARGETS) == set(FORMATS)
    for fmt, target in targets.TARGETS.items():
        assert target.title == FORMATS[fmt].title
        stored = sum(
            torch.Size(shape).numel() * dtype.itemsize for dtype, shape in FORMATS[fmt].layout((1024, 4096)).values()
        )
        assert target.bits == pytest.approx(8 * stored / (1024 * 4096), abs=0.02)


def test_what_an_older_core_cannot_load_is_said(file: Path, tmp_path: Path) -> None:
    plan = make_plan(file, "w4a8")
    (note,) = targets.check_core(plan, core(tmp_path / "old", '"nvfp4"'))
    assert "cannot load W4A8 layers: the file needs ComfyUI 0.31 or newer" in note
    assert targets.check_core(plan, core(tmp_path / "new", 'QUANT_ALGOS["asym_w4a8_int8"]')) == []
    assert targets.check_core(make_plan(file, "nvfp4"), tmp_path / "old") == []


def test_what_a_core_would_draw_noise_from_is_refused(file: Path, tmp_path: Path) -> None:
    plan = make_plan(file, "nvfp4")
    smoothed = replace(plan, layers={name: replace(e, pre_quant_scale=True) for name, e in plan.layers.items()})
    with pytest.raises(CalibQuantError, match="ignores pre_quant_scale"):
        targets.check_core(smoothed, core(tmp_path / "old", '"nvfp4"'))
    assert targets.core_needed(smoothed) == "0.31"


@pytest.mark.parametrize(
    ("recipe", "needed"), [("nvfp4", "0.29"), ("w4a8", "0.31"), ("w6a8", "0.31 with comfy-kitchen 0.2.38")]
)
def test_header_and_report_say_which_core_a_file_needs(recipe: str, needed: str, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.safetensors"
    with Source(file) as source:
        report = jobs.quantize(source, recipes.make_plan(source, recipe), output, device="cpu")
    assert report.needs_comfyui == needed and f"needs ComfyUI {needed} or newer" in report.summary()
    assert json.loads(reference.File(output).metadata["calibquant"])["needs_comfyui"] == needed


def test_a_width_that_no_block_divides_falls_back_to_int8(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.ffn.weight": torch.randn(32, 40 if i else 48) for i in range(2)}
    plan = make_plan(models.save(tmp_path / "m.safetensors", tensors), "w4a8")
    assert [entry.format for entry in plan.layers.values()] == ["asym_w4a8_int8", "int8_tensorwise"]
    assert "40 columns do not divide by 16" in plan.layers["layers.1.ffn"].reason


# --- rotation


def loud(file: Path, width: int) -> Calibration:
    """Every layer's inputs are Gaussian but for one channel that is 60 times as loud."""
    collector = Collector(lambda layer: "")
    collector.start_run("run")
    with Source(file) as source:
        for layer in source.layers:
            x = torch.randn(256, source.shape(layer)[1], generator=torch.Generator().manual_seed(0))
            x[:, 3] *= 60
            collector.add(layer, x, x @ source.load(layer).float().T)
    collector.finish_run()
    return collector.result()


def test_rotated_where_that_measures_better(file: Path) -> None:
    with Source(file) as source:
        plan = recipes.make_plan(source, "int8")
        assert rotation.rotated(source, plan, "never", loud(file, 256)) is plan
        always = rotation.rotated(source, plan, "always")
        auto = rotation.rotated(source, plan, "auto", loud(file, 256))
        guess = rotation.rotated(source, plan, "auto")
        with pytest.raises(OptionError, match="never, auto, always"):
            rotation.rotated(source, plan, "perhaps")
    assert {e.format for e in always.quantized().values()} == {"int8_convrot"}
    assert auto.layers[LAYER].format == "int8_convrot" and "outputs as loaded" in auto.layers[LAYER].reason
    assert "error of weights" in guess.layers[LAYER].reason
    assert auto.size > plan.size  # by the markers


def test_what_was_chosen_is_the_better_one_as_loaded(file: Path, tmp_path: Path) -> None:
    """By compare, on the same rows; and the size is the planned one."""
    seen, errors = loud(file, 256), {}
    with Source(file) as source:
        for rotate in rotation.CHOICES:
            plan = rotation.rotated(source, recipes.make_plan(source, "int8"), rotate, seen)
            report = jobs.quantize(source, plan, tmp_path / f"{rotate}.safetensors", device="cpu", verify=True)
            assert report.bytes_after == plan.size
            compared = jobs.compare(source, report.output, calibration=seen)
            errors[rotate] = {layer.name: layer.loader_error for layer in compared.layers}
    for name, error in errors["auto"].items():
        if error is not None:
            assert error <= min(errors["never"][name], errors["always"][name]) * 1.0001, name
    assert errors["auto"][LAYER] < 0.5 * errors["never"][LAYER]


def test_a_calibration_of_the_demo_decides_layer_by_layer() -> None:
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    with Source(models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors") as source:
        plan = rotation.rotated(source, recipes.make_plan(source, "int8"), "auto", seen)
    assert plan.count()["int8_convrot"] > 0 and plan.count()["int8_tensorwise"] > 0


# --- what is said of a file


def test_shares_are_of_the_work_that_each_layer_does(file: Path) -> None:
    """By hand: qkv twice as often called as w2; all other layers in 16 bit."""
    with Source(file) as source:
        layers = dict.fromkeys(source.layers, LayerPlan("bf16", ""))
        layers["layers.0.attention.qkv"] = LayerPlan("nvfp4", "")
        layers["layers.0.feed_forward.w2"] = LayerPlan("int8_convrot", "")
        plan = Plan("zimage", "", source.name, layers, gpu="ampere")
        sizes = {name: math.prod(source.shape(name)) for name in layers}
        collector = Collector(lambda layer: layer)
        collector.start_run("seed 0")
        for name in layers:
            x = torch.ones(20 if name == "layers.0.attention.qkv" else 10, source.shape(name)[1])
            collector.add(name, x, x @ source.load(name).float().T)
        collector.finish_run()
        seen = collector.result()
        by_weights = targets.words(plan, source)[0]
        by_work = targets.words(replace(plan, seen=lambda: seen), source)[0]
    emulated, native = sizes["layers.0.attention.qkv"], sizes["layers.0.feed_forward.w2"]
    total = sum(sizes.values())
    assert f"weights {100 * native / total:.0f} % in native kernels, {100 * emulated / total:.0f} % emul" in by_weights
    total += emulated
    assert f"work {100 * native / total:.0f} % in native kernels, {200 * emulated / total:.0f} % emulated" in by_work


@pytest.mark.parametrize(
    ("changed", "gpu", "said", "unsaid"),
    [
        ({"format": "nvfp4"}, "", "fast: NVFP4 on RTX 50; elsewhere unpacked", "INT8"),
        ({"format": "nvfp4", "full_precision": True}, "", "on every card unpacked", "fast:"),
        ({"format": "nvfp4"}, "turing", "emulated", "native"),
        ({"format": "nvfp4"}, "", "(Load LoRA (Bypass, Model Only)); an ordinary loader", "as usual"),
        ({"format": "nvfp4"}, "", "NVFP4 .0004 -> .022", "do not fit"),
        ({"format": "nvfp4", "rank": 4}, "", "a bypass loader after Load Split Model", "Load LoRA"),
        ({"format": "int8_convrot"}, "", "load them as usual", "use a bypass loader"),
        ({"format": "nvfp4", "pre_quant_scale": True}, "", "made for the original model do not fit", "ordinary"),
        ({"format": "nvfp4"}, "fold", "made for the original model do not fit", "ordinary"),
        ({"format": "bf16"}, "turing", "needs ComfyUI 0.29 or newer", "LoRA"),
    ],
)
def test_words_on_cards_and_loras(changed: dict[str, object], gpu: str, said: str, unsaid: str) -> None:
    """The figures are those of benchmarks/RESULTS.md."""
    found = {"g": Fold(0.5, 0.5, 2.0, 1.0, "AA")} if gpu == "fold" else {}
    layers = {"a": replace(LayerPlan("", ""), **changed)}
    text = "\n".join(targets.words(Plan("zimage", "", "m", layers, folds=found, gpu=gpu.replace("fold", ""))))
    assert said in text and unsaid not in text
