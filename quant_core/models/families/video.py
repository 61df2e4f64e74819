"""LTX-Video, Cosmos and Anima, Kandinsky 5, Mochi, SeedVR2."""

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
    Producer,
    fold,
    numbered,
)

_LATENT = "the number of latent channels"

# Modulation comes from a table plus one Linear for all blocks. Text keys and values are of one block only: LTX-2.3
# modulates the text in each. Gates of heads (LTX-2.3) see what q sees.
LTXV = Architecture(
    name="ltxv",
    encoders=("t5xxl",),
    title="LTX-Video",
    all_of=("adaln_single.linear.weight", "patchify_proj.weight", "transformer_blocks.0.attn2.to_k.weight"),
    none_of=("pos_embed.proj.bias",),  # PixArt in diffusers' layout
    blocks=(("main", numbered("transformer_blocks")),),
    shared=(
        ("block", ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_gate_logits")),
        ("block", ("attn2.to_k", "attn2.to_v")),
        ("block", ("attn2.to_q", "attn2.to_gate_logits")),
    ),
    protected=(
        (r"^(?:audio_)?(?:patchify_proj|caption_projection)", EMBEDDER),
        (r"^(?:\w+_)?adaln_single\.", TIME),
        (r"^(?:audio_)?proj_out$", FINAL),
        *NORM,
    ),
    shape_read=((r"^transformer_blocks\.0\.attn2\.to_k$", READ.format("the width of the embedded text")),),
    folds=(fold(("attn1.to_out.0",), "attn1.to_v"), fold(("attn2.to_out.0",), "attn2.to_v")),
)

_AV = ("audio_to_video_attn", "video_to_audio_attn")
LTXAV = replace(
    LTXV,
    name="ltxav",
    encoders=("t5xxl",),
    title="LTX-2",
    all_of=(*LTXV.all_of, "audio_adaln_single.linear.weight"),
    blocks=(
        *LTXV.blocks,
        *((f"{side}_connector", numbered(rf"{side}_embeddings_connector\.transformer_1d_blocks"))
          for side in ("audio", "video")),
    ),
    shared=(
        *LTXV.shared,
        *((scope, tuple(f"audio_{kind}" for kind in kinds)) for scope, kinds in LTXV.shared),
        *(("block", (f"{attn}.to_k", f"{attn}.to_v")) for attn in _AV),
        *(("block", (f"{attn}.to_q", f"{attn}.to_gate_logits")) for attn in _AV),
    ),
    notes=((r"\.to_gate_logits$", "gate of whole heads: a row per head, and small"),),
    folds=tuple(
        fold((f"{attn}.to_out.0",), f"{attn}.to_v") for attn in ("attn1", "attn2", "audio_attn1", "audio_attn2", *_AV)
    ),
)  # fmt: skip

_LOW_RANK = "modulation through 256 channels: scales a whole block, sees one row per step; 8 bit is careful"
COSMOS = Architecture(
    name="cosmos",
    encoders=("t5xxl",),
    title="Cosmos 1",
    all_of=("blocks.block0.blocks.0.block.attn.to_q.0.weight", "x_embedder.proj.1.weight"),
    blocks=(("main", r"^blocks\.block(?P<block>\d+)\.(?P<kind>.+)$"),),
    shared=(
        ("block", tuple(f"blocks.0.block.attn.to_{kind}.0" for kind in "qkv")),
        ("model", tuple(f"blocks.1.block.attn.to_{kind}.0" for kind in "kv")),  # the text
        ("model", tuple(f"blocks.{part}.adaLN_modulation.1" for part in range(3))),
    ),
    protected=(
        (r"^x_embedder\.", EMBEDDER),
        (r"^t_embedder\.", TIME),
        (r"^final_layer\.", FINAL),
        (r"(?:^|\.)to_[qkv]\.1$", NORM[0][1]),
        *NORM,
    ),
    shape_read=((r"^x_embedder\.proj\.1$", READ.format(_LATENT)),),
    notes=((r"\.adaLN_modulation\.[12]$", _LOW_RANK),),
    folds=tuple(fold((f"blocks.{i}.block.attn.to_out.0",), f"blocks.{i}.block.attn.to_v.0") for i in range(2)),
)

COSMOS_PREDICT2 = Architecture(
    name="cosmos_predict2",
    encoders=("t5xxl",),
    title="Cosmos-Predict2",
    all_of=("blocks.0.mlp.layer1.weight", "blocks.0.cross_attn.q_proj.weight", "x_embedder.proj.1.weight"),
    blocks=(("main", numbered("blocks")),),
    shared=(
        ("block", tuple(f"self_attn.{kind}_proj" for kind in "qkv")),
        ("model", ("cross_attn.k_proj", "cross_attn.v_proj")),  # the text
        ("model", tuple(f"adaln_modulation_{part}.1" for part in ("self_attn", "cross_attn", "mlp"))),
    ),
    protected=COSMOS.protected,
    shape_read=COSMOS.shape_read,
    notes=((r"\.adaln_modulation_\w+\.[12]$", _LOW_RANK),),
    folds=tuple(fold((f"{attn}.output_proj",), f"{attn}.v_proj") for attn in ("self_attn", "cross_attn")),
)

# The adapter turns Qwen3's features into the text that all blocks see; its cross-attention sees those features.
ANIMA = replace(
    COSMOS_PREDICT2,
    name="anima",
    encoders=("qwen3_06b",),
    title="Anima",
    all_of=(*COSMOS_PREDICT2.all_of, "llm_adapter.blocks.0.cross_attn.q_proj.weight"),
    blocks=(*COSMOS_PREDICT2.blocks, ("text", numbered(r"llm_adapter\.blocks"))),
    shared=(COSMOS_PREDICT2.shared[0], *(("subgraph", kinds) for _, kinds in COSMOS_PREDICT2.shared[1:])),
    protected=((r"^llm_adapter\.(?:embed|in_proj|out_proj)$", EMBEDDER), *COSMOS.protected),
    notes=((r"^llm_adapter\.blocks\.", "makes the text that all blocks see; 8 bit is careful"), *COSMOS_PREDICT2.notes),
    folds=(
        *COSMOS_PREDICT2.folds,
        fold(tuple(f"self_attn.{kind}_proj" for kind in "qkv"), "norm_self_attn"),
        fold(("cross_attn.q_proj",), "norm_cross_attn"),
        fold(("mlp.0",), "norm_mlp"),
        *(fold((f"{attn}.o_proj",), f"{attn}.v_proj") for attn in ("self_attn", "cross_attn")),
    ),
)

_KANDINSKY = ("self_attention", "cross_attention")
KANDINSKY5 = Architecture(
    name="kandinsky5",
    encoders=("qwen25_7b",),
    title="Kandinsky 5",
    all_of=("visual_transformer_blocks.0.cross_attention.key_norm.weight", "visual_embeddings.in_layer.weight"),
    blocks=(("visual", numbered("visual_transformer_blocks")), ("text", numbered("text_transformer_blocks"))),
    shared=(
        ("block", tuple(f"self_attention.to_{kind}" for kind in ("query", "key", "value"))),
        ("model", ("cross_attention.to_key", "cross_attention.to_value")),  # the text
        ("model", ("visual_modulation.out_layer",)),  # apart: image to video replaces part of what this one sees
        ("model", ("text_modulation.out_layer",)),
    ),
    protected=(
        (r"^(?:visual|text|pooled_text)_embeddings\.", EMBEDDER),
        (r"^time_embeddings\.", TIME),
        (r"^out_layer\.", FINAL),
        *NORM,
    ),
    shape_read=((r"^visual_embeddings\.in_layer$", READ.format(_LATENT)),),
    notes=((r"_modulation\.out_layer$", MODULATION_NOTE),),
    # a modulation has fewer columns than the block has channels: its rows are parts of its rows
    folds=tuple(fold((f"{attn}.out_layer",), f"{attn}.to_value") for attn in _KANDINSKY),
)

# x is the video, y the text; the last block has no text side. The second half of w1 is its linear arm.
MOCHI = Architecture(
    name="mochi",
    encoders=("t5xxl",),
    title="Mochi 1",
    all_of=("t5_yproj.weight", "blocks.0.attn.qkv_x.weight"),
    blocks=(("main", numbered("blocks")),),
    shared=(("model", ("mod_x", "mod_y")),),
    protected=(
        (r"^(?:x_embedder|t5_y_embedder|t5_yproj)(?:\.|$)", EMBEDDER),
        (r"^t_embedder\.", TIME),
        (r"^final_layer\.", FINAL),
        *NORM,
    ),
    notes=((r"\.mod_[xy]$", MODULATION_NOTE),),
    folds=(
        *(fold((f"mlp_{side}.w2",), Producer(f"mlp_{side}.w1", (0.5, 0))) for side in "xy"),
    ),
)  # fmt: skip

# Video and text have weights of their own, or ".all" for both.
_SIDES = ("vid", "txt", "all")
SEEDVR2 = Architecture(
    name="seedvr2",
    title="SeedVR2",
    all_of=("vid_in.proj.weight", "emb_in.proj_in.weight", "vid_out.proj.weight"),
    blocks=(("main", numbered("blocks")),),
    shared=tuple(("block", (f"mlp.{side}.proj_in_gate", f"mlp.{side}.proj_in")) for side in _SIDES),
    protected=(
        (r"^(?:vid_in|txt_in)(?:\.|$)", EMBEDDER),
        (r"^emb_in\.", TIME),
        (r"^vid_out\.", FINAL),
        (r"norm[^.]*\.(?:vid|txt|all)$", NORM[0][1]),
        *NORM,
    ),
)
