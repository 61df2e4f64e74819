"""Wan."""

from __future__ import annotations

from .row import EMBEDDER, FINAL, NORM, TIME, Architecture, Producer, fold, numbered

# 2.1 and 2.2; t2v, i2v, first-last-frame, VACE, and the derivatives that ComfyUI knows by the same head (S2V, HuMo,
# Animate …), whose extra branches outside blocks.* stay.  ComfyUI reads convolutions, modulation and output sizes only,
# none of which changes when a Linear whose sizes divide is quantized.
WAN = Architecture(
    name="wan",
    encoders=("umt5xxl",),
    title="Wan 2.1 / 2.2",
    all_of=("head.modulation", "head.head.weight", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight"),
    blocks=(("main", numbered("blocks")), ("vace", numbered("vace_blocks"))),
    shared=(
        ("block", ("self_attn.q", "self_attn.k", "self_attn.v")),
        ("model", ("cross_attn.k", "cross_attn.v")),  # the embedded text
        ("model", ("cross_attn.k_img", "cross_attn.v_img")),  # the embedded image
    ),
    protected=(
        (r"^(?:text_embedding|img_emb)\.", EMBEDDER),
        (r"^(?:vace_)?patch_embedding", EMBEDDER),
        (r"^(?:time_embedding|time_projection)\.", TIME),
        (r"^head\.", FINAL),
        *NORM,
    ),
    # Not self_attn.q, k, v and ffn.0: their modulation comes from a table plus one Linear for all blocks. Not ffn.2:
    # GELU. Not cross_attn.k, v: all blocks see the embedded text.
    folds=(
        fold(("cross_attn.q",), "norm3"),
        fold(("self_attn.o",), "self_attn.v"),
        fold(("cross_attn.o",), "cross_attn.v", Producer("cross_attn.v_img", optional=True)),
    ),
)
