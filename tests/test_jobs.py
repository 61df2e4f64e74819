"""The whole job: what the finished file holds is what was reported, or there is no file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy_kitchen as ck
import models
import pytest
import reference
import torch

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.formats import FORMATS
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.planning.plan import Plan
from quant_core.reports import describe
from quant_core.reports.report import LayerReport, Report
from quant_core.rounding.layerplan import LayerPlan

LAYER = "layers.0.attention.out"
DEMO = models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"


def quantize(path: Path, recipe: str, output: Path, **options: object) -> Report:
    with Source(path) as source:
        return jobs.quantize(source, recipes.make_plan(source, recipe), output, device="cpu", **options)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and reference.raw(a) == reference.raw(b)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage(), {"title": "mine"})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


# --- what is in the file


@pytest.mark.parametrize("recipe", list(recipes.RECIPES))
def test_an_independent_decoder_finds_the_reported_error(recipe: str, file: Path, output: Path) -> None:
    report = quantize(file, recipe, output)
    found, weights = reference.File(output), models.zimage()
    assert len(report.layers) == sum(name.endswith(".weight") and t.dim() == 2 for name, t in weights.items())
    for layer in report.layers:
        weight = weights[f"{layer.name}.weight"]
        assert layer.nbytes == sum(t.nbytes for part, t in found.layer(layer.name).items() if part != "bias")
        if layer.format == "bf16":
            assert layer.error == 0 and same(found.tensors[f"{layer.name}.weight"], weight)
        else:
            decoded = found.decode(layer.name, layer.format, layer.shape)
            assert layer.error == pytest.approx(reference.relative_error(weight, decoded), rel=1e-4)


def test_convolutions_are_cast_in_the_unscaled_dialect(tmp_path: Path, output: Path) -> None:
    weights = models.sd15()
    quantize(models.save(tmp_path / "m.safetensors", weights), "fp8-unscaled", output)
    name = "input_blocks.1.0.in_layers.2.weight"
    assert same(reference.File(output).tensors[name], weights[name].to(torch.float8_e4m3fn))


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-unscaled"])
def test_everything_else_is_copied_byte_for_byte(recipe: str, tmp_path: Path, output: Path) -> None:
    weights = models.all_in_one(models.zimage())
    report = quantize(models.save(tmp_path / "m.safetensors", weights), recipe, output)
    found = reference.File(output).tensors
    quantized = {f"{layer.name}.weight" for layer in report.layers if layer.format != "bf16"}
    assert quantized and all(name.startswith(models.PREFIX) for name in quantized)
    assert all(same(found[name], weights[name]) for name in weights.keys() - quantized)


def test_header_and_inline_metadata_say_the_same(file: Path, output: Path) -> None:
    report = quantize(file, "zimage-nvfp4-mixed", output)
    found = reference.File(output)
    header = json.loads(found.metadata["_quantization_metadata"])
    assert header["format_version"] == "1.0" and header["layers"] == found.configs()
    assert {name: config["format"] for name, config in found.configs().items()} == {
        layer.name: layer.format for layer in report.layers if layer.format != "bf16"
    }


def test_where_the_file_comes_from_is_in_its_header(file: Path, output: Path) -> None:
    quantize(file, "mxfp8", output)
    metadata = reference.File(output).metadata
    provenance = json.loads(metadata["calibquant"])
    assert provenance["source"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert provenance["recipe"] == "mxfp8" and provenance["plan"][LAYER] == ["mxfp8", "recipe mxfp8"]
    assert metadata["title"] == "mine"
    assert describe.inspect(output)["provenance"] == provenance


def test_the_hash_of_shards_is_over_all_of_them_in_order(tmp_path: Path, output: Path) -> None:
    index = models.save_sharded(tmp_path / "shards", models.zimage())
    quantize(index, "mxfp8", output)
    both = b"".join((index.parent / f"a-{i}-of-2.safetensors").read_bytes() for i in (1, 2))
    provenance = json.loads(reference.File(output).metadata["calibquant"])
    assert provenance["source"]["sha256"] == hashlib.sha256(both).hexdigest()


def test_the_same_input_makes_the_same_bytes(file: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{n}.safetensors" for n in "ab"]
    for path in outputs:
        quantize(file, "zimage-nvfp4-mixed", path)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_patches_are_merged_in_float32_before_rounding(file: Path, output: Path, tmp_path: Path) -> None:
    weights, bump = models.zimage(), {LAYER: 1e-3, "x_embedder": 2e-3}
    merge = {f"{name}.weight": lambda w, by=by: w + by for name, by in bump.items()}
    report = quantize(file, "mxfp8", output, merge=merge, merged="ab" * 32)
    with Source(file) as source:
        jobs.verify(source, report, merge)
    by_hand = weights | {f"{name}.weight": weights[f"{name}.weight"].float() + by for name, by in bump.items()}
    by_hand["x_embedder.weight"] = by_hand["x_embedder.weight"].bfloat16()  # kept: in the dtype of the source
    quantize(models.save(tmp_path / "hand.safetensors", by_hand), "mxfp8", tmp_path / "hand_out.safetensors")
    ours, expected = reference.File(output), reference.File(tmp_path / "hand_out.safetensors")
    assert all(same(ours.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert json.loads(ours.metadata["calibquant"])["merged_patches_sha256"] == "ab" * 32


# --- verification


def change_byte(path: Path, name: str, change: Callable[[int], int]) -> None:
    """Change the second byte of a tensor in place."""
    data = bytearray(path.read_bytes())
    base = 8 + int.from_bytes(data[:8], "little")
    place = base + json.loads(data[8:base])[name]["data_offsets"][0] + 1
    data[place] = change(data[place])
    path.write_bytes(data)


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "fp8", "int8", "fp8-unscaled"])
def test_verify_accepts_what_was_written(recipe: str, file: Path, output: Path) -> None:
    report = quantize(file, recipe, output)
    with Source(file) as source:
        jobs.verify(source, report)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("nvfp4", f"{LAYER}.weight"),
        ("nvfp4", f"{LAYER}.weight_scale"),
        ("nvfp4", f"{LAYER}.weight_scale_2"),
        ("mxfp8", f"{LAYER}.weight_scale"),
        ("fp8", f"{LAYER}.weight"),
        ("int8", f"{LAYER}.weight"),
        ("int8", "x_embedder.weight"),  # kept in 16 bit
    ],
)
def test_verify_notices_a_changed_byte(recipe: str, name: str, file: Path, output: Path) -> None:
    report = quantize(file, recipe, output)
    change_byte(output, name, lambda byte: byte ^ 0x44)
    layer = re.escape(name.rpartition(".")[0])
    with Source(file) as source, pytest.raises(CalibQuantError, match=f"layer {layer} has relative error"):
        jobs.verify(source, report)


def test_verify_notices_a_code_that_became_nan(file: Path, output: Path) -> None:
    report = quantize(file, "fp8", output)
    change_byte(output, f"{LAYER}.weight", lambda byte: 0x7F)
    with Source(file) as source, pytest.raises(CalibQuantError, match=f"layer {re.escape(LAYER)} has relative error"):
        jobs.verify(source, report)


def demo(output: Path, rounding: str, smooth: bool = False, **options: object) -> tuple[Report, Plan]:
    """The demo model in NVFP4 with the calibration that ships with it."""
    seen = calibration.load(CALIBRATION)
    with Source(DEMO) as source:
        plan = recipes.calibrated(source, recipes.make_plan(source, "nvfp4"), seen)
        plan = recipes.smoothed(source, plan, seen) if smooth else plan
        report = jobs.quantize(source, plan, output, calibration=seen, rounding=rounding, device="cpu", **options)
        jobs.verify(source, report)
    assert output.stat().st_size == plan.size
    return report, plan


def test_gptq_makes_the_same_bytes_twice_and_the_planned_size(tmp_path: Path) -> None:
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    report, _ = demo(one, "gptq")
    demo(two, "gptq")
    assert one.read_bytes() == two.read_bytes()
    assert {layer.rounding for layer in report.layers if layer.format == "nvfp4"} >= {"gptq+bias"}
    nearest = tmp_path / "3.safetensors"
    demo(nearest, "nearest")
    assert nearest.stat().st_size == one.stat().st_size


def test_a_plan_brings_the_calibration_that_it_was_made_with(tmp_path: Path) -> None:
    seen = calibration.load(CALIBRATION)
    with Source(DEMO) as source:
        plan = replace(recipes.make_plan(source, "int8"), seen=lambda: seen)
        assert "seen" not in json.loads(plan.to_json())
        report = jobs.quantize(source, plan, tmp_path / "q.safetensors", rounding="gptq", device="cpu")
    assert {"gptq+bias"} <= {layer.rounding for layer in report.layers}
    assert report.runs == 20 and {layer.held_out for layer in report.layers if layer.output_errors} <= {3, 4}
    assert reference.File(tmp_path / "q.safetensors").metadata["calibquant"].count('"rounding": "gptq') == 1


def test_the_summary_says_why_there_was_no_gptq(tmp_path: Path) -> None:
    seen = replace(calibration.load(CALIBRATION), rows={})
    with Source(DEMO) as source:
        plan = recipes.make_plan(source, "int8")
        report = jobs.quantize(
            source, plan, tmp_path / "q.safetensors", calibration=seen, rounding="gptq", device="cpu"
        )
    assert "60 layers: no GPTQ: no input rows were sampled" in report.summary()
    assert "output error" not in report.summary()


def test_the_summary_says_what_errors_were_measured_on() -> None:
    layer = LayerReport("l", "nvfp4", 0.1, (4, 4), 8, rounding="gptq", output_errors={"gptq": 0.01}, held_out=2)
    report = Report("a", "b", "wan", "nvfp4", 10, 5, layers=[layer], runs=12)
    assert "output error held out (2 of 12 runs), mean of 1 layers" in report.summary()
    assert "warning" not in report.summary()
    mixed = replace(report, layers=[layer, replace(layer, held_out=0)], runs=3)
    assert "held out (2 of 3 runs, 1 layers in-sample)" in mixed.summary()
    assert "warning: the calibration has few runs (3)" in mixed.summary()
    assert "in-sample (1 run)" in replace(report, layers=[replace(layer, held_out=0)], runs=1).summary()


def test_a_bias_that_is_not_finite_is_named(output: Path, tmp_path: Path) -> None:
    tensors = models.wan()
    key = "blocks.0.ffn.0.bias"
    tensors[key] = torch.zeros(128, dtype=torch.float16).index_fill(0, torch.tensor([1]), float("nan"))
    path = models.save(tmp_path / "m.safetensors", tensors)
    message = f"{re.escape(str(path))}: layer {re.escape(key.removesuffix('.bias'))}: the bias has 1 NaN value: "
    with pytest.raises(CalibQuantError, match=message):
        quantize(path, "mxfp8", output)
    assert not output.exists()


def test_the_weight_only_switch_is_read_from_a_header_without_prefix(output: Path, tmp_path: Path) -> None:
    """As some tools write it: tensors with the prefix, layers in the header without, no inline tensors."""
    quantize(models.save(tmp_path / "m.safetensors", models.zimage()), "fp8", output)
    found = reference.File(output)
    tensors = {k: t for k, t in found.tensors.items() if not k.endswith(".comfy_quant")}
    headers = {models.PREFIX + k: t for k, t in tensors.items()}
    path = models.save(tmp_path / "p.safetensors", headers, models.header_metadata(found.configs()))
    with jobs.QuantizedFile(path) as quantized:
        assert quantized.runs_as(models.PREFIX + LAYER).full_precision


def test_verify_notices_a_bias_that_is_not_as_reported(output: Path) -> None:
    report, _ = demo(output, "gptq")
    layer = next(layer for layer in report.layers if layer.bias_change)
    change_byte(output, f"{layer.name}.bias", lambda byte: byte ^ 0x20)
    with Source(DEMO) as source, pytest.raises(CalibQuantError, match=f"bias of layer {re.escape(layer.name)} differs"):
        jobs.verify(source, report)


@pytest.mark.parametrize("smooth", [False, True])
def test_compare_measures_the_outputs_that_the_loader_would_give(output: Path, smooth: bool) -> None:
    """Against a decoder of our own (reference.py) and comfy-kitchen's quantize for the inputs, in float64."""
    made, plan = demo(output, "auto", smooth)
    seen, found, source = calibration.load(CALIBRATION), reference.File(output), reference.File(DEMO)
    with Source(DEMO) as opened:
        report = jobs.compare(opened, output, calibration=seen)
    measured = {layer.name: layer for layer in report.layers if layer.output_errors}
    assert set(measured) == set(plan.quantized())
    errors = [layer.output_errors["file"] for layer in measured.values()]
    assert errors == sorted(errors, reverse=True)
    for name in ("blocks.0.ffn.2", "blocks.3.self_attn.o"):
        tensors, rows = found.layer(name), seen.rows_of(name).float()
        smoothed = tensors.get("pre_quant_scale", torch.ones(rows.shape[1])).float()
        scale, fed = tensors["input_scale"], rows * smoothed
        codes, blocks = ck.quantize_nvfp4(fed, scale, pad_16x=True)
        fed = ck.dequantize_nvfp4(codes, scale, blocks, output_type=torch.float32)[: len(rows), : rows.shape[1]]
        weight = torch.from_numpy(found.decode(name, "nvfp4", plan_shape(source, name)))
        wanted = rows.double() @ source.tensors[f"{name}.weight"].double().T + source.tensors[f"{name}.bias"].double()
        exact = (rows * smoothed).double() @ weight.T + tensors["bias"].double()
        loaded = fed.double() @ weight.T + tensors["bias"].double()
        energy = (wanted - source.tensors[f"{name}.bias"].double()).square().sum()
        error, as_loaded = (((y - wanted).square().sum() / energy).item() for y in (exact, loaded))
        assert measured[name].output_errors["file"] == pytest.approx(error, rel=1e-3)
        assert measured[name].loader_error == pytest.approx(as_loaded, rel=1e-3)
    if smooth:
        assert sum(t.numel() for n, t in found.tensors.items() if n.endswith(".pre_quant_scale")) > 0
        assert any(layer.note.startswith("inputs smoothed with alpha 0.") for layer in made.layers)


def plan_shape(source: reference.File, name: str) -> tuple[int, ...]:
    return tuple(source.tensors[f"{name}.weight"].shape)


@pytest.mark.parametrize("fmt", ["mxfp8", "float8_e4m3fn"])
def test_smoothing_is_refused_where_no_loader_reads_it(fmt: str, output: Path) -> None:
    with Source(DEMO) as source:
        plan = recipes.make_plan(source, "nvfp4")
        name = next(iter(plan.quantized()))
        layers = {**plan.layers, name: LayerPlan(fmt, "by hand", pre_quant_scale=True)}
        with pytest.raises(CalibQuantError, match=f"layer {re.escape(name)}: pre_quant_scale exists for nvfp4 only"):
            jobs.quantize(source, replace(plan, layers=layers), output)
    assert not output.exists()


# --- sources that are refused


def refused(path: Path, output: Path, recipe: str = "mxfp8") -> str:
    before = sorted(output.parent.iterdir())
    with pytest.raises(CalibQuantError) as caught:
        quantize(path, recipe, output)
    assert sorted(output.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")])
@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "fp8", "int8", "fp8-unscaled"])
def test_a_weight_that_is_not_finite_is_named(
    value: float, kind: str, recipe: str, tmp_path: Path, output: Path
) -> None:
    tensors = models.zimage()
    tensors[f"{LAYER}.weight"][3, 5] = value
    path = models.save(tmp_path / "m.safetensors", tensors)
    assert refused(path, output, recipe).startswith(f"{path}: layer {LAYER}: the weight has 1 {kind} value: ")


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "int8"])
def test_a_quantized_file_is_no_source(recipe: str, file: Path, output: Path, tmp_path: Path) -> None:
    quantize(file, recipe, output)
    message = refused(output, tmp_path / "twice.safetensors")
    assert "is quantized already (" in message and message.endswith("quantize from the 16-bit original")


@pytest.mark.parametrize(("dtype", "name"), [(torch.uint8, "U8"), (torch.int8, "I8")])
def test_quantized_weights_are_no_source_even_without_a_marker(
    dtype: torch.dtype, name: str, tmp_path: Path, output: Path
) -> None:
    tensors = models.zimage() | {f"{LAYER}.weight": torch.ones(64, 64, dtype=dtype)}
    path = models.save(tmp_path / "m.safetensors", tensors)
    assert refused(path, output).startswith(f"{path}: layer {LAYER} is quantized already ({name})")


def test_a_lora_is_no_source(tmp_path: Path, output: Path) -> None:
    tensors = {f"diffusion_model.{LAYER}.lora_{ab}.weight": torch.ones(4, 64) for ab in "AB"}
    path = models.save(tmp_path / "lora.safetensors", tensors)
    assert "is a LoRA, not a model" in refused(path, output)


def test_a_file_without_layers_is_no_source(tmp_path: Path, output: Path) -> None:
    path = models.save(tmp_path / "x.safetensors", {"stem.conv.weight": torch.ones(8, 8, 3, 3)})
    assert "no Linear layer inside a numbered block" in refused(path, output)


def test_the_source_is_never_its_own_output(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    link = tmp_path / "link.safetensors"
    link.hardlink_to(file)
    for target in (file, link):
        with pytest.raises(CalibQuantError, match="is the source itself"):
            quantize(file, "mxfp8", target, overwrite=True)
    assert file.read_bytes() == before


def test_a_patch_of_another_model_is_refused(file: Path, output: Path) -> None:
    with pytest.raises(CalibQuantError, match=r"has no tensor blocks\.0\.weight, which the linked MODEL patches"):
        quantize(file, "mxfp8", output, merge={"blocks.0.weight": lambda w: w})
    assert not output.exists()


@pytest.mark.parametrize("at", [0, 1, 20])
def test_cancelling_leaves_nothing(at: int, file: Path, output: Path) -> None:
    def cancel(done: int, total: int, text: str) -> None:
        if done == at:
            raise InterruptedError(f"{done} of {total}: {text}")

    before = sorted(output.parent.iterdir())
    with pytest.raises(InterruptedError, match=f"^{at} of "):
        quantize(file, "mxfp8", output, progress=cancel)
    assert sorted(output.parent.iterdir()) == before


def test_progress_counts_to_the_end(file: Path, output: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(file, "mxfp8", output, progress=lambda done, total, text: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1))


# --- contradictions


@pytest.mark.parametrize("read", [describe.inspect, jobs.QuantizedFile, Source])
@pytest.mark.parametrize(
    "header", [{"format": "mxfp8"}, {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}]
)
def test_a_header_that_contradicts_its_tensors_is_refused(
    header: dict[str, object], read: Callable[[Path], object], tmp_path: Path
) -> None:
    model = models.native(models.zimage())
    path = models.save(tmp_path / "m.safetensors", model.tensors, models.header_metadata({LAYER: header}))
    with pytest.raises(CalibQuantError, match=f"layer {re.escape(LAYER)} is .* by the header: one of the two is wrong"):
        read(path)


def test_what_the_loader_ignores_may_differ(tmp_path: Path) -> None:
    header = models.header_metadata({LAYER: {"format": "float8_e4m3fn", "orig_dtype": "torch.bfloat16"}})
    path = models.save(tmp_path / "m.safetensors", models.native(models.zimage()).tensors, header)
    assert describe.inspect(path)["layers"][LAYER]["format"] == "float8_e4m3fn"


@pytest.mark.parametrize("inline", [b"{", b"[]", b'{"format": 3}', b"\xff"])
def test_damaged_inline_metadata_is_named(inline: bytes, tmp_path: Path) -> None:
    tensors = models.native(models.zimage()).tensors
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(inline), dtype=torch.uint8)
    with pytest.raises(CalibQuantError, match=f"layer {re.escape(LAYER)} has "):
        describe.inspect(models.save(tmp_path / "m.safetensors", tensors))


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 5}', '{"layers": {"layers.0.attention.out": {}}}'])
def test_damaged_header_metadata_is_named(text: str, tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage(), {"_quantization_metadata": text})
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: "):
        describe.inspect(path)


# --- scaled FP8 sources

SCALED: dict[str, Callable[[], models.ScaledFP8]] = {
    "native": lambda: models.native(models.zimage()),
    "native per row": lambda: models.native(models.zimage(), per_row=True),
    "legacy": lambda: models.legacy(models.zimage()),
    "legacy with prefix": lambda: models.legacy(models.zimage(), models.PREFIX),
    "hswq": lambda: models.hswq(models.zimage()),
    "hswq per row": lambda: models.hswq(models.zimage(), per_row=True),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_fp8_is_dequantized_first(kind: str, tmp_path: Path, output: Path) -> None:
    model = SCALED[kind]()
    path = models.save(tmp_path / "m.safetensors", model.tensors, model.metadata)
    report = quantize(path, "int8", output)
    found = reference.File(output)
    assert not [name for name in found.tensors if name.endswith((".scale", ".scale_weight", "scaled_fp8"))]
    errors = {layer.name: layer.error for layer in report.layers if layer.format == "int8_tensorwise"}
    assert {f"{name}.weight" for name in errors} == model.real.keys()
    for name, error in errors.items():
        real = model.real[f"{name}.weight"]
        decoded = found.decode(name, "int8_tensorwise", tuple(real.shape))
        assert error == pytest.approx(reference.relative_error(real, decoded), rel=1e-4)
        assert error < 1e-3  # had the scale been forgotten, it would be near 1
    with Source(path) as source:
        jobs.verify(source, report)


def test_a_scaled_layer_that_a_plan_keeps_becomes_16_bit(tmp_path: Path, output: Path) -> None:
    model = models.hswq(models.zimage())
    path = models.save(tmp_path / "m.safetensors", model.tensors)
    with Source(path) as source:
        keep = Plan("zimage", "by hand", path.name, {LAYER: LayerPlan("bf16", "kept")})
        report = jobs.quantize(source, keep, output, device="cpu")
        jobs.verify(source, report)
    found = reference.File(output).tensors
    assert same(found[f"{LAYER}.weight"], model.real[f"{LAYER}.weight"].bfloat16())
    assert report.layers[0].nbytes == found[f"{LAYER}.weight"].nbytes


def test_a_scale_per_block_is_refused(tmp_path: Path, output: Path) -> None:
    tensors = models.native(models.zimage()).tensors | {f"{LAYER}.weight_scale": torch.ones(2, 2)}
    assert f"layer {LAYER} has a scale of shape (2, 2)" in refused(
        models.save(tmp_path / "m.safetensors", tensors), output
    )


def test_two_dialects_in_one_file_are_refused(tmp_path: Path, output: Path) -> None:
    tensors = models.hswq(models.zimage()).tensors | {f"{LAYER}.scale_weight": torch.ones(())}
    assert "mixes the FP8 dialects" in refused(models.save(tmp_path / "m.safetensors", tensors), output)


# --- conversion to the native dialect


@pytest.mark.parametrize(
    ("model", "suffix", "weight_only"),
    [
        (models.hswq(models.zimage()), ".scale", True),
        (models.legacy(models.zimage()), ".scale_weight", False),
        (models.legacy(models.zimage(), weight_only=True), ".scale_weight", True),
        (models.legacy(models.zimage(), models.PREFIX), ".scale_weight", False),
    ],
    ids=["hswq", "legacy", "legacy weight-only", "legacy with prefix"],
)
def test_convert_keeps_codes_and_scales(
    model: models.ScaledFP8, suffix: str, weight_only: bool, tmp_path: Path, output: Path
) -> None:
    path = models.save(tmp_path / "m.safetensors", model.tensors, {"title": "mine"})
    assert jobs.convert(path, output) == {"layers": len(model.real), "convolutions": 0}
    found = reference.File(output)
    config = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if weight_only else {})
    layers = [key.removesuffix(".weight") for key in model.real]
    assert found.configs() == dict.fromkeys(layers, config)
    assert json.loads(found.metadata["_quantization_metadata"])["layers"] == found.configs()
    assert found.metadata["title"] == "mine"
    for layer in layers:
        assert same(found.tensors[f"{layer}.weight"], model.tensors[f"{layer}.weight"])
        assert same(found.tensors[f"{layer}.weight_scale"], model.tensors[layer + suffix].reshape(()))
    untouched = {n for n in model.tensors if not n.endswith((suffix, "scaled_fp8")) and n not in model.real}
    assert all(same(found.tensors[name], model.tensors[name]) for name in untouched)
    assert found.tensors.keys() == untouched | {
        f"{layer}.{part}" for layer in layers for part in ("weight", "weight_scale", "comfy_quant")
    }


def test_convert_keeps_a_calibrated_input_scale(tmp_path: Path, output: Path) -> None:
    scales = {f"{LAYER}.scale_input": torch.tensor(0.25), "layers.1.attention.out.scale_input": torch.tensor(1.0)}
    path = models.save(tmp_path / "m.safetensors", models.legacy(models.zimage()).tensors | scales)
    jobs.convert(path, output)
    found = reference.File(output).tensors
    assert found[f"{LAYER}.input_scale"].item() == 0.25
    assert "layers.1.attention.out.input_scale" not in found  # 1.0 is the old loader's "not given"


def test_convert_makes_convolutions_16_bit(tmp_path: Path, output: Path) -> None:
    model = models.hswq(models.sd15())
    done = jobs.convert(models.save(tmp_path / "m.safetensors", model.tensors), output)
    convolutions = [name for name, weight in model.real.items() if weight.dim() == 4]
    found = reference.File(output).tensors
    assert done["convolutions"] == len(convolutions) >= 2
    for name in convolutions:
        assert same(found[name], model.real[name].half())
        assert name.removesuffix(".weight") + ".scale" not in found


def test_convert_makes_what_is_no_linear_16_bit(tmp_path: Path, output: Path) -> None:
    experts = {f"layers.1.moe.{n}.weight": torch.full((32, 32), 0.5).half() for n in ("gate", "experts.0.w1")}
    model = models.hswq(models.zimage() | experts)
    done = jobs.convert(models.save(tmp_path / "m.safetensors", model.tensors), output)
    assert done == {"layers": len(model.real) - 1, "convolutions": 1}
    found = reference.File(output)
    assert found.tensors["layers.1.moe.experts.0.w1.weight"].dtype == torch.float8_e4m3fn
    assert "layers.1.moe.gate" not in found.configs()
    assert torch.all(found.tensors["layers.1.moe.gate.weight"] == model.real["layers.1.moe.gate.weight"])
    assert found.tensors["layers.1.moe.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.native(models.zimage()), "is in the native dialect already: nothing to convert"),
        (models.ScaledFP8(models.zimage(), {}), "has no FP8 weights with a scale: nothing to convert"),
        (models.hswq(models.zimage(), per_row=True), "native FP8 takes one: use calibquant quantize"),
    ],
    ids=["native", "bf16", "per row"],
)
def test_what_convert_cannot_do_is_refused(model: models.ScaledFP8, message: str, tmp_path: Path, output: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", model.tensors, model.metadata)
    with pytest.raises(CalibQuantError, match=message):
        jobs.convert(path, output)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# --- comparison


def test_compare_lists_the_errors_worst_first(file: Path, output: Path) -> None:
    report = quantize(file, "zimage-nvfp4-mixed", output)
    with Source(file) as source:
        compared = jobs.compare(source, output)
    errors = [layer.error for layer in compared.layers]
    assert errors == sorted(errors, reverse=True)
    assert {layer.name: (layer.format, layer.nbytes) for layer in compared.layers} == {
        layer.name: (layer.format, layer.nbytes) for layer in report.layers
    }
    expected = {layer.name: layer.error for layer in report.layers}
    assert all(layer.error == pytest.approx(expected[layer.name], rel=1e-4) for layer in compared.layers)


def test_compare_reads_a_file_under_another_prefix(file: Path, output: Path, tmp_path: Path) -> None:
    other = models.save(tmp_path / "p.safetensors", models.prefixed(models.zimage()))
    quantize(other, "mxfp8", output)
    with Source(file) as source:
        assert jobs.compare(source, output).count() == quantize(file, "mxfp8", tmp_path / "b.safetensors").count()


def test_compare_refuses_another_model(file: Path, output: Path, tmp_path: Path) -> None:
    quantize(models.save(tmp_path / "wide.safetensors", models.zimage(dim=96)), "fp8", output)
    with Source(file) as source, pytest.raises(CalibQuantError, match="or of another model"):
        jobs.compare(source, output)


def test_every_format_is_named_in_the_reports() -> None:
    layers = [LayerReport(name, name, 0.1, (1, 1), 1) for name in FORMATS]
    assert list(Report("a", "b", "c", "d", 2, 1, layers=layers).count()) == list(FORMATS)


# --- rotated formats of other tools


def peers_weight(shape: tuple[int, int], group: int, table: bool) -> dict[str, torch.Tensor]:
    """Random 4-bit codes with scales, as another tool would have written them."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = shape
    tensors = {
        "weight": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=generator),
        "weight_s_rel": torch.rand(rows, columns // group, generator=generator) * 8 + 1,
        "weight_s_channel": torch.rand(rows, generator=generator) * 1e-3,
    }
    levels = torch.randn(16, generator=generator).sort().values * 8
    return tensors | ({"weight_codebook": levels} if table else {})


W4A8 = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
INT8 = {"format": "int8_tensorwise"}
INT8_CODES = torch.randint(-127, 128, (192, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
ROW_SCALES = torch.rand(192, 1, generator=torch.Generator().manual_seed(2)) * 1e-3
PEERS = {  # tensors, comfy_quant, block that is rotated
    "float32 group scales": (peers_weight((192, 256), 16, True), W4A8, 64),
    "no table": (peers_weight((192, 256), 16, False), W4A8, 64),
    "groups of 64": (peers_weight((192, 256), 64, True), W4A8 | {"group_size": 64}, 64),
    "nested": (
        peers_weight((192, 256), 64, True),
        {"format": "asym_w4a8_int8", "params": {"group_size": 64, "convrot_groupsize": 16}},
        16,
    ),
    "default block": (peers_weight((192, 256), 16, True), {"format": "asym_w4a8_int8"}, 256),
    "int8 of one scale": ({"weight": INT8_CODES, "weight_scale": torch.tensor(1e-3)}, INT8, 0),
    "int8 of one scale in a vector": ({"weight": INT8_CODES, "weight_scale": torch.tensor([1e-3])}, INT8, 0),
    "int8, default block": ({"weight": INT8_CODES, "weight_scale": ROW_SCALES}, INT8 | {"convrot": True}, 256),
    "int8, nested": (
        {"weight": INT8_CODES, "weight_scale": ROW_SCALES},
        INT8 | {"params": {"convrot": True, "convrot_groupsize": 16}},
        16,
    ),
}


@pytest.mark.parametrize("variant", PEERS)
def test_rotated_files_of_other_tools_are_compared(variant: str, tmp_path: Path, output: Path) -> None:
    tensors, config, size = PEERS[variant]
    weights, layer = models.zimage(dim=256, ffn=256), "layers.0.feed_forward.w2"
    shape = (192, 256)
    weights[f"{layer}.weight"] = weights[f"{layer}.weight"][:192].clone()
    models.save(tmp_path / "m.safetensors", weights)
    made = {name: t for name, t in weights.items() if name != f"{layer}.weight"}
    made |= {f"{layer}.{name}": t for name, t in tensors.items()}
    models.save(output, made | {f"{layer}.comfy_quant": models.config_tensor(config)})
    with Source(tmp_path / "m.safetensors") as source:
        report = jobs.compare(source, output)
    found = next(entry for entry in report.layers if entry.name == layer)
    fmt = "asym_w4a8_int8" if "weight_s_rel" in tensors else "int8_convrot" if size else "int8_tensorwise"
    assert found.format == fmt
    decoded = reference.decode(fmt, tensors, shape, size)
    assert found.error == pytest.approx(reference.relative_error(weights[f"{layer}.weight"], decoded), rel=1e-4)
