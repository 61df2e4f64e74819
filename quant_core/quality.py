"""What a finished file cost in quality: the independent check of our own, and comparisons of anybody's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from . import smoothing
from .architectures import split_prefix
from .calibration import Calibration
from .checkpoint import Checkpoint
from .errors import CalibQuantError
from .formats import FORMATS, SOURCE
from .markers import FP8, declared_configs
from .modelfile import NATIVE
from .pack import squared_distance, squared_norm
from .plan import LayerPlan
from .progress import Progress
from .report import LayerReport, Report
from .rounding import Judge, as_loaded
from .source import Source, apply_scale

ROWS = 1024  # rows decoded at once; a multiple of the 128-row tiles in which block scales are swizzled
TOLERANCE = 1e-3  # of a relative error: the two paths differ by float32 summation only


class QuantizedFile:
    """A finished file, ours or a peer's, whose layers can be decoded by comfy-kitchen's arithmetic."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint = Checkpoint(path)
        self.prefix = split_prefix(self.checkpoint.entries)
        self.configs = declared_configs(self.checkpoint, self.prefix)

    def __enter__(self) -> QuantizedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    def format(self, layer: str) -> str:
        """The declared format, "float8_e4m3fn_unscaled" for bare FP8, else "bf16"."""
        dtype = self.checkpoint.entries[layer + ".weight"].dtype
        declared = self.configs.get(layer, {}).get("format")
        return declared or ("float8_e4m3fn_unscaled" if dtype in FP8 else SOURCE)

    def nbytes(self, layer: str) -> int:
        """Bytes of the layer's weight and of everything that belongs to its quantization."""
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale", smoothing.KEY, "comfy_quant")
        entries = self.checkpoint.entries
        return sum(entries[f"{layer}.{n}"].nbytes for n in names if f"{layer}.{n}" in entries)

    def rows(self, layer: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """float32 parts of the ``[out, ...]`` that acts on unscaled inputs, at most ``ROWS`` rows each."""
        fmt = self.format(layer)
        decode = FORMATS[fmt].decode if fmt in FORMATS else None
        tensors = self._tensors(layer, fmt)
        if decode and len(shape) == 2 and "weight_scale" in tensors and tensors["weight_scale"].numel() == 1:
            tensors["weight_scale"] = tensors["weight_scale"].reshape(())
        smooth = self.smoothing(layer)
        for start in range(0, shape[0], ROWS):
            part = {n: t[start : start + ROWS] if t.dim() > 1 else t for n, t in tensors.items()}
            size = (min(ROWS, shape[0] - start), *shape[1:])
            weight = decode(part, size) if decode else part["weight"].float()
            yield weight if smooth is None else weight * smooth

    def bias(self, layer: str) -> torch.Tensor | None:
        """float32 [out], None where there is none."""
        return self._optional(f"{layer}.bias")

    def runs_as(self, layer: str) -> LayerPlan:
        """What the loader will do with the layer's inputs, as a plan's entry."""
        scale = self._optional(f"{layer}.input_scale")
        full_precision = bool(self.configs.get(layer, {}).get("full_precision_matrix_mult"))
        return LayerPlan(self.format(layer), "", full_precision, None if scale is None else float(scale))

    def smoothing(self, layer: str) -> torch.Tensor | None:
        """``pre_quant_scale`` as float32 [in], None where there is none."""
        return self._optional(f"{layer}.{smoothing.KEY}")

    def _optional(self, key: str) -> torch.Tensor | None:
        return self.checkpoint.read(key).float() if key in self.checkpoint.entries else None

    def _tensors(self, layer: str, fmt: str) -> dict[str, torch.Tensor]:
        path, read = self.checkpoint.path, self.checkpoint.read
        if fmt == "float8_e5m2":
            scaled = apply_scale(path, layer, read(layer + ".weight"), read(layer + NATIVE.scale))
            return {"weight": scaled}
        if fmt not in FORMATS:
            if fmt != SOURCE:
                raise CalibQuantError(f"{path}: layer {layer}: format {fmt} cannot be decoded here")
            return {"weight": read(layer + ".weight")}
        config = self.configs.get(layer, {})
        if config.get("convrot") or config.get("params", {}).get("convrot"):
            raise CalibQuantError(f"{path}: layer {layer}: rotated INT8 (convrot) cannot be compared here")
        names = ("weight", "weight_scale", "weight_scale_2")
        return {n: read(f"{layer}.{n}") for n in names if f"{layer}.{n}" in self.checkpoint.entries}


def layer_error(source: torch.Tensor, quantized: QuantizedFile, layer: str) -> float:
    """||W - Q||^2 / ||W||^2 of one layer; 0 for an all-zero weight that stayed zero."""
    error = energy = 0.0
    for start, part in zip(range(0, source.shape[0], ROWS), quantized.rows(layer, tuple(source.shape)), strict=True):
        weight = source[start : start + ROWS].float()
        if part.shape != weight.shape:
            raise CalibQuantError(
                f"{quantized.checkpoint.path}: layer {layer} has shape {tuple(part.shape)} where the source has "
                f"{tuple(weight.shape)}: the two files are of different models"
            )
        error += squared_distance(weight, part)
        energy += squared_norm(weight)
    return error / energy if energy else error


def verify(
    source: Source,
    report: Report,
    merge: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Re-read the finished file by the loader's arithmetic; CalibQuantError if any layer's error is not as reported."""
    with QuantizedFile(report.output) as quantized:
        for i, layer in enumerate(report.layers):
            if progress:
                progress(i, len(report.layers), f"verify {layer.name}")
            weight = source.load(layer.name)
            if merge and layer.name + ".weight" in merge:
                weight = merge[layer.name + ".weight"](weight.float())
            if layer.format == SOURCE:  # kept layers are in the file to the bit, after dequantization and merge
                weight = weight.to(source.kept_dtype(layer.name))
            found = layer_error(weight, quantized, layer.name)
            if quantized.format(layer.name) != layer.format and layer.format != SOURCE:
                raise CalibQuantError(f"{report.output}: layer {layer.name} is not {layer.format} as reported")
            _verify_bias(source, report, layer, quantized, merge or {})
            if not abs(found - layer.error) <= TOLERANCE * layer.error:  # written so that NaN and Inf are caught
                raise CalibQuantError(
                    f"{report.output}: layer {layer.name} has relative error {found:.4e}, reported was "
                    f"{layer.error:.4e}: do not use this file, and report a bug"
                )


def _verify_bias(
    source: Source,
    report: Report,
    layer: LayerReport,
    quantized: QuantizedFile,
    merge: dict[str, Callable[[torch.Tensor], torch.Tensor]],
) -> None:
    key = f"{layer.name}.bias"
    if key not in source.checkpoint.entries:
        return
    before, after = source.checkpoint.read(key), quantized.checkpoint.read(key)
    if key in merge:
        before = merge[key](before.float()).to(before.dtype)
    if not layer.bias_change:  # to the bit, so that even a NaN that the source has may stay in a kept layer
        same = torch.equal(before.view(torch.uint8), after.view(torch.uint8))
        change = 0.0 if same else float("nan")
    else:
        change = (after.float() - before.float()).norm().item()
    if not abs(change - layer.bias_change) <= TOLERANCE * layer.bias_change:
        raise CalibQuantError(
            f"{report.output}: the bias of layer {layer.name} differs by {change:.4e} from the source's, reported was "
            f"{layer.bias_change:.4e}: do not use this file, and report a bug"
        )


def compare(
    source: Source,
    path: str | os.PathLike[str],
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Per-layer error of a finished file, ours or a peer's, against its source, worst first.

    With a calibration also the error of outputs on its sampled rows: of the weights (and the bias) alone under
    ``output_errors["file"]``, and as the loader runs the layer. A calibration of other seeds and prompts than those
    the file was made with makes it a held-out measurement. The worst is then the worst output.
    """
    layers = []
    with QuantizedFile(path) as quantized:
        pairs = _pairs(source, quantized)
        for i, (name, other) in enumerate(pairs):
            if progress:
                progress(i, len(pairs), f"compare {name}")
            weight = source.load(name)
            report = LayerReport(
                name,
                quantized.format(other),
                layer_error(weight, quantized, other),
                source.shape(name),
                quantized.nbytes(other),
            )
            seen = calibration.layers.get(name.removeprefix(source.prefix)) if calibration else None
            if calibration and seen and seen.group in calibration.rows and report.format != SOURCE:
                rows = calibration.rows[seen.group].rows
                report = _with_output_errors(report, source, weight, rows, quantized, other)
            layers.append(report)
        after = quantized.checkpoint.nbytes()
    layers.sort(key=lambda layer: -layer.output_errors.get("file", 0.0 if calibration else layer.error))
    before = source.checkpoint.nbytes()
    return Report(str(source.path), str(path), source.architecture.name, "", before, after, layers=layers)


def _with_output_errors(
    report: LayerReport,
    source: Source,
    weight: torch.Tensor,
    rows: torch.Tensor,
    quantized: QuantizedFile,
    layer: str,
) -> LayerReport:
    """The report with what the layer's outputs lose on ``rows`` [n, in]."""
    judge = Judge(weight, rows, limit=len(rows))
    decoded = torch.cat(list(quantized.rows(layer, tuple(weight.shape))))
    shift, key = quantized.bias(layer), f"{report.name}.bias"
    if shift is not None and key in source.checkpoint.entries:
        shift = shift - source.checkpoint.read(key).float()
    smooth = quantized.smoothing(layer)
    fed = judge.rows if smooth is None else judge.rows * smooth
    fmt, entry = FORMATS.get(report.format), quantized.runs_as(layer)
    loader = None
    if fmt is not None:  # else a format of a peer's whose activations we cannot imitate
        fed = as_loaded(fmt, fed, entry)
        loader = judge.error(decoded, shift, fed if smooth is None else fed / smooth)
    return replace(report, output_errors={"file": judge.error(decoded, shift)}, loader_error=loader)


def _pairs(source: Source, quantized: QuantizedFile) -> list[tuple[str, str]]:
    """(layer in the source, layer in the file): the two may carry different prefixes."""
    pairs = []
    for name in source.layers:
        other = quantized.prefix + name.removeprefix(source.prefix)
        if other + ".weight" not in quantized.checkpoint.entries:
            raise CalibQuantError(
                f"{quantized.checkpoint.path}: has no layer {other}: it is not made from {source.path}"
            )
        pairs.append((name, other))
    return pairs
