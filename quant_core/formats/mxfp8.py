"""MXFP8: E4M3 codes, one power-of-two (E8M0) scale per 32 weights (8.25 bits a weight).

value = e4m3(code) * 2**(exponent - 127).  OCP Microscaling Formats v1.0, with the exponent rounded *up* as
comfy-kitchen does: the OCP floor rule saturates and costs 1-2 dB.  Exponents are stored as uint8, because
ComfyUI's reader has no F8_E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy_kitchen as ck
import torch
from comfy_kitchen.float_utils import to_blocked

from . import base
from .base import Codes, FileTensors, Frame, Layout, Shape, roundup

BLOCK = 32
E4M3_MAX = 448.0
BIAS = 127
NO_FRAME = Frame()


class MXFP8(base.Linear):
    name = "mxfp8"
    title = "MXFP8"
    group = BLOCK
    rows = BLOCK

    def obstacle(self, shape: Shape) -> str:
        shared = base.finite_2d(shape)
        if shared:
            return shared
        if shape[0] % BLOCK or shape[1] % BLOCK:  # see nvfp4: padding changes the shapes ComfyUI detects
            return f"{shape[0]}x{shape[1]} does not divide by 32"
        return ""

    def layout(self, shape: Shape) -> Layout:
        rows, cols = (roundup(n, BLOCK) for n in shape)
        return {
            "weight": (torch.float8_e4m3fn, (rows, cols)),
            "weight_scale": (torch.uint8, (roundup(rows, 128), roundup(cols // BLOCK, 4))),
        }

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any]:
        return base.with_precision({"format": self.name}, full_precision)

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> None:
        return None

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None = None) -> Codes:
        weight = base.pad(weight, BLOCK)
        exponent = nearest_exponent(weight.view(weight.shape[0], -1, BLOCK))
        return Codes(self.codes(weight, exponent), exponent)

    def codes(self, weight: torch.Tensor, exponent: torch.Tensor, frame: Frame = NO_FRAME) -> torch.Tensor:
        """Nearest E4M3 codes [R, C] of a padded float32 weight for given biased exponents, uint8 [R, C / 32]."""
        blocks = weight.view(weight.shape[0], -1, BLOCK)
        step = torch.where(exponent == 0, 1.0, exponent_value(exponent)).unsqueeze(-1)
        return (blocks / step).clamp_(-E4M3_MAX, E4M3_MAX).view(weight.shape).to(torch.float8_e4m3fn)

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        values = codes.data.float().view(codes.data.shape[0], -1, BLOCK) * exponent_value(codes.scale).unsqueeze(-1)
        return values.view(codes.data.shape)[: shape[0], : shape[1]]

    def choose(self, blocks: torch.Tensor, frame: Frame, importance: torch.Tensor) -> torch.Tensor:
        # No search: trying one exponent less and one more gained 0.00 % of output error, in GPTQ and without.
        return nearest_exponent(blocks)

    def step(self, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        return exponent_value(scale)

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()

    def pack(self, codes: Codes) -> FileTensors:
        return {"weight": codes.data, "weight_scale": to_blocked(codes.scale, flatten=False)}

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None = None) -> FileTensors:
        data, scale = ck.quantize_mxfp8(weight, pad_32x=True)
        return {"weight": data, "weight_scale": scale.view(torch.uint8)}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        scale = tensors["weight_scale"].view(torch.float8_e8m0fnu)
        return ck.dequantize_mxfp8(tensors["weight"], scale, output_type=torch.float32)[: shape[0], : shape[1]]

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        return self.decode(self.kernel(rows), tuple(rows.shape))


def nearest_exponent(blocks: torch.Tensor) -> torch.Tensor:
    """Biased exponents, uint8 [rows, blocks], of blocks [rows, blocks, 32]: the least that none of them saturates."""
    amax = blocks.abs().amax(-1)
    # comfy-kitchen's own float32 log2, so that the exponents are its exponents to the bit
    wanted = torch.log2((amax / E4M3_MAX).clamp(min=2.0**-BIAS)).ceil_().add_(BIAS).clamp_(0, 254)
    return torch.where(amax == 0, 0, wanted.to(torch.uint8))


def exponent_value(exponent: torch.Tensor) -> torch.Tensor:
    """float32 value of biased E8M0 exponents (uint8); the reader takes 0 as zero, not as 2**-127."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)


FORMAT = MXFP8()
