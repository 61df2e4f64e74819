"""Flux and those that took its blocks."""

from __future__ import annotations

from dataclasses import replace

from .row import (
    EMBEDDER,
    FINAL,
    MODULATION_NOTE,
    NORM,
    READ,
    TIME,
    Architecture,
    Consumer,
    FoldRule,
    Producer,
    fold,
    modulated,
    numbered,
    value_rows,
)

FLUX = Architecture(
    name="flux",
    encoders=("t5xxl", "qwen25_7b"),
    title="Flux.1 (dev, schnell)",
    all_of=("img_in.weight", "txt_in.weight", "double_blocks.0.img_mod.lin.weight", "single_blocks.0.linear1.weight"),
    any_of=tuple(f"double_blocks.0.img_attn.norm.key_norm.{end}" for end in ("scale", "weight")),
    blocks=(("double", numbered("double_blocks")), ("single", numbered("single_blocks"))),
    shared=(("model", ("img_mod.lin", "txt_mod.lin", "modulation.lin")),),
    protected=(
        (r"^(?:img_in|txt_in|vector_in)(?:\.|$)", EMBEDDER),
        (r"^(?:time_in|guidance_in)\.", TIME),
        (r"^final_layer\.", FINAL),
        *NORM,
    ),
    shape_read=(
        (r"^img_in$", READ.format("the number of latent channels")),
        (r"^txt_in$", READ.format("the width of the text features")),
        (r"^vector_in\.in_layer$", READ.format("the width of the pooled text")),
    ),
    notes=((r"\.(?:img_mod|txt_mod|modulation)\.lin$", MODULATION_NOTE),),
    # Not mlp.2 and the other columns of linear2: GELU. Not the modulation: all blocks see the same vector.
    folds=(
        *(modulated((f"{side}_attn.qkv",), f"{side}_mod.lin", 0) for side in ("img", "txt")),
        *(modulated((f"{side}_mlp.0",), f"{side}_mod.lin", 3) for side in ("img", "txt")),
        modulated(("linear1",), "modulation.lin", 0),
        # attention over both: every output holds values of either
        fold(
            ("img_attn.proj", "txt_attn.proj"),
            *(value_rows(f"{side}_attn.qkv") for side in ("img", "txt")),
        ),
        FoldRule((Consumer("linear2", stop=(1, 0)),), (Producer("linear1", (0, 2), (0, 3)),)),
    ),
)

# Modulation lies outside the blocks, one Linear for all of them, and is kept. No Linear has a bias. MLPs are gated:
# their last rows are the linear arm. Nothing folds into linear2's columns of attention, which are its fewer.
FLUX2 = replace(
    FLUX,
    name="flux2",
    encoders=("mistral3_24b", "qwen3_4b", "qwen3_8b"),
    title="Flux.2 (dev, klein)",
    all_of=("img_in.weight", "double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
    any_of=(),
    shared=(),
    protected=((r"^(?:double|single)_stream_modulation", TIME), *FLUX.protected),
    shape_read=FLUX.shape_read[:2],
    notes=(),
    folds=(
        fold(("img_attn.proj", "txt_attn.proj"), value_rows("img_attn.qkv"), value_rows("txt_attn.qkv")),
        *(fold((f"{side}_mlp.2",), Producer(f"{side}_mlp.0", (0.5, 0))) for side in ("img", "txt")),
        FoldRule((Consumer("linear2", start=(1, 0)),), (Producer("linear1", (0.5, 1.5)),)),
    ),
)

# The distilled guidance layer makes the modulation of all blocks. in_channels is fixed, whatever img_in says.
CHROMA = replace(
    FLUX,
    name="chroma",
    encoders=("t5xxl",),
    title="Chroma",
    all_of=("txt_in.weight", "double_blocks.0.img_attn.qkv.weight"),
    any_of=tuple(
        f"distilled_guidance_layer.{middle}norms.0.{end}" for middle in ("", "0.") for end in ("scale", "weight")
    ),
    shared=(),
    protected=(
        (r"^distilled_guidance_layer\.", TIME),
        (r"^img_in(?:_patch)?$", EMBEDDER),
        (r"^nerf_image_embedder\.", EMBEDDER),
        (r"^nerf_(?:blocks|final_layer)", FINAL),
        *FLUX.protected,
    ),
    shape_read=FLUX.shape_read[1:2],
    notes=(),
    folds=FLUX.folds[-2:],
)
CHROMA_RADIANCE = replace(
    CHROMA,
    name="chroma_radiance",
    encoders=("t5xxl",),
    title="Chroma Radiance",
    all_of=("img_in_patch.weight", *CHROMA.all_of),
)

HUNYUAN_VIDEO = replace(
    FLUX,
    name="hunyuan_video",
    encoders=("llama", "qwen25_7b"),
    title="HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1",
    all_of=("txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_mod.lin.weight"),
    any_of=(),
    blocks=(*FLUX.blocks, ("refiner", numbered(r"txt_in\.individual_token_refiner\.blocks"))),
    shared=(*FLUX.shared, ("model", ("adaLN_modulation.1",))),
    protected=(
        (r"^(?:txt_in\.t_embedder|txt_in\.c_embedder|time_r_in)\.", TIME),
        (r"^(?:txt_in\.input_embedder|img_in\.proj|byt5_in\.|vision_in\.|cond_type_embedding)", EMBEDDER),
        (r"^(?:vector_in)\.", EMBEDDER),
        (r"^(?:time_in|guidance_in)\.", TIME),
        (r"^final_layer\.", FINAL),
        *NORM,
    ),
    shape_read=((r"^txt_in\.input_embedder$", READ.format("the width of the text features")),),
    folds=(
        *FLUX.folds,
        fold(("self_attn.qkv",), "norm1"),
        fold(("mlp.0",), "norm2"),
        fold(("self_attn.proj",), value_rows("self_attn.qkv")),
    ),
)

HUNYUAN3D = replace(
    FLUX,
    name="hunyuan3d",
    encoders=(),
    title="Hunyuan3D 2",
    all_of=("latent_in.weight", "cond_in.weight", "double_blocks.0.img_mod.lin.weight"),
    any_of=(),
    protected=((r"^(?:latent_in|cond_in)$", EMBEDDER), *FLUX.protected),
    shape_read=(
        (r"^latent_in$", READ.format("the number of latent channels")),
        (r"^cond_in$", READ.format("the width of the image features")),
    ),
)
