"""The nodes, in this process and through a real ComfyUI server, and the example workflow that ships with them."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import re
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from comfy_env import PACK_NAME, PromptInterrupted, Server, ServerError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.models.source import Source
from quant_core.planning import folds, recipes

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
NODE_IDS = [
    "CalibQuantPlan",
    "CalibQuantQuantize",
    "CalibQuantLoadPromptSet",
    "CalibQuantErrorLora",
    "CalibQuantLoadSplit",
]
WORKFLOW = "quantize_demo_model"
Graph = dict[str, Any]
pytestmark = pytest.mark.core


# --- in this process


@pytest.fixture(scope="module")
def pack(comfy: Path) -> dict[str, Any]:
    """The pack as ComfyUI loads it: its node classes by id."""
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return {name: nodes.NODE_CLASS_MAPPINGS[name] for name in NODE_IDS}


def execute(node: Any, **inputs: Any) -> tuple[Any, ...]:
    """Run a node as ComfyUI does; its outputs."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs).result


@pytest.fixture
def model_file(comfy: Path) -> Iterator[Callable[[str, models.Tensors], Path]]:
    """Save a copy of the demo model (or another model) into models/diffusion_models; removed at the end."""
    made = []

    def save(name: str, tensors: models.Tensors) -> Path:
        made.append(comfy / "models" / "diffusion_models" / name)
        return models.save(made[-1], tensors, demo_metadata())

    yield save
    for path in made:
        path.unlink()


def demo_metadata() -> dict[str, str]:
    with safe_open(DEMO, "pt") as file:
        return file.metadata()


def make_plan(pack: dict[str, Any], model_name: str, recipe: str, **inputs: Any) -> Any:
    strategy = {"strategy": "recipe", "recipe": recipe}
    return execute(pack["CalibQuantPlan"], model_name=model_name, strategy=strategy, **inputs)[0]


def test_smoothing_only_where_the_loader_reads_it(pack: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    inputs = {"model_name": MODEL, "strategy": {"strategy": "recipe", "recipe": "nvfp4"}, "pre_quant_scale": True}
    linked = SimpleNamespace(current=lambda: seen)
    if "pre_quant_scale" not in importlib.import_module("comfy.quant_ops").QUANT_ALGOS["nvfp4"]["parameters"]:  # 0.29
        with pytest.raises(Exception, match="ignores pre_quant_scale: switch it off"):
            execute(pack["CalibQuantPlan"], **inputs, calibration=linked)
    engine = pack["CalibQuantPlan"].__module__.rpartition(".nodes.")[0]
    target = importlib.import_module(f"{engine}.quant_core.planning.targets").Target
    monkeypatch.setattr(target, "missing", lambda *_: False)  # as in a core that reads it
    with pytest.raises(Exception, match="pre_quant_scale needs a calibration"):
        execute(pack["CalibQuantPlan"], **inputs)
    plan = execute(pack["CalibQuantPlan"], **inputs, calibration=linked)[0]
    assert all(entry.pre_quant_scale for entry in plan.quantized().values())


def test_a_file_that_this_core_cannot_load_is_told_by_both_nodes(pack: dict[str, Any]) -> None:
    knows = "asym_w4a8_int8" in importlib.import_module("comfy.quant_ops").QUANT_ALGOS
    strategy = {"strategy": "recipe", "recipe": "w4a8"}
    made = pack["CalibQuantPlan"].execute(model_name=MODEL, strategy=strategy)
    saved = (
        pack["CalibQuantQuantize"]
        .PREPARE_CLASS_CLONE(None)
        .EXECUTE_NORMALIZED(model_name=MODEL, plan=made.result[0], filename_prefix="test/w4a8", verify=True)
    )
    for text in (made.ui["text"][0], saved.ui["text"][0]):
        assert ("cannot load W4A8 layers: the file needs ComfyUI 0.31 or newer" in text) is not knows, text
    assert "needs ComfyUI 0.31 or newer" in saved.ui["text"][0]


def test_pack_brings_its_nodes_and_models(pack: dict[str, Any], comfy: Path) -> None:
    folder_paths = importlib.import_module("folder_paths")
    assert [node.GET_SCHEMA().node_id for node in pack.values()] == NODE_IDS
    assert all(node.GET_SCHEMA().category == "quantization/CalibQuant" for node in pack.values())
    assert MODEL in folder_paths.get_filename_list("diffusion_models")
    assert "calibquant_digits_vae.safetensors" in folder_paths.get_filename_list("vae")
    assert folder_paths.get_filename_list("calibquant_promptsets") == ["digits.safetensors"]


def described(inputs: list[Any]) -> Iterator[tuple[str, str | None]]:
    """(id, tooltip) of inputs, those of a DynamicCombo's options included."""
    for entry in inputs:
        yield entry.id, entry.tooltip
        for option in getattr(entry, "options", None) or []:
            yield from described(getattr(option, "inputs", []))


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_input_and_output_is_explained(pack: dict[str, Any], node_id: str) -> None:
    schema = pack[node_id].GET_SCHEMA()
    page = (models.ROOT / "js" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    explained = [
        *described(schema.inputs),
        *((output.display_name or output.id, output.tooltip) for output in schema.outputs),
    ]
    assert len(explained) >= 2
    for name, tooltip in explained:
        assert tooltip and len(tooltip) > 10, name
        assert f"**{name}**" in page, f"{node_id}.md does not explain {name}"
    for heading in ("## Inputs", "## Output", "## Example", "## What goes wrong"):
        assert heading in page


LORA_LAYERS = ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.2.cross_attn.v"]
RANK, ALPHA, STRENGTH = 4, 2.0, 0.75


def make_lora(path: Path, layers: list[str], seed: int = 3) -> dict[str, torch.Tensor]:
    """A LoRA file; returns what it adds to each layer's weight at full strength 1, in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in load_file(DEMO).items()}
    tensors, deltas = {}, {}
    for layer in layers:
        rows, cols = shapes[f"{layer}.weight"]
        up = torch.randn(rows, RANK, generator=generator) * 0.1
        down = torch.randn(RANK, cols, generator=generator) * 0.1
        key = f"diffusion_model.{layer}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(ALPHA)}
        deltas[layer] = ALPHA / RANK * (up @ down)
    save_file(tensors, path)
    return deltas


def load_with_lora(model_name: str, lora_name: str, strength: float = STRENGTH) -> Any:
    nodes = importlib.import_module("nodes")
    with torch.inference_mode():
        (model,) = nodes.UNETLoader().load_unet(model_name, "default")
        (patched,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_name, strength)
    return patched


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8", "fp8", "int8"])
def test_baked_lora_equals_a_lora_merged_by_hand(
    recipe: str, pack: dict[str, Any], comfy: Path, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    plan = make_plan(pack, MODEL, recipe, rotate="never")  # which layers rotate is decided on the file's own weights
    kept = next(layer for layer, entry in plan.layers.items() if entry.format == "bf16")
    layers = [*LORA_LAYERS, kept]
    deltas = make_lora(comfy / "models" / "loras" / "test.safetensors", layers)
    patched = load_with_lora(MODEL, "test.safetensors")
    name, *_ = execute(
        pack["CalibQuantQuantize"],
        model_name=MODEL,
        plan=plan,
        filename_prefix="lora/baked",
        verify=True,
        model=patched,
    )
    baked = load_file(comfy / "output" / "diffusion_models" / name)

    merged = load_file(DEMO)
    for layer in layers:
        weight = merged[f"{layer}.weight"].float() + STRENGTH * deltas[layer]
        merged[f"{layer}.weight"] = weight if layer in LORA_LAYERS else weight.to(merged[f"{layer}.weight"].dtype)
    by_hand = models.save(tmp_path / "merged.safetensors", merged, demo_metadata())
    with Source(by_hand) as source:
        jobs.quantize(source, recipes.make_plan(source, recipe), tmp_path / "q.safetensors", rounding="auto")
    expected, plain = load_file(tmp_path / "q.safetensors"), load_file(DEMO)

    assert baked.keys() == expected.keys()
    different = [key for key in baked if not torch.equal(_bytes(baked[key]), _bytes(expected[key]))]
    assert not different
    assert not torch.equal(baked[f"{kept}.weight"], plain[f"{kept}.weight"])  # the LoRA reached the kept layer too


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_lora_is_baked_in_before_folding(pack: dict[str, Any], comfy: Path) -> None:
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    with pytest.raises(Exception, match="smooth needs a calibration"):
        make_plan(pack, MODEL, "nvfp4", smooth="fold")
    plan = make_plan(pack, MODEL, "nvfp4", smooth="fold", calibration=SimpleNamespace(current=lambda: seen))
    with Source(DEMO) as source:
        change = folds.merge(source, plan.folds)
    layers = [name for name in plan.quantized() if f"{name}.weight" in change][:3]
    deltas = make_lora(comfy / "models" / "loras" / "fold.safetensors", layers)
    name, report, _ = execute(
        pack["CalibQuantQuantize"],
        model_name=MODEL,
        plan=plan,
        filename_prefix="lora/fold",
        verify=True,
        model=load_with_lora(MODEL, "fold.safetensors"),
        rounding="nearest",
    )
    assert "folded smoothing: " in report.summary() and report.folds == plan.folds and len(deltas) == 3
    with Source(DEMO) as source:
        for layer, delta in deltas.items():
            wanted = change[f"{layer}.weight"](source.load(layer).float() + STRENGTH * delta)
            (made,) = [one for one in report.layers if one.name == layer]
            found = reference.File(comfy / "output" / "diffusion_models" / name).decode(
                layer, "nvfp4", tuple(wanted.shape)
            )
            assert reference.relative_error(wanted, found) == pytest.approx(made.error, rel=1e-3)


def test_lora_changes_the_provenance(pack: dict[str, Any], comfy: Path) -> None:
    plan, seen = make_plan(pack, MODEL, "fp8"), set()
    for seed in (1, 2):
        make_lora(comfy / "models" / "loras" / f"{seed}.safetensors", LORA_LAYERS, seed)
        for model in (None, load_with_lora(MODEL, f"{seed}.safetensors")):
            name, *_ = execute(
                pack["CalibQuantQuantize"],
                model_name=MODEL,
                plan=plan,
                filename_prefix="lora/hash",
                verify=False,
                model=model,
            )
            with safe_open(comfy / "output" / "diffusion_models" / name, "pt") as file:
                seen.add(json.loads(file.metadata()["calibquant"])["merged_patches_sha256"])
    assert len(seen) == 3  # none, and two LoRAs


def test_a_bypass_lora_is_not_lost_in_silence(pack: dict[str, Any], comfy: Path) -> None:
    make_lora(comfy / "models" / "loras" / "bypass.safetensors", LORA_LAYERS)
    load = importlib.import_module("comfy.sd").load_bypass_lora_for_models
    lora = load_file(comfy / "models" / "loras" / "bypass.safetensors")
    model, _ = load(load_with_lora(MODEL, "bypass.safetensors"), None, lora, 1.0, 0.0)
    with pytest.raises(Exception, match=r"the linked MODEL runs a bypass LoRA.* Load LoRA \(Model Only\)"):
        save_model(pack, model, make_plan(pack, MODEL, "nvfp4"))


def test_model_of_another_file_is_one_clear_error(
    pack: dict[str, Any], comfy: Path, model_file: Callable[..., Path]
) -> None:
    short = {key: tensor for key, tensor in load_file(DEMO).items() if not key.startswith("blocks.5.")}
    model_file("short.safetensors", short)
    make_lora(comfy / "models" / "loras" / "last.safetensors", ["blocks.5.ffn.0"])
    linked = load_with_lora(MODEL, "last.safetensors")
    plan = make_plan(pack, "short.safetensors", "nvfp4")
    untold = linked.clone()
    untold.cached_patcher_init = None  # as a loader of another pack may leave it
    for model, message in (
        (linked, rf"the linked MODEL was loaded from another file \({MODEL}\).* \(short\.safetensors\)$"),
        (untold, r"blocks\.5\.ffn\.0.*load the MODEL from the same file \(short\.safetensors\)$"),
    ):
        with pytest.raises(Exception, match=message) as e:
            save_model(pack, model, plan, "short.safetensors", "another/x")
        assert type(e.value).__name__ == CalibQuantError.__name__ and "\n" not in str(e.value)
    assert not list((comfy / "output" / "diffusion_models" / "another").iterdir())


def save_model(pack: dict[str, Any], model: Any, plan: Any, name: str = MODEL, prefix: str = "linked/x") -> Any:
    inputs = {"model_name": name, "plan": plan, "filename_prefix": prefix, "verify": False, "model": model}
    with torch.inference_mode():
        return pack["CalibQuantQuantize"].PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


def test_a_finetune_of_the_same_shapes_is_not_the_linked_model(
    pack: dict[str, Any], comfy: Path, model_file: Callable[..., Path]
) -> None:
    tensors = load_file(DEMO)
    model_file("tune.safetensors", {**tensors, "blocks.0.ffn.0.weight": tensors["blocks.0.ffn.0.weight"] * 2})
    make_lora(comfy / "models" / "loras" / "tune.safetensors", LORA_LAYERS)
    plain, patched = (load_with_lora("tune.safetensors", "tune.safetensors", n) for n in (0.0, STRENGTH))
    assert not plain.patches and patched.patches
    for model in (plain, patched):
        with pytest.raises(Exception, match=rf"another file \(tune\.safetensors\).* \({MODEL}\)$"):
            save_model(pack, model, make_plan(pack, MODEL, "nvfp4"))


def test_a_quantized_linked_model_is_refused(pack: dict[str, Any], comfy: Path) -> None:
    plan = make_plan(pack, MODEL, "nvfp4")
    name = save_model(pack, None, plan, prefix="linked/small").result[0]
    make_lora(comfy / "models" / "loras" / "on_small.safetensors", LORA_LAYERS)
    linked = load_with_lora(name, "on_small.safetensors")
    with pytest.raises(Exception, match=rf"another file \({Path(name).name}\).* \({MODEL}\)$"):
        save_model(pack, linked, plan)
    linked.cached_patcher_init = None
    with pytest.raises(Exception, match=rf"the linked MODEL is quantized already.* \({MODEL}\)$"):
        save_model(pack, linked, plan)


def test_a_linked_model_without_a_file_is_compared_by_shapes_and_says_so(pack: dict[str, Any], comfy: Path) -> None:
    make_lora(comfy / "models" / "loras" / "untold.safetensors", LORA_LAYERS)
    linked, plan = load_with_lora(MODEL, "untold.safetensors"), make_plan(pack, MODEL, "fp8")
    told = save_model(pack, linked, plan).ui["text"][0]
    assert "baked in: what LoRA and merge nodes changed, 3 tensors" in told and "which file" not in told
    linked.cached_patcher_init = None
    assert "does not say which file it came from" in save_model(pack, linked, plan).ui["text"][0]


def test_cancel_during_verify_leaves_nothing_behind(
    pack: dict[str, Any], comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    management, seen, told = importlib.import_module("comfy.model_management"), [], []
    folder = comfy / "output" / "diffusion_models" / "cancelled"
    feedback = sys.modules[pack["CalibQuantQuantize"].__module__].feedback

    def cancel_once_written() -> None:
        if told:
            seen.extend(folder.iterdir())
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancel_once_written)
    monkeypatch.setattr(feedback, "show", lambda _, text: told.append(text) if text.startswith("verifying") else None)
    with pytest.raises(management.InterruptProcessingException):
        execute(
            pack["CalibQuantQuantize"],
            model_name=MODEL, plan=make_plan(pack, MODEL, "fp8"), filename_prefix="cancelled/x", verify=True,
        )  # fmt: skip
    assert {path.suffix for path in seen} == {".partial", ".journal"} and not list(folder.iterdir())


@pytest.mark.parametrize(
    "prefix",
    ["../outside", "a/../../outside", "", "name/..", ".", "a/./b", "/etc/x", "a:b*?", "a\0b", "a\nb", "x" * 300],
)
def test_prefix_cannot_leave_the_output_folder(prefix: str, pack: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"filename_prefix .* is no name inside output/diffusion_models"):
        execute(
            pack["CalibQuantQuantize"],
            model_name=MODEL, plan=make_plan(pack, MODEL, "fp8"), filename_prefix=prefix, verify=False,
        )  # fmt: skip


def test_changed_file_is_planned_again(pack: dict[str, Any], model_file: Callable[..., Path]) -> None:
    path = model_file("changing.safetensors", load_file(DEMO))
    node, strategy = pack["CalibQuantPlan"], {"strategy": "recipe", "recipe": "nvfp4"}
    before = node.fingerprint_inputs(model_name="changing.safetensors", strategy=strategy)
    assert node.fingerprint_inputs(model_name="changing.safetensors", strategy=strategy) == before
    tensors = load_file(path)
    models.save(path, {**tensors, "head.head.weight": tensors["head.head.weight"].float()}, demo_metadata())
    assert node.fingerprint_inputs(model_name="changing.safetensors", strategy=strategy) != before


def test_patterns_decide_as_convert_to_quant(pack: dict[str, Any]) -> None:
    strategy = {"strategy": "convert_to_quant", "base": "nvfp4", "custom_layers": r"ffn\.0", "custom_type": "mxfp8"}
    (plan,) = execute(pack["CalibQuantPlan"], model_name=MODEL, strategy={**strategy, "exclude_layers": r"blocks\.0\."})
    formats = {layer: entry.format for layer, entry in plan.layers.items()}
    assert formats["blocks.0.ffn.0"] == "mxfp8"  # custom layers win
    assert formats["blocks.0.ffn.2"] == "bf16"
    assert formats["blocks.1.ffn.2"] == "nvfp4"


def test_a_pattern_that_matches_nothing_is_said_on_the_node(pack: dict[str, Any]) -> None:
    words = {"base": "nvfp4", "custom_layers": "", "custom_type": "mxfp8", "exclude_layers": "bloks"}
    node = pack["CalibQuantPlan"].execute(model_name=MODEL, strategy={"strategy": "convert_to_quant", **words})
    assert "warning: the pattern 'bloks' (excluded layer) matches no layer" in node.ui["text"][0]


@pytest.mark.parametrize("kind", ["size", "bits", "max_error"])
def test_plans_for_a_budget(pack: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within it, with the curve on the node; another amount measures nothing anew."""
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    node, linked = pack["CalibQuantPlan"], SimpleNamespace(current=lambda: seen)
    costs = importlib.import_module(f"{node.__module__.rpartition('.nodes.')[0]}.quant_core.planning.costs")
    measured, original = [], costs.measure
    monkeypatch.setattr(costs, "measure", lambda *words, **more: measured.append(1) or original(*words, **more))
    words = {"strategy": kind, "gpu": "blackwell", "formats": "nvfp4,bf16", "weighting": "auto", "tie": False}
    for amount in {"size": (0.0018, 0.002), "bits": (7.0, 8.0), "max_error": (0.003, 0.002)}[kind]:
        done = node.execute(
            model_name=MODEL, strategy={**words, kind: amount, "max_slow": 1.0}, calibration=linked, input_scale=True
        )
        plan, said = done.result[0], done.ui["text"][0]
        assert "size and least error" in said and "on Blackwell: of the linear work " in said
        if kind == "max_error":
            assert plan.predicted["error"] <= amount
        else:
            assert plan.size <= amount * 1e9 if kind == "size" else plan.predicted["bits"] <= amount
    assert len(measured) <= 1
    assert plan.calibration and all(entry.input_scale for entry in plan.quantized().values())


def test_a_calibration_is_linked_once(pack: dict[str, Any]) -> None:
    """To the plan; Save Quantized Model takes it from there, GPTQ included."""
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    strategy = {"strategy": "recipe", "recipe": "int8"}
    linked = SimpleNamespace(current=lambda: seen)
    (plan,) = execute(pack["CalibQuantPlan"], model_name=MODEL, strategy=strategy, calibration=linked)
    words = {"model_name": MODEL, "filename_prefix": "test/once", "verify": False, "rounding": "gptq"}
    _, report, _ = execute(pack["CalibQuantQuantize"], plan=plan, **words)
    assert {"gptq+bias"} <= {layer.rounding for layer in report.layers} and report.runs == 20


def test_errors_are_in_the_nodes_words(pack: dict[str, Any]) -> None:
    """Every message of the engine, and every node of the pack."""
    words = importlib.import_module(
        f"{pack['CalibQuantPlan'].__module__.rpartition('.')[0]}.comfyui.feedback"
    ).node_words
    raised = [text for path in (models.ROOT / "quant_core").rglob("*.py") for text in messages(path)]
    assert len(raised) > 100
    told = [words(f"/a folder/of mine/m.safetensors: {text}") for text in raised]
    assert not [text for text in told if "--" in text or "/a folder" in text or not text.endswith("(m.safetensors)")]
    assert words("/x/m.safetensors: is truncated: download it") == "the file is truncated: download it (m.safetensors)"
    assert words("--keep-ratio 2: must lie between 0 and 1") == "keep_ratio 2: must lie between 0 and 1"
    nodes = importlib.import_module(pack["CalibQuantPlan"].__module__.rpartition(".")[0]).NODES
    assert all(hasattr(node.execute, "__wrapped__") for node in nodes)


def messages(path: Path) -> Iterator[str]:
    """The fixed words of what a module raises, {} for what it fills in."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = node.exc.args[0]
            if isinstance(text, ast.Constant):
                yield str(text.value)
            elif isinstance(text, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in text.values)


# --- through a real server


def api_twin() -> Graph:
    return json.loads((models.ROOT / "workflows" / "api" / f"{WORKFLOW}.json").read_text(encoding="utf-8"))


def of_type(graph: Graph, class_type: str) -> str:
    """The id of the first node of that type."""
    return next(node_id for node_id, node in graph.items() if node["class_type"] == class_type)


def quantize_graph(model_name: str = MODEL, recipe: str = "nvfp4", prefix: str = "test/model") -> Graph:
    plan = {"model_name": model_name, "strategy": "recipe", "strategy.recipe": recipe}
    save = {"model_name": model_name, "plan": ["1", 0], "filename_prefix": prefix, "verify": True}
    return {
        "1": {"class_type": "CalibQuantPlan", "inputs": plan},
        "2": {"class_type": "CalibQuantQuantize", "inputs": save},
    }


def unet_names(server: Server) -> list[str]:
    info = server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    return info[1]["options"] if info[0] == "COMBO" else info[0]


def test_workflow_runs_and_its_file_is_selectable(server: Server) -> None:
    graph = api_twin()
    graph[of_type(graph, "CalibQuantQuantize")]["inputs"]["filename_prefix"] = "twin/digits"
    outputs = server.post(graph)["outputs"]
    (text,) = outputs[of_type(graph, "CalibQuantQuantize")]["text"]
    name = text.splitlines()[0]
    assert name == str(Path("twin") / "digits_00001_.safetensors")
    assert re.search(r"3\.58 MB → 1\.35 MB \(−62 %\)", text) and "layers: 60 NVFP4 · 6 BF16" in text
    assert "worst layer: blocks." in text
    assert (server.output_dir / "diffusion_models" / name).is_file()
    assert name in unet_names(server)
    pictures = [node["images"] for node in outputs.values() if "images" in node]
    assert [len(images) for images in pictures] == [1, 1]
    files = [server.base_dir / "temp" / images[0]["subfolder"] / images[0]["filename"] for images in pictures]
    assert files[0].read_bytes() != files[1].read_bytes()  # the 16-bit picture and the quantized one


def test_saving_again_takes_the_next_number(server: Server) -> None:
    for recipe, number in (("fp8", 1), ("int8", 2)):
        (text,) = server.post(quantize_graph(recipe=recipe, prefix="again/m"))["outputs"]["2"]["text"]
        assert text.splitlines()[0] == str(Path("again") / f"m_{number:05}_.safetensors")


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [("1", "model_name", "none.safetensors"), ("1", "strategy.recipe", "nvfp2"), ("2", "verify", [])],
)
def test_wrong_value_is_refused_with_its_node(server: Server, node: str, name: str, value: object) -> None:
    graph = quantize_graph()
    graph[node]["inputs"][name] = value
    with pytest.raises(ServerError, match=r"prompt refused \(400\)") as e:
        server.submit(graph)
    errors = json.loads(str(e.value).split(": ", 1)[1].split("\n")[0])["node_errors"]
    assert node in errors and name.split(".")[-1] in json.dumps(errors[node]["errors"])


@pytest.mark.parametrize("value", ["nonsense", ["1", 0], 3])
def test_unknown_strategy_is_one_clear_error(server: Server, value: object) -> None:
    graph = quantize_graph()
    graph["1"]["inputs"]["strategy"] = value
    with pytest.raises(ServerError, match=r"strategy") as e:
        server.post(graph)
    assert "strategy is none of recipe, convert_to_quant" in str(e.value) or "prompt refused (400)" in str(e.value)


def test_a_deleted_output_is_made_again(server: Server) -> None:
    graph = quantize_graph(prefix="deleted/m")
    load = {"calibration_name": "digits.calibration.safetensors"}
    save = {"calibration": ["3", 0], "filename_prefix": "deleted/c", "merge_with": "none"}
    graph["3"] = {"class_type": "CalibQuantLoadCalibration", "inputs": load}
    graph["4"] = {"class_type": "CalibQuantSaveCalibration", "inputs": save}
    folders = [server.output_dir / "diffusion_models" / "deleted", server.output_dir / "calibrations" / "deleted"]
    server.post(graph)
    server.post(graph)
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]  # nothing changed: nothing is done twice
    for folder in folders:
        next(folder.iterdir()).unlink()
    server.post(graph)
    server.post(graph)
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]
    other = {**graph, "1": {**graph["1"], "inputs": {**graph["1"]["inputs"], "strategy.recipe": "fp8"}}}
    server.post(other)
    next(folders[0].glob("*_00001_*")).unlink()  # that of the other plan
    server.post(other)
    assert [path.name for path in folders[0].iterdir()] == ["m_00002_.safetensors"]


def test_missing_plan_is_refused(server: Server) -> None:
    graph = quantize_graph()
    del graph["2"]["inputs"]["plan"]
    with pytest.raises(ServerError, match=r"prompt refused \(400\).*plan"):
        server.submit(graph)


def failing_graphs() -> Iterator[tuple[str, Graph, str]]:
    prompt = {"class_type": "CalibQuantLoadPromptSet", "inputs": {"prompt_set": "digits.safetensors", "index": 10}}
    show = {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}
    yield (
        "index",
        {"1": prompt, "2": show},
        r"the file has 10 prompts: index 10 must be below that \(digits\.safetensors\)",
    )
    graph = quantize_graph()
    words = {"base": "nvfp4", "custom_layers": "(", "custom_type": "mxfp8", "exclude_layers": ""}
    graph["1"]["inputs"] |= {"strategy": "convert_to_quant", **{f"strategy.{k}": v for k, v in words.items()}}
    yield "pattern", graph, r"layer pattern '\(' is no regular expression"
    yield (
        "family",
        quantize_graph(recipe="zimage-nvfp4-mixed"),
        r"recipe zimage-nvfp4-mixed is for zimage, this file is",
    )


@pytest.mark.parametrize(("graph", "message"), [pytest.param(g, m, id=name) for name, g, m in failing_graphs()])
def test_problem_is_our_own_single_line(server: Server, graph: Graph, message: str) -> None:
    with pytest.raises(ServerError, match=rf"^node \d+ \(CalibQuant\w+\): [^\n]*{message}[^\n]*\n"):
        server.post(graph)


@pytest.fixture(scope="module")
def large(server: Server) -> Iterator[str]:
    """A model of 170 M parameters, a second and more of work, known to the server."""
    path = server.base_dir / "models" / "diffusion_models" / "large.safetensors"
    models.save(path, models.zimage(dim=1024, ffn=4096, layers=10))
    yield path.name
    path.unlink()


def test_interrupt_leaves_nothing_behind(server: Server, large: str) -> None:
    folder = server.output_dir / "diffusion_models" / "interrupted"
    prompt = server.submit(quantize_graph(large, "nvfp4", "interrupted/x"))
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(folder.glob("*.partial")), "the file was never begun"
    began = time.monotonic()
    server.interrupt()
    with pytest.raises(PromptInterrupted):
        server.wait(prompt)
    assert time.monotonic() - began < 5
    assert not list(folder.iterdir())
    assert not any(name.startswith("interrupted") for name in unet_names(server))


def test_progress_and_status_reach_the_page(server: Server, large: str) -> None:
    events = asyncio.run(_watch(server, quantize_graph(large, "mxfp8", "progress/m")))
    mine = [(kind, data) for kind, data in events if data.get("node") == "2"]
    bar = [(data["value"], data["max"]) for kind, data in mine if kind == "progress"]
    assert len(bar) >= 3 and bar == sorted(bar)
    assert 0.5 < bar[-1][0] / bar[-1][1] <= 1  # saving is the first half, verifying the second
    texts = [data["text"] for kind, data in mine if kind == "calibquant.text"]
    assert list(dict.fromkeys(text.split()[0] for text in texts)) == ["quantizing", "verifying"]
    assert any(re.fullmatch(r"quantizing large\.safetensors: layer \d+ of 71\b.*", text) for text in texts), texts
    results = [data["output"]["text"][0] for kind, data in mine if kind == "executed"]
    assert len(results) == 1 and "MXFP8" in results[0]


async def _watch(server: Server, graph: Graph) -> list[tuple[str, dict[str, Any]]]:
    """All events of a prompt as a page sees them."""
    aiohttp = pytest.importorskip("aiohttp")  # comes with ComfyUI
    client, events = uuid.uuid4().hex, []
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId={client}") as socket:
        async with session.post(f"{server.url}/prompt", json={"prompt": graph, "client_id": client}) as answer:
            assert answer.status == 200, await answer.text()
        while True:
            message = await asyncio.wait_for(socket.receive(), timeout=60)
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            events.append((event["type"], event["data"]))
            if event["type"] in ("execution_success", "execution_error"):
                return events


# --- what ships with the pack


def test_template_help_and_script_are_served(server: Server) -> None:
    shipped = sorted(path.stem for path in (models.ROOT / "workflows").glob("*.json"))
    assert WORKFLOW in shipped
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == shipped
    for name in shipped:
        assert _size(server, f"/api/workflow_templates/{PACK_NAME}/{name}.json") > 1000
        assert 1000 < _size(server, f"/api/workflow_templates/{PACK_NAME}/{name}.jpg") < 60_000
    ours = (path for path in server.get("/extensions") if path.startswith(f"/extensions/{PACK_NAME}/"))
    scripts = {path.relative_to(models.ROOT / "js").as_posix() for path in (models.ROOT / "js").rglob("*.js")}
    assert sorted(path.split("/", 3)[3] for path in ours) == sorted(scripts)  # each once
    assert "heatmap/grid.js" in scripts
    for node_id in NODE_IDS:
        assert _size(server, f"/extensions/{PACK_NAME}/docs/{node_id}.md") > 500


def _size(server: Server, path: str) -> int:
    with urllib.request.urlopen(server.url + path, timeout=30) as response:
        return len(response.read())


def test_loader_takes_the_saved_name_by_a_link() -> None:
    twin = api_twin()
    linked = [node["inputs"]["unet_name"] for node in twin.values() if node["class_type"] == "UNETLoader"]
    assert [of_type(twin, "CalibQuantQuantize"), 0] in linked and MODEL in linked


def test_the_workflow_saves_a_split_and_loads_it_both_ways(server: Server) -> None:
    graph = json.loads((models.ROOT / "workflows" / "api" / "split_demo_model.json").read_text("utf-8"))
    (save,) = (name for name, node in graph.items() if node["class_type"] == "CalibQuantQuantize")
    outputs = server.post(graph)["outputs"]
    text = outputs[save]["text"][0]
    assert "wrong without its LoRA" in text and "Load Split Model" in text
    main, branch = (
        next((server.output_dir / folder / "calibquant").glob(f"digits_*_.split{end}"))
        for folder, end in (("diffusion_models", ".safetensors"), ("loras", ".lora.safetensors"))
    )
    assert branch.name == main.name.replace(".split", ".split.lora")  # one number for the two
    by_node, by_stock, original = (
        _pixels(server, outputs[_picture_of(graph, loader)])
        for loader in ("CalibQuantLoadSplit", "LoraLoaderBypassModelOnly", "UNETLoader")
    )
    assert (by_node == by_stock).all() and 0 < np.abs(by_node - original).mean() < 2  # of 255
    branch.unlink()
    again = server.post(graph)["outputs"]  # not from the cache: one of its files is gone
    assert "wrong without its LoRA" in again[save]["text"][0]


def test_linked_names_are_cached_and_an_error_lora_is_made_of_what_was_saved(server: Server) -> None:
    graph = quantize_graph(prefix="linked/m")
    words = {"model_name": MODEL, "quantized_name": ["2", 0], "rank": 2, "filename_prefix": "linked/error"}
    graph["3"] = {"class_type": "CalibQuantErrorLora", "inputs": words}
    (text,) = server.post(graph)["outputs"]["3"]["text"]
    assert "bypass" in text
    folder = server.output_dir / "loras" / "linked"
    server.post(graph)
    assert len(list(folder.glob("error*.safetensors"))) == 1  # the second time nothing had changed


def _picture_of(graph: Graph, loader: str) -> str:
    """The PreviewImage of the row whose sampler this kind of loader feeds."""

    def before(name: str, key: str) -> str:
        return graph[name]["inputs"][key][0]

    previews = (name for name, node in graph.items() if node["class_type"] == "PreviewImage")
    rows = {name: before(before(before(before(name, "images"), "image"), "samples"), "model") for name in previews}
    (found,) = (name for name, model in rows.items() if graph[model]["class_type"] == loader)
    return found


def _pixels(server: Server, output: dict[str, Any]) -> np.ndarray:
    (image,) = output["images"]
    with Image.open(server.base_dir / "temp" / image["subfolder"] / image["filename"]) as file:
        return np.asarray(file.convert("L"), dtype=float)
