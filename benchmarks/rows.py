"""What more input rows than a fraction of a layer's width are worth to GPTQ: held-out output error by rows / width.

    python benchmarks/rows.py [--out DIR] [--width 2048]

First the demo model's block Linears on real inputs (calibrated on blends of digits, judged on the digits; quality.py
makes both in --out), then one made-up layer whose inputs are correlated, have loud channels and come in pictures of 256
rows that are alike. NVFP4, covariance and bias: ||X W^T - X' Q^T||^2 / ||X W^T||^2 relative to ratio 1, "weights" with
exact inputs X' = X, "loaded" with inputs in FP4 (W4A4).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from gptq_variants import Layer, feedback, judge, load
from quality import ROWS, calibrate_demo, correlated, heavy_tailed

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
OUTPUTS = 128  # of the made-up layer: rows of a weight do not depend on each other
PICTURE = 256  # rows of one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where quality.py keeps its calibrations")
    parser.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    print("| inputs | error of | width | layers | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " | error at 1 |")
    print("|---|" + "---|" * (len(RATIOS) + 4))
    with tempfile.TemporaryDirectory() as temporary:
        layers = list(load(*calibrate_demo(options.out or Path(temporary))))
    for width in sorted({layer.rows.shape[1] for layer in layers}):
        show("digits", [layer for layer in layers if layer.rows.shape[1] == width])
    show("made up, rows independent", [made_up(options.width, None)])
    show("made up, pictures alike", [made_up(options.width, PICTURE)])


def show(inputs: str, layers: list[Layer]) -> None:
    width, errors = layers[0].rows.shape[1], dict[float, tuple[float, ...]]()
    for ratio in RATIOS:
        count = round(ratio * width)
        if count <= min(len(layer.rows) for layer in layers):
            errors[ratio] = tuple(map(fmean, zip(*(error(layer, count) for layer in layers), strict=True)))
    for i, name in enumerate(("weights", "loaded")):
        base = errors[1.0][i]
        cells = " | ".join(f"{errors[r][i] / base:.2f}" if r in errors else "" for r in RATIOS)
        print(f"| {inputs} | {name} | {width} | {len(layers)} | {cells} | {base:.2e} |", flush=True)


def error(layer: Layer, count: int) -> tuple[float, float]:
    """Of weights and as loaded, with ``count`` of the rows, from all over."""
    chosen = torch.randperm(len(layer.rows), generator=torch.Generator().manual_seed(0))[:count]
    few = Layer(layer.weight, layer.rows[chosen], layer.held_out, layer.mean, layer.sqmean, layer.amax)
    return judge(few, feedback(centered=True, rows=ROWS)(few))


def made_up(width: int, picture: int | None) -> Layer:
    generator = torch.Generator().manual_seed(0)
    count = int(max(RATIOS) * width)
    seen, held_out = (correlated(n, width, seed) for n, seed in ((count, 1), (ROWS, 2)))
    if picture:  # a share of each row is that of its picture
        seen, held_out = (alike(rows, picture, seed) for rows, seed in ((seen, 3), (held_out, 4)))
    weight = heavy_tailed(OUTPUTS, width, generator).float()
    mean, sqmean = seen.mean(0), seen.square().mean(0)
    return Layer(weight, seen, held_out, mean, sqmean, float(seen.abs().max()))


def alike(rows: torch.Tensor, picture: int, seed: int) -> torch.Tensor:
    common = correlated(-(-len(rows) // picture), rows.shape[1], seed).repeat_interleave(picture, 0)[: len(rows)]
    return (rows + common) / 2**0.5


if __name__ == "__main__":
    main()
