"""What a finished file, ours or a peer's, cost in quality: its layers against their source."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..formats import SOURCE
from ..models.folding import Merge, merged
from ..models.source import Source
from ..planning import folds
from ..progress import Progress
from ..reports.report import LayerReport, Report
from ..rounding.judge import Judge, as_loaded
from .finished import QuantizedFile, layer_error


def compare(
    source: Source,
    path: str | os.PathLike[str],
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    lora: Path | None = None,
    merge: Merge | None = None,
) -> Report:
    """Per-layer error of a finished file, ours or a peer's, against its source, worst first.

    What was folded into the file is folded into the source and the calibration too, give both as they were.

    With a calibration also the error of outputs on its sampled rows: of the weights (and the bias) alone under
    ``output_errors["file"]``, and as the loader runs the layer. A calibration of other seeds and prompts than those
    the file was made with makes it a held-out measurement. The worst is then the worst output. A split file is measured
    with its LoRA, beside it or at ``lora``. merge: what was baked into the file before all else.
    """
    layers = []
    with QuantizedFile(path, lora) as quantized:
        pairs, folded = layer_pairs(source, quantized), quantized.folds()
        merge = folds.merge(source, folded, merge or {})
        calibration = calibration and folds.seen(source, folded, calibration)
        for i, (name, other) in enumerate(pairs):
            if progress:
                progress(i, len(pairs), f"compare {name}")
            weight = merged(source.load(name), f"{name}.weight", merge)
            report = LayerReport(
                name,
                quantized.format(other),
                layer_error(weight, quantized, other),
                source.shape(name),
                quantized.nbytes(other),
            )
            seen = calibration.layers.get(source.short(name)) if calibration else None
            if calibration and seen and seen.group in calibration.rows and report.format != SOURCE:
                rows = calibration.rows[seen.group].rows
                bias = source.checkpoint.read(f"{name}.bias") if f"{name}.bias" in source.checkpoint.entries else None
                bias = None if bias is None else merged(bias, f"{name}.bias", merge)
                report = _with_output_errors(report, bias, weight, rows, quantized, other)
            layers.append(report)
        after, beside = quantized.checkpoint.nbytes(), quantized.branches
    layers.sort(key=lambda layer: -layer.output_errors.get("file", 0.0 if calibration else layer.error))
    before = source.checkpoint.nbytes()
    names = str(source.path), str(path), source.architecture.name, ""
    branch = (str(beside.path), beside.nbytes()) if beside else ("", 0)
    return Report(*names, before, after, layers=layers, lora=branch[0], lora_bytes=branch[1])


def _with_output_errors(
    report: LayerReport,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    rows: torch.Tensor,
    quantized: QuantizedFile,
    layer: str,
) -> LayerReport:
    """The report with what the layer's outputs lose on ``rows`` [n, in]; bias: the source's [out]."""
    branch = quantized.branch(layer, tuple(weight.shape))
    rest = weight if branch is None else weight.float() - branch.product()
    judge = Judge(rest, rows, limit=len(rows), whole=weight)
    decoded = torch.cat(list(quantized.rows(layer, tuple(weight.shape))))
    shift = quantized.bias(layer)
    if shift is not None and bias is not None:
        shift = shift - bias.float()
    smooth = quantized.smoothing(layer)
    fed = judge.rows if smooth is None else judge.rows * smooth
    fmt, entry = quantized.codec(layer), quantized.runs_as(layer)
    loader = None
    if fmt is not None:  # else a format of a peer's whose activations we cannot imitate
        fed = as_loaded(fmt, fed, entry)
        loader = judge.error(decoded, shift, fed if smooth is None else fed / smooth)
    return replace(report, output_errors={"file": judge.error(decoded, shift)}, loader_error=loader)


def layer_pairs(source: Source, quantized: QuantizedFile) -> list[tuple[str, str]]:
    """(layer in the source, layer in the file): the two may carry different prefixes."""
    pairs = []
    for name in source.layers:
        other = quantized.prefix + source.short(name) if name.startswith(source.prefix) else name
        if other + ".weight" not in quantized.checkpoint.entries:
            raise CalibQuantError(
                f"{quantized.checkpoint.path}: has no layer {other}: it is not made from {source.path}"
            )
        pairs.append((name, other))
    return pairs
