"""A finished file, ours or a peer's, decoded by the loader's own arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from ..errors import CalibQuantError
from ..files.checkpoint import Checkpoint
from ..files.markers import FP8, declared_configs
from ..formats import FORMATS, SOURCE, Format, stored
from ..models.architectures import split_prefix
from ..models.diffusers import present
from ..models.modelfile import NATIVE
from ..models.source import apply_scale
from ..rounding import smoothing
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import squared_distance, squared_norm

ROWS = 1024  # rows decoded at once; a multiple of the 128-row tiles in which block scales are swizzled

# What a format's weight may consist of in a file.
TENSORS = (
    *("weight", "weight_scale", "weight_scale_2"),
    *("weight_s_rel", "weight_s_channel", "weight_codebook"),
)


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
        """A key of FORMATS where the layer's is known here, else the declared name; "bf16" when it is not quantized."""
        codec = self.codec(layer)
        return codec.name if codec else self.configs.get(layer, {}).get("format", SOURCE)

    def codec(self, layer: str) -> Format | None:
        """The format that decodes this layer as its file says; None for other formats and for 16-bit layers."""
        weight = self.checkpoint.entries[layer + ".weight"]
        if layer not in self.configs:
            return FORMATS["float8_e4m3fn_unscaled"] if weight.dtype in FP8 else None
        config, groups = self.configs[layer], self.checkpoint.entries.get(f"{layer}.weight_s_rel")
        columns = groups.shape[1] * config.get("group_size", 16) if groups else weight.shape[-1]
        return stored(config, 8 * weight.shape[-1] / columns)

    def nbytes(self, layer: str) -> int:
        """Bytes of the layer's weight and of everything that belongs to its quantization."""
        names = (*TENSORS, "input_scale", smoothing.KEY, "comfy_quant")
        entries = self.checkpoint.entries
        return sum(entries[f"{layer}.{n}"].nbytes for n in names if f"{layer}.{n}" in entries)

    def rows(self, layer: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """float32 parts of the ``[out, ...]`` that acts on unscaled inputs, at most ``ROWS`` rows each."""
        codec = self.codec(layer)
        decode = codec.decode if codec else None
        tensors = self._tensors(layer, codec)
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

    def _tensors(self, layer: str, codec: Format | None) -> dict[str, torch.Tensor]:
        path, read, fmt = self.checkpoint.path, self.checkpoint.read, self.format(layer)
        if fmt == "float8_e5m2":
            scaled = apply_scale(path, layer, read(layer + ".weight"), read(layer + NATIVE.scale))
            return {"weight": scaled}
        if codec is None:
            if fmt != SOURCE:
                raise CalibQuantError(f"{path}: layer {layer}: format {fmt} cannot be decoded here")
            return {"weight": read(layer + ".weight")}
        found = {n: read(f"{layer}.{n}") for n in TENSORS if f"{layer}.{n}" in self.checkpoint.entries}
        if "weight_s_channel" in found:  # one for each row, so that rows can be decoded a part at a time
            found["weight_s_channel"] = found["weight_s_channel"].reshape(-1, 1)
        return found


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
