"""What every format has in common: the protocol, the codes it produces and the padding rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Shape = tuple[int, ...]
# Suffix of a tensor in the file ("weight", "weight_scale", …) -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, Shape]]
FileTensors = dict[str, torch.Tensor]
TURNED = 1 << 22  # elements rotated at once
ROTATED = (4, 16, 64, 256, 1024)  # powers of 4: sizes that a regular Hadamard matrix exists for
BLOCKS = (256, 64, 16)  # of columns that are rotated together, best first


@dataclass(frozen=True)
class Frame:
    """What holds for whole rows before groups of columns get a scale of their own.

    tensor: float32 scalar, the scale of the whole tensor (NVFP4, FP8), or float32 [levels], its table (W4A8, W6A8).
    rows: float32 [R, 1], a scale per row (W4A8). None where a format has no such thing.
    """

    tensor: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Codes:
    """A quantized weight before packing: one code per (padded) weight, scales in plain row order.

    data: [R, C] codes, uint8 for FP4 and codebooks, float8_e4m3fn or int8 otherwise.
    scale: per group [R, C / group], per row [R, 1], or None where only the tensor has a scale.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    frame: Frame = Frame()


def join(parts: Sequence[Codes]) -> Codes:
    """The codes of rows that were quantized apart, with one ``Frame.tensor``."""
    scales = [part.scale for part in parts if part.scale is not None]
    rows = [part.frame.rows for part in parts if part.frame.rows is not None]
    frame = Frame(parts[0].frame.tensor, torch.cat(rows) if rows else None)
    return Codes(torch.cat([part.data for part in parts]), torch.cat(scales) if scales else None, frame)


class Grid(Protocol):
    """The values that weights may become, given their scale."""

    def snap(self, weight: torch.Tensor) -> torch.Tensor:
        """float32, the nearest value of each; ``weight`` broadcasts against the scale the grid was made for."""


class Format(Protocol):
    """One storage format of one layer. Adding a format is adding a module with such an object to ``FORMATS``.

    Weights are rounded in a basis of the format's own: columns rotated by ``turn`` in blocks of ``rotation``. What is
    between ``frame`` and ``dequantize`` sees rotated weights; shapes, files and ``decode`` know the original only.
    """

    name: str
    title: str
    group: int  # consecutive columns that share a scale; 0: a whole row, or the tensor
    rows: int  # a weight's row count must be padded to a multiple of this; row chunks keep to it

    def obstacle(self, shape: Shape) -> str:
        """Why a weight of this shape cannot be stored in this format; "" if it can."""

    def layout(self, shape: Shape) -> Layout:
        """Exactly the tensors a weight ``[out, in]`` becomes in the file, besides ``comfy_quant``."""

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any] | None:
        """The JSON of ``comfy_quant`` and of the header entry; None where the loader needs no marker."""

    def rotation(self, columns: int) -> int:
        """Columns that are rotated together; 0: none."""

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor | None:
        """``Frame.tensor`` by the nearest rule, from a whole (rotated) weight of any float dtype and its max|w|."""

    def frame(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Frame:
        """The frame of some rows of the weight, float32 [R, in]."""

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Codes:
        """Round float32 ``[out, in]`` to nearest. Rows are independent once ``tensor`` is given."""

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        """float32 ``[out, in]`` of the codes, computed here and not by comfy-kitchen."""

    def choose(self, blocks: torch.Tensor, frame: Frame, importance: torch.Tensor) -> torch.Tensor | None:
        """The stored scale of each block with the least sum of importance * (q - w)**2; the nearest rule wins ties.

        A format where searching gains nothing returns the nearest rule's.

        blocks: float32 [rows, blocks, group]; importance: float32 [blocks, group]; returns [rows, blocks] in the
        dtype of ``Codes.scale``, or None where blocks have no scale of their own.
        """

    def grid(self, scale: torch.Tensor | None, frame: Frame) -> Grid:
        """The grid of stored scales. A frame's rows are a column vector: give ``scale`` as [rows, …]."""

    def codes(self, weight: torch.Tensor, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        """Nearest codes of a padded float32 weight [R, C] for given stored scales."""

    def pack(self, codes: Codes) -> FileTensors:
        """Lay codes and scales out as the file wants them."""

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> FileTensors:
        """The same as pack(quantize(weight)) by comfy-kitchen's own kernel (its CUDA kernel on a GPU)."""

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """float32 ``[out, in]`` of file tensors in the original basis: the loader's own arithmetic."""

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        """Inputs float32 [n, in] as the loader feeds them to its matrix product, in the original basis.

        input_scale: the stored one, float32 scalar; None: the loader's own rule.
        """


class Linear:
    """What formats share whose values are code times step: no rotation, a grid of steps."""

    def rotation(self, columns: int) -> int:
        return 0

    def frame(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Frame:
        return Frame(tensor)

    def grid(self, scale: torch.Tensor | None, frame: Frame) -> Grid:
        return Steps(self.step(scale, frame), self.snap)

    def step(self, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        """float32 value of one code unit for stored scales."""
        raise NotImplementedError

    def snap(self, scaled: torch.Tensor) -> torch.Tensor:
        """float32 values of the nearest codes of weights already divided by their step."""
        raise NotImplementedError


class Steps:
    """A grid of one step for each scale; a step of 0 makes zeros."""

    def __init__(self, step: torch.Tensor, snap: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._step, self._snap = step, snap
        self._inverse = torch.where(step == 0, 0.0, 1.0 / step)

    def snap(self, weight: torch.Tensor) -> torch.Tensor:
        return self._snap(weight * self._inverse) * self._step


def best_scale(
    blocks: torch.Tensor, importance: torch.Tensor, candidates: torch.Tensor, grid: Callable[[torch.Tensor], Grid]
) -> torch.Tensor:
    """Of candidate scales [candidates, rows, blocks] the one with the least weighted squared error, [rows, blocks].

    grid(one candidate [rows, blocks, 1]) snaps the blocks. The first of equals wins, so the nearest rule's comes first.
    """
    errors = torch.stack(
        [(grid(c.unsqueeze(-1)).snap(blocks) - blocks).square_().mul_(importance).sum(-1) for c in candidates]
    )
    return candidates.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


@lru_cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The regular orthogonal Hadamard matrix, float32 [size, size], of a size that is a power of 4: symmetric, so it is
    its own inverse, and with equal row sums, so that no channel collects the mean ("ConvRot", arXiv 2512.03673).
    """
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return (matrix / size**0.5).to(device)


def turn(x: torch.Tensor, size: int, each: Callable[..., Iterable[torch.Tensor]] = map) -> torch.Tensor:
    """``x`` [n, in] with its columns rotated in blocks of ``size`` (0: as it is), float32; turned twice it is x again.

    Turning both a weight and its inputs leaves their product as it is. each: a ``map`` for the parts of x.
    """
    if not size:
        return x
    matrix = hadamard(size, x.device)
    parts = x.split(max(1, TURNED // x.shape[1]))  # as many rows at once as comfy-kitchen: equal bits
    return torch.cat(
        list(each(lambda part: (part.float().reshape(len(part), -1, size) @ matrix.T).view(part.shape), parts))
    )


def largest_block(columns: int) -> int:
    """The largest block of columns that can be rotated together, of those that the loader's kernels take; else 0."""
    return next((size for size in BLOCKS if columns % size == 0), 0)


def no_block(shape: Shape) -> str:
    """The obstacle that rotated formats share."""
    return "" if largest_block(shape[1]) else f"{shape[1]} columns do not divide by {min(BLOCKS)}"


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
