"""INT8 with one float32 scale per row (8 bits a weight): value = code * weight_scale[row].

The loader calls the format ``int8_tensorwise`` and takes a scale of shape [] or [out, 1]; per row has 2-10 times
less error at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy_kitchen as ck
import torch

from . import base
from .base import Codes, FileTensors, Layout, Shape

INT8_MAX = 127.0


class INT8:
    name = "int8_tensorwise"
    title = "INT8"
    group = 0
    rows = 1

    def obstacle(self, shape: Shape) -> str:
        return base.finite_2d(shape)

    def layout(self, shape: Shape) -> Layout:
        return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, (shape[0], 1))}

    def config(self, full_precision: bool = False) -> dict[str, Any]:
        return base.with_precision({"format": self.name}, full_precision)

    def tensor_scale(self, amax: torch.Tensor) -> None:
        return None

    def quantize(self, weight: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> Codes:
        # The floor of 1e-30 is comfy-kitchen's: an all-zero row keeps zero codes and a finite scale.
        scale = (weight.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_(min=1e-30)
        return Codes(self.codes(weight, scale), scale)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Nearest codes, int8 [out, in], for given row scales [out, 1]."""
        return (weight / scale).round_().clamp_(-128, 127).to(torch.int8)

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        return codes.data.float() * codes.scale

    def choose(self, blocks: torch.Tensor, tensor_scale: torch.Tensor | None, importance: torch.Tensor) -> torch.Tensor:
        nearest = (blocks.abs().amax(-1) / INT8_MAX).clamp_(min=1e-30)
        factors = [2.0 ** (-i / 16) for i in range(9)]  # from 1: clipping a row's largest weights, down to x 0.71
        scales = torch.stack([nearest * factor for factor in factors])
        return base.best_scale(blocks, importance, scales, lambda s: base.rounded(self, blocks, s))

    def step(self, scale: torch.Tensor | None, tensor_scale: torch.Tensor | None) -> torch.Tensor:
        return scale

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        return self.snap(scaled).to(torch.int8)

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp_(-128, 127)

    def pack(self, codes: Codes) -> FileTensors:
        return {"weight": codes.data, "weight_scale": codes.scale}

    def kernel(self, weight: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> FileTensors:
        data, scale = ck.quantize_int8_rowwise(weight)
        return {"weight": data, "weight_scale": scale.view(-1, 1)}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        return ck.dequantize_int8_simple(tensors["weight"], tensors["weight_scale"]).float()


FORMAT = INT8()
