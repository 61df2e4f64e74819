"""Quantize Model: from a card to a plan, and the one node through a real server; data beside the words of nodes."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from comfy_env import Server, find_comfyui
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration, probe
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.sensitivity import LayerSensitivity
from quant_core.models.source import Source
from quant_core.planning import costs, easy, targets
from quant_core.planning.plan import Plan
from quant_core.rounding.pack import pick_device

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"
NODE_IDS = ["CalibQuantEasy", "CalibQuantPlan", "CalibQuantQuantize", "CalibQuantPromptSet"]
LAYERS = 66  # Linears of the demo model, 60 of them in blocks
Graph = dict[str, Any]
pytestmark = pytest.mark.core


# --- from a card to a plan


@pytest.fixture(scope="module")
def seen() -> Calibration:
    return calibration.load(CALIBRATION)


@pytest.fixture
def core(tmp_path: Path) -> Callable[[str], Path]:
    """A ComfyUI whose loader's text has these words."""

    def make(words: str) -> Path:
        (tmp_path / "comfy").mkdir(exist_ok=True)
        (tmp_path / "comfy" / "quant_ops.py").write_text(words)
        return tmp_path

    return make


EIGHT_BITS = {"int8_tensorwise", "int8_convrot"}
OLD, NEW = "", '"asym_w4a8_int8"'  # what 0.31 added


def plan_for(
    choice: str, core: Path, found: Calibration | None = None, size: float = 0.0, file: Path = DEMO
) -> tuple[Plan, str, list[costs.CostTable]]:
    """The plan, what is said of it, and the tables that were asked for."""
    tables: list[costs.CostTable] = []
    with Source(file) as source:

        def tabled(how: costs.MadeWith) -> costs.CostTable:
            words = (source, found, how, pick_device("cpu"))
            tables.append(costs.measure(*words) if found else costs.guess(source, probe.probe(file), how))
            return tables[-1]

        card = easy.card_of(choice)
        made, notes = easy.plan(source, card, calibration=found, size=size, comfyui=core, tabled=tabled)
        assert made.gpu == card.gpu
        return made, "\n".join(notes), tables


@pytest.mark.parametrize(
    ("choice", "words", "calibrated", "formats"),
    [
        ("RTX 40", OLD, True, {"float8_e4m3fn"}),
        ("RTX 40", OLD, False, {"int8_tensorwise", "int8_convrot"}),
        ("RTX 30", NEW, True, {"asym_w4a8_int8"}),
        ("RTX 30", NEW, False, {"asym_w4a8_int8"}),
        ("RTX 30", OLD, True, {"int8_tensorwise", "int8_convrot"}),
        ("RTX 20", NEW, False, {"int8_tensorwise", "int8_convrot"}),
        ("smallest file", NEW, True, {"asym_w4a8_int8"}),
        ("smallest file", OLD, True, {"nvfp4"}),
    ],
)
def test_a_card_gets_what_it_multiplies_natively(
    choice: str, words: str, calibrated: bool, formats: set[str], seen: Calibration, core: Callable[[str], Path]
) -> None:
    made, notes, _ = plan_for(choice, core(words), seen if calibrated else None)
    assert set(made.count()) - {"bf16"} <= formats and len(made.quantized()) == 60
    assert ("cannot load W4A8, which needs 0.31" in notes) is (words == OLD and choice in ("RTX 30", "smallest file"))
    four_bits = formats & {"nvfp4", "asym_w4a8_int8"}
    assert ("no calibration is linked" in notes) is (bool(four_bits) and not calibrated)
    assert notes.startswith("why: ")
    if formats == {"float8_e4m3fn"}:
        assert all(entry.input_scale and not entry.full_precision for entry in made.quantized().values())


def test_rtx_50_mixes_by_the_best_that_is_known(seen: Calibration, core: Callable[[str], Path], tmp_path: Path) -> None:
    """Sensitivities, else the family's published mix, else output variance, else weight errors."""
    loud = "blocks.3.ffn.0"
    gains = {name: LayerSensitivity(seen.rows_of(name)[:64], gain=1e6 if name == loud else 1.0) for name in seen.layers}
    found = {}
    for name, known in (("gradient", replace(seen, sensitivities=gains)), ("hswq", seen), ("uniform", None)):
        found[name], notes, _ = plan_for("RTX 50", core(OLD), known)
        assert found[name].predicted["weighting"] == name and found[name].predicted["bits"] <= 5.5
        assert set(found[name].count()) == {"nvfp4", "mxfp8", "bf16"}
        assert ("with a calibration with sensitivities linked" in notes) is (name != "gradient")
    assert found["gradient"].layers[loud].format == "mxfp8"
    published, _, tables = plan_for("RTX 50", core(OLD), file=models.save(tmp_path / "z.safetensors", models.zimage()))
    assert published.recipe == "zimage-nvfp4-mixed" and not tables


def test_closest_takes_in_every_layer_the_8_bits_that_err_least(seen: Calibration, core: Callable[[str], Path]) -> None:
    made, _, (table,) = plan_for("closest to the original", core(NEW), seen)
    option_of = {fmt: option for option, (fmt, weight_only) in costs.OPTIONS.items() if not weight_only}
    for name, choices in table.layers.items():
        assert option_of[made.layers[name].format] == min(choices, key=lambda o: choices[o].error), name
    assert set(made.count()) <= {"float8_e4m3fn", "int8_tensorwise", "int8_convrot", "mxfp8", "bf16"}


def test_a_size_is_kept_in_formats_that_are_fast_on_the_card(seen: Calibration, core: Callable[[str], Path]) -> None:
    size = 1.6e6
    made, _, _ = plan_for("RTX 30", core(NEW), size=size)
    assert 0.97 * size < made.size <= size
    assert {targets.speed(entry, "ampere") for entry in made.quantized().values()} == {targets.NATIVE}
    with pytest.raises(CalibQuantError, match=r"a file of 1600000 bytes cannot be had: the smallest .* is \d+ bytes"):
        plan_for("RTX 20", core(NEW), size=size)  # INT8 has 2.07 MB


def test_this_machine_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in targets.GPUS:
        monkeypatch.setattr(easy, "this_gpu", lambda gpu=gpu: gpu)
        card = easy.card_of(easy.THIS_MACHINE)
        assert card.gpu == gpu and card.ways[-1].needs == ""
    assert easy.card_of("RTX 30").gpu == "ampere"
    for card in easy.CARDS.values():
        assert all(way.why and bool(way.recipe) != bool(way.options) for way in card.ways)


@pytest.mark.parametrize(
    ("recipe", "found", "words"),
    [
        ("nvfp4", None, "fast on RTX 50"),
        ("w4a8", None, "fast on RTX 30 and newer"),
        ("fp8", True, "fast on RTX 40 and newer"),
        ("fp8", None, "no faster than 16 bit"),  # weight-only
    ],
)
def test_words_on_speed(recipe: str, found: bool | None, words: str, seen: Calibration) -> None:
    with Source(DEMO) as source:
        made = easy.recipes.make_plan(source, recipe)
        assert targets.fast_on(easy.recipes.calibrated(source, made, seen) if found else made) == words


# --- in this process


@pytest.fixture(scope="module")
def pack(comfy: Path) -> dict[str, Any]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return {name: nodes.NODE_CLASS_MAPPINGS[name] for name in NODE_IDS}


@pytest.fixture
def saved(comfy: Path) -> Iterator[Path]:
    """The folder that the node saves in, emptied."""
    folder = comfy / "output" / "diffusion_models" / "calibquant"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    yield folder


def run(node: Any, **inputs: Any) -> Any:
    """Run a node as ComfyUI does."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


def quantize(pack: dict[str, Any], **inputs: Any) -> tuple[str, dict[str, Any]]:
    """Quantize Model: its text and its data."""
    done = run(pack["CalibQuantEasy"], **{"model_name": MODEL, "card": "RTX 40", **inputs}).ui
    return done["text"][0], done["calibquant_result"][0]


def linked(found: Calibration) -> SimpleNamespace:
    return SimpleNamespace(current=lambda: found)


def with_lora(comfy: Path, strength: float) -> Any:
    nodes, generator = importlib.import_module("nodes"), torch.Generator().manual_seed(1)
    key = "diffusion_model.blocks.0.ffn.0"
    up, down = load_file(DEMO)["blocks.0.ffn.0.weight"].shape
    factors = {f"{key}.lora_up.weight": (up, 4), f"{key}.lora_down.weight": (4, down)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in factors.items()}
    save_file(tensors, comfy / "models" / "loras" / "easy.safetensors")
    with torch.inference_mode():
        (model,) = nodes.UNETLoader().load_unet(MODEL, "default")
        return nodes.LoraLoaderModelOnly().load_lora_model_only(model, "easy.safetensors", strength)[0]


def test_the_same_job_is_not_done_twice(pack: dict[str, Any], comfy: Path, saved: Path, seen: Calibration) -> None:
    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}

    text, data = quantize(pack, calibration=linked(seen))
    before = files()
    assert len(before) == 1 and " · checked · saved as " in text and data["formats"] == {"float8_e4m3fn": 60, "bf16": 6}
    again, data_again = quantize(pack, calibration=linked(calibration.load(CALIBRATION)))
    assert files() == before and f"already there: {data['model_name']} · " in again and "checked" not in again
    assert data_again["path"] == data["path"] and data_again["formats"] == data["formats"]
    assert data_again["errors"]["worst"] == pytest.approx(data["errors"]["worst"], rel=1e-3)
    other = replace(seen, info={**seen.info, "runs": seen.info["runs"][::-1]})
    assert other.fingerprint() != seen.fingerprint() and other.layers == seen.layers
    jobs = [
        {"calibration": linked(other)},
        *({"model": with_lora(comfy, s), "calibration": linked(seen)} for s in (0.5, 0.6)),
    ]
    for number, job in enumerate(jobs, 2):
        assert "already there" not in quantize(pack, **job)[0]
        assert len(files()) == number and before.items() <= files().items()
    assert "already there" in quantize(pack, **jobs[-1])[0] and len(files()) == 4


def test_a_file_that_was_never_checked_or_is_damaged_is_made_anew(pack: dict[str, Any], saved: Path) -> None:
    strategy = {"strategy": "recipe", "recipe": "int8"}
    (plan,) = run(pack["CalibQuantPlan"], model_name=MODEL, strategy=strategy).result
    run(pack["CalibQuantQuantize"], plan=plan, filename_prefix="calibquant/unchecked", verify=False)
    text, data = quantize(pack, card="RTX 20")
    assert " · checked · saved as " in text and len(list(saved.iterdir())) == 2
    made = saved / Path(data["model_name"]).name
    made.write_bytes(bytes(8) + made.read_bytes()[8:])  # of its size, with no header that can be read
    assert " · checked · saved as " in quantize(pack, card="RTX 20")[0] and len(list(saved.iterdir())) == 3


def test_a_model_brings_its_file_and_its_loras(pack: dict[str, Any], comfy: Path, saved: Path) -> None:
    """As Save Quantized Model bakes them, whatever model_name says."""
    models.save(comfy / "models" / "diffusion_models" / "other.safetensors", models.zimage())
    model = with_lora(comfy, 0.75)
    text, data = quantize(pack, model_name="other.safetensors", card="RTX 20", model=model)
    assert "baked in: what LoRA and merge nodes changed, 1 tensor" in text
    strategy = {"strategy": "recipe", "recipe": "int8"}
    (plan,) = run(pack["CalibQuantPlan"], model_name=MODEL, strategy=strategy).result
    done = run(pack["CalibQuantQuantize"], plan=plan, filename_prefix="calibquant/byhand", model=model)
    ours, theirs = (load_file(saved.parent / name) for name in (data["model_name"], done.result[0]))
    plain = load_file(saved.parent / quantize(pack, card="RTX 20")[1]["model_name"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [key for key in ours if key.endswith(".weight") and not torch.equal(ours[key], plain[key])] == [
        "blocks.0.ffn.0.weight"
    ]
    (comfy / "models" / "diffusion_models" / "other.safetensors").unlink()


def test_a_model_without_a_file_is_refused(pack: dict[str, Any], comfy: Path, saved: Path) -> None:
    model = with_lora(comfy, 0.75)
    model.cached_patcher_init = None  # as a loader of another pack may leave it
    with pytest.raises(Exception, match=r"^the linked MODEL does not say which file .*: load it with [^\n]*$"):
        quantize(pack, model=model)
    assert not list(saved.iterdir())


def test_the_default_is_a_model_that_can_be_quantized(pack: dict[str, Any], comfy: Path) -> None:
    folder, tensors = comfy / "models" / "diffusion_models", load_file(DEMO)
    eight = {key: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for key, t in tensors.items()}
    lora = {"a.lora_up.weight": torch.ones(4, 4), "a.lora_down.weight": torch.ones(4, 4)}
    made = [models.save(folder / f"0{i}.safetensors", t) for i, t in enumerate((eight, lora, tensors))]
    run(pack["CalibQuantEasy"], model_name="02.safetensors", card="RTX 20")
    (quantized,) = (comfy / "output" / "diffusion_models" / "calibquant").glob("02_*")
    made.append(quantized.rename(folder / "00_quantized.safetensors"))
    (broken := folder / "00_broken.safetensors").write_bytes(b"no model")
    importlib.import_module("folder_paths").filename_list_cache.clear()
    entry = next(i for i in pack["CalibQuantEasy"].define_schema().inputs if i.id == "model_name")
    assert entry.options[:5] == [f"{n}.safetensors" for n in ("00", "00_broken", "00_quantized", "01", "02")]
    assert entry.default == "02.safetensors"
    for path in (*made, broken):
        path.unlink()


def test_save_takes_file_and_calibration_from_the_plan(pack: dict[str, Any], saved: Path, seen: Calibration) -> None:
    strategy = {"strategy": "recipe", "recipe": "int8"}
    (plan,) = run(pack["CalibQuantPlan"], model_name=MODEL, strategy=strategy, calibration=linked(seen)).result
    done = run(pack["CalibQuantQuantize"], plan=plan)
    assert done.result[1].source == str(DEMO) and done.result[1].runs == 20
    data = done.ui["calibquant_result"][0]
    path = saved.parents[2] / data["path"]
    assert data["bytes_before"] == DEMO.stat().st_size and data["bytes_after"] == path.stat().st_size
    assert sum(data["formats"].values()) == LAYERS and data["core_needed"] == "0.29"
    assert 0 < data["errors"]["mean"] < data["errors"]["worst"] < 1e-3 and data["errors"]["outputs_as_loaded"] > 0
    assert json.loads(json.dumps(data)) == data
    from_file = replace(plan, path=None)  # as one that was read from a file
    with pytest.raises(Exception, match=rf"the plan does not know its file \({MODEL}\): choose it as model_name"):
        run(pack["CalibQuantQuantize"], plan=from_file)
    assert run(pack["CalibQuantQuantize"], plan=from_file, model_name=MODEL).result[1].source == str(DEMO)


def test_widgets_of_save_are_in_the_order_that_old_workflow_files_hold_them(pack: dict[str, Any]) -> None:
    values = [MODEL, "calibquant/digits", True]  # as the first workflow that shipped held them
    info = pack["CalibQuantQuantize"].GET_SCHEMA().get_v1_info(pack["CalibQuantQuantize"])
    widgets = [
        name for kind in ("required", "optional") for name, spec in info.input.get(kind, {}).items()
        if spec[0] in ("COMBO", "STRING", "BOOLEAN", "FLOAT", "INT")
    ]  # fmt: skip
    assert dict(zip(widgets, values, strict=False)) == {
        "model_name": MODEL, "filename_prefix": "calibquant/digits", "verify": True,
    }  # fmt: skip
    assert widgets[3:] == ["rounding"]


@pytest.mark.parametrize("node_id", ["CalibQuantEasy", "CalibQuantPlan", "CalibQuantQuantize"])
def test_search_finds_it(pack: dict[str, Any], node_id: str) -> None:
    assert {"quantize", "compress", "shrink", "convert", "fp4"} <= set(pack[node_id].GET_SCHEMA().search_aliases)


def test_every_input_and_output_is_explained(pack: dict[str, Any]) -> None:
    schema = pack["CalibQuantEasy"].GET_SCHEMA()
    page = (models.ROOT / "js" / "docs" / "CalibQuantEasy.md").read_text(encoding="utf-8")
    for entry in (*schema.inputs, *schema.outputs):
        name = entry.display_name or entry.id
        assert entry.tooltip and len(entry.tooltip) > 10 and f"**{name}**" in page, name
    for word in ("## Inputs", "## Output", "## Example", "## What goes wrong", "calibquant_result", *easy.CHOICES):
        assert word in page, word


def test_progress_counts_layers_and_says_the_time_left(
    pack: dict[str, Any], saved: Path, seen: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    feedback, told, clock = _module(pack, "comfyui.feedback"), [], [0.0]
    monkeypatch.setattr(feedback, "show", lambda _, text: told.append(text))

    def monotonic() -> float:
        clock[0] += 1.5
        return clock[0]

    monkeypatch.setattr(feedback, "time", SimpleNamespace(monotonic=monotonic))
    _module(pack, "probe")._latest.clear()  # what another test has read already
    for found in (None, linked(replace(seen, info={**seen.info, "tool": "another"}))):
        quantize(pack, card="RTX 50", calibration=found)
    for what in (f"reading the weights of {MODEL}", f"trying formats on {MODEL}", f"quantizing {MODEL}", "verifying "):
        steps = [text for text in told if text.startswith(what)]
        assert any(": layer " in text and text.endswith(" · about 2 min left") for text in steps), (what, steps)
        assert any(text.endswith(" · less than a minute left") for text in steps)
    assert f"quantizing {MODEL}: layer 59 of 60 · less than a minute left" in told


def _module(pack: dict[str, Any], name: str) -> Any:
    return importlib.import_module(f"{pack['CalibQuantEasy'].__module__.rpartition('.')[0]}.{name}")


@pytest.mark.parametrize("word", ["reading the weights", "quantizing", "verifying"])
def test_cancel_leaves_nothing_behind(
    pack: dict[str, Any], saved: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    management, told = importlib.import_module("comfy.model_management"), []

    def cancel() -> None:
        if told:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancel)
    monkeypatch.setattr(
        _module(pack, "comfyui.feedback"), "show", lambda _, text: told.append(text) if text.startswith(word) else None
    )
    _module(pack, "probe")._latest.clear()
    with pytest.raises(management.InterruptProcessingException):
        quantize(pack, card="RTX 50")
    assert told and not list(saved.iterdir())


def test_conditionings_become_a_prompt_set(pack: dict[str, Any]) -> None:
    """For models whose encoder is no CLIP."""
    conds = {f"conditioning_{i}": [[torch.full((1, 3, 8), float(i)), {"guidance": 3.5}]] for i in range(2)}
    made = run(pack["CalibQuantPromptSet"], prompts="", name="easy/two", conditionings=conds)
    assert made.ui.value == "2 prompts saved as two.safetensors"
    assert [prompt["text"] for prompt in made.result[0]] == ["conditioning 0", "conditioning 1"]
    assert all(torch.equal(p["cond"], torch.full((1, 3, 8), float(i))) for i, p in enumerate(made.result[0]))
    for inputs, words in (
        ({"prompts": "a fox", "conditionings": conds}, "prompts need a CLIP"),
        ({"prompts": ""}, "there is nothing to encode with"),
        ({"prompts": "", "conditionings": {"conditioning_0": conds["conditioning_0"] * 2}}, "holds 2 conditionings"),
    ):
        with pytest.raises(Exception, match=words):
            run(pack["CalibQuantPromptSet"], name="easy/none", **inputs)


def test_a_machine_without_a_card_gets_what_loads_everywhere_and_is_told(pack: dict[str, Any], saved: Path) -> None:
    if targets.this_gpu() == targets.ANY:
        text, data = quantize(pack, card=easy.THIS_MACHINE)
        assert set(data["formats"]) <= {*EIGHT_BITS, "bf16"} and "no NVIDIA card of the list was found" in text


# --- through a real server


def graph_of(card: str, calibrated: bool) -> Graph:
    """Quantize Model, then both models through the stock sampler with one seed."""
    graph = json.loads((models.ROOT / "workflows" / "api" / "quantize_demo_model.json").read_text("utf-8"))
    (plan,) = (name for name, node in graph.items() if node["class_type"] == "CalibQuantPlan")
    (save,) = (name for name, node in graph.items() if node["class_type"] == "CalibQuantQuantize")
    del graph[plan]
    graph[save] = {"class_type": "CalibQuantEasy", "inputs": {"model_name": MODEL, "card": card, "size": 0.0}}
    if calibrated:
        graph["cal"] = {"class_type": "CalibQuantLoadCalibration", "inputs": {"calibration_name": CALIBRATION.name}}
        graph[save]["inputs"]["calibration"] = ["cal", 0]
    return graph


def of_type(graph: Graph, class_type: str) -> str:
    return next(name for name, node in graph.items() if node["class_type"] == class_type)


def expected(card: str) -> set[str]:
    """By the core that the server runs."""
    known = NEW in (find_comfyui() / "comfy" / "quant_ops.py").read_text("utf-8")
    return {
        "RTX 50": {"nvfp4", "mxfp8"},
        "RTX 40": {"float8_e4m3fn"},
        "RTX 30": {"asym_w4a8_int8"} if known else EIGHT_BITS,
        "RTX 20": EIGHT_BITS,
        "smallest file": {"asym_w4a8_int8"} if known else {"nvfp4"},
        "closest to the original": {*EIGHT_BITS, "mxfp8", "float8_e4m3fn"},
    }[card]


@pytest.mark.parametrize("card", [c for c in easy.CHOICES if c != easy.THIS_MACHINE])
def test_the_file_for_every_card_loads_and_draws_in_the_stock_nodes(server: Server, card: str) -> None:
    graph = graph_of(card, calibrated=True)
    node = of_type(graph, "CalibQuantEasy")
    outputs = server.post(graph)["outputs"]
    text, (data,) = outputs[node]["text"][0], outputs[node]["calibquant_result"]
    assert set(data["formats"]) - {"bf16"} <= expected(card)
    path = server.base_dir / data["path"]
    assert data["bytes_after"] == path.stat().st_size and data["model_name"] in unet_names(server)
    first = text.splitlines()[0]
    assert first.startswith("3.58 MB → ") and f" · checked · saved as {data['model_name']} · " in first
    assert "Load Diffusion Model finds it · fast on RTX " in first and first.endswith(
        f"ComfyUI ≥ {data['core_needed']}"
    )
    with safe_open(path, "pt") as file:
        assert set(json.loads(file.metadata()["calibquant"])["job_sha256"]) - {"0"}
    pictures = [_pixels(server, outputs[name]) for name, n in graph.items() if n["class_type"] == "PreviewImage"]
    assert len(pictures) == 2 and np.abs(pictures[0] - pictures[1]).mean() < 4  # of 255: the same digit


def unet_names(server: Server) -> list[str]:
    info = server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    return info[1]["options"] if info[0] == "COMBO" else info[0]


def _pixels(server: Server, output: dict[str, Any]) -> np.ndarray:
    (image,) = output["images"]
    with Image.open(server.base_dir / "temp" / image["subfolder"] / image["filename"]) as file:
        return np.asarray(file.convert("L"), dtype=float)


def test_an_old_graph_with_a_name_in_save_and_a_new_one_without_run(server: Server) -> None:
    plan = {"model_name": MODEL, "strategy": "recipe", "strategy.recipe": "fp8"}
    for inputs in ({}, {"model_name": MODEL, "filename_prefix": "calibquant/old", "verify": True}):
        graph = {
            "1": {"class_type": "CalibQuantPlan", "inputs": plan},
            "2": {"class_type": "CalibQuantQuantize", "inputs": {"plan": ["1", 0], **inputs}},
        }
        output = server.post(graph)["outputs"]["2"]
        (data,) = output["calibquant_result"]
        assert data["formats"] == {"float8_e4m3fn": 60, "bf16": 6} and "worst layer" in output["text"][0]


def test_linked_conditionings_go_through_the_api(server: Server) -> None:
    load = {"prompt_set": "digits.safetensors"}
    graph = {str(i): {"class_type": "CalibQuantLoadPromptSet", "inputs": {**load, "index": i}} for i in range(2)}
    links = {f"conditionings.conditioning_{i}": [str(i), 1] for i in range(2)}
    graph["9"] = {"class_type": "CalibQuantPromptSet", "inputs": {"prompts": "", "name": "easy/linked", **links}}
    assert server.post(graph)["outputs"]["9"]["text"] == ["2 prompts saved as linked.safetensors"]
    made = load_file(server.output_dir / "promptsets" / "easy" / "linked.safetensors")
    digits = load_file(models.ROOT / "workflows" / "promptsets" / "digits.safetensors")
    assert all(torch.equal(made[f"{i}.cond"], digits[f"{i}.cond"]) for i in range(2))
