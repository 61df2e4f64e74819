"""Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from dataclasses import replace

from .row import EMBEDDER, FINAL, NORM, READ, TIME, Architecture, Producer, fold

_UNET_REST = r"\.(?:transformer_blocks\.(?P<sub>\d+)\.)?(?P<kind>.+)$"
SDXL = Architecture(
    name="sdxl",
    title="Stable Diffusion XL",
    all_of=("input_blocks.0.0.weight", "label_emb.0.0.weight"),
    blocks=(
        ("input", r"^input_blocks\.(?P<block>\d+)\.\d+" + _UNET_REST),
        ("middle", r"^middle_block\.(?P<block>\d+)" + _UNET_REST),
        ("output", r"^output_blocks\.(?P<block>\d+)\.\d+" + _UNET_REST),
    ),
    shared=(
        ("block", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("model", ("attn2.to_k", "attn2.to_v")),  # the text
        ("model", ("emb_layers.1",)),
    ),
    protected=(
        (r"^time_embed\.", TIME),
        (r"^label_emb\.", EMBEDDER),
        (r"\.emb_layers\.1$", "timestep embedding's entry into a residual block, and it is small"),
        (r"^input_blocks\.0\.0$", EMBEDDER),
        (r"^out\.", FINAL),
        (r"\.(?:in_layers|out_layers)\.0$", NORM[0][1]),
        *NORM,
    ),
    shape_read=(
        (r"^label_emb\.0\.0$", READ.format("the width of the pooled text")),
        # Only the first transformer is read: input block 4; 3 in KOALA, 1 in SD 2.1 unCLIP, which share these keys.
        (r"^input_blocks\.[134]\.1\.transformer_blocks\.0\.attn2\.to_k$", READ.format("the text features' width")),
    ),
    # Not attn2.to_v -> attn2.to_out.0: IP-Adapters add values of their own between the two. Where attn1 sees the text
    # (x4 upscaler) widths differ, and proj_in may be a convolution: no fold then.
    folds=(
        fold(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm1"),
        fold(("attn2.to_q",), "norm2"),
        fold(("ff.net.0.proj",), "norm3"),
        fold(("attn1.to_out.0",), "attn1.to_v"),
        fold(("ff.net.2",), Producer("ff.net.0.proj", stop=(0.5, 0))),  # the other half is the gate
        fold(("proj_in",), "norm"),
    ),
)

SD15 = replace(
    SDXL,
    name="sd15",
    title="Stable Diffusion 1.x / 2.x",
    all_of=("input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
    none_of=("label_emb.0.0.weight",),
    shape_read=(
        (r"^input_blocks\.1\.1\.transformer_blocks\.0\.attn2\.to_k$", READ.format("the text features' width")),
    ),
)
