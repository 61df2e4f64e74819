"""Quantize a source by a plan: every layer rounded, every other tensor copied, one file written."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..files.checkpoint import Checkpoint, Hasher, Writer, check_target
from ..files.disk import stat_of
from ..formats import SOURCE, FileTensors
from ..models import folding
from ..models.folding import Merge
from ..models.source import Source
from ..planning import folds
from ..planning.layout import encode_config, layer_config, output_metadata, output_specs, predicted_size
from ..planning.plan import Plan
from ..planning.targets import core_needed
from ..progress import Progress
from ..reports.report import LayerReport, Report
from ..rounding.choice import WITH_BIAS, Rounder
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import pick_device, refuse_damaged
from ..rounding.parallel import threads
from . import verification
from .pipeline import Behind, ahead


def quantize(
    source: Source,
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    device: str = "auto",
    merge: Merge | None = None,
    merged: str = "",
    calibration: Calibration | None = None,
    rounding: str = "nearest",
    verify: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write ``source`` quantized by ``plan`` to ``output`` (``*.safetensors``, loadable by stock ComfyUI).

    rounding: nearest, search, gptq, or auto, the best that the inputs allow; layers planned for HSWQ get its own under
    auto alone. calibration: what all but nearest weigh errors by; None: the one that the plan was made with, if it is
    still at hand.
    merge bakes patches into weights in float32 before anything else; merged is their SHA-256 for the header. What the
    plan folds comes after it, and the calibration becomes that of the folded model: give it as it was collected.
    verify: re-read the finished file (``verification``) before it gets its name; a file that fails never has it.
    progress may raise: then nothing stays behind. Peak memory is a few times the largest tensor.
    Raises CalibQuantError for a NaN/Inf weight, a plan of another model, a full disk, an existing target.
    """
    started = time.perf_counter()
    output = Path(output)
    refuse_itself(source.checkpoint, output)
    where, merge = pick_device(device), merge or {}
    if calibration is None and plan.seen is not None:
        calibration = plan.seen()
    specs = output_specs(source, plan)
    _check_merge(source, merge)
    merge = folds.merge(source, plan.folds, merge)
    calibration = calibration and folds.seen(source, plan.folds, calibration)
    rounder = Rounder(where, calibration, rounding, source.prefix)
    metadata = output_metadata(source, plan, merged=merged)
    check_target(output, predicted_size(source, plan), overwrite)
    hasher = Hasher(source.checkpoint.files)
    steps = _Steps(source, plan, verify, progress)
    try:
        with Writer(output, specs, metadata, overwrite) as writer:
            layers = _write_tensors(source, plan, writer, rounder, merge, steps.write)
            used = {layer.rounding.removesuffix(WITH_BIAS) for layer in layers}
            writer.set_metadata(output_metadata(source, plan, hasher.result(), merged, used))
            names = str(source.path), str(output), source.architecture.name, plan.recipe
            runs = None if calibration is None else len(set(calibration.info.get("runs", [])))
            sizes = source.checkpoint.nbytes(), writer.size
            report = Report(*names, *sizes, layers=layers, needs_comfyui=core_needed(plan), runs=runs, folds=plan.folds)
            if verify:
                verification.verify(source, report, merge, steps.verify, writer.finished())
    finally:
        hasher.cancel()
    return replace(report, seconds=time.perf_counter() - started)


class _Steps:
    """One count of progress over the tensors written and the layers verified after them."""

    def __init__(self, source: Source, plan: Plan, verify: bool, progress: Progress | None) -> None:
        self._progress, self._written = progress, len(source.checkpoint.entries) - len(source.consumed)
        self._total = self._written + len(plan.layers) * verify

    def write(self, done: int, _: int, text: str) -> None:
        if self._progress:
            self._progress(done, self._total, text)

    def verify(self, done: int, _: int, text: str) -> None:
        self.write(self._written + done, 0, text)


def _write_tensors(
    source: Source, plan: Plan, writer: Writer, rounder: Rounder, merge: Merge, progress: Progress
) -> list[LayerReport]:
    keys = [key for key in source.checkpoint.entries if key not in source.consumed]
    written = {_bias_key(layer) for layer, entry in plan.layers.items() if entry.format != SOURCE}

    def read(key: str) -> torch.Tensor | None:
        """What is more than a copy."""
        layer = key.removesuffix(".weight")
        if source.is_scaled(key) or (key != layer and layer in plan.layers):
            return source.load(layer)
        return source.checkpoint.read(key) if key in merge and key not in written else None

    reports = []
    with threads(1) as reader, threads(1) as writing:
        put = Behind(writing)
        for i, (key, coming) in enumerate(ahead(reader, read, keys)):
            progress(i, len(keys), key)
            if key in written:  # with its layer
                continue
            layer, tensor = key.removesuffix(".weight"), coming.result()
            entry = plan.layers.get(layer) if key.endswith(".weight") else None
            if tensor is None:
                put(writer.write_chunks, key, source.checkpoint.chunks(key))
            elif entry and entry.format != SOURCE:
                tensors, report = _round(source, layer, entry, folding.merged(tensor, key, merge), rounder, merge)
                put(_write_all, writer, tensors)
                reports.append(report)
            else:
                kept = source.kept_dtype(layer) if entry or source.is_scaled(key) else tensor.dtype
                tensor = folding.merged(tensor, key, merge).to(kept)
                if entry:
                    refuse_damaged(tensor, f"{source.path}: layer {layer}")
                    reports.append(LayerReport(layer, SOURCE, 0.0, source.shape(layer), tensor.nbytes, entry.reason))
                put(writer.write, key, tensor)
        put.wait()
    progress(len(keys), len(keys), "done")
    return reports


def _write_all(writer: Writer, tensors: FileTensors) -> None:
    for key, tensor in tensors.items():
        writer.write(key, tensor)


def _round(
    source: Source, layer: str, entry: LayerPlan, weight: torch.Tensor, rounder: Rounder, merge: Merge
) -> tuple[FileTensors, LayerReport]:
    """The tensors of a layer under their keys, its bias among them."""
    bias = _bias(source, layer, merge)
    done = rounder.round(layer, entry, weight, f"{source.path}: layer {layer}", bias)
    packed, tensors = done.packed, {**done.packed.tensors}
    if entry.input_scale is not None:
        tensors["input_scale"] = torch.tensor(entry.input_scale, dtype=torch.float32)
    tensors |= done.extra
    config = layer_config(entry, source.shape(layer))
    if config is not None:
        tensors["comfy_quant"] = encode_config(config)
    nbytes = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
    error = packed.error / packed.energy if packed.energy else packed.error
    report = LayerReport(
        layer,
        entry.format,
        error,
        source.shape(layer),
        nbytes,
        entry.reason,
        done.gains,
        done.rounding,
        done.note,
        done.output_errors,
        done.loader_error,
        0.0 if done.bias is None or bias is None else (done.bias.float() - bias.float()).norm().item(),
        done.held_out,
    )
    stored = {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if bias is not None:
        stored[_bias_key(layer)] = bias if done.bias is None else done.bias
    return stored, report


def _bias_key(layer: str) -> str:
    return f"{layer}.bias"


def _bias(source: Source, layer: str, merge: Merge) -> torch.Tensor | None:
    """The layer's bias [out] with its patches, in the dtype it is kept in; None where there is none."""
    key = _bias_key(layer)
    if key not in source.checkpoint.entries:
        return None
    bias = source.checkpoint.read(key)
    patched = folding.merged(bias, key, merge).to(bias.dtype)
    refuse_damaged(patched, f"{source.path}: layer {layer}", "bias")
    return patched


def _check_merge(source: Source, merge: Merge) -> None:
    for key in merge:
        if key not in source.checkpoint.entries:
            raise CalibQuantError(
                f"{source.path}: has no tensor {key}, which the linked MODEL patches: link one made from this file"
            )


def refuse_itself(checkpoint: Checkpoint, output: Path) -> None:
    there = stat_of(output)
    found = [stat_of(file) for file in checkpoint.files] if there else []
    if any(file and os.path.samestat(there, file) for file in found):
        raise CalibQuantError(f"{output}: is the source itself: give another output name")
