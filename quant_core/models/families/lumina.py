"""Z-Image and Lumina 2."""

from __future__ import annotations

from dataclasses import replace

from .row import EMBEDDER, FINAL, NORM, READ, TIME, Architecture, Producer, fold, numbered

# Z-Image differs from Lumina 2 by a modulation without SiLU, so its Linear is number 0 of its Sequential, not 1.
# ComfyUI tells them apart by the width (3840); the key says the same of all published files, and of small models too.
LUMINA2 = Architecture(
    name="lumina2",
    encoders=("gemma2_2b",),
    title="Lumina 2",
    all_of=("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
    blocks=(
        ("main", numbered("layers")),
        ("context_refiner", numbered("context_refiner")),
        ("noise_refiner", numbered("noise_refiner")),
        ("siglip_refiner", numbered("siglip_refiner")),  # Z-Image Omni
    ),
    shared=(
        ("block", ("feed_forward.w1", "feed_forward.w3")),
        ("model", ("adaLN_modulation.0",)),  # the timestep embedding itself
        ("model", ("adaLN_modulation.1",)),  # its SiLU
    ),
    protected=(
        (r"^(?:x_embedder|cap_embedder|siglip_embedder|clip_text_pooled_proj)(?:\.|$)", EMBEDDER),
        (r"^(?:t_embedder|time_text_embed)\.", TIME),
        (r"^(?:final_layer|dec_net)\.", FINAL),
        *NORM,
    ),
    shape_read=((r"^cap_embedder\.1$", READ.format("the width of the text features")),),
    notes=(
        (r"\.adaLN_modulation\.[01]$", "convert_to_quant --zimage keeps it; the published recipes keep layers 22-29"),
        (r"^(?:context|noise)_refiner\.", "convert_to_quant --zimage_refiner keeps it: a refiner has only two blocks"),
        (r"^layers\.29\.attention\.qkv$", "the published recipes keep it: only the final layer follows"),
    ),
    # All subgraphs are of one class. adaLN_modulation sees the timestep embedding, which the final layer sees through
    # a SiLU: no fold. clamp_fp16 after w1, w3 acts on overflows only.
    folds=(
        fold(("attention.qkv",), "attention_norm1"),
        fold(("feed_forward.w1", "feed_forward.w3"), "ffn_norm1"),
        # q has as many rows as the input has channels; k and v halve the rest
        fold(("attention.out",), Producer("attention.qkv", (0.5, 0.5)), head="attention.k_norm"),
        fold(("feed_forward.w2",), "feed_forward.w3"),
    ),
)

ZIMAGE = replace(
    LUMINA2,
    name="zimage",
    encoders=("qwen3_4b",),
    title="Z-Image",
    all_of=(*LUMINA2.all_of, "noise_refiner.0.adaLN_modulation.0.weight"),
)

ZIMAGE_PIXEL = replace(
    ZIMAGE,
    name="zimage_pixel",
    encoders=("qwen3_4b",),
    title="Z-Image in pixel space",
    all_of=(*LUMINA2.all_of, "dec_net.cond_embed.weight"),
    shape_read=(
        *LUMINA2.shape_read,
        (r"^x_embedder$", READ.format("the patch size")),
        (r"^dec_net\.input_embedder\.embedder\.0$", READ.format("the decoder's frequencies")),
    ),
)
