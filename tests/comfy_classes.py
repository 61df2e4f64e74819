"""Every model class of ComfyUI, built without weights: which weights of its file become quantizable Linears.

``Built.of(case)`` makes the diffusion model of one case of ``CASES`` on the meta device, with the operations that
ComfyUI takes for a quantized file. ``CASES`` names every class of ``comfy.supported_models`` (a test holds it to that),
some in several variants; a test checks that ComfyUI detects from such a file what it was built with. Depth is cut to
two blocks where ComfyUI counts them, widths are the published ones where they decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from keys import make_keys

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One configuration of one class.

    metadata: the ``transformer`` object of the file's ``config``, for classes that no key tells apart.
    extra: keys of the file that are not the diffusion model's. device: where the class can be built.
    """

    name: str
    config: Mapping[str, Any]
    metadata: Mapping[str, Any] | None = None
    extra: Mapping[str, tuple[int, ...]] | None = None
    device: str = "meta"


def _unet(base: Mapping[str, Any] = make_keys._SD15, **changes: Any) -> dict[str, Any]:
    return make_keys._UNET_COMMON | dict(base) | changes


_SDXL = dict(make_keys._SDXL)
_SD21 = dict(context_dim=1024, use_linear_in_transformer=True)
_VIDEO = dict(
    _SD21, in_channels=8, num_classes="sequential", extra_ff_mix_layer=True, use_spatial_context=True,
    merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1], use_temporal_resblock=True,
    use_temporal_attention=True, disable_temporal_crossattention=False,
)  # fmt: skip
_FLUX = make_keys._FLUX_DEV | dict(depth=2, depth_single_blocks=2)
_FLUX2 = dict(
    image_model="flux2", in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, context_in_dim=15360,
    hidden_size=6144, mlp_ratio=3.0, num_heads=48, depth=2, depth_single_blocks=2, axes_dim=[32] * 4, theta=2000,
    qkv_bias=False, guidance_embed=True, global_modulation=True, mlp_silu_act=True, ops_bias=False, txt_ids_dims=[3],
)  # fmt: skip
_CHROMA = make_keys.MODELS["chroma"][2] | dict(image_model="chroma", depth=2, depth_single_blocks=2)
_RADIANCE = _CHROMA | dict(
    image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=64, nerf_mlp_ratio=4,
    nerf_depth=4, nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv", nerf_embedder_dtype=None,
    use_x0=False, use_sequential_txt_ids=False,
)  # fmt: skip
_HUNYUAN = make_keys.MODELS["hunyuan_video"][2] | dict(image_model="hunyuan_video", depth=2, depth_single_blocks=2)
_HUNYUAN15 = _HUNYUAN | dict(
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, context_in_dim=3584, hidden_size=2048,
    num_heads=16, depth_single_blocks=0, guidance_embed=False, byt5=True, use_cond_type_embedding=True,
    vision_in_dim=1152, meanflow_sum=True,
)  # fmt: skip
_COSMOS = dict(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_interpolation="crop", use_adaln_lora=True,
    adaln_lora_dim=256,
)  # fmt: skip
_COSMOS1 = _COSMOS | dict(
    image_model="cosmos", model_channels=4096, num_blocks=28, num_heads=32, block_config="FA-CA-MLP",
    pos_emb_learnable=False, block_x_format="THWBD", affline_emb_norm=True, extra_per_block_abs_pos_emb=True,
    extra_per_block_abs_pos_emb_type="learnable",
)  # fmt: skip
_COSMOS2 = _COSMOS | dict(
    image_model="cosmos_predict2", model_channels=2048, num_blocks=28, num_heads=16, crossattn_emb_channels=1024,
    pos_emb_learnable=True, extra_per_block_abs_pos_emb=False,
)  # fmt: skip
_WAN = make_keys._WAN_14B | dict(image_model="wan2.1", num_layers=2)
_LUMINA = make_keys._LUMINA2 | dict(image_model="lumina2", n_layers=2)
_ZIMAGE = make_keys._Z_IMAGE | dict(image_model="lumina2", n_layers=2)
_AUDIO = dict(audio_model="dit1.0", global_cond_dim=1536, project_cond_tokens=False, io_channels=64, depth=2)
_AUDIO3 = _AUDIO | dict(
    embed_dim=1024, num_heads=16, depth=2, io_channels=256, global_cond_dim=768, num_memory_tokens=64,
    global_cond_shared_embed=True, global_cond_type="adaLN", timestep_features_type="expo", norm_type="rms_norm",
    input_concat_dim=257, local_add_cond_dim=257, attn_kwargs={"qk_norm": "rms", "differential": False},
)  # fmt: skip
_MOCHI = dict(
    image_model="mochi_preview", depth=48, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536,
    mlp_ratio_x=4.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True,
    attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False,
    timestep_scale=1000.0, use_t5=True, t5_feat_dim=4096, t5_token_length=256, rope_theta=10000.0,
)  # fmt: skip
_HIDREAM = dict(
    image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[4096, 4096],
    max_resolution=[128, 128], in_channels=16, llama_layers=[*range(32), *[31] * 16], num_attention_heads=20,
    num_routed_experts=4, num_activated_experts=2, num_layers=16, num_single_layers=32, out_channels=16, patch_size=2,
    text_emb_dim=2048,
)  # fmt: skip
_SEEDVR2 = dict(
    image_model="seedvr2", vid_dim=2560, heads=20, num_layers=32, norm_eps=1e-5, mlp_type="swiglu", vid_out_norm=True
)
_SEEDVR2_7B = dict(
    image_model="seedvr2", vid_dim=3072, heads=24, num_layers=36, mm_layers=36, norm_eps=1e-5, rope_type="rope3d",
    rope_dim=64, mlp_type="normal",
)  # fmt: skip
_CASCADE_LITE = dict(
    stable_cascade_stage="b", c_hidden=[320, 576, 1152, 1152], nhead=[-1, 9, 18, 18],
    blocks=[[2, 4, 14, 4], [4, 14, 4, 2]], block_repeat=[[1, 1, 1, 1], [2, 2, 2, 2]],
)  # fmt: skip
_SD3 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=24, input_size=None, adm_in_channels=2048, num_patches=36864,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    pos_embed_max_size=192, pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
)  # fmt: skip
_COGVIDEOX = dict(image_model="cogvideox", num_attention_heads=30, num_layers=2, use_rotary_positional_embeddings=True)
_COGVIDEOX15 = _COGVIDEOX | dict(num_attention_heads=48, patch_size=2, patch_size_t=2)
_DA3 = dict(image_model="DepthAnything3")

CASES: dict[str, Case] = {
    "LotusD": Case("LotusD", _unet(**_SD21, adm_in_channels=4, num_classes="sequential")),
    "Stable_Zero123": Case(
        "Stable_Zero123", _unet(in_channels=8),
        extra={"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    ),
    "SD15_instructpix2pix": Case("SD15_instructpix2pix", _unet(in_channels=8)),
    "SD15": Case("SD15", _unet()),
    "SD20": Case("SD20", _unet(**_SD21)),
    "SD21UnclipL": Case("SD21UnclipL", _unet(**_SD21, adm_in_channels=1536, num_classes="sequential")),
    "SD21UnclipH": Case("SD21UnclipH", _unet(**_SD21, adm_in_channels=2048, num_classes="sequential")),
    "SDXL_instructpix2pix": Case("SDXL_instructpix2pix", _unet(_SDXL, in_channels=8)),
    "SDXLRefiner": Case(
        "SDXLRefiner",
        _unet(_SDXL, model_channels=384, num_res_blocks=[2] * 4, transformer_depth=[0, 0, 4, 4, 4, 4, 0, 0],
              channel_mult=[1, 2, 4, 4], transformer_depth_middle=4, context_dim=1280, adm_in_channels=2560,
              transformer_depth_output=[0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0]),
    ),
    "SDXL": Case("SDXL", _unet(_SDXL)),
    "SSD1B": Case(
        "SSD1B",
        _unet(_SDXL, transformer_depth=[0, 0, 2, 2, 4, 4], transformer_depth_middle=-1,
              transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4]),
    ),
    "KOALA_700M": Case(
        "KOALA_700M",
        _unet(_SDXL, num_res_blocks=[1] * 3, transformer_depth=[0, 2, 5], transformer_depth_middle=-2,
              transformer_depth_output=[0, 0, 2, 2, 5, 5]),
    ),
    "KOALA_1B": Case(
        "KOALA_1B",
        _unet(_SDXL, num_res_blocks=[1] * 3, transformer_depth=[0, 2, 6], transformer_depth_middle=6,
              transformer_depth_output=[0, 0, 2, 2, 6, 6]),
    ),
    "Segmind_Vega": Case(
        "Segmind_Vega",
        _unet(_SDXL, transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_middle=-1,
              transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2]),
    ),
    "SD_X4Upscaler": Case(
        "SD_X4Upscaler",
        _unet(**_SD21, in_channels=7, model_channels=256, channel_mult=[1, 2, 2, 4],
              transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1],
              transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ),
    "Stable_Cascade_C": Case("Stable_Cascade_C", dict(stable_cascade_stage="c", c_cond=2048)),
    "Stable_Cascade_C lite": Case(
        "Stable_Cascade_C",
        dict(stable_cascade_stage="c", c_cond=1536, c_hidden=[1536] * 2, nhead=[24] * 2, blocks=[[4, 12], [12, 4]]),
    ),
    "Stable_Cascade_B": Case("Stable_Cascade_B", dict(stable_cascade_stage="b")),
    "Stable_Cascade_B lite": Case("Stable_Cascade_B", _CASCADE_LITE),
    "SV3D_u": Case("SV3D_u", _unet(**_VIDEO, adm_in_channels=256)),
    "SV3D_p": Case("SV3D_p", _unet(**_VIDEO, adm_in_channels=1280)),
    "SD3": Case("SD3", _SD3),
    "SD3.5 medium": Case("SD3", _SD3 | dict(qk_norm="rms", x_block_self_attn_layers=[*range(13)])),
    "SD3 with a context processor": Case("SD3", _SD3 | dict(context_processor_layers=2)),
    "StableAudio3": Case("StableAudio3", _AUDIO3),
    "StableAudio3 differential": Case(
        "StableAudio3", _AUDIO3 | dict(attn_kwargs={"qk_norm": "rms", "differential": True})
    ),
    "StableAudio": Case("StableAudio", _AUDIO),
    "AuraFlow": Case("AuraFlow", dict(max_seq=9216, cond_seq_dim=2048, n_double_layers=2, n_layers=4)),
    "PixArtAlpha": Case("PixArtAlpha", dict(image_model="pixart_alpha", micro_condition=True, num_heads=16, depth=2,
                                            patch_size=2, hidden_size=1152, in_channels=4, input_size=128)),
    "PixArtSigma": Case("PixArtSigma", dict(image_model="pixart_sigma", micro_condition=False, num_heads=16, depth=2,
                                            patch_size=2, hidden_size=1152, in_channels=4, model_max_length=300)),
    "HunyuanDiT": Case("HunyuanDiT", dict(image_model="hydit", depth=40, hidden_size=1408, mlp_ratio=4.3637)),
    "HunyuanDiT1": Case(
        "HunyuanDiT1",
        dict(image_model="hydit1", depth=40, hidden_size=1408, mlp_ratio=4.3637, size_cond=True, use_style_cond=True),
    ),
    "FluxInpaint": Case("FluxInpaint", _FLUX | dict(image_model="flux", in_channels=96)),
    "Flux": Case("Flux", _FLUX | dict(image_model="flux")),
    "LongCatImage": Case(
        "LongCatImage",
        _FLUX | dict(image_model="flux", guidance_embed=False, vec_in_dim=None, context_in_dim=3584,
                     txt_ids_dims=[1, 2]),
    ),
    "FluxSchnell": Case("FluxSchnell", _FLUX | dict(image_model="flux", guidance_embed=False)),
    "Ovis": Case(
        "FluxSchnell",
        _FLUX | dict(image_model="flux", guidance_embed=False, vec_in_dim=None, context_in_dim=2048,
                     yak_mlp=True, txt_norm=True, txt_ids_dims=[1, 2]),
    ),
    "GenmoMochi": Case("GenmoMochi", _MOCHI),
    "LTXV": Case("LTXV", dict(image_model="ltxv", num_layers=2, attention_head_dim=64, cross_attention_dim=2048)),
    "LTXV 13B": Case("LTXV", dict(image_model="ltxv", num_layers=2, attention_head_dim=128, cross_attention_dim=4096)),
    "LTXAV": Case("LTXAV", dict(image_model="ltxav", num_layers=2, attention_head_dim=128, cross_attention_dim=4096)),
    "LTXAV gated": Case(
        "LTXAV",
        dict(image_model="ltxav", num_layers=2, attention_head_dim=128, cross_attention_dim=4096,
             apply_gated_attention=True, cross_attention_adaln=True),
        metadata=dict(apply_gated_attention=True, cross_attention_adaln=True),
    ),
    "HunyuanVideo15_SR_Distilled": Case("HunyuanVideo15_SR_Distilled", _HUNYUAN15 | dict(in_channels=98)),
    "HunyuanVideo15": Case("HunyuanVideo15", _HUNYUAN15),
    "HunyuanImage21Refiner": Case(
        "HunyuanImage21Refiner",
        _HUNYUAN | dict(in_channels=128, out_channels=64, patch_size=[1, 1, 1], vec_in_dim=None, context_in_dim=3584,
                        guidance_embed=False, meanflow=True),
    ),
    "HunyuanImage21": Case(
        "HunyuanImage21",
        _HUNYUAN | dict(in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, context_in_dim=3584,
                        hidden_size=3584, num_heads=28, axes_dim=[64, 64], byt5=True, guidance_embed=False,
                        meanflow=True),
    ),
    "HunyuanVideoSkyreelsI2V": Case("HunyuanVideoSkyreelsI2V", _HUNYUAN | dict(in_channels=32)),
    "HunyuanVideoI2V": Case("HunyuanVideoI2V", _HUNYUAN | dict(in_channels=33)),
    "HunyuanVideo": Case("HunyuanVideo", _HUNYUAN),
    "CosmosT2V": Case("CosmosT2V", _COSMOS1),
    "CosmosT2V 14B": Case("CosmosT2V", _COSMOS1 | dict(model_channels=5120, num_blocks=36, num_heads=40)),
    "CosmosI2V": Case("CosmosI2V", _COSMOS1 | dict(in_channels=17)),
    "CosmosT2IPredict2": Case("CosmosT2IPredict2", _COSMOS2),
    "CosmosI2VPredict2": Case("CosmosI2VPredict2", _COSMOS2 | dict(in_channels=17)),
    "ZImagePixelSpace": Case(
        "ZImagePixelSpace",
        _ZIMAGE | dict(image_model="zimage_pixel", patch_size=16, in_channels=3, decoder_in_channels=768),
    ),
    "ZImage": Case("ZImage", _ZIMAGE),
    "Z-Image Omni": Case("ZImage", _ZIMAGE | dict(siglip_feat_dim=1152)),
    "PiD": Case("PiD", dict(image_model="pid")),
    "PiD 1.5": Case(
        "PiD",
        dict(image_model="pid", lq_latent_channels=128, latent_spatial_down_factor=16, lq_latent_unpatchify_factor=2,
             lq_conv_padding_mode="replicate", lq_gate_per_token=True, pit_lq_inject=True, rope_ref_h=2048,
             rope_ref_w=2048),
    ),
    "PixelDiTT2I": Case("PixelDiTT2I", dict(image_model="pixeldit_t2i")),
    "Lumina2": Case("Lumina2", _LUMINA),
    "NewBie": Case("Lumina2", _LUMINA | dict(clip_text_dim=1024)),
    "WAN22_T2V": Case("WAN22_T2V", _WAN | make_keys._WAN_5B | dict(num_layers=2)),
    "WAN21_CausalAR_T2V": Case("WAN21_CausalAR_T2V", _WAN | dict(causal_ar=True), metadata=dict(causal_ar=True)),
    "WAN21_T2V": Case("WAN21_T2V", _WAN),
    "WAN21_T2V 1.3B": Case("WAN21_T2V", _WAN | dict(dim=1536, ffn_dim=8960, num_heads=12)),
    "WAN21_I2V": Case("WAN21_I2V", _WAN | dict(model_type="i2v", in_dim=36)),
    "WAN21_FunControl2V": Case("WAN21_FunControl2V", _WAN | dict(model_type="i2v", in_dim=48)),
    "WAN21_Vace": Case("WAN21_Vace", _WAN | dict(model_type="vace", vace_layers=2, vace_in_dim=96)),
    "WAN21_Camera": Case("WAN21_Camera", _WAN | dict(model_type="camera", in_dim=32)),
    "WAN22_Camera": Case("WAN22_Camera", _WAN | dict(model_type="camera_2.2", in_dim=36)),
    "WAN22_S2V": Case("WAN22_S2V", _WAN | dict(model_type="s2v")),
    "WAN21_HuMo": Case("WAN21_HuMo", _WAN | dict(model_type="humo", in_dim=36)),
    "WAN22_Animate": Case("WAN22_Animate", _WAN | dict(model_type="animate", in_dim=36, num_layers=10)),
    "WAN21_FlowRVS": Case("WAN21_FlowRVS", _WAN | dict(model_type="flow_rvs"), metadata=dict(model_type="flow_rvs")),
    "WAN21_SCAIL": Case("WAN21_SCAIL", _WAN | dict(model_type="scail", in_dim=20)),
    "WAN21_SCAIL2": Case("WAN21_SCAIL2", _WAN | dict(model_type="scail2", in_dim=20)),
    "WAN22_WanDancer": Case("WAN22_WanDancer", _WAN | dict(model_type="wandancer", in_dim=36)),
    "Hunyuan3Dv2mini": Case("Hunyuan3Dv2mini", dict(image_model="hunyuan3d2", depth=8, depth_single_blocks=16)),
    "Hunyuan3Dv2": Case("Hunyuan3Dv2", dict(image_model="hunyuan3d2", depth=2, depth_single_blocks=2)),
    "Hunyuan3Dv2_1": Case("Hunyuan3Dv2_1", dict(image_model="hunyuan3d2_1", depth=8, guidance_cond_proj_dim=None)),
    "TripoSplat": Case("TripoSplat", dict(image_model="triposplat")),
    "HiDream": Case("HiDream", _HIDREAM),
    "HiDreamO1": Case("HiDreamO1", dict(image_model="hidream_o1")),
    "Chroma": Case("Chroma", _CHROMA),
    "SeedVR2": Case("SeedVR2", _SEEDVR2),
    "SeedVR2 7B": Case("SeedVR2", _SEEDVR2_7B),
    "SeedVR2 7B shared": Case("SeedVR2", _SEEDVR2_7B | dict(mm_layers=10, mlp_type="swiglu")),
    "ChromaRadiance": Case("ChromaRadiance", _RADIANCE),
    "ChromaRadiance linear": Case("ChromaRadiance", _RADIANCE | dict(nerf_final_head_type="linear")),
    "ACEStep": Case(
        "ACEStep",
        dict(audio_model="ace", attention_head_dim=128, in_channels=8, inner_dim=2560, max_height=16,
             max_position=32768, max_width=32768, mlp_ratio=2.5, num_attention_heads=20, num_layers=24, out_channels=8,
             patch_size=[16, 1], rope_theta=1e6, speaker_embedding_dim=512, text_embedding_dim=768,
             ssl_encoder_depths=[8, 8], ssl_latent_dims=[1024, 768], ssl_names=["mert", "m-hubert"],
             lyric_encoder_vocab_size=6693, lyric_hidden_size=1024),
    ),
    "ACEStep15": Case("ACEStep15", dict(audio_model="ace1.5"), device="cpu"),  # reads a buffer while it is built
    "Omnigen2": Case(
        "Omnigen2",
        dict(image_model="omnigen2", axes_dim_rope=[40] * 3, axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None,
             hidden_size=2520, in_channels=16, multiple_of=256, norm_eps=1e-5, num_attention_heads=21, num_kv_heads=7,
             num_layers=32, num_refiner_layers=2, out_channels=None, patch_size=2, text_feat_dim=2048,
             timestep_scale=1000.0),
    ),
    "Boogu": Case("Boogu", dict(image_model="boogu", num_layers=2, num_double_stream_layers=2)),
    "MageFlow": Case("MageFlow", dict(image_model="mage_flow", in_channels=128, num_layers=2)),
    "QwenImage": Case("QwenImage", dict(image_model="qwen_image", in_channels=64, num_layers=2)),
    "Qwen-Image Layered": Case(
        "QwenImage", dict(image_model="qwen_image", in_channels=64, num_layers=2, use_additional_t_cond=True)
    ),
    "JoyImage": Case("JoyImage", dict(image_model="joyimage", num_layers=2)),
    "Ideogram4": Case("Ideogram4", dict(image_model="ideogram4", num_layers=2)),
    "Krea2": Case("Krea2", dict(image_model="krea2", layers=2)),
    "Flux2": Case("Flux2", _FLUX2),
    "Flux2 klein": Case(
        "Flux2",
        _FLUX2 | dict(hidden_size=3072, num_heads=24, context_in_dim=7680,
                      guidance_embed=False),
    ),
    "Lens": Case("Lens", dict(image_model="lens", num_layers=2)),
    "Kandinsky5Image": Case(
        "Kandinsky5Image",
        dict(image_model="kandinsky5", model_dim=2560, visual_embed_dim=64, num_visual_blocks=2, ff_dim=10240,
             axes_dims=(32, 48, 48)),
    ),
    "Kandinsky5": Case("Kandinsky5", dict(image_model="kandinsky5", num_visual_blocks=2)),
    "Anima": Case("Anima", _COSMOS2 | dict(image_model="anima")),
    "RT_DETR_v4": Case("RT_DETR_v4", dict(image_model="RT_DETR_v4")),
    "ErnieImage": Case("ErnieImage", dict(image_model="ernie")),
    "SAM3": Case("SAM3", dict(image_model="SAM3")),
    "SAM31": Case("SAM31", dict(image_model="SAM31")),
    "CogVideoX_Inpaint": Case("CogVideoX_Inpaint", _COGVIDEOX15 | dict(in_channels=48)),
    "CogVideoX_I2V": Case("CogVideoX_I2V", _COGVIDEOX15 | dict(in_channels=32, ofs_embed_dim=512)),
    "CogVideoX_T2V": Case("CogVideoX_T2V", _COGVIDEOX | dict(in_channels=16)),
    "SVD_img2vid": Case("SVD_img2vid", _unet(**_VIDEO, adm_in_channels=768)),
    "DepthAnything3": Case("DepthAnything3", _DA3),
    # Newer than 0.29.
    "MiniMaxH3": Case("MiniMaxH3", dict(image_model="minimax_h3", num_layers=2)),
    "WAN_Animate2": Case(
        "WAN_Animate2",
        _WAN | dict(model_type="animate2", in_dim=36, num_layers=10),
        metadata=dict(model_type="animate2"),
    ),
    "MiniMaxMusic3": Case("MiniMaxMusic3", dict(audio_model="minimax_music3")),
    "Trellis2": Case("Trellis2", dict(image_model="trellis2", resolution=64, init_txt_model=True, txt_only=False)),
    "DepthAnything3 small": Case("DepthAnything3", _DA3 | dict(backbone_name="vits", head_dim_in=384)),
}  # fmt: skip


class _Caught(Exception):  # noqa: N818 - carries the model out of BaseModel.__init__
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model


class _AnyTensor(dict[str, torch.Tensor]):
    """A state dict for classes that look at weights of theirs before they build the model."""

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.empty(1)


@dataclass(frozen=True)
class Built:
    """The diffusion model of a case, without weights.

    shapes: its state dict. file_shapes: the file that the loader renames to it.
    linears: layer of the file -> layer of the model, for each whose weight reaches a quantizable Linear as it is.
    """

    case: Case
    config: Any
    shapes: Shapes
    file_shapes: Shapes
    linears: Mapping[str, str]

    @classmethod
    def of(cls, case: Case) -> Built:
        import comfy.supported_models

        config = getattr(comfy.supported_models, case.name)(dict(case.config))
        config.set_inference_dtype(torch.bfloat16, None)
        shapes, linears = _modules(_diffusion_model(config, case.device))
        file_shapes = _file_shapes(case.name, shapes)
        tensors = {key: torch.empty(shape, device="meta") for key, shape in file_shapes.items()}
        places = {
            id(tensor): key.removesuffix(".weight")
            for key, tensor in config.process_unet_state_dict(dict(tensors)).items()
        }
        loaded = {key.removesuffix(".weight"): places.get(id(t), "") for key, t in tensors.items()}
        return cls(
            case, config, shapes, file_shapes | dict(case.extra or {}),
            {name: place for name, place in loaded.items() if place in linears},
        )  # fmt: skip


def _diffusion_model(config: Any, device: str) -> torch.nn.Module:
    """What ``config.get_model`` makes its diffusion model, and nothing else of it: no sampler, no image encoder."""
    import comfy.model_base
    import comfy.ops

    config.quant_config = {"mixed_ops": True}
    dtype = config.unet_config["dtype"]
    operations = comfy.ops.pick_operations(dtype, dtype, torch.device("cpu"), model_config=config)

    def build(
        self: Any, config: Any, model_type: Any = None, device: Any = None, unet_model: Any = comfy.model_base.UNetModel
    ) -> None:
        raise _Caught(
            unet_model(**config.unet_config, device=device, operations=config.custom_operations or operations)
        )

    with patch.object(comfy.model_base.BaseModel, "__init__", build):
        try:
            config.get_model(_AnyTensor(), device=device)
        except _Caught as caught:
            return caught.model
    raise AssertionError(f"{type(config).__name__}: get_model built no BaseModel")


def _modules(model: torch.nn.Module) -> tuple[Shapes, set[str]]:
    """The state dict's shapes, and the names of the Linears that read ``comfy_quant``.

    Such a Linear has no weight before it is loaded; its shape is known all the same.
    """
    shapes: Shapes = {}
    linears = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(module).__qualname__.endswith("MixedPrecisionOps.Linear"):
            shapes[prefix + "weight"] = (module.out_features, module.in_features)
            linears.add(name)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        kept = [(key, t) for key, t in own if key not in module._non_persistent_buffers_set]
        shapes |= {prefix + key: tuple(tensor.shape) for key, tensor in kept}
    return shapes, linears


def _file_shapes(name: str, shapes: Shapes) -> Shapes:
    """The keys of a published file, where the loader makes others of them than by renaming norms."""
    if name not in ("PixelDiTT2I", "PiD"):
        return shapes
    halves = (".adaLN_modulation_msa.", ".adaLN_modulation_mlp.")  # one matrix of twice the rows in the file
    merged = {
        key.replace(halves[0], ".adaLN_modulation.0."): (2 * s[0], *s[1:]) if halves[0] in key else s
        for key, s in shapes.items()
        if halves[1] not in key
    }
    return {f"core.{key}": shape for key, shape in merged.items()} if name == "PixelDiTT2I" else merged
