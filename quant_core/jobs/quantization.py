"""Quantize a source by a plan: every layer rounded, every other tensor copied, one file written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..files.checkpoint import HASH_PLACEHOLDER, Checkpoint, Hasher, Writer, check_target, file_size
from ..files.disk import remove_abandoned, stat_of
from ..formats import SOURCE
from ..models import folding
from ..models.folding import Merge
from ..models.source import Source
from ..models.splitfile import branch_path
from ..planning import folds
from ..planning.layout import (
    branch_metadata,
    branch_specs,
    output_metadata,
    output_specs,
    predicted_size,
)
from ..planning.plan import Plan
from ..planning.targets import core_needed, words
from ..progress import Progress
from ..reports.report import LayerReport, Report
from ..rounding.choice import WITH_BIAS, Rounder
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import pick_device, refuse_damaged
from ..rounding.parallel import threads
from . import reuse, verification
from .layer import bias_key, rounded
from .pipeline import Behind, ahead
from .remote import Cluster, Layers


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
    lora_output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write ``source`` quantized by ``plan`` to ``output`` (``*.safetensors``, loadable by stock ComfyUI).

    rounding: nearest, search, gptq, or auto, the best that the inputs allow; layers planned for HSWQ get its own under
    auto alone. calibration: what all but nearest weigh errors by; None: the one that the plan was made with, if it is
    still at hand.
    merge bakes patches into weights in float32 before anything else; merged is their SHA-256 for the header. What the
    plan folds comes after it, and the calibration becomes that of the folded model: give it as it was collected.
    verify: re-read the finished file (``verification``) before it gets its name; a file that fails never has it.
    lora_output: where the LoRA of a split plan goes (default: beside the output, which must be named *.split).
    What a killed run of the same job had rounded is kept, and the file the same to the byte; fresh: begin anew.
    cluster: rounds the layers on its machines, to the same bytes; read and written is here.
    progress may raise: then nothing stays behind. Peak memory is a few times the largest tensor.
    Raises CalibQuantError for a NaN/Inf weight, a plan of another model, a full disk, an existing target.
    """
    started = time.perf_counter()
    output = Path(output)
    refuse_itself(source.checkpoint, output)
    branches = _branch_target(source, plan, output, lora_output)
    where, merge = cluster.device(device) if cluster else pick_device(device), merge or {}
    if calibration is None and plan.seen is not None:
        calibration = plan.seen()
    _check_merge(source, merge)
    job = reuse.job(source, plan, merged, calibration, rounding, verify)
    going_on = reuse.unfinished(source, job, where.type) if merged or not merge else ""
    merge = folds.merge(source, plan.folds, merge)
    calibration = calibration and folds.seen(source, plan.folds, calibration)
    rounder = Rounder(where, calibration, rounding, source.short)
    for target in (output, branches):
        if fresh and target:
            remove_abandoned(target)
    check_target(output, predicted_size(source, plan), overwrite)
    hasher = Hasher(source.checkpoint.files)
    steps = _Steps(source, plan, verify, progress)
    try:
        with ExitStack() as files:  # the LoRA gets its name first: no main file is ever without one
            writer, beside = _open(files, source, plan, output, branches, merged, overwrite, going_on)
            kept = cache(lambda layer: _kept(layer, plan.layers.get(layer), writer, beside))
            by: Rounder | Layers = rounder
            if cluster:
                by = files.enter_context(Layers(cluster, source, plan, calibration, rounding, where, merge, kept))
            layers = _write_tensors(source, plan, writer, beside, kept, by, merge, steps.write)
            used = {layer.rounding.removesuffix(WITH_BIAS) for layer in layers}
            branch, unnamed = _finish_branch(source, plan, writer, beside, hasher, merged)
            writer.set_metadata(output_metadata(source, plan, hasher.result(), merged, used, branch, job))
            names = str(source.path), str(output), source.architecture.name, plan.recipe
            runs = None if calibration is None else len(set(calibration.info.get("runs", [])))
            sizes = source.checkpoint.nbytes(), writer.size
            report = Report(*names, *sizes, layers=layers, runs=runs, folds=plan.folds)
            said = [*source.about_parts(), *words(plan, source)]
            report = replace(report, needs_comfyui=core_needed(plan), words=said)
            if beside:
                report = replace(report, lora=str(beside.path), lora_bytes=beside.size)
            if verify:
                verification.verify(source, report, merge, steps.verify, writer.finished(), unnamed)
            if beside and overwrite:  # so that no main file lies beside the LoRA of another
                writer.finished()
                output.unlink(missing_ok=True)
    finally:
        hasher.cancel()
    return replace(report, seconds=time.perf_counter() - started)


def _branch_target(source: Source, plan: Plan, output: Path, lora_output: str | os.PathLike[str] | None) -> Path | None:
    """Where the LoRA of a split plan goes; None for other plans. CalibQuantError for a name that cannot be."""
    if not plan.ranks():
        return None
    target = branch_path(output)
    target = Path(lora_output) if lora_output is not None else target
    refuse_itself(source.checkpoint, target)
    if os.path.abspath(target) == os.path.abspath(output):
        raise CalibQuantError(f"{target}: is the output itself: give its LoRA another name")
    return target


def _open(
    files: ExitStack,
    source: Source,
    plan: Plan,
    output: Path,
    branches: Path | None,
    merged: str,
    overwrite: bool,
    job: str,
) -> tuple[Writer, Writer | None]:
    """The main file and a split's LoRA; both checked before the first is made."""
    name = ("" if branches is None else branches.name, HASH_PLACEHOLDER)
    main = output_specs(source, plan), output_metadata(source, plan, merged=merged, branch=name)
    if branches is None:
        return files.enter_context(Writer(output, *main, overwrite, job)), None
    factors = branch_specs(source, plan), branch_metadata(source, plan, output.name, merged=merged)
    check_target(branches, file_size(*factors), overwrite)
    writer = files.enter_context(Writer(output, *main, overwrite, job))
    return writer, files.enter_context(Writer(branches, *factors, overwrite, job))


def _finish_branch(
    source: Source, plan: Plan, writer: Writer, beside: Writer | None, hasher: Hasher, merged: str
) -> tuple[tuple[str, str], Path | None]:
    """Name and SHA-256 of the complete LoRA for the main file's header, and where it lies as yet."""
    if beside is None:
        return ("", HASH_PLACEHOLDER), None
    beside.set_metadata(branch_metadata(source, plan, writer.path.name, hasher.result(), merged))
    unnamed = beside.finished()
    return (beside.path.name, Hasher([unnamed]).result()), unnamed


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
    source: Source,
    plan: Plan,
    writer: Writer,
    beside: Writer | None,
    kept: Callable[[str], LayerReport | None],
    rounder: Rounder | Layers,
    merge: Merge,
    progress: Progress,
) -> list[LayerReport]:
    keys = [key for key in source.checkpoint.entries if key not in source.consumed]
    rounding = plan.quantized()
    written = {bias_key(layer) for layer in rounding}

    def read(key: str) -> torch.Tensor | LayerReport | None:
        """What is more than a copy; of a layer that a killed run had written, its report."""
        layer = key.removesuffix(".weight")
        if key != layer and (done := kept(layer)):
            return done
        if key != layer and layer in rounding and isinstance(rounder, Layers):  # they read it there
            return None
        if source.is_scaled(key) or (key != layer and layer in plan.layers):
            return source.load(layer)
        if source.halves(key):
            return _halved(source, key)
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
            if isinstance(tensor, LayerReport):
                reports.append(tensor)
            elif entry and layer in rounding:
                if isinstance(rounder, Layers):
                    made = rounder.made(layer)
                else:
                    made = rounded(source, layer, entry, tensor, rounder, merge)
                put(writer.write_part, layer, made.tensors, asdict(made.report))
                if beside and made.branch:
                    put(beside.write_part, layer, made.branch, {})
                reports.append(made.report)
            elif tensor is None:
                put(writer.write_chunks, key, source.checkpoint.chunks(key))
            else:
                dtype = source.kept_dtype(layer) if entry or source.is_scaled(key) else tensor.dtype
                tensor = folding.merged(tensor, key, merge).to(dtype)
                if entry:
                    refuse_damaged(tensor, f"{source.path}: layer {layer}")
                    reports.append(LayerReport(layer, SOURCE, 0.0, source.shape(layer), tensor.nbytes, entry.reason))
                put(writer.write, key, tensor)
        put.wait()
    progress(len(keys), len(keys), "done")
    return reports


def _kept(layer: str, entry: LayerPlan | None, writer: Writer, beside: Writer | None) -> LayerReport | None:
    """The report of a layer that a killed run had written whole, with its branch; None for others."""
    if entry is None or (note := writer.kept(layer)) is None:
        return None
    if entry.rank and (beside is None or beside.kept(layer) is None):
        return None
    return LayerReport(**{**note, "shape": tuple(note["shape"])})


def _halved(source: Source, key: str) -> torch.Tensor:
    """A tensor of float32 as float16; CalibQuantError for values that it cannot hold."""
    tensor = source.checkpoint.read(key)
    half = tensor.half()
    if not half.isfinite().all() and tensor.isfinite().all():
        raise CalibQuantError(f"{source.path}: tensor {key} has values above float16's: leave its part as it is")
    return half


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
