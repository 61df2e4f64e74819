"""A Wan 2.1 text-to-video transformer in plain torch, with the weights of a file as the loader runs them.

Written from the equations of the model ("Wan: Open and Advanced Large-Scale Video Generative Models", arXiv
2503.20314), for one family and float32 alone: it shows what a file draws where there is no ComfyUI. Parts are named as
in the checkpoint, so that weights are found by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from ..errors import CalibQuantError
from ..jobs import QuantizedFile
from ..planning import targets
from ..rounding.judge import as_loaded
from ..rounding.layerplan import LayerPlan

HEAD = 128  # channels of an attention head
FREQUENCIES = 256  # of the time embedding
THETA = 10000.0
EPS = 1e-6
PATCH = (1, 2, 2)  # frames, rows and columns of a latent that become one token
UNQUANTIZED_CARD = "turing"  # no kernels for FP4 or FP8: inputs stay 16-bit there, as on a CPU; INT8 runs everywhere

FP8 = "F8_E4M3"
Feed = Callable[[torch.Tensor], torch.Tensor]


class Linear(nn.Linear):
    """A layer whose inputs are rounded as the loader rounds them, with a split's branch beside it."""

    feed: Feed | None = None  # inputs [n, in] -> the same as the matrix product sees them
    branch: tuple[torch.Tensor, torch.Tensor] | None = None  # up [out, rank], down [rank, in]; sees exact inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed = x if self.feed is None else self.feed(x.reshape(-1, x.shape[-1])).view(x.shape)
        y = functional.linear(fed, self.weight, self.bias)
        return y if self.branch is None else y + x @ self.branch[1].T @ self.branch[0].T


class Attention(nn.Module):
    """Attention over ``source``: the tokens themselves, rotated by their places, or the text."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=EPS) for _ in range(2))

    def forward(self, x: torch.Tensor, source: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (t.unflatten(-1, (-1, HEAD)) for t in (q, k, v))  # [B, tokens, heads, HEAD]
        if turns is not None:
            q, k = rotated(q, turns), rotated(k, turns)
        mixed = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, attention to the text, MLP. The time shifts, scales and gates the first and the last."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim), Attention(dim)
        self.norm3 = nn.LayerNorm(dim, EPS)
        self.ffn = nn.Sequential(Linear(dim, hidden), nn.GELU("tanh"), Linear(hidden, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.modulation + time).split(1, dim=1)  # [B, 1, dim] each
        seen = modulated(x, shift, scale)
        x = x + gate * self.self_attn(seen, seen, turns)
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gate_2 * self.ffn(modulated(x, shift_2, scale_2))


class Head(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.head = Linear(dim, out)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.head(modulated(x, *(self.modulation + time.unsqueeze(1)).split(1, dim=1)))


class Wan(nn.Module):
    """Velocity of latents [B, channels, frames, height, width] at a time of 0 … 1000 given text [B, tokens, width]."""

    def __init__(self, channels: int, dim: int, hidden: int, text: int, blocks: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(channels, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(Linear(text, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(FREQUENCIES, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(blocks))
        self.head = Head(dim, channels * math.prod(PATCH))

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embedding(x)
        grid = tokens.shape[2:]  # of patches: frames, rows, columns
        tokens, turns = tokens.flatten(2).transpose(1, 2), turns_of(*grid)
        embedded = self.time_embedding(waves(time))
        parts = self.time_projection(embedded).unflatten(1, (6, -1))
        text = self.text_embedding(text)
        for block in self.blocks:
            tokens = block(tokens, parts, text, turns)
        folded = self.head(tokens, embedded).unflatten(1, grid).unflatten(-1, (*PATCH, -1))
        return folded.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def waves(time: torch.Tensor) -> torch.Tensor:
    """float32 [B, FREQUENCIES]: cosines, then sines, of times [B] at geometric frequencies."""
    half = FREQUENCIES // 2
    angles = time.unsqueeze(1) * THETA ** (-torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def turns_of(frames: int, rows: int, columns: int) -> torch.Tensor:
    """complex64 [tokens, 1, HEAD / 2]: by what angles each token's place turns pairs of channels.

    A third of the pairs, rounded down, goes to the columns, as many to the rows, and the rest to the frames.
    """
    third = HEAD // 6
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (frames, rows, columns)))
    pairs = (HEAD // 2 - 2 * third, third, third)
    angles = [p[:, None] * THETA ** (-torch.arange(n) / n) for p, n in zip(places.reshape(-1, 3).T, pairs, strict=True)]
    turned = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(turned), turned).to(torch.complex64).unsqueeze(1)


def rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """[B, tokens, heads, HEAD] with each pair of neighbouring channels turned."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


# --- from a file


def load(path: str | os.PathLike[str], gpu: str = UNQUANTIZED_CARD) -> Wan:
    """The model of a file, 16-bit or quantized (a split with its branch), as the loader would run it on this card.

    gpu: a name of ``targets.GPUS``. CalibQuantError for a model of another family.
    """
    with QuantizedFile(path) as file:
        model = _of_its_size(file)
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                _fill(module, file, file.prefix + name, gpu)
        layers = {name for name, module in model.named_modules() if isinstance(module, Linear)}
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] not in layers:
                parameter.data.copy_(file.checkpoint.read(file.prefix + name))
            if _becomes_fp8(file, gpu) and not name.startswith("patch_embedding."):
                parameter.data = parameter.to(torch.float8_e4m3fn).float()
    return model.requires_grad_(False)


def _becomes_fp8(file: QuantizedFile, gpu: str) -> bool:
    """Whether ComfyUI holds the whole model in FP8, biases and norms too: plain FP8 weights on a card that has FP8.

    See ``unet_dtype`` in its ``comfy/model_management.py``.
    """
    plain = FP8 in (entry.dtype for entry in file.checkpoint.entries.values()) and not file.configs
    return plain and targets.speed(LayerPlan("float8_e4m3fn", ""), gpu) == targets.NATIVE


def _of_its_size(file: QuantizedFile) -> Wan:
    """With weights still to be filled in. Sizes come from tensors that no format changes."""
    entries, prefix = file.checkpoint.entries, file.prefix
    try:
        dim, channels = entries[prefix + "patch_embedding.weight"].shape[:2]
        hidden = entries[f"{prefix}blocks.0.ffn.0.bias"].shape[0]
        text = entries[f"{prefix}text_embedding.0.weight"].shape[1]
    except KeyError as e:
        raise CalibQuantError(
            f"{file.checkpoint.path}: has no {e.args[0]}: the built-in sampler draws with Wan models only, use ComfyUI"
        ) from e
    blocks = {key.removeprefix(prefix).split(".")[1] for key in entries if key.startswith(prefix + "blocks.")}
    with torch.device("meta"):
        model = Wan(channels, dim, hidden, text, len(blocks))
    return model.to_empty(device="cpu")


def _fill(module: Linear, file: QuantizedFile, layer: str, gpu: str) -> None:
    shape = tuple(module.weight.shape)
    module.weight.data = torch.cat(list(file.rows(layer, shape)))
    bias = file.bias(layer)
    assert bias is not None, layer  # Wan has one everywhere
    module.bias.data = bias
    branch = file.branch(layer, shape)
    module.branch = (branch.up.float(), branch.down.float()) if branch else None
    codec, entry, smooth = file.codec(layer), file.runs_as(layer), file.smoothing(layer)
    if codec is None or not targets.rounds_inputs(entry, gpu):
        return
    if smooth is None:
        module.feed = lambda x: as_loaded(codec, x, entry)
    else:
        module.feed = lambda x: as_loaded(codec, x * smooth, entry) / smooth
