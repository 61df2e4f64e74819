"""What each ingredient of the rounding is worth, and what was left out: held-out output error on the demo model.

    python benchmarks/gptq_variants.py [--out DIR]

Calibrated on blends of digits, judged on the digits (see quality.py, which makes both in --out). Every number is the
mean over the 60 block Linears of ||X W^T - X' Q^T||^2 / ||X W^T||^2: "weights" with exact inputs X' = X, "loaded" with
inputs in FP4 (W4A4). A bias takes up the mean error where it says so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from quality import MODEL, ROWS, calibrate_demo  # which makes quant_core importable

from quant_core.evidence import calibration
from quant_core.formats import FORMATS
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.rounding import gptq, pack

CPU = torch.device("cpu")
NVFP4 = FORMATS["nvfp4"]


@dataclass(frozen=True)
class Layer:
    weight: torch.Tensor  # float32 [out, in]
    rows: torch.Tensor  # calibrated on, float32 [n, in]
    held_out: torch.Tensor
    mean: torch.Tensor  # E[x] and E[x^2] of the whole calibration, float32 [in]
    sqmean: torch.Tensor
    amax: float

    def fp4(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs as a W4A4 kernel sees them, with the calibrated scale."""
        return NVFP4.decode(NVFP4.kernel(rows, torch.tensor(recipes.HEADROOM * self.amax / 2688)), tuple(rows.shape))


Decoded = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # Q, or Q and what the bias changes by
Variant = Callable[[Layer], Decoded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where quality.py keeps its calibrations")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        layers = list(load(*calibrate_demo(options.out or Path(temporary))))
    print("| | weights | × nearest | loaded |\n|---|---|---|---|")
    nearest: dict[str, float] = {}
    for (fmt, name), variant in VARIANTS.items():
        errors = [judge(layer, variant(layer)) for layer in layers]
        weights, loaded = (fmean(part) for part in zip(*errors, strict=True))
        base = nearest.setdefault(fmt, weights)
        shown = f"{loaded:.2e}" if fmt == "NVFP4" else ""
        print(f"| {fmt} {name} | {weights:.2e} | {weights / base:.3f} | {shown} |", flush=True)


def load(seen: Path, held_out: Path) -> Iterator[Layer]:
    a, b = calibration.load(seen), calibration.load(held_out)
    with Source(MODEL) as source:
        for name in (name for name in source.layers if name.startswith("blocks.")):
            stats = a.layers[name]
            rows = a.rows_of(name).float(), b.rows_of(name).float()
            weight = source.load(name).float()
            yield Layer(weight, *rows, stats.input_mean, stats.input_sqmean, float(stats.input_amax.max()))


def judge(layer: Layer, made: Decoded) -> tuple[float, float]:
    decoded, shift = made if isinstance(made, tuple) else (made, torch.zeros(1))
    wanted = layer.held_out @ layer.weight.T
    return tuple(
        ((rows @ decoded.T + shift - wanted).square().sum() / wanted.square().sum()).item()
        for rows in (layer.held_out, layer.fp4(layer.held_out))
    )


# --- variants ----------------------------------------------------------------------------------------------------


def nearest(fmt: str) -> Variant:
    return lambda x: decode(fmt, x, pack.nearest(x.weight, FORMATS[fmt], CPU, "w"))


def search(fmt: str, weighted: bool = True) -> Variant:
    return lambda x: decode(fmt, x, pack.searched(x.weight, FORMATS[fmt], CPU, "w", x.sqmean if weighted else None))


def decode(fmt: str, layer: Layer, packed: pack.Packed) -> torch.Tensor:
    return FORMATS[fmt].decode(packed.tensors, tuple(layer.weight.shape))


def feedback(
    fmt: str = "nvfp4",
    passes: int = gptq.PASSES,
    scale: float = 1.0,
    centered: bool = False,
    least: float = gptq.LEAST_DAMPING,
    rows: int = ROWS,
) -> Variant:
    """GPTQ. scale: of the tensor scale; centered: H is the covariance and the bias takes up the mean error."""

    def variant(x: Layer) -> Decoded:
        with constants(PASSES=passes, LEAST_DAMPING=least):
            inputs = gptq.factor(x.rows[:: ROWS // rows], x.mean if centered else None)
            assert isinstance(inputs, gptq.Factor), inputs
            own = FORMATS[fmt].tensor(x.weight, x.weight.abs().amax())
            codes = gptq.quantize(x.weight, FORMATS[fmt], None if own is None else own * scale, inputs)
        decoded = FORMATS[fmt].dequantize(codes, tuple(x.weight.shape))
        return (decoded, (x.weight - decoded) @ x.mean) if centered else decoded

    return variant


def quantized_inputs(ridge: float | None) -> Variant:
    """GPTQ with H of inputs in FP4; with ``ridge`` on the weights that suit those inputs best (the cross term)."""

    def variant(x: Layer) -> Decoded:
        fed = x.fp4(x.rows)
        inputs = gptq.factor(fed)
        assert isinstance(inputs, gptq.Factor), inputs
        target = x.weight
        if ridge is not None:
            hessian = fed.T @ fed / len(fed)
            hessian.diagonal().add_(ridge * hessian.diagonal().mean())
            cross = (x.rows - fed).T @ fed / len(fed)
            target = x.weight + torch.linalg.solve(hessian, (x.weight @ cross).T).T
        codes = gptq.quantize(target, NVFP4, NVFP4.tensor(target, target.abs().amax()), inputs)
        return NVFP4.dequantize(codes, tuple(x.weight.shape))

    return variant


@contextmanager
def constants(**values: float) -> Iterator[None]:
    before = {name: getattr(gptq, name) for name in values}
    vars(gptq).update(values)
    try:
        yield
    finally:
        vars(gptq).update(before)


VARIANTS: dict[tuple[str, str], Variant] = {
    ("NVFP4", "nearest"): nearest("nvfp4"),
    ("NVFP4", "search, plain"): search("nvfp4", weighted=False),
    ("NVFP4", "search, weighted by E[x²]"): search("nvfp4"),
    ("NVFP4", "GPTQ with searched scales"): feedback(passes=0),
    ("NVFP4", "+ 1 pass of refinement"): feedback(passes=1),
    ("NVFP4", "+ 2 passes (what we do without a bias)"): feedback(),
    ("NVFP4", "+ 4 passes"): feedback(passes=4),
    ("NVFP4", "2 passes, covariance and bias (what we do)"): feedback(centered=True),
    ("NVFP4", "the same, from 64 rows of 2048"): feedback(centered=True, rows=64),
    ("NVFP4", "the same, from 256 rows"): feedback(centered=True, rows=256),
    ("NVFP4", "the same, least damping .003"): feedback(centered=True, least=0.003),
    ("NVFP4", "the same, least damping .03"): feedback(centered=True, least=0.03),
    ("NVFP4", "the same, tensor scale × ½"): feedback(centered=True, scale=0.5),
    ("NVFP4", "the same, tensor scale × 1½"): feedback(centered=True, scale=1.5),
    ("NVFP4", "the same, tensor scale × 2"): feedback(centered=True, scale=2),
    ("NVFP4", "exact weights"): lambda x: x.weight,
    ("NVFP4", "2 passes, H of FP4 inputs"): quantized_inputs(None),
    ("NVFP4", "the same, cross term, ridge .03"): quantized_inputs(0.03),
    ("NVFP4", "the same, cross term, ridge .1"): quantized_inputs(0.1),
    ("NVFP4", "the same, cross term, ridge .3"): quantized_inputs(0.3),
    ("MXFP8", "nearest"): nearest("mxfp8"),
    ("MXFP8", "search"): search("mxfp8"),
    ("MXFP8", "GPTQ, 2 passes"): feedback("mxfp8"),
    ("FP8", "nearest"): nearest("float8_e4m3fn"),
    ("FP8", "search"): search("float8_e4m3fn"),
    ("FP8", "GPTQ, 2 passes"): feedback("float8_e4m3fn"),
    ("INT8", "nearest"): nearest("int8_tensorwise"),
    ("INT8", "search"): search("int8_tensorwise"),
    ("INT8", "GPTQ, 2 passes"): feedback("int8_tensorwise"),
}


if __name__ == "__main__":
    main()
