"""ACE-Step (sound) and Hunyuan3D 2.1 (shapes)."""

from __future__ import annotations

from .row import EMBEDDER, FINAL, NORM, READ, TIME, Architecture, fold, numbered

# The feed-forward of the main blocks is of convolutions, which stay.
ACE = Architecture(
    name="ace",
    title="ACE-Step 1",
    all_of=("genre_embedder.weight", "transformer_blocks.0.cross_attn.to_q.weight"),
    blocks=(("main", numbered("transformer_blocks")), ("lyrics", numbered(r"lyric_encoder\.encoders"))),
    shared=(
        ("block", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("model", ("cross_attn.to_k", "cross_attn.to_v")),  # text, speaker and lyrics
        ("block", tuple(f"self_attn.linear_{kind}" for kind in "qkv")),
        ("model", ("self_attn.linear_pos",)),
    ),
    protected=(
        (r"^(?:genre_embedder|speaker_embedder|lyric_embs|lyric_encoder\.embed|lyric_proj|proj_in)(?:\.|$)", EMBEDDER),
        (r"^(?:timestep_embedder|t_block)\.", TIME),
        (r"^final_layer\.", FINAL),
        (r"^projectors\.", "serves training only"),
        *NORM,
    ),
    folds=(
        fold(("cross_attn.to_out.0",), "cross_attn.to_v"),
        fold(tuple(f"self_attn.linear_{kind}" for kind in "qkv"), "norm_mha"),
        fold(("feed_forward.w_1",), "norm_ff"),
        fold(("self_attn.linear_out",), "self_attn.linear_v"),
    ),
)

# Four small transformers make the condition, the fifth draws; the fifth's norms are modulated by a table.
_ENCODERS = (
    ("lyrics", r"encoder\.lyric_encoder\.layers"),
    ("timbre", r"encoder\.timbre_encoder\.layers"),
    ("tokenizer", r"tokenizer\.attention_pooler\.layers"),
    ("detokenizer", r"detokenizer\.layers"),
)
ACE15 = Architecture(
    name="ace15",
    encoders=("qwen3_2b", "qwen3_4b"),
    title="ACE-Step 1.5",
    all_of=("encoder.lyric_encoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attn.q_proj.weight"),
    blocks=(("main", numbered(r"decoder\.layers")), *((name, numbered(path)) for name, path in _ENCODERS)),
    shared=(
        ("block", tuple(f"self_attn.{kind}_proj" for kind in "qkv")),
        ("model", ("cross_attn.k_proj", "cross_attn.v_proj")),  # the condition
        ("block", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    protected=(
        (r"^decoder\.time_embed(?:_r)?\.", TIME),
        (r"^decoder\.proj_out", FINAL),
        (r"^detokenizer\.proj_out$", EMBEDDER),
        (r"^(?:decoder|encoder|tokenizer|detokenizer)\.(?!.*layers\.\d+\.)", EMBEDDER),
        *NORM,
    ),
    folds=(
        fold(tuple(f"self_attn.{kind}_proj" for kind in "qkv"), "input_layernorm"),
        fold(("cross_attn.q_proj",), "cross_attn_norm"),
        *(fold((f"{attn}.o_proj",), f"{attn}.v_proj", head=f"{attn}.k_norm") for attn in ("self_attn", "cross_attn")),
        fold(("mlp.down_proj",), "mlp.up_proj"),
    ),
)

# Heads hold q, k and v by turns, so value rows do not face the columns of out_proj: no fold. Experts as in HiDream.
HUNYUAN3D21 = Architecture(
    name="hunyuan3d21",
    title="Hunyuan3D 2.1",
    all_of=("t_embedder.mlp.2.weight", "blocks.0.attn1.k_norm.weight", "x_embedder.weight"),
    blocks=(("main", numbered("blocks")),),
    shared=(
        ("block", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("model", ("attn2.to_k", "attn2.to_v")),  # the picture
    ),
    protected=((r"^x_embedder$", EMBEDDER), (r"^t_embedder\.", TIME), (r"^final_layer\.", FINAL), *NORM),
    shape_read=((r"^x_embedder$", READ.format("the number of latent channels")),),
    notes=((r"\.experts\.", "an expert: sees only the tokens sent to it, so its calibration needs more runs"),),
    folds=(
        fold(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm1"),
        fold(("attn2.to_q",), "norm2"),
        fold(("mlp.fc1",), "norm3"),
    ),
)
