"""The example workflows: each is one graph in both forms, can be read on the screen, and runs in a real server."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from comfy_env import ComfyUINotFound, Server, start_server
from keys import make_keys
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core.demo import digits
from quant_core.evidence import promptset

Graph = dict[str, dict[str, Any]]

SHIPPED = models.ROOT / "workflows"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.json"))
# Run, with what they should say, where their nodes are tested.
ELSEWHERE = {
    *("calibrate_with_prompts", "monitor_my_own_graph"),
    *("quantize_demo_model", "split_demo_model", "quantize_and_compare", "refine_demo_plan", "text_encoder"),
}
TITLE, GROUP_TITLE = 30, 45  # pixels above a node's position, and of a group's title with the badges below it
CLOSE = 0.05  # of the latent; a digit without its LoRA is at least twice as far
RUNS = 0  # LiteGraph's mode of a node that is not muted
every_workflow = pytest.mark.parametrize("name", NAMES)


def shown(name: str) -> dict[str, Any]:
    return json.loads((SHIPPED / f"{name}.json").read_text("utf-8"))


def twin(name: str) -> Graph:
    return json.loads((SHIPPED / "api" / f"{name}.json").read_text("utf-8"))


def of_type(graph: Graph, class_type: str) -> str | None:
    return next((name for name, node in graph.items() if node["class_type"] == class_type), None)


# --- their two forms, and what one sees


def test_each_has_its_twin_and_a_small_picture() -> None:
    assert {path.stem for path in (SHIPPED / "api").iterdir()} == set(NAMES) >= ELSEWHERE
    sizes = {path.stem: path.stat().st_size for path in SHIPPED.glob("*.jpg")}
    assert set(sizes) == set(NAMES) and all(1000 < size < 60_000 for size in sizes.values()), sizes


@every_workflow
def test_workflow_and_twin_are_one_graph(name: str) -> None:
    graph = twin(name)
    nodes = {
        str(node["id"]): node
        for node in shown(name)["nodes"]
        if node["type"] != "MarkdownNote" and node["mode"] == RUNS
    }
    assert {k: n["type"] for k, n in nodes.items()} == {k: n["class_type"] for k, n in graph.items()}
    links = {
        (str(a), out, str(b), nodes[str(b)]["inputs"][slot]["name"])
        for _, a, out, b, slot, _ in shown(name)["links"]
        if {str(a), str(b)} <= nodes.keys()
    }
    linked = ((v, k, n) for k, node in graph.items() for n, v in node["inputs"].items() if isinstance(v, list))
    assert links == {(v[0], v[1], k, n) for v, k, n in linked}
    for key, node in graph.items():
        values = [v for v in node["inputs"].values() if not isinstance(v, list)]
        assert all(value in nodes[key]["widgets_values"] for value in values), node["class_type"]


@every_workflow
def test_layout_can_be_read(name: str) -> None:
    """No node hides another, links lead to the right, and all but the note lies in a group with a title."""
    graph = shown(name)
    boxes = {node["id"]: _box(node) for node in graph["nodes"]}
    hidden = [pair for pair in combinations(boxes.values(), 2) if _overlap(*pair)]
    assert hidden == []
    back = [link for link in graph["links"] if boxes[link[1]][2] >= boxes[link[3]][0]]
    assert back == []
    (note,) = (node for node in graph["nodes"] if node["type"] == "MarkdownNote")
    assert note["widgets_values"][0].startswith("# ") and len(note["widgets_values"][0]) > 200
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in graph["groups"])]
    assert groups and all(len(group["title"]) > 3 for group in graph["groups"])
    assert [pair for pair in combinations(groups, 2) if _overlap(*pair)] == []
    loose = [key for key, box in boxes.items() if not any(_inside(box, group) for group in groups)]
    assert loose == [note["id"]]


def _box(node: dict[str, Any]) -> tuple[float, ...]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: tuple[float, ...], group: tuple[float, ...]) -> bool:
    return group[0] <= box[0] and group[1] + GROUP_TITLE <= box[1] and box[2] <= group[2] and box[3] <= group[3]


# --- run: those of the demo model as they are


FAMILIES = {
    "zimage": ("zimage", dict(dim=256, n_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=64)),
    "flux": (
        "flux_dev",
        dict(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, context_in_dim=64, vec_in_dim=32),
    ),
    "sdxl": (
        "sdxl",
        dict(model_channels=64, channel_mult=[1, 2], num_res_blocks=[1, 1], transformer_depth=[0, 1],
             transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1, context_dim=64),
    ),
}  # fmt: skip
FILES = {
    "zimage": "diffusion_models/z_image_turbo_bf16.safetensors",
    "flux": "diffusion_models/flux1-dev.safetensors",
    "wan": "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
    "wan22_high": "diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors",
    "wan22_low": "diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors",
    "sdxl": "checkpoints/sd_xl_base_1.0.safetensors",
}
OPTIONS = {"flux": {"pooled_output": 32}, "sdxl": {"pooled_output": 1280}}
FAMILY_NAMES = [name for name in NAMES if name.split("_")[0] in {*FILES, "wan22"}]
# ComfyUI knows the two by their full widths; in the server with the stand-ins it takes narrow ones for them.
NARROW = """
import comfy.model_detection as detection
import comfy.supported_models as known

known.ZImage.unet_config = {"image_model": "lumina2", "dim": 256}
narrow = {"model_channels": 64, "transformer_depth": [0, 1], "context_dim": 64}
known.SDXL.unet_config = {**known.SDXL.unet_config, **narrow}
as_it_is = detection.detect_unet_config


def detect(*args, **how):
    found = as_it_is(*args, **how)
    if found and found.get("image_model") == "lumina2":
        found.update(ZIMAGE)
    return found


detection.detect_unet_config = detect
NODE_CLASS_MAPPINGS = {}
"""


@pytest.mark.parametrize("name", sorted(set(NAMES) - ELSEWHERE - set(FAMILY_NAMES)))
def test_the_demo_models_workflow_runs_as_it_is(name: str, server: Server) -> None:
    graph = twin(name)
    outputs = server.post(graph)["outputs"]
    check_outcome(graph, outputs, server)


def check_outcome(graph: Graph, outputs: dict[str, Any], server: Server) -> None:
    """What is saved is smaller and loads; a comparison draws what it should."""
    assert outputs
    for save in (name for name, node in graph.items() if node["class_type"] == "CalibQuantQuantize"):
        (found,) = outputs[save]["calibquant_result"]
        saved = server.output_dir.parent / found["path"]
        assert saved.stat().st_size == found["bytes_after"] < 0.9 * found["bytes_before"]
    if compare := of_type(graph, "CalibQuantCompare"):
        (found,) = outputs[compare]["calibquant_compare"]
        errors = [picture["latent_error"] for picture in found["pictures"]]
        assert found["bytes_after"] < found["bytes_before"] and all(0 < error < CLOSE for error in errors), errors


# --- run: those of other models, by small stand-ins of the same names


@pytest.fixture(scope="module")
def families(comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a stand-in for every file that the workflows name, but text encoders and VAEs."""
    folder = tmp_path_factory.mktemp("families")
    for family, name in FILES.items():
        (folder / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        stand_in(family, folder / "models" / name)
        _prompt_sets(family, folder / "output" / "promptsets")
    helper = folder / "custom_nodes" / "narrow_models.py"
    helper.parent.mkdir(parents=True)
    wide = make_keys.MODELS["zimage"][2]
    helper.write_text(NARROW.replace("ZIMAGE", repr(wide | FAMILIES["zimage"][1] | {"image_model": "lumina2"})))
    try:
        with start_server(folder) as running:
            yield running
    except ComfyUINotFound as missing:
        pytest.skip(str(missing))


def stand_in(family: str, path: Path) -> None:
    """A random model of that family; for Wan the demo model, which is one, and of its experts one is another."""
    if family.startswith("wan"):
        demo = SHIPPED / "models" / "calibquant_digits_wan.safetensors"
        shutil.copyfile(demo, path)
        if family == "wan22_low":
            with safe_open(demo, "pt") as file:
                save_file({n: t * 0.99 for n, t in load_file(demo).items()}, path, metadata=file.metadata())
        return
    variant, changes = FAMILIES[family]
    module, cls, config = make_keys.MODELS[variant]
    operations = importlib.import_module("comfy.ops").disable_weight_init
    build = getattr(importlib.import_module(module), cls)
    net = build(**(config | changes), device="meta", dtype=torch.bfloat16, operations=operations)
    tensors = models._random({key: tuple(t.shape) for key, t in net.state_dict().items()}, torch.bfloat16)
    ones = {key: torch.ones_like(t) for key, t in tensors.items() if key.endswith(".weight") and t.dim() == 1}
    tensors |= ones  # norms: with small ones, nothing would reach the output
    models.save(path, models.prefixed(tensors) if path.parent.name == "checkpoints" else tensors)


def _prompt_sets(family: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)

    def prompt(text: str) -> dict[str, Any]:
        options = {key: torch.randn(1, width, generator=generator) for key, width in OPTIONS.get(family, {}).items()}
        return {"text": text, "cond": torch.randn(1, 6, 64, generator=generator), "options": options}

    promptset.save([prompt(f"prompt {i}") for i in range(3)], folder / f"{family}_prompts.safetensors")
    promptset.save([prompt("avoid")], folder / f"{family}_negative.safetensors")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_workflow_of_another_model_runs_with_a_stand_in(name: str, families: Server) -> None:
    graph = twin(name)
    less = {"samples": 2, "steps": 3, "prompts": 1, "width": 64, "height": 64, "frames": 1, "rows": 128}
    less |= {"switch_at_step": 1}
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in less.items() if key in node["inputs"]}
    if compare := of_type(graph, "CalibQuantCompare"):
        del graph[compare]["inputs"]["vae"]  # no stand-in has one: latents are compared
        if loader := of_type(graph, "VAELoader"):
            del graph[loader]
    outputs = families.post(graph)["outputs"]
    check_outcome(graph, outputs, families)
    if "pair" in name:
        text = outputs[of_type(graph, "CalibQuantCalibrate") or ""]["text"][0]
        assert "sigma 1 to 1\n" in text and "sigma 0.9413 to 0.8" in text, text  # of 3 steps at shift 8: one, and two


# --- the LoRA that ships


def test_the_lora_fits_the_demo_model_and_makes_digits_bolder(comfy: Path) -> None:
    sd, utils = (importlib.import_module(f"comfy.{module}") for module in ("sd", "utils"))
    common = importlib.import_module("nodes").common_ksampler
    lora = utils.load_torch_file(str(SHIPPED / "loras" / "calibquant_digits_bold.safetensors"))
    prompts = load_file(SHIPPED / "promptsets" / "digits.safetensors")
    with torch.inference_mode():
        plain = sd.load_diffusion_model(str(SHIPPED / "models" / "calibquant_digits_wan.safetensors"))
        bold, _ = sd.load_lora_for_models(plain, None, lora, 1.0, 0.0)
        assert len(bold.patches) * 2 == len(lora) == 120
        drawn: dict[str, list[torch.Tensor]] = {"plain": [], "bold": []}
        for name, model in (("plain", plain), ("bold", bold)):
            for digit in range(10):
                positive, latent = [[prompts[f"{digit}.cond"], {}]], {"samples": torch.zeros(1, 16, 1, 8, 8)}
                drawn[name].append(
                    common(model, 7, 8, 1.0, "euler", "simple", positive, positive, latent)[0]["samples"]
                )
    latents = {name: digits.from_wan_space(torch.cat(found)) for name, found in drawn.items()}
    ink = {name: digits.latent_to_image(torch.cat(found)).mean((1, 2)) for name, found in drawn.items()}
    changes = (latents["bold"] - latents["plain"]).square().flatten(1).sum(1) / latents["bold"].square().flatten(1).sum(
        1
    )
    assert (ink["bold"] > 1.15 * ink["plain"]).all() and (changes > 2 * CLOSE).all(), (ink, changes)
