"""HiDream, OmniGen2 and Boogu, PixArt, Krea 2, Ideogram 4."""

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
    fold,
    numbered,
    value_rows,
)

_LATENT = "the number of latent channels"

# Experts are Linears of their own, each sees the tokens that were sent to it; their router is no Linear to the loader.
_HIDREAM_FF = (*(f"ff_i.experts.{i}" for i in range(4)), "ff_i.shared_experts", "ff_t")
HIDREAM = Architecture(
    name="hidream",
    title="HiDream-I1, HiDream-E1",
    all_of=("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight"),
    blocks=(
        ("double", numbered(r"double_stream_blocks", r"block\.")),
        ("single", numbered(r"single_stream_blocks", r"block\.")),
    ),
    shared=(
        ("block", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("block", ("attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t")),
        *(("block", (f"{ff}.w1", f"{ff}.w3")) for ff in _HIDREAM_FF),
        ("model", ("adaLN_modulation.1",)),
    ),
    protected=(
        (r"^(?:x_embedder|p_embedder|caption_projection)\.", EMBEDDER),
        (r"^t_embedder\.", TIME),
        (r"^final_layer\.", FINAL),
        *NORM,
    ),
    notes=(
        (r"\.adaLN_modulation\.1$", MODULATION_NOTE),
        (r"\.experts\.", "an expert: sees only the tokens sent to it, so its calibration needs more runs"),
    ),
    folds=(
        fold(("attn1.to_out", "attn1.to_out_t"), "attn1.to_v", "attn1.to_v_t"),
        *(fold((f"{ff}.w2",), f"{ff}.w3") for ff in _HIDREAM_FF),
    ),
)

# A language model that draws pixels; the image encoder for references is kept.
HIDREAM_O1 = Architecture(
    name="hidream_o1",
    title="HiDream-O1",
    all_of=("t_embedder1.mlp.0.weight", "x_embedder.proj1.weight", "language_model.layers.0.self_attn.q_proj.weight"),
    blocks=(("main", numbered(r"language_model\.layers")),),
    shared=(
        ("block", tuple(f"self_attn.{kind}_proj" for kind in "qkv")),
        ("block", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    protected=(
        (r"^(?:visual|x_embedder|language_model\.embed_tokens)(?:\.|$)", EMBEDDER),
        (r"^t_embedder1\.", TIME),
        (r"^final_layer2\.", FINAL),
        *NORM,
    ),
    folds=(
        fold(tuple(f"self_attn.{kind}_proj" for kind in "qkv"), "input_layernorm"),
        fold(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        fold(("self_attn.o_proj",), "self_attn.v_proj", head="self_attn.k_norm"),
        fold(("mlp.down_proj",), "mlp.up_proj"),
    ),
)

# The context refiner has no modulation: its norm1 is the norm itself.
OMNIGEN2 = Architecture(
    name="omnigen2",
    encoders=("qwen25_3b",),
    title="OmniGen2",
    all_of=("time_caption_embed.timestep_embedder.linear_1.bias", "layers.0.attn.to_q.weight"),
    blocks=tuple(
        (name, numbered(container))
        for name, container in (
            ("main", "layers"),
            *((f"{kind}_refiner", f"{kind}_refiner") for kind in ("noise", "ref_image", "context")),
        )
    ),
    shared=(
        ("block", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("block", ("feed_forward.linear_1", "feed_forward.linear_3")),
        ("model", ("norm1.linear",)),
    ),
    protected=(
        (r"^(?:x_embedder|ref_image_patch_embedder|time_caption_embed\.caption_embedder)(?:\.|$)", EMBEDDER),
        (r"^time_caption_embed\.timestep_embedder\.", TIME),
        (r"^norm_out\.", FINAL),
        *NORM,
    ),
    notes=((r"norm\d\.linear$", MODULATION_NOTE),),
    folds=(
        fold(("attn.to_q", "attn.to_k", "attn.to_v"), "norm1.norm"),
        fold(("feed_forward.linear_1", "feed_forward.linear_3"), "ffn_norm1"),
        fold(("attn.to_out.0",), "attn.to_v", head="attn.norm_k"),
        fold(("feed_forward.linear_2",), "feed_forward.linear_3"),
    ),
)

_FF = ("img_feed_forward", "instruct_feed_forward")
_JOINT = "img_instruct_attn.processor"
BOOGU = replace(
    OMNIGEN2,
    name="boogu",
    encoders=("qwen3vl_8b",),
    title="Boogu-Image",
    all_of=(f"double_stream_layers.0.{_JOINT}.img_to_q.weight", "single_stream_layers.0.attn.to_q.weight"),
    blocks=(
        ("double", numbered("double_stream_layers")),
        ("single", numbered("single_stream_layers")),
        *OMNIGEN2.blocks[1:],
    ),
    shared=(
        *OMNIGEN2.shared[:2],
        *(("block", (f"{ff}.linear_1", f"{ff}.linear_3")) for ff in _FF),
        *(("block", tuple(f"{_JOINT}.{side}_to_{kind}" for kind in "qkv")) for side in ("img", "instruct")),
        ("block", tuple(f"img_self_attn.to_{kind}" for kind in "qkv")),
        ("model", ("norm1.linear", *(f"img_norm{i}.linear" for i in (1, 2, 3)),
                   *(f"instruct_norm{i}.linear" for i in (1, 2)))),
    ),
    folds=(
        *OMNIGEN2.folds,
        *(fold((f"{ff}.linear_2",), f"{ff}.linear_3") for ff in _FF),
        fold(("img_self_attn.to_out.0",), "img_self_attn.to_v", head="img_self_attn.norm_k"),
        fold(
            (f"{_JOINT}.img_out", f"{_JOINT}.instruct_out"),
            *(f"{_JOINT}.{side}_to_v" for side in ("img", "instruct")),
            head="img_instruct_attn.norm_k",
        ),
    ),
)  # fmt: skip

# Modulation comes from a table plus one Linear for all blocks.
PIXART = Architecture(
    name="pixart",
    title="PixArt (alpha, sigma)",
    all_of=("t_block.1.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.attn.qkv.weight"),
    blocks=(("main", numbered("blocks")),),
    shared=(("model", ("cross_attn.kv_linear",)),),  # the text
    protected=(
        (r"^(?:x_embedder|y_embedder)\.", EMBEDDER),
        (r"^(?:t_block|t_embedder|csize_embedder|ar_embedder)\.", TIME),
        (r"^final_layer\.", FINAL),
        *NORM,
    ),
    folds=(fold(("attn.proj",), value_rows("attn.qkv")),),
)

# Norms are stored as their distance from one, under ".scale": no fold reaches them.
_FUSION = ("attn.wq", "attn.wk", "attn.wv", "attn.gate")
KREA2 = Architecture(
    name="krea2",
    encoders=("qwen3vl_4b",),
    title="Krea 2",
    all_of=("txtfusion.projector.weight", "first.weight", "blocks.0.attn.wq.weight"),
    blocks=(
        ("main", numbered("blocks")),
        ("text_layers", numbered(r"txtfusion\.layerwise_blocks")),
        ("text", numbered(r"txtfusion\.refiner_blocks")),
    ),
    shared=(("block", _FUSION), ("block", ("mlp.gate", "mlp.up"))),
    protected=(
        (r"^(?:first|txtmlp\.\d+|txtfusion\.projector)$", EMBEDDER),
        (r"^(?:tmlp|tproj)\.", TIME),
        (r"^last\.", FINAL),
        *NORM,
    ),
    shape_read=(
        (r"^first$", READ.format(_LATENT)),
        (r"^txtfusion\.projector$", READ.format("the number of text layers")),
    ),
    notes=((r"^txtfusion\.", "makes the text that all blocks see; 8 bit is careful"),),
    folds=(fold(("mlp.down",), "mlp.up"), fold(("attn.wo",), "attn.wv")),
)

IDEOGRAM4 = Architecture(
    name="ideogram4",
    encoders=("qwen3vl_8b",),
    title="Ideogram 4",
    all_of=("embed_image_indicator.weight", "input_proj.weight", "layers.0.attention.qkv.weight"),
    blocks=(("main", numbered("layers")),),
    shared=(("block", ("feed_forward.w1", "feed_forward.w3")), ("model", ("adaln_modulation",))),
    protected=(
        (r"^(?:input_proj|llm_cond_proj|embed_image_indicator)$", EMBEDDER),
        (r"^(?:t_embedding|adaln_proj)(?:\.|$)", TIME),
        (r"^final_layer\.", FINAL),
        *NORM,
    ),
    shape_read=((r"^input_proj$", READ.format(_LATENT)),),
    notes=((r"\.adaln_modulation$", MODULATION_NOTE),),
    folds=(
        fold(("attention.qkv",), "attention_norm1"),
        fold(("feed_forward.w1", "feed_forward.w3"), "ffn_norm1"),
        fold(("attention.o",), value_rows("attention.qkv")),
        fold(("feed_forward.w2",), "feed_forward.w3"),
    ),
)

# One Linear makes the modulation of all blocks, so the norms' factors reach q, k and v past its shift: no fold of them.
ERNIE_IMAGE = Architecture(
    name="ernie_image",
    encoders=("ministral3_3b",),
    title="ERNIE-Image",
    all_of=("layers.0.mlp.linear_fc2.weight", "layers.0.self_attention.to_q.weight", "text_proj.weight"),
    blocks=(("main", numbered("layers")),),
    shared=(
        ("block", ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v")),
        ("block", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    protected=(
        (r"^(?:x_embedder\.proj|text_proj)$", EMBEDDER),
        (r"^(?:time_embedding|adaLN_modulation)\.", TIME),
        (r"^final_(?:norm\.linear|linear)$", FINAL),
        (r"\.adaLN_\w+_ln$", NORM[0][1]),
        *NORM,
    ),
    folds=(fold(("self_attention.to_out.0",), "self_attention.to_v"), fold(("mlp.linear_fc2",), "mlp.up_proj")),
)
