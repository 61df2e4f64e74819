"""The independent check of a file of ours: what it holds is what was reported."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CalibQuantError
from ..formats import SOURCE
from ..models.folding import Merge, merged
from ..models.source import Source
from ..progress import Progress
from ..reports.report import LayerReport, Report
from .finished import QuantizedFile, layer_error

TOLERANCE = 1e-3  # of a relative error: the two paths differ by float32 summation only


def verify(
    source: Source,
    report: Report,
    merge: Merge | None = None,
    progress: Progress | None = None,
    path: Path | None = None,
    lora: Path | None = None,
) -> None:
    """Re-read the finished file by the loader's arithmetic; CalibQuantError if any layer's error is not as reported.

    path, lora: where the file, and a split's LoRA, lie as long as they have not got their names.
    """
    with QuantizedFile(path or report.output, lora or (Path(report.lora) if report.lora else None)) as quantized:
        for i, layer in enumerate(report.layers):
            if progress:
                progress(i, len(report.layers), f"verify {layer.name}")
            weight = merged(source.load(layer.name), f"{layer.name}.weight", merge or {})
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
        _verify_others(source, report, quantized, merge or {})
        _verify_halved(source, report, quantized)


def _verify_others(source: Source, report: Report, quantized: QuantizedFile, merge: Merge) -> None:
    """What is no layer's and was changed all the same, such as a norm that was folded into."""
    checked = {f"{layer.name}.{end}" for layer in report.layers for end in ("weight", "bias")}
    for key in sorted(set(merge) - checked):
        before = source.checkpoint.read(key)
        if source.is_scaled(key):  # a convolution
            before = source.load(key.removesuffix(".weight")).to(source.kept_dtype(key.removesuffix(".weight")))
        wanted = merge[key](before.float()).to(before.dtype), quantized.checkpoint.read(key)
        if not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in wanted)):
            raise CalibQuantError(f"{report.output}: {key} is not what it was to be: do not use it, and report a bug")


def _verify_halved(source: Source, report: Report, quantized: QuantizedFile) -> None:
    layers = {f"{layer.name}.{end}" for layer in report.layers for end in ("weight", "bias")}
    for key in filter(source.halves, source.checkpoint.entries.keys() - layers):
        if not torch.equal(source.checkpoint.read(key).half(), quantized.checkpoint.read(key)):
            raise CalibQuantError(f"{report.output}: {key} is not what it was to be: do not use it, and report a bug")


def _verify_bias(
    source: Source,
    report: Report,
    layer: LayerReport,
    quantized: QuantizedFile,
    merge: Merge,
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
