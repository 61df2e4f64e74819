"""Key and shape lists of published diffusion models, made without any weights.

``python tests/keys/make_keys.py`` builds ComfyUI's own model classes on the ``meta`` device with the published
configurations and writes one folded JSON per variant beside this file (ComfyUI is found as the tests find it).
``load(name)`` unfolds one into ``{key: shape}`` and needs neither torch nor ComfyUI.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# variant -> (module, class, configuration).  The configuration is what comfy.model_detection returns for the published
# file plus what supported_models adds; the test checks that it does, so a wrong number here cannot go unnoticed.
_WAN = ("comfy.ldm.wan.model", "WanModel")
_WAN_14B = dict(model_type="t2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
_WAN_5B = dict(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
_FLUX = ("comfy.ldm.flux.model", "Flux")
_FLUX_DEV = dict(
    in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
    num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
    guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
_LUMINA = ("comfy.ldm.lumina.model", "NextDiT")
_Z_IMAGE = dict(
    patch_size=2, in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, qk_norm=True,
    axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8 / 3, cap_feat_dim=2560,
    z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
_LUMINA2 = dict(
    patch_size=2, in_channels=16, dim=2304, n_layers=26, n_heads=24, n_kv_heads=8, qk_norm=True, cap_feat_dim=2304,
    axes_dims=[32, 32, 32], axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0,
)  # fmt: skip
_UNET = ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel")
_UNET_COMMON = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
)  # fmt: skip
_SD15 = dict(
    num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1, context_dim=768,
    num_heads=8, num_head_channels=-1, use_linear_in_transformer=False,
)  # fmt: skip
_SDXL = dict(
    num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, context_dim=2048,
    num_head_channels=64, use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2816,
)  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "zimage": (*_LUMINA, _Z_IMAGE),
    # Pixel-space Z-Image: no published configuration, decoder sizes are the class's defaults for patches of 16.
    "zimage_pixel": (
        _LUMINA[0], "NextDiTPixelSpace",
        _Z_IMAGE | dict(patch_size=16, in_channels=3, decoder_in_channels=768),
    ),
    "lumina2": (*_LUMINA, _LUMINA2),
    "wan21_t2v_14b": (*_WAN, _WAN_14B),
    "wan21_t2v_1.3b": (*_WAN, _WAN_14B | dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)),
    "wan21_i2v_14b": (*_WAN, _WAN_14B | dict(model_type="i2v", in_dim=36)),
    "wan21_flf2v_14b": (*_WAN, _WAN_14B | dict(model_type="i2v", in_dim=36, flf_pos_embed_token_number=514)),
    "wan21_vace_14b": (_WAN[0], "VaceWanModel", _WAN_14B | dict(model_type="vace", vace_layers=8, vace_in_dim=96)),
    "wan22_i2v_a14b": (*_WAN, _WAN_14B | dict(in_dim=36)),  # 2.2 dropped the image cross-attention
    "wan22_ti2v_5b": (*_WAN, _WAN_14B | _WAN_5B),
    "flux_dev": (*_FLUX, _FLUX_DEV),
    "flux_schnell": (*_FLUX, _FLUX_DEV | dict(guidance_embed=False)),
    "sd15": (*_UNET, _UNET_COMMON | _SD15),
    "sdxl": (*_UNET, _UNET_COMMON | _SDXL),
    "qwen_image": ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel", dict(in_channels=64, num_layers=60)),
    "mage_flow": ("comfy.ldm.mage_flow.model", "MageFlowTransformer2DModel", dict(in_channels=128, num_layers=12)),
    "ltxv_2b": (
        "comfy.ldm.lightricks.model", "LTXVModel",
        dict(cross_attention_dim=2048, attention_head_dim=64, num_layers=28),
    ),
    "chroma": (
        "comfy.ldm.chroma.model", "Chroma",
        dict(in_channels=64, out_channels=64, in_dim=64, out_dim=3072, hidden_dim=5120, n_layers=5, patch_size=2,
             context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38,
             axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, txt_ids_dims=[], vec_in_dim=None),
    ),
    "hunyuan_video": (
        "comfy.ldm.hunyuan_video.model", "HunyuanVideo",
        dict(in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768, context_in_dim=4096,
             hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=20, depth_single_blocks=40, axes_dim=[16, 56, 56],
             theta=256, qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False,
             vision_in_dim=None, meanflow_sum=False),
    ),
}  # fmt: skip

# variant -> (case of comfy_classes, what its published depth changes in it)
OF_CASE: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2_dev": ("Flux2", dict(depth=8, depth_single_blocks=48)),
    "flux2_klein_4b": ("Flux2 klein", dict(depth=5, depth_single_blocks=20)),
    "chroma_radiance": ("ChromaRadiance", dict(depth=19, depth_single_blocks=38)),
    "hunyuan_video_15": ("HunyuanVideo15", dict(depth=54)),
    "hunyuan_image_21": ("HunyuanImage21", dict(depth=20, depth_single_blocks=40)),
    "hunyuan3d_2": ("Hunyuan3Dv2", dict(depth=16, depth_single_blocks=32)),
    "hunyuan3d_21": ("Hunyuan3Dv2_1", dict(depth=21)),
    "sd35_medium": ("SD3.5 medium", {}),
    "auraflow": ("AuraFlow", dict(n_double_layers=4, n_layers=36)),
    "ltx2": ("LTXAV", dict(num_layers=48)),
    "cosmos_predict2_2b": ("CosmosT2IPredict2", {}),
    "anima": ("Anima", {}),
    "kandinsky5_lite": ("Kandinsky5", dict(num_visual_blocks=32)),
    "mochi": ("GenmoMochi", {}),
    "seedvr2_3b": ("SeedVR2", {}),
    "hidream_i1": ("HiDream", {}),
    "hidream_o1": ("HiDreamO1", {}),
    "omnigen2": ("Omnigen2", {}),
    "boogu": ("Boogu", dict(num_layers=32, num_double_stream_layers=8)),
    "pixart_sigma": ("PixArtSigma", dict(depth=28)),
    "krea2": ("Krea2", dict(layers=28)),
    "ideogram4": ("Ideogram4", dict(num_layers=34)),
    "ace_step": ("ACEStep", {}),
    "ace_step_15": ("ACEStep15", {}),
}
VARIANTS = (*MODELS, *OF_CASE)


# Published Flux files call the weight of these RMS norms ".scale"; ComfyUI renames it while loading.
def _published_name(name: str, key: str) -> str:
    return re.sub(r"(query_norm|key_norm)\.weight$", r"\1.scale", key) if name.startswith("flux_") else key


def load(name: str) -> dict[str, tuple[int, ...]]:
    """Return ``{key: shape}`` of one variant, keys as published and without prefix."""
    folded = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return {key: tuple(shape) for pattern, shape in folded.items() for key in _unfold(pattern)}


def names() -> list[str]:
    """Names of the variants whose lists lie beside this file."""
    return [name for name in VARIANTS if (HERE / f"{name}.json").exists()]


def fold(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """Fold block repetition: keys of one shape that differ only in the block number become ``layers.[0-2,4].x``."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for key, shape in shapes.items():
        match = re.search(
            r"(blocks|layers|refiner|encoders)\.(\d+)\.(?!.*(blocks|layers|refiner|encoders)\.\d+\.)", key
        )
        head, number, tail = (key[: match.start(2)], match[2], key[match.end(2) :]) if match else (key, "", "")
        groups.setdefault((head, tail, tuple(shape)), []).extend([int(number)] if number else [])
    return {h + (f"[{_runs(n)}]" if n else "") + t: list(s) for (h, t, s), n in groups.items()}


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _unfold(pattern: str) -> Iterator[str]:
    parts = re.split(r"\[([^\]]+)\]", pattern)
    choices = [[part] if i % 2 == 0 else _numbers(part) for i, part in enumerate(parts)]
    return ("".join(choice) for choice in product(*choices))


def _numbers(runs: str) -> list[str]:
    bounds = [[int(x) for x in run.split("-")] for run in runs.split(",")]
    return [str(n) for b in bounds for n in range(b[0], b[-1] + 1)]


def build(name: str) -> dict[str, tuple[int, ...]]:
    """Build one variant on ``meta`` by ComfyUI's class; ComfyUI must be importable (``comfy_env.import_comfy``)."""
    import importlib

    import comfy.ops
    import torch

    if name in OF_CASE:
        from comfy_classes import CASES, Built  # which imports this module

        case, depth = OF_CASE[name]
        return Built.of(replace(CASES[case], config=dict(CASES[case].config) | depth)).file_shapes
    module, cls, config = MODELS[name]
    extra = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
    model = getattr(importlib.import_module(module), cls)(**config, **extra)
    return {_published_name(name, key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def main() -> None:
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]  # bootstrap.py, comfy_env.py
    from comfy_env import import_comfy

    import_comfy()
    for name in sys.argv[1:] or VARIANTS:
        shapes = build(name)
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in fold(shapes).items())
        (HERE / f"{name}.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        assert load(name) == shapes, f"{name}: folding lost a key"
        print(f"{name}: {len(shapes)} keys, {(HERE / f'{name}.json').stat().st_size} bytes")


if __name__ == "__main__":
    main()
