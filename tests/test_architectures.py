"""Every row of the architecture table against published models' keys and shapes, and against ComfyUI itself."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_classes import CASES
from keys import make_keys

from quant_core.errors import CalibQuantError
from quant_core.models import architectures
from quant_core.models.architectures import Architecture, LayerInfo, by_name, detect, split_prefix
from quant_core.models.families.row import OUTSIDE as LIES_OUTSIDE

Shapes = dict[str, tuple[int, ...]]

ROW_OF = {
    "zimage": "zimage",
    "zimage_pixel": "zimage_pixel",
    "lumina2": "lumina2",
    "wan21_t2v_14b": "wan",
    "wan21_t2v_1.3b": "wan",
    "wan21_i2v_14b": "wan",
    "wan21_flf2v_14b": "wan",
    "wan21_vace_14b": "wan",
    "wan22_i2v_a14b": "wan",
    "wan22_ti2v_5b": "wan",
    "flux_dev": "flux",
    "flux_schnell": "flux",
    "sdxl": "sdxl",
    "sd15": "sd15",
    "qwen_image": "qwen_image",
    "mage_flow": "mage_flow",
    "ltxv_2b": "ltxv",
    "chroma": "chroma",
    "hunyuan_video": "hunyuan_video",
    "flux2_dev": "flux2",
    "flux2_klein_4b": "flux2",
    "chroma_radiance": "chroma_radiance",
    "hunyuan_video_15": "hunyuan_video",
    "hunyuan_image_21": "hunyuan_video",
    "hunyuan3d_2": "hunyuan3d",
    "hunyuan3d_21": "hunyuan3d21",
    "sd35_medium": "sd3",
    "auraflow": "auraflow",
    "ltx2": "ltxav",
    "cosmos_predict2_2b": "cosmos_predict2",
    "anima": "anima",
    "kandinsky5_lite": "kandinsky5",
    "mochi": "mochi",
    "seedvr2_3b": "seedvr2",
    "hidream_i1": "hidream",
    "hidream_o1": "hidream_o1",
    "omnigen2": "omnigen2",
    "boogu": "boogu",
    "pixart_sigma": "pixart",
    "krea2": "krea2",
    "ideogram4": "ideogram4",
    "ace_step": "ace",
    "ace_step_15": "ace15",
}
VARIANTS = list(ROW_OF)

# What ComfyUI calls each: the class in comfy.supported_models.
COMFY_NAME = {
    "zimage": "ZImage", "zimage_pixel": "ZImagePixelSpace", "lumina2": "Lumina2",
    "wan21_t2v_14b": "WAN21_T2V", "wan21_t2v_1.3b": "WAN21_T2V", "wan21_i2v_14b": "WAN21_I2V",
    "wan21_flf2v_14b": "WAN21_I2V", "wan21_vace_14b": "WAN21_Vace",
    "wan22_i2v_a14b": "WAN21_T2V", "wan22_ti2v_5b": "WAN22_T2V",
    "flux_dev": "Flux", "flux_schnell": "FluxSchnell", "sdxl": "SDXL", "sd15": "SD15", "qwen_image": "QwenImage",
    "mage_flow": "MageFlow", "ltxv_2b": "LTXV", "chroma": "Chroma", "hunyuan_video": "HunyuanVideo",
    **{variant: CASES[case].name for variant, (case, _) in make_keys.OF_CASE.items()},
}  # fmt: skip

# The layers whose shape[1] ComfyUI reads (model_detection.py), written down by hand and proven by experiment below.
READ_BY_COMFYUI = {
    "zimage": {"cap_embedder.1"},
    "zimage_pixel": {"cap_embedder.1", "x_embedder", "dec_net.input_embedder.embedder.0"},
    "lumina2": {"cap_embedder.1"},
    "flux_dev": {"img_in", "txt_in", "vector_in.in_layer"},
    "flux_schnell": {"img_in", "txt_in", "vector_in.in_layer"},
    "sdxl": {"label_emb.0.0", "input_blocks.4.1.transformer_blocks.0.attn2.to_k"},
    "sd15": {"input_blocks.1.1.transformer_blocks.0.attn2.to_k"},
    "qwen_image": {"img_in"},
    **{variant: {"transformer_blocks.0.attn2.to_k"} for variant in ("ltxv_2b", "ltx2")},
    **{variant: {"img_in", "txt_in"} for variant in ("flux2_dev", "flux2_klein_4b")},
    "chroma_radiance": {"txt_in"},
    **{variant: {"txt_in.input_embedder"} for variant in ("hunyuan_video_15", "hunyuan_image_21")},
    "hunyuan3d_2": {"latent_in", "cond_in"},
    "hunyuan3d_21": {"x_embedder"},
    "sd35_medium": {"context_embedder", "y_embedder.mlp.0"},
    "auraflow": {"cond_seq_linear"},
    **{variant: {"x_embedder.proj.1"} for variant in ("cosmos_predict2_2b", "anima")},
    "kandinsky5_lite": {"visual_embeddings.in_layer"},
    "krea2": {"first", "txtfusion.projector"},
    "ideogram4": {"input_proj"},
    "chroma": {"txt_in"},  # in_channels is fixed, whatever img_in says
    "hunyuan_video": {"txt_in.input_embedder"},
}

ALL_IN_ONE: Shapes = {
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280),
    "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj.weight": (4096, 2560),
    "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "vae.decoder.conv_in.weight": (512, 16, 3, 3),
    "vae.blocks.0.self_attn.q.weight": (64, 64),  # a decoy: the name of a Wan layer, outside the diffusion model
}


def layers_of(shapes: Shapes) -> Shapes:
    """The 2-D weights, by layer name."""
    return {key.removesuffix(".weight"): s for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2}


def described(variant: str) -> tuple[Architecture, dict[str, LayerInfo], Shapes]:
    shapes = make_keys.load(variant)
    row = by_name(ROW_OF[variant])
    layers = layers_of(shapes)
    return row, {name: row.describe(name) for name in layers}, layers


def test_there_is_a_key_list_for_every_variant() -> None:
    assert sorted(make_keys.names()) == sorted(VARIANTS) == sorted(make_keys.VARIANTS)


# --- detection
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_model_is_detected_as_its_row(variant: str, prefix: str) -> None:
    shapes = {prefix + key: shape for key, shape in make_keys.load(variant).items()}
    assert detect(shapes, shapes).name == ROW_OF[variant]
    assert split_prefix(shapes) == prefix


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_all_in_one_checkpoint_is_detected_by_its_diffusion_model(variant: str) -> None:
    shapes = {"model.diffusion_model." + key: shape for key, shape in make_keys.load(variant).items()}
    shapes = ALL_IN_ONE | shapes
    assert split_prefix(shapes) == "model.diffusion_model."
    assert detect(shapes, shapes).name == ROW_OF[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_alone_are_enough_for_every_family_but_one(variant: str) -> None:
    assert detect(make_keys.load(variant)).name == ROW_OF[variant].replace("mage_flow", "qwen_image")


def test_a_model_nobody_knows_is_generic() -> None:
    row = detect(["encoder.layers.0.fc.weight", "head.weight"])
    assert row.name == "generic"
    assert detect([]).name == "generic"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CalibQuantError, match=r"unknown architecture 'sd9'.*zimage.*generic"):
        by_name("sd9")


def test_names_are_unique_and_generic_comes_last() -> None:
    names = [row.name for row in architectures.ARCHITECTURES]
    assert len(set(names)) == len(names)
    assert names[-1] == "generic"


@pytest.mark.parametrize("variant", VARIANTS)
def test_comfyui_detects_the_same_model(variant: str, detector: Callable[[Shapes], Any], comfy: Path) -> None:
    import comfy.model_detection

    shapes = make_keys.load(variant)
    config = comfy.model_detection.model_config_from_unet_config(detector(shapes), dict.fromkeys(shapes))
    assert type(config).__name__ == COMFY_NAME[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_key_lists_are_those_of_comfyuis_classes(variant: str, comfy: Path) -> None:
    assert make_keys.build(variant) == make_keys.load(variant)


# --- layers
# Outside the blocks of each family, by the first part of the name; all else must have a block.
OUTSIDE = {
    "zimage": "x_embedder cap_embedder t_embedder final_layer dec_net",
    "wan": "text_embedding time_embedding time_projection img_emb head",
    "flux": "img_in txt_in vector_in time_in guidance_in final_layer",
    "sdxl": "time_embed label_emb",
    "qwen_image": "img_in txt_in time_text_embed norm_out proj_out",
    "chroma": "img_in txt_in distilled_guidance_layer final_layer nerf_image_embedder nerf_blocks nerf_final_layer",
    "flux2": "img_in txt_in time_in guidance_in final_layer double_stream_modulation_img double_stream_modulation_txt "
             "single_stream_modulation",
    "hunyuan3d": "latent_in cond_in time_in final_layer",
    "hunyuan3d21": "x_embedder t_embedder final_layer",
    "sd3": "y_embedder t_embedder context_embedder final_layer",
    "auraflow": "cond_seq_linear init_x_linear t_embedder final_linear modF",
    "ltxv": "patchify_proj caption_projection adaln_single proj_out",
    "cosmos_predict2": "x_embedder t_embedder final_layer",
    "kandinsky5": "visual_embeddings text_embeddings pooled_text_embeddings time_embeddings out_layer",
    "mochi": "t5_y_embedder t5_yproj t_embedder final_layer",
    "seedvr2": "vid_in txt_in emb_in vid_out",
    "hidream": "x_embedder p_embedder t_embedder caption_projection final_layer",
    "hidream_o1": "visual x_embedder t_embedder1 final_layer2",
    "omnigen2": "x_embedder ref_image_patch_embedder time_caption_embed norm_out",
    "pixart": "t_block t_embedder y_embedder final_layer",
    "krea2": "first tmlp txtmlp tproj last",
    "ideogram4": "input_proj llm_cond_proj t_embedding adaln_proj embed_image_indicator final_layer",
    "ace": "timestep_embedder t_block speaker_embedder genre_embedder lyric_embs lyric_proj projectors final_layer",
}  # fmt: skip
# Families whose blocks lie deeper than others of their outsiders: first parts do not tell them apart.
NESTED = {
    "hunyuan_video": r"^(?!(?:double|single)_blocks|txt_in\.individual)",
    "hidream_o1": r"^(?!language_model\.layers)", "krea2": r"^(?!blocks|txtfusion\.\w+_blocks)",
    "anima": r"^(?!(?:llm_adapter\.)?blocks)", "ace": r"^(?!transformer_blocks|lyric_encoder\.encoders)",
    "ace15": r"^(?!.*layers\.)", "ltxav": r"^(?!.*_blocks\.)",
}  # fmt: skip
OUTSIDE |= {"chroma_radiance": OUTSIDE["chroma"], "mage_flow": OUTSIDE["qwen_image"], "boogu": OUTSIDE["omnigen2"]}
OUTSIDE |= {"lumina2": OUTSIDE["zimage"], "zimage_pixel": OUTSIDE["zimage"], "sd15": OUTSIDE["sdxl"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_matrix_lies_in_a_block_or_is_a_protected_outsider(variant: str) -> None:
    row, infos, _ = described(variant)
    first_parts = OUTSIDE.get(row.name, "").replace(" ", "|")
    outside = re.compile(NESTED.get(row.name, rf"^(?:{first_parts})(?:\.|$)"))
    for name, info in infos.items():
        if outside.match(name):
            assert (info.block, info.subgraph, info.kind) == (None, "", name)
            assert info.protected and info.protected != LIES_OUTSIDE, f"{name}: needs a reason of its own"
        else:
            assert info.block is not None and info.subgraph, name
            assert name.endswith("." + info.kind)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_layers_share_their_place(variant: str) -> None:
    _, infos, _ = described(variant)
    places = [(info.subgraph, info.block, info.kind) for info in infos.values()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefix_or_weight_suffix_changes_nothing_but_the_name(variant: str) -> None:
    row, infos, _ = described(variant)
    for name, info in infos.items():
        for prefix in architectures.PREFIXES:
            assert row.describe(f"{prefix}{name}.weight") == LayerInfo(**vars(info) | {"name": prefix + name})


@pytest.mark.parametrize(
    ("variant", "subgraphs"),
    [
        ("zimage", {"main": 30, "context_refiner": 2, "noise_refiner": 2}),
        ("lumina2", {"main": 26, "context_refiner": 2, "noise_refiner": 2}),
        ("wan21_t2v_14b", {"main": 40}),
        ("wan21_t2v_1.3b", {"main": 30}),
        ("wan21_vace_14b", {"main": 40, "vace": 8}),
        ("flux_dev", {"double": 19, "single": 38}),
        ("qwen_image", {"main": 60}),
        ("chroma", {"double": 19, "single": 38}),
        ("ltxv_2b", {"main": 28}),
        ("ltx2", {"main": 48, "audio_connector": 2, "video_connector": 2}),
        ("hunyuan_video", {"double": 20, "single": 40, "refiner": 2}),
        ("anima", {"main": 28, "text": 6}),
        ("hidream_i1", {"double": 16, "single": 32}),
        ("ace_step_15", {"main": 24, "lyrics": 8, "timbre": 4, "tokenizer": 2, "detokenizer": 2}),
    ],
)
def test_blocks_are_counted_right(variant: str, subgraphs: dict[str, int]) -> None:
    _, infos, _ = described(variant)
    blocks: dict[str, set[int]] = defaultdict(set)
    for info in infos.values():
        if info.block is not None:
            blocks[info.subgraph].add(info.block)
    assert {name: sorted(found) for name, found in blocks.items()} == {n: list(range(c)) for n, c in subgraphs.items()}


def test_zimage_has_the_202_matrices_of_the_published_recipes() -> None:
    _, infos, _ = described("zimage")
    quantizable = [info for info in infos.values() if info.block is not None and not info.protected]
    assert len(quantizable) == 202
    assert sum(info.kind == "adaLN_modulation.0" for info in quantizable) == 32
    assert all(info.note for info in quantizable if info.kind == "adaLN_modulation.0")


def test_vace_blocks_never_collide_with_blocks() -> None:
    row, infos, _ = described("wan21_vace_14b")
    assert row.describe("blocks.3.ffn.0").subgraph == "main"
    assert row.describe("vace_blocks.3.ffn.0").subgraph == "vace"
    assert {info.subgraph for name, info in infos.items() if name.startswith("vace_blocks.")} == {"vace"}
    assert {info.subgraph for name, info in infos.items() if name.startswith("blocks.")} == {"main"}
    assert row.describe("face_adapter.fuser_blocks.0.linear1_kv").protected  # Wan-Animate: not a block of the model


def test_unet_blocks_have_readable_numbers() -> None:
    sdxl = by_name("sdxl")
    info = sdxl.describe("model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k")
    assert (info.subgraph, info.block, info.kind) == ("input", 41, "attn2.to_k")
    info = sdxl.describe("middle_block.1.transformer_blocks.9.ff.net.0.proj")
    assert (info.subgraph, info.block, info.kind) == ("middle", 19, "ff.net.0.proj")
    assert sdxl.describe("output_blocks.2.1.proj_in").block == 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_listed_kinds_are_protected_inside_blocks(variant: str) -> None:
    _, infos, _ = described(variant)
    protected = {info.kind for info in infos.values() if info.block is not None and info.protected}
    assert protected == ({"emb_layers.1"} if variant in ("sd15", "sdxl") else set())


@pytest.mark.parametrize("variant", VARIANTS)
def test_norms_and_embeddings_outside_are_protected(variant: str) -> None:
    row = by_name(ROW_OF[variant])
    for key, shape in make_keys.load(variant).items():
        if key.endswith(".weight") and len(shape) == 1:
            assert row.describe(key).protected, key


# --- what is no Linear, in a file of any family; tests/test_comfy_classes.py has ComfyUI's own classes
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("layer", "beside", "what"),
    [
        ("blocks.15.moe.gate", "blocks.15.moe.experts.0.fc1.weight", "router"),  # Hunyuan3D 2.1
        ("double_stream_blocks.0.block.ff_i.gate", "double_stream_blocks.0.block.ff_i.experts.3.w1.weight", "router"),
        ("layers.4.mlp.router", "layers.4.mlp.experts.gate_up_proj", "router"),
        ("layers.4.mlp.gate.wg", "layers.4.mlp.experts.0.w1.weight", "router"),
        ("layers.4.mlp.gate", "layers.5.mlp.experts.0.w1.weight", ""),  # SwiGLU: this block has no experts
        ("layers.4.mlp.gate_proj", "layers.4.mlp.experts.0.w1.weight", ""),
        ("layers.4.mlp.experts.0.gate", "layers.4.mlp.experts.0.up.weight", ""),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "", "table"),  # T5
        *((name, "", "table") for name in ("shared", "language_model.embed_tokens", "visual.pos_embed", "lyric_embs")),
        *((name, "", "table") for name in ("prompt.point_embeddings.3", "decoder.mask_tokens")),
        ("x_embedder", "x_embedder.bias", ""),
        ("to_cond_embed.0", "", ""),
        ("pixel_blocks.3.adaLN_modulation.0", "pixel_blocks.3.adaLN_modulation.0.bias", "splits"),
        ("blocks.3.adaLN_modulation.0", "", ""),
    ],
)
def test_names_tell_what_is_no_linear(layer: str, beside: str, what: str, prefix: str) -> None:
    layer, keys = prefix + layer, [f"{prefix}{layer}.weight", prefix + beside]
    for row in (by_name("generic"), by_name("zimage")):
        info = row.describe_file([layer], keys)[layer]
        assert what in info.not_linear and bool(what) == bool(info.not_linear)
        assert info.protected == (info.not_linear or row.describe(layer).protected)


# --- shared inputs
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_that_share_an_input_have_the_same_width_and_are_complete(variant: str) -> None:
    row, infos, layers = described(variant)
    groups: dict[str, list[LayerInfo]] = defaultdict(list)
    for info in infos.values():
        if info.shared_input:
            groups[info.shared_input].append(info)
    for group, members in groups.items():
        assert len({layers[info.name][1] for info in members}) == 1, group
        kinds = {info.kind for info in members}
        scope, declared = next((s, set(k)) for s, k in row.shared if kinds & set(k))
        held = declared & {info.kind for info in infos.values()}  # some belong to later members of the family
        assert kinds == held or (scope == "block" and kinds < held), f"{group}: of {held} only {kinds}"
        if scope == "block":
            assert len(members) == len(kinds)
    assert not row.shared or groups


# --- shapes ComfyUI reads
@pytest.fixture(scope="module")
def detector(comfy: Path) -> Callable[[Shapes], Any]:
    """ComfyUI's unet_config of a model with these shapes (tensors without data)."""
    import torch
    from comfy.model_detection import detect_unet_config

    return lambda shapes: detect_unet_config({k: torch.empty(s, device="meta") for k, s in shapes.items()}, "")


def packed(shapes: Shapes, layers: set[str]) -> Shapes:
    """The shapes of the file in which these layers are NVFP4: two codes per byte."""
    keys = [f"{name}.weight" for name in layers]
    return shapes | {key: (shapes[key][0], shapes[key][1] // 2) for key in keys}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_whose_shape_comfyui_reads_are_flagged(variant: str) -> None:
    _, infos, _ = described(variant)
    flagged = {name for name, info in infos.items() if info.detects_shape}
    expected = READ_BY_COMFYUI.get(variant, set())
    assert flagged == expected


@pytest.mark.parametrize("variant", sorted(READ_BY_COMFYUI))
def test_packing_a_flagged_layer_breaks_detection(variant: str, detector: Callable[[Shapes], Any]) -> None:
    shapes = make_keys.load(variant)
    true_config = detector(shapes)
    for name in READ_BY_COMFYUI[variant]:
        try:
            config = detector(packed(shapes, {name}))
        except Exception as error:  # any failure in ComfyUI is what the flag warns of
            config = error
        assert config != true_config, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_all_other_layers_leaves_detection_alone(variant: str, detector: Callable[[Shapes], Any]) -> None:
    _, infos, _ = described(variant)
    shapes = make_keys.load(variant)
    unflagged = {name for name, info in infos.items() if not info.detects_shape}
    assert detector(packed(shapes, unflagged)) == detector(shapes)


# --- shared inputs, run
def _latent(channels: int, *extra: int) -> tuple[int, ...]:
    return (1, channels, *extra, 8, 8)


# variant -> (smaller configuration of the same class, shapes of forward()'s arguments after latent and timestep)
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "zimage": (
        dict(dim=256, n_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=64),
        _latent(16), dict(context=(1, 5, 64), num_tokens=5),
    ),
    "lumina2": (
        dict(dim=96, n_layers=2, n_heads=1, n_kv_heads=1, cap_feat_dim=64),
        _latent(16), dict(context=(1, 5, 64), num_tokens=5),
    ),
    "wan21_i2v_14b": (
        dict(dim=128, ffn_dim=256, num_heads=1, num_layers=2),
        _latent(36, 1), dict(context=(1, 6, 4096), clip_fea=(1, 257, 1280)),
    ),
    "wan21_vace_14b": (
        dict(dim=128, ffn_dim=256, num_heads=1, num_layers=4, vace_layers=2),
        _latent(16, 1), dict(context=(1, 6, 4096), vace_context=(1, 1, 96, 1, 8, 8), vace_strength=[1.0]),
    ),
    "flux_dev": (
        dict(hidden_size=128, num_heads=1, depth=2, depth_single_blocks=2, context_in_dim=64, vec_in_dim=32),
        _latent(16), dict(context=(1, 6, 64), y=(1, 32), guidance=(1,)),
    ),
    "sdxl": (
        dict(model_channels=32, context_dim=64, adm_in_channels=48, num_head_channels=16, transformer_depth_middle=2,
             transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2]),
        _latent(4), dict(context=(1, 6, 64), y=(1, 48)),
    ),
    "sd15": (dict(model_channels=32, context_dim=64, num_heads=2), _latent(4), dict(context=(1, 6, 64))),
    "qwen_image": (
        dict(num_layers=2, num_attention_heads=1, attention_head_dim=128, joint_attention_dim=64),
        _latent(16, 1), dict(context=(1, 6, 64)),
    ),
}  # fmt: skip


def inputs_seen(variant: str) -> dict[str, bytes]:
    """Run a small random model of this variant once: the input of every Linear, as bytes."""
    import importlib

    import comfy.ops
    import torch

    module, cls, config = make_keys.MODELS[variant]
    changes, latent, arguments = SMALL[variant]
    factory = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    model = getattr(importlib.import_module(module), cls)(**(config | changes), **factory)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    seen: dict[str, bytes] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].detach().contiguous().numpy().tobytes()})

    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(watch(name))
    random = {k: torch.randn(v, generator=generator) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with torch.no_grad():
        model(torch.randn(latent, generator=generator), torch.tensor([0.5]), **random)
    return seen


@pytest.mark.parametrize("variant", list(SMALL))
def test_shared_inputs_are_those_of_a_running_model(variant: str, comfy: Path) -> None:
    row = by_name(ROW_OF[variant])
    by_input: dict[bytes, set[str]] = defaultdict(set)
    by_group: dict[str, set[str]] = defaultdict(set)
    for name, data in inputs_seen(variant).items():
        info = row.describe(name)
        if info.block is not None:
            by_input[data].add(name)
            # Qwen-Image's two modulations are one input here and two with reference images: two groups in the table.
            by_group[info.shared_input.replace("img_mod", "txt_mod") or name].add(name)
    assert sorted(map(sorted, by_group.values())) == sorted(map(sorted, by_input.values()))
