"""Is a power-of-two tensor scale free? Relative weight error (x 1e-4) of FP8 and NVFP4 with amax / max as the scale
and with the next power of two, decoded in float32 and, for FP8, in bfloat16 as an emulating loader does.

    python benchmarks/scales.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import comfy_kitchen as ck
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quant_core.formats.base import power_of_two_at_least

SIZE = 1024
Draw = Callable[[], torch.Tensor]
DRAWS: dict[str, Draw] = {
    "Gaussian": lambda: torch.randn(SIZE, SIZE),
    "Laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((SIZE, SIZE)),
    "Student-t4": lambda: torch.distributions.StudentT(4.0).sample((SIZE, SIZE)),
    "Student-t3": lambda: torch.distributions.StudentT(3.0).sample((SIZE, SIZE)),
    "10 outliers at 60 sigma": lambda: torch.randn(SIZE, SIZE).index_put(
        (torch.arange(10), torch.arange(10)), torch.tensor(60.0)
    ),
    "lognormal rows": lambda: torch.randn(SIZE, SIZE) * torch.randn(SIZE, 1).exp(),
    "lognormal columns": lambda: torch.randn(SIZE, SIZE) * torch.randn(1, SIZE).exp(),
}


def error(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    return 1e4 * ((weight - decoded.float()).double().square().sum() / weight.double().square().sum()).item()


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[float, float]:
    codes = ck.quantize_per_tensor_fp8(weight, scale)
    decode = ck.dequantize_per_tensor_fp8
    return error(weight, decode(codes, scale, torch.float32)), error(weight, decode(codes, scale, torch.bfloat16))


def nvfp4(weight: torch.Tensor, scale: torch.Tensor) -> float:
    codes, blocks = ck.quantize_nvfp4(weight, scale)
    return error(weight, ck.dequantize_nvfp4(codes, scale, blocks, torch.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    print(f"means of {repeats} draws of {SIZE}x{SIZE} at sigma .01 … .04")
    names = ("FP8 amax", "pow2", "FP8 amax in bf16", "pow2 in bf16", "NVFP4 amax", "pow2")
    print(f"{'weights':<24}" + "".join(f"{n:>18}" for n in names))
    for name, draw in DRAWS.items():
        total = torch.zeros(6)
        for _ in range(repeats):
            weight = draw() * 0.01 * 4 ** torch.rand(())
            amax = weight.abs().max()
            free, snapped = fp8(weight, amax / 448), fp8(weight, power_of_two_at_least(amax / 448))
            four = nvfp4(weight, amax / 2688), nvfp4(weight, power_of_two_at_least(amax / 2688))
            total += torch.tensor([free[0], snapped[0], free[1], snapped[1], *four])
        print(f"{name:<24}" + "".join(f"{v:>18.3f}" for v in (total / repeats).tolist()))


if __name__ == "__main__":
    main()
