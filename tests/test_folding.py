"""Folded smoothing: the same model in 16 bit, for every family's class in ComfyUI; never a worse one in 4."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from quant_core.models import folding
from quant_core.models.source import Source

# --- the same output, by ComfyUI's own classes


@dataclass(frozen=True)
class Family:
    """A small model of ComfyUI's class, its inputs, and the block Linears whose inputs folds reach in it."""

    module: str
    cls: str
    config: dict[str, Any]
    inputs: Callable[[], tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]]
    groups: int
    reached: int


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _latent(channels: int, *more: int) -> torch.Tensor:
    return _tokens(1, channels, *more, 8, 8)


_LUMINA = dict(
    patch_size=2, in_channels=4, dim=96, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, qk_norm=True,
    axes_dims=[8, 8, 8], axes_lens=[64, 64, 64], multiple_of=32, cap_feat_dim=48, ffn_dim_multiplier=2.0,
)  # fmt: skip
_ZIMAGE = _LUMINA | dict(
    dim=256, axes_dims=[16, 24, 24], z_image_modulation=True, pad_tokens_multiple=8
)  # its timestep embedding has 256 channels
_WAN = dict(dim=96, ffn_dim=128, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=48, freq_dim=32)
_UNET = dict(
    image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
    transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=48,
    num_heads=4, num_head_channels=-1, use_spatial_transformer=True, legacy=False,
)  # fmt: skip
_FLUX = dict(
    in_channels=4, out_channels=4, patch_size=2, vec_in_dim=32, context_in_dim=48, hidden_size=96, mlp_ratio=2.0,
    num_heads=4, depth=1, depth_single_blocks=1, axes_dim=[8, 8, 8], theta=10000, qkv_bias=True, guidance_embed=False,
    txt_ids_dims=[],
)  # fmt: skip
_T = torch.tensor([0.4])


def _lumina_inputs() -> Any:
    return (_latent(4), _T, _tokens(1, 6, 48), 6), {}


def _wan_inputs(**more: torch.Tensor) -> Any:
    return (_latent(more.pop("channels", 4), 1), _T * 1000, _tokens(1, 6, 48)), more


def _unet_inputs(**more: torch.Tensor) -> Any:
    return (_latent(4), _T * 1000, _tokens(1, 6, 48)), more


FAMILIES = {
    "zimage": Family("lumina.model", "NextDiT", _ZIMAGE, _lumina_inputs, 12, 15),
    "zimage grouped": Family("lumina.model", "NextDiT", _ZIMAGE | dict(n_kv_heads=2), _lumina_inputs, 12, 15),
    "lumina2 grouped": Family("lumina.model", "NextDiT", _LUMINA | dict(n_kv_heads=2), _lumina_inputs, 12, 15),
    "wan t2v": Family("wan.model", "WanModel", _WAN, _wan_inputs, 6, 6),
    "wan i2v": Family(
        "wan.model", "WanModel", _WAN | dict(model_type="i2v"), lambda: _wan_inputs(clip_fea=_tokens(1, 5, 1280)), 6, 6
    ),
    "flux": Family(
        "flux.model", "Flux", _FLUX, lambda: ((_latent(4), _T, _tokens(1, 6, 48)), {"y": _tokens(1, 32)}), 7, 8
    ),
    "sd15": Family(
        "modules.diffusionmodules.openaimodel", "UNetModel", _UNET | dict(use_linear_in_transformer=False),
        _unet_inputs, 35, 49,
    ),
    "sdxl": Family(
        "modules.diffusionmodules.openaimodel", "UNetModel",
        _UNET | dict(use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=32),
        lambda: _unet_inputs(y=_tokens(1, 32)), 42, 56,
    ),
    "qwen_image": Family(
        "qwen_image.model", "QwenImageTransformer2DModel",
        dict(in_channels=16, out_channels=4, num_layers=1, attention_head_dim=24, num_attention_heads=4,
             joint_attention_dim=48, axes_dims_rope=(8, 8, 8)),
        lambda: ((_latent(4, 1), _T, _tokens(1, 6, 48)), {}), 5, 10,
    ),
}  # fmt: skip


def small_model(family: Family) -> torch.nn.Module:
    """Random weights, norms and biases, so that nothing folded is a one or a zero by chance."""
    import comfy.ops

    cls = getattr(importlib.import_module(f"comfy.ldm.{family.module}"), family.cls)
    model = cls(**family.config, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        fan = tensor[0].numel() if tensor.dim() > 1 else 1
        base = 1.0 if tensor.dim() == 1 and name.endswith(".weight") else 0.0
        tensor.copy_(base + torch.randn(tensor.shape, generator=generator) * (0.3 if fan == 1 else fan**-0.5))
    return model.eval()


def some_factors(file: Source, power_of_two: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    exponents = {name: torch.randn(group.width, generator=generator) * 2 for name, group in folding.groups(file).items()}
    return {name: torch.exp2(e.round() if power_of_two else e) for name, e in exponents.items()}


@pytest.mark.core
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_folded_model_draws_the_same(name: str, power_of_two: bool, comfy: Path, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = small_model(family)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    args, kwargs = family.inputs()
    with Source(models.save(tmp_path / "m.safetensors", tensors)) as file, torch.inference_mode():
        assert file.architecture.name == name.split()[0]
        wanted = model(*args, **kwargs)
        factors = some_factors(file, power_of_two)
        changed = folding.functions(file, factors)
        reached = folding.input_factors(file, factors)
        model.load_state_dict(tensors | {key: change(tensors[key]) for key, change in changed.items()})
        found = model(*args, **kwargs)
    assert (len(factors), len(reached)) == (family.groups, family.reached)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    assert wanted.std() > 1e-3  # a model whose output is nothing would draw the same too
