"""Stable Diffusion 3 and AuraFlow: joint attention over image and text."""

from __future__ import annotations

from .row import (
    EMBEDDER,
    FINAL,
    MODULATION_NOTE,
    NORM,
    READ,
    TIME,
    Architecture,
    fold,
    modulated,
    numbered,
    value_rows,
)

# The last block's text side has no output: only its qkv and a modulation of two parts.
SD3 = Architecture(
    name="sd3",
    encoders=("t5xxl",),
    title="Stable Diffusion 3 / 3.5",
    all_of=("joint_blocks.0.context_block.attn.qkv.weight", "joint_blocks.0.x_block.attn.qkv.weight"),
    blocks=(("joint", numbered("joint_blocks")), ("context_processor", numbered(r"context_processor\.layers"))),
    shared=(("model", ("x_block.adaLN_modulation.1", "context_block.adaLN_modulation.1")),),
    protected=(
        (r"^(?:x_embedder|y_embedder|context_embedder)(?:\.|$)", EMBEDDER),
        (r"^t_embedder\.", TIME),
        (r"^final_layer\.", FINAL),
        (r"(?:^|\.)ln_[qk]$", NORM[0][1]),
        *NORM,
    ),
    shape_read=(
        (r"^context_embedder$", READ.format("the width of the text features")),
        (r"^y_embedder\.mlp\.0$", READ.format("the width of the pooled text")),
    ),
    notes=((r"\.adaLN_modulation\.1$", MODULATION_NOTE),),
    # Not fc2: GELU. Not the modulation: all blocks see the same vector.
    folds=(
        *(modulated((f"{side}_block.attn.qkv",), f"{side}_block.adaLN_modulation.1", 0) for side in ("x", "context")),
        *(modulated((f"{side}_block.mlp.fc1",), f"{side}_block.adaLN_modulation.1", 3) for side in ("x", "context")),
        modulated(("x_block.attn2.qkv",), "x_block.adaLN_modulation.1", 6),
        fold(
            ("x_block.attn.proj", "context_block.attn.proj"),
            *(value_rows(f"{side}_block.attn.qkv") for side in ("x", "context")),
        ),
        fold(("x_block.attn2.proj",), value_rows("x_block.attn2.qkv")),
    ),
)

# Side 1 is the text, side 2 the image; single layers have side 1 only, over both. No modulation has a bias.
AURAFLOW = Architecture(
    name="auraflow",
    title="AuraFlow",
    all_of=("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight"),
    blocks=(("double", numbered("double_layers")), ("single", numbered("single_layers"))),
    shared=(
        *(("block", tuple(f"attn.w{side}{kind}" for kind in "qkv")) for side in "12"),
        *(("block", (f"mlp{side}.c_fc1", f"mlp{side}.c_fc2")) for side in ("C", "X", "")),
        ("model", ("modC.1", "modX.1", "modCX.1")),
    ),
    protected=(
        (r"^(?:cond_seq_linear|init_x_linear)$", EMBEDDER),
        (r"^t_embedder\.", TIME),
        (r"^(?:final_linear|modF\.1)$", FINAL),
        *NORM,
    ),
    shape_read=((r"^cond_seq_linear$", READ.format("the width of the text features")),),
    notes=((r"\.mod(?:C|X|CX)\.1$", MODULATION_NOTE),),
    folds=(
        fold(("attn.w1o", "attn.w2o"), "attn.w1v", "attn.w2v"),
        *(fold((f"mlp{side}.c_proj",), f"mlp{side}.c_fc2") for side in ("C", "X", "")),
    ),
)
