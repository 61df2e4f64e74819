"""Text encoders: known as ComfyUI knows them, weights only, loaded by its own CLIP loader in every format."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from small_encoders import ENCODERS, Encoder, Shapes, detected, encode, layout, load, random_state
from small_models import decoded, relative_error

from quant_core import jobs
from quant_core.formats import FORMATS
from quant_core.locate import find_comfyui
from quant_core.models.architectures import detect, split_prefix
from quant_core.models.source import Source
from quant_core.planning import recipes, targets
from quant_core.planning.layout import encode_config
from quant_core.planning.recipes import legal
from quant_core.rounding.layerplan import LayerPlan

pytestmark = pytest.mark.core

SMALL = [name for name, encoder in ENCODERS.items() if encoder.narrow is not None]
RECIPES = ("nvfp4", "mxfp8", "fp8", "int8", "w4a8")


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


@every_small
def test_shared_inputs_are_those_of_the_running_encoder(encoder: Encoder, tmp_path: Path) -> None:
    shapes, _ = layout(encoder, narrow=True)
    path = models.save(tmp_path / "m.safetensors", random_state(shapes))
    clip = load(encoder, path)
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


@every_small
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_loads_in_the_stock_loader_and_encodes_what_its_weights_say(
    encoder: Encoder, recipe: str, tmp_path: Path
) -> None:
    """Other figures: benchmarks/encoders.py."""
    shapes, _ = layout(encoder, narrow=True)
    with Source(models.save(tmp_path / "m.safetensors", random_state(shapes))) as source:
        plan = recipes.make_plan(source, recipe)
        if any(target.missing(find_comfyui()) for target in targets.needs(plan)):
            pytest.skip("this ComfyUI cannot load the format")
        report = jobs.quantize(source, plan, tmp_path / "q.safetensors", device="cpu", verify=True)
        models.save(tmp_path / "d.safetensors", decoded(source, tmp_path / "q.safetensors"))
        wanted = encode(encoder, load(encoder, source.path))
    assert all(entry.full_precision for entry in plan.quantized().values())
    assert report.words[0] == targets.ENCODERS
    found = encode(encoder, load(encoder, tmp_path / "q.safetensors"))
    beside = encode(encoder, load(encoder, tmp_path / "d.safetensors"))
    assert relative_error(found, beside) < 1e-9
    assert 0 < relative_error(found, wanted) < 0.4
