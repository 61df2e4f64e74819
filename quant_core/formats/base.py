"""What every format has in common: the protocol, the codes it produces and the padding rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Shape = tuple[int, ...]
# Suffix of a tensor in the file ("weight", "weight_scale", …) -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, Shape]]
FileTensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codes:
    """A quantized weight before packing: one code per (padded) weight, scales in plain row order.

    data: [R, C] codes, uint8 for FP4, float8_e4m3fn or int8 otherwise.
    scale: per block [R, C / block], per row [R, 1], or None where only the tensor has a scale.
    tensor_scale: float32 scalar, or None.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None


class Format(Protocol):
    """One storage format of one layer. Adding a format is adding a module with such an object to ``FORMATS``."""

    name: str
    title: str
    group: int  # consecutive columns that share a scale; 0: a whole row, or the tensor
    rows: int  # a weight's row count must be padded to a multiple of this; row chunks keep to it

    def obstacle(self, shape: Shape) -> str:
        """Why a weight of this shape cannot be stored in this format; "" if it can."""

    def layout(self, shape: Shape) -> Layout:
        """Exactly the tensors a weight ``[out, in]`` becomes in the file, besides ``comfy_quant``."""

    def config(self, full_precision: bool = False) -> dict[str, Any] | None:
        """The JSON of ``comfy_quant`` and of the header entry; None where the loader needs no marker."""

    def tensor_scale(self, amax: torch.Tensor) -> torch.Tensor | None:
        """The per-tensor scale (float32 scalar) by the nearest rule from max|w| (float32 scalar)."""

    def quantize(self, weight: torch.Tensor, tensor_scale: torch.Tensor | None) -> Codes:
        """Round float32 ``[out, in]`` to nearest. Rows are independent once the tensor scale is given."""

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        """float32 ``[out, in]`` of the codes, computed here and not by comfy-kitchen."""

    def choose(
        self, blocks: torch.Tensor, tensor_scale: torch.Tensor | None, importance: torch.Tensor
    ) -> torch.Tensor | None:
        """The stored scale of each block with the least sum of importance * (q - w)**2; the nearest rule wins ties.

        A format where searching gains nothing returns the nearest rule's.

        blocks: float32 [rows, blocks, group]; importance: float32 [blocks, group]; returns [rows, blocks] in the
        dtype of ``Codes.scale``, or None where blocks have no scale of their own.
        """

    def step(self, scale: torch.Tensor | None, tensor_scale: torch.Tensor | None) -> torch.Tensor:
        """float32 value of one code unit for stored scales (same shape as ``scale``)."""

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        """Nearest codes of weights already divided by their step."""

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        """The same as float32 values of the codes, in units of the step."""

    def pack(self, codes: Codes) -> FileTensors:
        """Lay codes and scales out as the file wants them."""

    def kernel(self, weight: torch.Tensor, tensor_scale: torch.Tensor | None) -> FileTensors:
        """The same as pack(quantize(weight)) by comfy-kitchen's own kernel (its CUDA kernel on a GPU)."""

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """float32 ``[out, in]`` of file tensors, by comfy-kitchen's dequantize: the loader's own arithmetic."""


def best_scale(
    blocks: torch.Tensor,
    importance: torch.Tensor,
    candidates: torch.Tensor,
    decoded: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Of candidate scales [candidates, rows, blocks] the one with the least weighted squared error, [rows, blocks].

    decoded(candidates) gives the blocks rounded with each scale, float32 [candidates, rows, blocks, group]. The first
    of equals wins, so the nearest rule's scale comes first.
    """
    errors = (decoded(candidates) - blocks).square_().mul_(importance).sum(-1)
    return candidates.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def rounded(fmt: Format, blocks: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Blocks [rows, blocks, group] rounded to nearest with steps [..., rows, blocks]; zero steps give zeros."""
    step = step.unsqueeze(-1)
    return fmt.snap(torch.where(step == 0, 0.0, blocks / torch.where(step == 0, 1.0, step))) * step


def roundup(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pad(weight: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zero-pad ``[out, in]`` on the right and at the bottom to multiples of ``multiple``."""
    rows, cols = weight.shape
    return F.pad(weight, (0, roundup(cols, multiple) - cols, 0, roundup(rows, multiple) - rows))


def power_of_two_at_least(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two >= a positive scale (0 stays 0), computed exactly through the exponent.

    A power of two makes the bfloat16 arithmetic of an emulating loader exact. For NVFP4 it is free: its relative
    error changes by -0.1 % … +0.4 % on seven weight distributions (benchmarks/scales.py).
    """
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
    return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), torch.zeros_like(scale))


def finite_2d(shape: Shape) -> str:
    """The obstacle that all formats share."""
    if len(shape) != 2:
        return f"only 2-D weights can be quantized, this one is {len(shape)}-D"
    if 0 in shape:
        return "the weight is empty"
    return ""


def with_precision(config: dict[str, Any], full_precision: bool) -> dict[str, Any]:
    """Add the loader's weight-only switch (W4A16, W8A16) to a ``comfy_quant`` object."""
    return {**config, "full_precision_matrix_mult": True} if full_precision else config
