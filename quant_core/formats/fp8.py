"""FP8 E4M3 with one float32 scale per tensor (8 bits a weight), and the ``unscaled`` dialect without one.

value = e4m3(code) * weight_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy_kitchen as ck
import torch

from . import base
from .base import Codes, FileTensors, Frame, Layout, Shape

E4M3_MAX = 448.0


class FP8(base.Linear):
    name = "float8_e4m3fn"
    title = "FP8"
    group = 0
    rows = 1

    def obstacle(self, shape: Shape) -> str:
        return base.finite_2d(shape)

    def layout(self, shape: Shape) -> Layout:
        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (torch.float32, ())}

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any] | None:
        return base.with_precision({"format": self.name}, full_precision)

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        # A scale of 1 for an all-zero tensor: the loader divides by it.
        # Not a power of two, unlike NVFP4's: that costs up to 2.4 % of error here (benchmarks/scales.py).
        # Not below the smallest normal number: its reciprocal would be Inf, and Inf * 0 is NaN.
        return (torch.where(amax == 0, E4M3_MAX, amax) / E4M3_MAX).clamp(min=2.0**-126)

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Codes:
        return Codes(self.round(weight * (1.0 / tensor)), frame=Frame(tensor))

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        return codes.data.float() * codes.frame.tensor

    def choose(self, blocks: torch.Tensor, frame: Frame, importance: torch.Tensor) -> None:
        return None

    def step(self, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        return frame.tensor

    def codes(self, weight: torch.Tensor, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        return self.round(weight / frame.tensor)

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        """Nearest codes of weights already divided by the scale."""
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        return self.round(scaled).float()

    def pack(self, codes: Codes) -> FileTensors:
        return {"weight": codes.data, "weight_scale": codes.frame.tensor}

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> FileTensors:
        data = ck.quantize_per_tensor_fp8(weight, tensor, torch.float8_e4m3fn)
        return {"weight": data, "weight_scale": tensor}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        return ck.dequantize_per_tensor_fp8(tensors["weight"], tensors["weight_scale"], output_type=torch.float32)

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        scale = rows.new_tensor(1.0) if input_scale is None else input_scale  # without one the loader takes 1
        return self.decode(self.kernel(rows, scale), tuple(rows.shape))


class UnscaledFP8(FP8):
    """A plain cast that any FP8 loader reads: no scale, no marker, and Conv weights too (as HSWQ V1 writes them).

    What it costs: e4m3 is linear below 2**-6, so small weights lose precision. Relative error of Gaussian
    weights at sigma .02 / .005: 10.9e-4 / 127e-4, against 7.0e-4 with a scale.
    """

    name = "float8_e4m3fn_unscaled"
    title = "FP8 without scale"

    def obstacle(self, shape: Shape) -> str:
        return "the weight is empty" if 0 in shape else ""

    def layout(self, shape: Shape) -> Layout:
        return {"weight": (torch.float8_e4m3fn, shape)}

    def config(self, shape: Shape, full_precision: bool = False) -> None:
        return None

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(amax)

    def pack(self, codes: Codes) -> FileTensors:
        return {"weight": codes.data}

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> FileTensors:
        return {"weight": ck.quantize_per_tensor_fp8(weight, torch.ones_like(tensor), torch.float8_e4m3fn)}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        return tensors["weight"].float()

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        return rows


FORMAT = FP8()
UNSCALED = UnscaledFP8()
