"""Small all-in-one checkpoints of ComfyUI's own classes with random weights, as its checkpoint loader wants them.

Keys are those of true files. Encoders are narrow: ``OPTIONS`` tells the loader so (it would take the true widths).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_classes import _modules
from small_models import _FLUX, Running, Small
from torch import nn

Tensors = dict[str, torch.Tensor]
_CLIP = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_hidden_layers=2, projection_dim=64)
_T5 = dict(d_ff=128, d_kv=32, d_model=64, num_heads=2)  # of 24 layers, by which a T5 XXL is known
_QWEN = dict(  # of so many layers, because the outputs of the 27th are the conditioning
    hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=28
)  # fmt: skip
OPTIONS = {"clip_l_model_config": _CLIP, "t5xxl_model_config": _T5, "qwen3_4b_model_config": _QWEN}


def flux() -> Tensors:
    """Flux with T5, CLIP-L and VAE, in bfloat16, the VAE in float32."""
    import comfy.text_encoders.t5

    config = _config("text_encoders/t5_config_xxl.json") | _T5
    encoders = {"t5xxl": comfy.text_encoders.t5.T5(config, *_ON_CPU()), "clip_l": _clip()}
    model = _state(Running(Small("Flux", _FLUX | dict(in_channels=64, guidance_embed=True), ())))
    return _checkpoint(model, encoders) | {f"vae.{key}": tensor for key, tensor in vae(16).items()}


def klein() -> Tensors:
    """Flux.2 klein with Qwen3 4B, in bfloat16."""
    import comfy.text_encoders.llama

    return _checkpoint(
        _state(Running(Small("Flux2", _FLUX | dict(in_channels=128, out_channels=128, vec_in_dim=None), ()))),
        {"qwen3_4b": comfy.text_encoders.llama.Qwen3_4B(_QWEN, *_ON_CPU())},
    )


def sd15() -> Tensors:
    """Stable Diffusion 1.5 of one level, with CLIP and VAE, all in float32."""
    changes = dict(channel_mult=[1], num_res_blocks=[1], transformer_depth=[1], transformer_depth_output=[1, 1])
    model = _state(Running(Small("SD15", changes | dict(transformer_depth_middle=-2), ())))
    clip = {f"cond_stage_model.transformer.{key}": tensor for key, tensor in _random(_clip()).items()}
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in model.items()} | clip
    return tensors | {f"first_stage_model.{key}": tensor for key, tensor in vae(4).items()}


def vae(channels: int, width: int = 32) -> Tensors:
    """The decoder of an image VAE, float32."""
    from comfy.ldm.modules.diffusionmodules.model import Decoder

    config = dict(ch=width, ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[], in_channels=3, resolution=64)
    return {
        f"decoder.{key}": tensor for key, tensor in _random(Decoder(out_ch=3, z_channels=channels, **config)).items()
    }


def _ON_CPU() -> tuple[Any, ...]:  # noqa: N802
    import comfy.ops

    return torch.float32, "cpu", comfy.ops.manual_cast


def _clip() -> nn.Module:
    import comfy.clip_model

    return comfy.clip_model.CLIPTextModel(_config("sd1_clip_config.json") | _CLIP, *_ON_CPU())


def _config(name: str) -> dict[str, Any]:
    import json
    from pathlib import Path

    import comfy

    return json.loads((Path(next(iter(comfy.__path__))) / name).read_text())


def _checkpoint(model: Tensors, encoders: dict[str, nn.Module]) -> Tensors:
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in model.items()}
    for name, encoder in encoders.items():
        tensors |= {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in _random(encoder).items()}
    return {key: tensor.bfloat16() for key, tensor in tensors.items()}


def _state(running: Running) -> Tensors:
    return running.random_state()


def _random(module: nn.Module) -> Tensors:
    """Weights that keep the size of what goes through, norms about 1, biases small; tables of embeddings about 1."""
    generator = torch.Generator().manual_seed(0)
    tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    state = {}
    for key, shape in _modules(module)[0].items():
        if key.endswith("position_ids"):
            continue
        fan = 1 if key in tables else math.prod(shape[1:])
        base = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
        scale = 0.1 if len(shape) == 1 else fan**-0.5
        if key.endswith("SelfAttention.q.weight"):  # T5 does not divide by the heads' width: its queries are small
            scale /= _T5["d_kv"] ** 0.5
        state[key] = base + scale * torch.randn(shape, generator=generator)
    return state
