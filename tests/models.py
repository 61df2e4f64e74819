"""Small synthetic models, written by safetensors' own ``save_file`` and not by the writer under test."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "model.diffusion_model."
E4M3 = torch.float8_e4m3fn


def zimage(
    dim: int = 64, ffn: int = 128, layers: int = 2, text: int = 64, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """A model in Z-Image's key layout: ``layers`` blocks and one refiner of each kind; Gaussian weights, sigma .02."""
    out = {"x_embedder": (dim, 64), "cap_embedder.1": (dim, text), "final_layer.linear": (64, dim)}
    out |= {"t_embedder.mlp.0": (64, 256), "t_embedder.mlp.2": (32, 64), "final_layer.adaLN_modulation.1": (dim, 32)}
    blocks = [f"layers.{i}" for i in range(layers)] + ["noise_refiner.0", "context_refiner.0"]
    for block in blocks:
        out |= {f"{block}.attention.qkv": (3 * dim, dim), f"{block}.attention.out": (dim, dim)}
        out |= {f"{block}.feed_forward.{w}": (ffn, dim) for w in ("w1", "w3")}
        out |= {f"{block}.feed_forward.w2": (dim, ffn)}
        if block != "context_refiner.0":
            out |= {f"{block}.adaLN_modulation.0": (4 * dim, 32)}
    norms = [f"{block}.{n}" for block in blocks for n in ("attention.q_norm", "attention.k_norm", "ffn_norm1")]
    tensors = _random({f"{name}.weight": shape for name, shape in out.items()}, dtype)
    tensors |= {f"{name}.weight": torch.ones(32, dtype=dtype) for name in (*norms, "cap_embedder.0")}
    return tensors | {"x_embedder.bias": torch.full((dim,), 0.25, dtype=dtype), "x_pad_token": torch.ones(1, dim)}


def wan() -> Tensors:
    """Two blocks in Wan's key layout: a 5-D patch embedding, modulation tables that are no Linear weights."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (64, 16, 1, 2, 2), "head.modulation": (1, 2, 64)}
    shapes |= {"head.head.weight": (64, 64), "time_embedding.0.weight": (64, 256), "text_embedding.0.weight": (64, 96)}
    for i in range(2):
        parts = [f"{attention}.{p}" for attention in ("self_attn", "cross_attn") for p in "qkvo"]
        shapes |= {f"blocks.{i}.{part}.weight": (64, 64) for part in parts}
        shapes |= {f"blocks.{i}.ffn.0.weight": (128, 64), f"blocks.{i}.ffn.2.weight": (64, 128)}
        shapes |= {f"blocks.{i}.modulation": (1, 6, 64), f"blocks.{i}.norm3.weight": (64,)}
    return _random(shapes, torch.float16)


def sd15() -> Tensors:
    """The least of a Stable Diffusion 1.x UNet: Linear layers beside Conv2d ones, in float16."""
    attention = "input_blocks.1.1.transformer_blocks.0"
    shapes: dict[str, tuple[int, ...]] = {
        "input_blocks.0.0.weight": (32, 4, 3, 3),
        "input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3),
        "input_blocks.1.1.proj_in.weight": (32, 32, 1, 1),
        "time_embed.0.weight": (64, 32),
        "out.2.weight": (4, 32, 3, 3),
    }
    shapes |= {f"{attention}.attn1.to_{p}.weight": (32, 32) for p in "qkv"}
    shapes |= {f"{attention}.attn2.to_k.weight": (32, 96), f"{attention}.ff.net.2.weight": (32, 128)}
    return _random(shapes, torch.float16)


def _random(shapes: Shapes, dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


# --- files


def save(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(tensors, path, dict(metadata) if metadata else None)
    return path


def save_sharded(folder: Path, tensors: Tensors) -> Path:
    """The model as two shards; the index's path."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    halves = {"a-1-of-2.safetensors": names[::2], "a-2-of-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save(folder / file, {name: tensors[name] for name in part})
    index = folder / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    return index


def save_sparse(path: Path, shapes: Shapes, dtype: str = "BF16", width: int = 2) -> Path:
    """A file of zeros of the right size that takes no room on disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        stop = position + width * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    return path


# --- variants


def prefixed(tensors: Tensors, prefix: str = PREFIX) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def all_in_one(tensors: Tensors) -> Tensors:
    """With a text encoder and a VAE, in dtypes of their own; one key is named like a layer of the model."""
    others = _random(
        {"cond_stage_model.layers.0.q.weight": (32, 32), "vae.decoder.weight": (8, 8, 3, 3)}, torch.float32
    )
    ids = {"cond_stage_model.position_ids": torch.arange(7), "vae.layers.0.attention.out.weight": torch.eye(32)}
    return prefixed(tensors) | others | ids


@dataclass(frozen=True)
class ScaledFP8:
    """An FP8 model and the float32 weights it stands for, worked out by hand."""

    tensors: Tensors
    real: Tensors
    metadata: dict[str, str] = field(default_factory=dict)


def hswq(tensors: Tensors, per_row: bool = False) -> ScaledFP8:
    return _scaled(tensors, ".scale", (-1,) if per_row else (1,), per_row)


def legacy(tensors: Tensors, prefix: str = "", weight_only: bool = False) -> ScaledFP8:
    model = _scaled(prefixed(tensors, prefix), ".scale_weight", ())
    marker = torch.zeros(2 if weight_only else 0, dtype=E4M3)
    return ScaledFP8(model.tensors | {prefix + "scaled_fp8": marker}, model.real)


def native(tensors: Tensors, per_row: bool = False) -> ScaledFP8:
    model = _scaled(tensors, ".weight_scale", (-1, 1) if per_row else (), per_row)
    configs = {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in model.real}
    inline = {f"{layer}.comfy_quant": config_tensor(config) for layer, config in configs.items()}
    return ScaledFP8(model.tensors | inline, model.real, header_metadata(configs))


def _scaled(tensors: Tensors, suffix: str, scale_shape: tuple[int, ...], per_row: bool = False) -> ScaledFP8:
    result, real = dict(tensors), {}
    for key in _block_weights(tensors):
        weight = tensors[key].float()
        axes = tuple(range(1 if per_row else 0, weight.dim()))
        scale = weight.abs().amax(axes, keepdim=True) / 448
        result[key] = (weight / scale).to(E4M3)
        result[key.removesuffix(".weight") + suffix] = scale.reshape(scale_shape).contiguous()
        real[key] = result[key].float() * scale
    return ScaledFP8(result, real)


def _block_weights(tensors: Iterable[str] | Tensors) -> list[str]:
    kept = ("norm", "embed", "head", "out.2", "final", "time")
    return [k for k in tensors if k.endswith(".weight") and not any(word in k for word in kept)]


def config_tensor(config: Mapping[str, object]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def header_metadata(configs: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": configs})}


# --- inputs


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    """Layer inputs float32 [rows, width]: low rank plus noise, with eight channels twenty times as loud.

    Every seed draws from one distribution, so another seed is held-out data.
    """
    mixing = torch.randn(width // 16, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, len(mixing), generator=generator) @ mixing * 0.25
    x += torch.randn(rows, width, generator=generator) * 0.5
    x[:, :8] *= 20
    return x


# --- processes


# Environment in which glibc gives freed memory back at once, so that a peak is of what was in use.
FREED_AT_ONCE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def python(code: str, *arguments: object) -> list[str]:
    """The command that runs this code in a Python of its own; to be started in ``ROOT``."""
    return [sys.executable, "-c", code, *map(str, arguments)]
