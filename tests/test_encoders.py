"""Text encoders: known as ComfyUI knows them, weights only, loaded by its own CLIP loader in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from small_encoders import ENCODERS, Encoder, Shapes, detected, encode, layout, load, random_state
from small_models import decoded, relative_error

from quant_core import jobs
from quant_core.cli.main import main
from quant_core.errors import CalibQuantError
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.formats import FORMATS
from quant_core.locate import find_comfyui
from quant_core.models.architectures import detect, split_prefix
from quant_core.models.source import Source
from quant_core.planning import budget, costs, recipes, targets
from quant_core.planning.layout import encode_config
from quant_core.planning.recipes import legal
from quant_core.rounding.layerplan import LayerPlan

pytestmark = pytest.mark.core

SMALL = [name for name, encoder in ENCODERS.items() if encoder.narrow is not None]


@pytest.fixture
def encoder(request: pytest.FixtureRequest, comfy: Path) -> Encoder:
    found = ENCODERS[request.param]
    if not found.known:
        pytest.skip(f"this ComfyUI has no {found.te}")
    return found


every_encoder = pytest.mark.parametrize("encoder", list(ENCODERS), indirect=True)
every_small = pytest.mark.parametrize("encoder", SMALL, indirect=True)


def matrices(shapes: Shapes) -> list[str]:
    """The layers of a file with these keys, as ModelFile finds them."""
    return [key.removesuffix(".weight") for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2]


# --- rows, on ComfyUI's classes at their published widths


def test_there_is_an_encoder_for_all_that_comfyui_detects(comfy: Path) -> None:
    import comfy.sd

    sizes = {"QWEN35_08B", "QWEN35_4B", "QWEN35_9B", "QWEN35_27B", "QWEN3VL_4B", "MISTRAL3_24B_PRUNED_FLUX2"}
    clips = {"CLIP_L", "CLIP_H", "CLIP_G"}
    assert {one.name for one in comfy.sd.TEModel} <= {one.te for one in ENCODERS.values()} | sizes | clips


@every_encoder
def test_an_encoder_is_served_by_its_row_and_only_its_linears_are_offered(encoder: Encoder) -> None:
    shapes, linears = layout(encoder, narrow=False)
    assert detected(shapes) == encoder.te
    row = detect(shapes, shapes)
    assert (row.name, row.part, split_prefix(shapes)) == (encoder.row, "te", "")
    infos = row.describe_file(matrices(shapes), shapes)
    offered = {name for name, info in infos.items() if not info.not_linear}
    tables = {name for name, info in infos.items() if info.formats}
    if encoder.row in ("t5", "language", "gpt_oss"):
        assert offered - tables == (linears & set(infos)) - {"lm_head", "model.lm_head"}
        assert tables and all(name.endswith(("embed_tokens", "per_layer", "shared")) for name in tables)
        free = [info for info in infos.values() if not info.protected]
        assert free and all(info.block is not None and info.weight_only for info in free)
    else:
        assert not offered


@every_encoder
def test_quantizing_changes_nothing_that_comfyui_detects(encoder: Encoder) -> None:
    shapes, _ = layout(encoder, narrow=False)
    infos = detect(shapes, shapes).describe_file(matrices(shapes), shapes)
    for fmt, codec in FORMATS.items():
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for name, info in infos.items():
            if legal(LayerPlan(fmt, ""), info, shapes[name + ".weight"], explicit=True).format == fmt:
                for suffix, (dtype, shape) in codec.layout(shapes[name + ".weight"]).items():
                    tensors[f"{name}.{suffix}"] = torch.empty(shape, dtype=dtype, device="meta")
                tensors[f"{name}.comfy_quant"] = encode_config({"format": fmt})
        assert detected(tensors) == encoder.te, fmt


def test_a_diffusion_model_with_a_language_model_in_it_stays_one(comfy: Path) -> None:
    from comfy_classes import CASES, Built

    shapes = {f"model.{key}": shape for key, shape in Built.of(CASES["HiDreamO1"]).file_shapes.items()}
    assert detect(shapes, shapes).name == "hidream_o1"


# --- small ones, loaded by comfy.sd.load_clip


def stock(encoder: Encoder, path: Path) -> Any:
    """The CLIP object of the stock loader."""
    try:
        return load(encoder, path)
    except FileNotFoundError as e:  # a mirror of ComfyUI without its largest files
        pytest.skip(f"this checkout of ComfyUI lacks {e.filename}")


@every_small
def test_shared_inputs_are_those_of_the_running_encoder(encoder: Encoder, tmp_path: Path) -> None:
    shapes, _ = layout(encoder, narrow=True)
    path = models.save(tmp_path / "m.safetensors", random_state(shapes))
    clip = stock(encoder, path)
    seen: dict[str, bytes] = {}
    for name, module in clip.cond_stage_model.named_modules():
        if hasattr(module, "in_features") and ".transformer." in name:
            key = encoder.file_key(name.partition(".transformer.")[2])

            def watch(_: object, args: tuple[torch.Tensor, ...], key: str = key) -> None:
                seen[key] = seen.get(key, b"") + args[0].detach().float().contiguous().numpy().tobytes()

            module.register_forward_pre_hook(watch)
    encode(encoder, clip)
    with Source(path) as source:
        run = {name: info for name, info in source.layers.items() if name in seen and info.block is not None}
        assert len(run) >= sum(not i.protected and i.subgraph == "main" for i in source.layers.values()) > 0
    told, true = {}, {}
    for name, info in run.items():
        told.setdefault(info.shared_input or name, set()).add(name)
        true.setdefault((info.subgraph, info.block, seen[name]), set()).add(name)
    assert sorted(map(sorted, told.values())) == sorted(map(sorted, true.values()))


def saved(encoder: Encoder, path: Path) -> Path:
    return models.save(path, random_state(layout(encoder, narrow=True)[0], torch.bfloat16))


def errors(encoder: Encoder, source: Source, quantized: Path) -> tuple[float, float]:
    """Of the stock loader's conditioning: against the 16-bit file's, and against the decoded weights'."""
    kept = {key: tensor.bfloat16() for key, tensor in decoded(source, quantized).items()}
    beside = encode(encoder, stock(encoder, models.save(quantized.with_name("d.safetensors"), kept)))
    found, wanted = encode(encoder, stock(encoder, quantized)), encode(encoder, stock(encoder, source.path))
    return relative_error(found, wanted), relative_error(found, beside)


@pytest.mark.parametrize(
    ("encoder", "recipe"),
    [*((name, "nvfp4") for name in SMALL), *(("qwen3vl", recipe) for recipe in ("mxfp8", "fp8", "int8", "w4a8"))],
    indirect=["encoder"],
)
def test_a_file_loads_in_the_stock_loader_and_encodes_what_its_weights_say(
    encoder: Encoder, recipe: str, tmp_path: Path
) -> None:
    """Other formats: benchmarks/encoders.py."""
    with Source(saved(encoder, tmp_path / "m.safetensors")) as source:
        plan = recipes.make_plan(source, recipe)
        if any(target.missing(find_comfyui()) for target in targets.needs(plan)):
            pytest.skip("this ComfyUI cannot load the format")
        report = jobs.quantize(source, plan, tmp_path / "q.safetensors", device="cpu", verify=True)
        error, beside = errors(encoder, source, tmp_path / "q.safetensors")
    assert 0 < error < 0.6 and beside < 0.1 * error
    assert all(entry.full_precision for entry in plan.quantized().values())
    assert report.words[0] == targets.ENCODERS


@pytest.mark.parametrize("encoder", ["t5_old", "qwen35", "gemma3", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("word", ["fp8", "int8"])
def test_the_table_of_tokens_in_8_bit_is_looked_up_with_its_scales(encoder: Encoder, word: str, tmp_path: Path) -> None:
    recipe = recipes.from_convert_to_quant("nvfp4", "embed_tokens|shared", word, exclude_layers="block|layers")
    with Source(saved(encoder, tmp_path / "m.safetensors")) as source:
        plan = recipes.make_plan(source, recipe)
        (table,) = plan.quantized()
        assert source.layers[table].formats
        jobs.quantize(source, plan, tmp_path / "q.safetensors", device="cpu", verify=True)
        error, beside = errors(encoder, source, tmp_path / "q.safetensors")
    assert 0 < error < 0.05 and beside < 0.1 * error


# --- what needs no ComfyUI


def language(path: Path) -> Path:
    """Two blocks in the layout of Qwen3."""
    block = {f"self_attn.{kind}_proj": (64, 64) for kind in "qkvo"}
    block |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in block.items()}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm")
    shapes |= {f"model.layers.{i}.{name}.weight": (64,) for i in range(2) for name in norms}
    shapes |= {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,), "lm_head.weight": (256, 64)}
    return models.save(path, random_state(shapes, torch.bfloat16))


def seen(source: Source) -> Calibration:
    collector = Collector(lambda name: source.architecture.describe(name).shared_input, rows=32)
    collector.start_run("run")
    generator = torch.Generator().manual_seed(1)
    x = {width: torch.randn(64, width, generator=generator) for width in (64, 128)}
    for name in source.layers:
        rows = x[source.shape(name)[1]]
        collector.add(name, rows, rows @ source.load(name).float().T)
    collector.finish_run()
    return collector.result()


def test_no_plan_gives_inputs_a_scale_or_counts_what_rounds_them(tmp_path: Path) -> None:
    with Source(language(tmp_path / "m.safetensors")) as source:
        calibration = seen(source)
        plan = recipes.calibrated(source, recipes.make_plan(source, "fp8"), calibration)
        options = costs.with_branches(("nvfp4", "w4a8", "fp8", "int8", "bf16"), "blackwell", "4")
        how = costs.made_with(source, "blackwell", options, calibration=calibration)
        table = costs.measure(source, calibration, how, torch.device("cpu"))
        made = budget.plan(source, table, budget.Wish("bits", 7.0), calibration=calibration)
    assert how.options == ("nvfp4-w4a16", "w4a8", "fp8", "int8", "bf16")
    for entry in (*plan.quantized().values(), *made.quantized().values()):
        assert entry.full_precision and entry.input_scale is None
    speeds = {cost.speed for options in table.layers.values() for cost in options.values()}
    assert speeds == {targets.EMULATED, targets.WIDE}
    assert targets.words(made) == [targets.ENCODERS, "needs ComfyUI 0.31 or newer"]


def test_the_command_line_takes_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, plan, out = language(tmp_path / "m.safetensors"), tmp_path / "p.json", tmp_path / "q.safetensors"
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "language"
    assert main(["probe", str(source)]) == 0
    assert main(["plan", str(source), "--bits", "6", "--gpu", "blackwell", "-o", str(plan)]) == 0
    assert main(["quantize", str(source), "--plan", str(plan), "-o", str(out), "--verify"]) == 0
    assert targets.ENCODERS in capsys.readouterr().out
    assert main(["compare", str(source), str(out)]) == 0
    kept = load_file(out)
    assert kept["lm_head.weight"].dtype == kept["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("text_model.encoder.layers.0.mlp.fc1", "CLIP text encoder: ComfyUI's class for this encoder is not told of"),
        ("encoder.block.0.layer.0.SelfAttention.k", "T5 smaller than XXL: ComfyUI's class for this encoder"),
        ("vision_model.encoder.layers.0.layer_norm1", "vision encoder: ComfyUI reads no scales for vision encoders"),
        ("decoder.conv_in", "VAE: ComfyUI reads no scales for VAEs"),
    ],
)
def test_what_no_loader_reads_scales_for_is_refused(key: str, problem: str, tmp_path: Path) -> None:
    tensors = {f"{key}.weight": torch.zeros(32, 32), "encoder.layers.0.fc.weight": torch.zeros(32, 32)}
    path = models.save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CalibQuantError) as refused:
        Source(path)
    assert str(refused.value).startswith(f"{path}: {problem}") and str(refused.value).endswith(": leave it as it is")
