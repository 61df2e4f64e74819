"""Qwen-Image and those that took its blocks."""

from __future__ import annotations

from dataclasses import replace

from .row import EMBEDDER, FINAL, MODULATION_NOTE, NORM, READ, TIME, Architecture, fold, modulated, numbered

QWEN_IMAGE = Architecture(
    name="qwen_image",
    encoders=("qwen25_7b",),
    title="Qwen-Image",
    all_of=("txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"),
    not_size=(("txt_norm.weight", 0, 2560),),  # Mage-Flow: the same keys
    blocks=(("main", numbered("transformer_blocks")),),
    shared=(
        ("block", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("block", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("model", ("img_mod.1",)),  # apart: with reference images txt_mod sees half of img_mod's rows
        ("model", ("txt_mod.1",)),
    ),
    protected=(
        (r"^(?:img_in|txt_in)$", EMBEDDER),
        (r"^time_text_embed\.", TIME),
        (r"^(?:norm_out\.linear|proj_out)$", FINAL),
        *NORM,
    ),
    shape_read=((r"^img_in$", READ.format("the number of latent channels")),),
    notes=(
        (r"\.(?:img|txt)_mod\.1$", MODULATION_NOTE),
        (r"^transformer_blocks\.(?:0|1|58|59)\.", "NVIDIA's Qwen-Image-NVFP4 keeps the first and last two blocks"),
    ),
    # Not net.2: GELU. Not the modulation: all blocks see the same vector.
    folds=(
        modulated(("attn.to_q", "attn.to_k", "attn.to_v"), "img_mod.1", 0),
        modulated(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_mod.1", 0),
        modulated(("img_mlp.net.0.proj",), "img_mod.1", 3),
        modulated(("txt_mlp.net.0.proj",), "txt_mod.1", 3),
        fold(("attn.to_out.0", "attn.to_add_out"), "attn.to_v", "attn.add_v_proj"),
    ),
)

# The same keys as Qwen-Image: only a width tells them apart, so this row comes after it.
MAGE_FLOW = replace(
    QWEN_IMAGE,
    name="mage_flow",
    encoders=("qwen3vl_4b",),
    title="Mage-Flow",
    not_size=(),
    shape_read=(),
    notes=QWEN_IMAGE.notes[:1],
)
