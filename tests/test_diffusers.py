"""Models in diffusers layout: seen, quantized and written as ComfyUI's own conversion has them, or refused.

The reference is ComfyUI: its tables make the diffusers files of these tests, its conversion and its loader judge ours.
For families that ComfyUI does not convert it is the package diffusers (``keys/make_diffusers_keys.py``).
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import reference
import torch
from keys import make_keys
from safetensors.torch import load_file

from quant_core import cli, jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence.probe import probe
from quant_core.files import checkpoint
from quant_core.files.checkpoint import Checkpoint
from quant_core.jobs import QuantizedFile
from quant_core.models import lora_dialects
from quant_core.models.diffusers import present
from quant_core.models.modelfile import ModelFile
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.reports import describe

Tensors = models.Tensors
BOUNDS = {"nvfp4": 1.1e-2, "mxfp8": 9e-4, "fp8": 9e-4}  # of weights; measured 9.2e-3, 7.2e-4, 7.1e-4 at most
FLUX = dict(
    in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=128, mlp_ratio=4.0,
    num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=True,
    txt_ids_dims=[],
)  # fmt: skip
ZIMAGE = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=256, n_layers=2, n_refiner_layers=2, n_heads=2,
    n_kv_heads=2, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8 / 3,
    z_image_modulation=True, time_scale=1000.0, qk_norm=True, cap_feat_dim=64, pad_tokens_multiple=32,
)  # fmt: skip
# The least UNet that ComfyUI takes for SD 1.5; and one with an upsampler behind attention and one without attention.
SD15 = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
    num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], transformer_depth_output=[1, 1],
    transformer_depth_middle=-2, context_dim=768, num_heads=8, num_head_channels=-1, use_linear_in_transformer=False,
)  # fmt: skip
SDXL = SD15 | dict(
    model_channels=32, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 1, 1, 2, 2],
    transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2], transformer_depth_middle=2, use_linear_in_transformer=True,
    num_heads=2, context_dim=64, num_classes="sequential", adm_in_channels=96,
)  # fmt: skip
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux": ("ldm.flux.model", "Flux", FLUX),
    "zimage": ("ldm.lumina.model", "NextDiT", {k: v for k, v in ZIMAGE.items() if k != "image_model"}),
    "sdxl": ("ldm.modules.diffusionmodules.openaimodel", "UNetModel", SDXL),
    "sd15": ("ldm.modules.diffusionmodules.openaimodel", "UNetModel", SD15),
}

pytestmark = pytest.mark.usefixtures("comfy")


def comfy_module(name: str) -> Any:
    return importlib.import_module(f"comfy.{name}")


# --- one model, native and in diffusers layout


def native_model(family: str) -> Tensors:
    module, name, config = CLASSES[family]
    dtype = torch.float16 if family.startswith("sd") else torch.bfloat16
    extra = {"device": "meta", "dtype": dtype, "operations": comfy_module("ops").disable_weight_init}
    shapes = getattr(comfy_module(module), name)(**config, **extra).state_dict()
    return models._random({key: tuple(like.shape) for key, like in shapes.items()}, dtype)


def comfy_table(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's own: diffusers key -> native key, or (native key, rows or None[, function])."""
    utils = comfy_module("utils")
    if family == "flux":
        # Some native tensors have a second name, of Flux.2 or of LoRA trainers; two belong to a ControlNet.
        others = r"\.(ff|ff_context)\.linear_(in|out)\.|to_qkv_mlp_proj|single_.*\.attn\.to_out\.|^controlnet_"
        return {k: v for k, v in utils.flux_to_diffusers(config).items() if not re.search(others, k)}
    if family == "zimage":
        return utils.z_image_to_diffusers(config)
    return {k: v for k, v in utils.unet_to_diffusers(config).items() if not k.startswith("class_embedding")}


def to_diffusers(native: Tensors, table: dict[str, Any]) -> Tensors:
    """The model from which ComfyUI's table makes this one."""
    found: Tensors = {}
    for key, target in table.items():
        name, rows, turn = (*((target,) if isinstance(target, str) else target), None, None)[:3]
        if name in native:
            part = native[name] if rows is None else native[name].narrow(*rows)
            found[key] = (turn(part) if turn else part).clone()  # the one function there is, a swap, undoes itself
    return found


def by_comfyui(family: str, stored: Tensors) -> Tensors:
    """What ComfyUI makes of it while loading."""
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    if family.startswith("sd"):
        table = comfy_table(family, CLASSES[family][2])
        return {table[name]: tensor for name, tensor in stored.items()}
    return comfy_module("model_detection").convert_diffusers_mmdit(stored)


@pytest.fixture(scope="module", params=list(CLASSES))
def family(request: pytest.FixtureRequest, comfy: Path) -> str:
    return request.param


@pytest.fixture(scope="module")
def native(family: str) -> Tensors:
    return native_model(family)


@pytest.fixture(scope="module")
def stored(family: str, native: Tensors) -> Tensors:
    found = to_diffusers(native, comfy_table(family, CLASSES[family][2]))
    assert by_comfyui(family, found).keys() == native.keys()
    return found


@pytest.fixture(scope="module")
def files(native: Tensors, stored: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The model in ComfyUI's layout, and in diffusers' as a file and as a folder of shards."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in ("native", "single", "sharded"):
        (folder / name).mkdir()
    yield {
        "native": models.save(folder / "native" / "m.safetensors", native),
        "single": models.save(folder / "single" / "m.safetensors", stored),
        "sharded": models.save_sharded(folder / "sharded", stored).parent,
    }
    for path in folder.rglob("*.safetensors"):
        path.unlink()


# --- the layouts that are converted


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_what_comfyui_converts_them_to(
    layout: str, family: str, files: dict[str, Path], stored: Tensors
) -> None:
    expected = by_comfyui(family, stored)
    with Source(files[layout]) as source:
        assert source.architecture.name == family
        assert source.checkpoint.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name, tensor in expected.items():
            found = source.checkpoint.read(name)
            assert found.dtype == tensor.dtype and reference.raw(found) == reference.raw(tensor), name


@pytest.mark.parametrize("variant", ["flux_dev", "flux_schnell", "zimage", "sdxl", "sd15"])
@pytest.mark.parametrize("prefix", ["", models.PREFIX])
def test_a_published_model_comes_out_as_published(variant: str, prefix: str, tmp_path: Path, comfy: Path) -> None:
    shapes = {key.replace("norm.scale", "norm.weight"): shape for key, shape in make_keys.load(variant).items()}
    config = make_keys.MODELS[variant][2]
    table = comfy_table(variant.partition("_")[0], config)
    like = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    parts = {prefix + key: tuple(tensor.shape) for key, tensor in to_diffusers(like, table).items()}
    others = {"vae.decoder.weight": (8,)} if prefix else {}
    with ModelFile(models.save_sparse(tmp_path / "m.safetensors", parts | others)) as model:
        entries = model.checkpoint.entries
        assert model.architecture.name == variant.partition("_")[0]
        assert {key: entry.shape for key, entry in entries.items()} == {
            **{prefix + key: shape for key, shape in shapes.items()},
            **others,
        }
        assert all(entry.name == key for key, entry in entries.items())


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("recipe", list(BOUNDS))
def test_the_file_is_that_of_the_native_layout(
    recipe: str, layout: str, files: dict[str, Path], tmp_path: Path
) -> None:
    written = {}
    for which in ("native", layout):
        output = tmp_path / f"{which}.safetensors"
        with Source(files[which]) as source:
            report = jobs.quantize(source, recipes.make_plan(source, recipe), output)
            jobs.verify(source, report)
        text = output.read_bytes()
        digest = re.search(rb'\\"source\\": \{\\"file\\": \\"([^"]+)\\", \\"sha256\\": \\"([0-9a-f]{64})', text)
        text = re.sub(rb'\\"job_sha256\\": \\"[0-9a-f]{64}', b"", text)  # of the source, too
        written[which] = text[8:].replace(digest[2], b"").replace(digest[1], b"", 1).replace(b" ", b"")
    assert written["native"] == written[layout]


def loaded(family: str, path: Path) -> Any:
    """The diffusion model as ComfyUI's loader makes it."""
    if family != "zimage":
        return comfy_module("sd").load_diffusion_model(str(path)).model.diffusion_model
    # Published Z-Image is 3840 wide, by which ComfyUI knows it: of a small one, say what it is.
    tensors = load_file(path)
    config = comfy_module("supported_models").ZImage(dict(ZIMAGE))
    config.quant_config = comfy_module("utils").detect_layer_quantization(tensors, "")
    management = comfy_module("model_management")
    cast = management.unet_manual_cast(None, management.get_torch_device(), config.supported_inference_dtypes)
    config.set_inference_dtype(torch.float32, cast)
    model = config.get_model({})
    model.load_model_weights(tensors, "")
    return model.diffusion_model


# Not SDXL, which ComfyUI knows by its true size; its file is that of the native layout to the byte, see above.
@pytest.mark.parametrize("family", ["flux", "zimage", "sd15"], indirect=True)
@pytest.mark.parametrize("recipe", list(BOUNDS))
def test_comfyui_loads_every_layer_with_its_formats_error(
    recipe: str, family: str, files: dict[str, Path], native: Tensors, tmp_path: Path
) -> None:
    with Source(files["sharded"]) as source:
        plan = recipes.make_plan(source, recipe)
        jobs.quantize(source, plan, tmp_path / "q.safetensors")
    with torch.inference_mode():
        model = loaded(family, tmp_path / "q.safetensors")
        assert len(plan.quantized()) > 8
        for layer in plan.quantized():
            weight, expected = model.get_submodule(layer).weight.dequantize().float(), native[f"{layer}.weight"].float()
            error = ((weight - expected).square().sum() / expected.square().sum()).item()
            assert 0 < error < BOUNDS[recipe], layer
        kept = [name for name in native if name.removesuffix(".weight") not in plan.quantized()]
        for name in kept:
            assert torch.equal(model.state_dict()[name].float(), native[name].float()), name


def test_probe_and_chunks_see_the_joined_tensors(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(files["native"]).layers == probe(files["sharded"]).layers
    monkeypatch.setattr(checkpoint, "COPY_CHUNK", 1000)  # of no tensor a divisor
    with Source(files["native"]) as one, Source(files["single"]) as other:
        assert list(one.checkpoint.entries) == list(other.checkpoint.entries)
        for name in list(one.checkpoint.entries)[::7]:
            assert b"".join(one.checkpoint.chunks(name)) == b"".join(other.checkpoint.chunks(name)), name


def test_inspect_says_so_and_shows_native_layers(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    seen, expected = describe.inspect(files["sharded"]), describe.inspect(files["native"])
    assert "diffusers" in seen["layout"] and expected["layout"] == ""
    same = ("architecture", "tensors", "layers", "formats")
    assert {name: seen[name] for name in same} == {name: expected[name] for name in same}
    cli.main(["inspect", str(files["single"])])
    assert "diffusers layout" in capsys.readouterr().out


# --- more families: one column of every tensor, so that all blocks of published models fit


def narrow(variant: str) -> Tensors:
    shapes = {key: (shape[0], *[1] * (len(shape) - 1)) for key, shape in make_keys.load(variant).items()}
    return models._random(shapes, torch.bfloat16)


def assert_presented(path: Path, wanted: Tensors, title: str) -> None:
    with Checkpoint(path) as file:
        assert present(file) == title
        assert file.entries.keys() == wanted.keys()
        for name, tensor in wanted.items():
            found = file.read(name)
            assert found.shape == tensor.shape and reference.raw(found) == reference.raw(tensor), name


BY_COMFYUI = {  # variant: (title, table, its counts of blocks)
    "sd35_medium": ("Stable Diffusion 3", "mmdit_to_diffusers", {"depth": 24, "num_blocks": 24}),
    "auraflow": ("AuraFlow", "auraflow_to_diffusers", {"n_double_layers": 4, "n_layers": 36}),
    "pixart_sigma": ("PixArt", "pixart_to_diffusers", {"depth": 28}),
}


@pytest.mark.parametrize("variant", list(BY_COMFYUI))
def test_what_else_comfyui_converts(variant: str, tmp_path: Path) -> None:
    title, table, counts = BY_COMFYUI[variant]
    native = narrow(variant)
    stored = to_diffusers(native, getattr(comfy_module("utils"), table)(counts))
    path = models.save(tmp_path / "m.safetensors", stored)
    converted = comfy_module("model_detection").convert_diffusers_mmdit(dict(stored))
    assert converted.keys() == native.keys()
    assert_presented(path, converted, title)


BY_DIFFUSERS = {
    "wan21_i2v_14b": "Wan",
    "wan21_flf2v_14b": "Wan",
    "wan21_vace_14b": "Wan",
    "flux2_dev": "Flux.2",
    "lumina2": "Lumina 2",
    "chroma": "Chroma",
    "cosmos_predict2_2b": "Cosmos Predict2",
}
LATER = re.compile(r"(?:blocks|(?<!guidance_layer\.)layers|refiner)\.(?!0\.|1\.)\d+\.")  # not in the reference


@pytest.mark.parametrize("variant", list(BY_DIFFUSERS))
def test_what_diffusers_converts_comes_back(variant: str, tmp_path: Path) -> None:
    rows = json.loads((Path(make_keys.HERE) / "diffusers.json").read_text())[variant]
    native = {key: tensor for key, tensor in narrow(variant).items() if not LATER.search(key)}
    stored = {key: torch.cat([native[k][a : a + n] for k, a, n in parts]) for key, parts in rows.items()}
    path = models.save(tmp_path / "m.safetensors", models.prefixed(stored, "model.diffusion_model."))
    assert_presented(path, models.prefixed(native, "model.diffusion_model."), BY_DIFFUSERS[variant])


# --- refused


def refusal(path: Path) -> str:
    with pytest.raises(CalibQuantError) as error:
        Source(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# Names from the published files that ComfyUI knows only in another layout, or not at all.
BLOCK = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "norm_q.weight")
UNKNOWN = {
    "HunyuanVideo": ("x_embedder.proj.weight", *(f"single_transformer_blocks.0.attn.{name}" for name in BLOCK)),
    "LTX-Video": ("proj_in.weight", *(f"transformer_blocks.0.attn1.{name}" for name in BLOCK)),
    "Stable Video Diffusion": (
        *("conv_in.weight", "down_blocks.0.resnets.0.spatial_res_block.conv1.weight"),
        *(f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}" for name in BLOCK),
    ),
}


@pytest.mark.parametrize("model", list(UNKNOWN))
def test_a_diffusers_layout_that_comfyui_does_not_know_is_refused(model: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(32, 32) for name in UNKNOWN[model]}
    message = refusal(models.save(tmp_path / "m.safetensors", tensors))
    assert "diffusers layout" in message and "ModelSave" in message


def a_key(stored: Tensors) -> str:
    return next(name for name in stored if name.endswith("to_k.weight"))


@pytest.mark.parametrize("family", ["flux", "zimage"], indirect=True)  # a UNet has nothing joined
def test_parts_that_do_not_make_a_tensor_are_refused(stored: Tensors, tmp_path: Path) -> None:
    key, path = a_key(stored), tmp_path / "m.safetensors"
    models.save(path, {name: tensor for name, tensor in stored.items() if name != key})
    assert f"has no tensor {key}: " in refusal(path)
    models.save(path, stored | {key: stored[key].float()})
    assert "differ in dtype" in refusal(path)
    for shape in ((), (3,)):
        models.save(path, stored | {key: torch.ones(shape, dtype=torch.bfloat16)})
        assert "differ in dtype or width" in refusal(path)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
@pytest.mark.parametrize("shape", [(), (7, 128)])
def test_a_tensor_without_halves_is_refused(shape: tuple[int, ...], stored: Tensors, tmp_path: Path) -> None:
    key = "norm_out.linear.weight"
    assert f"{key} of shape {shape}" in refusal(
        models.save(tmp_path / "m.safetensors", stored | {key: torch.ones(shape)})
    )


def test_a_quantized_file_in_diffusers_layout_is_refused(stored: Tensors, tmp_path: Path) -> None:
    key, path = a_key(stored), tmp_path / "m.safetensors"
    scale = key.removesuffix("weight") + "weight_scale"
    models.save(path, stored | {key: stored[key].to(models.E4M3), scale: torch.ones(())})
    assert f"no place for {scale}: " in refusal(path)
    with pytest.raises(CalibQuantError, match=f"no place for {re.escape(scale)}"):
        QuantizedFile(path)


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd15"], indirect=True)  # of Z-Image ComfyUI keeps such names
def test_a_tensor_that_comfyui_would_drop_is_refused(stored: Tensors, tmp_path: Path) -> None:
    more = "time_embedding.cond_proj.weight"
    path = models.save(tmp_path / "m.safetensors", stored | {more: torch.ones(8, 8)})
    assert f"no place for {more}: " in refusal(path)


@pytest.mark.parametrize("variant", make_keys.names())
def test_comfyuis_own_layout_is_left_alone(variant: str, tmp_path: Path) -> None:
    with Checkpoint(models.save_sparse(tmp_path / "m.safetensors", make_keys.load(variant))) as file:
        before = list(file.entries.items())
        assert present(file) == ""
        assert list(file.entries.items()) == before


# ComfyUI's own classes whose names are most like those of diffusers.
ALIKE = (
    "SD3",
    "AuraFlow",
    "HunyuanDiT",
    "LTXV",
    "CogVideoX_T2V",
    "Hunyuan3Dv2_1",
    "ACEStep",
    "Omnigen2",
    "Boogu",
    "Lens",
)


@pytest.mark.parametrize("name", ALIKE)
def test_comfyuis_models_with_names_like_diffusers_are_left_alone(name: str, tmp_path: Path) -> None:
    found = getattr(comfy_module("supported_models"), name)
    config = found({**found.unet_config, **found.unet_extra_config})
    config.custom_operations = comfy_module("ops").disable_weight_init
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.device("meta"):
        model = config.get_model({}, device="meta").diffusion_model
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    with Checkpoint(models.save_sparse(tmp_path / "m.safetensors", shapes)) as file:
        assert present(file) == "" and file.entries.keys() == shapes.keys()


@pytest.mark.parametrize("family", ["joint_blocks.*.x_block", "double_blocks.*.img"])
def test_a_lora_in_diffusers_names_is_for_the_likest_family(family: str) -> None:
    """SD3 and Flux share stored names and the final layer, but not what the names are for."""
    module = "attn.qkv" if "joint" in family else "_attn.qkv"
    attention = (family + ("." if "joint" in family else "") + module).replace("*", "0")
    spelled = lora_dialects._spellings({attention, "final_layer.linear"})
    assert spelled["transformer_blocks_7_attn_to_k"] == (attention.replace("0", "7"), 1, 3)
