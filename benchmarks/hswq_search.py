"""HSWQ's weighted amax search on one 4096 x 4096 weight, one CPU thread: ours against its own 800-point loop.

    python benchmarks/hswq_search.py [--runs 5]

The loop is written here from the published formulas (facts/seeds.md §B1): a histogram of 4096 bins, 200 candidates
and three refinements of 200, each candidate rounded by a full distance matrix to the 127 code values in batches of
10,000, and read back with .item(). Also prints the true weighted error of both results.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from timing import spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quant_core.evidence.measure import E4M3_GRID
from quant_core.rounding import hswq

SIZE = 4096


def loop(weight: torch.Tensor, importance: torch.Tensor) -> tuple[float, float, float]:
    """(amax, seconds of the histogram, seconds of the search) by the original's procedure."""
    began = time.perf_counter()
    magnitude = weight.float().abs()
    peak = magnitude.max().item()
    bins = (magnitude / peak * 4096).long().clamp(max=4095).flatten()
    mass = torch.bincount(bins, importance.double().expand(weight.shape).flatten(), minlength=4096)
    mass /= mass.sum()
    centre, grid = (torch.arange(4096) + 0.5).double() / 4096 * peak, torch.from_numpy(E4M3_GRID).double()
    built = time.perf_counter()

    def cost(amax: float) -> float:
        scaled = (centre * 448 / amax).clamp(max=448)
        nearest = torch.cat([grid[(part[:, None] - grid).abs().argmin(1)] for part in scaled.split(10_000)])
        return ((nearest * amax / 448 - centre).square() * mass).sum().item()

    low, high, best, least = 0.5 * peak, peak, peak, float("inf")
    for _ in range(4):
        for amax in torch.linspace(low, high, 200).tolist():
            if (found := cost(amax)) < least:
                best, least = amax, found
        width = (high - low) / 4
        low, high = max(0.1 * peak, best - width), min(1.2 * peak, best + width)
    return best, built - began, time.perf_counter() - built


def true_error(weight: torch.Tensor, importance: torch.Tensor, amax: float) -> float:
    x = weight.float()
    q = (x * (448 / amax)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (amax / 448)
    weighted = importance.double()
    return (((q - x).double().square() * weighted).sum() / (x.double().square() * weighted).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(SIZE, SIZE, generator=generator) * 0.02).bfloat16()
    importance = torch.rand(SIZE, generator=generator)
    theirs, built, searched = loop(weight, importance)
    search, both, ours = [], [], 0.0
    for _ in range(runs):
        began = time.perf_counter()
        found = hswq.histogram(weight, importance)
        middle = time.perf_counter()
        ours, _ = hswq.search(found)
        search.append(time.perf_counter() - middle)
        both.append(time.perf_counter() - began)
    print(f"{SIZE} x {SIZE} bf16, one CPU thread; ours n = {runs} (min / median / max), the loop once\n")
    print("| | search, s | with histogram, s | weighted relative error |\n|---|---|---|---|")
    print(f"| ours | {spread(search, 4)} | {spread(both, 3)} | {true_error(weight, importance, ours):.4e} |")
    print(f"| loop | {searched:.2f} | {searched + built:.2f} | {true_error(weight, importance, theirs):.4e} |")
    ratio, whole = searched / np.median(search), (searched + built) / np.median(both)
    print(f"| loop / ours (median) | {ratio:.0f} x | {whole:.0f} x | |")


if __name__ == "__main__":
    main()
