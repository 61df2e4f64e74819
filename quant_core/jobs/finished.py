"""A finished file, ours or a peer's, decoded by the loader's own arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from ..errors import CalibQuantError
from ..files.checkpoint import Checkpoint
from ..files.markers import FP8, declared_configs
from ..formats import FORMATS, SOURCE
from ..models.architectures import split_prefix
from ..models.diffusers import present
from ..models.modelfile import NATIVE
from ..models.source import apply_scale
from ..rounding import smoothing
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import squared_distance, squared_norm

ROWS = 1024  # rows decoded at once; a multiple of the 128-row tiles in which block scales are swizzled


class QuantizedFile:
    """A finished file, ours or a peer's, whose layers can be decoded by comfy-kitchen's arithmetic."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint = Checkpoint(path)
        present(self.checkpoint)  # refuses scales that ComfyUI would lose
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
