"""A LoRA that puts back part of what quantizing took, for a finished file that also works without it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from .. import __version__
from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration
from ..evidence.statistics import HELD_OUT
from ..files.checkpoint import COPY_CHUNK, HASH_PLACEHOLDER, Hasher, TensorSpec, Writer
from ..files.disk import check_output, reason
from ..files.header import Headers
from ..files.markers import PROVENANCE_KEY, branch_of, provenance
from ..formats import SOURCE
from ..models import lora
from ..models.folding import merged
from ..models.source import Source
from ..planning import folds
from ..progress import Progress
from ..reports.lora_report import BLIND, BYPASS, LayerGain, LoraReport
from ..rounding.factors import RIDGES, Factors, Inputs, fitted, largest_part
from ..rounding.judge import as_loaded
from ..rounding.pack import refuse_damaged
from .comparison import layer_pairs
from .finished import QuantizedFile
from .quantization import refuse_itself


def error_lora(
    source: Source,
    quantized: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rank: int = 32,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraReport:
    """Write a LoRA of at most ``rank`` for each quantized layer of a file made from ``source``.

    With a calibration it is fitted to the layers' outputs as the loader runs them, on rows that the calibration does
    not hold out, and a layer whose error on those held out does not fall gets no factors. Layers without rows get the
    largest part of W - Q. One layer is in memory at a time; factors wait on disk until all ranks are known.
    Raises CalibQuantError for a file not made from this source, or one that is meant to differ from it.
    """
    if rank < 1:
        raise OptionError(f"rank {rank}: must be 1 or more")
    output = Path(output)
    check_output(output, overwrite)
    with Headers(quantized) as header:
        if branch_of(header):
            raise CalibQuantError(
                f"{quantized}: is a split file, whose branch corrects it already: give one without a split"
            )
    with QuantizedFile(quantized) as file, tempfile.TemporaryFile(dir=output.parent) as waiting:
        refuse_itself(source.checkpoint, output)
        refuse_itself(file.checkpoint, output)
        layers = _layers(source, file)
        hasher = Hasher(file.checkpoint.files)
        try:
            fit, gains, specs = _Fit(source, file, rank, calibration), [], []
            for i, (name, other) in enumerate(layers):
                if progress:
                    progress(i, len(layers), f"correct {name}")
                gain, factors = fit.layer(name, other)
                gains.append(gain)
                specs += _put(waiting, output, gain.name, factors) if gain.rank else []
            if not specs:
                raise CalibQuantError(f"{quantized}: a LoRA of rank {rank} corrects no layer: use the file as it is")
            metadata = _metadata(source, file, rank, calibration, gains, hasher.result())
        finally:
            hasher.cancel()
        waiting.seek(0)
        with Writer(output, specs, metadata, overwrite) as writer:
            for spec in specs:
                writer.write_chunks(spec.name, _chunks(waiting, spec.nbytes))
        blind = calibration is None and "gptq" in str((provenance(file.checkpoint) or {}).get("rounding"))
        return LoraReport(str(output), writer.size, rank, gains, fit.runs, BLIND if blind else "")


def _layers(source: Source, file: QuantizedFile) -> list[tuple[str, str]]:
    """(layer in the source, quantized layer in the file); refuses a file whose difference is no rounding error."""
    path, made = file.checkpoint.path, provenance(file.checkpoint) or {}
    if made.get("merged_patches_sha256", HASH_PLACEHOLDER) != HASH_PLACEHOLDER:
        raise CalibQuantError(
            f"{path}: has LoRAs baked in, which a correction towards {source.name} would take out again: bake them "
            "into a 16-bit file first, and give that as the source"
        )
    found = [(name, other) for name, other in layer_pairs(source, file) if file.format(other) != SOURCE]
    unknown = {name for name in file.configs if name.startswith(file.prefix)} - {other for _, other in found}
    if unknown:
        raise CalibQuantError(f"{source.path}: has no layer {min(unknown)}: it is not what {path} is made from")
    if not found:
        raise CalibQuantError(f"{path}: has no quantized layer: give the file that `calibquant quantize` made")
    return found


class _Fit:
    """Factors of one layer after another. runs: held out of those of the layer fitted last."""

    def __init__(self, source: Source, file: QuantizedFile, rank: int, calibration: Calibration | None) -> None:
        folded = file.folds()
        self._merge = folds.merge(source, folded)  # a folded file is corrected towards the folded source
        self._calibration = calibration and folds.seen(source, folded, calibration)
        self._source, self._file, self._rank = source, file, rank
        self._inputs: tuple[str, Inputs | None] = ("", None)  # of the last group: its layers are neighbours
        self.runs = 0

    def layer(self, name: str, other: str) -> tuple[LayerGain, Factors]:
        """What the layer gains, and its factors in the dtype of the file."""
        weight = self._source.load(name)
        refuse_damaged(weight, f"{self._source.path}: layer {name}")
        weight = merged(weight, f"{name}.weight", self._merge).float()
        decoded = torch.cat(list(self._file.rows(other, tuple(weight.shape))))
        rank = max(1, min(self._rank, min(weight.shape) // 2))
        short = self._source.short(name)
        seen = self._calibration.layers.get(short) if self._calibration else None
        if self._calibration and seen and len(self._calibration.rows_of(short)) >= 2 * HELD_OUT:
            before, after, factors = self._by_outputs(name, other, weight, decoded, rank, seen.group)
        else:
            seen = None
            before, after, factors = _by_weights(weight, decoded, rank)
        helps = after < before
        return LayerGain(short, rank if helps else 0, before, after if helps else before, seen is not None), factors

    def _by_outputs(
        self, name: str, other: str, weight: torch.Tensor, decoded: torch.Tensor, rank: int, group: str
    ) -> tuple[float, float, Factors]:
        rows, held_out = self._rows(group)
        missing = [self._missing(name, other, weight, decoded, part) for part in (rows[~held_out], rows[held_out])]
        if self._inputs[0] != group:
            self._inputs = group, Inputs.of(rows[~held_out])
        judged = rows[held_out]
        energy = (judged @ weight.T).square().sum().item() or 1.0
        tried = []
        for ridge in RIDGES:
            up, down = lora.balanced(*fitted(self._inputs[1], missing[0], rank, ridge))
            left = missing[1] - (judged @ down.float().T) @ up.float().T
            tried.append((left.square().sum().item() / energy, (up, down)))
        after, factors = min(tried, key=lambda each: each[0])
        return missing[1].square().sum().item() / energy, after, factors

    def _rows(self, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 rows, and which of them judge."""
        rows, (held_out, self.runs) = self._calibration.rows[group].rows, self._calibration.held_out(group)
        if not self.runs or held_out.all():
            self.runs, held_out = 0, torch.arange(len(rows)) % HELD_OUT == 0
        return rows.float(), held_out

    def _missing(
        self, name: str, other: str, weight: torch.Tensor, decoded: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """What the file's layer, as the loader runs it, lacks of the source's outputs on ``rows``, [n, out]."""
        codec, smooth = self._file.codec(other), self._file.smoothing(other)
        fed = rows if smooth is None else rows * smooth
        fed = as_loaded(codec, fed, self._file.runs_as(other)) if codec else fed
        missing = rows @ weight.T - (fed if smooth is None else fed / smooth) @ decoded.T
        bias, key = self._file.bias(other), f"{name}.bias"
        if bias is not None and key in self._source.checkpoint.entries:
            missing += merged(self._source.checkpoint.read(key), key, self._merge).float() - bias
        return missing


def _by_weights(weight: torch.Tensor, decoded: torch.Tensor, rank: int) -> tuple[float, float, Factors]:
    lost = weight - decoded
    up, down = lora.balanced(*largest_part(lost, rank))
    energy = weight.square().sum().item() or 1.0
    after = (lost - up.float() @ down.float()).square().sum().item()
    return lost.square().sum().item() / energy, after / energy, (up, down)


def _put(waiting: IO[bytes], output: Path, layer: str, factors: Factors) -> list[TensorSpec]:
    """Append the factors' bytes; what they will be in the file."""
    specs = []
    for key, factor in zip(lora.keys(layer), factors, strict=True):
        try:
            waiting.write(memoryview(factor.contiguous().view(-1).view(torch.uint8).numpy()))
        except OSError as e:
            raise CalibQuantError(f"{output}: cannot be written: {reason(e)}") from e
        specs.append(TensorSpec(key, factor.dtype, tuple(factor.shape)))
    return specs


def _chunks(waiting: IO[bytes], nbytes: int) -> Iterator[memoryview]:
    for start in range(0, nbytes, COPY_CHUNK):
        yield memoryview(waiting.read(min(COPY_CHUNK, nbytes - start)))


def _metadata(
    source: Source,
    file: QuantizedFile,
    rank: int,
    calibration: Calibration | None,
    gains: list[LayerGain],
    sha256: str,
) -> Mapping[str, str]:
    about: dict[str, Any] = {
        "tool": f"ComfyUI-CalibQuant {__version__}",
        "kind": "error LoRA",
        "of": {"file": file.checkpoint.path.name, "sha256": sha256},
        "source": source.name,
        "calibration": (calibration.info.get("source_fingerprint") or "") if calibration else "",
        "rank": rank,
        "layers": {gain.name: {k: v for k, v in asdict(gain).items() if k != "name"} for gain in gains},
        "how": BYPASS,
    }
    return {PROVENANCE_KEY: json.dumps(about, ensure_ascii=False)}
