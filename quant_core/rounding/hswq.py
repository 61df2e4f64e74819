"""HSWQ's scale search: the amax that minimizes the importance-weighted error on the 256 codes of E4M3.

The original evaluates 800 candidates one by one over a 4096-bin histogram. Here the histogram has a bin per
magnitude that bfloat16 and float16 can hold, so it is exact for them, and all candidates are evaluated at once: the
error of one candidate is a sum over code intervals of weighted moments, and those are differences of prefix sums.
Source: facts/seeds.md §B (formulas of ussoewwin's HSWQ scripts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..evidence.measure import E4M3_GRID

SHIFT = 13  # float32 bits dropped: ten mantissa bits stay, all that float16 and bfloat16 have
ROWS_AT_ONCE = 1 << 20  # weights
CANDIDATES = 1024
LOWEST, HIGHEST = 0.25, 1.2  # of max|w|; HSWQ can reach 0.281 … 1.2
_GRID = E4M3_GRID.astype(np.float64)
TOP = float(_GRID[-1])  # 448
_MIDDLE = (_GRID[1:] + _GRID[:-1]) / 2  # where rounding changes from one code to the next

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """Distinct magnitudes in ascending order and prefix sums of importance times magnitude to the power 0, 1, 2.

    Prefix sums have one entry more than magnitudes: entry i sums the first i.
    """

    magnitude: Array
    sums: tuple[Array, Array, Array]

    @property
    def energy(self) -> float:
        return float(self.sums[2][-1])


@dataclass(frozen=True)
class Gains:
    """Importance-weighted relative error with each ingredient, so that nobody has to believe it."""

    plain_cast: float  # no scale, no clipping
    clipped_cast: float  # HSWQ V1: no scale, best clipping
    amax_scale: float  # scale max|w| / 448
    searched_scale: float  # HSWQ V2: scale from the searched amax


def histogram(weight: torch.Tensor, importance: torch.Tensor | None = None) -> Histogram:
    """Exact weighted histogram of |w|. weight: [out, in], any float dtype; importance: float32 [in], default 1."""
    rows, cols = weight.shape
    per_column = torch.ones(cols, dtype=torch.float64) if importance is None else importance.double().cpu()
    step = max(1, ROWS_AT_ONCE // cols)
    weights = per_column.repeat(min(step, rows))
    total = torch.zeros(1 << (31 - SHIFT), dtype=torch.float64)
    for chunk in weight.split(step):
        bits = chunk.float().contiguous().view(torch.int32).reshape(-1)
        index = bits.bitwise_and(0x7FFFFFFF).bitwise_right_shift_(SHIFT)
        total.index_add_(0, index, weights[: len(index)])  # in order, so that no bit hangs on ROWS_AT_ONCE
    used = torch.nonzero(total).reshape(-1)
    magnitude = (used.to(torch.int32) << SHIFT).view(torch.float32).double().numpy()
    mass = total[used].numpy()
    powers = (mass, mass * magnitude, mass * magnitude**2)
    zero = np.zeros(1)
    return Histogram(magnitude, tuple(np.concatenate([zero, np.cumsum(p)]) for p in powers))


def errors(h: Histogram, scale: Array, clip: Array) -> Array:
    """Weighted squared error for each candidate: values above ``clip`` become it, then round(x / scale) * scale.

    scale, clip: float64 [candidates].
    """
    top = np.searchsorted(h.magnitude, clip)  # magnitudes below clip, per candidate
    edges = np.minimum(np.searchsorted(h.magnitude, np.outer(scale, _MIDDLE)), top[:, None])
    bounds = np.concatenate([np.zeros((len(scale), 1), int), edges, top[:, None]], axis=1)
    s0, s1, s2 = (np.diff(p[bounds], axis=1) for p in h.sums)
    value = np.outer(scale, _GRID)
    inside = (s2 - 2 * value * s1 + value**2 * s0).sum(1)
    at_clip = scale * _GRID[_codes(clip / scale)]
    r0, r1, r2 = (p[-1] - p[top] for p in h.sums)
    return np.maximum(inside + r2 - 2 * at_clip * r1 + at_clip**2 * r0, 0.0)


def _codes(x: Array) -> NDArray[np.int64]:
    """Index in the grid of what positive numbers round to; a tie goes to the even code."""
    code = np.searchsorted(_MIDDLE, x)
    tie = np.append(_MIDDLE, np.inf)[code] == x
    return code + (tie & (code % 2 == 1))


def search(h: Histogram, scaled: bool = True) -> tuple[float, float]:
    """(amax, weighted squared error) of the best candidate; a coarse and a fine grid. Never worse than max|w|."""
    peak = h.magnitude[-1] if len(h.magnitude) else 0.0
    if peak == 0:
        return 0.0, 0.0
    coarse = np.append(np.linspace(LOWEST, HIGHEST, CANDIDATES), 1.0) * peak
    best = coarse[int(np.argmin(_candidate_errors(h, coarse, scaled)))]
    width = (HIGHEST - LOWEST) / (CANDIDATES - 1) * peak
    fine = np.append(np.linspace(best - width, best + width, CANDIDATES), [best, peak])
    found = _candidate_errors(h, fine, scaled)
    return float(fine[int(np.argmin(found))]), float(found.min())


def _candidate_errors(h: Histogram, amax: Array, scaled: bool) -> Array:
    return errors(h, amax / TOP, amax) if scaled else errors(h, np.ones_like(amax), amax)


def gains(h: Histogram) -> Gains:
    """Relative weighted error of every ingredient on this weight."""
    if not h.energy:
        return Gains(0.0, 0.0, 0.0, 0.0)
    peak = h.magnitude[-1:]
    plain, scaled = (float(_candidate_errors(h, peak, s)[0]) / h.energy for s in (False, True))
    return Gains(plain, search(h, False)[1] / h.energy, scaled, search(h, True)[1] / h.energy)
