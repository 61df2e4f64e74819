"""W4A8 and W6A8: 4- or 6-bit codes of an INT8 grid, in a rotated basis (4.5 or 6.5 bits a weight and 32 a row).

In the rotated basis a group of 16 weights has one E4M3 scale and a row has one float32 scale; level = clamp(round(
table[code] * group scale), ±127) is an INT8 integer, and weight = level * row scale.  The kernel decodes codes to
levels, rotates the inputs, rounds them to INT8 row by row and multiplies integers.  The table of 4-bit codes is stored
(16 levels, Lloyd-Max of a Gaussian group); that of 6-bit codes is -31 … 31, stored as 1 … 63.

File layout: facts of comfy-kitchen's ``AsymW4A8Int8Layout`` (0.2.31; 6 bits since 0.2.38).  The symmetric kind only:
the loader drops the correction tensor of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import base, int8
from .base import Codes, FileTensors, Frame, Layout, Shape

GROUP = 16
INT8_MAX = 127.0
E4M3_MAX = 448.0
LEAST = 1e-8  # scale: comfy-kitchen's
REFITS = 2  # of the group scales by least squares: comfy-kitchen's
# Lloyd-Max levels of Gaussian weights over the largest of their group of 16, as comfy-kitchen has them.
GAUSSIAN = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
HEAVY_TAILED = -0.1  # excess kurtosis from which a table is fitted instead; rotated weights of real models lie at -0.5
KURTOSIS_SAMPLE, FIT_SAMPLE, FIT_PASSES = 1 << 19, 300_000, 25
DECIDED = 1 << 22  # weights, from all over the tensor, that the table is chosen by
SEARCHED = (0, -1, -2, -3, -4, -5, 1)  # E4M3 codes from the one of the group's largest weight
SAFE = (2.0**-10, 2.0**60)  # row maxima outside it are scaled by a power of two first


class W4A8:
    name = "asym_w4a8_int8"
    title = "W4A8"
    rows = 1
    bits = 4

    def __init__(self, size: int = 0, group: int = GROUP) -> None:
        """size of the rotated blocks (0: by the width) and of the groups, as a peer's file may have them."""
        self._size, self.group = size, group

    def rotation(self, columns: int) -> int:
        return self._size or base.largest_block(columns)

    def obstacle(self, shape: Shape) -> str:
        return base.finite_2d(shape) or base.no_block(shape)

    def layout(self, shape: Shape) -> Layout:
        rows, cols = shape
        return {
            "weight": (torch.int8, (rows, cols * self.bits // 8)),
            "weight_s_rel": (torch.uint8, (rows, cols // self.group)),
            "weight_s_channel": (torch.float32, (rows,)),
            "weight_codebook": (torch.float32, (len(GAUSSIAN),)),
        }

    def config(self, shape: Shape, full_precision: bool = False) -> dict[str, Any]:
        config = {"format": W4A8.name, "group_size": GROUP, "convrot_groupsize": self.rotation(shape[1])}
        return base.with_precision(config, full_precision)

    # --- rounding

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        step = max(1, DECIDED // weight.shape[1])
        if len(weight) > step:
            weight = weight[torch.linspace(0, len(weight) - 1, step, device=weight.device).long()]
        blocks = _blocks(weight.float() / _power_of_two(amax))
        return table(blocks / blocks.abs().amax(-1, keepdim=True).clamp(min=LEAST))

    def frame(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Frame:
        return self._nearest_scales(weight, tensor)[1]

    def _nearest_scales(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> tuple[torch.Tensor, Frame]:
        """Group scales, float8_e4m3fn [R, C / 16], and row scales by the nearest rule."""
        safe = _power_of_two(weight.abs().amax(1, keepdim=True))
        blocks = _blocks(weight / safe)
        scale = self._fitted(blocks, tensor)
        top = (self._near(blocks / scale, tensor) * scale).abs().amax((1, 2))
        rows = (top / INT8_MAX).clamp(min=LEAST).unsqueeze(1)
        return (scale.squeeze(-1) / rows).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn), Frame(tensor, rows * safe)

    def _fitted(self, blocks: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor:
        """Float group scales [R, blocks, 1]: from the largest weight, then by least squares."""
        scale = (blocks.abs().amax(-1, keepdim=True) / self._top()).clamp(min=LEAST)
        for _ in range(REFITS):
            near = self._near(blocks / scale, tensor)
            scale = (
                (blocks * near).sum(-1, keepdim=True) / (near * near).sum(-1, keepdim=True).clamp(min=LEAST)
            ).clamp(min=LEAST)
        return scale

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Codes:
        scale, frame = self._nearest_scales(weight, tensor)
        return Codes(self.codes(weight, scale, frame), scale, frame)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor | None, frame: Frame) -> torch.Tensor:
        assert scale is not None
        grid = self.grid(scale.unsqueeze(-1), frame)
        return grid.index(_blocks(weight)).view(weight.shape).to(torch.uint8)

    def dequantize(self, codes: Codes, shape: Shape) -> torch.Tensor:
        assert codes.scale is not None and codes.frame.rows is not None
        values = _levels(codes.frame)[codes.data.int()].view(len(codes.data), -1, GROUP)
        return _to_int8(values, codes.scale.unsqueeze(-1)).view(codes.data.shape) * codes.frame.rows

    def choose(self, blocks: torch.Tensor, frame: Frame, importance: torch.Tensor) -> torch.Tensor:
        assert frame.rows is not None
        fitted = self._fitted(blocks / frame.rows.unsqueeze(-1), frame.tensor).squeeze(-1)
        loudest = _code(blocks.abs().amax(-1) / frame.rows / self._top())
        around = [(loudest + shift).clamp_(0, 126) for shift in SEARCHED]
        candidates = torch.cat([self._nearby(_code(fitted)), torch.stack(around)]).to(torch.uint8)
        best = base.best_scale(
            blocks, importance, candidates, lambda code: self.grid(code.view(torch.float8_e4m3fn), frame)
        )
        return best.view(torch.float8_e4m3fn)

    def grid(self, scale: torch.Tensor | None, frame: Frame) -> Levels:
        assert scale is not None and frame.rows is not None
        values = _to_int8(_levels(frame), scale.unsqueeze(-1))
        return Levels(
            values.reshape(scale.numel(), -1), frame.rows.view(-1, *[1] * (scale.dim() - 1)).expand(scale.shape)
        )

    def _nearby(self, code: torch.Tensor) -> torch.Tensor:
        """The E4M3 codes that the nearest rule chooses from, the fitted one first: [candidates, …]."""
        return code.unsqueeze(0)

    def _near(self, scaled: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor:
        """The values nearest to weights over their group's scale, not yet INT8 levels."""
        assert tensor is not None
        return tensor[_index(scaled, tensor)]

    def _top(self) -> float:
        """What the group scale is multiplied by in the largest weight, about."""
        return 1.0

    # --- files

    def pack(self, codes: Codes) -> FileTensors:
        assert codes.scale is not None and codes.frame.rows is not None
        return {
            "weight": pack_nibbles(codes.data),
            "weight_s_rel": codes.scale.view(torch.uint8),
            "weight_s_channel": codes.frame.rows.reshape(-1),
            "weight_codebook": _levels(codes.frame),
        }

    def kernel(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> FileTensors:
        return self.pack(self.quantize(weight, tensor))  # comfy-kitchen 0.2.24 has none; on a GPU this runs there too

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        rows, cols = shape
        codes, scale = self._unpack(tensors["weight"], cols), tensors["weight_s_rel"]
        scale = scale.view(torch.float8_e4m3fn).float() if scale.element_size() == 1 else scale.float()
        levels = tensors.get("weight_codebook")
        # A file without a table counts evenly, from the middle of the codes.
        values = codes.float() - 2 ** (self.bits - 1) if levels is None else levels.float()[codes.int()]
        values = _to_int8(values.view(rows, scale.shape[1], -1), scale.unsqueeze(-1)).view(rows, cols)
        return base.turn(values * tensors["weight_s_channel"].view(-1, 1), self.rotation(cols))

    def _unpack(self, stored: torch.Tensor, cols: int) -> torch.Tensor:
        return unpack_nibbles(stored[:, : cols // 2])

    def feed(self, rows: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        return int8.ConvRot(self.rotation(rows.shape[1])).feed(rows, input_scale)


class W6A8(W4A8):
    """Six bits of the same kind: even levels and no table, a plane of nibbles and one of the two bits above them."""

    name = "asym_w6a8_int8"
    title = "W6A8"
    bits = 6
    most = 31

    def obstacle(self, shape: Shape) -> str:
        odd = f"{shape[1]} columns do not divide by 32" if len(shape) == 2 and shape[1] % 32 else ""
        return super().obstacle(shape) or odd

    def layout(self, shape: Shape) -> Layout:
        return {name: spec for name, spec in super().layout(shape).items() if name != "weight_codebook"}

    def tensor(self, weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return torch.arange(-self.most, self.most + 1, dtype=torch.float32, device=weight.device)

    def quantize(self, weight: torch.Tensor, tensor: torch.Tensor | None) -> Codes:
        fitted, frame = self._nearest_scales(weight, tensor)
        near = self._nearby(fitted.view(torch.uint8).to(torch.int16)).to(torch.uint8)
        blocks, unit = _blocks(weight / frame.rows), Frame(tensor, torch.ones_like(frame.rows))  # errors in levels
        scale = base.best_scale(
            blocks,
            torch.ones(blocks.shape[1:], device=weight.device),
            near,
            lambda c: self.grid(c.view(torch.float8_e4m3fn), unit),
        ).view(torch.float8_e4m3fn)
        return Codes(self.codes(weight, scale, frame), scale, frame)

    def _nearby(self, code: torch.Tensor) -> torch.Tensor:
        return torch.stack([code, (code - 1).clamp(min=1), (code + 1).clamp(max=126)])

    def _near(self, scaled: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor:
        return scaled.round().clamp_(-self.most, self.most)  # of two the even one, as comfy-kitchen

    def _top(self) -> float:
        return float(self.most)

    def pack(self, codes: Codes) -> FileTensors:
        assert codes.scale is not None and codes.frame.rows is not None
        stored = codes.data + 1  # the middle of 64 codes is 32; 0 stays unused
        high = stored >> 4
        plane = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
        return {
            "weight": torch.cat([pack_nibbles(stored), plane.view(torch.int8)], dim=1),
            "weight_s_rel": codes.scale.view(torch.uint8),
            "weight_s_channel": codes.frame.rows.reshape(-1),
        }

    def _unpack(self, stored: torch.Tensor, cols: int) -> torch.Tensor:
        plane = stored[:, cols // 2 :].contiguous().view(torch.uint8)
        high = torch.stack([plane >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).view(len(stored), cols)
        return unpack_nibbles(stored[:, : cols // 2]) | high << 4


class Levels:
    """A grid of INT8 levels, ascending, float32 [n, levels], for n scales; ``row`` [n as the scales] is their unit."""

    def __init__(self, values: torch.Tensor, row: torch.Tensor) -> None:
        self._values, self._row = values, row

    def index(self, weight: torch.Tensor) -> torch.Tensor:
        """The number of the nearest level, the lower one of two: int64 in the shape of ``weight``."""
        wanted = (weight / self._row).reshape(len(self._values), -1)
        return _index(wanted, self._values).view(weight.shape)

    def snap(self, weight: torch.Tensor) -> torch.Tensor:
        index = self.index(weight).view(len(self._values), -1)
        return self._values.gather(1, index).view(weight.shape) * self._row


def _index(wanted: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Number of the nearest of ascending ``levels`` ([L], or [n, L] for ``wanted`` [n, …]), the lower of two."""
    wanted = wanted.contiguous()
    above = torch.searchsorted(levels, wanted)
    low, high = (above - 1).clamp_(min=0), above.clamp_(max=levels.shape[-1] - 1)
    at = (lambda i: levels[i]) if levels.dim() == 1 else (lambda i: levels.gather(1, i))
    return torch.where((wanted - at(high)).abs_() < (wanted - at(low)).abs_(), high, low)


def _levels(frame: Frame) -> torch.Tensor:
    """Values of the codes 0 … in ascending order, before a group's scale."""
    assert frame.tensor is not None
    return frame.tensor


def _to_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The INT8 levels, as float32, of table values times group scales."""
    return (values * scale.float()).round_().clamp_(-INT8_MAX, INT8_MAX)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(len(weight), -1, GROUP)


def _code(scale: torch.Tensor) -> torch.Tensor:
    """E4M3 codes of scales, as int16."""
    return scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)


def _power_of_two(top: torch.Tensor) -> torch.Tensor:
    """float32: 1, or what to divide huge or tiny weights up to ``top`` by: no sum overflows, and LEAST is small."""
    _, exponent = torch.frexp(top)
    outside = (top > SAFE[1]) | (top < SAFE[0]) & (top > 0)
    return torch.where(outside, torch.ldexp(torch.ones_like(top), exponent.clamp(-100, 126)), 1.0)


def table(normalized: torch.Tensor) -> torch.Tensor:
    """The table for weights over the largest of their group: float32 [16], ascending.

    That of a Gaussian, or one fitted by Lloyd's algorithm where even rotated weights are heavy-tailed; sample, seed and
    passes are comfy-kitchen's, so the tables are equal.
    """
    x = _sampled(normalized.flatten(), KURTOSIS_SAMPLE)
    kurtosis = ((x - x.mean()) / (x.std() + 1e-9)).pow(4).mean() - 3.0
    if kurtosis.item() <= HEAVY_TAILED:
        return torch.tensor(GAUSSIAN, device=normalized.device)
    x = _sampled(normalized.flatten(), FIT_SAMPLE)
    levels = torch.quantile(x, torch.linspace(0, 1, len(GAUSSIAN), device=x.device))
    for _ in range(FIT_PASSES):
        nearest = (x.unsqueeze(-1) - levels).abs().argmin(-1)
        means = [x[nearest == i].mean() for i in range(len(levels))]
        levels = torch.stack([old if mean.isnan() else mean for old, mean in zip(levels, means, strict=True)])
    return levels.sort().values


def _sampled(x: torch.Tensor, count: int) -> torch.Tensor:
    if x.numel() <= count:
        return x
    random = torch.Generator(device=x.device).manual_seed(0)
    return x[torch.randint(0, x.numel(), (count,), device=x.device, generator=random)]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int8 [R, C / 2] of uint8 codes [R, C]: their low four bits, the even column in the low nibble."""
    low = codes & 15
    return (low[:, 0::2] | low[:, 1::2] << 4).view(torch.int8)


def unpack_nibbles(stored: torch.Tensor) -> torch.Tensor:
    both = stored.contiguous().view(torch.uint8)
    return torch.stack([both & 15, both >> 4], dim=-1).view(len(stored), -1)


FORMAT = W4A8()
SIX = W6A8()
