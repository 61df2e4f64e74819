"""Families as ComfyUI's classes run: known among all classes, what shares an input, what may be folded, what loads.

The facts are ComfyUI's own: its classes at the published widths without weights (``comfy_classes``), and small ones
with random weights that run (``small_models``). Classes that the ComfyUI at hand lacks are skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import torch
from comfy_classes import CASES, Built
from small_models import SMALL, Running, Small, relative_error, trial

from quant_core.models import folding
from quant_core.models.architectures import ARCHITECTURES, detect, split_prefix
from quant_core.models.families.row import OUTSIDE
from quant_core.models.source import Source

pytestmark = pytest.mark.core

# Which row serves a case of comfy_classes; all others are served by the generic row.
ROW_OF = {
    "SD3": "sd3", "SD3.5 medium": "sd3", "SD3 with a context processor": "sd3", "AuraFlow": "auraflow",
    "Flux2": "flux2", "Flux2 klein": "flux2", "Chroma": "chroma", "ChromaRadiance": "chroma_radiance",
    "ChromaRadiance linear": "chroma_radiance", "Flux": "flux", "FluxInpaint": "flux", "FluxSchnell": "flux",
    "LongCatImage": "flux", "Ovis": "flux", "Hunyuan3Dv2": "hunyuan3d", "Hunyuan3Dv2mini": "hunyuan3d",
    "Hunyuan3Dv2_1": "hunyuan3d21", "LTXV": "ltxv", "LTXV 13B": "ltxv", "LTXAV": "ltxav", "LTXAV gated": "ltxav",
    "CosmosT2V": "cosmos", "CosmosT2V 14B": "cosmos", "CosmosI2V": "cosmos", "CosmosT2IPredict2": "cosmos_predict2",
    "CosmosI2VPredict2": "cosmos_predict2", "Anima": "anima", "HiDream": "hidream", "HiDreamO1": "hidream_o1",
    "Omnigen2": "omnigen2", "Boogu": "boogu", "Kandinsky5": "kandinsky5", "Kandinsky5Image": "kandinsky5",
    "ACEStep": "ace", "ACEStep15": "ace15", "Krea2": "krea2",
    "ErnieImage": "ernie_image", "Ideogram4": "ideogram4", "GenmoMochi": "mochi",
    "PixArtAlpha": "pixart", "PixArtSigma": "pixart", "SeedVR2": "seedvr2", "SeedVR2 7B": "seedvr2",
    "SeedVR2 7B shared": "seedvr2", "MageFlow": "mage_flow", "QwenImage": "qwen_image",
    "Qwen-Image Layered": "qwen_image", "Lumina2": "lumina2", "NewBie": "lumina2", "ZImage": "zimage",
    "Z-Image Omni": "zimage", "ZImagePixelSpace": "zimage_pixel", "SDXL": "sdxl", "SSD1B": "sdxl",
    "Segmind_Vega": "sdxl",
    "SDXLRefiner": "sdxl", "SDXL_instructpix2pix": "sdxl", "SD15": "sd15", "SD15_instructpix2pix": "sd15",
    "SD20": "sd15", "LotusD": "sdxl", "SD21UnclipL": "sdxl", "SD21UnclipH": "sdxl",
    "KOALA_700M": "sdxl", "KOALA_1B": "sdxl", "SV3D_u": "sdxl", "SV3D_p": "sdxl", "SVD_img2vid": "sdxl",
    "Stable_Zero123": "sd15",
    **{case: "hunyuan_video" for case in CASES if case.startswith(("HunyuanVideo", "HunyuanImage"))},
    **{case: "wan" for case in CASES if case.startswith("WAN")},
}  # fmt: skip
NEW = [name for name in SMALL if name in {row.name for row in ARCHITECTURES}]


@pytest.fixture(params=list(CASES))
def at_full_width(request: pytest.FixtureRequest, comfy: Path) -> Built:
    import comfy.supported_models

    case = CASES[request.param]
    if not any(known.__name__ == case.name for known in comfy.supported_models.models):
        pytest.skip(f"this ComfyUI has no {case.name}")
    return Built.of(case)


def test_a_class_is_served_by_its_row(at_full_width: Built, request: pytest.FixtureRequest) -> None:
    """And what the row does not place in a block it protects for a reason of its own, norms included."""
    shapes = at_full_width.file_shapes
    row = detect(shapes, shapes)
    case = request.node.callspec.params["at_full_width"]
    assert row.name == ROW_OF.get(case, "generic")
    if row.name not in SMALL:  # the generic row; and rows with a test of their own
        return
    infos = row.describe_file([key.removesuffix(".weight") for key in shapes if key.endswith(".weight")], shapes)
    unknown = [name for name, i in infos.items() if i.block is None and i.protected in ("", OUTSIDE)]
    assert not unknown
    flat = {key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 1}
    assert not [name for name in flat & set(infos) if not infos[name].protected]


# --- small models that run


@dataclass
class Ran:
    """A small model, its random 16-bit file, and what it did: its output, and each Linear's inputs as bytes."""

    small: Small
    running: Running
    path: Path
    output: torch.Tensor
    inputs: dict[str, bytes]


@pytest.fixture(scope="module")
def all_ran(comfy: Path) -> Iterator[dict[str, Ran]]:
    yield {}


@pytest.fixture
def ran(request: pytest.FixtureRequest, all_ran: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    name = request.param
    if not SMALL[name].known:
        pytest.skip(f"this ComfyUI has no {SMALL[name].case}")
    if name not in all_ran:
        all_ran.clear()  # one at a time in memory
        running = Running(SMALL[name])
        path = models.save(tmp_path_factory.mktemp(name) / "m.safetensors", running.random_state())
        running.load(running.state)
        inputs: dict[str, bytes] = defaultdict(bytes)

        def watch(layer: str, x: torch.Tensor) -> None:
            inputs[layer] += repr(x.shape).encode() + x.detach().float().contiguous().numpy().tobytes()

        all_ran[name] = Ran(SMALL[name], running, path, running.run(watch), inputs)
    return all_ran[name]


# Anima's adapter has its own size, whatever the model's: 140 million weights.
PARAMS = [pytest.param(name, marks=pytest.mark.wide) if name == "anima" else name for name in NEW]
every_family = pytest.mark.parametrize("ran", PARAMS, indirect=True, scope="module")


@every_family
def test_shared_inputs_are_those_of_the_running_model(ran: Ran) -> None:
    with Source(ran.path) as source:
        layers = {name: info for name, info in source.layers.items() if name in ran.inputs and info.block is not None}
    by_group, by_block = defaultdict(set), defaultdict(set)
    for name, info in layers.items():
        by_group[info.shared_input or name].add(ran.inputs[name])
        group = info.shared_input.replace("img_mod", "txt_mod") or name  # two groups in the table: see Qwen-Image
        by_block[info.subgraph, info.block, ran.inputs[name]].add(group)
    assert layers
    assert not {group for group, seen in by_group.items() if len(seen) > 1}  # what is told to be shared is
    apart = [groups for groups in by_block.values() if len(groups) > 1]  # what is shared within a block is told
    assert not apart


@every_family
def test_folds_change_no_output(ran: Ran) -> None:
    with Source(ran.path) as source:
        rules = source.architecture.folds
        groups = folding.groups(source)
        generator = torch.Generator().manual_seed(1)
        factors = {name: torch.exp2(torch.randn(g.width, generator=generator) * 2) for name, g in groups.items()}
        changed = folding.functions(source, factors)
    idle = [rule for rule in rules if not any(name.endswith("." + rule.consumers[0].kind) for name in groups)]
    assert not idle
    if rules:
        state = ran.running.state
        ran.running.load(state | {key: change(state[key]) for key, change in changed.items()})
        found = ran.running.run()
        ran.running.load(state)
        assert relative_error(found, ran.output) < 1e-8


@every_family
def test_an_nvfp4_file_loads_and_draws_what_its_weights_say(ran: Ran, tmp_path: Path) -> None:
    """Other formats: benchmarks/families.py. Measured: beside below 1e-12, error .002 to .21 (Chroma Radiance)."""
    with Source(ran.path) as source:
        done = trial(ran.small, source, "nvfp4", ran.output, tmp_path)
    assert done.layers and done.beside < 1e-8
    assert 0 < done.error < 0.4


# --- files of no family, and what no family tells


def test_the_generic_row_says_what_it_guessed(tmp_path: Path) -> None:
    names = [f"stages.blocks.{i}.fc.weight" for i in range(3)] + ["refiner.0.fc.weight", "head.weight"]
    tensors = {name: torch.zeros(32, 32) for name in names} | {
        "refiner.0.mlp.experts.up.weight": torch.zeros(2, 32, 32)
    }
    with Source(models.save(tmp_path / "m.safetensors", tensors)) as source:
        guess, banks = source.warnings()
    assert "1 of refiner, 3 of stages.blocks; kept by rule: 1 as lies outside the numbered blocks" in guess
    assert banks.startswith("1 banks of experts (such as refiner.0.mlp.experts.up.weight) stay in the source dtype")


@pytest.mark.parametrize("prefix", ["net.", "model.model.", "model."])
def test_a_prefix_that_comfyui_strips_hides_no_family(prefix: str, comfy: Path) -> None:
    from comfy.model_detection import unet_prefix_from_state_dict

    keys = [f"{prefix}{key}" for key in Built.of(CASES["Anima"]).file_shapes]
    assert unet_prefix_from_state_dict(dict.fromkeys(keys)) == split_prefix(keys) == prefix
    assert detect(keys).name == "anima"
    assert detect(keys).describe(f"{prefix}blocks.3.mlp.layer1").block == 3
