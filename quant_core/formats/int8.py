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
from .base import Codes, FileTensors, Frame, Layout, Shape

INT8_MAX = 127.0
NO_FRAME = Frame()


class INT8(base.Linear):
    name = "int8_tensorwise"
    title = "INT8"
    group = 0
    rows = 1

    def obstacle(self, shape: Shape) -> str:
        return base.finite_2d(shape)

    def layout(self, shape: Shape) -> Layout:
        return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, (shape[0], 1))}

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any]:
        return base.with_precision({"format": self.name}, full_precision)

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> None:
        return None

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None = None) -> Codes:
        # The floor of 1e-30 is comfy-kitchen's: an all-zero row keeps zero codes and a finite scale.
        scale = (weight.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_(min=1e-30)
        return Codes(self.codes(weight, scale), scale)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, frame: Frame = NO_FRAME) -> torch.Tensor:
        """Nearest codes, int8 [out, in], for given row scales [out, 1]."""
        return (weight / scale).round_().clamp_(-128, 127).to(torch.int8)

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        return codes.data.float() * codes.scale

    def choose(self, blocks: torch.Tensor, frame: Frame, importance: torch.Tensor) -> torch.Tensor:
        nearest = (blocks.abs().amax(-1) / INT8_MAX).clamp_(min=1e-30)
        factors = [2.0 ** (-i / 16) for i in range(9)]  # from 1: clipping a row's largest weights, down to x 0.71
        scales = torch.stack([nearest * factor for factor in factors])
        return base.best_scale(blocks, importance, scales, lambda s: self.grid(s, frame))

    def step(self, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        return scale

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp_(-128, 127)

    def pack(self, codes: Codes) -> FileTensors:
        return {"weight": codes.data, "weight_scale": codes.scale}

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None = None) -> FileTensors:
        data, scale = ck.quantize_int8_rowwise(weight)
        return {"weight": data, "weight_scale": scale.view(-1, 1)}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        stored = ck.dequantize_int8_simple(tensors["weight"], tensors["weight_scale"]).float()
        return base.turn(stored, self.rotation(shape[1]))

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        turned = base.turn(rows, self.rotation(rows.shape[1]))  # row by row, as the weights; a stored scale is ignored
        return self.decode(self.kernel(turned), tuple(rows.shape))


class ConvRot(INT8):
    """INT8 in a rotated basis: a loud channel is spread over a block of columns before anything is rounded.

    The loader calls it int8_tensorwise too, with ``convrot`` and the size of the blocks, and rotates the inputs.
    """

    name = "int8_convrot"
    title = "INT8 ConvRot"

    def __init__(self, size: int = 0) -> None:
        self._size = size  # of the blocks, in a file that says it; 0: by the width

    def rotation(self, columns: int) -> int:
        return self._size or base.largest_block(columns)

    def obstacle(self, shape: Shape) -> str:
        return base.finite_2d(shape) or base.no_block(shape)

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any]:
        rotated = {"format": INT8.name, "convrot": True, "convrot_groupsize": self.rotation(shape[1])}
        return base.with_precision(rotated, full_precision)


FORMAT = INT8()
CONVROT = ConvRot()
