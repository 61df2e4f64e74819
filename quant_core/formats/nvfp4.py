"""NVFP4: E2M1 codes, one E4M3 scale per 16 weights, one float32 scale per tensor (4.5 bits a weight).

value = e2m1(code) * e4m3(block_scale) * weight_scale_2.  File layout: facts of comfy-kitchen's
``TensorCoreNVFP4Layout``; scales swizzled for cuBLAS (docs.nvidia.com/cuda/cublas, "1D block scaling").
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import comfy_kitchen as ck
import torch
from comfy_kitchen.float_utils import from_blocked, pack_uint4, to_blocked

from . import base
from .base import Codes, FileTensors, Frame, Layout, Shape, roundup

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
EXPONENT, ONE = 0x7F800000, 0x3F800000  # bits of a float32: its exponent, and 1.0
TO_MIDDLE = (22 << 23) + (1 << 22)  # what makes 1.5 * 2**22 p of a power of two p


class NVFP4(base.Linear):
    name = "nvfp4"
    title = "NVFP4"
    group = BLOCK
    rows = BLOCK

    def obstacle(self, shape: Shape) -> str:
        shared = base.finite_2d(shape)
        if shared:
            return shared
        rows, cols = shape
        # ComfyUI reads layer sizes off the stored tensor when it detects a model, so padding would change them;
        # Blackwell's kernel wants K % 32 == 0.
        if rows % BLOCK or cols % 32:
            return f"{rows}x{cols} does not divide by 16 rows and 32 columns"
        return ""

    def layout(self, shape: Shape) -> Layout:
        rows, cols = (roundup(n, BLOCK) for n in shape)
        return {
            "weight": (torch.uint8, (rows, cols // 2)),
            "weight_scale": (torch.float8_e4m3fn, (roundup(rows, 128), roundup(cols // BLOCK, 4))),
            "weight_scale_2": (torch.float32, ()),
        }

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any]:
        return base.with_precision({"format": self.name}, full_precision)

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return base.power_of_two_at_least(amax / (E2M1_MAX * E4M3_MAX))

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Codes:
        weight = base.pad(weight, BLOCK)
        blocks = weight.view(weight.shape[0], -1, BLOCK)
        scale = _nearest_scale(blocks.abs().amax(-1), tensor)
        frame = Frame(tensor)
        return Codes(self.codes(weight, scale, frame), scale, frame)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, frame: Frame) -> torch.Tensor:
        """Nearest E2M1 codes, uint8 [R, C], of a padded float32 weight for given block scales [R, C / 16]."""
        blocks = weight.view(weight.shape[0], -1, BLOCK)
        step = self.step(scale, frame).unsqueeze(-1)
        scaled = torch.where(step == 0, torch.zeros_like(blocks), blocks / step)
        return round_e2m1(scaled).view(weight.shape)

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        step = self.step(codes.scale, codes.frame)
        values = e2m1_value(codes.data).view(codes.data.shape[0], -1, BLOCK) * step.unsqueeze(-1)
        return values.view(codes.data.shape)[: shape[0], : shape[1]]

    def choose(self, blocks: torch.Tensor, frame: Frame, importance: torch.Tensor) -> torch.Tensor:
        # 13 codes around the nearest rule's (one E4M3 code is 1/8 octave; "4 over 6" is among them) do as well as
        # all 126 (facts/peers.md §3.1)
        rows, count, _ = blocks.shape
        x = blocks.reshape(-1, BLOCK).T.contiguous()  # [16, n]: blocks side by side, three times as fast
        nearest = _nearest_scale(x.abs().amax(0), frame.tensor).view(torch.uint8).to(torch.int16)
        shifts = torch.tensor(sorted(range(-4, 9), key=abs), device=x.device, dtype=torch.int16).unsqueeze(1)
        codes = (nearest + shifts).clamp_(0, 126).to(torch.uint8)  # [13, n]
        steps = self.step(codes.view(torch.float8_e4m3fn), frame)
        inverses = torch.where(steps == 0, 0.0, 1.0 / steps)
        weights, even = importance.T.unsqueeze(1), bool((importance == 1).all())  # [16, 1, count]
        off, room, errors = torch.empty_like(x), torch.empty_like(x), torch.empty_like(steps)
        for step, inverse, error in zip(steps, inverses, errors, strict=True):
            _snap_in_place(torch.mul(x, inverse, out=off), room).mul_(step).sub_(x)
            off.square_()
            if not even:
                off.view(BLOCK, rows, count).mul_(weights)
            torch.sum(off[: BLOCK // 2].add_(off[BLOCK // 2 :]), 0, out=error)
        best = codes.gather(0, errors.argmin(0, keepdim=True))  # the first of equals
        return best.view(torch.float8_e4m3fn).view(rows, count)

    def step(self, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        return frame.tensor * scale.float()

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        return snap_e2m1(scaled)

    def pack(self, codes: Codes) -> FileTensors:
        return {
            "weight": pack_uint4(codes.data, hi_first=True),
            "weight_scale": to_blocked(codes.scale, flatten=False),
            "weight_scale_2": codes.frame.tensor,
        }

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> FileTensors:
        if tensor == 0:  # comfy-kitchen divides 0 by 0 here and stores NaN scales
            return self.pack(self.quantize(weight, tensor))
        packed, scale = ck.quantize_nvfp4(weight, tensor, pad_16x=True)
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": tensor}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        scale = tensors["weight_scale"].view(torch.float8_e4m3fn)
        full = ck.dequantize_nvfp4(tensors["weight"], tensors["weight_scale_2"], scale, output_type=torch.float32)
        return full[: shape[0], : shape[1]]

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        scale = rows.abs().amax() / (E2M1_MAX * E4M3_MAX) if input_scale is None else input_scale
        return self.decode(self.kernel(rows, scale), tuple(rows.shape))

    def unpack_scale(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Block scales in plain row order, float8_e4m3fn [R, C / 16]."""
        rows, half = tensors["weight"].shape
        return from_blocked(tensors["weight_scale"], rows, half * 2 // BLOCK)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code (ties to even, saturating) as uint8: sign << 3 | exponent << 1 | mantissa.

    The grid 0 .5 1 1.5 2 | 2 3 4 | 4 6 has steps .5, 1 and 2; counted in its own step each part is an integer
    grid with its own offset, and the smallest of the three counts is the right one.
    """
    y = x.abs().clamp_(max=E2M1_MAX)
    code = torch.minimum(torch.round(y * 2), torch.round(y).add_(2))
    code = torch.minimum(code, torch.round(y * 0.5).add_(4)).to(torch.uint8)
    return code.bitwise_or_(torch.signbit(x).to(torch.uint8).mul_(8))


def e2m1_value(code: torch.Tensor) -> torch.Tensor:
    """float32 value of E2M1 codes (uint8)."""
    return _values(code.device).index_select(0, code.reshape(-1).int()).view(code.shape)


def snap_e2m1(x: torch.Tensor) -> torch.Tensor:
    """float32 value of the nearest E2M1 code of finite x, at half the cost of code and value."""
    return _snap_in_place(x.clone(), torch.empty_like(x)).copysign_(x)


def _snap_in_place(y: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Contiguous float32 y rounded to E2M1 values, without the sign of zeros. room: as y, overwritten.

    With p the power of two at or below max(|y|, 1), values are multiples of p / 2, and so are all float32 between
    2**22 p and 2**23 p: adding the middle of these and taking it away again rounds y to them, ties to even codes.
    """
    bits = room.view(torch.int32)
    torch.bitwise_and(y.clamp_(-E2M1_MAX, E2M1_MAX).view(torch.int32), EXPONENT, out=bits)
    bits.clamp_(min=ONE).add_(TO_MIDDLE)
    return y.add_(room).sub_(room)


def _nearest_scale(amax: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Block scales, float8_e4m3fn, by the nearest rule from the largest weights of blocks."""
    wanted = torch.nan_to_num(amax / E2M1_MAX / tensor)  # 0 / 0 in an all-zero tensor
    return wanted.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


@lru_cache
def _values(device: torch.device) -> torch.Tensor:
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat([magnitude, -magnitude]).to(device)


FORMAT = NVFP4()
