"""What quantization cost, layer by layer: reports, the independent check of a finished file, comparisons."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch

from .architectures import split_prefix
from .checkpoint import Checkpoint
from .errors import CalibQuantError
from .formats import FORMATS, SOURCE, title
from .markers import FP8, declared_formats, read_config
from .modelfile import NATIVE
from .pack import squared_distance, squared_norm
from .progress import Progress
from .source import Source, apply_scale
from .textfile import gigabytes

ROWS = 1024  # rows decoded at once; a multiple of the 128-row tiles in which block scales are swizzled
TOLERANCE = 1e-3  # of a relative error: the two paths differ by float32 summation only


@dataclass(frozen=True)
class LayerReport:
    """One layer of a finished file. error: ||W - Q||^2 / ||W||^2 (relative error of the weights; 0 when kept)."""

    name: str
    format: str
    error: float
    shape: tuple[int, ...]
    nbytes: int
    reason: str = ""
    gains: dict[str, float] | None = None  # importance-weighted relative error by ingredient (hswq.Gains)
    rounding: str = ""
    note: str = ""  # why not a better rounding
    output_errors: dict[str, float] = field(default_factory=dict)  # by rounding, weights only, on sampled inputs
    loader_error: float | None = None  # of outputs with the inputs quantized as the loader will


@dataclass(frozen=True)
class Report:
    """What came out: sizes in bytes, seconds of the whole job, one entry per layer."""

    source: str
    output: str
    architecture: str
    recipe: str
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)

    def count(self) -> dict[str, int]:
        counts = Counter(layer.format for layer in self.layers)
        return {name: counts[name] for name in (*FORMATS, SOURCE) if counts[name]}

    def worst(self) -> LayerReport | None:
        """The quantized layer with the largest relative error."""
        quantized = [layer for layer in self.layers if layer.format != SOURCE]
        return max(quantized, key=lambda layer: layer.error, default=None)

    def mean_error(self) -> float:
        """Mean relative weight error of the quantized layers, every layer counting the same."""
        errors = [layer.error for layer in self.layers if layer.format != SOURCE]
        return fmean(errors) if errors else 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def summary(self) -> str:
        """Three lines for the node and the terminal: size, layers per format, worst layer."""
        saved = 100 * (1 - self.bytes_after / self.bytes_before) if self.bytes_before else 0.0
        counts = " · ".join(f"{n} {title(fmt)}" for fmt, n in self.count().items())
        lines = [
            f"{gigabytes(self.bytes_before)} → {gigabytes(self.bytes_after)} (−{saved:.0f} %)",
            f"layers: {counts}",
        ]
        worst = self.worst()
        if worst:
            lines.append(f"worst layer: {worst.name} ({title(worst.format)}), relative weight error {worst.error:.2e}")
        return "\n".join([*lines, *self._rounding(), *self._gains()])

    def _rounding(self) -> list[str]:
        """Mean output error by rounding, over the layers that were measured on sampled inputs."""
        measured = [layer for layer in self.layers if layer.output_errors]
        if not measured:
            return []
        names = [n for n in ("nearest", "search", "gptq") if any(n in layer.output_errors for layer in measured)]
        means = {n: fmean(x.output_errors[n] for x in measured if n in x.output_errors) for n in names}
        parts = ", ".join(f"{name} {value:.2e}" for name, value in means.items())
        loader = fmean(x.loader_error for x in measured if x.loader_error is not None)
        chosen = Counter(layer.rounding for layer in measured)
        used = ", ".join(f"{n} {name}" for name, n in chosen.items())
        return [
            f"output error on sampled inputs, mean of {len(measured)} layers, weights only: {parts}; "
            f"as the loader runs it {loader:.2e}",
            f"rounding: {used}",
        ]

    def _gains(self) -> list[str]:
        """What each of HSWQ's ingredients gave, averaged over the layers it was used on."""
        measured = [layer.gains for layer in self.layers if layer.gains]
        if not measured:
            return []
        means = {name: sum(g[name] for g in measured) / len(measured) for name in measured[0]}
        plain = means["plain_cast"] or 1.0
        parts = [f"{name.replace('_', ' ')} {m:.2e} ({100 * (m / plain - 1):+.1f} %)" for name, m in means.items()]
        return [f"HSWQ, importance-weighted error, mean of {len(measured)} layers: " + ", ".join(parts)]


class QuantizedFile:
    """A finished file, ours or a peer's, whose layers can be decoded by comfy-kitchen's arithmetic."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint = Checkpoint(path)
        self.prefix = split_prefix(self.checkpoint.entries)
        self.formats = declared_formats(self.checkpoint, self.prefix)

    def __enter__(self) -> QuantizedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    def format(self, layer: str) -> str:
        """The declared format, "float8_e4m3fn_unscaled" for bare FP8, else "bf16"."""
        dtype = self.checkpoint.entries[layer + ".weight"].dtype
        return self.formats.get(layer) or ("float8_e4m3fn_unscaled" if dtype in FP8 else SOURCE)

    def nbytes(self, layer: str) -> int:
        """Bytes of the layer's weight and of everything that belongs to its quantization."""
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant")
        entries = self.checkpoint.entries
        return sum(entries[f"{layer}.{n}"].nbytes for n in names if f"{layer}.{n}" in entries)

    def rows(self, layer: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """float32 parts of ``[out, ...]``, at most ``ROWS`` rows each."""
        fmt = self.format(layer)
        decode = FORMATS[fmt].decode if fmt in FORMATS else None
        tensors = self._tensors(layer, fmt)
        if decode and len(shape) == 2 and "weight_scale" in tensors and tensors["weight_scale"].numel() == 1:
            tensors["weight_scale"] = tensors["weight_scale"].reshape(())
        for start in range(0, shape[0], ROWS):
            part = {n: t[start : start + ROWS] if t.dim() > 1 else t for n, t in tensors.items()}
            size = (min(ROWS, shape[0] - start), *shape[1:])
            yield decode(part, size) if decode else part["weight"].float()

    def _tensors(self, layer: str, fmt: str) -> dict[str, torch.Tensor]:
        path, read = self.checkpoint.path, self.checkpoint.read
        if fmt == "float8_e5m2":
            scaled = apply_scale(path, layer, read(layer + ".weight"), read(layer + NATIVE.scale))
            return {"weight": scaled}
        if fmt not in FORMATS:
            if fmt != SOURCE:
                raise CalibQuantError(f"{path}: layer {layer}: format {fmt} cannot be decoded here")
            return {"weight": read(layer + ".weight")}
        inline = f"{layer}.comfy_quant" in self.checkpoint.entries and read_config(self.checkpoint, layer)
        if inline and (inline.get("convrot") or inline.get("params", {}).get("convrot")):
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
            if not abs(found - layer.error) <= TOLERANCE * layer.error:  # written so that NaN and Inf are caught
                raise CalibQuantError(
                    f"{report.output}: layer {layer.name} has relative error {found:.4e}, reported was "
                    f"{layer.error:.4e}: do not use this file, and report a bug"
                )


def compare(source: Source, path: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Per-layer weight error of a finished file against its source, worst first."""
    layers = []
    with QuantizedFile(path) as quantized:
        pairs = _pairs(source, quantized)
        for i, (name, other) in enumerate(pairs):
            if progress:
                progress(i, len(pairs), f"compare {name}")
            error = layer_error(source.load(name), quantized, other)
            layers.append(
                LayerReport(name, quantized.format(other), error, source.shape(name), quantized.nbytes(other))
            )
        after = quantized.checkpoint.nbytes()
    layers.sort(key=lambda layer: -layer.error)
    before = source.checkpoint.nbytes()
    return Report(str(source.path), str(path), source.architecture.name, "", before, after, layers=layers)


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
