"""LoRA files: two factors for a layer, under keys that ComfyUI's stock loaders take for every model family.

``diffusion_model.<layer>.lora_up.weight`` [out, rank] and ``.lora_down.weight`` [rank, in], layers named without the
checkpoint's prefix; without an ``alpha`` the loaders add up @ down times their strength.
"""

from __future__ import annotations

import torch

PREFIX = "diffusion_model."
UP, DOWN = ".lora_up.weight", ".lora_down.weight"
DTYPE = torch.bfloat16
NOT_IN_THE_MODEL = "core."  # what begins the names in PixelDiT's files and is taken off by the loader


def keys(layer: str) -> tuple[str, str]:
    """The keys of a layer's two factors, up and down; ``layer`` without the checkpoint's prefix."""
    layer = layer.removeprefix(NOT_IN_THE_MODEL)
    return f"{PREFIX}{layer}{UP}", f"{PREFIX}{layer}{DOWN}"


def balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [out, rank] and [rank, in] as bfloat16 with norms within a factor of 2 of each other, the product kept.

    The factor moved from one to the other is a power of two, so nothing is rounded but once to bfloat16.
    """
    norms = up.float().norm(), down.float().norm()
    if not all(norm > 0 for norm in norms):
        return up.to(DTYPE), down.to(DTYPE)
    shift = torch.exp2((norms[1] / norms[0]).log2().div(2).round())
    return (up * shift).to(DTYPE), (down / shift).to(DTYPE)
