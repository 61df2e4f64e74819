"""Text encoders, and the other files that lie beside a diffusion model: known by their keys as stored.

Sources: ``detect_te_model`` and ``load_text_encoder_state_dicts`` in ComfyUI's ``comfy/sd.py`` (which file is which
encoder, and which of their classes are told of a file's scales), its classes in ``comfy/text_encoders``.
``tests/test_encoders.py`` checks the rows on those classes.

No folds: ComfyUI multiplies encoders in 16 bit, so that no input is rounded and nothing is gained.
"""

from __future__ import annotations

from dataclasses import replace

from .row import NORM, Architecture, numbered

_IMAGES = "sees images only: a prompt without one never runs it"

# Rows. Of T5 only XXL (10240 wide, or the first generation's with one wi) is told of scales.
T5 = Architecture(
    name="t5",
    title="T5 / UMT5 XXL",
    part="te",
    all_of=("encoder.block.23.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
    any_of=tuple(f"encoder.block.23.layer.1.DenseReluDense.{kind}.weight" for kind in ("wi_1", "wi")),
    not_size=(("encoder.block.23.layer.1.DenseReluDense.wi_1.weight", 0, 5120),),
    blocks=(("main", numbered(r"encoder\.block")),),
    shared=(
        ("block", tuple(f"layer.0.SelfAttention.{kind}" for kind in "qkv")),
        ("block", tuple(f"layer.1.DenseReluDense.wi_{i}" for i in range(2))),
    ),
    protected=NORM,
    table="shared",
)

# A file names its language model model.layers or model.language_model.layers (Qwen 3.5, Qwen3-VL), its vision tower
# visual.blocks, model.visual.blocks or vision_model (Gemma), its audio tower audio_model (Gemma 4).
LANGUAGE = Architecture(
    name="language",
    title="language model (Llama, Mistral, Qwen, Gemma)",
    part="te",
    any_of=tuple(f"model.{middle}layers.0.post_attention_layernorm.weight" for middle in ("", "language_model.")),
    none_of=("model.x_embedder.proj1.weight",),  # HiDream O1, a diffusion model with a language model in it
    blocks=(
        ("main", numbered(r"model\.(?:language_model\.)?layers")),
        ("visual", numbered(r"(?:model\.)?visual\.blocks")),
        ("visual", numbered(r"vision_model\.encoder\.layers")),
        ("audio", numbered(r"audio_model\.layers")),
    ),
    shared=(
        ("block", tuple(f"self_attn.{kind}_proj" for kind in "qkv")),
        ("block", ("mlp.gate_proj", "mlp.up_proj")),
        ("block", tuple(f"linear_attn.in_proj_{kind}" for kind in ("qkv", "z", "b", "a"))),
        # towers of Gemma 4
        ("block", tuple(f"self_attn.{kind}_proj.linear" for kind in "qkv")),
        ("block", ("mlp.gate_proj.linear", "mlp.up_proj.linear")),
    ),
    protected=(
        (r"\.linear_attn\.in_proj_[ab]$", "decay and gate of linear attention: a row per head, and small"),
        *NORM,
    ),
    table=r"model\.(?:language_model\.)?embed_tokens(?:_per_layer)?",
    notes=((r"^(?:model\.)?vis(?:ual|ion_model)\.", _IMAGES), (r"^audio_model\.", "sees sounds only")),
    unread=((r"(?:^|\.)lm_head$", "head that writes text: the loader renames its weight, and loses its scales"),),
)

GPT_OSS = replace(
    LANGUAGE,
    name="gpt_oss",
    title="GPT-OSS 20B",
    any_of=(),
    none_of=(),
    all_of=("layers.0.self_attn.sinks",),
    blocks=(("main", numbered("layers")),),
    table="embed_tokens",
)

_UNTOLD = "ComfyUI's class for this encoder is not told of scales in a file"
_UNSCALED = ((r"", _UNTOLD),)
# Last of T5: what is no XXL (AuraFlow's and HunyuanDiT's XL, base, ByT5).
T5_SMALLER = replace(
    T5,
    name="t5_smaller",
    title="T5 smaller than XXL",
    all_of=("encoder.block.0.layer.0.SelfAttention.k.weight",),
    any_of=(),
    not_size=(),
    unread=_UNSCALED,
)
CLIP = Architecture(
    name="clip",
    title="CLIP text encoder",
    part="te",
    any_of=("text_model.encoder.layers.0.mlp.fc1.weight", "transformer.resblocks.0.ln_1.weight"),
    blocks=(("main", numbered(r"(?:text_model\.encoder\.layers|transformer\.resblocks)")),),
    shared=(("block", tuple(f"self_attn.{kind}_proj" for kind in "qkv")),),
    protected=NORM,
    unread=_UNSCALED,
)
JINA = replace(
    CLIP,
    name="jina_clip2",
    title="Jina CLIP 2",
    any_of=("model.encoder.layers.0.mixer.Wqkv.weight",),
    blocks=(("main", numbered(r"model\.encoder\.layers")),),
)
T5_GEMMA = replace(
    JINA, name="t5_gemma", title="T5Gemma", any_of=("model.encoder.layers.0.pre_self_attn_layernorm.weight",)
)

VISION = Architecture(
    name="vision",
    title="vision encoder",
    part="vision",
    any_of=(
        "vision_model.encoder.layers.0.layer_norm1.weight",  # CLIP, SigLIP
        "visual.transformer.resblocks.0.attn.in_proj_weight",  # OpenCLIP
        "encoder.layer.0.layer_scale2.lambda1",  # DINOv2
    ),
    unread=((r"", "ComfyUI reads no scales for vision encoders"),),
)
VAE = Architecture(
    name="vae",
    title="VAE",
    part="vae",
    any_of=(
        "decoder.conv_in.weight",
        "decoder.conv_in.conv.weight",  # Hunyuan, CogVideoX, LTX-Video
        "decoder.middle.0.residual.0.gamma",  # Wan, Qwen-Image
        "decoder.up_blocks.0.resnets.0.norm1.weight",  # diffusers
        "decoder.layers.1.layers.0.beta",  # Stable Audio
    ),
    unread=((r"", "ComfyUI reads no scales for VAEs"),),
)

ROWS = (T5, LANGUAGE, GPT_OSS, T5_SMALLER, CLIP, JINA, T5_GEMMA, VISION, VAE)
